"""How queries of one device meet keys of all: the methods of context parallelism, inside a manual region.

Each takes a device's part of Q, K and V, gives its part of the result, and moves what `CP` says. All-gather and
Ulysses are their kernel between collectives that JAX can transpose. The ring has its own backward pass: transposed, its
loop would keep every block of keys that came by. Here K and V go round once more, and their gradients with them.

    step of the ring         0        1        2        3        (4)
    device 0 has keys of     0        3        2        1
    device 1                 1        0        3        2
    ...                      and sends them on while it computes
    gradients of keys 0 at   0        1        2        3        0: home

Shapes: as in `_blockwise`; N query heads, T/p tokens of one device.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _blockwise
from ._blockwise import Heads, Marks, Part, Pulled, Setting
from ._kernels import Chosen
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
    if split.heads > 1:
        k, v = (_enough(x, split.heads) for x in (k, v))
        q, k, v = (_exchange(x, 2, 1, split) for x in (q, k, v))
        marks = Marks(_gathered(marks.at, split), None if marks.of is None else _gathered(marks.of, split))
    heads, shape = grouped(q, k, v), q.shape
    mixed: jax.Array
    if split.method == "allgather":
        gather = ft.partial(lax.all_gather, axis_name=split.axis, axis=1, tiled=True)
        k, v, keys = gather(k), gather(v), jax.tree.map(gather, marks)
        if masks is not None and split.zigzag:  # it wants keys in the order of the sequence
            k, v, keys = jax.tree.map(ft.partial(_restored, split=split), (k, v, keys))
        mixed = kernel.run(Heads(heads.q, k, v), marks, keys, masks)
    elif split.heads < split.size:
        mixed = ring(heads, marks, kernel.setting, Route.of(split))  # pyright: ignore[reportAssignmentType] (custom_vjp)
    else:
        mixed = kernel.run(heads, marks, marks)
    mixed = mixed.reshape(shape)
    return _exchange(mixed, 1, 2, split) if split.heads > 1 else mixed


def _restored(x: jax.Array, split: ContextSplit) -> jax.Array:
    """Keys, or their marks, in the order of the sequence: two chunks of each device change places."""
    chunks = x.reshape(x.shape[0], 2 * split.size, -1, *x.shape[2:])
    return chunks[:, np.argsort(split.order(2 * split.size))].reshape(x.shape)


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

    def send(self, tree: Any) -> Any:
        """What the device before has."""
        pairs = [(at, (at + self.stride) % self.size) for at in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)


@ft.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ring(heads: Heads, marks: Marks, setting: Setting, route: Route) -> jax.Array:
    """Attention [B, T/p, K, G, H] over the keys of a ring of devices."""
    return _ring_forward(heads, marks, setting, route)[0]


def _ring_forward(heads: Heads, marks: Marks, setting: Setting, route: Route) -> Any:
    queries, keys = heads.q, (heads.k, heads.v, marks)

    def join(part: Part, keys: Any) -> Part:
        k, v, key_marks = keys
        return _blockwise.merge(part, _blockwise.forward(Heads(queries, k, v), marks, key_marks, setting))

    def step(so_far: Any, _: None) -> Any:
        keys, part = so_far
        ahead = route.send(keys)  # needed in the next step: it travels while this one computes
        return (ahead, join(part, keys)), None

    (keys, part), _ = _loop(step, (keys, _nothing(queries)), route.steps - 1)
    part = join(part, keys)
    out = part.out.astype(queries.dtype)
    return out, (heads, marks, out, part.log_sum)


def _ring_backward(setting: Setting, route: Route, kept: Any, d_out: jax.Array) -> Any:
    heads, marks, out, log_sum = kept
    pulled = Pulled.of(d_out, out, log_sum)

    def grads_of(keys: Any) -> Heads:
        k, v, key_marks = keys
        return _blockwise.backward(Heads(heads.q, k, v), marks, key_marks, pulled, setting)

    def add(d_q: jax.Array, behind: Any, keys: Any) -> Any:
        arrived = route.send(behind)  # gradients of the keys that have just come, from the devices they were on
        grads = grads_of(keys)
        return d_q + grads.q, (arrived[0] + grads.k, arrived[1] + grads.v)

    def step(so_far: Any, _: None) -> Any:
        keys, d_q, behind = so_far
        ahead = route.send(keys)
        return (ahead, *add(d_q, behind, keys)), None

    keys = (heads.k, heads.v, marks)
    ahead, first = route.send(keys), grads_of(keys)
    so_far = (ahead, first.q, (first.k, first.v))
    (keys, d_q, behind), _ = _loop(step, so_far, route.steps - 2)
    d_q, behind = add(d_q, behind, keys)
    d_k, d_v = route.send(behind)
    return _blockwise.as_types(Heads(d_q, d_k, d_v), heads), None


ring.defvjp(_ring_forward, _ring_backward)


def _loop(step: Any, start: Any, length: int) -> Any:
    return lax.scan(step, start, None, length=length) if length else (start, None)


def _nothing(q: jax.Array) -> Part:
    """Attention over no keys."""
    batch, size, num_kv, group, _ = q.shape
    wide = _blockwise.width_of(q.dtype)
    return Part(jnp.zeros(q.shape, wide), jnp.full((batch, num_kv, group, size), _blockwise.LOWEST, wide))


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


def _gathered(x: jax.Array, split: ContextSplit) -> jax.Array:
    """Marks [b, T/p] of `split.heads` neighbours, joined."""
    if split.heads == split.size:
        return lax.all_gather(x, split.axis, axis=1, tiled=True)
    return _exchange(jnp.tile(x, split.heads), 1, 1, split)


def _shifted(x: jax.Array, far: int, split: ContextSplit) -> jax.Array:
    """What the neighbour `far` before this device, in its group, has."""
    number = split.heads
    pairs = [(at, at // number * number + (at + far) % number) for at in range(split.size)]
    return lax.ppermute(x, split.axis, pairs) if far else x
