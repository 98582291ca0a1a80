"""Seeded mutants: each wrong in one way a sharding can be wrong, and killed by the assertions that guard the right one.

A mutant is one line changed in jaxpar, by `monkeypatch`. The unchanged program passes the same check in the same test,
so that what kills is the mutation.
"""

import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _bound, _context, _dropout, _grad, _planned, _reduce, _tree
from tests import _programs as programs


def weighted(params, batch):
    """Replicas and microbatches weigh differently."""
    hidden = jax.nn.gelu(batch["x"] @ params["up"]["w"] + params["up"]["b"][None])
    logits = hidden @ params["down"]["w"] + params["down"]["b"][None]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], -1)[:, 0]
    return -(chosen * batch["weight"]).sum(), batch["weight"].sum()


PLAIN = programs.CASES["pytree"]
WEIGHTS = np.linspace(0, 2, programs.ROWS).astype(np.float32)
CASE = dataclasses.replace(PLAIN, name="weighted", loss=weighted, batch={**PLAIN.batch, "weight": WEIGHTS})
ALL = {"data": 2, "fsdp": 2, "tensor": 2}


def check(case=CASE, strategies=None, axes=ALL, accumulate=2):
    strategies = strategies or [jp.DP(), jp.FSDP(), jp.TP(**case.tensor)]
    return programs.check_same(case, programs.train(case, programs.mesh(**axes), strategies, accumulate=accumulate))


def killed(what=check, **kwargs):
    with pytest.raises(AssertionError) as error:
        what(**kwargs)
    return str(error.value)


def test_without_mutation_everything_passes():
    check()


# ---- the reduction


def forget(gradient, scattered, replicas):
    """No sum: each device keeps the gradient of its own replica, and says that it is everybody's."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index(replicas) == 0, gradient, 0), replicas)


def test_missing_psum(monkeypatch):
    monkeypatch.setattr(_reduce, "_sum", forget)
    assert "FAIL  gradients" in killed()


def test_double_psum(monkeypatch):
    def twice(gradient, scattered, replicas):
        count = math.prod(jax.lax.axis_size(axis) for axis in replicas)
        return jax.lax.psum(gradient, replicas) * count

    monkeypatch.setattr(_reduce, "_sum", twice)
    assert "FAIL  gradients" in killed()


def test_mean_of_means(monkeypatch):
    """Each microbatch of each replica divided by its own weight: right only where all weigh alike."""
    honest = _grad._Job.gradients_of_sum

    def mean(self, params, state, batch):
        total, weight, aux, gradients, state = honest(self, params, state, batch)
        divisor = jnp.maximum(weight, 1)
        return total / divisor, jnp.ones_like(weight), aux, jax.tree.map(lambda g: g / divisor, gradients), state

    monkeypatch.setattr(_grad._Job, "gradients_of_sum", mean)
    message = killed()
    assert "FAIL  losses" in message
    assert "FAIL  gradients" in message
    check(PLAIN)  # every row counts alike there: this mutant needs the mask to be seen


def test_ignored_weight(monkeypatch):
    """The sum divided by the number of rows."""
    honest = _grad._Job.run

    def run(self, params, state, batch):
        total, _, aux, after = honest(self, params, state, batch)
        return total, jnp.float32(_grad._rows(batch)), aux, after

    monkeypatch.setattr(_grad._Job, "run", run)
    assert "FAIL  losses" in killed()
    assert "FAIL  losses" in killed(accumulate=1)


def test_microbatches_that_repeat_rows(monkeypatch):
    monkeypatch.setattr(_grad, "_pick", lambda batches, index: jax.tree.map(lambda leaf: leaf[0], batches))
    assert "FAIL  losses" in killed()


def test_swapped_axes(monkeypatch):
    """The batch's rows in the wrong order among devices: labels of other rows than their inputs."""
    honest = _grad._interleaved

    def swapped(batch, job, replicas, region):
        split = honest(batch, job, replicas, region)
        return {**split, "label": jnp.flip(split["label"], axis=1)}

    monkeypatch.setattr(_grad, "_interleaved", swapped)
    assert "FAIL  losses" in killed()


