"""How a parameter is read inside a planned step.

Placement alone does not make FSDP: at 512 tokens XLA gathers *activations* rather than weights. So a parameter's
compute spec is applied where the parameter is read: inside the block that uses it, inside the scan over blocks, under
remat. For nnx modules that is a subclass of each `Variable`'s type, taken on only while `plan.jit` traces; for plain
pytrees it is the argument of the loss (`jp.value_and_grad`). The user's own objects never change.

Reading is a cast to the compute dtype on the shard, then the move to the compute spec: a bfloat16 gather costs half of
a float32 one. Its gradient is cut as the update wants it, which is what lets the compiler reduce-scatter. Reading can be
differentiated any number of times, forward and backward: see `_Move.tangent`.
"""

import contextlib
import dataclasses
import functools as ft
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core
from jax.sharding import NamedSharding, PartitionSpec

from . import _context, _tree
from ._context import Region
from ._plan import TABLE, Record, gradient_route
from ._types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Traced(Region):
    """The region of one tracing of a step, and what is met there.

    Equal to no region of another tracing: a helper that the user jitted is traced anew for each step, so that nothing
    it does goes unseen.

    Attributes:
        dims: Logical dims of activations that were named.
        notes: What a reader of the step should know.
        values: What each parameter was read as, in each trace inside.
        tables: Paths of parameters that the step looks up by index, as far as the plan does not say so.
    """

    dims: set[str] = dataclasses.field(default_factory=set)
    notes: list[str] = dataclasses.field(default_factory=list)
    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    tables: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        return hash((id(self.values), self.replicas))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and self.values is other.values and self.replicas == other.replicas


@dataclasses.dataclass(frozen=True)
class _Move:
    """Where a parameter goes when read, and its cotangent when differentiated; hashable, so part of the trace."""

    storage: NamedSharding
    compute: NamedSharding
    route: tuple[NamedSharding, ...]
    dtype: Any
    path: str

    def forward(self, value: jax.Array) -> jax.Array:
        if self.dtype != value.dtype:
            value = jax.lax.with_sharding_constraint(value.astype(self.dtype), self.storage)
        return jax.lax.with_sharding_constraint(value, self.compute)

    def tangent(self, value: jax.Array) -> jax.Array:
        """The linear map that stands for `forward` under differentiation, written for its transpose.

        A constraint transposes to itself, so a cotangent passes this backwards: widened first, so that it is summed in
        the stored dtype, then along its route.
        """
        for sharding in reversed(self.route):
            value = jax.lax.with_sharding_constraint(value, sharding)
        return value.astype(self.dtype)


def read(value: jax.Array, record: Record, region: Region, *, layers: int = 0) -> jax.Array:
    """`value`, a parameter in its storage spec, as the model computes with it.

    Args:
        value: The parameter, or one layer of a stacked one.
        record: The plan's record of the parameter.
        region: Where in the step it is read.
        layers: Leading dims of the record that `value` lacks: 1 inside a scan over layers.
    """
    plan = region.plan
    crossed = tuple(axis for axis in region.batch_axes if plan.axes[axis] > 1)
    table = record.role == TABLE or (isinstance(region, Traced) and record.path in region.tables)
    route = gradient_route(plan, record, crossed, table=table)

    def here(spec: PartitionSpec) -> NamedSharding:
        return region.sharding(PartitionSpec(*tuple(spec)[layers:]))

    if not jnp.issubdtype(value.dtype, jnp.floating):
        return jax.lax.with_sharding_constraint(value, here(record.compute))
    move = _Move(here(record.storage), here(record.compute), tuple(map(here, route)), record.compute_dtype, record.path)
    return _read(value, move)


