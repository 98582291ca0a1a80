"""Attention a block of queries and a block of keys at a time: no array of all queries by all keys ever exists.

The online softmax of Rabe and Staats, 2021 (arXiv:2112.05682), with the backward pass of Dao et al., 2022
(arXiv:2205.14135): each block's weights are computed again from the log-sum-exp of its row. In plain JAX, for any
platform. What one call sees may be a part of all keys: `merge` joins such parts, which is what ring attention does.

Which key a query sees is decided by `Marks`, a position and a segment for each token, never by array indices; a pair
of blocks in which nothing is seen is skipped while running.

Shapes: B batch, Q queries, S keys, K key and value heads, G query heads for each of them, H features; b is 1 or B.
"""

import dataclasses
import functools as ft
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._manual import varying_like

BLOCK = 512
"""Most queries, and most keys, of one block."""

LOWEST = -1e30
"""The score of what is not seen. Finite: the difference of two is 0, that of two infinities would be no number."""


class Marks(NamedTuple):
    """Where tokens are: `at` [b, T] their positions, `of` [b, T] their segments, or `None` for one segment."""

    at: jax.Array
    of: jax.Array | None


class Part(NamedTuple):
    """Attention over some keys: `out` [B, K, G, Q, H], and the log-sum-exp of each row of scores, [B, K, G, Q]."""

    out: jax.Array
    log_sum: jax.Array


class Heads(NamedTuple):
    """Queries [B, Q, K, G, H], keys and values [B, S, K, H]: arrays, or gradients of such."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What attention computes, and where.

    Attributes:
        causal: Whether a query sees no later position than its own.
        window: How many positions it sees, its own included (and as many after it if not causal); `None` for all.
        scale: Of the scores.
        block: Most queries, and most keys, of one block.
        skips: Whether to ask, while running, if anything is seen in a pair of blocks. Not where rows lie on several
            devices and a program is for all of them: the question itself would cross devices.
    """

    causal: bool
    window: int | None
    scale: float
    block: int = BLOCK
    skips: bool = True

    def sees(self, queries: Marks, keys: Marks) -> jax.Array | None:
        """Which keys each query sees, [b, Q, S]; `None` for all."""
        at, key_at = queries.at[:, :, None], keys.at[:, None, :]
        seen = [at >= key_at] if self.causal else []
        if self.window is not None:
            seen.append(at - key_at < self.window if self.causal else jnp.abs(at - key_at) < self.window)
        if queries.of is not None and keys.of is not None:
            seen.append(queries.of[:, :, None] == keys.of[:, None, :])
        return ft.reduce(jnp.logical_and, seen) if seen else None

    def sees_any(self, queries: Marks, keys: Marks) -> jax.Array | None:
        """Whether any query may see any key, by their positions; `None` if so, or if nobody is to ask."""
        if not self.skips:
            return None
        seen = []
        if self.causal:
            seen.append(queries.at.max() >= keys.at.min())
        if self.window is not None:
            seen.append(queries.at.min() - keys.at.max() < self.window)
            if not self.causal:
                seen.append(keys.at.min() - queries.at.max() < self.window)
        return ft.reduce(jnp.logical_and, seen) if seen else None


@ft.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise(heads: Heads, queries: Marks, keys: Marks, setting: Setting) -> jax.Array:
    """Attention [B, Q, K, G, H] of queries over keys that are all here; a query that sees none gets zeros.

    Memory: a block of scores [B, K, G, block, block] in float32, beside arguments, result and gradients.
    """
    return _blockwise_forward(heads, queries, keys, setting)[0]


def _blockwise_forward(heads: Heads, queries: Marks, keys: Marks, setting: Setting) -> Any:
    part = forward(heads, queries, keys, setting)
    out = jnp.moveaxis(part.out, 3, 1).astype(heads.q.dtype)
    return out, (heads, queries, keys, out, part.log_sum)


def _blockwise_backward(setting: Setting, kept: Any, d_out: jax.Array) -> Any:
    heads, queries, keys, out, log_sum = kept
    grads = backward(heads, queries, keys, Pulled.of(d_out, out, log_sum), setting)
    return (as_types(grads, heads), None, None)


blockwise.defvjp(_blockwise_forward, _blockwise_backward)


class Pulled(NamedTuple):
    """What the backward pass knows of its queries: `d_out` [B, Q, K, G, H]; `log_sum` and `delta` [B, K, G, Q]."""

    d_out: jax.Array
    log_sum: jax.Array
    delta: jax.Array

    @staticmethod
    def of(d_out: jax.Array, out: jax.Array, log_sum: jax.Array) -> "Pulled":
        """From the whole output, whatever part of the keys follows."""
        wide = log_sum.dtype
        return Pulled(d_out, log_sum, jnp.einsum("bqkgh,bqkgh->bkgq", d_out.astype(wide), out.astype(wide)))


