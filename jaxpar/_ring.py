"""How queries of one device meet keys of all: the methods of context parallelism, inside a manual region.

Each takes a device's part of Q, K and V, gives its part of the result, and moves what `CP` says. All-gather and
Ulysses are their kernel between collectives that JAX can transpose. The ring has its own backward pass: transposed, its
loop would keep every block of keys that came by. Here K and V go round once more, and their gradients with them.

    step of the ring         0        1        2        3        (4)
    device 0 has keys of     0        3        2        1
    device 1                 1        0        3        2
    ...                      and sends them on while it computes
    gradients of keys 0 at   0        1        2        3        0: home

[Note: behind attention] Nothing but attention is there for a transfer to hide behind: what comes after it waits for
both. Else XLA:TPU's scheduler, which takes a transfer for hidden when it sees enough of anything beside it, put those
of the forward pass beside the merge of two parts, too short for them, and waited. K and V are one array, and their
gradients another, since few transfers may be on their way at once. Marks, a few bytes a token, are gathered before.

Shapes: as in `_blockwise`; N query heads, T/p tokens of one device. In the ring itself as in `_ring_pieces`.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _blockwise
from ._blockwise import Heads, Marks
from ._kernels import Chosen
from ._ring_pieces import InBlocks, Piece, Place, PulledBack, Splash
from ._sequence import ContextSplit


def across(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, split: ContextSplit | None, kernel: Chosen, masks: Any
) -> jax.Array:
    """Attention of this device's queries over the keys of all devices among which sequences are split.

    Args:
        q: [B, T/p, N, H].
        k: [B, T/p, K, H].
        v: [B, T/p, K, H].
        marks: Of this device's tokens, [b, T/p].
        split: The method; `None` if sequences are whole.
        kernel: What computes attention on a device.
        masks: Of splash attention for the queries of this device; `None` without an all-gather.
    """
    if split is None:
        return kernel.run(grouped(q, k, v), marks, marks).reshape(q.shape)
    gather = ft.partial(lax.all_gather, axis_name=split.axis, axis=1, tiled=True)
    whole = jax.tree.map(gather, marks)
    if split.heads > 1:
        k, v = (_enough(x, split.heads) for x in (k, v))
        q, k, v = (_exchange(x, 2, 1, split) for x in (q, k, v))
    shape = q.shape
    mixed: jax.Array
    if split.method == "allgather":
        k, v = gather(k), gather(v)
        if masks is not None and split.zigzag:  # it wants keys in the order of the sequence
            k, v, whole = jax.tree.map(ft.partial(_restored, split=split), (k, v, whole))
        mixed = kernel.run(grouped(q, k, v), marks, whole, masks)
    elif split.heads == split.size:
        mixed = kernel.run(grouped(q, k, v), whole, whole)
    elif kernel.name == "splash":
        mixed = _splash_ring(q, k, v, whole, split, kernel)
    else:
        mixed = _around(grouped(q, k, v), whole, InBlocks(setting=kernel.setting), split)
    mixed = mixed.reshape(shape)
    return _exchange(mixed, 1, 2, split) if split.heads > 1 else mixed


def _splash_ring(
    q: jax.Array, k: jax.Array, v: jax.Array, whole: Marks, split: ContextSplit, kernel: Chosen
) -> jax.Array:
    """Of scaled queries; where a group of devices shares its tokens, these in their order."""
    q = q * jnp.asarray(kernel.asked.scale, q.dtype)
    parts, marks = split.heads if split.zigzag else 1, whole
    if parts > 1:
        q, k, v = (_restored(x, split, parts) for x in (q, k, v))
        marks = jax.tree.map(lambda x: _restored(x.reshape(-1, q.shape[1]), split, parts).reshape(x.shape), whole)
    piece = Splash(asked=kernel.asked, zigzag=split.zigzag)
    mixed = _around(grouped(q, k, v), marks, piece, split)
    if parts > 1:
        mixed = _restored(mixed, split, parts, back=True)
    if split.zigzag:
        whole = jax.tree.map(ft.partial(_restored, split=split), whole)
    return kernel.checked(mixed, whole)


def _around(heads: Heads, marks: Marks, piece: Piece, split: ContextSplit) -> jax.Array:
    """Attention [B, T/p, K, G, H] over the keys of a ring of devices."""
    q, keys = jnp.moveaxis(heads.q, 1, 3), jnp.moveaxis(jnp.stack([heads.k, heads.v]), 2, 3)
    out: Any = ring(q, keys, marks, piece, Route.of(split))
    return jnp.moveaxis(out, 3, 1)


def _restored(x: jax.Array, split: ContextSplit, parts: int | None = None, *, back: bool = False) -> jax.Array:
    """The tokens of `parts` devices, by default of all, from zigzag order into that of the sequence; or `back`."""
    number = 2 * (split.size if parts is None else parts)
    order = split.order(2 * split.size)[:number]  # of the first ones; of others as many later, in the same order
    order = np.argsort(order) if not back else np.argsort(np.argsort(order))
    return x.reshape(x.shape[0], number, -1, *x.shape[2:])[:, order].reshape(x.shape)


def grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> Heads:
    """Queries by the key head that they share."""
    return Heads(q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), k, v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A ring of every `stride`-th of the `size` devices along `axis`."""

    axis: str
    size: int
    stride: int

    @staticmethod
    def of(split: ContextSplit) -> "Route":
        return Route(axis=split.axis, size=split.size, stride=split.heads)

    @property
    def steps(self) -> int:
        """Devices of the ring."""
        return self.size // self.stride

    def place(self, step: Any) -> Place:
        """This device, and the one whose keys it has in a step after the first."""
        here = lax.axis_index(self.axis) // self.stride
        return Place(here, (here - step) % self.steps)

    def own(self) -> Place:
        """This device, with its own keys."""
        here = lax.axis_index(self.axis) // self.stride
        return Place(here, here, own=True)

    def send(self, tree: Any) -> Any:
        """What the device before has."""
        pairs = [(at, (at + self.stride) % self.size) for at in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)


