"""`initialize`: this process joins the others of its run, if there are any, however they were started.

jaxpar launch    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; anybody may set them
SLURM (srun)     JAX finds the coordinator and the ranks
MPI (mpirun)     JAX does, with Open MPI 4 or with mpi4py; with others the coordinator's address must be given
Kubernetes       an indexed job: JAX does, with the `kubernetes` package and leave to read its own pods
"""

import atexit
import importlib.util
import logging
import os
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from . import _crash, _devices
from ._errors import MeshError

# Heartbeats come from a thread of the runtime, whatever Python does: silence means dead, frozen or cut off. After a
# death without a launcher the others end within this time; JAX itself waits for 100 seconds, and for 300 at the end.
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 60

RANKS = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}  # of MPI: how many, and which
_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_log = logging.getLogger("jaxpar")


def initialize() -> None:
    """Join the other processes of this run: under `jaxpar launch`, SLURM, MPI or Kubernetes. Alone it does nothing.

    The same script runs unchanged under all of them and by itself. Called before anything touches a device, before or
    after any import; a second call does nothing. At a good end the processes part in order; one that ends by an
    exception leaves at once, so that the others are not kept waiting; without a launcher they end within 30 seconds.

    One process per GPU and one per node are both right: the GPUs of a node are shared out evenly among its processes.
    The coordinator (process 0) listens without authentication: on a network that you trust.

    Raises:
        MeshError: The others cannot be found, or a device was touched before.

    Example:
        >>> jp.initialize()  # alone
        >>> jax.process_count()
        1
    """
    if jax.distributed.is_initialized() or not (_devices.cluster() or "JOB_COMPLETION_INDEX" in os.environ):
        return
    try:
        jax.distributed.initialize(
            **_found(os.environ),
            **_local_devices(os.environ),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        raise MeshError(
            "jp.initialize() came after something had touched a device (jax.devices(), an array, a mesh). Call it "
            "first, right after the imports."
        ) from None
    except ValueError as error:
        raise MeshError(
            f"This process is one of several ({_devices.cluster() or 'an indexed job'}), and JAX does not find the "
            f"others: {error} Set {', '.join(_GIVEN)} for each, or start them by jaxpar launch."
        ) from error
    _crash.install()
    atexit.register(jax.distributed.shutdown)


def _found(env: Mapping[str, str]) -> dict[str, Any]:
    """What JAX has to be told of the group; nothing where it finds out."""
    address = env.get("JAX_COORDINATOR_ADDRESS")
    ranks = {"JAX_NUM_PROCESSES": "JAX_PROCESS_ID", **RANKS}
    for size, rank in ranks.items():
        if address and size in env and rank in env:
            given = {"coordinator_address": address, "num_processes": int(env[size]), "process_id": int(env[rank])}
            return {**given, "cluster_detection_method": "deactivate"}  # what else is there must not have a say
    is_mpi = any(size in env for size in RANKS) and "OMPI_MCA_orte_hnp_uri" not in env
    if is_mpi and importlib.util.find_spec("mpi4py"):
        return {"cluster_detection_method": "mpi4py"}
    return {}


def _local_devices(env: Mapping[str, str]) -> dict[str, Any]:
    """This process's share of the GPUs that it sees, under SLURM and MPI.

    JAX gives each process there one GPU, by its place on the node: with one process on a node the others would idle.
    """
    if "SLURM_LOCALID" in env:
        place, tasks = int(env["SLURM_LOCALID"]), tasks_here(env)
    elif "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        place, tasks = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    else:
        return {}
    if "JAX_LOCAL_DEVICE_IDS" in env or _devices.only_cpu() or not (gpus := num_gpus(env)):
        return {}
    if gpus < tasks:  # the cluster has given each process its own already
        return {"local_device_ids": list(range(gpus))}
    share = gpus // tasks
    if gpus % tasks:
        text = "%d processes share %d GPUs of this node: %d each, and %d idle."
        _log.warning(text, tasks, gpus, share, gpus % tasks)
    return {"local_device_ids": list(range(place * share, (place + 1) * share))}


def tasks_here(env: Mapping[str, str]) -> int:
    """How many tasks of this step SLURM runs on this node: `SLURM_STEP_TASKS_PER_NODE` is `8(x2),4`, by node.

    Example:
        >>> tasks_here({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"})
        4
    """
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def num_gpus(env: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs a process with this environment sees. Asks the driver's tool, and starts nothing of CUDA."""
    if (said := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in said.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return len([line for line in found.stdout.splitlines() if line.startswith("GPU ")])