def width_of(dtype: Any) -> Any:
    """The dtype of scores and sums: float32, or float64 for that."""
    return dtype if dtype == jnp.float64 else jnp.float32


def as_types(grads: Heads, heads: Heads) -> Heads:
    """Gradients in the dtypes of what they are the gradients of."""
    return Heads(*(grad.astype(each.dtype) for grad, each in zip(grads, heads, strict=True)))


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both parts."""
    log_sum = jnp.logaddexp(one.log_sum, other.log_sum)
    mine, theirs = (jnp.exp(part.log_sum - log_sum)[..., None] for part in (one, other))
    return Part(one.out * mine + other.out * theirs, log_sum)


def forward(heads: Heads, queries: Marks, keys: Marks, setting: Setting) -> Part:
    """Attention over these keys alone; `out` is as wide as the softmax."""
    wide = width_of(heads.q.dtype)
    heads, queries, keys = _together(heads, queries, keys)
    count, blocks = heads.q.shape[1], _Blocks.of(heads, queries, keys, setting)

    def each_query(_: None, query: Any) -> Any:
        q, q_marks = query

        def each_key(so_far: Any, key: Any) -> Any:
            def seen(so_far: Any) -> Any:
                peak, total, out = so_far
                k, v, k_marks = key
                scores, mask = _scores(q, k, q_marks, k_marks, setting)
                new = jnp.maximum(peak, scores.max(-1))
                weights = _where(mask, jnp.exp(scores - new[..., None]))
                kept = jnp.exp(peak - new)
                more = jnp.einsum("bkgqs,bskh->bkgqh", weights.astype(v.dtype), v, preferred_element_type=wide)
                return new, total * kept + weights.sum(-1), out * kept[..., None] + more

            return _if_any(setting, q_marks, key[2], seen, lambda so_far: so_far, so_far), None

        batch, size, num_kv, group, width = q.shape
        rows = (batch, num_kv, group, size)
        start = jnp.full(rows, LOWEST, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, width), wide)
        start = tuple(varying_like(each, q) for each in start)
        (peak, total, out), _ = _scan(each_key, start, blocks.keys)
        safe = jnp.where(total == 0, 1, total)
        return None, Part(out / safe[..., None], jnp.where(total == 0, LOWEST, peak + jnp.log(safe)))

    _, parts = _scan(each_query, None, blocks.queries)
    return Part(_joined(parts.out, count, 3), _joined(parts.log_sum, count, 3))


def backward(heads: Heads, queries: Marks, keys: Marks, pulled: Pulled, setting: Setting) -> Heads:
    """Gradients of attention over these keys, as wide as the softmax; `pulled` is of all keys."""
    wide = pulled.log_sum.dtype
    heads, queries, keys = _together(heads, queries, keys)
    blocks = _Blocks.of(heads, queries, keys, setting)
    num = len(blocks.queries[1].at), len(blocks.keys[2].at)
    pulls = _split(pulled.d_out, 1, num[0]), _split(pulled.log_sum, 3, num[0]), _split(pulled.delta, 3, num[0])
    zero = lambda x: varying_like(jnp.zeros(x.shape, wide), heads.q)

    def each_query(so_far: Any, query: Any) -> Any:
        (q, q_marks), (d_out, log_sum, delta) = query

        def each_key(d_q: jax.Array, key: Any) -> Any:
            k, v, k_marks = key

            def seen(d_q: jax.Array) -> Any:
                scores, mask = _scores(q, k, q_marks, k_marks, setting)
                weights = _where(mask, jnp.exp(scores - log_sum[..., None]))
                product = ft.partial(jnp.einsum, preferred_element_type=wide)
                d_v = product("bkgqs,bqkgh->bskh", weights.astype(d_out.dtype), d_out)
                d_weights = product("bqkgh,bskh->bkgqs", d_out, v)
                d_scores = (weights * (d_weights - delta[..., None]) * setting.scale).astype(q.dtype)
                d_k = product("bkgqs,bqkgh->bskh", d_scores, q)
                return d_q + product("bkgqs,bskh->bqkgh", d_scores, k), d_k, d_v

            d_q, d_k, d_v = _if_any(setting, q_marks, k_marks, seen, lambda d_q: (d_q, zero(k), zero(v)), d_q)
            return d_q, (d_k, d_v)

        d_q, more = _scan(each_key, zero(q), blocks.keys)
        return jax.tree.map(jnp.add, so_far, more), d_q

    start = (zero(blocks.keys[0]), zero(blocks.keys[1]))
    (d_k, d_v), d_q = _scan(each_query, start, (blocks.queries, pulls))
    return Heads(
        _joined(d_q, heads.q.shape[1], 1), _joined(d_k, heads.k.shape[1], 1), _joined(d_v, heads.v.shape[1], 1)
    )


def _together(heads: Heads, queries: Marks, keys: Marks) -> tuple[Heads, Marks, Marks]:
    """The same arrays, none of which is known before all are.

    Marks are the same in every layer of a scan. JAX computes what depends on them alone before the loop and keeps it:
    the masks of all pairs of blocks, which is an array of all queries by all keys.
    """
    return lax.optimization_barrier((heads, queries, keys))


_NOBODY = jnp.iinfo(jnp.int32).min  # segments of what fills up the last blocks


class _Blocks(NamedTuple):
    """`(q, marks)` and `(k, v, marks)` with their blocks as leading dim."""

    queries: tuple[jax.Array, Marks]
    keys: tuple[jax.Array, jax.Array, Marks]

    @staticmethod
    def of(heads: Heads, queries: Marks, keys: Marks, setting: Setting) -> "_Blocks":
        num_q, num_k = (max(1, -(-x.shape[1] // setting.block)) for x in (heads.q, heads.k))
        if heads.q.shape[1] % num_q or heads.k.shape[1] % num_k:
            queries, keys = (Marks(m.at, jnp.zeros_like(m.at) if m.of is None else m.of) for m in (queries, keys))
        split_q, split_k = (ft.partial(_split_marks, number=n) for n in (num_q, num_k))
        return _Blocks(
            (_split(heads.q, 1, num_q), split_q(queries, filler=_NOBODY)),
            (_split(heads.k, 1, num_k), _split(heads.v, 1, num_k), split_k(keys, filler=_NOBODY + 1)),
        )


def _split_marks(marks: Marks, *, number: int, filler: int) -> Marks:
    at = _split(marks.at, 1, number, mode="edge")
    return Marks(at, None if marks.of is None else _split(marks.of, 1, number, constant_values=filler))


def _split(x: jax.Array, dim: int, number: int, **padding: Any) -> jax.Array:
    """`number` blocks of `x` along `dim`, as a new leading dim; the last one is filled up."""
    if number == 1:
        return x[None]
    size = -(-x.shape[dim] // number)
    widths = [(0, number * size - x.shape[dim] if at == dim else 0) for at in range(x.ndim)]
    x = jnp.pad(x, widths, **padding) if any(map(sum, widths)) else x
    return jnp.moveaxis(x.reshape(*x.shape[:dim], number, size, *x.shape[dim + 1 :]), dim, 0)


def _joined(blocks: jax.Array, count: int, dim: int) -> jax.Array:
    """Blocks, a leading dim, joined along `dim`, less what filled up the last one."""
    x = jnp.moveaxis(blocks, 0, dim)
    x = x.reshape(*x.shape[:dim], math.prod(x.shape[dim : dim + 2]), *x.shape[dim + 2 :])
    return lax.slice_in_dim(x, 0, count, axis=dim)


def _scan(body: Any, start: Any, blocks: Any) -> Any:
    """`lax.scan`, without a loop for one block."""
    if len(jax.tree.leaves(blocks)[0]) > 1:
        return lax.scan(body, start, blocks)
    end, out = body(start, jax.tree.map(lambda x: x[0], blocks))
    return end, jax.tree.map(lambda x: x[None], out)


def _scores(
    q: jax.Array, k: jax.Array, queries: Marks, keys: Marks, setting: Setting
) -> tuple[jax.Array, jax.Array | None]:
    """Scores [B, K, G, q, s], lowest where nothing is seen, and the mask [b, 1, 1, q, s] of what is."""
    wide = width_of(q.dtype)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=wide) * setting.scale
    seen = setting.sees(queries, keys)
    if seen is None:
        return scores, None
    mask = seen[:, None, None]
    return jnp.where(mask, scores, LOWEST), mask


def _where(mask: jax.Array | None, weights: jax.Array) -> jax.Array:
    """A row that sees nothing has all scores lowest, so that their differences say nothing."""
    return weights if mask is None else jnp.where(mask, weights, 0)


def _if_any(setting: Setting, queries: Marks, keys: Marks, seen: Any, unseen: Any, operand: Any) -> Any:
    """`seen(operand)` if any of these queries may see any of these keys."""
    any_seen = setting.sees_any(queries, keys)
    return seen(operand) if any_seen is None else lax.cond(any_seen, seen, unseen, operand)
