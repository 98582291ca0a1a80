"""`jp.verify`: a training step on its mesh against the same step on one device."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _mesh, _tree
from ._bound import BoundPlan
from ._errors import ShardingError, StepError
from ._plan_text import bytes_text
from ._precision import Precision
from ._recipe import Program
from ._step import StepFunction
from ._types import PyTree
from .testing._compare import Comparison
from .testing._same import compare_runs

logger = logging.getLogger("jaxpar")

FLOAT64 = 2
"""Bytes of the float64 reference for one of the float32 run."""


def verify(step: Any, *args: Any) -> Comparison:
    """Prove that a step on its mesh computes what one device computes.

    Runs the step as the plan partitions it, and the same function without a plan on one device in float32 and in
    float64, on copies: nothing of the caller's changes. A leaf passes if its sharded error against float64 is at most
    twice the single-device float32 error (`jaxpar.testing.compare`). Compared are

    - outputs: what the step returns, and state such as batch statistics;
    - gradients: the optimiser is exchanged for one that only keeps what it is given, since a first AdamW step turns a
      gradient's error of 1e-6 into 4% of an update;
    - updates: of the real optimiser, from identical gradients.

    A step whose optimiser is hidden in a closure is compared as a whole, outputs and updates, and the log says so. All
    is in the stored dtype: `Precision(compute=...)` is set aside.

    Costs three compilations and runs, one of them in float64 on one device; all leaves are brought to the host.

    Args:
        step: What `plan.jit` made, or a `Program`.
        *args: Its arguments; of a `Program` a batch, or nothing, for reproducible values of its recipe's shapes.

    Returns:
        The table: prints itself, `.ok`, `.worst`, and `.check()`, which raises if a leaf fails.

    Raises:
        ShardingError: The program does not fit one device, with the bytes.

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
    if isinstance(step, Program):
        return _verify_program(step, args[0] if args else None)
    if not isinstance(step, StepFunction):
        raise StepError(
            f"jp.verify takes a step that plan.jit made, or a Program, not a {type(step).__name__}. Write plan.jit(step)."
        )
    plan = _in_stored_dtype(step.plan)
    args = tuple(_with_arrays(arg) for arg in args)
    _check_fits(plan, args)
    optimizers = _optimizers(args)
    if not optimizers:
        logger.warning(
            "%s: its optimiser is not among its arguments, so gradients cannot be told from updates.", step.__name__
        )
        return _runs(plan, step.function, args)
    recording = tuple(optimizers[index].recording if index in optimizers else arg for index, arg in enumerate(args))
    table = _gradients(_runs(plan, step.function, recording))
    for optimizer in optimizers.values():
        table += _updates(plan, optimizer)
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Optimizer:
    """An optimiser among a step's arguments.

    Attributes:
        recording: The same argument, but it only keeps its gradients and changes no parameter.
        apply: One update, `apply(*args, gradients)`, with gradients by path.
        args: What `apply` takes first.
        params: The parameters it updates, by path.
    """

    recording: Any
    apply: Callable[..., Any]
    args: tuple[Any, ...]
    params: dict[str, Any]


class Kept(NamedTuple):
    """The state of an optimiser that only keeps what it is given."""

    kept: Any


def _verify_program(program: Program, batch: PyTree | None) -> Comparison:
    _check_fits(program.plan, (program.plan.birth.shapes,))
    recipe = dataclasses.replace(program.recipe, precision=Precision())
    program = recipe.on(program.plan.mesh)
    plan, transform = program.plan, recipe.transform()
    recording = dataclasses.replace(recipe, optimizer=_recorder()).on(plan.mesh)
    batch = plan.batch(_filled(recipe.batch) if batch is None else batch)
    state = recording.init()
    table = _gradients(_runs(plan, recording.train_step.function, (state["model"], state["optimizer"], batch)))
    model, optimizer = program.init().values()
    if _tree.is_graph_node(optimizer):
        found = _of_module(model, optimizer)
    else:
        found = _of_params(plan, model, optimizer, transform)
    return table + _updates(plan, found)


def _runs(plan: BoundPlan, function: Callable[..., Any], args: tuple[Any, ...], *, reads: bool = True) -> Comparison:
    step = StepFunction(
        plan, function, donate=False, donate_argnums=(), on_recompile="allow", compiler_options=None, reads=reads
    )
    return compare_runs(step, function, args, grads=False)


