"""Data parallelism: every device holds all parameters and a part of the batch; gradients are summed once a step."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from .._errors import ShardingError
from .._rules import Draft
from .._strategy import Strategy

Reduction = Callable[[dict[str, Any], tuple[str, ...]], dict[str, Any]]
"""`reduce(gradients, axes)`: this device's gradients by path, summed over the mesh axes `axes`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DP(Strategy):
    """Replicate the parameters over an axis and split the batch.

    Moves: one all-reduce of the gradients a step, 2(n-1)/n of the parameters' bytes over each link of a ring; with
    accumulation too (`jp.value_and_grad(accumulate=k)` sums on each device first). Memory: nothing is saved.

    Args:
        axis: The axis of the replicas.
        reduce_dtype: The dtype in which gradients cross the axis, such as `"bfloat16"` for half the bytes; by default
            that of the accumulator.
        reduce: The sum itself, `reduce(gradients, axes)`, run on each device inside a manual region: this device's
            unreduced gradients by path go in, the sums over `axes` come out. For compression, Adasum, divergence
            checks. By default `jax.lax.psum`, or `psum_scatter` where the gradient is sharded.

    Raises:
        ShardingError: `reduce_dtype` is not a floating dtype.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((4, 4))}, jp.mesh(data=-1), [jp.DP()])
        >>> plan.records["w"].storage
        P()
    """

    phase: ClassVar[int] = 0

    axis: str = "data"
    reduce_dtype: str | None = None
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        if self.reduce_dtype is not None and not jnp.issubdtype(jnp.dtype(self.reduce_dtype), jnp.floating):
            raise ShardingError(
                f"DP: reduce_dtype={self.reduce_dtype!r} is not a floating dtype. Use 'bfloat16' or 'float32'."
            )

    def apply(self, draft: Draft) -> None:
        draft.split_dim("batch", self.axis)
        draft.replicas.append(self.axis)
