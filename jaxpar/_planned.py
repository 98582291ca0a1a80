"""How a parameter is read inside a planned step.

Placement alone does not make FSDP: at 512 tokens XLA gathers *activations* rather than weights. So a parameter's
compute spec is applied where the parameter is read: inside the block that uses it, inside the scan over blocks, under
remat. For nnx modules that is a subclass of each `Variable`'s type, taken on only while `plan.jit` traces; for plain
pytrees it is the argument of the loss (`jp.value_and_grad`). The user's own objects never change.

Reading is a cast to the compute dtype on the shard, then the move to the compute spec: a bfloat16 gather costs half of
a float32 one. Its gradient is cut as the update wants it, which is what lets the compiler reduce-scatter. Reading can
be differentiated any number of times, forward and backward: see `_Move.tangent`.
"""

import contextlib
import dataclasses
import functools as ft
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jax_core
from jax.sharding import NamedSharding, PartitionSpec

from . import _context, _traits, _tree
from ._context import Region, as_spec, axes_at
from ._errors import ShardingError, listed
from ._plan import TABLE, Record, gradient_route
from ._rules import fold_layers
from ._slots import Part
from ._types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Traced(Region):
    """The region of one tracing of a step, and what is met there.

    Equal to no region of another tracing: a helper that the user jitted is traced anew for each step, so that nothing
    it does goes unseen.

    Attributes:
        dims: Logical dims of activations that were named.
        attends: What was said of each kind of call of `attention`.
        notes: What a reader of the step should know.
        warnings: What the log is to say, once: a step may be traced twice.
        values: What each parameter was read as, in each trace inside.
        tables: Paths of parameters that the step looks up by index, as far as the plan does not say so.
    """

    dims: set[str] = dataclasses.field(default_factory=set)
    attends: set[str] = dataclasses.field(default_factory=set)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    tables: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        return hash((id(self.values), self.replicas, self.manual))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and self.values is other.values and self._here == other._here


