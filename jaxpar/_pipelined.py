"""A loss under a plan with a pipeline: cut at the model's stack, and run by the pipeline's executor.

The model stays as it is. Its loss is traced as it stands, up to the call of the stack: what goes in is the *stream*
(the first argument: activations, keys) and what every block is *given* (the others: positions, segments). It is traced
again with the result of the stack given, to its end; what lies before the stack is then computed for nothing, and XLA
drops it. The stack's block is the layer that the stages run.

    embed   the loss up to the stack            once a microbatch, in global view
    given   the operations that the other       on each stage for itself; they may depend on the microbatch alone
            arguments of the stack come from
    block   one layer of the stack              on its stage, in a region that is manual over the pipe and the replicas
    loss    the loss with the stack's result    once a microbatch, in global view
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core
from jax.sharding import PartitionSpec

from . import _context, _traits, _tree
from ._context import Region, axes_at, drop_axes
from ._errors import StepError
from ._hardware import counted
from ._plan import Record
from ._planned import Traced
from ._stack import Layer, Stacked, caught
from ._types import Axes, PyTree
from .parallel import PP
from .pipeline import Model, Run

P = PartitionSpec

LossOf = Callable[[dict[str, jax.Array], PyTree], tuple[jax.Array, PyTree]]
"""`loss(params, microbatch)`: a sum to be differentiated, and scalars that add up over microbatches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipelined:
    """A loss, ready to be run in a pipeline.

    Attributes:
        run: The executor.
        ends: Trained parameters outside of the stack, by path.
        blocks: Those of the stack.
        held: Its other variables.
        fixed: What the stages need besides, the same for all microbatches.
    """

    run: Run
    ends: dict[str, jax.Array]
    blocks: dict[str, jax.Array]
    held: dict[Any, jax.Array]
    fixed: list[Any]

    def gradients(self, micro: PyTree) -> tuple[tuple[jax.Array, PyTree], dict[str, jax.Array]]:
        """Sums, and gradients of the sum by path, each replica apart, of `[microbatches, replicas, rows, ...]`."""
        found = self.run.gradients(self.ends, self.blocks, micro, held=self.held, fixed=self.fixed)
        region = _context.current()
        if found.is_whole and self.ends and isinstance(region, Traced):
            stages, parts = self.run.schedule.stages, self.run.parts
            rows = min(leaf.shape[2] for leaf in jax.tree.leaves(micro) if leaf.ndim > 2)
            region.notes.append(
                f"each of {stages} stages computes all that comes before and after the stack: a microbatch of "
                f"{counted(rows, 'row')} on a replica cannot be dealt out to them. Use microbatches of a multiple of "
                f"{stages * parts} rows, all fields with as many, or PP(vocab=[...]), which splits embedding and head "
                "over the stages."
            )
        return found.sums, {**found.ends, **found.blocks}

    def sums(self, micro: PyTree) -> tuple[jax.Array, PyTree]:
        """The sums alone, each replica apart: a forward pass."""
        return self.run.forward(self.ends, self.blocks, micro, held=self.held, fixed=self.fixed)


