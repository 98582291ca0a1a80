"""`attention`: softmax attention behind one call, whatever splits it and whatever computes it.

A model says what its queries see; the plan in force says how sequences and heads are split, and so how queries and
keys meet (`_ring`); the platform and what is asked say which kernel computes it (`_kernels`). Both choices are told in
the notes of the step. Where the plan splits the sequence this is a full-manual `jax.shard_map`, which composes with the
`vmap` over replicas, with scans and with rematerialisation.

Shapes: B batch, T sequence, N query heads, K key and value heads, H features of a head.
"""

import dataclasses
import functools as ft
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from . import _context, _kernels
from ._blockwise import Marks
from ._constrain import constrain, layout
from ._errors import ShardingError
from ._manual import manual
from ._plan_text import bytes_text
from ._planned import Traced
from ._ring import across, grouped
from ._sequence import PLACED, SCOPE, ContextSplit, meetings
from ._types import Axes

_Q, _KV = ("batch", "seq", "heads", None), ("batch", "seq", "kv", None)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kernel: _kernels.Name | None = None,
) -> jax.Array:
    """Softmax self-attention, each key and value head shared by N / K query heads.

    Softmax is in float32; no array of all queries by all keys exists, but for a length that 1,024 does not divide in
    `kernel="xla"`. Moves: nothing
    where no sequence is split; else what `jp.CP` says. Heads are split as the plan splits `"heads"` and `"kv"`; fewer
    key heads than devices are whole on each.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H].
        v: [B, T, K, H].
        positions: [B, T] integers, where each token is; by default 0..T-1. What is causal, and what a window is, goes
            by these alone, so a sequence may be permuted.
        segments: [B, T] integers; a token sees only its own segment. By default one segment.
        causal: Whether a token sees only its own position and those before.
        window: How many positions it sees, its own included; without `causal` as many after it too.
        scale: Of the scores; by default 1 / sqrt(H).
        kernel: What computes it. By default the best that can on this platform:
            `"blockwise"`, plain JAX, anywhere; skips blocks in which nothing is seen. Differentiable once, in reverse.
            `"splash"`, Pallas on TPU, and `"cudnn"` on GPU: for positions that go up by one within each segment, and
            segments that go up; where that is not so, the result is NaN. cuDNN knows no segments.
            `"xla"`, `jax.nn.dot_product_attention`: 1,024 queries at a time; differentiable as often as one likes.

    Returns:
        [B, T, N, H], in the dtype of `q`. A token that sees nothing gets zeros.

    Raises:
        ShardingError: The shapes do not fit, or the axes do not divide them; the kernel cannot do what is asked.

    Example:
        >>> q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
        >>> out = jp.attention(q, q[:, :, :1], q[:, :, :1])
        >>> bool(jnp.allclose(out[:, 0], q[:, 0, :1]))  # the first token sees itself alone
        True
    """
    _check(q, k, v, positions, segments, window, kernel)
    region = _context.current()
    asked = _kernels.Asked(
        causal=causal,
        window=window,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        segments=segments is not None,
        positions=positions is not None,
        name=kernel,
    )
    split = None if region is None else region.plan.context
    if positions is not None and split is not None and split.zigzag:
        positions = checkpoint_name(positions, PLACED)
    # Where gradients of parts of a sequence are kept apart, a model sees one part, and attention all.
    length = q.shape[1] * (
        split.size if split is not None and region is not None and split.axis in region.replicas else 1
    )
    chosen = _kernels.choose(
        asked,
        jax.ShapeDtypeStruct((q.shape[0], length, *q.shape[2:]), q.dtype),
        mesh=None if region is None else region.plan.mesh,
        split=split,
        inside=region is not None and region.manual,
    )
    if isinstance(region, Traced):
        words = chosen.words if split is None else f"{chosen.words}; {_moved(q, k, split, region)}"
        if words not in region.attends:
            region.attends.add(words)
            region.notes.append(words)
    if region is None:
        return _on_one(q, k, v, positions, segments, chosen)
    # What can be skipped is known by position: a device must ask that of its own rows alone.
    asks = chosen.name == "blockwise" and positions is not None and asked.by_position and q.shape[1] > _kernels.BLOCK
    if split is None and (region.manual or not (asks or chosen.name == "splash")):
        by_row = positions is not None and bool(region.crossed or region.manual)
        return _on_one(q, k, v, positions, segments, dataclasses.replace(chosen, skips=not by_row))
    return _on_many(q, k, v, positions, segments, chosen, region, length)


def _moved(q: jax.Array, k: jax.Array, split: ContextSplit, region: _context.Region) -> str:
    """What one call moves over the axis that splits sequences, for the notes of a step."""
    numbers = []  # of one device
    for x, dims in ((q, _Q), (k, _KV)):
        axes = [axis for each in layout(region, "attention", dims, x.shape) for axis in each]
        numbers.append(x.size // math.prod(region.mesh.shape[axis] for axis in axes))
    told = []
    for meeting in meetings(split):
        size = numbers[0 if meeting.of_queries else 1] * meeting.bytes_of(k.dtype.itemsize)
        told.append(f"{meeting.kind} of {meeting.what}, {bytes_text(size)} x{meeting.times}")
    return f"over {split.axis} a call sends " + "; ".join(told)


def _on_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    chosen: _kernels.Chosen,
) -> jax.Array:
    """Attention over sequences that are whole on every device: batch and heads are the compiler's to split."""
    q = constrain(q, *_Q)
    k, v = (constrain(heads, "batch", None, "kv", None) for heads in (k, v))
    marks = Marks(jnp.arange(q.shape[1])[None] if positions is None else positions, segments)
    if chosen.name == "xla":
        mixed = chosen.whole(q, k, v, marks)
    else:
        mixed = chosen.run(grouped(q, k, v), marks, marks).reshape(q.shape)
    return constrain(mixed, *_Q)


