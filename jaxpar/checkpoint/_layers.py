"""Stacks of equal layers, read as single layers and the other way round.

A stack's array is made first, empty and sharded; then layer after layer is read, of all stacks at once, and written
into it in place. So a device holds the result and one layer's shards. A stack that becomes single leaves is read one
leaf at a time, with its layers whole on the same shards as they end on, and cut: the result and one stack's shards.
"""

import functools as ft
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _orbax
from ._target import Asked, as_asked, layer_of, regrouped, stack_of


def read_stacked(
    path: pathlib.Path, stacked: Mapping[str, tuple[str, ...]], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Stacks by their names here, from the layers of the checkpoint at `path`."""
    stacks = {name: _empty(asked[name]) for name in stacked}
    for index in range(max(map(len, stacked.values()), default=0)):
        mine = {name: layers[index] for name, layers in stacked.items() if index < len(layers)}
        read = _orbax.read(path, {layer: layer_of(asked[name]) for name, layer in mine.items()})
        for name, layer in mine.items():
            if isinstance(stacks[name], np.ndarray):
                stacks[name][index] = read.pop(layer)
            else:
                stacks[name] = _put(asked[name].sharding)(stacks[name], read.pop(layer), np.int32(index))
    return stacks


def read_sliced(
    path: pathlib.Path,
    sliced: Mapping[str, tuple[str, ...]],
    asked: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Any]]:
    """Layers by their names here, from the stacks of the checkpoint at `path`, which have these shapes there."""
    for stack, layers in sliced.items():
        in_a_row = stack_of(len(layers), asked[layers[0]])
        chunked = shapes[stack][0] != len(layers)
        there = regrouped(in_a_row, 1, shapes[stack][:2]) if chunked else in_a_row
        (whole,) = _orbax.read(path, {stack: there}).values()
        whole = as_asked(whole, in_a_row) if chunked else whole
        for index, name in enumerate(layers):
            if isinstance(whole, np.ndarray):
                yield name, whole[index].copy()
            else:
                yield name, _cut(asked[name].sharding)(whole, np.int32(index))


def _empty(asked: Asked) -> Any:
    if isinstance(asked, np.ndarray):
        return asked
    return jax.jit(ft.partial(jnp.zeros, asked.shape, asked.dtype), out_shardings=asked.sharding)()


@ft.lru_cache
def _put(sharding: Any) -> Any:
    """Writes one layer of a stack that lies on `sharding`, in place."""
    put = lambda stack, layer, index: jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@ft.lru_cache
def _cut(sharding: Any) -> Any:
    """Cuts one layer out of a stack, onto `sharding`."""
    return jax.jit(lambda stack, index: jax.lax.dynamic_index_in_dim(stack, index, 0, False), out_shardings=sharding)
