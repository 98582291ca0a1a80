"""A pytest plugin: simulated devices and strict numerics, if the ini file asks. Loaded by pytest in every project.

    [tool.pytest.ini_options]
    jaxpar_devices = 8       # simulate 8 CPU devices, and fail (never skip) where there are not 8
    jaxpar_strict = true     # dtype and rank promotion are errors; matmuls in the highest precision

and `pytest --update-traffic` accepts what `assert_traffic(program, "file.json")` finds, rather than comparing.

Imports no JAX when it is loaded, and does nothing unless asked. JAX reads its settings from the environment when it
is imported; if a conftest has imported it already, they are set on it directly.
"""

import os
import sys
from typing import Any

import pytest

_STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "highest",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the two settings and the flag."""
    group = parser.getgroup("jaxpar")
    group.addoption("--update-traffic", action="store_true", help="write the files that assert_traffic compares with")
    parser.addini("jaxpar_devices", "CPU devices that JAX simulates in this suite; fails where there are not so many")
    parser.addini("jaxpar_strict", "strict dtype and rank promotion, and the highest matmul precision", type="bool")


def pytest_configure(config: pytest.Config) -> None:
    """Set JAX up, before anything can start it."""
    if config.getoption("--update-traffic"):
        os.environ["JAXPAR_UPDATE_TRAFFIC"] = "1"
    if config.getini("jaxpar_strict"):
        for name, value in _STRICT.items():
            _set(name, value)
    wanted = _wanted(config)
    if wanted is None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # XLA's own flag has the word, and is checked like ours
    try:
        _set("jax_num_cpu_devices", wanted)
        _set("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    except RuntimeError:  # a conftest has started JAX: pytest_sessionstart says so, if the number is wrong
        return


def pytest_sessionstart(session: pytest.Session) -> None:
    """Count the devices. A suite that needs eight and finds one must not go green."""
    wanted = _wanted(session.config)
    if wanted is None:
        return
    import jax

    from jaxpar._devices import enough_threads

    with enough_threads(wanted):
        found = jax.devices()
    if len(found) != wanted or found[0].platform != "cpu":
        raise pytest.UsageError(
            f"jaxpar_devices = {wanted}, but JAX has {len(found)} {found[0].platform} device(s). JAX was started "
            "before pytest could set it up, or an environment variable says otherwise (JAX_PLATFORMS, XLA_FLAGS). "
            "Start no JAX computation while a conftest or a plugin is imported, or unset the variable."
        )


def _wanted(config: pytest.Config) -> int | None:
    written = str(config.getini("jaxpar_devices") or "").strip()
    if not written:
        return None
    if not written.isdigit() or int(written) < 1:
        raise pytest.UsageError(f"jaxpar_devices = {written}: give a number of devices, such as 8.")
    return int(written)


def _set(name: str, value: Any) -> None:
    if "jax" in sys.modules:
        import jax

        jax.config.update(name, value)
    else:
        os.environ[name.upper()] = str(value)
