"""Fully sharded data parallelism: parameters, gradients and optimiser state in pieces, gathered where they are used.

ZeRO stage 3 (Rajbhandari et al., 2019, arXiv:1910.02054) as in Xu et al., 2020 (arXiv:2004.13336).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from .._errors import ShardingError
from .._rules import Draft, Leaf, check_patterns, fold_layers, largest_divisible, matches, way_out
from .._strategy import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSDP(Strategy):
    """Shard every parameter over an axis, and split the batch over it too.

    Each parameter is stored in pieces, its largest divisible dim split (or its `embed` dim, if dims are named), and
    gathered where the model reads it; activations are never gathered. Moves, a step: one all-gather of each parameter
    for the forward pass, one more for the backward pass of rematerialised blocks, one reduce-scatter of its gradient:
    3(n-1)/n of the parameters' bytes. Memory: parameters, gradients and optimiser state divide by the axis size, and
    with `blocks` one block is whole at a time.

    Args:
        axis: The axis.
        blocks: A pattern of equal blocks, such as `"blocks.*"`, to stack, scan and rematerialise (`jp.Stack`). Without
            it the compiler may hold every gathered parameter at once, and the plan says which.
        remat: What stacked blocks keep for their backward pass; see `jp.remat`.
        min_bytes: Parameters smaller than this stay whole: a small gather costs more than it saves. So do vectors.
        whole: Patterns of parameters to leave whole.
        reduce: With accumulation: `"microbatch"` keeps a sharded accumulator and reduce-scatters once a microbatch,
            `"step"` keeps an unsharded accumulator and reduce-scatters once a step.

    Raises:
        ShardingError: When planning: a parameter that no dim can split, a pattern that matches nothing, or nothing to
            shard.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> plan.records["w"].storage, plan.records["w"].compute
        (P('fsdp',), P())
    """

    phase: ClassVar[int] = 2

    axis: str = "fsdp"
    blocks: str | None = None
    remat: Literal["full", "dots", "none"] | None = None
    min_bytes: int = 4096
    whole: str | Sequence[str] = ()
    reduce: Literal["microbatch", "step"] = "microbatch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", (self.whole,) if isinstance(self.whole, str) else tuple(self.whole))
        if self.reduce not in ("microbatch", "step"):
            raise ShardingError(f"FSDP: reduce={self.reduce!r}. Use 'microbatch' or 'step'.")
        if self.remat is not None and self.blocks is None:
            raise ShardingError(
                f"FSDP: remat={self.remat!r} has no effect without blocks=. Name the blocks, or leave remat out."
            )

    def apply(self, draft: Draft) -> None:
        size = draft.sizes[self.axis]
        draft.split_dim("batch", self.axis)
        (draft.shards if self.reduce == "microbatch" else draft.replicas).append(self.axis)
        draft.problems += check_patterns(self.whole, draft.paths(), f"{self.label}: whole")
        done, before = 0, len(draft.problems)
        for leaf in draft.leaves.values():
            reason = self._why_whole(leaf)
            if reason:
                leaf.reasons.append((self.label, f"whole: {reason}"))
                continue
            dim, why = self._choose(leaf, draft, size)
            if dim is None:
                longest = max(range(leaf.ndim), key=lambda each: leaf.shape[leaf.layers + each])
                whole = leaf.shape[leaf.layers + longest]
                unit = size * whole // draft.free_size(leaf, longest)  # another strategy may split that dim too
                shape = leaf.shape[leaf.layers :]
                pieces = tuple(draft.free_size(leaf, each) for each in range(leaf.ndim))
                shown = f"{shape}" if pieces == shape else f"{shape}, of which a device has {pieces} already,"
                draft.problems.append(
                    f"{leaf.path}: no dim of {shown} divides by axis {self.axis!r} of size {size}. "
                    f"{way_out(whole, self.axis, unit)}, or leave it whole: "
                    f'FSDP(whole=["{fold_layers([leaf.alias])[0]}"]).'
                )
                continue
            leaf.split(dim, self.axis, by=self.label, why=why, where=("storage", "gradient", "slots"))
            done += 1
        if not done and len(draft.problems) == before:
            largest = max((leaf.num_bytes for leaf in draft.leaves.values()), default=0)
            draft.problems.append(
                f"{self.label} changes nothing: of {len(draft.leaves)} leaves, the largest of {largest} bytes, none "
                f"is a matrix of at least min_bytes={self.min_bytes} that may be split. Lower min_bytes, or use "
                f"DP(axis={self.axis!r})."
            )
        _note_whole_blocks(draft, self)

    def _why_whole(self, leaf: Leaf) -> str | None:
        if any(matches(pattern, leaf.alias) for pattern in self.whole):
            return "asked for"
        if leaf.num_bytes < self.min_bytes:
            return f"{leaf.num_bytes} bytes < min_bytes={self.min_bytes}"
        return "a vector" if leaf.ndim < 2 else None

    def _choose(self, leaf: Leaf, draft: Draft, size: int) -> tuple[int | None, str]:
        names = leaf.names or ()
        if "embed" in names:
            dim = names.index("embed")
            if draft.free_size(leaf, dim) % size == 0:
                return dim, "its dim 'embed'"
        return largest_divisible(leaf, draft, size, field="storage"), "the largest dim that divides"


def _note_whole_blocks(draft: Draft, strategy: FSDP) -> None:
    loose = [leaf for leaf in draft.leaves.values() if not leaf.layers and strategy.axis in sum(leaf.storage, ())]
    if loose:
        total = sum(leaf.num_bytes for leaf in loose)
        names = ", ".join(leaf.path for leaf in loose[:3]) + (", ..." if len(loose) > 3 else "")
        repeated = any(part.isdigit() for leaf in loose for part in leaf.path.split("."))
        advice = ' If some are equal blocks, FSDP(blocks="blocks.*") gathers one at a time.' if repeated else ""
        many, verb = (f"{len(loose)} parameters", "are") if len(loose) > 1 else ("1 parameter", "is")
        draft.notes.append(
            f"held whole: {many} of {total:,} bytes ({names}) {verb} gathered outside of any "
            f"scan; the compiler decides how many at once.{advice}"
        )
