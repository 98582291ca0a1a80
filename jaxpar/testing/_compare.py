"""Are the numbers of a sharded run those of one device? The criterion, leaf by leaf, and its table.

The criterion: the sharded error against float64 is at most twice the single-device float32 error against float64. No
tolerance is chosen, so none can be relaxed. Errors are the largest of a leaf, over the largest magnitude in the leaf
(for updates, gradients and outputs alike). Two things are added, both from rounding alone:

- a floor of 4 ulps of the leaf's dtype, so that a leaf that one device happens to get exactly right does not fail;
- a leaf smaller than one ulp of the largest in its family is noise around zero (the gradient of a key's bias under a
  softmax, say): it is judged by that ulp. A family is a group, or a part of one where leaves differ in kind: an
  optimiser's second moments are squares of gradients, and small beside the parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import _tree
from jaxpar._errors import ShardingError, listed
from jaxpar._types import PyTree

FLOOR_ULPS = 4
"""How many ulps of its largest element any leaf may be off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One leaf.

    Attributes:
        group: `"outputs"`, `"gradients"`, `"updates"`.
        path: Where the leaf lives.
        error: Of the sharded run, over the largest magnitude in the leaf; for integers, the largest difference.
        allowed: The most it may be.
        note: Why it fails, where a number does not say it.
    """

    group: str
    path: str
    error: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the leaf passes."""
        return not self.note and self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        if self.note:
            return math.inf
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """A table of leaves. Prints itself; `+` puts two under one another.

    Attributes:
        rows: One a leaf.
        reference: What the errors are measured against, in words.
        notes: What a reader should know of what was, or could not be, compared.
    """

    rows: tuple[Row, ...]
    reference: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every leaf passes."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The leaf that is nearest to failing, or furthest beyond; `None` of an empty table."""
        return max(self.rows, key=lambda row: row.share, default=None)

    def check(self) -> None:
        """Raise `ShardingError`, with the table, if a leaf fails."""
        if not self.ok:
            raise ShardingError(f"The sharded run differs from one device.\n{self}")

    def __repr__(self) -> str:
        return str(self)

    def __add__(self, other: "Comparison") -> "Comparison":
        both = self.reference if self.reference == other.reference else f"{self.reference}; {other.reference}"
        return Comparison(rows=self.rows + other.rows, reference=both, notes=(*self.notes, *other.notes))

    def __str__(self) -> str:
        rows = sorted(self.rows, key=lambda row: row.ok)  # what fails first
        width = max([len(row.path) for row in rows], default=0)
        lines = [
            f"{'ok  ' if row.ok else 'FAIL'}  {row.group:<9}  {row.path:<{width}}  error {row.error:.1e}, "
            f"allowed {row.allowed:.1e}{'  ' + row.note if row.note else ''}"
            for row in rows
        ]
        worst = self.worst
        summary = f"{sum(row.ok for row in rows)} of {len(rows)} leaves agree with {self.reference}."
        if worst is not None:
            summary += f" Worst: {worst.group} {worst.path}, {worst.share:.2g} of what is allowed."
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([listed(lines, 40), *self._groups(), summary, *notes])

    def _groups(self) -> list[str]:
        """A line for each group, if there are several."""
        groups = list(dict.fromkeys(row.group for row in self.rows))
        lines = []
        for group in groups if len(groups) > 1 else ():
            rows = [row for row in self.rows if row.group == group]
            worst = max(rows, key=lambda row: row.share)
            agree = sum(row.ok for row in rows)
            lines.append(f"{group:<9}  {agree} of {len(rows)} agree; worst {worst.path}, {worst.share:.2g} of allowed")
        return lines


