"""What computes attention on a device: the best kernel that can, with the reason if that is not the platform's own.

    blockwise  plain JAX (`_blockwise`), any platform: positions and segments as they come
    splash     Pallas, TPU; jax.experimental.pallas.ops.tpu.splash_attention
    cudnn      GPU; jax.nn.dot_product_attention(implementation="cudnn")
    xla        jax.nn.dot_product_attention: all scores at once

Splash and cuDNN know the order of an array, not positions. For these, positions are checked while running: the result
is NaN unless they go up by one within each segment.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._blockwise import BLOCK, Heads, Marks, Setting, blockwise
from ._errors import ShardingError
from ._mesh import hardware_of
from ._sequence import ContextSplit

Name = Literal["blockwise", "splash", "cudnn", "xla"]

_OWN: dict[str, Name] = {"tpu": "splash", "gpu": "cudnn"}
"""The kernels that are made for a platform."""

SOME = 1024
"""Queries whose scores XLA's attention makes at a time."""

AnyArray = jax.Array | jax.ShapeDtypeStruct

_LANES = 128
_ONE_PASS = (None, "default", "fastest", "bfloat16")  # any other, Mosaic refuses to compile for narrow operands

_platform = jax.make_user_context(None)  # not a ContextVar: see `_context`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a call of `attention` asks for.

    Attributes:
        causal: Whether a token sees no later one.
        window: How many positions it sees.
        scale: Of the scores.
        segments: Whether segments are given.
        positions: Whether positions are given.
        name: The kernel, if one was named.
    """

    causal: bool
    window: int | None
    scale: float
    segments: bool
    positions: bool
    name: Name | None

    @property
    def by_position(self) -> bool:
        """Whether it matters where tokens are."""
        return self.causal or self.window is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A kernel for one call.

    Attributes:
        asked: What for.
        name: Which.
        words: Of the choice, for the notes of a step.
        skips: Whether blockwise attention skips what is not seen.
    """

    asked: Asked
    name: Name
    words: str
    skips: bool = True

    @property
    def setting(self) -> Setting:
        """What blockwise attention needs to know."""
        return Setting(
            causal=self.asked.causal, window=self.asked.window, scale=self.asked.scale, block=BLOCK, skips=self.skips
        )

    def run(self, heads: Heads, queries: Marks, keys: Marks, masks: Any = None) -> jax.Array:
        """Attention [B, Q, K, G, H] over keys that are all here; `masks` are `splash_masks`, of splash alone."""
        if self.name == "blockwise":
            return blockwise(heads, queries, keys, self.setting)
        if self.name == "xla":
            return self._xla(heads, queries, keys)
        out = self._splash(heads, queries, keys, masks) if self.name == "splash" else self._cudnn(heads)
        return self.checked(out, keys)

    def checked(self, out: jax.Array, keys: Marks) -> jax.Array:
        """`out` [B, ...] of a kernel that knows places alone: NaN where the positions of all keys, in order, differ."""
        if not self.asked.positions:
            return out
        right = _in_order(keys).reshape(-1, *[1] * (out.ndim - 1))
        return jnp.where(right, out, jnp.array(jnp.nan, out.dtype))

    def whole(self, q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks) -> jax.Array:
        """XLA's attention of q [B, T, N, H] over k and v [B, T, K, H], `SOME` queries at a time: [B, T, N, H].

        The backward pass computes the scores of each part again.
        """

        def some(part: tuple[jax.Array, Marks]) -> jax.Array:
            return self._at_once(part[0], k, v, self.setting.sees(part[1], marks))

        length = q.shape[1]
        if length <= SOME or length % SOME:
            return some((q, marks))

        def parts(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(x.shape[0], length // SOME, SOME, *x.shape[2:]), 1, 0)

        mixed = jax.lax.map(jax.checkpoint(some), jax.tree.map(parts, (q, marks)))  # T/SOME B SOME N H
        return jnp.moveaxis(mixed, 0, 1).reshape(q.shape)

    def _xla(self, heads: Heads, queries: Marks, keys: Marks) -> jax.Array:
        seen = self.setting.sees(queries, keys)
        q = heads.q.reshape(*heads.q.shape[:2], -1, heads.q.shape[-1])
        out = self._at_once(q, heads.k, heads.v, seen).reshape(heads.q.shape)
        return out if seen is None else jnp.where(seen.any(-1)[:, :, None, None, None], out, 0)

    def _at_once(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None) -> jax.Array:
        mask = None if seen is None else seen[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.asked.scale, implementation="xla")

    def _cudnn(self, heads: Heads) -> jax.Array:
        window = self.asked.window
        q = heads.q.reshape(*heads.q.shape[:2], -1, heads.q.shape[-1])
        return jax.nn.dot_product_attention(
            q,
            heads.k,
            heads.v,
            scale=self.asked.scale,
            is_causal=self.asked.causal,
            local_window_size=None if window is None else (window - 1, 0 if self.asked.causal else window - 1),
            implementation="cudnn",
        ).reshape(heads.q.shape)

    def _splash(self, heads: Heads, queries: Marks, keys: Marks, masks: Any) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

        batch, size, num_kv, group, width = heads.q.shape
        if masks is None:
            masks = splash_masks(self.asked, num_kv * group, np.arange(size))
        q = heads.q.reshape(batch, size, num_kv * group, width) * jnp.asarray(self.asked.scale, heads.q.dtype)
        rows = [jnp.moveaxis(x, 2, 1) for x in (q, heads.k, heads.v)]
        ids = None
        if queries.of is not None and keys.of is not None:
            ids = splash.SegmentIds(q=queries.of.astype(jnp.int32), kv=keys.of.astype(jnp.int32))
        out = jax.vmap(masks)(*rows, ids)
        return jnp.moveaxis(out, 1, 2).reshape(heads.q.shape)


def choose(asked: Asked, q: AnyArray, *, mesh: Any, split: ContextSplit | None, inside: bool = False) -> Chosen:
    """The kernel for a call on `mesh`, with sequences split as `split` says; `inside` of a manual region or not.

    Raises:
        ShardingError: The kernel that was named cannot do it; with the reason.
    """
    platform = _platform_of(mesh)
    whole = split is None and (q.shape[1] <= SOME or q.shape[1] % SOME == 0)
    plain: Name = "xla" if whole else "blockwise"
    wanted = asked.name or _OWN.get(platform, plain)
    why_not = _why_not(wanted, asked, q, platform, split)
    if inside and not why_not and (wanted == "splash" or (wanted == "cudnn" and split is not None)):
        why_not = "it is a kernel, a stage of a pipeline is a manual region, and one in another needs types it lacks"
    if why_not and asked.name is not None:
        raise ShardingError(f"attention: kernel={wanted!r} cannot compute this: {why_not}. Leave kernel= out.")
    name = plain if why_not else wanted
    words = f"{name} on {platform}"
    if split is not None:
        words = f"{split.method} over {split.axis}={split.size}, {words}"
    if why_not:
        words += f", not {wanted}: {why_not}"
    elif name in _OWN.values() and asked.positions:
        words += "; NaN where positions do not go up by one in a segment: kernel='xla' or 'blockwise' takes any"
    return Chosen(asked=asked, name=name, words=f"attention: {words}")


def splash_masks(
    asked: Asked,
    num_heads: int,
    order: np.ndarray,
    *,
    num_keys: int | None = None,
    shards: int = 1,
    save_residuals: bool = False,
    interpret: bool = False,
) -> Any:
    """Splash attention for `num_heads` heads and queries in `order`, keys in theirs: a pytree to call.

    With `shards` it is for that many devices, each with a part of the queries; `splash_spec` splits it. Keys are as
    many as queries, or `num_keys`, if all are seen. `save_residuals` gives the log-sum-exp of rows too. Without a TPU,
    `interpret` runs it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
        splash_attention_mask as mask,
    )

    length = len(order)
    num_keys = length if num_keys is None else num_keys
    if asked.window is not None:
        sides = (asked.window - 1, 0 if asked.causal else asked.window - 1)
        one: Any = mask.LocalMask((length, length), sides, 0)
    else:
        one = mask.CausalMask((length, length)) if asked.causal else mask.FullMask((length, num_keys))
    if asked.by_position:
        one.q_sequence = order.astype(np.int32)
    block, block_kv = _block_of(length // shards), _block_of(num_keys // shards)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        mask.MultiHeadMask([one] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        save_residuals=save_residuals,
        interpret=interpret,
    )


def splash_spec(masks: Any, mesh: Any, axis: str) -> Any:
    """How `splash_masks` are split in a manual region."""
    return masks.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))


def _why_not(name: Name, asked: Asked, q: AnyArray, platform: str, split: ContextSplit | None) -> str:
    """Why the kernel `name` cannot do what is asked; `""` if it can."""
    if name == "blockwise":
        return ""
    ring = split if split is not None and split.method in ("ring", "hybrid") else None
    if ring is not None and name != "splash":
        return f"{ring.method} merges parts by the sums of their rows, which it does not give its backward pass"
    if name == "xla":
        return ""
    if platform != ("tpu" if name == "splash" else "gpu"):
        return f"this is {platform}"
    if name == "splash":
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        if q.dtype != jnp.float32 and precision not in _ONE_PASS:
            return f"its products of {q.dtype} are exact, and jax_default_matmul_precision={precision!r} cannot be had"
        if ring is not None and asked.window is not None:
            return f"where a window ends in the keys of another device of the {ring.method}, only the device knows"
        part = q.shape[1]
        if split is not None and split.method != "ulysses":
            part //= split.size * (2 if ring is not None and ring.zigzag else 1)
        if part % _LANES or q.shape[-1] % _LANES:
            return f"{part} queries of {q.shape[-1]} features are no multiples of {_LANES}"
        return ""
    if jax.default_backend() != "gpu":
        return "no GPU is here to ask for its cuDNN"
    if asked.segments:
        return "it knows no segments"
    if split is not None and split.method == "allgather":
        return "its causal mask begins with the first key, and these are queries from the middle of a sequence"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _LANES:
        return f"heads of {q.shape[-1]} features are no multiple of 8 up to {_LANES}"
    if asked.window is not None and not asked.causal:
        return "its window is causal"
    return ""


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Choose kernels of `platform` in what is traced here without a plan: `"cpu"`, `"gpu"` or `"tpu"`."""
    with _platform(platform):
        yield


def _platform_of(mesh: Any) -> str:
    return _platform.value or jax.default_backend() if mesh is None else hardware_of(mesh).kind


def _block_of(length: int) -> int:
    """The largest block of lanes up to 512 that divides `length`."""
    return next(size for size in (512, 384, 256, _LANES) if length % size == 0)


def _in_order(marks: Marks) -> jax.Array:
    """Whether positions say what the order of an array says, [b]; of padding, segment 0 at the end, nobody asks."""
    steps = marks.at[:, 1:] == marks.at[:, :-1] + 1
    if marks.of is not None:
        before, after = marks.of[:, :-1], marks.of[:, 1:]
        is_padding = (after == 0) & (marks.of[:, :1] != 0)
        steps = jnp.where(before == after, steps, after > before) | is_padding
    return steps.all(axis=1)
