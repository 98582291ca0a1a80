"""How context parallelism splits a sequence over the devices of an axis: which token lies where, and who does how much.

[Note: zigzag] Under a causal mask the first token sees one key and the last sees all. Of p contiguous chunks the last
one costs 2p-1 of p² half-blocks, the mean is p, so p devices reach p/(2p-1) of their speed at best: 53% of 8. Zigzag
cuts the sequence in 2p chunks and gives each device one from the front and one from the back, which together cost the
same everywhere:

    device     0      1      2      3
    natural   0 1    2 3    4 5    6 7        of 8 chunks, in the order of the sequence
    zigzag    0 7    1 6    2 5    3 4

A batch is brought in this order once, on the host, by `plan.batch`: tokens, labels, positions, weights and segments
alike, so that a loss, which is a sum, does not change. Nothing but `positions` says where a token is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from ._errors import ShardingError
from ._rules import matches

SCOPE = "jp.attention"
"""Names what attention moves between devices, in compiled programs."""

POSITIONS = "positions"
"""The field of a batch that says where tokens are."""

PLACED = "jp.positions"
"""The name that positions have in a jaxpr, where a batch is in zigzag order: they must come from it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextSplit:
    """What a plan says of its sequences.

    Attributes:
        axis: The mesh axis that splits them.
        size: Its size.
        method: How queries meet keys: `"allgather"`, `"ring"`, `"ulysses"` or `"hybrid"`.
        heads: Over how many devices heads are split while attention runs: 1, but for Ulysses and hybrids.
        zigzag: Whether batches are brought in zigzag order.
        whole: Patterns of fields of a batch whose second dim is not the sequence.
        reduce: When gradients are summed over the axis, with accumulation: once a `"microbatch"`, or once a `"step"`.
    """

    axis: str
    size: int
    method: str
    heads: int = 1
    zigzag: bool = False
    whole: tuple[str, ...] = ()
    reduce: str = "microbatch"

    @property
    def unit(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return self.size * (2 if self.zigzag else 1)

    def splits(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether the field of a batch at `path` is split over the axis: its second dim is the sequence."""
        return len(shape) > 1 and not any(matches(pattern, path) for pattern in self.whole)

    def spec(self, rows: PartitionSpec, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Where the field of a batch at `path` lies, by the spec of its rows: its sequence, if any, over the axis."""
        return PartitionSpec(rows[0] if rows else None, self.axis) if self.splits(path, shape) else rows

    def order(self, length: int) -> np.ndarray:
        """Which token of a sequence is at each place of a batch."""
        tokens = np.arange(length)
        if not self.zigzag:
            return tokens
        chunks = tokens.reshape(2 * self.size, -1)
        return np.stack([chunks[: self.size], chunks[: self.size - 1 : -1]], axis=1).reshape(-1)

    def arrange(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a batch in the order of this split; those without a sequence as they are.

        Raises:
            ShardingError: The sequences differ in length, do not divide, or have no positions to go by.
        """
        lengths = {path: np.shape(leaf)[1] for path, leaf in leaves.items() if self.splits(path, np.shape(leaf))}
        self._check(lengths)
        if not self.zigzag or not lengths:
            return dict(leaves)
        order = self.order(next(iter(lengths.values())))
        return {path: _take(leaf, order) if path in lengths else leaf for path, leaf in leaves.items()}

    def restore(self, leaf: Any) -> Any:
        """An array [batch, seq, ...] of a step, back in the order of the sequence."""
        return _take(leaf, np.argsort(self.order(leaf.shape[1]))) if self.zigzag else leaf

    def _check(self, lengths: Mapping[str, int]) -> None:
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{path or 'the array'}: {length}" for path, length in lengths.items())
            raise ShardingError(
                f"the second dim of a batch's arrays is the sequence, which axis {self.axis!r} splits, but they differ "
                f'in length ({shown}). Name those that have another second dim: CP(whole=["..."]).'
            )
        length = next(iter(lengths.values()), 0)
        if length % self.unit:
            below = length // self.unit * self.unit
            fits = f"{below} or {below + self.unit}" if below else f"{self.unit}"
            twice = " and zigzag has two chunks for each device" if self.zigzag else ""
            raise ShardingError(
                f"a sequence of {length} tokens does not divide over {self.axis}={self.size}{twice}: it takes a "
                f"multiple of {self.unit}. Use {fits} tokens"
                + (', or CP(balance="none").' if self.zigzag and length % self.size == 0 else ".")
            )
        if self.zigzag and lengths and POSITIONS not in {path.rpartition(".")[2] for path in lengths}:
            raise ShardingError(
                f"zigzag changes the order of tokens, but this batch ({', '.join(map(repr, lengths))}) has no field "
                f"{POSITIONS!r} for the model to go by. Add one, np.broadcast_to(np.arange(seq), tokens.shape), and "
                'give it to the model and to jp.attention; or use CP(balance="none").'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meeting:
    """One kind of transfer by which queries meet keys, in one call of `jp.attention`.

    Attributes:
        kind: The collective.
        what: What it carries, in words.
        times: How often.
        parts: How much of one device's keys each carries: 1 for its K, or as much as its K has features.
        of_queries: Whether it is queries, or the result, that it carries: parts of one device's queries then.
        wide: Whether it is in float32, whatever keys are.
        backward: Whether it is of the backward pass.
    """

    kind: str
    what: str
    times: int
    parts: int
    of_queries: bool = False
    wide: bool = False
    backward: bool = False

    def bytes_of(self, itemsize: int) -> int:
        """Of one number of each part, where keys and queries take `itemsize` bytes."""
        return self.parts * (max(itemsize, 4) if self.wide else itemsize)


def meetings(split: ContextSplit) -> tuple[Meeting, ...]:
    """What one call of `jp.attention` moves over the axis of `split`, but for positions and segments."""
    found, ring = [], split.size // split.heads
    if split.method == "allgather":
        found += [
            Meeting(kind="all-gather", what="K, V", times=2, parts=split.size),
            Meeting(kind="reduce-scatter", what="gradients of K, V", times=2, parts=split.size, backward=True),
        ]
    if split.heads > 1:
        kind, each = ("all-to-all", 1) if split.heads == split.size else ("collective-permute", split.heads - 1)
        for backward, one, other in ((False, "Q, the result", "K, V"), (True, "their gradients", "their gradients")):
            pair = {"kind": kind, "times": 2 * each, "parts": 1, "backward": backward}
            found += [Meeting(what=one, of_queries=True, **pair), Meeting(what=other, **pair)]
    if split.method != "allgather" and ring > 1:
        permute = {"kind": "collective-permute", "parts": 2}
        found += [
            Meeting(what="K and V to the next device", times=ring - 1, **permute),
            Meeting(what="K and V once more", times=ring - 1, backward=True, **permute),
            Meeting(what="their gradients", times=ring, wide=True, backward=True, **permute),
        ]
    return tuple(found)


def balance(split: ContextSplit) -> float:
    """What part of the work of a causal mask the mean device has, of that of the busiest: 1 if all have the same.

    Counted in pairs of chunks, of which each device has two; a pair on the diagonal is half a pair.

    Example:
        >>> from jaxpar._sequence import ContextSplit, balance
        >>> natural = ContextSplit(axis="context", size=8, method="ring")
        >>> print(f"{balance(natural):.3f}", balance(dataclasses.replace(natural, zigzag=True)))
        0.533 1.0
    """
    if split.heads == split.size:  # each device has the whole sequence, for its heads
        return 1.0
    chunks = split.order(2 * split.size).reshape(split.size // split.heads, -1)
    work = (chunks + 0.5).sum(axis=1)
    return float(work.mean() / work.max())


def _take(leaf: Any, order: np.ndarray) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf[:, order]
    import jax.numpy as jnp

    return jnp.take(leaf, order, axis=1)
