"""Context parallelism: long sequences split over an axis, every device with a part of each.

All layers but attention treat tokens one by one; `jp.attention` is where the parts meet. Ring attention: Liu et al.,
2023 (arXiv:2310.01889); Ulysses: Jacobs et al., 2023 (arXiv:2309.14509); all-gather: Llama 3 (arXiv:2407.21783, 3.3.2).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from .._errors import ShardingError
from .._rules import Draft
from .._sequence import ContextSplit, balance
from .._strategy import Strategy

_METHODS = ("allgather", "ring", "ulysses", "hybrid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CP(Strategy):
    """Split the sequence of the batch and of all activations over an axis.

    Parameters are whole on each device of the axis, and their gradients are summed over it. Memory: activations divide
    by the axis size, and no device ever holds a score of each query with each key. How the parts meet in
    `jp.attention`, with p devices, moves for each layer (K and V are one device's part of keys and values):

    | method | moves forward | backward | holds |
    |---|---|---|---|
    | `"allgather"` | one all-gather of K, of V | reduce-scatters of their gradients | K and V of all tokens, a layer |
    | `"ring"` | K and V p-1 times to the next device | so again, their gradients p times | two devices' K and V |
    | `"ulysses"` | all-to-alls of Q, K, V and of the result | the same | all tokens of 1/p of the heads |
    | `"hybrid"` | all-to-alls over `heads` devices, a ring of p / `heads` | the same | between the two |

    Args:
        axis: The axis.
        method: How queries meet keys. All-gather is the simplest, and good while K and V of a layer fit, as with few
            shared heads; a ring overlaps with compute and holds least; Ulysses moves least with many heads, and cannot
            split more finely than there are heads.
        balance: `"zigzag"` brings batches (`plan.batch`, `Loader.to`) in an order in which every device has the same
            work under a causal mask: token `i` of a sequence is then not at place `i`, and the batch must have a field
            `positions`. `"none"` keeps the order: p/(2p-1) of the speed. By default zigzag, but for Ulysses, which is
            balanced as it is.
        heads: For a hybrid: over how many devices of the axis heads are split.
        whole: Patterns of fields of a batch whose second dim is not the sequence. One-dim fields never have one.
        reduce: When gradients are summed over the axis, with accumulation: `"microbatch"`, in each, for any loss; or
            `"step"`, once, with those over replicas. The loss then runs on the tokens of each device apart, and only in
            `jp.attention` do these meet: so all else must treat tokens one by one, by their positions, and the loss
            return `(sum, weight)`, both sums over tokens. A shift of labels, a mean or a convolution along the sequence
            in the model or its loss would end where a device's tokens do. `jp.verify` tells.

    Raises:
        ShardingError: An unknown method, or settings that do not go together.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((4, 4))}, jp.mesh(context=-1), [jp.CP(balance="none")])
        >>> plan.batch({"tokens": np.zeros((2, 16), np.int32)})["tokens"].sharding.spec
        P(None, 'context')
    """

    phase: ClassVar[int] = 0

    axis: str = "context"
    method: Literal["allgather", "ring", "ulysses", "hybrid"] = "allgather"
    balance: Literal["zigzag", "none"] | None = None
    heads: int | None = None
    whole: str | Sequence[str] = ()
    reduce: Literal["microbatch", "step"] = "microbatch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", (self.whole,) if isinstance(self.whole, str) else tuple(self.whole))
        if self.method not in _METHODS:
            raise ShardingError(f"CP: method={self.method!r}. Use one of {', '.join(map(repr, _METHODS))}.")
        if self.balance not in (None, "zigzag", "none"):
            raise ShardingError(f"CP: balance={self.balance!r}. Use 'zigzag' or 'none'.")
        if self.reduce not in ("microbatch", "step"):
            raise ShardingError(f"CP: reduce={self.reduce!r}. Use 'microbatch' or 'step'.")
        if self.method == "ulysses" and self.balance == "zigzag":
            raise ShardingError(
                "CP: balance='zigzag' has no effect with method='ulysses', in which every device has all tokens of its "
                "heads. Leave it out."
            )
        if self.method == "hybrid" and (self.heads is None or self.heads < 2):
            raise ShardingError(
                f"CP: a hybrid with heads={self.heads}. Say over how many devices heads are split, 2 or more, as in "
                "CP(method='hybrid', heads=2); 'ring' splits none."
            )
        if self.method != "hybrid" and self.heads is not None:
            raise ShardingError(
                f"CP: heads={self.heads} has no effect with method={self.method!r}. Leave it out, or use "
                "method='hybrid'."
            )

    def apply(self, draft: Draft) -> None:
        size = draft.sizes[self.axis]
        heads = {"ulysses": size, "hybrid": self.heads or 1}.get(self.method, 1)
        if self.method == "hybrid" and (size % heads or size == heads):
            draft.problems.append(
                f"{self.label}: heads={heads} and axis {self.axis!r} of size {size}: a hybrid is a ring of several "
                f"groups of {heads} devices. Use a divisor of {size} that is less, or method='ulysses' for one group."
            )
            return
        draft.split_dim("seq", self.axis)
        draft.context = ContextSplit(
            axis=self.axis,
            size=size,
            method=self.method,
            heads=heads,
            zigzag=self.balance == "zigzag" or (self.balance is None and self.method != "ulysses"),
            whole=tuple(self.whole),
            reduce=self.reduce,
        )
        order = "in zigzag order, as plan.batch brings it" if draft.context.zigzag else "in its own order"
        draft.notes.append(
            f"sequences split over {self.axis}={size} {order}; under a causal mask the mean device has "
            f"{balance(draft.context):.0%} of the work of the busiest. Each jp.attention: {_moves(draft.context)}. "
            f"Gradients are summed over this axis once a {self.reduce}."
        )


def _moves(split: ContextSplit) -> str:
    """What one call of `jp.attention` moves, in words."""
    axis, ring = split.axis, split.size // split.heads
    rotate = f"K and V go round {axis} in {ring - 1} steps, and again with their gradients in the backward pass"
    exchange = f"Q, K, V and the result are exchanged for heads among {split.heads} devices of {axis}, both ways"
    return {
        "allgather": f"all-gather of K and V over {axis}, reduce-scatter of their gradients",
        "ring": rotate,
        "ulysses": exchange,
        "hybrid": f"{exchange}; {rotate}",
    }[split.method]
