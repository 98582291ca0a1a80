"""`jp.verify`: a training step on its mesh against the same step on one device."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _calls, _mesh, _traits, _tree
from ._bound import BoundPlan
from ._errors import ShardingError, StepError
from ._grad import differentiate
from ._plan_text import bytes_text
from ._precision import Precision
from ._recipe import Program, Recipe, is_graph_plan
from ._step import StepFunction
from ._types import PyTree
from .parallel import DP
from .testing._compare import Comparison, Row
from .testing._same import compare_runs

COPIES = 6
"""How often one device holds a step's arguments: in float32 and (twice the bytes) in float64, each with its results."""

TOKENS = ("tokens", "labels", "input_ids", "inputs", "targets")  # fields of a batch whose integers are looked up


def verify(step: Any, *args: Any) -> Comparison:
    """Prove that a step on its mesh computes what one device computes.

    Runs the step as the plan partitions it, and the same function without a plan on one device in float32 and in
    float64, on copies: nothing of the caller's changes. A leaf passes if its sharded error against float64 is at most
    twice the single-device float32 error (`jaxpar.testing.compare`). Compared are

    - outputs: what the step returns beside its state;
    - gradients: the optimiser is exchanged for one that only keeps what it is given, since a first AdamW step turns a
      gradient's error of 1e-6 into 4% of an update;
    - updates: of the real optimiser, from identical gradients, and of other state, such as batch statistics.

    Optimisers are found among the arguments: `nnx.Optimizer` and `TrainState`, in containers too. One that is hidden in
    a closure cannot be told from the step: its updates are then compared in float64 on both sides, and a note says so.
    Dtypes that a plan lowers on purpose (`Precision`, `DP(reduce_dtype=...)`) are set aside.

    Costs three compilations and runs, one of them in float64 on one device; all leaves are brought to the host.

    Args:
        step: What `plan.jit` made, or a `Program`.
        *args: Its arguments; of a `Program` a batch, or nothing, for reproducible values of its recipe's shapes.

    Returns:
        The table: prints itself, `.ok`, `.worst`, and `.check()`, which raises if a leaf fails.

    Raises:
        ShardingError: The step does not fit one device, with the bytes; and for a `Program` a smaller one that does, by
            `recipe.reduced(...)`.
        StepError: It is not a step, or this process is one of several.

    Example:
        >>> import optax
        >>> plan = jp.plan(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> model = plan.init()
        >>> opt = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
        >>> @plan.jit
        ... def train_step(model, opt, x):
        ...     loss, grads = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
        ...     opt.update(model, grads)
        ...     return loss
        >>> jp.verify(train_step, model, opt, plan.batch(np.ones((8, 64), np.float32))).ok
        True
    """
    if jax.process_count() > 1:
        raise StepError(
            f"jp.verify brings every leaf to one host, and this process is one of {jax.process_count()}. Verify on one "
            "host, with jp.simulate(n) for a mesh of as many devices."
        )
    if isinstance(step, Program):
        return _verify_program(step, *args)
    if isinstance(step, Recipe):
        raise StepError("a recipe has no mesh: jp.verify(recipe.on(jp.mesh(fsdp=-1))).")
    if not isinstance(step, StepFunction):
        raise StepError(
            f"jp.verify takes a step that plan.jit made, or a Program, not a {type(step).__name__}. Write "
            f"plan.jit(step)."
        )
    return _verify_step(_in_dtype(step.plan, None), step.function, args)


def _verify_program(program: Program, batch: PyTree | None = None) -> Comparison:
    _check_program_fits(program)
    recipe = program.recipe
    strategies = [_in_full(each, "float32") for each in recipe.strategies]
    recipe = dataclasses.replace(recipe, precision=_full_precision(program.plan.precision), strategies=strategies)
    program = recipe.on(program.plan.mesh)
    plan = program.plan
    batch = plan.batch(_filled(recipe.batch, plan) if batch is None else batch)
    model, optimizer = program.init().values()
    if _tree.is_graph_node(optimizer):
        table = _verify_step(plan, program.train_step.function, (model, optimizer, batch))
    else:
        recording = dataclasses.replace(recipe, optimizer=_recorder(), clip_norm=None).on(plan.mesh)
        state = recording.init()
        table = _recorded(plan, recording.train_step.function, (state["model"], state["optimizer"], batch))
        table += _updates(plan, _of_params(plan, model, optimizer, recipe.transform()))
    rows = [dataclasses.replace(row, path=row.path.removeprefix("2.")) for row in table.rows]  # of three: the metrics
    return dataclasses.replace(table, rows=tuple(rows))


