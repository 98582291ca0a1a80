"""`initialize`: alone it touches nothing; among others it finds them, by whatever started them."""

import subprocess
import sys
import textwrap

import jax
import pytest

import jaxpar as jp
from jaxpar import _cluster
from jaxpar._cluster import _found, _local_devices, num_gpus, tasks_here
from jaxpar.run._group import free_port

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}


def test_alone_it_does_nothing():
    jp.initialize()
    jp.initialize()
    assert not jax.distributed.is_initialized()


def test_one_task_of_slurm_is_alone(monkeypatch):
    for name, value in {**STEP, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    jp.initialize()
    assert not jax.distributed.is_initialized()


def test_after_a_device_was_touched(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(jp.MeshError, match=r"jp\.initialize\(\) came after something had touched a device"):
        jp.initialize()


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("a:1", 4, 3)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, ("a:1", 4, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "PMI_SIZE": "2", "PMI_RANK": "1"}, ("a:1", 2, 1)),
        ({**STEP, "SLURM_NTASKS": "2"}, None),
    ],
    ids=["given", "open mpi", "mpich", "slurm: JAX finds out"],
)
def test_what_jax_is_told(env, found):
    names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
    assert _found(env) == ({} if found is None else dict(zip(names, (*found, "deactivate"), strict=True)))


@pytest.mark.parametrize(
    ("tasks", "place", "gpus", "ids"),
    [
        ("8(x2)", 5, 8, [5]),  # one process per GPU
        ("1(x2)", 0, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # one per node: JAX alone would leave seven idle
        ("2", 1, 8, [4, 5, 6, 7]),
        ("8", 5, 1, [0]),  # --gpus-per-task=1: each sees its own alone
    ],
)
def test_gpus_of_a_node_are_shared_out(tasks, place, gpus, ids, monkeypatch):
    env = {**STEP, "SLURM_LOCALID": str(place), "SLURM_STEP_TASKS_PER_NODE": tasks}
    env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    assert _local_devices(env) == {}  # JAX_PLATFORMS=cpu
    monkeypatch.setattr(_cluster._devices, "only_cpu", lambda: False)
    assert _local_devices(env) == {"local_device_ids": ids}
    assert _local_devices({**env, "CUDA_VISIBLE_DEVICES": ""}) == {}
    mpi = {"OMPI_COMM_WORLD_LOCAL_RANK": str(place), "OMPI_COMM_WORLD_LOCAL_SIZE": str(tasks_here(env))}
    assert _local_devices({**mpi, "CUDA_VISIBLE_DEVICES": env["CUDA_VISIBLE_DEVICES"]}) == {"local_device_ids": ids}


def test_gpus_that_are_named():
    assert num_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}) == 2
    assert num_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


SCRIPT = """
    import jaxpar as jp
    jp.initialize()
    jp.initialize()
    import jax
    print("process", jax.process_index(), "of", jax.process_count(), "devices", jax.device_count(), flush=True)
    if jax.process_index() == 1:
        raise RuntimeError("out of luck")  # it leaves at once, though process 0 waits for it at the end
"""


@pytest.mark.multiprocess
def test_two_tasks_of_slurm(child_env):
    """The script knows nothing of SLURM; and one that fails ends without waiting for the other."""
    peers, port = [], str(free_port())
    for rank in (0, 1):
        env = {**child_env, "JAX_NUM_CPU_DEVICES": "2", **STEP, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        env |= {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "JAX_COORDINATOR_PORT": port}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
        peers.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        out, err = peers[1].communicate(timeout=240)
        assert out.splitlines()[-1] == "process 1 of 2 devices 4", err
        assert peers[1].returncode == 1
        assert "RuntimeError: out of luck" in err
        assert peers[0].stdout.readline() in ("process 0 of 2 devices 4\n", GREETING)
    finally:
        for peer in peers:
            peer.kill()
            peer.communicate()


GREETING = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
