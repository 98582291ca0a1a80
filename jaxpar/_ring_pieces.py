"""What a device of a ring computes with the keys of one device, its own or another's: by which kernel, of which part.

    in blocks  plain JAX (`_blockwise`): marks decide what is seen, and pairs of blocks in which nothing is are skipped
    splash     Pallas, TPU: of its own keys a causal mask; of another's, all or nothing of each half

[Note: halves] In zigzag order a device has one chunk from the front of the sequence and one from the back. Keys of a
device before this one: all its queries see the front half and none of the back half. Of a device after it: the back
half of its queries sees all, the front half nothing. Both are half of the work, with no mask at all:

    keys of         before        itself           after
    front queries   all  none     causal  none     none  none
    back queries    all  none     all     causal   all   all

In the order of the sequence it sees all keys of a device before it, and none of one after it.

Shapes: as in `_blockwise`, with queries [B, K, G, Q, H] as kernels want them, and keys and values one array that moves,
[2, B, K, S, H].
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _blockwise, _kernels
from ._blockwise import Heads, Marks, Part, Pulled, Setting
from ._kernels import Asked


class Place(NamedTuple):
    """Whose queries meet whose keys: places in the ring, and whether they are known to be the same."""

    here: Any
    source: Any
    own: bool = False


class PulledBack(NamedTuple):
    """What a backward pass knows of its queries: `d_out` and `out` [B, K, G, Q, H], `log_sum` [B, K, G, Q]."""

    d_out: jax.Array
    out: jax.Array
    log_sum: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class InBlocks:
    """Any mask by marks, on any platform."""

    setting: Setting

    def forward(self, q: jax.Array, keys: jax.Array, marks: Marks, place: Place) -> Part:
        """Attention over these keys alone; `marks` are of all tokens, device after device."""
        heads = _as_heads(q, keys)
        return _blockwise.forward(heads, *_marks_of(marks, place, q.shape[3]), self.setting)

    def backward(
        self, q: jax.Array, keys: jax.Array, marks: Marks, place: Place, pulled: PulledBack
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients of `q` and of `keys`, as wide as the softmax; `pulled` is of all keys."""
        d_out, out = (jnp.moveaxis(x, 3, 1) for x in (pulled.d_out, pulled.out))
        known = Pulled.of(d_out, out, pulled.log_sum)
        grads = _blockwise.backward(_as_heads(q, keys), *_marks_of(marks, place, q.shape[3]), known, self.setting)
        return jnp.moveaxis(grads.q, 1, 3), jnp.moveaxis(jnp.stack([grads.k, grads.v]), 2, 3)


def _as_heads(q: jax.Array, keys: jax.Array) -> Heads:
    k, v = jnp.moveaxis(keys, 3, 2)
    return Heads(jnp.moveaxis(q, 3, 1), k, v)


