"""Invariant 3: with accumulation, gradients cross each axis that replicates parameters once a step, outside every loop.

Over an axis that shards what it sums, `reduce="microbatch"` reduce-scatters in the loop and `"step"` once after it.
Here on data 2 x fsdp 2 x tensor 2, accumulate 8: a scanned GPT, its embedding tied, its loss masked.
"""

import collections

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from tests import _programs as programs

CASE = programs.CASES["gpt"]
MATRICES, VECTORS, SCALARS = 8, 3, 2  # q k v o up gate down and the embedding; three norms; the loss and its weight
TWICE = (
    1  # the tied embedding: both ends of the model are kernels of their own, and each sums its own part of the batch
)
DATA, FSDP, BOTH = ("data",), ("fsdp",), ("data", "fsdp")

# (kind, axes, in a loop): tensors. A matrix crosses fsdp as a reduce-scatter, and data as an all-reduce of its pieces.
EXPECTED = {
    "dp": {
        ("all-reduce", DATA, False): MATRICES + VECTORS + SCALARS,
        ("reduce-scatter", FSDP, True): MATRICES + TWICE,
        ("all-reduce", FSDP, True): VECTORS + SCALARS,
    },
    "dp-step": {
        ("reduce-scatter", FSDP, False): MATRICES,
        ("all-reduce", DATA, False): MATRICES,
        ("all-reduce", BOTH, False): VECTORS + SCALARS,
    },
    "zero1": {
        ("reduce-scatter", DATA, False): MATRICES,
        ("all-reduce", DATA, False): VECTORS + SCALARS,
        ("reduce-scatter", FSDP, True): MATRICES + TWICE,
        ("all-reduce", FSDP, True): VECTORS + SCALARS,
    },
    "zero2": {
        ("reduce-scatter", FSDP, True): MATRICES - 1,  # and then its pieces over data: one axis at a time
        ("reduce-scatter", DATA, True): MATRICES - 1,
        ("reduce-scatter", BOTH, True): 1 + TWICE,  # a table is summed whole
        ("all-reduce", BOTH, True): VECTORS + SCALARS,
    },
    "zero2-step": {
        ("reduce-scatter", FSDP, False): MATRICES,
        ("reduce-scatter", DATA, False): MATRICES,
        ("all-reduce", BOTH, False): VECTORS + SCALARS,
    },
}
STRATEGIES = {
    "dp": [jp.DP(), jp.FSDP()],
    "dp-step": [jp.DP(), jp.FSDP(reduce="step")],
    "zero1": [jp.DP(), jp.ZeRO(1), jp.FSDP()],
    "zero2": [jp.ZeRO(2), jp.FSDP()],
    "zero2-step": [jp.ZeRO(2, reduce="step"), jp.FSDP(reduce="step")],
}


def traffic(strategies, axes=("data", "fsdp", "tensor"), **settings):
    plan = jp.plan(CASE.make, programs.mesh(**dict.fromkeys(axes, 2)), [*strategies, jp.TP(**CASE.tensor)])
    model = plan.init()
    opt = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @plan.jit
    def step(model, opt, batch):
        loss, gradients = jp.value_and_grad(CASE.loss, accumulate=8, **settings)(model, batch)
        opt.update(model, gradients)
        return loss

    return jp.testing.collectives(step, model, opt, plan.batch({k: v[:64] for k, v in CASE.batch.items()}))


def reductions(traffic):
    """Sums over the axes of tokens, by kind, axes, and whether they are in a loop."""
    sums = [
        (each.kind, each.axes, each.depth > 0)
        for each in traffic
        if each.kind in ("all-reduce", "reduce-scatter") and set(each.axes) & {"data", "fsdp", "context"}
    ]
    return dict(collections.Counter(sums))


@pytest.mark.parametrize("name", EXPECTED)
def test_gradients_are_reduced_once(name):
    found = traffic(STRATEGIES[name])
    assert reductions(found) == EXPECTED[name], str(found)
    assert not [each for each in found if each.kind == "all-gather" and "tensor" in each.axes], str(found)
    embedding = [each for each in found if each.kind == "all-gather" and each.axes == FSDP and each.depth < 2]
    assert [each.count for each in embedding] == [1]  # used twice, gathered once, whatever accumulate is
    updates = [each for each in found if each.kind == "all-gather" and each.axes == DATA]
    assert [each.depth for each in updates] == [0] * (MATRICES if "zero" in name else 0)


def test_the_axis_of_sequences_takes_part():
    """Of parts of sequences, gradients are kept apart as of replicas; keys go round in the loops, as they must."""
    found = traffic([jp.DP(), jp.CP(method="ring", reduce="step")], axes=("data", "context", "tensor"))
    assert reductions(found) == {("all-reduce", ("data", "context"), False): MATRICES + VECTORS + SCALARS}, str(found)
    assert {each.depth for each in found if each.kind == "collective-permute"} == {2}


def test_the_naive_form_fails_this():
    """XLA does not hoist by itself: the same loss, called inseparable, is reduced in both loops."""
    found = reductions(traffic(STRATEGIES["dp"], separable=False))
    assert found != EXPECTED["dp"]
    assert sum(number for (_, axes, in_loop), number in found.items() if in_loop and "data" in axes) >= MATRICES
    assert not any("data" in axes and not in_loop for _, axes, in_loop in found)


def test_data_alone_and_a_plain_pytree():
    """Every leaf crosses once, as one all-reduce outside of the loop; nothing else moves."""
    case = programs.CASES["pytree"]
    plan = jp.plan(case.make, programs.mesh(data=8), [jp.DP()])
    step = plan.jit(jp.value_and_grad(case.loss, accumulate=4))
    found = jp.testing.collectives(step, plan.init(), plan.batch(case.batch))
    jp.testing.assert_traffic(found, {("all-reduce", "data", 0): len(jax.tree.leaves(plan.init())) + SCALARS})
    assert np.sum([each.bytes for each in found]) == 4 * (SCALARS + sum(x.size for x in jax.tree.leaves(plan.init())))
