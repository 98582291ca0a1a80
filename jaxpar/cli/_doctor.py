"""`jaxpar doctor`: what is here, what is missing, and what to type. Works when little does."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "chex", "numpy", "tyro")
EXTRAS = {  # the extra: what it is for, and a package that shows whether it is installed
    "cuda13": ("NVIDIA GPUs", "jax_cuda13_plugin"),
    "tpu": ("TPUs, and compiling for them without one", "libtpu"),
    "hf": ("tokenisers and weights of Hugging Face", "tokenizers"),
    "tensorboard": ("metrics in TensorBoard", "tensorboardX"),
    "wandb": ("metrics in Weights & Biases", "wandb"),
    "notebook": ("the notebooks, and pictures as PNG", "matplotlib"),
}


def report() -> str:
    """Versions, devices, extras and the environment, as text; each thing missing with its remedy."""
    parts = [["versions", *_versions()], ["devices", *_devices()], ["extras", *_extras()], ["environment", *_environment()]]
    return "\n\n".join("\n  ".join(part) for part in parts)


def _versions() -> list[str]:
    lines = [f"python {platform.python_version()} ({platform.system()} {platform.machine()})"]
    if sys.version_info < (3, 12):
        lines[0] += "; Python 3.12 or later gets newer versions of JAX"
    for package in ("jaxpar", *CORE):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            remedy = "pip install ." if package == "jaxpar" else f"pip install {package}"
            lines.append(f"{package} is not installed: {remedy}")
    return lines


def _devices() -> list[str]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver or plugin may raise anything; that is a finding
        return [f"JAX does not start: {error}", "On a machine without accelerators: JAX_PLATFORMS=cpu jaxpar doctor"]
    kinds = sorted({device.device_kind for device in devices})
    lines = [f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()}), {jax.process_count()} process(es)"]
    if jax.default_backend() == "cpu":
        lines.append("no accelerator in use. To simulate eight devices: --mesh meshes/cpu_8.toml, or jp.simulate(8)")
        if any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/accel0")) and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
            lines.append("there is one in this machine: pip install 'jaxpar[cuda13]' (NVIDIA) or 'jaxpar[tpu]'")
    return lines


def _extras() -> list[str]:
    lines = []
    for extra, (purpose, module) in EXTRAS.items():
        here = importlib.util.find_spec(module) is not None
        lines.append(f"{extra}: {purpose}, " + ("installed" if here else f"not installed: pip install 'jaxpar[{extra}]'"))
    return lines


def _environment() -> list[str]:
    names = ("JAXPAR_MESH", "JAX_PLATFORMS", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ] or ["nothing set that matters here"]
