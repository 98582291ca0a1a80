"""How every test runs: on eight CPU devices, with strict promotion, with types checked at run time.

This file configures JAX before its backend starts and before `jaxpar` is imported; nothing here may be skipped in
silence. With one device fewer, a suite about sharding is green and has tested nothing.
"""

import importlib.util
import os
import pathlib
import platform
import sys
import typing

# Tests that start a process pass these on: a child neither searches for a TPU nor takes one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("PJRT_NPROC", "64")  # or XLA may wait for a thread for ever: `jaxpar._devices.enough_threads`
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two workers may compile for TPU at once

import beartype
import jax
import jaxtyping
import pytest
from jax._src import dtypes

ROOT = pathlib.Path(__file__).parent.parent
NUM_DEVICES = 8

# Compiled programs are kept between runs and shared by test workers. Their source lines are in the key: without them a
# program reports the lines of whichever test compiled it first. So is the machine: XLA compiles for its CPU.
COMPILATION_CACHE = ROOT / ".cache" / "xla" / f"{jax.__version__}-{platform.node()}"

for option, value in {
    "jax_platforms": "cpu",
    "jax_num_cpu_devices": NUM_DEVICES,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "highest",
    "jax_compilation_cache_dir": str(COMPILATION_CACHE),
    "jax_compilation_cache_include_metadata_in_key": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(option, value)


def check_types(function):
    """Have beartype check the arguments and the result of `function` at every call.

    `Self` is left out: beartype knows it where it decorates a whole class, and jaxtyping decorates its functions.
    """
    for name, hint in function.__annotations__.items():
        if hint is typing.Self:
            function.__annotations__[name] = typing.Any
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)  # an int is a float


# jaxtyping takes the checker as an expression that starts with the name of a module to import.
jaxtyping.install_import_hook(["jaxpar", "models"], f"sys.modules[{__name__!r}].check_types")

# optax and flax mix dtypes, as JAX allows by default: `decay ** count` with an int32 count, float32 statistics of a
# bfloat16 array. So do `jax.nn` and the lowering of a matrix product. They go on doing so; an operation that our own
# code asks for is strict. JAX offers one switch for all, hence the private name; a function that JAX has traced for
# optax may serve us from its cache.
TRANSPARENT = {"_pytest", "beartype", "hypothesis", "jax", "jaxlib", "jaxtyping", "pluggy", "pytest"}
least_upper_bound = dtypes._least_upper_bound


def promote(mode, *args):
    return least_upper_bound(mode if is_ours(sys._getframe(1)) else type(mode).STANDARD, *args)


def is_ours(frame):
    """Whether this repository's code asks for the operation: the nearest frame that is not JAX's or a test tool's."""
    while frame:
        _, installed, inside = frame.f_code.co_filename.partition("/site-packages/")
        if inside.startswith(("jax/_src/nn/", "jax/_src/interpreters/mlir")):
            return False
        if installed and inside.split("/")[0] not in TRANSPARENT:
            return False
        if not installed and frame.f_code.co_filename.startswith((f"{ROOT}/", "<doctest")):
            return True
        frame = frame.f_back
    return True


dtypes._least_upper_bound = promote


def pytest_sessionstart():
    """Starts the backend, so that no test can find fewer devices than its mesh needs."""
    if jax.default_backend() != "cpu" or jax.device_count() != NUM_DEVICES:
        pytest.exit(f"The tests need {NUM_DEVICES} CPU devices and found {jax.devices()}.", returncode=3)


def pytest_collection_modifyitems(items):
    """What needs a package that is not here is skipped with the remedy; in CI, where it belongs, it runs and fails."""
    # torch for the CPU alone is a wheel of Python 3.11; the one of 3.12 brings gigabytes of CUDA.
    with_torch = bool(os.environ.get("CI")) and sys.version_info < (3, 12)
    for marker, package, expected, remedy in (
        ("libtpu", "libtpu", bool(os.environ.get("CI")), "no TPU compiler here: pip install 'jaxpar[tpu]'"),
        ("torch", "transformers", with_torch, "no transformers here: pip install transformers torch"),
    ):
        if not expected and not importlib.util.find_spec(package):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=remedy))


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    """The environment for a Python process of a test: this checkout, eight CPU devices, the compilation cache."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILATION_CACHE),
        "JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