def pipelined(loss: LossOf, params: dict[str, jax.Array], micro: PyTree, region: Region, replicas: Axes) -> Pipelined:
    """Cut `loss` at the stack that the model calls.

    Args:
        loss: The loss.
        params: Trained parameters.
        micro: Shapes of one replica's part of one microbatch.
        region: The plan.
        replicas: Axes over which gradients are kept apart.

    Raises:
        StepError: The loss calls no stack, several, or one inside of a transformation; what blocks are given depends on
            parameters; blocks share variables.
    """
    plan = region.plan
    pipeline: PP = plan.strategy(PP)
    outside = dataclasses.replace(region, replicas=replicas)
    inside = dataclasses.replace(region, replicas=(*replicas, pipeline.axis), manual=True)
    probed = _probe(loss, params, micro)
    layer, of_path, held = probed.layer, probed.of_path, probed.held

    def embed(ends: PyTree, micro: PyTree) -> PyTree:
        with _context.entered(outside):
            return _up_to_the_stack(loss, {**params, **ends}, micro).stream

    def block(values: Any, stream: PyTree, given: list[Any]) -> PyTree:
        own, rest = values
        values = {keys: own[path] for keys, path in of_path.items()} | {
            keys: rest[name] for name, keys in named.items()
        }
        with _context.entered(inside):
            return layer(values, stream, *probed.arguments(given))

    def finish(ends: PyTree, stream: PyTree, micro: PyTree) -> Any:
        with _context.entered(outside):
            return _from_the_stack(loss, {**params, **ends}, micro, stream)

    named = {_tree.path_of(keys): keys for keys in held}
    blocks = {path: params[path] for path in of_path.values()}
    ends = {path: leaf for path, leaf in params.items() if path not in blocks}
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}

    def spec(path: str, leaf: jax.Array) -> PartitionSpec:
        match = plan.matcher.match(path, leaf.shape)
        return P() if match is None else drop_axes(match.record.slots, replicas)

    run = Run(
        model=Model(embed=embed, block=block, loss=finish, given=probed.given),
        schedule=pipeline.schedule_for(plan.axes[pipeline.axis]),
        mesh=plan.mesh,
        axis=pipeline.axis,
        replicas=replicas,
        mapped=_mapped(loss, abstract, micro, region, [plan.records[path] for path in blocks]),
        layer_dims=layer.layer_dims,
        specs=(
            {path: spec(path, leaf) for path, leaf in ends.items()},
            {path: P(*tuple(spec(path, leaf))[layer.layer_dims :]) for path, leaf in blocks.items()},
        ),
        parts=math.prod(plan.axes[axis] for axis in plan.batch_axes if axis not in replicas),
    )
    return Pipelined(
        run=run,
        ends=ends,
        blocks=blocks,
        held={name: held[keys] for name, keys in named.items()},
        fixed=probed.fixed,
    )


def _mapped(loss: LossOf, params: dict[str, Any], micro: PyTree, region: Region, records: list[Record]) -> Axes:
    """The last of the axes of replicas: those over which blocks are stored in pieces (`reduce="step"`).

    None, where the loss does what is not to be mapped over replicas; a stage's weights are then gathered whole.
    """
    cut = {axis for record in records for entry in record.storage for axis in axes_at(entry)}
    axes = tuple(reversed(list(itertools.takewhile(cut.__contains__, reversed(region.plan.replicas)))))
    if not axes:
        return ()
    # In other forms a device has one replica, for which `_grouped` has its rule; here it may have more.
    names = _traits.UNMAPPABLE | {"custom_vmap_call": "ragged_dot"}
    with _context.entered(None):
        found = names.get(_traits.find(jax.make_jaxpr(loss)(params, micro).jaxpr, names) or "")
    plan = region.plan
    kernels = [*plan.dims.get("expert", ()), *([] if plan.context is None else [plan.context.axis])]
    if not found and kernels:
        found = f"a kernel over {kernels[0]}"
    if found and isinstance(region, Traced):
        region.notes.append(
            f"{found} cannot be mapped over {'+'.join(axes)}: the weights of a stage are gathered whole, once a step."
        )
    return () if found else axes


class _Reached(Exception):  # noqa: N818 -- no error: a way out
    """The stack was called; this ends the loss there."""

    def __init__(self, stack: Stacked, stream: PyTree, rest: tuple[Any, ...], settings: dict[str, Any]):
        super().__init__()
        self.stack, self.stream, self.rest, self.settings = stack, stream, rest, settings


def _up_to_the_stack(loss: LossOf, params: dict[str, jax.Array], micro: PyTree) -> _Reached:
    trace = jax_core.get_opaque_trace_state(convention="nnx")

    def catch(stack: Stacked, stream: PyTree, rest: tuple[Any, ...], settings: dict[str, Any]) -> PyTree:
        if jax_core.get_opaque_trace_state(convention="nnx") != trace:
            raise StepError(
                "pipeline: the model calls its stack inside of a transformation (jit, remat, scan, vmap, cond). Call "
                "it outside; the stack rematerialises by itself, jp.Stack(..., remat=...)."
            )
        raise _Reached(stack, stream, rest, settings)

    try:
        with caught(catch):
            loss(params, micro)
    except _Reached as reached:
        return reached
    raise StepError(
        "pipeline: the loss does not call the model's stack of blocks, so there is nothing to run in stages. Give "
        "jp.value_and_grad the loss of the whole model, or plan this step without PP."
    )