def test_parameters_over_swapped_axes(monkeypatch):
    """Specs that swap fsdp and tensor give the same numbers: what kills is the placement."""
    case = programs.CASES["mlp"]
    strategies = [jp.DP(), jp.FSDP(), jp.TP(**case.tensor)]
    plan = jp.plan(case.make, programs.mesh(**ALL), strategies)
    swap = {"fsdp": "tensor", "tensor": "fsdp"}
    swapped = dataclasses.replace(
        plan,
        records={
            path: dataclasses.replace(
                record, storage=jax.P(*[swap.get(axis, axis) if axis else axis for axis in record.storage])
            )
            for path, record in plan.records.items()
        },
    )
    jp.testing.assert_sharding(plan.init(), plan)
    assert "are not placed as expected" in killed(jp.testing.assert_sharding, tree=swapped.init(), mesh=plan)


# ---- random numbers


def test_repeated_dropout_mask(monkeypatch):
    """Each replica numbers its own rows from 0: masks repeat, as nnx.Dropout's would."""

    def loss(params, batch):
        hidden = jp.dropout(batch["x"] @ params["up"]["w"], 0.5, key=jax.random.key(1), ids=batch["sample"])
        return programs.of_classes(hidden @ params["down"]["w"], batch)

    ids = np.arange(programs.ROWS, dtype=np.int32)
    case = dataclasses.replace(PLAIN, name="masked", loss=loss, batch={**PLAIN.batch, "sample": ids}, is_narrow=True)
    strategies = [jp.DP(), jp.FSDP(), jp.TP(**case.tensor)]
    check(case, strategies)
    honest = _dropout.dropout
    here = lambda x, rate, *, key, ids: honest(x, rate, key=key, ids=jnp.arange(len(ids)))
    monkeypatch.setattr(jp, "dropout", here)
    assert "FAIL  losses" in killed(case=case, strategies=strategies)


# ---- plans


def test_stale_plan(monkeypatch):
    """The plan is no part of JAX's trace key: a helper that the user jitted keeps the layout of the first plan."""

    @jax.jit
    def helper(x):
        return jp.constrain(jnp.sin(x), "batch", "mlp")

    def specs():
        for strategy in (jp.TP(column="w"), jp.FSDP(axis="tensor")):
            plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, programs.mesh(data=4, tensor=2), [jp.DP(), strategy])
            text = plan.jit(helper).lower(plan.batch(np.ones((16, 64), np.float32))).as_text()
            yield next(line.partition("<@mesh")[2] for line in text.splitlines() if "sharding_constraint" in line)

    def assert_each_its_own():
        first, second = specs()
        assert '[{"data"}, {"tensor"}]' in first
        assert '[{"data", "tensor"}, {}]' in second

    assert_each_its_own()
    jax.clear_caches()
    alike = {"__hash__": lambda self: 0, "__eq__": lambda self, other: isinstance(other, _context.Region)}
    for name, method in alike.items():
        monkeypatch.setattr(_planned.Traced, name, method)
    killed(assert_each_its_own)
    jax.clear_caches()


def test_unsharded_optimizer(monkeypatch):
    """Slots whole on every device: the numbers are right, the memory is not."""

    case, tx = programs.CASES["mlp"], optax.adam(1e-3)

    def state():
        plan = jp.plan(case.make, programs.mesh(data=8), [jp.ZeRO(1)], optimizer=tx)
        model = plan.init()
        opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = plan.jit(lambda model, opt, batch: opt.update(model, nnx.grad(case.loss)(model, batch)) and None)
        step(model, opt, plan.batch(case.batch))
        return {"opt": opt, "plan": plan}

    def assert_sharded(opt, plan):
        (slot,) = [leaf for path, leaf in _tree.leaves(opt).items() if path.endswith("mu.up.kernel")]
        assert slot.sharding.spec == jax.P(None, "data")
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in _tree.leaves(opt).values())
        assert held == plan.totals().optimizer + 4  # and nnx's count of steps

    assert_sharded(**state())
    honest = _bound.Matcher.match

    def whole(self, path, shape):
        found = honest(self, path, shape)
        return found and dataclasses.replace(found, slots=found.storage)

    monkeypatch.setattr(_bound.Matcher, "match", whole)
    killed(ft.partial(assert_sharded, **state()))


def test_parameters_read_as_stored(monkeypatch):
    """No gather where a parameter is read: the numbers stay right. The step itself kills it, before anything runs."""
    case = programs.CASES["mlp"]
    plan = jp.plan(case.make, programs.mesh(fsdp=8), [jp.FSDP(min_bytes=0)])
    monkeypatch.setattr(_planned._Move, "forward", lambda self, value: value)
    with pytest.raises(jp.StepError, match="none of the 2 sharded parameters is read through the plan"):
        plan.jit(jp.value_and_grad(case.loss)).lower(plan.init(), plan.batch(case.batch))
