"""What a model sees of the plan while it is traced.

`plan.jit` enters a `Region` around the user's step; `jp.constrain`, `jp.embed` and the parameters themselves look it
up. The region is part of JAX's trace-cache key (`jax.make_user_context`), so that a scan body, a rematerialised
function or a helper that the user jitted is traced anew for another plan. A `ContextVar` is not: after one call
without a plan, every such function kept *no* constraint under every later plan, in silence.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ._types import Axes

_region = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """A plan, as seen from one place in a step. Hashed by identity of the plan: a plan is immutable.

    Attributes:
        plan: The plan in force.
        replicas: Axes over which the model is being mapped by `vmap` right now (accumulation), or that are manual here
            (a stage of a pipeline): inside, they do not exist, and no spec may name them.
        manual: Whether this is within a manual region over `replicas`.
    """

    plan: Any
    replicas: Axes = ()
    manual: bool = False

    def __hash__(self) -> int:
        return hash((id(self.plan), self.replicas, self.manual))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.plan is other.plan and self._here == other._here

    @property
    def _here(self) -> tuple[Axes, bool]:
        return self.replicas, self.manual

    @property
    def mesh(self) -> Any:
        """The mesh, as specs are resolved on it."""
        return jax.sharding.get_abstract_mesh() if self.manual else self.plan.mesh

    @property
    def batch_axes(self) -> Axes:
        """The axes that split the batch dim here, outermost first."""
        return self.axes_of("batch")

    @property
    def crossed(self) -> Axes:
        """The axes of more than one device that split tokens here: gradients are summed over them."""
        return tuple(axis for axis in self.plan.token_axes if axis not in self.replicas)

    def axes_of(self, dim: str) -> Axes:
        """The axes that split the logical dim `dim` of an activation here; `()` if none does."""
        return tuple(axis for axis in self.plan.dims.get(dim, ()) if axis not in self.replicas)

    def without_replicas(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` less the axes that do not exist here."""
        return drop_axes(spec, self.replicas)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """`spec` on this region's mesh."""
        return NamedSharding(self.mesh, self.without_replicas(spec))

    def constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`x` laid out as `spec` says, which names none of `replicas`; as it is, where every axis is manual."""
        if self.manual and set(self.plan.axes) <= set(self.replicas):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def drop_axes(spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """`spec` with every mention of `axes` removed."""
    return as_spec([tuple(axis for axis in axes_at(entry) if axis not in axes) for entry in spec])


def axes_at(entry: Any) -> Axes:
    """One entry of a `PartitionSpec` as a tuple of axes."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def as_spec(entries: Any) -> PartitionSpec:
    """A `PartitionSpec` in one spelling: no one-element tuples, no trailing `None`."""
    flat = [None if not entry else (entry[0] if len(entry) == 1 else tuple(entry)) for entry in entries]
    while flat and flat[-1] is None:
        flat.pop()
    return PartitionSpec(*flat)


def current() -> Region | None:
    """The region being traced, or `None` outside of any plan."""
    return _region.value


@contextlib.contextmanager
def entered(region: Region | None) -> Iterator[None]:
    """Trace what follows as seen from `region`; `None` leaves the plan."""
    with _region(region):
        yield
