"""`grouped_dot`: rows in consecutive groups, each group times its own matrix, by `jax.lax.ragged_dot`.

Notable: `ragged_dot` cannot be mapped over ("vmap over any dim but 0", jax 0.10.2 and 0.12.0), and accumulation maps a
loss over replicas. But there each device has one replica: what is mapped has size 1, and is taken off and put back
(`custom_vmap`). That has no transpose, so the backward pass is written out, as two more grouped products. More than one
replica on a device go one after another.

Shapes: M rows, G groups, K features in, N features out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap


def grouped_dot(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x[i] @ matrices[the group of row i]`.

    Args:
        x: [M, K], the rows of group 0, then those of group 1, and so on; rows after the last group belong to none.
        matrices: [G, K, N].
        sizes: [G] integers, whose sum is at most M.

    Returns:
        [M, N]. What it holds at rows of no group is up to the platform: select from it, do not multiply by zero.
    """
    return _grouped_dot(x, matrices, sizes)


@jax.custom_vjp
def _grouped_dot(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return _forward(x, matrices, sizes)


def _forward_and_keep(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _forward(x, matrices, sizes), (x, matrices, sizes)


def _backward(kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, matrices, sizes = kept
    return _to_rows(cotangent, matrices, sizes), _to_matrices(x, cotangent, sizes).astype(matrices.dtype), None


_grouped_dot.defvjp(_forward_and_keep, _backward)


def _one_at_a_time(function: Callable[..., jax.Array]) -> Any:
    """`function` as something that can be mapped over: a single one as it is, several one after another."""
    several = sequential_vmap(function)
    mapped = custom_vmap(function)

    def rule(axis_size: int, in_batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
        if axis_size == 1:
            own = [arg[0] if batched else arg for arg, batched in zip(args, in_batched, strict=True)]
            return mapped(*own)[None], True
        axes = [0 if batched else None for batched in in_batched]
        return jax.vmap(several, in_axes=axes)(*args), True

    mapped.def_vmap(rule)
    return mapped


@_one_at_a_time
def _forward(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, matrices, sizes)


@_one_at_a_time
def _to_rows(cotangent: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(cotangent, jnp.swapaxes(matrices, 1, 2), sizes)


@_one_at_a_time
def _to_matrices(x: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """[G, K, N]: of each group the product of its rows of `x`, transposed, and of the cotangent, in float32."""
    return lax.ragged_dot_general(x, cotangent, sizes, _CONTRACT_ROWS, preferred_element_type=jnp.float32)


_CONTRACT_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
