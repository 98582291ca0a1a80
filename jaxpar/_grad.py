"""`jp.value_and_grad`: a loss and its gradients, over microbatches too, with one gradient reduction a step.

How gradients are accumulated is the *form*, chosen here and said in the step's notes:

    direct    one microbatch: plain autodiff; the compiler reduces where it computes
    replica   each replica's gradients are summed apart, by `vmap` over a leading replica dim whose axes the parameters
              do not have (`spmd_axis_name`), and cross those axes once, outside of every loop (`_reduce`)
    sharded   only axes that shard the parameters split the batch: the accumulator is sharded, one reduce-scatter a
              microbatch
    manual    losses that cannot be mapped (convolutions, ragged_dot) on a mesh of replicas alone: a manual region
    pipeline  a plan with stages (`jp.PP`): the schedule's microbatches pass through them (`_pipelined`)
    whole     losses that see the whole batch (batch statistics, dropout without sample ids, `separable=False`), and
              unmappable ones on other meshes: one reduction a microbatch, in the compiler's hands, with the reason
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from . import _context, _traits, _tree
from ._context import Region, as_spec, axes_at, drop_axes
from ._errors import StepError
from ._microbatches import (
    check_microbatches,
    check_rows,
    contiguous,
    in_microbatches,
    interleaved,
    microbatch_of,
    num_rows,
    pick,
)
from ._pipelined import Pipelined, pipelined
from ._planned import Traced, gathered_by
from ._reduce import reduce_once
from ._sequence import ContextSplit
from ._subject import Subject, graph_subject, pytree_subject
from ._types import Axes, PyTree
from .parallel import DP, PP

logger = logging.getLogger("jaxpar")

Loss = Callable[..., Any]


def value_and_grad(
    loss: Loss,
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    weight: Callable[[Any], Any] | None = None,
    separable: bool = True,
) -> Callable[..., Any]:
    """A function that gives the mean loss over a batch and its gradients, in place of `nnx.value_and_grad`.

    `loss(model, batch, *rest)`, or `loss(params, batch, *rest)` for a plain pytree, returns one of

    - a scalar mean over the batch, every row of it counting alike, or as much as `weight(batch)` says in total;
    - `(sum, weight)`: a sum over the batch and what to divide it by, such as the number of tokens that count;

    and with `has_aux` a pair of that and a pytree, which for `accumulate > 1` is of scalars and is averaged by weight.

    Moves: parameters of a plain pytree are gathered at the start of the loss, but for those that it gathers itself
    (`jp.gather`); those of nnx modules where they are read. Gradients cross each axis that replicates parameters once
    a call, whatever `accumulate` is, and axes that shard parameters as `FSDP(reduce=...)` says. Memory: with
    `accumulate`, one microbatch of activations, and one accumulator of the gradients in float32.

    Args:
        loss: The loss.
        accumulate: Into how many microbatches to split the batch.
        has_aux: Whether the loss also returns something that is not differentiated.
        weight: The weight of a batch, for a loss that returns a weighted mean.
        separable: Whether the loss is a sum over examples. Contrastive and balance losses are not: they see one whole
            microbatch, and gradients are reduced once for each.

    Returns:
        A function `(model, batch, *rest) -> (value, gradients)`, or `((value, aux), gradients)`. Gradients have the
        type that `nnx.value_and_grad` or `jax.value_and_grad` gives, for the parameters that the plan trains.

    Raises:
        StepError: The batch does not divide into microbatches; the loss returns none of the above.

    Example:
        >>> loss = lambda params, x: (jnp.sum((x @ params["w"]) ** 2), x.shape[0])
        >>> value, grads = jp.value_and_grad(loss, accumulate=2)({"w": jnp.ones((4, 1))}, jnp.ones((6, 4)))
        >>> float(value), grads["w"].shape
        (16.0, (4, 1))
    """
    if accumulate < 1:
        raise StepError(
            f"jp.value_and_grad: accumulate is {accumulate}. Use 1 for none, or the number of microbatches."
        )

    def run(model: PyTree, batch: PyTree, *rest: Any) -> Any:
        found = differentiate(
            loss, model, batch, rest, accumulate=accumulate, has_aux=has_aux, weight=weight, separable=separable
        )
        return ((found.value, found.aux) if has_aux else found.value), found.gradients

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differentiated:
    """A loss over a batch: its mean, its total weight, what else it said, and its gradients."""

    value: Any
    weight: Any
    aux: Any
    gradients: PyTree


def differentiate(
    loss: Loss,
    model: PyTree,
    batch: PyTree,
    rest: tuple[Any, ...] = (),
    *,
    accumulate: int,
    has_aux: bool,
    weight: Callable[[Any], Any] | None,
    separable: bool,
) -> Differentiated:
    """`value_and_grad` with the total weight of the batch; state that the loss changes is put back into `model`."""
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)
    check_rows(batch, accumulate)
    if _tree.is_graph(model):
        subject = graph_subject(model)
    else:
        one = microbatch_of(batch, accumulate)
        gathered = gathered_by(lambda params, batch: loss(params, batch, *rest), model, one)
        subject = pytree_subject(model, gathered)
    job = _Job(loss, subject, accumulate, has_aux, weight, rest)
    value, total_weight, aux, gradients, state = _differentiate(job, batch, separable)
    subject.update(state)
    return Differentiated(value=value, weight=total_weight, aux=aux, gradients=subject.as_gradients(gradients))


@dataclasses.dataclass(frozen=True)
class _Job:
    """A loss ready to be differentiated."""

    loss: Loss
    subject: Subject
    accumulate: int
    has_aux: bool
    weight: Callable[[Any], Any] | None
    rest: tuple[Any, ...]

    def run(self, params: dict[str, jax.Array], state: list[Any], batch: PyTree) -> tuple[Any, Any, Any, list[Any]]:
        """`(sum, weight, aux, state after)` over one microbatch; the weight is `None` for a plain mean of all rows."""
        model, after = self.subject.build(params, state)
        out = self.loss(model, batch, *self.rest)
        aux = None
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise StepError(
                    f"has_aux: the loss returned {_shown(out)}, not a pair of the loss and what else it says."
                )
            out, aux = out
        if isinstance(out, tuple):
            if len(out) != 2 or any(jnp.ndim(each) for each in out):
                raise StepError(
                    f"the loss returned {_shown(out)}. Return a scalar mean or (sum, weight), two scalars; what else "
                    "it says goes second in a pair, with has_aux=True."
                )
            if self.weight is not None:
                raise StepError("weight= has no effect on a loss that returns (sum, weight). Leave it out.")
            total, weight = out
            return total, _as_weight(weight, total), aux, after()
        if jnp.ndim(out):
            raise StepError(
                f"the loss returned {_shown(out)}. Return a scalar: a mean over the batch, or (sum, weight)."
            )
        if self.weight is None:
            return out, None, aux, after()
        weight = _as_weight(self.weight(batch), out)
        return out * weight.astype(out.dtype), weight, aux, after()

    def gradients_of_mean(
        self, params: Any, state: Any, batch: Any
    ) -> tuple[Any, Any, Any, dict[str, jax.Array], list[Any]]:
        """`(mean, weight, aux, gradients, state after)` of one whole batch."""

        def mean(params: dict[str, jax.Array]) -> Any:
            total, weight, aux, after = self.run(params, state, batch)
            value = total if weight is None else total / jnp.maximum(weight, _TINY).astype(total.dtype)
            return value, (jnp.float32(num_rows(batch)) if weight is None else weight, aux, after)

        (value, (weight, aux, after)), gradients = jax.value_and_grad(mean, has_aux=True)(params)
        return value, weight, aux, gradients, after

    def gradients_of_sum(
        self, params: Any, state: Any, batch: Any
    ) -> tuple[Any, Any, Any, dict[str, jax.Array], list[Any]]:
        """`(sum, weight, weighted aux, gradients of the sum, state after)` of one microbatch."""

        def weighted(params: dict[str, jax.Array]) -> Any:
            total, weight, aux, after = self.summed(params, state, batch)
            return total, (total.astype(_wide(total.dtype)), weight, aux, after)

        (_, (total, weight, aux, after)), gradients = jax.value_and_grad(weighted, has_aux=True)(params)
        return total, weight, aux, gradients, after

    def summed(self, params: dict[str, jax.Array], state: Any, batch: Any) -> tuple[Any, Any, Any, list[Any]]:
        """`(sum, weight, weighted aux, state after)` of one microbatch."""
        total, weight, aux, after = self.run(params, state, batch)
        if weight is None:
            rows = num_rows(batch)
            total, weight = total * rows, _as_weight(rows, total)
        _check_aux(aux)
        return total, weight, jax.tree.map(lambda each: jnp.asarray(each, weight.dtype) * weight, aux), after


_TINY = 1e-30  # a batch that counts for nothing gives 0, not NaN


@dataclasses.dataclass(frozen=True)
class _Form:
    name: str
    replicas: Axes
    why: str


def _differentiate(job: _Job, batch: PyTree, separable: bool) -> tuple[Any, Any, Any, dict[str, jax.Array], list[Any]]:
    region = _context.current()
    form = _form(job, batch, region, separable)
    if isinstance(region, Traced) and form.name != "direct":
        what = "gradients" if form.name == "pipeline" else f"accumulation over {job.accumulate} microbatches"
        region.notes.append(f"{what}: {form.name}, {form.why}")
    if form.name == "direct":
        return job.gradients_of_mean(job.subject.params, job.subject.state, batch)
    if region is None or form.name == "whole":
        if region is not None and job.accumulate > 1 and region.plan.num_batch_shards > 1:
            _warn(region, f"gradients are reduced {job.accumulate} times a step: {form.why}.")
        total, weight, aux, gradients, state = _scan(job, contiguous(batch, job.accumulate, region), region)
    elif form.name == "pipeline":
        total, weight, aux, gradients, state = _pipeline(job, batch, region)
    elif form.name == "sharded":
        total, weight, aux, gradients, state = _scan(job, interleaved(batch, job.accumulate, (), region), region)
    elif form.name == "manual":
        total, weight, aux, gradients, state = _manual(job, batch, form.replicas, region)
    else:
        total, weight, aux, gradients, state = _replicated(job, batch, form.replicas, region)
    divisor = jnp.maximum(weight, _TINY)
    params = job.subject.params
    mean = {
        path: (gradient / divisor.astype(gradient.dtype)).astype(params[path].dtype)
        for path, gradient in gradients.items()
    }
    return total / divisor.astype(total.dtype), weight, jax.tree.map(lambda each: each / divisor, aux), mean, state


def _warn(region: Region, warning: str) -> None:
    if isinstance(region, Traced):
        region.warnings.append(warning)
    else:
        logger.warning("%s", warning)


def _form(job: _Job, batch: PyTree, region: Region | None, separable: bool) -> _Form:
    """The form of accumulation for this loss on this mesh, and why."""
    if region is None or region.replicas:
        return _Form("direct" if job.accumulate == 1 else "whole", (), "no plan")
    plan = region.plan
    if plan.stage_axis is not None:
        return _pipeline_form(job, batch, plan, separable)
    strategy = plan.strategy(DP)
    hook = strategy is not None and (strategy.reduce is not None or strategy.reduce_dtype is not None)
    mixed = plan.precision.reduce is not None and plan.precision.reduce != plan.precision.compute
    replicas, split = plan.replicas, plan.context
    apart = split is not None and split.reduce == "step" and job.accumulate > 1
    wanted = bool(replicas or apart) and (job.accumulate > 1 or hook or mixed)
    if not wanted:
        if job.accumulate == 1:
            return _Form("direct", (), "")
        if not separable:
            return _Form("whole", (), "the loss says it is not separable")
    traits = _traits_of(job, batch)
    why_not = _not_a_sum(separable, traits)
    if why_not:
        return _refuse_hook(hook, job, why_not)
    if split is not None and apart:
        _check_by_token(job, batch, traits, split)
        replicas = (*replicas, split.axis)
    if not replicas:
        return _Form("sharded", (), f"one reduce-scatter a microbatch over {'+'.join(plan.shards) or 'no axis'}")
    if traits.unmappable is None:
        return _Form("replica", replicas, f"one reduction a step over {'+'.join(replicas)}")
    others = [axis for axis, size in plan.axes.items() if size > 1 and axis not in replicas]
    if others:
        why = f"{traits.unmappable} cannot be mapped over replicas beside axis {others[0]!r}"
        return _refuse_hook(hook, job, why)
    return _Form(
        "manual", replicas, f"one reduction a step over {'+'.join(replicas)}; {traits.unmappable} cannot be mapped"
    )


def _not_a_sum(separable: bool, traits: _traits.Traits) -> str:
    """Why a loss is no sum over examples; `""` if it is one."""
    if not separable:
        return "the loss says it is not separable"
    if traits.changes_state:
        return "the loss changes the model's state (batch statistics, or nnx random-number counters)"
    if traits.repeats_random:
        return "it draws random numbers that do not depend on the sample (jp.dropout with ids does)"
    return ""


def _check_by_token(job: _Job, batch: PyTree, traits: _traits.Traits, split: ContextSplit) -> None:
    """Raise `StepError` for a loss that is seen not to treat tokens one by one."""
    why = ""
    if traits.draws:
        why = "it draws random numbers, which are then those of a part of a sequence"
    elif job.weight is None and _gives_mean(job, batch):
        why = "it returns a scalar, and nobody knows of how many tokens that is the mean: return (sum, weight)"
    elif traits.unmappable is not None:
        why = f"{traits.unmappable} cannot be mapped over them"
    if why:
        raise StepError(
            f"CP(reduce='step') runs the loss on the tokens of each device of {split.axis!r} apart, but {why}. Change "
            "that, or use CP(reduce='microbatch')."
        )


def _gives_mean(job: _Job, batch: PyTree) -> bool:
    """Whether the loss returns a scalar, and no sum with its weight."""

    def weight(batch: PyTree) -> Any:
        return job.run(job.subject.params, job.subject.state, batch)[1]

    return jax.eval_shape(weight, microbatch_of(batch, job.accumulate)) is None


def _pipeline_form(job: _Job, batch: PyTree, plan: Any, separable: bool) -> _Form:
    pipeline, schedule = plan.strategy(PP), plan.schedule
    check_microbatches(plan, num_rows(batch), job.accumulate)
    traits = _traits_of(dataclasses.replace(job, accumulate=schedule.microbatches), batch)
    why_not = _not_a_sum(separable, traits)
    if why_not:
        raise StepError(
            f"{pipeline.label} needs a loss that is a sum over examples, for it passes {schedule.microbatches} "
            f"microbatches through its stages, but {why_not}. Change that, or plan this step without PP."
        )
    once = f"; one reduction a step over {'+'.join(plan.replicas)}" if plan.replicas else ""
    return _Form("pipeline", plan.replicas, schedule.title + once)


def _pipeline(job: _Job, batch: PyTree, region: Region) -> Any:
    """The schedule's microbatches through the stages, then one reduction over replicas."""
    plan, replicas, params = region.plan, region.plan.replicas, job.subject.params
    run, micro = _in_stages(job, batch, region)
    (total, (weight, aux)), gradients = run.gradients(micro)
    sums = (total, weight, aux)
    if not replicas:
        sums, gradients = jax.tree.map(lambda leaf: leaf[0], (sums, gradients))
    else:
        gradients, sums = _reduced(plan, gradients, sums, _update_specs(plan, params), replicas)
    return (*sums, gradients, job.subject.state)