def _verify_step(plan: BoundPlan, function: Callable[..., Any], args: tuple[Any, ...]) -> Comparison:
    args = tuple(_with_arrays(arg) for arg in args)
    _check_fits(plan, args)
    is_leaf = lambda each: _tree.is_graph_node(each) or _is_train_state(each)
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(args, is_leaf=is_leaf)
    leaves = [leaf for _, leaf in with_keys]
    names = _calls.argument_names(function)
    optimizers = _optimizers(leaves, [_named(_tree.path_of(keys), names) for keys, _ in with_keys])
    if not optimizers:
        return _hidden(plan, function, args)
    recording = [optimizers[index].recording if index in optimizers else leaf for index, leaf in enumerate(leaves)]
    table = _recorded(plan, function, jax.tree.unflatten(treedef, recording), several=len(optimizers) > 1)
    for optimizer in optimizers.values():
        try:
            table += _updates(plan, optimizer)
        except TypeError as error:  # an argument of the optimiser that only the step knows
            table = _with_note(
                table, f"updates are not compared, since the optimiser takes more than gradients: {error}"
            )
    return dataclasses.replace(table, rows=tuple(_worst_of_each(table.rows)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Optimizer:
    """An optimiser among a step's arguments.

    Attributes:
        recording: The same argument, but it only keeps its gradients and changes no parameter.
        apply: One update, `apply(*args, gradients)`, with gradients by path.
        args: What `apply` takes first.
        params: The parameters it updates, by path.
        names: What the step calls `args`.
    """

    recording: Any
    apply: Callable[..., Any]
    args: tuple[Any, ...]
    params: dict[str, Any]
    names: tuple[str, ...] = ()


class Kept(NamedTuple):
    """The state of an optimiser that only keeps what it is given."""

    kept: Any


def _recorded(plan: BoundPlan, function: Callable[..., Any], args: PyTree, *, several: bool = False) -> Comparison:
    """A step whose optimisers only record: outputs, gradients by parameter, and what else it changes."""
    table = _runs(plan, function, args)
    names = _calls.argument_names(function)
    rows = []
    for row in table.rows:
        head, _, kept = row.path.partition(".kept.")
        if kept:
            path = f"{head.partition('.opt_state')[0]}.{kept}" if several else kept
            new = dataclasses.replace(row, group="gradients", path=path)
        elif row.group == "outputs" and _family(plan, row.path) != row.path and row.error == 0:
            continue  # a parameter that was returned as it came
        elif row.group == "updates":
            new = dataclasses.replace(row, path=_named(row.path, names))
        else:
            new = row
        rows.append(new)
    order = ("outputs", "gradients", "updates")
    rows = sorted(_worst_of_each(rows), key=lambda row: order.index(row.group))
    return dataclasses.replace(table, rows=tuple(rows))


def _worst_of_each(rows: Iterable[Row]) -> list[Row]:
    """One row for each leaf: what two runs compare, or a step returns twice, counts once, at its worst."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        worst[row.group, row.path] = max(row, worst.get((row.group, row.path), row), key=lambda each: each.share)
    return list(worst.values())


def _updates(plan: BoundPlan, optimizer: _Optimizer) -> Comparison:
    """An optimiser's update on the mesh and on one device, from the same gradients: normal numbers, a hundredth."""
    draw = np.random.default_rng(0)
    values = {
        path: 0.01 * draw.standard_normal(leaf.shape).astype(leaf.dtype) for path, leaf in optimizer.params.items()
    }
    gradients = jax.device_put(values, plan.shardings(values))
    table = _runs(plan, optimizer.apply, (*optimizer.args, gradients), reads=False)
    names = optimizer.names
    rows = [
        dataclasses.replace(row, group="updates", path=_named(row.path, names) if row.group == "updates" else row.path)
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=tuple(rows))


def _hidden(plan: BoundPlan, function: Callable[..., Any], args: tuple[Any, ...]) -> Comparison:
    """A step whose optimiser is in a closure: state in float64 on both sides, the rest as ever."""
    table = _runs(plan, function, args)
    wide = _runs(_in_dtype(plan, "float64"), function, args, wide=True)
    said = "its optimiser is not among the step's arguments, so gradients cannot be told from updates"
    if not wide.rows:
        advice = "a first step of Adam amplifies rounding; give the step an nnx.Optimizer or a TrainState"
        return _with_note(table, f"{said}, and {wide.notes[0]}: {advice}")
    names = _calls.argument_names(function)

    def is_state(row: Row) -> bool:
        return row.group == "updates" or _family(plan, row.path) != row.path

    rows = [row for row in table.rows if not is_state(row)]
    rows += [
        dataclasses.replace(row, group="updates", path=_named(row.path, names) if row.group == "updates" else row.path)
        for row in wide.rows
        if is_state(row)
    ]
    found = dataclasses.replace(table, rows=tuple(rows))
    return _with_note(found, f"{said}; updates are compared in float64 on both sides")


def _runs(
    plan: BoundPlan, function: Callable[..., Any], args: Any, *, reads: bool = True, wide: bool = False
) -> Comparison:
    step = StepFunction(
        plan, function, donate=False, donate_argnums=(), on_recompile="allow", compiler_options=None, reads=reads
    )
    return compare_runs(step, function, args, grads=False, wide=wide, family=lambda path: _family(plan, path))


def _family(plan: BoundPlan, path: str) -> str:
    """What is before a parameter's path in the path of some state: leaves of one family are alike in kind."""
    parts = path.split(".")
    for start in range(len(parts)):
        rest = ".".join(parts[start:])
        if rest in plan.records or f"params.{rest}" in plan.records:
            return ".".join([*parts[:start], "*"])
    return path


def _named(path: str, names: tuple[str, ...]) -> str:
    """The path of a leaf of the arguments, which begins with a number, with the argument's name instead."""
    index, _, rest = path.partition(".")
    return ".".join(filter(None, [names[int(index)] if int(index) < len(names) else index, rest]))


def _with_note(table: Comparison, note: str) -> Comparison:
    return dataclasses.replace(table, notes=(*table.notes, note))


def _optimizers(leaves: list[Any], names: list[str]) -> dict[int, _Optimizer]:
    """The optimisers among a step's arguments, by position: `nnx.Optimizer`s, and Flax's `TrainState`s."""
    found = {}
    for index, leaf in enumerate(leaves):
        if _is_train_state(leaf):
            found[index] = _of_train_state(leaf)
        elif _is_optimizer(leaf):
            model = _model_of(leaf, leaves)
            if model is not None:
                at = next(at for at, each in enumerate(leaves) if each is model)
                found[index] = _of_module(model, leaf, (names[at], names[index]))
    return found


def _is_train_state(node: Any) -> bool:
    return all(hasattr(node, name) for name in ("apply_gradients", "opt_state", "params", "tx", "replace"))


def _is_optimizer(node: Any) -> bool:
    return _tree.is_graph_node(node) and hasattr(node, "tx") and hasattr(node, "wrt")


def _of_module(model: Any, optimizer: Any, names: tuple[str, str]) -> _Optimizer:
    from flax import nnx

    def apply(model: Any, optimizer: Any, gradients: dict[str, Any]) -> None:
        flat = nnx.to_flat_state(nnx.state(model, optimizer.wrt))
        state = nnx.from_flat_state([(keys, leaf.replace(gradients[_tree.path_of(keys)])) for keys, leaf in flat])
        optimizer.update(model, state)

    return _Optimizer(
        recording=nnx.Optimizer(model, _recorder(), wrt=optimizer.wrt),
        apply=apply,
        args=(model, optimizer),
        params=_trained_by(optimizer, model),
        names=names,
    )


def _of_train_state(state: Any) -> _Optimizer:
    recorder = _recorder()

    def apply(state: Any, gradients: dict[str, Any]) -> Any:
        return state.apply_gradients(grads=_tree.flatten(state.params).build(gradients))

    return _Optimizer(
        recording=state.replace(tx=recorder, opt_state=recorder.init(state.params)),
        apply=apply,
        args=(state,),
        params=_tree.leaves(state.params),
    )


def _of_params(plan: BoundPlan, params: PyTree, state: Any, transform: Any) -> _Optimizer:
    import optax

    def apply(params: PyTree, state: Any, gradients: dict[str, Any]) -> Any:
        trained = plan.trained(params)
        updates, state = transform.update(_tree.flatten(trained).build(gradients), state, trained)
        return {"params": optax.apply_updates(trained, updates), "optimizer": state}

    return _Optimizer(recording=None, apply=apply, args=(params, state), params=_tree.leaves(plan.trained(params)))


def _model_of(optimizer: Any, leaves: list[Any]) -> Any:
    """The module that `optimizer` updates: all its trained parameters have a place in the optimiser's state."""
    slots = [f".{path}" for path in _tree.leaves(optimizer)]
    models = [leaf for leaf in leaves if _tree.is_graph_node(leaf) and not _is_optimizer(leaf)]
    if len(models) == 1:
        return models[0]
    for model in models:
        params = _trained_by(optimizer, model)
        if params and all(any(slot.endswith(f".{path}") for slot in slots) for path in params):
            return model
    return None


def _trained_by(optimizer: Any, model: Any) -> dict[str, Any]:
    from flax import nnx

    return _tree.leaves(nnx.state(model, optimizer.wrt))


def _recorder() -> Any:
    """An Optax transformation that keeps its gradients and changes nothing."""
    import optax

    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformationExtraArgs(
        lambda params: Kept(zeros(params)), lambda updates, state, params=None, **extra: (zeros(updates), Kept(updates))
    )


def _in_dtype(plan: BoundPlan, dtype: str | None) -> BoundPlan:
    """`plan` that computes and reduces in `dtype`, or by default as stored: what one device is compared with does."""
    records = {
        path: dataclasses.replace(record, compute_dtype=np.dtype(dtype) if dtype and _is_float(record) else None)
        for path, record in plan.records.items()
    }
    return dataclasses.replace(
        plan,
        records=records,
        precision=_full_precision(plan.precision, dtype or "float32"),
        values=tuple(_in_full(strategy, dtype or "float32") for strategy in plan.values),
    )


def _full_precision(precision: Precision, dtype: str = "float32") -> Precision:
    """Nothing lowered; a reduction in its own dtype stays one, which decides the form of accumulation."""
    return Precision(reduce=dtype if precision.reduce and precision.reduce != precision.compute else None)


def _in_full(strategy: Any, dtype: str) -> Any:
    lowers = isinstance(strategy, DP) and strategy.reduce_dtype is not None
    return dataclasses.replace(strategy, reduce_dtype=dtype) if lowers else strategy


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _with_arrays(arg: PyTree) -> PyTree:
    """`arg` with numbers as arrays, as a step makes them: the `step` of a new `TrainState` is a Python 0."""
    numbers = bool | int | float | complex
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, numbers) else leaf, arg, is_leaf=_tree.is_graph_node
    )