def _marks_of(marks: Marks, place: Place, size: int) -> tuple[Marks, Marks]:
    """Of the queries and of the keys."""

    def of(at: Any) -> Marks:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at * size, size, axis=1), marks)

    return of(place.here), of(place.source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splash:
    """A causal mask or none, with segments or without; queries come scaled.

    Its backward pass is one that JAX keeps to itself, for it alone takes the sums over rows of all keys; the public one
    takes those of the keys it sees.
    """

    asked: Asked
    zigzag: bool

    def forward(self, q: jax.Array, keys: jax.Array, marks: Marks, place: Place) -> Part:
        """As of `InBlocks`."""
        of = _segments(marks, place, q.shape[3])
        wide, half = _blockwise.width_of(q.dtype), q.shape[3] // 2

        def part(rows: slice, columns: slice, *, causal: bool = False) -> Part:
            out, log_sum = self._run(q[:, :, :, rows], keys[:, :, :, columns], _some(of, rows, columns), causal)
            return Part(out.astype(wide), log_sum)

        def nothing() -> Part:
            return Part(jnp.zeros(q.shape, wide), jnp.full(q.shape[:-1], _blockwise.LOWEST, wide))

        def after() -> Part:
            if not self.zigzag:
                return nothing()
            whole, some = nothing(), part(slice(half, None), slice(None))
            return jax.tree.map(lambda x, y: jnp.concatenate([x[:, :, :, :half], y], axis=3), whole, some)

        before = ft.partial(part, slice(None), slice(half) if self.zigzag else slice(None))
        return self._either(place, ft.partial(part, slice(None), slice(None)), before, after)

    def backward(
        self, q: jax.Array, keys: jax.Array, marks: Marks, place: Place, pulled: PulledBack
    ) -> tuple[jax.Array, jax.Array]:
        """As of `InBlocks`."""
        of = _segments(marks, place, q.shape[3])
        wide, half = pulled.log_sum.dtype, q.shape[3] // 2
        nothing = jnp.zeros(q.shape, wide), jnp.zeros(keys.shape, wide)

        def part(rows: slice, columns: slice, *, causal: bool = False) -> tuple[jax.Array, jax.Array]:
            known = PulledBack(*(x[:, :, :, rows] for x in pulled))
            some = q[:, :, :, rows], keys[:, :, :, columns]
            d_q, d_keys = self._run_back(*some, _some(of, rows, columns), known, causal)
            return _padded(d_q.astype(wide), rows, half), _padded(d_keys.astype(wide), columns, half)

        after = ft.partial(part, slice(half, None), slice(None)) if self.zigzag else lambda: nothing
        before = ft.partial(part, slice(None), slice(half) if self.zigzag else slice(None))
        return self._either(place, ft.partial(part, slice(None), slice(None)), before, after)

    def _either(
        self, place: Place, whole: Callable[..., Any], before: Callable[..., Any], after: Callable[..., Any]
    ) -> Any:
        """What is seen of these keys, [Note: halves]."""
        if not self.asked.causal or place.own:
            return whole(causal=self.asked.causal)
        return lax.cond(place.source < place.here, before, after)

    def _kernel(self, q: jax.Array, keys: jax.Array, causal: bool) -> Any:
        asked = dataclasses.replace(self.asked, causal=causal)
        rows, columns = np.arange(q.shape[3]), keys.shape[3]
        return _kernels.splash_masks(asked, math.prod(q.shape[1:3]), rows, num_keys=columns, save_residuals=True)

    def _run(self, q: jax.Array, keys: jax.Array, of: Any, causal: bool) -> tuple[jax.Array, jax.Array]:
        kernel = self._kernel(q, keys, causal)
        out, (log_sum,) = jax.vmap(kernel)(q.reshape(q.shape[0], -1, *q.shape[3:]), *keys, of)
        return out.reshape(q.shape), log_sum.reshape(q.shape[:-1])

    def _run_back(
        self, q: jax.Array, keys: jax.Array, of: Any, pulled: PulledBack, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

        kernel = self._kernel(q, keys, causal)

        def one(q: Any, keys: Any, of: Any, pulled: PulledBack) -> Any:
            known = (pulled.out, pulled.log_sum, kernel.dq_mask_info, kernel.dkv_mask_info)
            kept: Any = (q, *keys, of, None, *known)
            return splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=pulled.d_out)[3:6]  # noqa: SLF001

        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        d_q, d_k, d_v = jax.vmap(one, in_axes=(0, 1, 0, 0))(flat(q), keys, of, PulledBack(*map(flat, pulled)))
        return d_q.reshape(q.shape), jnp.stack([d_k, d_v])


Piece = InBlocks | Splash
"""A kernel for the keys of one device at a time."""


def _segments(marks: Marks, place: Place, size: int) -> tuple[jax.Array, jax.Array] | None:
    queries, keys = _marks_of(marks, place, size)
    return None if queries.of is None or keys.of is None else (queries.of, keys.of)


def _some(of: tuple[jax.Array, jax.Array] | None, rows: slice, columns: slice) -> Any:
    """The segments of some queries and of some keys, as splash attention takes them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    if of is None:
        return None
    return splash.SegmentIds(q=of[0][:, rows].astype(jnp.int32), kv=of[1][:, columns].astype(jnp.int32))


def _padded(x: jax.Array, some: slice, half: int) -> jax.Array:
    """`x`, of the rows `some` of dim 3, with zeros for the others."""
    widths = (half if some.start else 0, half if some.stop else 0)
    return jnp.pad(x, [widths if dim == 3 else (0, 0) for dim in range(x.ndim)]) if any(widths) else x
