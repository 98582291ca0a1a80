"""Saves and restores beside Orbax by hand and the bare disk, and what a save costs the steps that go on beside it.

Each contestant writes and reads the same arrays in turn, for some rounds that begin with another one each, and one of
them twice (A/A). What counts is the median of the rounds' ratios, as a busy machine slows neighbours alike; the best
round and CPU seconds stand beside it. Orbax by hand is there as its documentation has it, and as `jaxpar.checkpoint`
sets it (uncompressed, the same chunks and files). What is read was just written, so it comes from the memory of the
kernel.

The peak of host memory of a restore is asserted, in `tests/checkpoint/test_memory.py`.

    python tests/benchmarks/checkpoints.py [MB]
"""

import functools as ft
import hashlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxpar import checkpoint
from jaxpar.checkpoint import _orbax

ROUNDS, NUM_LEAVES = 9, 16
INTERVAL = 600  # seconds, the default of `fit`
EVERY, NUM_SAVES = 20, 3  # steps after each save: a few seconds; a user saves every few minutes


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


def orbax_save(path, tree, context):
    with context:
        ocp.save(str(path / "1"), tree)


def measured(function):
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - cpu


def throughput(megabytes):
    key = jax.random.key(0)  # random bits, of which zstd saves 8%
    tree = {name: jax.random.normal(key, leaf.shape) for name, leaf in shapes(megabytes).items()}
    placed = {name: jax.device_put(leaf, jax.devices()[0]) for name, leaf in tree.items()}
    size = sum(leaf.nbytes for leaf in placed.values()) / 1e6
    ours = lambda path: checkpoint.save(path, 1, placed), lambda path: checkpoint.restore(path, placed)
    load = lambda path: ocp.load(str(path / "1"), placed)
    contestants = {
        "jaxpar": ours,
        "jaxpar again": ours,
        "orbax": (lambda path: orbax_save(path, placed, ocp.Context()), load),
        "orbax, set alike": (lambda path: orbax_save(path, placed, _orbax.settings(placed)), load),
        "disk": (lambda path: bare_save(path, placed), lambda path: bare_restore(path, placed)),
    }
    seconds = {name: ([], []) for name in contestants}
    order = list(contestants)
    for _ in range(ROUNDS):
        order.append(order.pop(0))
        for name in order:
            save, restore = contestants[name]
            path = pathlib.Path(tempfile.mkdtemp()) / "home"
            seconds[name][0].append(measured(lambda: save(path)))  # noqa: B023  # called at once
            seconds[name][1].append(measured(lambda: restore(path)))  # noqa: B023
            shutil.rmtree(path.parent)
    data = np.asarray(placed["w0"]).data
    print(f"{size:,.0f} MB; SHA-256 of one thread: {data.nbytes / 1e6 / min(hashed(data) for _ in range(5)):,.0f} MB/s")
    for index, what in enumerate(("save", "restore")):
        own = [wall for wall, _ in seconds["jaxpar"][index]]
        for name, both in seconds.items():
            walls, cpus = zip(*both[index], strict=True)
            rate = [theirs / mine for mine, theirs in zip(own, walls, strict=True)]
            middle = "" if name == "jaxpar" else f"  jaxpar at {statistics.median(rate):5.2f} of its rate"
            print(
                f"{what:8} {name:18} {size / statistics.median(walls):6,.0f} MB/s, best {size / min(walls):6,.0f}, "
                f"{statistics.median(cpus):5.2f} CPU s{middle}"
            )


def hashed(data):
    start = time.perf_counter()
    hashlib.sha256(data)
    return time.perf_counter() - start


def stall(megabytes):
    """Steps over a state of this size, with a save beside them and without, in turn."""
    size = 1024
    state = {name: jnp.zeros(leaf.shape) for name, leaf in shapes(megabytes).items()}
    left, right = jax.random.normal(jax.random.key(0), (2, size, size))

    @ft.partial(jax.jit, donate_argnums=0)
    def step(state, left, right):
        product = jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ right), left)
        return jax.tree.map(lambda leaf: leaf + product.mean(), state)

    def steps(state, saving_in=None):
        """Seconds of `EVERY` steps, and of the call that saves before them."""
        state = jax.block_until_ready(step(state, left, right))
        start = time.perf_counter()
        saving = None if saving_in is None else checkpoint.save_async(saving_in, 1, state)
        blocked = time.perf_counter() - start
        for _ in range(EVERY):
            state = jax.block_until_ready(step(state, left, right))
        taken = time.perf_counter() - start
        if saving is not None:
            saving.wait()
        return state, taken, blocked

    taken = {"without": [], "without again": [], "with a save": []}
    blocked = []
    for _ in range(NUM_SAVES):
        for name, times in taken.items():
            path = tempfile.mkdtemp() if name == "with a save" else None
            state, seconds, waited = steps(state, path)
            times.append(seconds)
            if path is not None:
                blocked.append(waited)
                shutil.rmtree(path)
    one = min(taken["without"]) / EVERY
    copies = min(measured(lambda: jax.tree.map(np.array, state))[0] for _ in range(NUM_SAVES))
    stopped = min(blocked)
    print(f"a step: {one:.2f} s; a save stops it for {stopped:.3f} s, of which a copy of all arrays is {copies:.3f} s")
    print(f"that is {stopped / one:.1%} of one step; with a save every {INTERVAL} s {stopped / INTERVAL:.3%} of each")
    extra = min(taken["with a save"]) - min(taken["without"])
    print(f"with what goes on beside it {extra:.2f} s more: {extra / INTERVAL:.2%} of the time, every {INTERVAL} s")
    for name, times in taken.items():
        print(f"{name:14} {min(times):6.2f} s for {EVERY} steps, {min(times) / min(taken['without']) - 1:+.1%}")


if __name__ == "__main__":
    megabytes = int(sys.argv[1]) if sys.argv[1:] else 512
    throughput(megabytes)
    stall(megabytes // 2)
