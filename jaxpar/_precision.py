"""Mixed precision: in which dtype parameters are stored, computed with, summed, and returned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._errors import ShardingError
from ._types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A mixed-precision policy (Micikevicius et al., 2018, arXiv:1710.03740).

    Parameters are cast where the model reads them, on their shard, so an FSDP gather moves `compute` bytes. A batch is
    not cast, since its weights must stay exact: a loss casts its floating inputs, `x.astype(...)`, where layers would
    otherwise promote to float32.

    Args:
        param: Stored parameters, and so their gradients and optimiser state; `None` leaves the model's own.
        compute: Parameters as read; `None` leaves them as stored.
        reduce: Gradients where they are summed over replicas once a step; `None` leaves the accumulator's float32.
        output: Floating results of a `Program`'s steps; `None` leaves them.

    Raises:
        ShardingError: A field is not a floating dtype.

    Example:
        >>> jp.Precision(compute="bfloat16").describe()
        'parameters as given, compute bfloat16, reduce float32, output as computed'
    """

    param: str | None = None
    compute: str | None = None
    reduce: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                wrong = value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.floating)
            except TypeError:
                wrong = True
            if wrong:
                raise ShardingError(
                    f"Precision: {field.name}={value!r} is not a floating dtype. Use 'float32', 'bfloat16' or "
                    f"'float16'."
                )

    def describe(self) -> str:
        """The policy in words."""
        return (
            f"parameters {self.param or 'as given'}, compute {self.compute or 'as stored'}, "
            f"reduce {self.reduce or 'float32'}, output {self.output or 'as computed'}"
        )


def cast(tree: PyTree, dtype: str | None) -> PyTree:
    """`tree` with its floating arrays cast to `dtype`; `None` leaves all."""
    if dtype is None:
        return tree

    def one(leaf: Any) -> Any:
        return leaf.astype(dtype) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
