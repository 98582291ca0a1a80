"""What is to be explained, whatever the user has: made into one jitted function of arrays alone, on one mesh.

| given                             | on                            | donation and shardings                        |
|-----------------------------------|-------------------------------|-----------------------------------------------|
| recipe                            | `on`                          | the plan's                                    |
| program                           | its own mesh, or `on`         | the plan's                                    |
| step of a plan (`plan.jit`), args | its own mesh, or planned anew | the plan's                                    |
| function jitted by the user, args | its arguments' mesh, or `on`  | its own, then its arguments', then replicated |
| plain function, args              | its arguments' mesh, or `on`  | its arguments', then replicated               |

Arguments may be arrays, modules, shapes, or a mixture; nothing is run and nothing allocated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .. import _calls, _tree
from .._calls import Place
from .._context import as_spec, axes_at
from .._errors import MeshError, StepError
from .._recipe import Program, Recipe
from .._step import Flat, StepFunction
from .._types import AnyMesh, PyTree
from ._compiled import Argument

_BATCH_NAMES = {"batch", "x", "inputs", "tokens", "data"}
"""What arguments that hold a batch are called, where no plan tells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One function of arrays, ready to be lowered for its mesh.

    Attributes:
        name: Of the step.
        function: Jitted; its arguments are `shapes`.
        shapes: With their shardings.
        arguments: What each is, in the same order.
        donated: Positions of those that are given away.
        mesh: `None` for a function of one device, whatever that is.
        plan: The plan, if there is one.
        step: What `plan.jit` made, if that was given.
        program: The program, if that was given: what an estimate is made from.
        options: XLA options.
        notes: What was assumed, and what the plan did.
    """

    name: str
    function: Any
    shapes: list[jax.ShapeDtypeStruct]
    arguments: tuple[Argument, ...]
    donated: tuple[int, ...]
    mesh: AnyMesh | None
    plan: Any = None
    step: StepFunction | None = None
    program: Program | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the global batch, from its first array of integers [batch, sequence]; else its rows."""
        batch = [each for each in self.arguments if each.kind == "batch" and each.shape]
        tokens = [each for each in batch if len(each.shape) > 1 and each.dtype.startswith(("int", "uint"))]
        if tokens:
            return tokens[0].shape[0] * tokens[0].shape[1]
        return batch[0].shape[0] if batch else 0


def subject(step: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on: Any) -> Subject:
    """Make `step` with these arguments a function of arrays, on the mesh `on` or its own.

    Raises:
        MeshError: `on` is no mesh, or a recipe came without one.
        StepError: `step` cannot be called, or arguments came with a recipe.
    """
    if on is not None and not isinstance(on, Mesh | AbstractMesh):
        raise MeshError(f'explain: on={on!r} is no mesh. Make one: on=jp.mesh("v5p-128", fsdp=-1).')
    if isinstance(step, Recipe | Program):
        if args or kwargs:
            raise StepError("explain: a recipe knows its batch; leave out the arguments after it.")
        return _of_program(step, on)
    if isinstance(step, StepFunction):
        return _of_step(step, args, kwargs, on)
    if not callable(step):
        raise StepError(
            f"explain: {type(step).__name__} is neither a function, a step of plan.jit, nor a recipe. Give one of "
            "these."
        )
    return _of_function(step, args, kwargs, on)


def bytes_of(shape: jax.ShapeDtypeStruct, sharding: Any = None) -> int:
    """Bytes of one device's part of an array; keys count as what they are made of."""
    local = sharding.shard_shape(shape.shape) if isinstance(sharding, NamedSharding) else shape.shape
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(local, shape.dtype))
        return data.size * data.dtype.itemsize
    return int(np.prod(local, dtype=np.int64)) * shape.dtype.itemsize


# Recipes, programs, steps of a plan.


def _of_program(step: Recipe | Program, on: AnyMesh | None) -> Subject:
    if isinstance(step, Recipe):
        if on is None:
            raise MeshError('explain: a recipe knows no mesh. Say which: on=jp.mesh("v5e-256", fsdp=-1).')
        program = step.on(on)
    else:
        program = step if on is None else step.recipe.on(on)
    flat = program.train_step.on(program.plan).flat(*program.abstract())
    return dataclasses.replace(_of_flat(flat, program.plan, program.train_step.__name__), program=program)