def evaluate(
    loss: Loss, model: PyTree, batch: PyTree, *, has_aux: bool, weight: Callable[[Any], Any] | None
) -> Differentiated:
    """The mean loss of a batch under a plan with a pipeline: the forward passes of its schedule, no gradients.

    The microbatches must divide the batch: `fits_microbatches`.
    """
    region = _context.current()
    assert region is not None
    run, micro = _in_stages(_Job(loss, graph_subject(model), 1, has_aux, weight, ()), batch, region)
    total, (total_weight, aux) = jax.tree.map(lambda leaf: leaf.sum(0), run.sums(micro))
    divisor = jnp.maximum(total_weight, _TINY)
    aux = jax.tree.map(lambda each: each / divisor, aux)
    return Differentiated(value=total / divisor.astype(total.dtype), weight=total_weight, aux=aux, gradients=None)


def _in_stages(job: _Job, batch: PyTree, region: Region) -> tuple[Pipelined, PyTree]:
    """A loss cut into stages, and its batch into microbatches: `[microbatches, replicas, rows, ...]`."""
    replicas = region.plan.replicas
    job = dataclasses.replace(job, accumulate=region.plan.schedule.microbatches)
    micro = in_microbatches(batch, job.accumulate, replicas, region)

    def loss(params: dict[str, jax.Array], batch: PyTree) -> Any:
        total, weight, aux, _ = job.summed(params, job.subject.state, batch)
        return total, (weight, aux)

    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), micro)
    return pipelined(loss, job.subject.params, one, region, replicas), micro