def compare(
    sharded: PyTree,
    single: PyTree,
    exact: PyTree | None,
    *,
    group: str = "outputs",
    bound: float = 1e-5,
    family: Callable[[str], str] = lambda path: "",
) -> Comparison:
    """Compare a sharded run with a single-device run of the same program, leaf by leaf.

    Brings every leaf to the host. Nothing is raised for numbers that differ: see `Comparison.ok`.

    Args:
        sharded: What the mesh computed.
        single: What one device computed, in the same precision.
        exact: The same in float64. `None` where there is none: then the error is the distance from `single`.
        group: What the leaves are, for the table.
        bound: The most that a leaf may be off without `exact`, relative to its largest element.
        family: From a leaf's path to the name of its family, where the leaves differ in kind.

    Example:
        >>> exact = {"w": np.array([1.0, 3.0])}
        >>> single = {"w": np.array([1.0, 3.0], np.float32)}
        >>> print(compare({"w": np.array([1.0, 3.1], np.float32)}, single, exact))
        FAIL  outputs    w  error 3.3e-02, allowed 4.8e-07
        0 of 1 leaves agree with float64 on one device. Worst: outputs w, 7e+04 of what is allowed.
    """
    ours, one, true = _fetch(sharded), _fetch(single), None if exact is None else _fetch(exact)
    expected = one if true is None else true
    scales: dict[str, float] = {}
    for path, leaf in expected.items():
        if _is_inexact(leaf):
            scales[family(path)] = max(_largest(leaf), scales.get(family(path), 0.0))
    rows = [
        _row(
            group,
            path,
            ours.get(path),
            one.get(path),
            None if true is None else true.get(path),
            scale=scales.get(family(path), 0.0),
            bound=bound,
        )
        for path in dict.fromkeys([*one, *ours])
    ]
    reference = f"the single-device run, within {bound:.0e}" if exact is None else "float64 on one device"
    return Comparison(rows=tuple(rows), reference=reference)


def _row(group: str, path: str, ours: Any, one: Any, true: Any, *, scale: float, bound: float) -> Row:
    def row(error: float, allowed: float, note: str = "") -> Row:
        return Row(group=group, path=path or "(result)", error=error, allowed=allowed, note=note)

    if ours is None or one is None:
        return row(math.inf, 0.0, "the sharded run lacks it" if ours is None else "the single-device run lacks it")
    if ours.shape != one.shape or ours.dtype != one.dtype:
        return row(math.inf, 0.0, f"{ours.dtype}{list(ours.shape)} instead of {one.dtype}{list(one.shape)}")
    if not _is_inexact(one):
        return row(float(np.max(ours != one, initial=False)), 0.0)
    finite = np.isfinite(_wide(one))
    if one.size and np.isnan(one).all():
        return row(math.inf, 0.0, "NaN everywhere on one device, so nothing is compared")
    if (
        not np.array_equal(_wide(ours)[~finite], _wide(one)[~finite], equal_nan=True)
        or not np.isfinite(_wide(ours)[finite]).all()
    ):
        return row(math.inf, 0.0, "NaN or infinite where one device is not, or the other way round")
    if true is not None and (true.shape != one.shape or not np.isfinite(_wide(true)[finite]).all()):
        return row(math.inf, 0.0, "the float64 run has another shape, or NaN where float32 has none")
    reference = _wide(one if true is None else true)[finite]
    largest = float(np.max(np.abs(reference), initial=0.0))
    ulp = float(jnp.finfo(one.dtype).eps)
    unit = largest or 1.0
    noise = ulp * scale if largest < ulp * scale else 0.0
    error = float(np.max(np.abs(_wide(ours)[finite] - reference), initial=0.0))
    if true is None:
        return row(error / unit, bound + noise / unit)
    own = float(np.max(np.abs(_wide(one)[finite] - reference), initial=0.0))
    return row(error / unit, (2 * own + FLOOR_ULPS * ulp * largest + noise) / unit)


def _fetch(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves of `tree` on the host; numbers are arrays of no dims, keys their data."""
    if not _tree.is_graph(tree):
        tree = jax.tree.map(
            lambda leaf: np.asarray(leaf) if isinstance(leaf, bool | int | float | complex) else leaf, tree
        )
    leaves: Mapping[str, Any] = _tree.leaves(tree)
    return {path: host(leaf) for path, leaf in leaves.items()}


def host(leaf: Any) -> np.ndarray:
    """One leaf as a NumPy array; a typed key as its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _is_inexact(leaf: np.ndarray) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _largest(leaf: np.ndarray) -> float:
    wide = np.abs(_wide(leaf))
    return float(np.max(wide, initial=0.0, where=np.isfinite(wide)))


def _wide(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else np.float64)
