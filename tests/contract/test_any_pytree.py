"""Invariant 11: {nnx module, nnx.Optimizer, (graphdef, state), Linen TrainState, Equinox, dict} x six optimisers.

Each trains two steps on fsdp 2 x tensor 2, in one compilation, equal to one device; optimiser state lies as the plan
says, and what belongs to no parameter is listed. (The kinds nnx module and nnx.Optimizer share a loop: the one is what
the other updates.)
"""

import functools as ft
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxpar as jp
from jaxpar import _tree
from tests import _programs as programs

D, F, ROWS, RATE = 64, 128, 16, 0.05
BATCH = {"x": np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32)}


def by_name(params):
    """Labels for `optax.partition`: norms and biases by one optimiser, matrices by another."""
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


# Adam's first step divides a gradient by itself; a large eps keeps the comparison to the precision of the gradient.
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(RATE, eps=1e-2),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=32),
    "muon": lambda: optax.contrib.muon(RATE, eps=1e-2),
    "partition": lambda: optax.partition(
        {"matrix": optax.sgd(RATE, 0.9), "vector": optax.adam(RATE, eps=1e-2)}, by_name
    ),
    "multi-steps": lambda: optax.MultiSteps(optax.sgd(RATE, 0.9), every_k_schedule=2),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(RATE, warmup_steps=2),
}


# ---- the same two matrices in each kind, with a loop as its users write it


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.tanh(self.up(x)))


class EquinoxNet(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(D, F, key=keys[0])
        self.down = eqx.nn.Linear(F, D, use_bias=False, key=keys[1])

    def __call__(self, x):
        return self.down(jax.nn.tanh(self.up(x)))


def make_nnx():
    return Net(rngs=nnx.Rngs(0))


def make_dict():
    keys = jax.random.split(jax.random.key(0))
    return {
        "up": {"kernel": jax.random.normal(keys[0], (D, F)) / 8, "bias": jnp.zeros(F)},
        "down": {"kernel": jax.random.normal(keys[1], (F, D)) / 11},
    }


def predict(params, x):
    return jax.nn.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


def mean_square(predict):
    return lambda model, batch: jnp.mean((predict(model, batch["x"]) - 1) ** 2)


def pytree_step(loss, tx):
    def step(params, opt_state, batch, grad):
        value, gradients = grad(loss)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step


def nnx_kind(tx, make):
    def start(model):
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, opt, batch, grad):
        value, gradients = grad(mean_square(lambda model, x: model(x)))(model, batch)
        opt.update(model, gradients)
        return (model, opt), value

    return start, step


def functional_kind(tx, make):
    """`nnx.split` by hand: the loss merges what it gets, the optimiser sees a state."""
    graphdef, _ = nnx.split(nnx.eval_shape(make))
    loss = mean_square(lambda state, x: nnx.merge(graphdef, state)(x))
    return lambda state: (state, tx.init(state)), pytree_step(loss, tx)


def linen_kind(tx, make):
    def step(state, batch, grad):
        value, gradients = grad(mean_square(predict))(state.params, batch)
        return (state.apply_gradients(grads=gradients),), value

    return lambda state: (state,), step


def equinox_kind(tx, make):
    step = pytree_step(mean_square(lambda model, x: jax.vmap(model)(x)), tx)
    return lambda model: (model, tx.init(model)), step


def dict_kind(tx, make):
    return lambda params: (params, tx.init(params)), pytree_step(mean_square(predict), tx)


KINDS = {
    "nnx.Optimizer": (lambda tx: make_nnx(), nnx_kind),
    "(graphdef, state)": (lambda tx: nnx.split(make_nnx())[1], functional_kind),
    "TrainState": (lambda tx: TrainState.create(apply_fn=predict, params=make_dict(), tx=tx), linen_kind),
    "Equinox": (lambda tx: EquinoxNet(jax.random.key(0)), equinox_kind),
    "dict": (lambda tx: make_dict(), dict_kind),
}


def loop(kind, tx, plan=None):
    """Two steps: losses, the last state, and the step; with a plan sharded, without one on one device."""
    factory, as_kind = KINDS[kind]
    make = ft.partial(factory, tx)
    start, update = as_kind(tx, make_nnx)
    grad = jp.value_and_grad if plan else (nnx.value_and_grad if kind == "nnx.Optimizer" else jax.value_and_grad)

    def train_step(*args):
        return update(*args, grad)

    model = plan.init() if plan else (nnx.jit(make)() if kind == "nnx.Optimizer" else jax.jit(make)())
    state = start(model)
    step = plan.jit(train_step) if plan else (nnx.jit if kind == "nnx.Optimizer" else jax.jit)(train_step)
    losses = []
    for _ in range(2):
        state, loss = step(*state, plan.batch(BATCH) if plan else BATCH)
        losses.append(float(loss))
    return losses, state, step


@pytest.mark.parametrize(("kind", "name"), list(itertools.product(KINDS, OPTIMIZERS)))
def test_trains_alike(kind, name):
    tx = OPTIMIZERS[name]()
    factory, _ = KINDS[kind]
    plan = jp.plan(
        ft.partial(factory, tx),
        programs.mesh(fsdp=2, tensor=2),
        [jp.FSDP(), jp.TP(column="*up", row="*down")],
        optimizer=None if kind == "TrainState" else tx,
    )
    losses, state, step = loop(kind, tx, plan)
    expected, alone, _ = loop(kind, tx)

    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    table = jp.testing.compare(arrays(state), arrays(alone), None, bound=2e-5)
    assert table.ok, str(table)
    assert step.num_compilations == 1
    for part in state:
        jp.testing.assert_sharding(part, plan)
    check_slots(plan, state)


def arrays(state):
    return {f"{index}.{path}": leaf for index, part in enumerate(state) for path, leaf in _tree.leaves(part).items()}


def check_slots(plan, state):
    """Slots of a matrix are split as the matrix is; what belongs to no parameter is whole, and the table says so."""
    records = plan.optimizer_records or {p: r for p, r in plan.records.items() if r.slot == "optimizer"}
    for path, record in records.items():
        (leaf,) = [leaf for each, leaf in arrays(state).items() if each.endswith(f".{path}")]
        whole = leaf.sharding.is_fully_replicated
        if leaf.shape in ((D, F), (F, D)):
            assert not whole, path
        if "belongs to no parameter" in record.reasons[0][1]:
            assert whole, path
        assert leaf.sharding.is_equivalent_to(plan.sharding(record.storage), leaf.ndim), path
    assert any("belongs to no parameter" in record.reasons[0][1] for record in records.values())