def _refuse_hook(hook: bool, job: _Job, why: str) -> _Form:
    if hook:
        raise StepError(
            f"DP(reduce=..., reduce_dtype=...) needs gradients that are apart on each replica, but {why}. Leave them "
            f"out."
        )
    return _Form("direct" if job.accumulate == 1 else "whole", (), why)


def _traits_of(job: _Job, batch: PyTree) -> _traits.Traits:
    params, state = job.subject.params, job.subject.state
    micro, treedef = jax.tree.flatten(microbatch_of(batch, job.accumulate))

    def flat(params: Any, leaves: list[Any], state: list[Any]) -> Any:
        total, weight, aux, after = job.run(params, state, jax.tree.unflatten(treedef, leaves))
        return (total, weight, aux), after

    closed = jax.make_jaxpr(flat)(_shapes(params), micro, _shapes(state))
    return _traits.traits_of(closed, len(params), len(micro), len(state), len(params) + len(micro))


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _scan(job: _Job, batches: PyTree, region: Region | None) -> Any:
    """Accumulate over microbatches, each seen by the whole mesh."""
    params, state = job.subject.params, job.subject.state

    def body(carry: Any, index: jax.Array) -> Any:
        sums, gradients, state = carry
        batch = pick(batches, index)
        total, weight, aux, more, state = job.gradients_of_sum(params, state, batch)
        sums = jax.tree.map(jnp.add, sums, (total, weight, aux))
        gradients = {path: gradients[path] + more[path].astype(gradients[path].dtype) for path in gradients}
        return (sums, _pinned(gradients, region), state), None

    sums = _zero_sums(job, batches)
    zeros = {path: jnp.zeros(leaf.shape, _wide(leaf.dtype)) for path, leaf in params.items()}
    (sums, gradients, state), _ = jax.lax.scan(
        body, (sums, _pinned(zeros, region), state), jnp.arange(job.accumulate), length=job.accumulate
    )
    return (*sums, gradients, state)


