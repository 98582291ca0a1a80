"""How two checkpoints differ: leaf by leaf, on the host, one leaf in memory at a time."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import listed
from . import _about, _orbax
from ._about import About, Leaf
from ._match import Match, pair
from ._steps import complete, root

MOST_LINES = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs between two checkpoints.

    Attributes:
        leaves: A line for each leaf that only one has, or that has another shape or dtype.
        values: A line for each leaf whose numbers differ, with the largest difference.
        around: A line for each version, metric, number and state that differs.
        num_same: Leaves that are equal bit for bit.
    """

    leaves: tuple[str, ...]
    values: tuple[str, ...]
    around: tuple[str, ...]
    num_same: int

    def __bool__(self) -> bool:
        """Whether a leaf differs, or a number or state; other versions alone are no difference."""
        return bool(self.leaves or self.values or any(not line.startswith("version ") for line in self.around))

    def __str__(self) -> str:
        blocks = [listed(lines, MOST_LINES) for lines in (self.leaves, self.values, self.around) if lines]
        same = f"{self.num_same} {'leaf is' if self.num_same == 1 else 'leaves are'} equal, bit for bit."
        return "\n".join([*blocks, same])


def diff(
    one: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    steps: tuple[int | None, int | None] = (None, None),
) -> Difference:
    """Compare two checkpoints, whatever meshes and layouts of layers they were saved from. By one process alone.

    Args:
        one: A directory, as `save` was given.
        other: Another, or the same.
        steps: Of each, which; the last complete one where it is `None`.
    Raises:
        CheckpointError: One is not there.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> for step in 1, 2:
        ...     jp.checkpoint.save(directory, step, {"w": jnp.full(3, float(step)), "b": jnp.zeros(3)})
        >>> print(jp.checkpoint.diff(directory, directory, steps=(1, 2)))
        w: 3 of 3 elements differ, by at most 1 (of at most 2)
        1 leaf is equal, bit for bit.
    """
    homes = root(one), root(other)
    paths = [home / str(complete(home, step)) for home, step in zip(homes, steps, strict=True)]
    return _compared(paths, [_about.checked(path) for path in paths])


def _compared(paths: list[pathlib.Path], abouts: list[About]) -> Difference:
    left, right = (each.leaves for each in abouts)
    match, lines = pair(left, right)
    differ, num_same = [], 0
    for name, a, b in _arrays(paths, abouts, match):
        if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
            num_same += 1
        elif a.shape == b.shape and a.dtype == b.dtype:
            differ.append(f"{name}: {_by_how_much(a, b)}")
    return Difference(
        leaves=tuple(_renamed(line) for line in lines),
        values=tuple(differ),
        around=tuple(_around(*abouts)),
        num_same=num_same,
    )


def _renamed(line: str) -> str:
    """A line of `pair`, which speaks of a checkpoint and a reader."""
    return line.replace(" in the checkpoint, ", " in the first, ").removesuffix(" here") + " in the second"


def _arrays(
    paths: list[pathlib.Path], abouts: list[About], match: Match
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    left, right = (each.leaves for each in abouts)
    for mine, theirs in match.same.items():
        if right[mine].shape is not None and left[theirs].shape == right[mine].shape:
            yield mine, host_array(paths[0], theirs, left[theirs]), host_array(paths[1], mine, right[mine])
    for stack, layers in match.stacked.items():
        whole = host_array(paths[1], stack, right[stack])
        for index, layer in enumerate(layers):
            yield layer, host_array(paths[0], layer, left[layer]), whole[index]
    for stack, layers in match.sliced.items():
        whole = host_array(paths[0], stack, left[stack])
        for index, layer in enumerate(layers):
            yield layer, whole[index], host_array(paths[1], layer, right[layer])


def host_array(path: pathlib.Path, name: str, leaf: Leaf) -> np.ndarray:
    """One leaf of the checkpoint at `path`, whole, in host memory; the bits of a PRNG key."""
    asked = leaf.on_host()
    return _orbax.read(path, {name: asked})[name] if asked.size else asked


def _by_how_much(a: np.ndarray, b: np.ndarray) -> str:
    if not (jnp.issubdtype(a.dtype, jnp.number) or a.dtype == bool):
        return "other bits"
    wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
    x, y = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
    differ = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not differ.any():
        return "other bits of equal numbers (-0.0, NaN)"
    gap, size = np.abs(x - y)[differ], np.maximum(np.abs(x), np.abs(y))[differ]
    if np.isnan(gap).any():
        return f"{differ.sum():,} of {x.size:,} elements differ, some of them NaN on one side"
    return f"{differ.sum():,} of {x.size:,} elements differ, by at most {gap.max():.3g} (of at most {size.max():.3g})"


def _around(one: About, other: About) -> Iterator[str]:
    for what, left, right in (
        ("", one.values, other.values),
        ("state of ", one.states, other.states),
        ("metric ", one.metrics, other.metrics),
        ("version ", one.versions, other.versions),
    ):
        both: list[Any] = [*left, *(name for name in right if name not in left)]
        for name in both:
            if what and (name in left) != (name in right):
                yield f"{what}{name}: {left.get(name, 'missing')}, {right.get(name, 'missing')}"
            elif name in left and name in right and repr(left[name]) != repr(right[name]):
                yield f"{what}{name}: {left[name]!r}, {right[name]!r}"