def _on_many(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    chosen: _kernels.Chosen,
    region: _context.Region,
    length: int,
) -> jax.Array:
    """Attention in a manual region: over sequences that are split, or by a kernel that XLA cannot split by itself."""
    split: ContextSplit | None = region.plan.context
    batch, seq, heads, _ = layout(region, "attention", _Q, q.shape)
    shared = layout(region, "attention", _KV, k.shape)[2]
    if split is not None and split.zigzag and positions is None and chosen.asked.by_position:
        raise ShardingError(
            "attention: the plan brings batches in zigzag order, so places in an array say nothing of positions. Give "
            'jp.attention the positions of the batch, or use CP(balance="none").'
        )
    local_heads, local_shared = (
        x.shape[2] // math.prod(region.mesh.shape[axis] for axis in axes) for x, axes in ((q, heads), (k, shared))
    )
    if shared != heads:
        local_shared = 1 if q.shape[2] // k.shape[2] % local_heads == 0 else local_heads
    if split is not None:
        _check_heads(local_heads, local_shared, split)
    given: dict[str, Any] = {name: x for name, x in (("at", positions), ("of", segments)) if x is not None}
    specs: dict[str, Any] = dict.fromkeys(given, P(batch, seq))
    if chosen.name == "splash" and split is not None and split.method == "allgather":
        given["masks"] = _kernels.splash_masks(chosen.asked, local_heads, split.order(length), shards=split.size)
        specs["masks"] = _kernels.splash_spec(given["masks"], region.mesh, split.axis)
    body = ft.partial(
        _device,
        split=split,
        chosen=chosen,
        heads=heads if shared != heads else (),
        group=q.shape[2] // k.shape[2],
    )
    kernel = manual(
        region,
        body,
        in_specs=(P(batch, seq, heads), P(batch, seq, shared), P(batch, seq, shared), specs),
        out_specs=P(batch, seq, heads),
        # With the check, `vmap` over replicas fails where a loop or a branch mixes what has the replica dim and what
        # has not ("requires varying manual axes to match"; jax 0.10.2 and 0.12.0); and Pallas knows no such types.
        check_vma=False,
    )
    with jax.named_scope(SCOPE):
        return kernel(q, k, v, given)


def _device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    given: dict[str, Any],
    *,
    split: ContextSplit | None,
    chosen: _kernels.Chosen,
    heads: Axes,
    group: int,
) -> jax.Array:
    """One device's part: its own tokens, its own query heads."""
    if heads:
        k, v = (_own_heads(x, q.shape[2], group, heads) for x in (k, v))
    at = given.get("at")
    if at is None:
        first = 0 if split is None else lax.axis_index(split.axis) * q.shape[1]
        at = first + jnp.arange(q.shape[1])[None]
    return across(q, k, v, Marks(at, given.get("of")), split, chosen, given.get("masks"))


def _own_heads(x: jax.Array, num_heads: int, group: int, axes: Axes) -> jax.Array:
    """Of all K key heads [B, T, K, H] those of this device's `num_heads` query heads, `group` of which share one."""
    first = lax.axis_index(axes) * num_heads
    if group % num_heads == 0:
        return lax.dynamic_slice_in_dim(x, first // group, 1, axis=2)
    return jnp.take(x, (first + jnp.arange(num_heads)) // group, axis=2)


def _check_heads(num_heads: int, num_shared: int, split: ContextSplit) -> None:
    """Whether heads of one device, queries' and keys', can be split over `split.heads` more."""
    number = split.heads
    if num_heads % number or (num_shared % number and number % num_shared):
        what = f"{split.method} splits the heads that a device has over {number} devices of axis {split.axis!r}"
        raise ShardingError(
            f"attention: {what}, but it has {num_heads} query heads and {num_shared} key heads: {number} must divide "
            f"both, or be a multiple of the key heads, which are then repeated. Use CP(method='ring') or 'allgather', "
            "which split no heads."
        )


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    window: int | None,
    kernel: str | None,
) -> None:
    failures = []
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        failures.append(
            f"q {q.shape}, k {k.shape}, v {v.shape}: q has shape [batch, seq, heads, features], k and v "
            "[batch, seq, their heads, features]"
        )
    elif q.shape[2] % k.shape[2]:
        failures.append(f"{q.shape[2]} query heads and {k.shape[2]} key heads: each key head has as many query heads")
    for name, marks in (("positions", positions), ("segments", segments)):
        if marks is not None and marks.shape != q.shape[:2]:
            failures.append(f"{name} {marks.shape} for q {q.shape}: one for each token, {q.shape[:2]}")
    if kernel is not None and kernel not in get_args(_kernels.Name):
        failures.append(f"kernel is {kernel!r}: one of {', '.join(map(repr, get_args(_kernels.Name)))}, or left out")
    if window is not None and window < 1:
        failures.append(f"window is {window}: at least 1, its own position")
    if failures:
        raise ShardingError("\n".join(f"attention: {failure}." for failure in failures))