@ft.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ring(q: jax.Array, keys: jax.Array, marks: Marks, piece: Piece, route: Route) -> jax.Array:
    """Attention [B, K, G, T/p, H] over the keys of a ring of devices; `marks` of all tokens, device after device."""
    return _ring_forward(q, keys, marks, piece, route)[0]


def _ring_forward(q: jax.Array, keys: jax.Array, marks: Marks, piece: Piece, route: Route) -> Any:
    def step(so_far: Any, number: Any) -> Any:
        keys, part = so_far
        ahead = route.send(keys)  # needed in the next step: it travels while this one computes
        ahead, more = _behind(ahead, piece.forward(q, keys, marks, route.place(number)))
        return (ahead, _blockwise.merge(part, more)), None

    ahead, part = _behind(route.send(keys), piece.forward(q, keys, marks, route.own()))
    (last, part), _ = _loop(step, (ahead, part), 1, route.steps - 1)
    part = _blockwise.merge(part, piece.forward(q, last, marks, route.place(route.steps - 1)))
    out = part.out.astype(q.dtype)
    return out, (q, keys, marks, out, part.log_sum)


def _ring_backward(piece: Piece, route: Route, kept: Any, d_out: jax.Array) -> Any:
    q, keys, marks, out, log_sum = kept
    pulled = PulledBack(d_out, out, log_sum)

    def step(so_far: Any, number: Any) -> Any:
        keys, d_q, behind = so_far
        # Gradients of the keys that have just come arrive from the device that these were on.
        moving = route.send((keys, behind))
        (ahead, arrived), grads = _behind(moving, piece.backward(q, keys, marks, route.place(number), pulled))
        return (ahead, d_q + grads[0], arrived + grads[1]), None

    ahead, (d_q, behind) = _behind(route.send(keys), piece.backward(q, keys, marks, route.own(), pulled))
    (last, d_q, behind), _ = _loop(step, (ahead, d_q, behind), 1, route.steps - 1)
    grads = piece.backward(q, last, marks, route.place(route.steps - 1), pulled)
    arrived, grads = _behind(route.send(behind), grads)
    d_keys = route.send((arrived + grads[1]).astype(keys.dtype))
    return (d_q + grads[0]).astype(q.dtype), d_keys, None


ring.defvjp(_ring_forward, _ring_backward)


def _behind(moving: Any, computed: Any) -> Any:
    """Both, once both are here, [Note: behind attention]."""
    return lax.optimization_barrier((moving, computed))


def _loop(step: Any, start: Any, first: int, end: int) -> Any:
    return lax.scan(step, start, jnp.arange(first, end)) if first < end else (start, None)


def _enough(x: jax.Array, number: int) -> jax.Array:
    """K or V with at least a head for each of `number` devices: fewer are repeated."""
    return x if x.shape[2] >= number else jnp.repeat(x, number // x.shape[2], axis=2)


def _exchange(x: jax.Array, cut: int, join: int, split: ContextSplit) -> jax.Array:
    """All-to-all among `split.heads` neighbours: `x` cut along one dim, what comes in joined along another.

    Among all devices of the axis that is one collective. Among some, a permute for each distance: groups within an axis
    (`axis_index_groups`) are what JAX itself advises against.
    """
    axis, number = split.axis, split.heads
    if number == split.size:
        return lax.all_to_all(x, axis, cut, join, tiled=True)
    here = lax.axis_index(axis) % number
    pieces = jnp.stack(jnp.split(x, number, axis=cut))
    distance = jnp.arange(number)
    leaving = jnp.take(pieces, (here + distance) % number, axis=0)
    arrived = jnp.stack([_shifted(leaving[far], far, split) for far in range(number)])
    pieces = jnp.take(arrived, (here - distance) % number, axis=0)
    return jnp.concatenate(list(pieces), axis=join)


def _shifted(x: jax.Array, far: int, split: ContextSplit) -> jax.Array:
    """What the neighbour `far` before this device, in its group, has."""
    number = split.heads
    pairs = [(at, at // number * number + (at + far) % number) for at in range(split.size)]
    return lax.ppermute(x, split.axis, pairs) if far else x