def gather(params: PyTree) -> PyTree:
    """Parameters of a plain pytree as a model computes with them: cast, and gathered where the plan says so.

    For a step that does not differentiate, such as evaluation; `jp.value_and_grad` does it for its loss. nnx modules
    need neither: their variables gather themselves where they are read. Identity outside of `plan.jit`.

    Moves one all-gather of every parameter that FSDP shards; all of them are whole until their last use.

    Raises:
        ShardingError: A leaf belongs to two parameters that lie differently.

    Example:
        >>> params = {"w": jnp.ones((64, 64))}
        >>> plan = jp.plan(lambda: params, jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> predict = plan.jit(lambda params, x: x @ jp.gather(params)["w"])
        >>> predict(plan.init(), plan.batch(jnp.ones((8, 64)))).shape
        (8, 64)
    """
    region = _context.current()
    if region is None:
        return params
    flat = _tree.flatten(params)
    return flat.build({path: _read_leaf(path, leaf, region) for path, leaf in flat.leaves.items()})


def _read_leaf(path: str, leaf: jax.Array, region: Region) -> jax.Array:
    match = region.plan.matcher.match(path, leaf.shape)
    if match is None or match.record.slot not in ("parameter", "frozen"):
        return leaf
    return read(leaf, match.record, region)


@contextlib.contextmanager
def planned(variables: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """While this lasts, each nnx `Variable` of `(plan path, variable)` is read through the plan."""
    for path, variable in variables:
        plan_read(path, variable)
    try:
        yield
    finally:
        for _, variable in variables:
            unplan(variable)


def plan_read(path: str, variable: Any) -> None:
    """Have `variable`, a parameter that the plan in force has at `path`, read through the plan until `unplan`."""
    variable.__class__ = _planned_type(type(variable))
    variable.set_metadata(PATH, path)


def unplan(variable: Any) -> None:
    """Make a `Variable` that may be read through a plan an ordinary one again."""
    base = getattr(type(variable), "planned_from", None)
    if base is not None:
        variable.del_metadata(PATH)
        variable.__class__ = base


@ft.cache
def _planned_type(base: type) -> type:
    """The type of nnx `Variable`s of type `base` that are read through the plan; itself if they are already."""
    if hasattr(base, "planned_from"):
        return base

    def get_value(self: Any, *, index: Any = ...) -> Any:
        whole = _read_variable(self, base.get_value(self))  # then the index: a piece of a shard is not a piece of it
        return whole if index is ... else whole[index]

    def attribute(self: Any, name: str) -> Any:  # `w.T` is a read too
        if name in _RAW or name in self.get_metadata():
            return base.__getattr__(self, name)
        return getattr(get_value(self), name)

    body = {"__slots__": (), "get_value": get_value, "__getattr__": attribute, "planned_from": base}
    return type(base.__name__, (base,), body)


PATH = "jaxpar_path"
_RAW = frozenset({"shape", "dtype", "ndim", "size", "aval", "sharding", "itemsize", "nbytes", "weak_type"})


def _read_variable(variable: Any, value: Any) -> Any:
    """What a model gets when it reads `value`, that of a planned variable."""
    region = _context.current()
    if region is None:
        return value
    path = variable.get_metadata(PATH)
    record = region.plan.records[path]
    raw = variable.get_raw_value()
    # A matrix that is used twice (tied embeddings) is gathered once and its gradients are summed before they are
    # reduced, as long as both uses are in one trace: a value of a scan's body does not exist outside of it.
    trace = jax_core.get_opaque_trace_state(convention="nnx")
    kept = region.values.setdefault((path, id(raw), region.replicas), []) if isinstance(region, Traced) else []
    for before, _, result in kept:
        if before == trace:
            return result
    kept.append((trace, raw, read(value, record, region, layers=len(record.shape) - raw.ndim)))
    return kept[-1][2]


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _read(value: jax.Array, move: _Move) -> jax.Array:
    with jax.named_scope(scope_of(move.path)):
        return move.forward(value)


@_read.defjvp
def _read_jvp(
    move: _Move, values: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    value = _read(values[0], move)
    with jax.named_scope(scope_of(move.path)):
        return value, move.tangent(tangents[0])


def scope_of(path: str) -> str:
    """The scope that names operations by the whole plan path of what they work on, whatever else is open."""
    return f"@{path}"
