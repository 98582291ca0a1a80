"""The devices that this process has: attached, or simulated on its CPU; and whether other processes have the rest.

JAX decides what devices there are when it is first asked for one, and keeps to it. So nothing here asks before it must:
planning for hardware that is elsewhere leaves JAX unstarted, and `cpu:8` can still be simulated afterwards.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping

import jax

from . import _hardware
from ._errors import MeshError
from ._hardware import Device, Hardware

_logger = logging.getLogger("jaxpar")


def simulate(num_devices: int) -> list[Device]:
    """Make this process see `num_devices` CPU devices, at any time: in a script, a test or a live notebook.

    Does nothing if it already does. If JAX is already running on other devices, it starts again: every compiled
    function is dropped, and arrays, keys and meshes made before stay on the old devices and do not mix with new ones;
    what was discarded is logged. The devices share the host's cores and memory. Setting
    `XLA_FLAGS=--xla_force_host_platform_device_count=8` and `PJRT_NPROC=64` before Python starts does the same (see
    `jaxpar._devices.enough_threads`).

    Raises:
        MeshError: `num_devices` is not a positive number, or this process belongs to a cluster.

    Example:
        >>> len(jp.simulate(8))
        8
    """
    if isinstance(num_devices, bool) or num_devices < 1:
        raise MeshError(f"simulate({num_devices}): give the number of CPU devices to simulate, such as jp.simulate(8).")
    if jax.distributed.is_initialized() or cluster():
        raise MeshError(
            f"simulate({num_devices}): this process belongs to a cluster, and starting JAX again would cut it off from "
            "the rest. Give each process its devices before it starts: JAX_NUM_CPU_DEVICES=2."
        )
    if (started := _start_cpu(num_devices)) is not None:
        return started
    before = jax.devices()
    if before[0].platform == "cpu" and len(before) == num_devices:
        return before
    arrays = jax.live_arrays()
    size = sum(array.nbytes for array in arrays) / 2**20
    from jax.extend import backend

    backend.clear_backends()
    _start_cpu(num_devices)
    _logger.warning(
        "jp.simulate(%d): JAX was running on %s and has started again on %s. Left behind: %s (%.1f MiB) and every "
        "compiled function. Arrays, keys and meshes made before do not mix with new ones: make them again.",
        num_devices,
        _hardware.counted(len(before), f"{before[0].platform.upper()} device"),
        _hardware.counted(num_devices, "CPU device"),
        _hardware.counted(len(arrays), "array"),
        size,
    )
    return jax.devices()


@contextlib.contextmanager
def unstarted() -> Iterator[None]:
    """What is done within leaves JAX unstarted, if it was: for lowering, which asks for a device and needs none.

    JAX then starts on this host's CPU alone, looks for no accelerator, and forgets that it did.
    """
    config = jax.config
    before = config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    try:
        config.update("jax_num_cpu_devices", config.jax_num_cpu_devices)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:  # it refuses this option once it has started
        yield
        return
    from jax.extend import backend

    config.update("jax_platforms", "cpu")
    try:
        yield
    finally:
        backend.clear_backends()
        config.update("jax_platforms", before)


def attached(hardware: Hardware | None, *, allow_unused: bool) -> list[Device] | None:
    """The attached devices, if they are `hardware`; every one for `None`. `None` if the hardware is not here.

    `cpu:8` is always here: it is simulated if JAX has not started.

    Raises:
        MeshError: This process is one of several and does not know the others yet, or JAX runs on other devices than
            the CPU devices asked for.
    """
    if hardware is not None and hardware.kind != "cpu" and only_cpu():
        return None
    check_cluster()
    if hardware is None:
        return jax.devices()
    if hardware.kind == "cpu":
        return _cpu_devices(hardware.num_devices, allow_unused)
    here = _hardware.of_devices(jax.devices())
    same = (here.chip.name, here.num_devices) == (hardware.chip.name, hardware.num_devices)
    if same and hardware.kind == "tpu":
        same = (here.num_slices, sorted(here.topology)) == (hardware.num_slices, sorted(hardware.topology))
    return jax.devices() if same else None


def speaks() -> bool:
    """Whether this process is the one that logs for all."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_cluster() -> None:
    """Refuse to go on in a process that is one of several, before it knows the others.

    Raises:
        MeshError: Naming the evidence and the call that is missing.
    """
    if (found := cluster()) and not jax.distributed.is_initialized():
        raise MeshError(
            f"This process is one of several ({found}), and would see only its own devices. Call "
            "jp.initialize() before anything touches a device. A process that is meant to work alone says "
            "so: jp.mesh(devices=jax.local_devices(), ...)."
        )


