"""ZeRO stages 1 and 2 (Rajbhandari et al., 2019, arXiv:1910.02054): parameters replicated, optimiser state sharded."""

import dataclasses
from typing import ClassVar, Literal

from .._errors import ShardingError
from .._rules import Draft, largest_divisible
from .._strategy import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeRO(Strategy):
    """Shard optimiser state, and at stage 2 accumulated gradients, over an axis that replicates the parameters.

    Moves: gradients are reduce-scattered, each device updates its part, and the updated parameters are all-gathered:
    the same bytes as `DP`. An update that is not made element by element, such as Muon's, moves sums and gathers of its
    own besides. With accumulation stage 1 keeps a whole accumulator and reduces once a step, stage 2 as `reduce` says.
    Memory: optimiser state (and accumulated gradients) divide by the axis size. Stands beside `DP` on the same axis, or
    alone for both.

    Args:
        stage: 1 or 2.
        axis: The axis of the replicas.
        min_bytes: Leaves smaller than this keep whole optimiser state.
        reduce: With accumulation at stage 2: `"microbatch"` keeps a sharded accumulator and reduces once a microbatch,
            `"step"` keeps a whole one and reduces once a step.

    Raises:
        ShardingError: The stage or `reduce` is unknown; when planning, if no leaf could be sharded.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=-1), [jp.ZeRO(1)])
        >>> plan.records["w"].storage, plan.records["w"].slots
        (P(), P('data',))
    """

    phase: ClassVar[int] = 3
    beside: ClassVar[tuple[str, ...]] = ("DP",)

    stage: Literal[1, 2] = dataclasses.field(kw_only=False)
    axis: str = "data"
    min_bytes: int = 4096
    reduce: Literal["microbatch", "step"] = "microbatch"

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise ShardingError(f"ZeRO: stage is {self.stage!r}. Use 1 or 2; stage 3, sharded parameters, is FSDP().")
        if self.reduce not in ("microbatch", "step"):
            raise ShardingError(f"ZeRO: reduce={self.reduce!r}. Use 'microbatch' or 'step'.")
        if self.reduce == "step" and self.stage == 1:
            raise ShardingError(
                "ZeRO: reduce='step' has no effect at stage 1, which always reduces once. Leave it out."
            )

    def apply(self, draft: Draft) -> None:
        if self.axis not in draft.replicas:
            draft.split_dim("batch", self.axis)
            draft.replicas.append(self.axis)
        size = draft.sizes[self.axis]
        where = ("slots",) if self.stage == 1 else ("slots", "gradient")
        done = 0
        for leaf in draft.leaves.values():
            if not leaf.trainable:
                continue
            if leaf.num_bytes < self.min_bytes:
                leaf.reasons.append((self.label, f"slots whole: {leaf.num_bytes} bytes < min_bytes={self.min_bytes}"))
                continue
            dim = largest_divisible(leaf, draft, size, field="slots")
            if dim is None:
                leaf.reasons.append(
                    (self.label, f"slots whole: no dim of {leaf.shape[leaf.layers :]} divides by {size}")
                )
                continue
            leaf.split(dim, self.axis, by=self.label, why=f"slots: dim {dim}, the largest that divides", where=where)
            done += 1
        if self.stage == 2 and self.reduce == "microbatch":
            draft.shards.append(self.axis)
        if not done:
            largest = max((leaf.num_bytes for leaf in draft.leaves.values()), default=0)
            draft.problems.append(
                f"{self.label} changes nothing: of {len(draft.leaves)} leaves, the largest of {largest} bytes, none "
                f"is trained, at least min_bytes={self.min_bytes}, and has a dim that {self.axis}={size} divides. "
                "Lower min_bytes, or use DP()."
            )