def _replicated(job: _Job, batch: PyTree, replicas: Axes, region: Region) -> Any:
    """Accumulate on each replica apart, then reduce once."""
    plan = region.plan
    count = math.prod(plan.axes[axis] for axis in replicas)
    batches = interleaved(batch, job.accumulate, replicas, region)
    params = job.subject.params
    inside = dataclasses.replace(region, replicas=replicas)
    targets = _update_specs(plan, params)
    inner = {path: as_spec([replicas, *map(axes_at, drop_axes(spec, replicas))]) for path, spec in targets.items()}

    def pin(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            path: jax.lax.with_sharding_constraint(gradient, plan.sharding(inner[path]))
            for path, gradient in gradients.items()
        }

    def one(params: Any, batch: Any) -> Any:
        with _context.entered(inside):
            total, weight, aux, gradients, _ = job.gradients_of_sum(params, job.subject.state, batch)
        return (total, weight, aux), gradients

    in_axes = (None, jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) > 1 else None, batches))
    mapped = jax.vmap(one, in_axes=in_axes, axis_size=count, spmd_axis_name=replicas)

    def body(carry: Any, index: jax.Array) -> Any:
        sums, gradients = carry
        more_sums, more = mapped(params, pick(batches, index))
        gradients = {path: gradients[path] + more[path].astype(gradients[path].dtype) for path in gradients}
        return (jax.tree.map(jnp.add, sums, more_sums), pin(gradients)), None

    sums = jax.tree.map(lambda leaf: jnp.zeros((count,), leaf.dtype), _zero_sums(job, batches, replica=True))
    zeros = {path: jnp.zeros((count, *leaf.shape), _wide(leaf.dtype)) for path, leaf in params.items()}
    carry = (sums, pin(zeros))
    if job.accumulate == 1:
        (sums, gradients), _ = body(carry, jnp.int32(0))
    else:
        (sums, gradients), _ = jax.lax.scan(body, carry, jnp.arange(job.accumulate), length=job.accumulate)
    gradients, sums = _reduced(plan, gradients, sums, targets, replicas)
    return (*sums, gradients, job.subject.state)


