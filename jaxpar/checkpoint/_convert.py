"""Write a checkpoint anew: another dtype, a part of it, stacks of layers cut or joined. On the host, without a model.

One batch of leaves is in memory at a time, so that a checkpoint larger than the machine's memory is converted on it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError, nearest
from . import _about, _orbax
from ._about import Leaf
from ._diff import host_array
from ._match import EACH
from ._save import begin, check_place, commit
from ._steps import check, complete, root

BATCH_BYTES = 1 << 30

Made = tuple[Leaf, Callable[[], np.ndarray] | None]
"""A leaf of the new checkpoint, and how its array is read."""


def convert(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    step: int | None = None,
    part: str = "",
    dtype: str | None = None,
    cut: str | None = None,
    join: str | None = None,
) -> int:
    """Write a checkpoint of `directory` to `target`, changed as asked; returns its step. By one process alone.

    `restore` changes layout and dtype by itself; this is for files that others read, and to make them smaller.

    Args:
        directory: What `save` was given.
        target: Another directory.
        step: The last complete one if `None`.
        part: Only what lies below this path, which its paths then lack: `"0"` of `(model, optimiser)`.
        dtype: For all floating-point arrays: `"bfloat16"`.
        cut: A stack of layers to cut into single layers, `blocks.each.*` into `blocks.0.*`, ...: `"blocks"`.
        join: Single layers to join into a stack: `"blocks"`.
    Raises:
        CheckpointError: The checkpoint is damaged or not there; there is no such part or stack; nothing changes.

    Example:
        >>> import tempfile
        >>> old, new = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> jp.checkpoint.save(old, 100, ({"w": jnp.ones((8, 4))}, {"momentum": jnp.ones((8, 4))}))
        >>> jp.checkpoint.convert(old, new, part="0", dtype="bfloat16")
        100
        >>> jp.checkpoint.restore(new, {"w": jnp.zeros((8, 4), jnp.bfloat16)})["w"].dtype
        dtype(bfloat16)
    """
    home, new = root(directory), root(target)
    if not (part or dtype or cut or join):
        raise CheckpointError("Nothing would change: give part, dtype, cut or join; or copy the directory.")
    step = complete(home, step)
    check(home, step)
    check_place(new, step)
    path, last = home / str(step), _Last()
    found = _about.read(path)
    leaves: dict[str, Made] = {name: (leaf, last.reader(path, name, leaf)) for name, leaf in found.leaves.items()}
    leaves = _below(leaves, part)
    if cut is not None:
        leaves = _cut(leaves, cut)
    if join is not None:
        leaves = _joined(leaves, join)
    if dtype is not None:
        leaves = _cast(leaves, dtype)

    place, barrier = begin(new, step)
    for batch in _batches(leaves):
        _orbax.append(place, {name: read() for name, read in batch.items()})
    _orbax.finish(place)
    strip = f"{part}." if part else ""
    inside = lambda items: {
        name.removeprefix(strip): value
        for name, value in items.items()
        if name.startswith(strip) and name.removeprefix(strip) in leaves
    }
    changed = dataclasses.replace(
        found, leaves={name: leaf for name, (leaf, _) in leaves.items()}, values=inside(found.values),
        states=inside(found.states), files={},
    )  # fmt: skip
    commit(new, step, changed, barrier)
    return step


class _Last:
    """The array that was read last, which the layers of a stack are cut from one after another."""

    def __init__(self) -> None:
        self.name = ""
        self.array = np.zeros(0)

    def reader(self, path: pathlib.Path, name: str, leaf: Leaf) -> Callable[[], np.ndarray] | None:
        """Reads `name`, unless it is the last; `None` if it is no array."""

        def read() -> np.ndarray:
            if self.name != name:
                self.name, self.array = name, host_array(path, name, leaf)
            return self.array

        return None if leaf.shape is None else read


def _below(leaves: Mapping[str, Made], part: str) -> dict[str, Made]:
    if not part:
        return dict(leaves)
    found = {name.removeprefix(f"{part}."): made for name, made in leaves.items() if name.startswith(f"{part}.")}
    if not any(leaf.shape is not None and np.prod(leaf.shape) for leaf, _ in found.values()):
        raise CheckpointError(f"there is no array below {part!r}.{nearest(part, _prefixes(leaves))}")
    return found


def _cut(leaves: Mapping[str, Made], stack: str) -> dict[str, Made]:
    found: dict[str, Made] = {}
    middle, num_cut = f".{stack}.{EACH}.", 0
    for name, (leaf, read) in leaves.items():
        before, at, rest = f".{name}".partition(middle)
        if not at or not leaf.shape or read is None:
            found[name] = leaf, read
            continue
        num_cut += 1
        for index in range(leaf.shape[0]):
            layer = f"{before}.{stack}.{index}.{rest}".lstrip(".")
            found[layer] = _without_first(leaf), _layer(read, index)
    if not num_cut:
        raise CheckpointError(f"there is no stack {stack!r}: no path has {middle!r} in it.")
    return found


def _joined(leaves: Mapping[str, Made], stack: str) -> dict[str, Made]:
    groups: dict[tuple[str, str], dict[int, Made]] = {}
    found: dict[str, Made] = {}
    for name, (leaf, read) in leaves.items():
        before, at, after = f".{name}".partition(f".{stack}.")
        index, _, rest = after.partition(".")
        if at and index.isdigit() and rest and leaf.shape is not None:
            groups.setdefault((before.lstrip("."), rest), {})[int(index)] = leaf, read
        else:
            found[name] = leaf, read
    if not groups:
        raise CheckpointError(f"there are no layers {stack}.0, {stack}.1, ... to join.")
    for (before, rest), layers in groups.items():
        name = ".".join(filter(None, [before, stack, EACH, rest]))
        kinds = {leaf for leaf, _ in layers.values()}
        if sorted(layers) != list(range(len(layers))) or len(kinds) > 1:
            raise CheckpointError(
                f"{name} cannot be joined: layers {sorted(layers)} of {', '.join(sorted(map(str, kinds)))}. A stack "
                "is of equal layers, counted from 0."
            )
        found[name] = _with_first(len(layers), next(iter(kinds))), _stack([layers[i][1] for i in range(len(layers))])
    return found


def _cast(leaves: Mapping[str, Made], dtype: str) -> dict[str, Made]:
    if dtype not in ("float32", "float16", "bfloat16", "float64"):
        raise CheckpointError(f"dtype={dtype!r}: give float32, bfloat16, float16 or float64.")
    wanted = jnp.dtype(dtype)
    return {
        name: (dataclasses.replace(leaf, kind=dtype), _rounded(read, wanted))
        if read and leaf.is_floating
        else (leaf, read)
        for name, (leaf, read) in leaves.items()
    }


def _batches(leaves: Mapping[str, Made]) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    batch: dict[str, Callable[[], np.ndarray]] = {}
    size = 0
    for name, (leaf, read) in leaves.items():
        if read is None or not leaf.num_bytes:
            continue
        if batch and size + leaf.num_bytes > BATCH_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = read
        size += leaf.num_bytes
    if batch:
        yield batch


def _layer(read: Callable[[], np.ndarray], index: int) -> Callable[[], np.ndarray]:
    return lambda: np.array(read()[index])  # not a view, which would keep the stack


def _stack(reads: list[Callable[[], np.ndarray] | None]) -> Callable[[], np.ndarray]:
    return lambda: np.stack([read() for read in reads if read])


def _rounded(read: Callable[[], np.ndarray], dtype: np.dtype) -> Callable[[], np.ndarray]:
    return lambda: read().astype(dtype)


def _without_first(leaf: Leaf) -> Leaf:
    stored = leaf.stored and (leaf.stored[0][1:], leaf.stored[1])
    return dataclasses.replace(leaf, shape=(leaf.shape or ())[1:], stored=stored)


def _with_first(num: int, leaf: Leaf) -> Leaf:
    stored = leaf.stored and ((num, *leaf.stored[0]), leaf.stored[1])
    return dataclasses.replace(leaf, shape=(num, *(leaf.shape or ())), stored=stored)


def _prefixes(names: Mapping[str, Made]) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 5)}