def _from_the_stack(loss: LossOf, params: dict[str, jax.Array], micro: PyTree, stream: PyTree) -> Any:
    calls = []

    def catch(*_: Any) -> PyTree:
        calls.append(None)
        if len(calls) > 1:
            raise StepError(
                "pipeline: the loss calls a stack of blocks twice, and a pipeline passes through its stages once. Put "
                "equal blocks into one jp.Stack, call it once, or plan this step without PP."
            )
        return stream

    with caught(catch):
        return loss(params, micro)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe:
    """What is learnt from tracing a loss up to its stack.

    Attributes:
        layer: A layer of the stack.
        of_path: The path of each trained variable of the stack, by its key path in it.
        held: Values of the others.
        fixed: Arrays that what blocks are given depends on, beside the microbatch.
        given: What blocks are given.
        arguments: That as the arguments of a call.
    """

    layer: Layer
    of_path: dict[Any, str]
    held: dict[Any, Any]
    fixed: list[Any]
    given: Callable[[list[Any], PyTree], list[Any]]
    arguments: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _probe(loss: LossOf, params: dict[str, jax.Array], micro: PyTree) -> _Probe:
    seen: dict[str, Any] = {}
    shapes, treedef = jax.tree.flatten(micro)

    def trace(params: dict[str, jax.Array], leaves: list[Any]) -> list[Any]:
        with _context.entered(None):
            reached = _up_to_the_stack(loss, params, jax.tree.unflatten(treedef, leaves))
        path_of = {id(leaf): path for path, leaf in params.items()}
        layer = reached.stack.one_layer()
        if layer.shared:
            raise StepError(
                f"pipeline: the blocks share the variable {_tree.path_of(layer.shared[0])!r} with one another or with "
                "the rest of the model, and each stage holds its own layers only. Give each block its own."
            )
        raw = {keys: variable.get_raw_value() for keys, variable in layer.variables.items()}
        arguments, seen["arguments"] = jax.tree.flatten((reached.rest, reached.settings))
        is_array = [_tree.is_array(each) for each in arguments]
        seen["static"] = [None if here else each for each, here in zip(arguments, is_array, strict=True)]
        seen["is_array"] = is_array
        seen["layer"] = layer
        seen["of_path"] = {keys: path_of[id(value)] for keys, value in raw.items() if id(value) in path_of}
        seen["held"] = {keys: value for keys, value in raw.items() if id(value) not in path_of}
        return [each for each, here in zip(arguments, is_array, strict=True) if here]

    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    closed = jax.make_jaxpr(trace)(abstract, shapes)
    fixed, given = _given(closed, list(abstract))

    def arguments(given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arrays = iter(given)
        leaves = [
            next(arrays) if here else static for static, here in zip(seen["static"], seen["is_array"], strict=True)
        ]
        return jax.tree.unflatten(seen["arguments"], leaves)

    return _Probe(
        layer=seen["layer"],
        of_path=seen["of_path"],
        held=seen["held"],
        fixed=fixed,
        given=given,
        arguments=arguments,
    )


def _given(closed: Any, paths: list[str]) -> tuple[list[Any], Callable[[list[Any], PyTree], list[Any]]]:
    """The outputs of a jaxpr over parameters and the leaves of a microbatch, by what they need alone.

    Raises:
        StepError: They need a parameter.
    """
    jaxpr = closed.jaxpr
    needed = {var for var in jaxpr.outvars if not isinstance(var, jax_core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            kept.append(eqn)
            needed |= {var for var in eqn.invars if not isinstance(var, jax_core.Literal)}
    wrong = [path for path, var in zip(sorted(paths), jaxpr.invars, strict=False) if var in needed]
    if wrong:
        raise StepError(
            f"pipeline: what the stack's blocks are given beside their stream depends on the parameter {wrong[0]!r}. "
            "Stages compute it for themselves, from the microbatch alone. Carry it in the stream (the stack's first "
            "argument, which blocks hand on), or compute it inside of the block."
        )
    used = [(var, const) for var, const in zip(jaxpr.constvars, closed.consts, strict=True) if var in needed]
    inputs = [*(var for var, _ in used), *jaxpr.invars[len(paths) :]]

    def given(fixed: list[Any], micro: PyTree) -> list[Any]:
        values = dict(zip(inputs, [*fixed, *jax.tree.leaves(micro)], strict=True))

        def value_of(var: Any) -> Any:
            return var.val if isinstance(var, jax_core.Literal) else values[var]

        for eqn in reversed(kept):
            params = eqn.primitive.get_bind_params(eqn.params)
            found = eqn.primitive.bind(*map(value_of, eqn.invars), **params)
            values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
        return [value_of(var) for var in jaxpr.outvars]

    return [jnp.asarray(const) for _, const in used], given
