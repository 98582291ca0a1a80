"""`dropout`: masks that belong to the example, not to the device.

A mask drawn for a whole batch changes when the batch is split otherwise, and inside `vmap` over replicas
`nnx.Dropout` draws the *same* mask for every replica, without an error. Here each example folds its own id into the
key: one mask on every mesh, with any accumulation, and in any stage of a pipeline.
"""

import jax
import jax.numpy as jnp

from ._errors import ShardingError


def dropout(x: jax.Array, rate: float, *, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Zero a fraction `rate` of `x` at random and scale up the rest.

    Moves nothing between devices, and costs about as much as one draw for the whole batch.

    Args:
        x: [batch, ...].
        rate: From 0 (nothing is drawn) up to, not including, 1.
        key: A key for this layer and this step; fold both in. Two dropouts in one layer need two keys.
        ids: [batch] integers that name the examples of the *global* batch: a field of the batch.

    Raises:
        ShardingError: `ids` does not name each example, or `rate` is out of range.

    Example:
        >>> x, key = jnp.ones((4, 1000)), jax.random.key(0)
        >>> whole = jp.dropout(x, 0.1, key=key, ids=jnp.arange(4))
        >>> bool((whole[2:] == jp.dropout(x[2:], 0.1, key=key, ids=jnp.arange(2, 4))).all())
        True
    """
    if not 0 <= rate < 1:
        raise ShardingError(f"dropout: rate is {rate}; it must be at least 0 and below 1.")
    if ids.shape != x.shape[:1]:
        raise ShardingError(
            f"dropout: ids have shape {ids.shape}, but x {x.shape} holds {x.shape[:1]} examples. "
            "Pass one integer for each example."
        )
    if rate == 0:
        return x
    kept = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape[1:]))(ids)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
