"""Copies of a parameter for a manual kernel: their gradient leaves the kernel as each device has summed it.

A gradient that leaves a manual region is summed over every axis that its operand does not have, whole. Over `data` and
`fsdp` that is an all-reduce over both, of which each device keeps a piece, where a reduce-scatter over `fsdp` and an
all-reduce of the pieces over `data` is enough ([Note: a gradient over several axes] in `_plan.py`). So the operand is
given leading dims, one for each of these axes and split over it; the sums over them are outside of the region, one at
a time. A copy takes no memory: it is what each device holds of the parameter anyway.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._context import Region, axes_at
from ._planned import route_of
from ._types import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """How a parameter is copied, and its gradient summed.

    Attributes:
        mesh: The mesh.
        late: Axes over which pieces of the gradient are summed, the outermost dims of the copies.
        early: Axes that cut it, over which it is summed first.
        cut: The spec of the gradient once it is summed over `early`.
        spread: The spec of the copies.
    """

    mesh: Any
    late: Axes
    early: Axes
    cut: PartitionSpec
    spread: PartitionSpec

    @property
    def axes(self) -> Axes:
        """The axes of the leading dims; `()` for the parameter as it is, no copies."""
        return (*self.late, *self.early)

    def constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`x` in `spec` on this mesh."""
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def copies_for(region: Region, shape: tuple[int, ...], spec: PartitionSpec) -> Copies:
    """The copies that a kernel wants of an array of `shape` that it would take in `spec`.

    None, unless this is the shape of a parameter whose gradient is cut over some axes of the batch and summed over
    others. By shape, since what a kernel is given does not know its name; where parameters of one shape differ, none.
    """
    cuts = {route_of(record, region)[0] for record in region.plan.parameters if record.shape == shape}
    cut = cuts.pop() if len(cuts) == 1 else PartitionSpec()
    named = {axis for entry in cut for axis in axes_at(entry)}
    late, early = (tuple(axis for axis in region.crossed if (axis in named) is wanted) for wanted in (False, True))
    if not late or not early:
        return Copies(mesh=region.mesh, late=(), early=(), cut=spec, spread=spec)
    return Copies(mesh=region.mesh, late=late, early=early, cut=cut, spread=PartitionSpec(*late, *early, *spec))


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def copied(value: jax.Array, copies: Copies) -> jax.Array:
    """`value` with leading dims of the sizes of `copies.axes`, each split over its axis."""
    if not copies.axes:
        return value
    sizes = [copies.mesh.shape[axis] for axis in copies.axes]
    return copies.constrain(jnp.broadcast_to(value, (*sizes, *value.shape)), copies.spread)


@copied.defjvp
def _copied_jvp(copies: Copies, values: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The linear map is written for its transpose: sum over `early`, cut, sum the pieces over `late`."""
    (tangent,) = tangents
    if copies.axes:
        late, early = ([copies.mesh.shape[axis] for axis in axes] for axes in (copies.late, copies.early))
        shape = tangent.shape
        pieces = jnp.broadcast_to(copies.constrain(tangent, copies.cut), (*late, *shape))
        pieces = copies.constrain(pieces, PartitionSpec(*copies.late, *copies.cut))
        tangent = jnp.broadcast_to(pieces.reshape(*late, *[1] * len(early), *shape), (*late, *early, *shape))
        tangent = copies.constrain(tangent, copies.spread)
    return copied(values[0], copies), tangent
