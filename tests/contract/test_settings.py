"""No setting is without effect: every field of every public dataclass a user fills in, and every keyword option.

A field without an entry here fails the first test. Each entry gives the setting a value that is not its default and
shows another plan, another program, another behaviour, or an error.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxpar as jp
from models import gpt
from models.gpt import config as gpt_config

X = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


def params():
    return {"up": jnp.ones((64, 128)) / 64, "down": jnp.ones((128, 64)) / 128, "embedding": jnp.ones((16, 64))}


class Blocks(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def differs(one, other, factory=params, other_mesh=None, dims=(), **axes):
    """Whether two strategies make different plans."""
    first = jp.plan(factory, mesh(**axes), [one], dims=dims)
    second = jp.plan(factory, other_mesh or mesh(**axes), [other], dims=dims)
    return bool(first.diff(second))


EXPERTS = [("up", ("expert", "embed", "mlp")), ("down", ("expert", "mlp", "embed"))]


def experts():
    return {"up": jnp.ones((8, 4, 16)), "down": jnp.ones((8, 16, 4))}


def routed(dispatch):
    """Choices that are dropped if all tokens prefer one expert."""
    x = jnp.ones((8, 16, 4))
    return float(jp.experts(x, jp.route(jnp.zeros((8, 16, 8)), 1), **experts(), dispatch=dispatch)[1].sum())


def across(dispatch):
    """The same, on a mesh."""
    plan = jp.plan(experts, mesh(expert=8), [jp.EP()], dims=EXPERTS)
    x = np.ones((8, 16, 4), np.float32)
    step = plan.jit(lambda params, x: jp.experts(x, jp.route(x @ jnp.ones((4, 8)), 1), **params, dispatch=dispatch)[1])
    return float(step(plan.init(), plan.batch(x)).sum())


def loss(params, x):
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - x) ** 2)


def grads_on(strategy, precision=None, **options):
    """Gradients of one step over `data`, and what the step notes."""
    plan = jp.plan(params, jp.mesh(data=8), [strategy], precision=precision)
    step = plan.jit(lambda params, x: jp.value_and_grad(loss, **options)(params, x)[1])
    return step(plan.init(), plan.batch(X))["up"], step.notes


def calls_its_reduction():
    called = []

    def reduce(gradients, axes):
        called.append((sorted(gradients), axes))
        return {path: jax.lax.psum(gradient, axes) for path, gradient in gradients.items()}

    grads_on(jp.DP(reduce=reduce))
    return called == [(["down", "embedding", "up"], ("data",))]


def blocks_plan(**settings):
    return jp.plan(Blocks, mesh(fsdp=8), [jp.FSDP(**settings)])


def staged(one, other, axis="pipe"):
    """Whether the notes of two plans, which say what a stage holds and when it runs what, differ."""
    make = lambda: jp.Stack(lambda rngs: nnx.Linear(64, 64, rngs=rngs), 8, rngs=nnx.Rngs(0))
    plans = [
        jp.plan(make, mesh(**{name: 4, "data": 2}), [jp.DP(), each]) for name, each in (("pipe", one), (axis, other))
    ]
    return plans[0].notes != plans[1].notes


def ends_differ(one, other):
    make = lambda: gpt.GPT(gpt_config.TINY, rngs=nnx.Rngs(0))
    plans = [jp.plan(make, mesh(data=4, pipe=2), [jp.DP(), each]) for each in (one, other)]
    return plans[0].records["embed.embedding"] != plans[1].records["embed.embedding"]


TP = {"column": ["up"], "row": ["down"]}

STRATEGIES = {
    (jp.DP, "axis"): lambda: differs(jp.DP(), jp.DP(axis="copy"), data=8, other_mesh=mesh(copy=8)),
    (jp.DP, "reduce_dtype"): lambda: (
        not np.array_equal(grads_on(jp.DP())[0], grads_on(jp.DP(reduce_dtype="bfloat16"))[0])
    ),
    (jp.DP, "reduce"): calls_its_reduction,
    (jp.ZeRO, "stage"): lambda: differs(jp.ZeRO(1), jp.ZeRO(2), data=8),
    (jp.ZeRO, "axis"): lambda: differs(jp.ZeRO(1), jp.ZeRO(1, axis="copy"), data=8, other_mesh=mesh(copy=8)),
    (jp.ZeRO, "min_bytes"): lambda: differs(jp.ZeRO(1), jp.ZeRO(1, min_bytes=20_000), data=8),
    (jp.ZeRO, "reduce"): lambda: differs(jp.ZeRO(2), jp.ZeRO(2, reduce="step"), data=8),
    (jp.FSDP, "axis"): lambda: differs(jp.FSDP(), jp.FSDP(axis="shard"), fsdp=8, other_mesh=mesh(shard=8)),
    (jp.FSDP, "blocks"): lambda: bool(blocks_plan().diff(blocks_plan(blocks="blocks.*"))),
    (jp.FSDP, "remat"): lambda: bool(blocks_plan(blocks="blocks.*").diff(blocks_plan(blocks="blocks.*", remat="none"))),
    (jp.FSDP, "min_bytes"): lambda: differs(jp.FSDP(), jp.FSDP(min_bytes=20_000), fsdp=8),
    (jp.FSDP, "whole"): lambda: differs(jp.FSDP(), jp.FSDP(whole=["up"]), fsdp=8),
    (jp.FSDP, "reduce"): lambda: differs(jp.FSDP(), jp.FSDP(reduce="step"), fsdp=8),
    (jp.PP, "axis"): lambda: staged(jp.PP(microbatches=4), jp.PP(axis="stage", microbatches=4), "stage"),
    (jp.PP, "schedule"): lambda: staged(jp.PP(microbatches=4), jp.PP(schedule="gpipe", microbatches=4)),
    (jp.PP, "microbatches"): lambda: staged(jp.PP(microbatches=4), jp.PP(microbatches=8)),
    (jp.PP, "vocab"): lambda: ends_differ(jp.PP(microbatches=4), jp.PP(microbatches=4, vocab=["embed"])),
    (jp.PP, "chunks"): lambda: staged(jp.PP(microbatches=4), jp.PP(microbatches=4, chunks=2)),
    (jp.EP, "axis"): lambda: differs(jp.EP(), jp.EP(axis="e"), experts, other_mesh=mesh(e=8), dims=EXPERTS, expert=8),
    (jp.Capacity, "factor"): lambda: routed(jp.Capacity(factor=1.0)) > routed(jp.Capacity(factor=2.0)) > 0,
    (jp.Dropless, "buffer"): lambda: across(jp.Dropless(buffer=1.0)) > across(jp.Dropless()) == 0,
    (jp.TP, "axis"): lambda: differs(jp.TP(**TP), jp.TP(**TP, axis="t"), tensor=8, other_mesh=mesh(t=8)),
    (jp.TP, "column"): lambda: differs(jp.TP(row=["down"]), jp.TP(**TP), tensor=8),
    (jp.TP, "row"): lambda: differs(jp.TP(column=["up"]), jp.TP(**TP), tensor=8),
    (jp.TP, "vocab"): lambda: differs(jp.TP(**TP), jp.TP(**TP, vocab=["embedding"]), tensor=8),
    (jp.TP, "heads"): lambda: differs(jp.TP(**TP), jp.TP(**TP, heads={"up": 4}), tensor=8),
    (jp.TP, "sequence"): lambda: differs(jp.TP(**TP), jp.TP(**TP, sequence=True), tensor=8),
    (jp.CP, "axis"): lambda: differs(jp.CP(), jp.CP(axis="seq"), context=8, other_mesh=mesh(seq=8)),
    (jp.CP, "method"): lambda: differs(jp.CP(), jp.CP(method="ring"), context=8),
    (jp.CP, "balance"): lambda: differs(jp.CP(), jp.CP(balance="none"), context=8),
    (jp.CP, "heads"): lambda: differs(jp.CP(method="hybrid", heads=2), jp.CP(method="hybrid", heads=4), context=8),
    (jp.CP, "reduce"): lambda: differs(jp.CP(), jp.CP(reduce="step"), context=8),
    (jp.CP, "whole"): lambda: differs(jp.CP(), jp.CP(whole=["image"]), context=8),
}


def plan_with(**options):
    return jp.plan(params, jp.mesh(fsdp=8), [jp.FSDP()], **options)


def record_with(**precision):
    return plan_with(precision=jp.Precision(**precision)).records["up"]


def program_output(precision):
    program = recipe(precision=precision).on(jp.mesh(data=8))
    return program.eval_step(program.init(), program.plan.batch(X))["loss"].dtype


PRECISION = {
    (jp.Precision, "param"): lambda: record_with(param="bfloat16").dtype == jnp.bfloat16,
    (jp.Precision, "compute"): lambda: record_with(compute="bfloat16").compute_dtype == jnp.bfloat16,
    (jp.Precision, "reduce"): lambda: (
        not np.array_equal(grads_on(jp.DP())[0], grads_on(jp.DP(), jp.Precision(reduce="bfloat16"))[0])
    ),
    (jp.Precision, "output"): lambda: program_output(jp.Precision(output="bfloat16")) == jnp.bfloat16,
}


def recipe(**changes):
    fields = {"model": params, "loss": loss, "optimizer": optax.sgd(0.1), "strategies": [jp.DP()], "batch": X}
    return jp.Recipe(**{**fields, **changes})


def stepped(**changes):
    """Parameters and metrics after a step of the recipe."""
    changed = recipe(**changes)
    program = changed.on(jp.mesh(data=8))
    state, metrics = program.step(program.init(), program.plan.batch(changed.batch))
    values = {name: float(value) for name, value in metrics.items()}
    return np.asarray(state["model"]["up"]), values, program


def changes_step(**changes):
    before, after = stepped(), stepped(**changes)
    return not np.array_equal(before[0], after[0])


def weigh(x):
    return jnp.sum(x[:, 0] ** 2)


def evaluates_otherwise():
    program = recipe(eval_loss=lambda params, x: jnp.float32(7)).on(jp.mesh(data=8))
    return float(program.eval_step(program.init(), program.plan.batch(X))["loss"]) == 7


def refused_option():
    with pytest.raises(Exception, match="xla_no_such_option"):
        stepped(compiler_options={"xla_no_such_option": True})
    return True


RECIPE = {
    (jp.Recipe, "model"): lambda: changes_step(model=lambda: jax.tree.map(lambda leaf: 2 * leaf, params())),
    (jp.Recipe, "loss"): lambda: changes_step(loss=lambda params, x: 2 * loss(params, x)),
    (jp.Recipe, "optimizer"): lambda: changes_step(optimizer=optax.sgd(0.2)),
    (jp.Recipe, "strategies"): lambda: bool(
        recipe().on(mesh(data=8)).plan.diff(recipe(strategies=[jp.ZeRO(1)]).on(mesh(data=8)).plan)
    ),
    (jp.Recipe, "batch"): lambda: (
        "32 =" in recipe(batch=np.ones((32, 64), np.float32)).on(jp.mesh(data=8)).batch_identity
    ),
    (jp.Recipe, "eval_loss"): evaluates_otherwise,
    (jp.Recipe, "accumulate"): lambda: bool(stepped(accumulate=2)[2].train_step.notes),
    (jp.Recipe, "clip_norm"): lambda: changes_step(clip_norm=1e-3),
    (jp.Recipe, "has_aux"): lambda: (
        stepped(has_aux=True, loss=lambda params, x: (loss(params, x), {"seen": jnp.float32(3)}))[1]["seen"] == 3
    ),
    (jp.Recipe, "weight"): lambda: stepped(weight=weigh)[1]["weight"] == pytest.approx(float(np.sum(X[:, 0] ** 2))),
    (jp.Recipe, "separable"): lambda: "whole" in stepped(accumulate=2, separable=False)[2].train_step.notes[0],
    (jp.Recipe, "trainable"): lambda: changes_step(trainable=["down"]),
    (jp.Recipe, "dims"): lambda: bool(
        recipe(strategies=[jp.FSDP()])
        .on(mesh(fsdp=8))
        .plan.diff(recipe(strategies=[jp.FSDP()], dims=[("up", ("embed", None))]).on(mesh(fsdp=8)).plan)
    ),
    (jp.Recipe, "precision"): lambda: program_output(jp.Precision(output="bfloat16")) == jnp.bfloat16,
    (jp.Recipe, "compiler_options"): refused_option,
}


def stack():
    return jp.Stack(lambda rngs: nnx.Linear(64, 64, rngs=rngs), 3, rngs=nnx.Rngs(0))


def noted(**options):
    return grads_on(jp.DP(), **options)[1]


def jitted(**options):
    plan = jp.plan(params, jp.mesh(data=8), [jp.DP()])
    step = plan.jit(lambda params, x: jax.tree.map(lambda leaf: leaf + x.mean(), params), **options)
    return plan, step


def keeps_what_is_not_donated():
    plan = jp.plan(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jp.mesh(data=8), [jp.DP()])
    deleted = []
    for donate in (True, False):
        model = plan.init()
        before = model.kernel.get_raw_value()

        def grow(model):
            model.kernel[...] = model.kernel[...] + 1

        plan.jit(grow, donate=donate)(model)
        deleted.append(before.is_deleted())
    return deleted == [True, False]


def gives_away():
    plan, step = jitted(donate_argnums=0)
    before = plan.init()
    step(before, plan.batch(X))
    return before["up"].is_deleted()


def refuses_to_compile_again():
    plan, step = jitted(on_recompile="error")
    step(plan.init(), plan.batch(X))
    with pytest.raises(jp.StepError, match="compiled again"):
        step(plan.init(), plan.batch(np.concatenate([X, X])))
    return True


def refuses_an_option():
    plan, step = jitted(compiler_options={"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        step(plan.init(), plan.batch(X))
    return True


def returns_aux():
    function = jp.value_and_grad(lambda params, x: (loss(params, x), "more"), has_aux=True)
    return function(params(), X)[0][1] == "more"


def weighted_sum(accumulate):
    mean = lambda params, x: jnp.sum(x[:, 0] ** 2 * jnp.mean(x @ params["up"], axis=1)) / weigh(x)
    return jp.value_and_grad(mean, accumulate=accumulate, weight=weigh)(params(), X)[0]


def attends_otherwise(**options):
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    default, changed = (jax.jit(lambda q, of=of: jp.attention(q, q, q, **of))(q) for of in ({}, options))
    return not np.array_equal(default, changed)


def attends_by(kernel):
    q = jnp.ones((1, 4, 2, 8))
    return "custom_vjp" not in str(jax.make_jaxpr(lambda q: jp.attention(q, q, q, kernel=kernel))(q))


OPTIONS = {
    (jp.plan, "optimizer"): lambda: plan_with(optimizer=optax.adam(1e-3)).totals().optimizer is not None,
    (jp.plan, "trainable"): lambda: plan_with(trainable=["up"]).records["down"].slot == "frozen",
    (jp.plan, "dims"): lambda: bool(plan_with().diff(plan_with(dims=[("up", ("embed", None))]))),
    (jp.plan, "precision"): lambda: bool(plan_with().diff(plan_with(precision=jp.Precision(compute="bfloat16")))),
    (jp.BoundPlan.jit, "donate"): keeps_what_is_not_donated,
    (jp.BoundPlan.jit, "donate_argnums"): gives_away,
    (jp.BoundPlan.jit, "on_recompile"): refuses_to_compile_again,
    (jp.BoundPlan.jit, "compiler_options"): refuses_an_option,
    (jp.Recipe.reduced, "layers"): lambda: (
        recipe(model=stack).reduced(layers=2).on(jp.mesh(data=8)).plan.records["each.kernel"].shape[0] == 2
    ),
    (jp.Recipe.reduced, "batch_size"): lambda: recipe().reduced(batch_size=8).batch_size == 8,
    (jp.value_and_grad, "accumulate"): lambda: "replica" in noted(accumulate=2)[0],
    (jp.value_and_grad, "has_aux"): returns_aux,
    (jp.value_and_grad, "weight"): lambda: np.isclose(weighted_sum(1), weighted_sum(4)),
    (jp.attention, "positions"): lambda: attends_otherwise(positions=jnp.array([[3, 2, 1, 0]])),
    (jp.attention, "segments"): lambda: attends_otherwise(segments=jnp.array([[0, 0, 1, 1]])),
    (jp.attention, "causal"): lambda: attends_otherwise(causal=False),
    (jp.attention, "window"): lambda: attends_otherwise(window=2),
    (jp.attention, "scale"): lambda: attends_otherwise(scale=1.0),
    (jp.attention, "kernel"): lambda: attends_by("xla") and not attends_by("blockwise"),
    (jp.value_and_grad, "separable"): lambda: "whole" in noted(accumulate=2, separable=False)[0],
}

EFFECTS = STRATEGIES | PRECISION | RECIPE | OPTIONS


def test_every_setting_has_an_entry():
    settings = {
        (kind, field.name)
        for kind in (
            *(jp.DP, jp.ZeRO, jp.FSDP, jp.PP, jp.TP, jp.CP, jp.EP),
            *(jp.Capacity, jp.Dropless, jp.Precision, jp.Recipe),
        )
        for field in dataclasses.fields(kind)
    }
    settings |= {
        (function, parameter.name)
        for function in (jp.plan, jp.BoundPlan.jit, jp.Recipe.reduced, jp.value_and_grad, jp.attention)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
    }
    assert settings == set(EFFECTS)


@pytest.mark.parametrize(
    ("thing", "name"), list(EFFECTS), ids=[f"{thing.__qualname__}.{name}" for thing, name in EFFECTS]
)
def test_it_has_an_effect(thing, name):
    assert EFFECTS[thing, name]()
