"""The pytest plugin, in processes of its own: what it loads, what it sets, and that a wrong count is an error."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def suite(tmp_path):
    """Run pytest on a suite of its own, with the plugin loaded by name."""

    def run(test, ini="", conftest="", **env):
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        (tmp_path / "test_it.py").write_text(textwrap.dedent(test))
        (tmp_path / "conftest.py").write_text(textwrap.dedent(conftest))
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTEST"))
        }
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "jaxpar.testing.plugin", "-q", "-p", "no:cacheprovider", "."],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


COUNT = """
    def test_devices():
        import jax
        assert [d.platform for d in jax.devices()] == ["cpu"] * {count}
"""


def test_loading_imports_no_jax(suite):
    done = suite("""
        import os, sys
        def test_nothing_is_loaded_or_set():
            assert "jaxpar.testing.plugin" in sys.modules
            assert not {"jax", "flax", "numpy"} & set(sys.modules)
            assert not [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]
    """)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_unasked_it_does_nothing(suite):
    done = suite(COUNT.format(count=1), JAX_PLATFORMS="cpu")
    assert "1 passed" in done.stdout, done.stdout


def test_devices_are_simulated(suite):
    done = suite(COUNT.format(count=8), ini="jaxpar_devices = 8")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_devices_are_simulated_after_a_conftest_imports_jax(suite):
    done = suite(COUNT.format(count=6), ini="jaxpar_devices = 6", conftest="import jax.numpy")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_xlas_own_flag_will_do(suite):
    flag = "--xla_force_host_platform_device_count=4"
    done = suite(COUNT.format(count=4), ini="jaxpar_devices = 4", XLA_FLAGS=flag, JAX_PLATFORMS="cpu")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    done = suite(COUNT.format(count=4), ini="jaxpar_devices = 8", XLA_FLAGS=flag, JAX_PLATFORMS="cpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "jaxpar_devices = 8, but JAX has 4 cpu device(s)" in done.stdout + done.stderr


def test_a_wrong_count_is_an_error_and_no_skip(suite):
    started = "import jax\njax.config.update('jax_platforms', 'cpu')\njax.devices()"
    done = suite("def test_nothing():\n    pass", ini="jaxpar_devices = 8", conftest=started)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    assert "jaxpar_devices = 8, but JAX has 1 cpu device(s)" in said
    assert "passed" not in said
    assert "skipped" not in said


@pytest.mark.parametrize("count", ["eight", "0", "-1"])
def test_a_count_that_is_none(suite, count):
    done = suite("def test_nothing():\n    pass", ini=f"jaxpar_devices = {count}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"jaxpar_devices = {count}: give a number of devices" in done.stdout + done.stderr


STRICT = """
    import jax, jax.numpy as jnp, pytest
    def test_promotion():
        assert jax.config.jax_default_matmul_precision == "highest"
        with pytest.raises(Exception, match="promotion"):
            jnp.ones(3, "int32") + jnp.ones(3, "float32")
        with pytest.raises(Exception, match="promotion"):
            jnp.ones(3) + jnp.ones((2, 3))
"""


@pytest.mark.parametrize("conftest", ["", "import jax"])
def test_strict(suite, conftest):
    assert "1 passed" in suite(STRICT, ini="jaxpar_strict = true", conftest=conftest, JAX_PLATFORMS="cpu").stdout
    if not conftest:
        assert "1 failed" in suite(STRICT, ini="jaxpar_strict = false", JAX_PLATFORMS="cpu").stdout