def _of_step(step: StepFunction, args: tuple[Any, ...], kwargs: dict[str, Any], on: AnyMesh | None) -> Subject:
    plan = step.plan if on is None else step.plan.on(on)

    def placed(leaf: Any) -> Any:
        """An array of the batch, as `plan.batch` would place it; others lie where the plan or their argument says."""
        shape, dtype, weak = _calls.type_of(leaf)
        own = getattr(leaf, "sharding", None)
        spec: PartitionSpec | None = None
        if isinstance(own, NamedSharding):
            is_here = own.mesh == step.plan.mesh
            if is_here and step.plan.context is not None and own.spec == step.plan.token_sharding.spec:
                spec = plan.token_sharding.spec
            elif is_here and own.spec == step.plan.batch_sharding.spec:
                spec = plan.batch_sharding.spec
            else:
                spec = _within(own.spec, plan.axes)
        elif shape and shape[0] % plan.num_batch_shards == 0 and not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            spec = plan.batch_placement("", shape).spec
        sharding = None if spec is None else plan.sharding(spec)
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=sharding)

    args, kwargs = (_map_arrays(placed, each) for each in (args, kwargs))
    return dataclasses.replace(_of_flat(step.on(plan).flat(*args, **kwargs), plan, step.__name__), step=step)


def _of_flat(flat: Flat, plan: Any, name: str) -> Subject:
    shapes = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, weak_type=shape.weak_type, sharding=sharding)
        for shape, sharding in zip(flat.shapes, flat.shardings, strict=True)
    ]
    batch = {plan.batch_sharding, plan.token_sharding} if plan.num_batch_shards > 1 or plan.context else set()
    kinds = [
        _kind(place, record, shape, batch)
        for place, record, shape in zip(flat.places, flat.records, shapes, strict=True)
    ]
    return Subject(
        name=name,
        function=flat.function,
        shapes=shapes,
        arguments=_arguments(shapes, _own_paths(flat), kinds, flat.donated),
        donated=flat.donated,
        mesh=plan.mesh,
        plan=plan,
        options=flat.options,
        notes=flat.notes,
    )


def _kind(place: Place, record: Any, shape: jax.ShapeDtypeStruct, batch: set[NamedSharding]) -> str:
    """What an array of a call is, in the words of `Argument.kind`."""
    if place.is_slot:
        return "optimizer"
    if place.kind is not None:
        from flax import nnx

        if issubclass(place.kind, nnx.RngState):
            return "rng"
        if not issubclass(place.kind, nnx.Param):
            return "model_state"
    if record is not None:
        return record.slot
    if place.kind is not None:
        return "parameter"
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return "rng"
    is_named = place.path.partition(".")[0] in _BATCH_NAMES
    return "batch" if is_named or shape.sharding in batch else "other"


def _own_paths(flat: Flat) -> list[str]:
    """Where each array lives: parameters by their path in the plan."""
    pairs = zip(flat.places, flat.records, strict=True)
    return [place.path if record is None or place.is_slot else record.path for place, record in pairs]


def _arguments(
    shapes: list[jax.ShapeDtypeStruct], paths: list[str], kinds: list[str], donated: tuple[int, ...]
) -> tuple[Argument, ...]:
    return tuple(
        Argument(
            path=path,
            kind=kind,
            shape=shape.shape,
            dtype=str(shape.dtype),
            bytes=bytes_of(shape, shape.sharding),
            donated=index in donated,
            axes=_axes(shape.sharding),
            weak=bool(shape.weak_type),
        )
        for index, (shape, path, kind) in enumerate(zip(shapes, paths, kinds, strict=True))
    )


def _axes(sharding: Any) -> tuple[str, ...] | None:
    """The axes that split an array."""
    if not isinstance(sharding, NamedSharding):
        return None
    return tuple(axis for entry in sharding.spec for axis in axes_at(entry))


# Functions without a plan.


