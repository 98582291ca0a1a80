"""Seeded mistakes, each of which the assertions that guard the numbers must notice.

Every case first passes as the code is, then fails with the mistake put in: a check that cannot fail proves nothing.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _constrain, _context, _grad, _reduce, _slots, _traits, testing

ROWS = 16
DRAW = np.random.default_rng(0)
BATCH = {
    "x": DRAW.normal(size=(ROWS, 64)).astype(np.float32),
    "weights": (np.arange(ROWS) % 5 + 1).astype(np.float32),  # uneven over microbatches and replicas
    "sample": np.arange(ROWS, dtype=np.int32),
}


class Model(nnx.Module):
    def __init__(self, rngs, own_dropout):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if own_dropout else None

    def __call__(self, batch):
        hidden = nnx.gelu(self.up(batch["x"]))
        if self.dropout is None:
            hidden = jp.dropout(hidden, 0.5, key=jax.random.key(1), ids=batch["sample"])
        else:
            hidden = self.dropout(hidden)
        return self.down(hidden)


def loss_fn(model, batch):
    losses = jnp.sum((model(batch) - batch["x"]) ** 2, axis=-1)
    return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])


def grads_of(model, batch, accumulate):
    value, grads = jp.value_and_grad(loss_fn, accumulate=accumulate)(model, batch)
    return {"loss": value, "grads": nnx.to_pure_dict(grads)}


def agrees(*, own_dropout=False, **axes):
    """Loss and gradients on a mesh are those of one device, leaf by leaf."""
    strategies = [jp.DP(), jp.FSDP(reduce="step"), jp.TP(column=["up"], row=["down"])]
    plan = jp.plan(lambda: Model(nnx.Rngs(0), own_dropout), jp.mesh(**axes), strategies)
    step = plan.jit(lambda model, batch: grads_of(model, batch, 2))
    sharded = step(plan.init(), plan.batch(BATCH))
    return testing.compare(sharded, reference(own_dropout), None).ok


def reference(own_dropout):
    """One device, no plan; made before a mistake is put in."""
    return REFERENCES[own_dropout]


@pytest.fixture(scope="module", autouse=True)
def references():
    for own_dropout in (False, True):
        model = nnx.jit(lambda own=own_dropout: Model(nnx.Rngs(0), own))()
        REFERENCES[own_dropout] = jax.tree.map(np.asarray, nnx.jit(lambda model: grads_of(model, BATCH, 2))(model))


REFERENCES: dict[bool, dict] = {}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_as_it_is():
    assert agrees(**MESH)
    assert agrees(own_dropout=True, data=8)


def only_the_first(gradient, scattered, replicas):
    first = jnp.all(jnp.stack([jax.lax.axis_index(axis) == 0 for axis in replicas]))
    return SUM(jnp.where(first, gradient, 0 * gradient), scattered, replicas)


def twice(gradient, scattered, replicas):
    return 2.0 * SUM(gradient, scattered, replicas)


def of_means(gradient, scattered, replicas):
    return SUM(gradient, scattered, replicas) / jax.lax.axis_size(replicas)


def over_other_axes(gradient, scattered, replicas):
    return SUM(gradient, scattered, ("tensor", *replicas[1:]))


SUM = _reduce._sum


@pytest.mark.parametrize("mistake", [only_the_first, twice, of_means, over_other_axes])
def test_a_wrong_sum_is_noticed(mistake, monkeypatch):
    """A missing reduction, a double one, a mean, and one over the wrong axes."""
    monkeypatch.setattr(_reduce, "_sum", mistake)
    assert_noticed(lambda: agrees(**MESH))


def test_an_ignored_weight_is_noticed(monkeypatch):
    monkeypatch.setattr(_grad, "_as_weight", lambda weight, total: jnp.asarray(float(ROWS), jnp.float32))
    assert_noticed(lambda: agrees(**MESH))


def test_a_mean_of_means_is_noticed(monkeypatch):
    run = _grad._Job.run

    def of_means(self, params, state, batch):
        total, weight, aux, after = run(self, params, state, batch)
        return total / weight, jnp.ones_like(weight), aux, after

    monkeypatch.setattr(_grad._Job, "run", of_means)
    assert_noticed(lambda: agrees(**MESH))


def test_a_repeated_mask_is_noticed(monkeypatch):
    """Replicas that draw the same dropout mask, as `vmap` gives them unless the loss's traits forbid it."""
    traits_of = _traits.traits_of
    blind = lambda *args: dataclasses.replace(traits_of(*args), repeats_random=False, changes_state=False)
    monkeypatch.setattr(_traits, "traits_of", blind)
    assert_noticed(lambda: agrees(own_dropout=True, data=8))


def assert_noticed(check):
    """Other numbers, or an error of JAX's own: either way the mistake does not pass."""
    try:
        passed = check()
    except Exception:
        return
    assert not passed


@jax.jit
def helper(x):
    return jp.constrain(jnp.tanh(x), "batch", "mlp")


def constraints_in_helper():
    """How many constraints a helper that was jitted once has under a plan, after a call without one."""
    plan = jp.plan(lambda: Model(nnx.Rngs(0), False), jp.mesh(tensor=8), [jp.TP(column=["up"], row=["down"])])
    x = jnp.ones((8, 64))
    jax.make_jaxpr(helper)(x)
    with _context.entered(_context.Region(plan=plan)):
        return str(jax.make_jaxpr(helper)(x)).count("sharding_constraint")


def test_a_stale_plan_is_noticed(monkeypatch):
    """A plan in an ordinary variable is not part of JAX's trace cache: the helper keeps no constraint, in silence."""
    helper.clear_cache()
    assert constraints_in_helper() == 1

    held = [None]

    @contextlib.contextmanager
    def entered(region):
        held[0], before = region, held[0]
        yield
        held[0] = before

    monkeypatch.setattr(_context, "entered", entered)
    monkeypatch.setattr(_context, "current", lambda: held[0])
    assert _constrain._context is _context
    helper.clear_cache()
    assert constraints_in_helper() == 0


def optimizer_is_sharded():
    """What one device holds of AdamW's state is what the plan says."""
    transform = optax.adamw(1e-3)
    plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=8), [jp.ZeRO(1)], optimizer=transform)
    state = plan.make(transform.init, plan.init())
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    return held == plan.totals().optimizer == 2 * 64 * 64 * 4 // 8 + 4


def test_an_unsharded_optimiser_is_noticed(monkeypatch):
    assert optimizer_is_sharded()
    match = _slots.Matcher.match

    def whole(self, path, shape):
        found = match(self, path, shape)
        return found and dataclasses.replace(found, slots=found.storage)

    monkeypatch.setattr(_slots.Matcher, "match", whole)
    assert not optimizer_is_sharded()