@dataclasses.dataclass(frozen=True)
class _Move:
    """Where a parameter goes when read, and its cotangent when differentiated; hashable, so part of the trace."""

    storage: NamedSharding
    compute: NamedSharding
    route: tuple[NamedSharding, ...]
    turned: bool
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

        A matrix whose gradient is cut by rows passes it turned. XLA:TPU (libtpu 0.0.42) reduce-scatters along the last
        dim; by rows it moves the edges of padded pieces on top, and with a replica dim before them, or with several
        gradients at once, sums all and cuts, which is twice as much on the wire. The product of the backward pass comes
        out turned at no cost; what is turned back is a piece.
        """
        value = value.T if self.turned else value
        for sharding in reversed(self.route):
            value = jax.lax.with_sharding_constraint(value, _turn(sharding) if self.turned else sharding)
        return (value.T if self.turned else value).astype(self.dtype)


def read(value: jax.Array, record: Record, region: Region, *, layers: int = 0) -> jax.Array:
    """`value`, a parameter in its storage spec, as the model computes with it.

    Args:
        value: The parameter, or one layer of a stacked one.
        record: The plan's record of the parameter.
        region: Where in the step it is read.
        layers: Leading dims of the record that `value` lacks: 1 inside a scan over layers.
    """

    def here(spec: PartitionSpec) -> NamedSharding:
        return region.sharding(PartitionSpec(*tuple(spec)[layers:]))

    if not jnp.issubdtype(value.dtype, jnp.floating):
        return jax.lax.with_sharding_constraint(value, here(record.compute))
    compute, route = here(record.compute), tuple(map(here, route_of(record, region)))
    turned = value.ndim == 2 and record.role != TABLE and _cuts_rows(route[-1].spec, compute.spec)
    return _read(value, _Move(here(record.storage), compute, route, turned, record.compute_dtype, record.path))


def _cuts_rows(cut: PartitionSpec, whole: PartitionSpec) -> bool:
    """Whether a matrix is split further by its rows in `cut` than in `whole`."""
    rows, before = (axes_at(next(iter(spec), None)) for spec in (cut, whole))
    return len(rows) > len(before)


def _turn(sharding: NamedSharding) -> NamedSharding:
    """Of a matrix, its sharding when transposed."""
    rows, columns = (*sharding.spec, None, None)[:2]
    return NamedSharding(sharding.mesh, as_spec([axes_at(columns), axes_at(rows)]))


def route_of(record: Record, region: Region) -> tuple[PartitionSpec, PartitionSpec]:
    """The specs that the gradient of a parameter passes in `region`: see `gradient_route`."""
    table = record.role == TABLE or (isinstance(region, Traced) and record.path in region.tables)
    return gradient_route(region.plan, record, region.crossed, table=table)


GATHERED = "jaxpar.gather"
LAYER_GATHERED = "jaxpar.gather of a layer"
"""The names that parameters of plain pytrees, and layers of them, have in a jaxpr once they are read."""


def gather(params: PyTree, path: str | None = None) -> PyTree:
    """Parameters of a plain pytree as a model computes with them: cast, and gathered where the plan says so.

    A step that differentiates needs it for one thing only: in the body of its own `jax.lax.scan` over stacked layers,
    `jp.gather(layer)` holds one layer whole at a time, where otherwise all are. For the rest, `jp.value_and_grad`
    gathers at the start of its loss what the loss does not gather itself. A step that does not differentiate, such as
    evaluation, gathers all that it uses. nnx modules need none of this: their variables gather themselves where they
    are read. Identity outside of `plan.jit`.

    Moves one all-gather of every parameter, or layer, that FSDP shards, and in the backward pass one reduce-scatter of
    its gradient, there. What is gathered is whole until its last use, and the backward pass is one: rematerialise the
    body of a scan, `jax.lax.scan(jp.remat(body, "full"), ...)`, or the backward pass keeps every layer whole. The
    step's `notes` say which layers are gathered where.

    Args:
        params: Parameters, some of them, or one layer of stacked ones (`dims=[("blocks.*", ("layers", ...))]`).
        path: Where they live in the model, where their own names do not tell: `jp.gather(layer, "blocks")`.

    Raises:
        ShardingError: The plan has none of them; or a leaf may be one of two parameters that lie differently.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> predict = plan.jit(lambda params, x: x @ jp.gather(params)["w"])
        >>> predict(plan.init(), plan.batch(jnp.ones((8, 64)))).shape
        (8, 64)

        Four layers, one of them whole at a time:

        >>> plan = jp.plan(
        ...     lambda: {"blocks": {"w": jnp.ones((4, 64, 64))}},
        ...     jp.mesh(fsdp=-1),
        ...     [jp.FSDP()],
        ...     dims=[("blocks.*", ("layers", ...))],
        ... )
        >>> def loss(params, x):
        ...     def block(x, layer):
        ...         return jnp.tanh(x @ jp.gather(layer, "blocks")["w"]), None
        ...
        ...     return jnp.mean(jax.lax.scan(jp.remat(block, "full"), x, params["blocks"])[0] ** 2)
        >>> step = plan.jit(jp.value_and_grad(loss))
        >>> value, gradients = step(plan.init(), plan.batch(jnp.ones((8, 64))))
        >>> gradients["blocks"]["w"].sharding.spec
        P(None, 'fsdp')
    """
    region = _context.current()
    if region is None:
        return params
    flat = _tree.flatten(params)
    matcher = region.plan.matcher
    found = {at: matcher.part(at, leaf.shape, within=path) for at, leaf in flat.leaves.items()}
    if flat.leaves and not any(found.values()):
        shown = listed([f"{at or 'the array'} {leaf.shape}" for at, leaf in flat.leaves.items()])
        inside = "" if path is None else f" in {path!r}"
        raise ShardingError(
            f"jp.gather: the plan has no parameter{inside}, nor a layer of one, such as\n{shown}\nSay where it lives "
            f'in the model, jp.gather(layer, "blocks"); parameters here are {", ".join(_some(region.plan))}.'
        )
    read = {at: leaf if found[at] is None else _read_part(leaf, found[at], region) for at, leaf in flat.leaves.items()}
    return flat.build(read)


def _some(plan: Any) -> list[str]:
    paths = list(dict.fromkeys(fold_layers(record.path for record in plan.parameters)))
    return [*paths[:4], *(["..."] if len(paths) > 4 else [])]


def gathered_by(function: Callable[..., Any], params: PyTree, *args: Any) -> frozenset[str]:
    """Paths of the leaves of `params` that `function(params, *args)` gathers itself, whole or by layers.

    Traces `function` once more, if the plan in force moves any parameter.

    Args:
        function: A loss.
        params: A plain pytree.
        args: Pytrees of arrays or of their shapes.
    """
    region = _context.current()
    if region is None or all(record.compute == record.storage for record in region.plan.parameters):
        return frozenset()
    apart = dataclasses.replace(region, dims=set(), notes=[], values={}) if isinstance(region, Traced) else region
    flat, rest = _tree.flatten(params), _tree.flatten(args)

    def call(*leaves: jax.Array) -> list[jax.Array]:
        own = dict(zip(flat.leaves, leaves, strict=False))
        theirs = dict(zip(rest.leaves, leaves[len(own) :], strict=True))
        with _context.entered(apart):
            out = function(flat.build(own), *rest.build(theirs))
        return list(filter(_tree.is_array, jax.tree.leaves(out)))

    jaxpr = jax.make_jaxpr(call)(*flat.leaves.values(), *rest.leaves.values()).jaxpr
    found = _traits.tags_met(jaxpr, (GATHERED, LAYER_GATHERED))
    return frozenset(path for index, path in enumerate(flat.leaves) if index in found)


def gather_others(params: PyTree, gathered: frozenset[str]) -> PyTree:
    """`params`, a plain pytree, with all parameters read but those at the paths in `gathered`, and what is none."""
    region = _context.current()
    if region is None:
        return params
    flat = _tree.flatten(params)

    def one(path: str, leaf: jax.Array) -> jax.Array:
        match = None if path in gathered else region.plan.matcher.match(path, leaf.shape)
        if match is None or match.record.shape != leaf.shape:
            return leaf
        return _read_part(leaf, Part(match.record, 0), region)

    return flat.build({path: one(path, leaf) for path, leaf in flat.leaves.items()})


def _read_part(leaf: jax.Array, part: Part, region: Region) -> jax.Array:
    return checkpoint_name(
        read(leaf, part.record, region, layers=part.layers), LAYER_GATHERED if part.layers else GATHERED
    )


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
def _read_jvp(move: _Move, values: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    value = _read(values[0], move)
    with jax.named_scope(scope_of(move.path)):
        return value, move.tangent(tangents[0])


def scope_of(path: str) -> str:
    """The scope that names operations by the whole plan path of what they work on, whatever else is open."""
    return f"@{path}"