def cluster() -> str:
    """How the environment shows that this process is one of several, or nothing. Asks no network and starts nothing.

    Looks at SLURM, MPI, JAX's own variables, an indexed Kubernetes job (where only process 0 cannot tell) and TPU pods.
    """
    env = os.environ
    # Inside a batch script, which runs once, SLURM counts tasks but there is no step: JAX tells the two apart so, too.
    in_step = all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"))
    counts = ["SLURM_NTASKS"] if in_step else []
    counts += ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JAX_NUM_PROCESSES"]
    counts += [] if only_cpu() else ["MEGASCALE_NUM_SLICES"]
    for name in counts:
        if _number(env, name) > 1:
            return f"{name}={env[name]}"
    if env.get("JAX_COORDINATOR_ADDRESS") and _number(env, "JAX_NUM_PROCESSES") != 1:
        return f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']}"
    if _number(env, "JOB_COMPLETION_INDEX") > 0:
        return f"JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']}"
    for name in () if only_cpu() else ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        hosts = env.get(name, "").split(",")
        # Without a TPU, libtpu leaves a sentence with a comma in the variable.
        if len(hosts) > 1 and all(re.fullmatch(r"[\w.:\[\]-]+", host.strip()) for host in hosts):
            return f"{name} lists {len(hosts)}"
    return ""


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    return int(value) if value.isdigit() else 0


def only_cpu() -> bool:
    """Whether JAX was told to use nothing but the CPU: on a TPU host, say, but not on its TPUs."""
    return jax.config.jax_platforms == "cpu"  # pyright: ignore[reportAttributeAccessIssue] (JAX adds options at run time)


def _cpu_devices(num_devices: int, allow_unused: bool) -> list[Device]:
    """`num_devices` CPU devices: simulated if JAX has not started, else those that there are."""
    if not jax.distributed.is_initialized() and (started := _start_cpu(num_devices)) is not None:
        return started
    devices = jax.devices()
    is_cpu = devices[0].platform == "cpu"
    if is_cpu and len(devices) == num_devices:
        return devices
    if is_cpu and len(devices) > num_devices and allow_unused:
        return devices[:num_devices]
    idle = " To leave the others idle say so: allow_unused=True." if is_cpu and len(devices) > num_devices else ""
    running = _hardware.counted(len(devices), f"{devices[0].platform.upper()} device")
    raise MeshError(
        f"cpu:{num_devices}: JAX is already running on {running}. Call jp.simulate({num_devices}) first.{idle}"
    )


def _start_cpu(num_devices: int) -> list[Device] | None:
    """Start JAX on `num_devices` CPU devices; `None` if it has started: it refuses this option afterwards."""
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        return None
    jax.config.update("jax_platforms", "cpu")
    with enough_threads(num_devices):
        return jax.devices()


THREADS = 8  # for each simulated device; with 2 the program below still stuck every other time, with 4 it did not


@contextlib.contextmanager
def enough_threads(num_devices: int) -> Iterator[None]:
    """JAX, started within on simulated devices, has threads for collectives that wait side by side on one device.

    XLA:CPU takes as many threads as there are cores or devices, whichever are more, and a collective keeps one until
    all devices have come. Where a program has two that do not depend on one another, a device may wait in both and
    leave none to another: then all wait, and XLA ends the process after 60 seconds. Seen with 8 devices on 2 cores: 7
    in an all-reduce, and the eighth thread in an all-gather of a device that was in the all-reduce too. XLA reads how
    many threads it is to have when it starts, from this variable; one that is set already has the word.
    """
    if {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        yield
        return
    os.environ["PJRT_NPROC"] = str(max(os.cpu_count() or 1, THREADS * num_devices))
    try:
        yield
    finally:
        del os.environ["PJRT_NPROC"]