def _of_function(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], on: AnyMesh | None
) -> Subject:
    call = _calls.take_apart(_calls.argument_names(step), args, kwargs)
    name = getattr(step, "__name__", type(step).__name__)

    def flat(*arrays: Any) -> list[Any]:
        inner_args, inner_kwargs, nodes = call.rebuild(arrays)
        out, _ = _calls.take_result_apart(step(*inner_args, **inner_kwargs), nodes)
        return [*_calls.node_arrays(nodes), *out] if nodes else out

    found = {each.sharding.mesh for each in call.arrays if isinstance(getattr(each, "sharding", None), NamedSharding)}
    mesh = on if on is not None else next(iter(found), None)
    types = [_calls.type_of(array) for array in call.arrays]
    shapes = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in types]
    try:
        closed = jax.make_jaxpr(flat)(*shapes)
    except ValueError as error:
        if "`compiler_options` can only be passed to top-level" not in str(error):
            raise
        raise StepError(
            f"explain: {name} is jitted with compiler_options, which JAX allows at the top alone. Give it without: "
            f"explain(jax.jit({name}), ..., compiler_options=...)."
        ) from error
    own = _jitted(closed)
    ins = [
        _placed(first, getattr(array, "sharding", None), mesh)
        for first, array in zip(own.in_shardings, call.arrays, strict=True)
    ]
    outs = [_moved(sharding, mesh) for sharding in own.out_shardings]
    function = jax.jit(
        _renamed(jax_core.jaxpr_as_fun(own.jaxpr), name),
        in_shardings=ins,
        out_shardings=outs,
        donate_argnums=own.donated,
    )
    shapes = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, weak_type=shape.weak_type, sharding=sharding)
        for shape, sharding in zip(shapes, ins, strict=True)
    ]
    notes = []
    if mesh is not None and mesh.size > 1 and not any(len(each.spec) for each in ins if each is not None):
        notes.append(
            f"no argument of {name} says how it is split, so every device of the mesh does all of the work. Give "
            "arrays or jax.ShapeDtypeStructs with a sharding, or a step of a plan."
        )
    kinds = [_kind(place, None, shape, set()) for place, shape in zip(call.places, shapes, strict=True)]
    return Subject(
        name=name,
        function=function,
        shapes=shapes,
        arguments=_arguments(shapes, [place.path for place in call.places], kinds, own.donated),
        donated=own.donated,
        mesh=mesh,
        options=own.options,
        notes=tuple(notes),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Jitted:
    """What a user's own `jax.jit` says of a function, by position of its flat arrays."""

    jaxpr: Any
    in_shardings: list[Any]
    out_shardings: list[Any]
    donated: tuple[int, ...]
    options: dict[str, Any]


def _jitted(closed: Any) -> _Jitted:
    """What one `jax.jit` around all of a function says; nothing for a plain one.

    It shows as the only equation of the trace. Where its arrays come and go in the same order, the function inside is
    taken, so that names in the compiled program are those of the user's own compilation.
    """
    jaxpr = closed.jaxpr
    nothing = _Jitted(
        jaxpr=closed,
        in_shardings=[None] * len(jaxpr.invars),
        out_shardings=[None] * len(jaxpr.outvars),
        donated=(),
        options={},
    )
    if len(jaxpr.eqns) != 1 or "donated_invars" not in jaxpr.eqns[0].params:
        return nothing
    equation = jaxpr.eqns[0]
    params = equation.params
    ins = {id(var): index for index, var in enumerate(equation.invars)}
    outs = {id(var): index for index, var in enumerate(equation.outvars)}
    in_at = [ins.get(id(var)) for var in jaxpr.invars]
    out_at = [outs.get(id(var)) for var in jaxpr.outvars]
    same = in_at == list(range(len(equation.invars))) and out_at == list(range(len(equation.outvars)))
    return _Jitted(
        jaxpr=params["jaxpr"] if same else closed,
        in_shardings=[None if at is None else _named(params["in_shardings"][at]) for at in in_at],
        out_shardings=[None if at is None else _named(params["out_shardings"][at]) for at in out_at],
        donated=tuple(i for i, at in enumerate(in_at) if at is not None and params["donated_invars"][at]),
        options=dict(params.get("compiler_options_kvs") or ()),
    )


def _named(sharding: Any) -> NamedSharding | None:
    return sharding if isinstance(sharding, NamedSharding) else None


def _placed(first: NamedSharding | None, second: Any, mesh: AnyMesh | None) -> NamedSharding | None:
    """Where an array lies: as the function says, else as it came, else whole."""
    if mesh is None:
        return None
    moved = _moved(first or _named(second), mesh)
    return NamedSharding(mesh, PartitionSpec()) if moved is None else moved


def _moved(sharding: NamedSharding | None, mesh: AnyMesh | None) -> NamedSharding | None:
    """The same spec on another mesh, less the axes that this one lacks."""
    if sharding is None or mesh is None:
        return None
    return NamedSharding(mesh, _within(sharding.spec, mesh.shape), memory_kind=sharding.memory_kind)


def _within(spec: PartitionSpec, axes: Any) -> PartitionSpec:
    return as_spec([tuple(axis for axis in axes_at(entry) if axis in axes) for entry in spec])


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def step(*arrays: Any) -> Any:
        return function(*arrays)

    step.__name__ = step.__qualname__ = name
    return step


def _map_arrays(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`function` of each array of a pytree that is in no module."""

    def one(leaf: Any) -> Any:
        return function(leaf) if not _calls.is_node(leaf) and _tree.is_array(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=_calls.is_node)