def _gradients(table: Comparison) -> Comparison:
    """A table in which what a recording optimiser has kept goes by its name: gradients."""
    rows = [
        dataclasses.replace(row, group="gradients") if ".kept." in f".{row.path}." else row
        for row in table.rows
        if not row.path.endswith(".step")
    ]
    return dataclasses.replace(table, rows=tuple(rows))


def _updates(plan: BoundPlan, optimizer: _Optimizer) -> Comparison:
    """An optimiser's update on the mesh and on one device, from the same gradients: normal numbers, a hundredth."""
    draw = np.random.default_rng(0)
    values = {
        path: 0.01 * draw.standard_normal(leaf.shape).astype(leaf.dtype) for path, leaf in optimizer.params.items()
    }
    gradients = jax.device_put(values, plan.shardings(values))
    table = _runs(plan, optimizer.apply, (*optimizer.args, gradients), reads=False)
    return dataclasses.replace(table, rows=tuple(dataclasses.replace(row, group="updates") for row in table.rows))


def _optimizers(args: tuple[Any, ...]) -> dict[int, _Optimizer]:
    """The optimisers among a step's arguments, by position: `nnx.Optimizer`s, and Flax's `TrainState`s."""
    found = {}
    for index, arg in enumerate(args):
        if all(hasattr(arg, name) for name in ("apply_gradients", "opt_state", "params", "tx", "replace")):
            found[index] = _of_train_state(arg)
        elif _tree.is_graph_node(arg) and hasattr(arg, "tx") and hasattr(arg, "wrt"):
            model = _model_of(arg, args)
            if model is not None:
                found[index] = _of_module(model, arg)
    return found


def _of_module(model: Any, optimizer: Any) -> _Optimizer:
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
        return optax.apply_updates(trained, updates), state

    return _Optimizer(
        recording=None, apply=apply, args=(params, state), params=_tree.leaves(plan.trained(params))
    )


def _model_of(optimizer: Any, args: tuple[Any, ...]) -> Any:
    """The module that `optimizer` updates: all its trained parameters have a place in the optimiser's state."""
    slots = [f".{path}" for path in _tree.leaves(optimizer)]
    models = [arg for arg in args if _tree.is_graph_node(arg) and not hasattr(arg, "tx")]
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

    def update(gradients: Any, _: Kept, params: Any = None, **__: Any) -> tuple[Any, Kept]:
        return jax.tree.map(jnp.zeros_like, gradients), Kept(gradients)

    return optax.GradientTransformationExtraArgs(lambda params: Kept(jax.tree.map(jnp.zeros_like, params)), update)


def _in_stored_dtype(plan: BoundPlan) -> BoundPlan:
    """`plan` without a compute dtype: what one device is compared with has none."""
    if plan.precision == Precision():
        return plan
    records = {path: dataclasses.replace(record, compute_dtype=None) for path, record in plan.records.items()}
    return dataclasses.replace(plan, records=records, precision=Precision())


def _with_arrays(arg: PyTree) -> PyTree:
    """`arg` with numbers as arrays, as a step makes them: the `step` of a new `TrainState` is a Python 0."""
    numbers = bool | int | float | complex
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, numbers) else leaf, arg, is_leaf=_tree.is_graph_node
    )


def _filled(batch: PyTree) -> PyTree:
    """Reproducible values for a batch of shapes: normal numbers, and integers of 0 and 1."""
    draw = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.abs(draw.standard_normal(leaf.shape)).astype(leaf.dtype)
        return draw.integers(0, 2, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(one, batch)


def _check_fits(plan: BoundPlan, args: tuple[Any, ...]) -> None:
    """Refuse what one device cannot hold: state, its float64 copy, and as much again for gradients and results."""
    state = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for arg in args
        for leaf in _tree.leaves(arg).values()
        if hasattr(leaf, "dtype")
    )
    needed = 2 * state * (1 + FLOAT64)
    memory = _mesh.hardware_of(plan.mesh).memory
    if memory and needed > memory:
        raise ShardingError(
            f"verifying needs about {bytes_text(needed)} on one device ({bytes_text(state)} of state, in float32 and "
            f"float64, and the results), which has {bytes_text(memory)}. Verify a reduced recipe, with fewer layers, "
            "narrower ones and a smaller batch, on the same mesh and strategies: what is wrong there is wrong here."
        )
