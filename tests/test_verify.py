"""`jp.verify`: what is right passes, leaf by leaf; what is wrong is caught, and named."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxpar as jp

X = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def loss_fn(model, x):
    return jnp.mean((model(x) - x) ** 2)


def planned(*strategies, **axes):
    return jp.plan(lambda: Model(nnx.Rngs(0)), jp.mesh(**axes), strategies)


def stepped(plan, transform, loss=None):
    model = plan.init()
    opt = nnx.Optimizer(model, transform, wrt=nnx.Param)
    loss = loss or jp.value_and_grad(loss_fn, accumulate=2)

    @plan.jit
    def train_step(model, opt, x):
        value, grads = loss(model, x)
        opt.update(model, grads)
        return value

    return train_step, model, opt


TP = jp.TP(column=["up"], row=["down"])


def test_a_right_step_passes_and_nothing_changes():
    plan = planned(jp.DP(), jp.FSDP(), TP, data=2, fsdp=2, tensor=2)
    train_step, model, opt = stepped(plan, optax.adamw(1e-3))
    before = np.asarray(model.up.kernel[...])

    found = jp.verify(train_step, model, opt, plan.batch(X))

    assert found.ok
    groups = {row.group for row in found.rows}
    assert groups == {"outputs", "gradients", "updates"}
    gradients = {row.path for row in found.rows if row.group == "gradients"}
    assert {path.rpartition("kept.")[2] for path in gradients} == {
        f"{layer}.{leaf}" for layer in ("up", "down") for leaf in ("kernel", "bias")
    }
    np.testing.assert_array_equal(before, model.up.kernel[...])
    assert "float64 on one device" in str(found)


def test_a_forgotten_sum_is_caught_and_named():
    plan = planned(jp.DP(reduce=lambda grads, axes: {p: jax.lax.pmean(g, axes) for p, g in grads.items()}), data=8)
    train_step, model, opt = stepped(plan, optax.adamw(1e-3))

    found = jp.verify(train_step, model, opt, plan.batch(X))

    assert not found.ok
    assert found.worst.group == "gradients"
    assert {row.group for row in found.rows if not row.ok} == {"gradients"}  # the optimiser itself is right
    with pytest.raises(jp.ShardingError, match="differs from one device"):
        found.check()


def test_a_bfloat16_plan_is_compared_in_float32():
    plan = jp.plan(lambda: Model(nnx.Rngs(0)), jp.mesh(fsdp=8), [jp.FSDP()], precision=jp.Precision(compute="bfloat16"))
    train_step, model, opt = stepped(plan, optax.sgd(1e-2), nnx.value_and_grad(loss_fn))
    found = jp.verify(train_step, model, opt, plan.batch(X))
    assert found.ok
    assert max(row.allowed for row in found.rows if row.group == "gradients") < 1e-4


def test_a_train_state():
    plan = jp.plan(lambda: {"params": {"w": jnp.ones((64, 64)) / 64}}, jp.mesh(fsdp=4, tensor=2), [
        jp.FSDP(), jp.TP(column=["*.w"])])  # fmt: skip
    params = plan.init()["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))

    @plan.jit
    def train_step(state, x):
        loss, grads = jp.value_and_grad(lambda params, x: jnp.mean((x @ params["w"] - x) ** 2))(state.params, x)
        return state.apply_gradients(grads=grads), loss

    found = jp.verify(train_step, state, plan.batch(X))
    assert found.ok
    assert {row.group for row in found.rows} == {"outputs", "gradients", "updates"}


def recipe(**changes):
    fields = {
        "model": lambda: Model(nnx.Rngs(0)),
        "loss": loss_fn,
        "optimizer": optax.adamw(1e-3),
        "strategies": [jp.ZeRO(1)],
        "batch": jax.ShapeDtypeStruct((16, 64), jnp.float32),
        "clip_norm": 1.0,
    }
    return jp.Recipe(**{**fields, **changes})


def test_a_program_with_values_of_its_own():
    assert jp.verify(recipe().on(jp.mesh(data=8))).ok


def test_a_pytree_program():
    loss = lambda params, x: jnp.mean((x @ params["w"] - x) ** 2)
    program = recipe(model=lambda: {"w": jnp.ones((64, 64)) / 64}, loss=loss).on(jp.mesh(data=8))
    assert jp.verify(program, program.plan.batch(X)).ok


def test_a_hidden_optimiser_is_said(caplog):
    plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=8), [jp.DP()])

    @plan.jit
    def train_step(params, x):
        grads = jp.value_and_grad(lambda params, x: jnp.mean((x @ params["w"]) ** 2))(params, x)[1]
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    with caplog.at_level(logging.WARNING, logger="jaxpar"):
        found = jp.verify(train_step, plan.init(), plan.batch(X))
    assert found.ok
    assert "its optimiser is not among its arguments" in caplog.text


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch):
    program = recipe().on(jp.mesh(data=8))
    from jaxpar import _mesh

    small = dataclasses.replace(_mesh.hardware_of(program.plan.mesh).chip, memory=1000)
    hardware = dataclasses.replace(_mesh.hardware_of(program.plan.mesh), chip=small)
    monkeypatch.setattr(_mesh, "hardware_of", lambda mesh: hardware)
    with pytest.raises(
        jp.ShardingError, match=r"verifying needs about .* KiB on one device .* which has 1000 B"
    ) as error:
        jp.verify(program)
    assert "Verify a reduced recipe" in str(error.value)


def test_only_steps_can_be_verified():
    with pytest.raises(jp.StepError, match=r"not a function. Write plan.jit\(step\)"):
        jp.verify(lambda x: x, 1)
