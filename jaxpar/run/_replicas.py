"""Copies of one array that differ: silent corruption of memory, of a link or of a computation.

Every device sums the bits of what it holds, weighted by their place, in one pass over its memory; the sums of those
that hold the same piece are compared. Only the sums move between devices, four bytes an array and device. A single
flipped bit always shows, anything else with all but 2^-32 likelihood. Where three devices or more hold a piece, the
one that differs is named; of two, both are.
"""

import collections
import dataclasses
import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .._errors import StepError
from .._hardware import Device

MOST_LEAVES = 3  # named in one line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
    """Compare the copies of every array that several devices hold.

    Attributes:
        every: Steps between comparisons. One reads all state once; at 100 it costs less than a thousandth of most runs.

    Raises:
        StepError: `every` is not positive.
    """

    every: int = 100

    def __post_init__(self) -> None:
        if self.every < 1:
            raise StepError(f"{self}: every is at least 1 step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd:
    """Devices whose copy of a piece is another than that of most.

    Attributes:
        path: Of the array.
        devices: Those that differ, as far as can be told: all of them, if there is no majority.
        num_copies: How many hold that piece.
    """

    path: str
    devices: tuple[Device, ...]
    num_copies: int


def odd_ones(arrays: Mapping[str, Any]) -> list[Odd]:
    """Compare the copies of each array. A collective of all processes, which come to the same result.

    Args:
        arrays: By path. Those without copies or without a mesh are passed over, and PRNG keys.

    Example:
        >>> odd_ones({"w": jnp.ones((8, 8))})
        []
    """
    by_mesh: dict[Mesh, list[str]] = collections.defaultdict(list)
    for path, leaf in arrays.items():
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not leaf.size or _all_differ(sharding, leaf.shape):
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if isinstance(sharding.mesh, Mesh):
            by_mesh[sharding.mesh].append(path)
    found = []
    for mesh, paths in by_mesh.items():
        leaves = [arrays[path] for path in paths]
        specs = tuple(leaf.sharding.spec for leaf in leaves)
        sums = np.asarray(_summed(mesh, specs)(leaves))  # leaves, then one dim a mesh axis
        for path, leaf, own in zip(paths, leaves, sums, strict=True):
            found += _compared(path, leaf, dict(zip(mesh.devices.flat, own.flat, strict=True)))
    return found


def told(found: Sequence[Odd]) -> str:
    """In one line: which arrays, on which devices."""
    lines = []
    for odd in found[:MOST_LEAVES]:
        devices = ", ".join(f"{device} of process {device.process_index}" for device in odd.devices)
        if len(odd.devices) == odd.num_copies:
            lines.append(f"{odd.path} differs between {devices}")
        else:
            lines.append(f"{odd.path} on {devices} is not what the other {odd.num_copies - len(odd.devices)} hold")
    more = len(found) - MOST_LEAVES
    return "; ".join(lines) + (f"; and {more} more arrays" if more > 0 else "")


def _all_differ(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether every device holds a piece of its own."""
    return sharding.num_devices == 1 or _copies(sharding, shape) == 1


def _copies(sharding: NamedSharding, shape: tuple[int, ...]) -> int:
    pieces = {_span(index, shape) for index in sharding.devices_indices_map(shape).values()}
    return sharding.num_devices // max(len(pieces), 1)


def _span(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def _compared(path: str, leaf: Any, sums: Mapping[Device, Any]) -> list[Odd]:
    pieces: dict[tuple[tuple[int, int], ...], list[Device]] = collections.defaultdict(list)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        pieces[_span(index, leaf.shape)].append(device)
    found = []
    for devices in pieces.values():
        counts = collections.Counter(int(sums[device]) for device in devices)
        if len(counts) == 1:
            continue
        (most, times), *others = counts.most_common()
        is_clear = times > others[0][1]
        odd = tuple(device for device in devices if not is_clear or int(sums[device]) != most)
        found.append(Odd(path=path, devices=odd, num_copies=len(devices)))
    return found


@ft.lru_cache(maxsize=8)
def _summed(mesh: Mesh, specs: tuple[P, ...]) -> Any:
    """Sums by device, [leaves, *mesh], on every process."""

    def own(leaves: list[jax.Array]) -> jax.Array:
        sums = jnp.stack([_sum(leaf) for leaf in leaves])
        return sums.reshape(len(leaves), *(1,) * len(mesh.axis_names))

    # Replication is not checked: the point is that copies may differ.
    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=(list(specs),), out_specs=P(None, *mesh.axis_names), check_vma=False
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, P()))


def _sum(leaf: jax.Array) -> jax.Array:
    """The bits of a local array as numbers, each times an odd one that goes by its place, modulo 2^32."""
    if leaf.dtype.name in ("bool", "int4", "uint4", "int2", "uint2"):
        leaf = leaf.astype(jnp.int8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, width).reshape(-1).astype(jnp.uint32)
    places = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2654435762) + jnp.uint32(1)
    return jnp.sum(words * places, dtype=jnp.uint32)
