"""Expert parallelism: each device holds some experts whole, and tokens travel to them (GShard, arXiv:2006.16668)."""

import dataclasses
from typing import ClassVar

from .._rules import EXPERT, Draft, role_of, way_out
from .._strategy import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class EP(Strategy):
    """Split the experts of a mixture over an axis, and split the batch over it too; `jp.experts` moves the tokens.

    Leaves whose first dim, after a stack's, is named `expert` are split by it, and named so by a model or by `dims=`
    rules: `("*.experts.up", ("expert", "embed", "mlp"))`. All others are replicated over the axis.

    Moves, for each `jp.experts` and pass: every chosen token to its expert and back, two all-to-alls. Gradients of
    experts do not cross the axis: all tokens of an expert come to it. Those of other parameters are summed over it,
    with accumulation once a microbatch: the tokens of a microbatch cross the axis, so that its devices are no replicas
    that could be summed once a step, as those of `DP` are. Memory: experts, their gradients and optimiser state divide
    by the axis size.

    Args:
        axis: The axis.

    Raises:
        ShardingError: When planning: no leaf has a dim `expert`, or the axis does not divide it.

    Example:
        >>> plan = jp.plan(
        ...     lambda: {"up": jnp.ones((8, 4, 16)), "down": jnp.ones((8, 16, 4))},
        ...     jp.mesh(expert=-1),
        ...     [jp.EP()],
        ...     dims=[("up", ("expert", "embed", "mlp")), ("down", ("expert", "mlp", "embed"))],
        ... )
        >>> plan.records["up"].storage, plan.records["up"].compute
        (P('expert',), P('expert',))
    """

    phase: ClassVar[int] = 0

    axis: str = "expert"

    def apply(self, draft: Draft) -> None:
        size, done = draft.sizes[self.axis], 0
        draft.split_dim("batch", self.axis)
        draft.split_dim("expert", self.axis)
        draft.shards.append(self.axis)
        for leaf in draft.leaves.values():
            names = leaf.names or ()
            if EXPERT not in names:
                continue
            done += 1
            number = leaf.shape[leaf.layers]
            if names.index(EXPERT):
                draft.problems.append(
                    f"{leaf.path}: its dims are {list(names)}, but experts are the first dim of a leaf for "
                    "jp.experts. Store it so."
                )
            elif number % size:
                draft.problems.append(
                    f"{leaf.path}: dim 0 is {number} experts, but axis {self.axis!r} has size {size}, and {size} does "
                    f"not divide {number}. {way_out(number, self.axis, size)}."
                )
            else:
                leaf.role = role_of(names, [dim for dim, name in enumerate(names) if name == "mlp"])
                leaf.split(0, self.axis, by=self.label, why="its dim 'expert'")
        if not done:
            draft.problems.append(
                f"{self.label} splits nothing: no leaf has a dim named 'expert'. Name it, in jp.plan or a recipe: "
                'dims=[("*.experts.up", ("expert", "embed", "mlp")), ("*.experts.down", ("expert", "mlp", "embed"))].'
            )