def _filled(batch: PyTree, plan: BoundPlan) -> PyTree:
    """Reproducible values for a batch of shapes: normal numbers, tokens of the whole vocabulary, else 0 and 1."""
    draw = np.random.default_rng(0)
    tables = [
        record.shape[-2] for path, record in plan.records.items() if "embed" in path.lower() and len(record.shape) > 1
    ]

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if _is_float(leaf):
            return np.abs(draw.standard_normal(leaf.shape)).astype(leaf.dtype)
        is_token = path.rpartition(".")[2] in TOKENS
        return draw.integers(0, min(tables, default=2) if is_token else 2, leaf.shape).astype(leaf.dtype)

    flat = _tree.flatten(batch)
    return flat.build({path: one(path, leaf) for path, leaf in flat.leaves.items()})


def _check_fits(plan: BoundPlan, args: PyTree) -> None:
    """Refuse what one device cannot hold."""
    held = sum(_bytes_of(arg) for arg in args)
    memory = _memory(plan)
    if memory and COPIES * held > memory:
        raise ShardingError(
            f"verifying needs at least {bytes_text(COPIES * held)} on one device ({COPIES} times {bytes_text(held)} of "
            f"state and batch: in float32 and float64, and the results), which has {bytes_text(memory)}. Verify a "
            "smaller model, with fewer layers, narrower ones and a smaller batch, on the same mesh and strategies: "
            "what is wrong there is wrong here. A jp.Recipe makes one of itself: recipe.reduced(layers=2, "
            "batch_size=...)."
        )