def _manual(job: _Job, batch: PyTree, replicas: Axes, region: Region) -> Any:
    """Accumulate on each device of a mesh that only replicates, in a manual region, then reduce once."""
    plan = region.plan
    batches = interleaved(batch, job.accumulate, replicas, region)
    params = job.subject.params
    specs = jax.tree.map(lambda leaf: PartitionSpec(None, replicas) if jnp.ndim(leaf) > 1 else PartitionSpec(), batches)
    zeros = {path: jnp.zeros(leaf.shape, _wide(leaf.dtype)) for path, leaf in params.items()}
    sums = _zero_sums(job, batches, replica=True)

    def body(params: Any, batches: Any, zeros: Any, sums: Any) -> Any:
        vary = lambda tree: jax.tree.map(lambda leaf: jax.lax.pcast(leaf, replicas, to="varying"), tree)
        params, zeros, sums = vary(params), vary(zeros), vary(sums)
        batches = jax.tree.map(lambda leaf: leaf[:, 0] if leaf.ndim > 1 else leaf, batches)

        def micro(carry: Any, index: jax.Array) -> Any:
            sums, gradients = carry
            with _context.entered(None):
                more = job.gradients_of_sum(params, job.subject.state, pick(batches, index))
            gradients = {path: gradients[path] + more[3][path].astype(gradients[path].dtype) for path in gradients}
            return (jax.tree.map(jnp.add, sums, more[:3]), gradients), None

        (sums, gradients), _ = jax.lax.scan(micro, (sums, zeros), jnp.arange(job.accumulate), length=job.accumulate)
        return jax.tree.map(lambda leaf: leaf[None], (sums, gradients))

    sums, gradients = jax.shard_map(
        body,
        mesh=plan.mesh,
        in_specs=(PartitionSpec(), specs, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(replicas),
    )(params, batches, zeros, sums)
    gradients, sums = _reduced(plan, gradients, sums, _update_specs(plan, params), replicas)
    return (*sums, gradients, job.subject.state)


def _reduced(
    plan: Any, gradients: dict[str, jax.Array], sums: Any, targets: dict[str, PartitionSpec], replicas: Axes
) -> Any:
    """Gradients and sums that are apart on each replica, summed over `replicas` as the plan says."""
    strategy = plan.strategy(DP)
    dtype = plan.precision.reduce if strategy is None or strategy.reduce_dtype is None else strategy.reduce_dtype
    return reduce_once(
        gradients,
        targets,
        sums,
        replicas=replicas,
        plan=plan,
        hook=None if strategy is None else strategy.reduce,
        dtype=dtype,
    )


def _gradient_spec(plan: Any, path: str, leaf: Any) -> PartitionSpec:
    match = plan.matcher.match(path, leaf.shape)
    return PartitionSpec() if match is None else match.record.gradient


def _update_specs(plan: Any, params: dict[str, jax.Array]) -> dict[str, PartitionSpec]:
    """How each gradient lies where the optimiser takes it."""
    matches = {path: plan.matcher.match(path, leaf.shape) for path, leaf in params.items()}
    return {path: PartitionSpec() if match is None else match.record.slots for path, match in matches.items()}


def _pinned(gradients: dict[str, jax.Array], region: Region | None) -> dict[str, jax.Array]:
    if region is None or region.replicas:
        return gradients
    plan = region.plan
    return {
        path: jax.lax.with_sharding_constraint(gradient, plan.sharding(_gradient_spec(plan, path, gradient)))
        for path, gradient in gradients.items()
    }


def _zero_sums(job: _Job, batches: PyTree, *, replica: bool = False) -> Any:
    """Zeros for a microbatch's `(sum, weight, aux)`."""

    def one(batches: Any) -> Any:
        batch = pick(batches, 0)
        if replica:
            batch = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, batch)
        with _context.entered(None):
            return job.gradients_of_sum(job.subject.params, job.subject.state, batch)[:3]

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, _shapes(batches)))


def _check_aux(aux: Any) -> None:
    wrong = [path for path, leaf in _tree.leaves(aux).items() if np.ndim(leaf)]
    if wrong:
        raise StepError(
            f"aux {wrong[0] or 'value'} is not a scalar, and only scalars can be averaged over microbatches. Return "
            "scalars, or use accumulate=1."
        )


def _as_weight(weight: Any, total: jax.Array) -> jax.Array:
    """A weight as what a sum is divided by: not differentiated, and as wide as the sum, float32 at least."""
    return jax.lax.stop_gradient(jnp.asarray(weight, _wide(total.dtype)))


def _wide(dtype: Any) -> Any:
    """The dtype of an accumulator: at least float32."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if is_wide else jnp.float32


def _shown(out: Any) -> str:
    shapes = jax.tree.map(lambda leaf: f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))}", out)
    return str(shapes)
