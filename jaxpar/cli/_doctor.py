"""`jaxpar doctor`: what is here, what is missing, and what to type. Works when little does.

It imports no jaxpar beside itself, and asks JAX for its devices in another process, for a minute at most: a driver that
aborts or waits for other hosts stops nothing here, and no accelerator is taken. Nothing distributed is started.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "rich", "tyro")
OPTIONAL = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
EXTRAS = {  # the extra: what it is for, and modules that show whether it is installed
    "cuda13": ("NVIDIA GPUs; cuda12 for older drivers", ("jax_cuda13_plugin|jax_cuda12_plugin",)),
    "tpu": ("TPUs, and compiling for them without one", ("libtpu",)),
    "hf": ("tokenisers and weights of Hugging Face", ("huggingface_hub", "safetensors", "tokenizers")),
    "tensorboard": ("metrics in TensorBoard", ("tensorboardX",)),
    "wandb": ("metrics in Weights & Biases", ("wandb",)),
    "notebook": ("notebooks, and pictures as PNG", ("ipykernel", "matplotlib", "nbclient", "nbformat")),
}
VARIABLES = (
    "JAXPAR_MESH",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_NUM_CPU_DEVICES",
    "PJRT_NPROC",
    "JAX_COMPILATION_CACHE_DIR",
)
ACCELERATORS = {"/dev/nvidia0": "cuda13", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
ASK = (
    "import jax; d = jax.devices(); kinds = sorted({each.device_kind for each in d});"
    "print(jax.default_backend(), len(d), ', '.join(kinds), sep='|')"
)
SECONDS = 60
REMEDY = "With the CPU alone: JAX_PLATFORMS=cpu jaxpar doctor"


def report() -> str:
    """Versions, devices, extras and the environment, as text; each thing missing with its remedy."""
    parts = {
        "versions": _versions(),
        "devices": _devices(),
        "extras": _extras(),
        "environment": [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ] or ["as it comes"],
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in parts.items())


def _versions() -> list[str]:
    advice = "; later ones than 3.11 get newer versions of JAX" if sys.version_info < (3, 12) else ""
    lines = [f"python {platform.python_version()} ({platform.system()} {platform.machine()}){advice}"]
    if _version("jaxpar") is None:
        root = pathlib.Path(__file__).parents[2]
        lines.append(f"jaxpar is run from {root}, not installed: pip install --editable {root}")
    else:
        lines.append(f"jaxpar {_version('jaxpar')}")
    for package in CORE:
        lines.append(f"{package} {_version(package) or f'is not installed: pip install {package}'}")
    return lines + [f"{package} {_version(package)}" for package in OPTIONAL if _version(package) is not None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    asked = [sys.executable, "-c", ASK]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [f"JAX does not answer within {SECONDS} s: is another process using the device?", REMEDY]
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return [f"JAX does not start: {last}", REMEDY]
    backend, number, kinds = found.stdout.strip().splitlines()[-1].split("|")
    lines = [f"{number} x {kinds} ({backend})"]
    if backend == "cpu":
        lines.append("no accelerator in use; eight devices can be simulated: --mesh cpu:8, or jp.simulate(8)")
        there = [extra for path, extra in ACCELERATORS.items() if pathlib.Path(path).exists()]
        if there and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
            lines.append(f"this machine has one, which JAX does not see: pip install 'jaxpar[{there[0]}]'")
    return lines


def _extras() -> list[str]:
    lines = []
    for extra, (purpose, modules) in EXTRAS.items():
        missing = [each for each in modules if not any(importlib.util.find_spec(one) for one in each.split("|"))]
        lacks = f" (lacks {', '.join(missing)})" if 0 < len(missing) < len(modules) else ""
        state = f"not installed{lacks}: pip install 'jaxpar[{extra}]'" if missing else "installed"
        lines.append(f"{extra}: {purpose}: {state}")
    return lines
