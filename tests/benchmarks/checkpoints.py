"""MB/s of a save and of a restore beside Orbax by hand and the bare disk, and the peak of host memory of a restore.

Each contestant writes and reads the same arrays in turn, for some rounds, and one of them twice (A/A). What a restore
costs in memory is measured in processes of their own with one device each, as simulated devices share theirs: the most
that a process held beyond what it held before, beside the bytes of its shard.

    python tests/benchmarks/checkpoints.py [MB]
"""

import hashlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxpar import checkpoint

ROUNDS, NUM_LEAVES, NUM_PEERS = 5, 16, 2


def shapes(megabytes):
    rows = max(8, megabytes * 1_000_000 // 4 // NUM_LEAVES // 1024 // 8 * 8)
    return {f"w{index}": jax.ShapeDtypeStruct((rows, 1024), jnp.float32) for index in range(NUM_LEAVES)}


def bare_save(path, tree):
    path.mkdir()
    for name, leaf in tree.items():
        with (path / name).open("wb") as file:
            file.write(np.asarray(leaf).data)
            os.fsync(file.fileno())


def bare_restore(path, like):
    return {name: np.fromfile(path / name, leaf.dtype) for name, leaf in like.items()}


def throughput(megabytes):
    """A line a contestant: the best of its rounds, as a busy machine only ever adds time."""
    key = jax.random.key(0)  # random bits, which do not compress
    tree = {name: jax.random.normal(key, leaf.shape) for name, leaf in shapes(megabytes).items()}
    placed = {name: jax.device_put(leaf, jax.devices()[0]) for name, leaf in tree.items()}
    size = sum(leaf.nbytes for leaf in placed.values()) / 1e6
    save = {
        "jaxpar": lambda path: checkpoint.save(path, 1, placed),
        "jaxpar again": lambda path: checkpoint.save(path, 1, placed),
        "orbax": lambda path: ocp.save(str(path / "1"), placed),
        "disk": lambda path: bare_save(path, placed),
    }
    restore = {
        "jaxpar": lambda path: checkpoint.restore(path, placed),
        "jaxpar again": lambda path: checkpoint.restore(path, placed),
        "orbax": lambda path: ocp.load(str(path / "1"), placed),
        "disk": lambda path: bare_restore(path, placed),
    }
    seconds = {name: ([], []) for name in save}
    for _ in range(ROUNDS):
        for name, write in save.items():
            path = pathlib.Path(tempfile.mkdtemp()) / "home"
            start = time.perf_counter()
            write(path)
            middle = time.perf_counter()
            jax.block_until_ready(restore[name](path))
            seconds[name][0].append(middle - start)
            seconds[name][1].append(time.perf_counter() - middle)
            shutil.rmtree(path.parent)
    data = np.asarray(placed["w0"]).data
    start = time.perf_counter()
    hashlib.sha256(data)
    print(f"SHA-256 of one thread: {data.nbytes / 1e6 / (time.perf_counter() - start):,.0f} MB/s")
    for name, (saves, restores) in seconds.items():
        print(f"{name:14}save {size / min(saves):8,.0f} MB/s   restore {size / min(restores):8,.0f} MB/s")


def peer(index, port, home):
    """Restore onto this process's device, and say what that took."""
    jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PEERS, index)
    mesh = jax.make_mesh((NUM_PEERS,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("fsdp"))
    described = checkpoint._about.read(pathlib.Path(home) / "1").leaves
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.kind, sharding=sharding) for name, leaf in described.items()}
    checkpoint.restore(home, {"w0": like["w0"]}, part="")  # what loads once is loaded
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    found = checkpoint.restore(home, like)
    shard = sum(leaf.addressable_shards[0].data.nbytes for leaf in found.values()) / 1e6
    leaf = max(leaf.addressable_shards[0].data.nbytes for leaf in found.values()) / 1e6
    most = status("VmHWM") - before
    print(f"process {index}: shard {shard:,.0f} MB, of one leaf {leaf:,.0f} MB; most held {most:,.0f} MB", flush=True)


def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000


def memory(megabytes):
    """One line a process."""
    home = pathlib.Path(tempfile.mkdtemp())
    checkpoint.save(home, 1, {name: np.ones(leaf.shape, np.float32) for name, leaf in shapes(megabytes).items()})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "peer"]
    peers = [subprocess.Popen([*command, str(index), port, str(home)]) for index in range(NUM_PEERS)]
    for process in peers:
        process.wait()
    shutil.rmtree(home)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        megabytes = int(sys.argv[1]) if sys.argv[1:] else 512
        throughput(megabytes)
        memory(megabytes)