def _check_program_fits(program: Program) -> None:
    """Refuse what one device cannot hold, naming a smaller program that it can."""
    memory = _memory(program.plan)
    if not memory:
        return
    needs = _needs(program, memory)
    if needs.total > memory:
        raise ShardingError(f"verifying needs {needs}, which has {bytes_text(memory)}. {_smaller(program, memory)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Needs:
    """What verifying a program takes of one device.

    Attributes:
        held: Bytes of state and batch in float32.
        working: Bytes of activations in float64; `None` if `held` alone is too much.
    """

    held: int
    working: int | None

    @property
    def total(self) -> int:
        return COPIES * self.held + (self.working or 0)

    def __str__(self) -> str:
        state = f"{COPIES} times {bytes_text(self.held)} of state and batch: in float32 and float64, and the results"
        if self.working is None:
            return f"at least {bytes_text(self.total)} on one device ({state})"
        return f"about {bytes_text(self.total)} on one device ({state}; {bytes_text(self.working)} of activations)"


def _needs(program: Program, memory: int) -> _Needs:
    plan, recipe = program.plan, program.recipe
    records = [*plan.records.values(), *(plan.optimizer_records or {}).values()]
    held = sum(record.num_bytes for record in records) + _bytes_of(recipe.batch)
    if COPIES * held > memory:
        return _Needs(held=held, working=None)

    def reference(leaves: dict[str, Any], batch: PyTree) -> Any:
        found = differentiate(
            recipe.loss,
            plan.birth.build(leaves),
            batch,
            accumulate=recipe.accumulate,
            has_aux=recipe.has_aux,
            weight=recipe.weight,
            separable=recipe.separable,
        )
        return found.value, _tree.leaves(found.gradients)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), recipe.batch)
    traced = jax.jit(reference).trace(plan.birth.shapes, shapes)
    working = 2 * _traits.bytes_made(traced.jaxpr.jaxpr)  # at most: all of it at once
    if COPIES * held + working > memory:
        found = traced.lower().compile().memory_analysis()
        working = working if found is None else 2 * found.temp_size_in_bytes
    return _Needs(held=held, working=working)


