"""Arrays of a store read in blocks: a process holds its own pieces of them, and of all else no more than `READ_BYTES`.

A store keeps an array in chunks, and who reads a part of a chunk has all of it in memory for a moment, raw and decoded.
Orbax bounds how many pieces it reads at once, and a piece may touch each chunk of its array: columns of what was saved
by rows. So pieces are cut along the chunks, and a block is asked for once there is room for all chunks that it touches.
"""

import collections
import dataclasses
import functools as ft
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from .._errors import CheckpointError
from .._hardware import Device
from ._target import Asked

READ_BYTES = 1 << 24  # of chunks, of which some are there twice: as read, and decoded

Spans = tuple[tuple[int, int], ...]
"""Start and stop of each dim."""


def read(opening: Mapping[str, Any], asked: Mapping[str, Asked]) -> dict[str, Any]:
    """Arrays by name, each onto the sharding that is asked for, or into the NumPy array that is.

    Args:
        opening: Futures of TensorStore's arrays.
        asked: A dtype may be another one than that of the store. What no device of this process holds is not read.
    Raises:
        CheckpointError: An array has another shape in the store.
    """
    window, values = _Window(READ_BYTES), {}
    for name, target in asked.items():
        store = opening[name].result()
        if store.shape != target.shape:
            raise CheckpointError(
                f"{name}: {store.shape} in the store, {target.shape} was asked for. The checkpoint contradicts itself: "
                "restore another step."
            )
        if isinstance(target, np.ndarray):
            _fill(target, store, tuple((0, size) for size in target.shape), window)
            values[name] = target
            continue
        held: list[jax.Array] = []
        for spans, devices in _holders(target).items():
            piece = np.empty([stop - start for start, stop in spans], target.dtype)
            _fill(piece, store, spans, window)
            window.then(ft.partial(_put, piece, devices, target.sharding.memory_kind, held))
        window.then(ft.partial(_join, values, name, target, held))
    window.wait()
    return values


@dataclasses.dataclass
class _Window:
    """What is being read, in the order in which it was asked for."""

    most: int
    held: int = 0
    reads: collections.deque[tuple[int, Callable[[], Any]]] = dataclasses.field(default_factory=collections.deque)

    def read(self, cost: int, start: Callable[[], Callable[[], Any]]) -> None:
        """Start a read once there is room; what `start` returns waits for it."""
        while self.held and self.held + cost > self.most:
            self._end_first()
        self.held += cost
        self.reads.append((cost, start()))

    def then(self, act: Callable[[], Any]) -> None:
        """Call this when all that was asked for before is there."""
        self.reads.append((0, act))

    def wait(self) -> None:
        """Return when everything is there and done."""
        while self.reads:
            self._end_first()

    def _end_first(self) -> None:
        cost, end = self.reads.popleft()
        end()
        self.held -= cost


def _fill(piece: np.ndarray, store: Any, spans: Spans, window: _Window) -> None:
    """Ask for all blocks of a piece, which spans these indices of the array."""
    import tensorstore as ts

    kind = store.dtype.numpy_dtype
    grid = store.chunk_layout.read_chunk.shape or ()  # `None` of a number
    for block, cost in _blocks(spans, grid, kind.itemsize, READ_BYTES // 4):
        source = store[tuple(slice(*span) for span in block)]
        where = tuple(
            slice(start - first, stop - first) for (start, stop), (first, _) in zip(block, spans, strict=True)
        )
        if kind == piece.dtype:
            into = ts.array(piece[(*where, ...)])
            origin = [start for start, _ in block]
            start = lambda: into[ts.d[:].translate_to[origin]].write(source).result  # noqa: B023  # called at once
        else:
            start = lambda: ft.partial(_cast, source.read(), piece[(*where, ...)])  # noqa: B023
            cost += math.prod(source.shape) * kind.itemsize
        window.read(cost, start)


def _cast(read: Any, into: np.ndarray) -> None:
    into[...] = read.result()  # NumPy rounds, and not TensorStore, which does it otherwise for some pairs of dtypes


def _blocks(spans: Spans, grid: Sequence[int], itemsize: int, most: int) -> Iterator[tuple[Spans, int]]:
    """Cut along a grid of chunks until what a block touches is `most` bytes, or one chunk; with what it touches."""
    todo = [spans]
    while todo:
        block = todo.pop()
        touched = [(start // size, -(-stop // size)) for (start, stop), size in zip(block, grid, strict=True)]
        chunks = [stop - start for start, stop in touched]
        cost = math.prod(chunks) * math.prod(grid) * itemsize
        dim = next((dim for dim, num in enumerate(chunks) if num > 1), None)
        if cost <= most or dim is None:
            yield block, cost
            continue
        (start, stop), middle = block[dim], sum(touched[dim]) // 2 * grid[dim]
        todo += [(*block[:dim], half, *block[dim + 1 :]) for half in ((middle, stop), (start, middle))]


def _holders(target: jax.ShapeDtypeStruct) -> dict[Spans, list[Device]]:
    """The pieces that devices of this process hold."""
    holders: dict[Spans, list[Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(each.indices(size)[:2] for each, size in zip(index or (), target.shape, strict=True))
        holders.setdefault(spans, []).append(device)
    return holders


def _put(piece: np.ndarray, devices: list[Device], memory_kind: str | None, held: list[jax.Array]) -> None:
    own = [jax.device_put(piece, SingleDeviceSharding(device, memory_kind=memory_kind)) for device in devices]
    held += jax.block_until_ready(own)  # or pieces would gather in host memory before a slow device


def _join(values: dict[str, Any], name: str, target: jax.ShapeDtypeStruct, held: list[jax.Array]) -> None:
    values[name] = jax.make_array_from_single_device_arrays(target.shape, target.sharding, held, dtype=target.dtype)
