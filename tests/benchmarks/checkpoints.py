"""MB/s of a save and of a restore beside Orbax by hand and the bare disk, and the peak of host memory of a restore.

Each contestant writes and reads the same arrays in turn, for some rounds, and one of them twice (A/A). What is read was
just written, so it comes from the memory of the kernel.

    python tests/benchmarks/checkpoints.py [MB]
"""

import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxpar import checkpoint

ROUNDS, NUM_LEAVES = 5, 16


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


if __name__ == "__main__":
    throughput(int(sys.argv[1]) if sys.argv[1:] else 512)