def _smaller(program: Program, memory: int) -> str:
    """A reduced recipe that fits, as what to type; or what even the smallest needs."""
    recipe, plan = program.recipe, program.plan
    rows = plan.num_batch_shards * recipe.accumulate
    unit = 1  # layers that stages and chunks can share
    if plan.stage_axis is not None:
        rows = plan.num_batch_shards * plan.schedule.microbatches
        unit = plan.schedule.stages * plan.schedule.chunks
    batch = {"batch_size": rows} if rows < recipe.batch_size else {}
    is_graph = is_graph_plan(plan)
    depth = max(
        (math.prod(record.shape[: record.layers]) for record in plan.records.values() if record.layers and is_graph),
        default=0,
    )
    choices = [batch, *({"layers": layers, **batch} for layers in (2 * unit, unit) if layers < depth)]
    smallest = ""
    for choice in filter(None, choices):
        needs = _needs(recipe.reduced(**choice).on(plan.mesh), memory)
        said = ", ".join(f"{name}={value}" for name, value in choice.items())
        typed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in choice.items())
        if needs.total <= memory:
            return (
                "Verify a smaller one, on the same mesh and strategies, for what is wrong there is wrong here: "
                f"jp.verify(recipe.reduced({said}).on(mesh)), or jaxpar verify ... {typed}. It needs "
                f"{bytes_text(needs.total)}."
            )
        smallest = f"Even recipe.reduced({said}) needs {bytes_text(needs.total)}. "
    return (
        f"{smallest}Verify a narrower model, on the same mesh and strategies, for what is wrong there is wrong here: "
        "dataclasses.replace(recipe, model=...)."
        + ("" if depth else " It has no jp.Stack, and no FSDP(blocks=...), whose layers could be fewer.")
    )


def _memory(plan: BoundPlan) -> int:
    """Bytes that one device may use; simulated ones share the memory of the host, and one of them may have it all."""
    hardware = _mesh.hardware_of(plan.mesh)
    return hardware.memory * (hardware.num_devices if hardware.kind == "cpu" else 1)


def _bytes_of(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _tree.leaves(tree).values())
