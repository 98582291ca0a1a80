import functools as ft
import pathlib

import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from models import mlp

STEPS = 20


@ft.cache
def single_device_losses():
    """The same training, with nothing of jaxpar in it but the model's own `constrain`."""
    recipe = mlp.mlp()
    model = recipe.model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def mean(model):
            total, weight = mlp.loss(model, batch)
            return total / weight

        loss, grads = nnx.value_and_grad(mean)(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, mlp.batches(64, seed))) for seed in range(STEPS)]


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_it_learns_the_same_on_every_mesh(axes):
    program = mlp.mlp().on(jp.mesh(**axes))
    state, losses = program.init(), []
    for seed in range(STEPS):
        state, metrics = program.step(state, program.plan.batch(mlp.batches(64, seed)))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, single_device_losses(), rtol=1e-5)
    assert losses[0] > 2.5
    assert losses[-1] < 0.2


def test_it_stays_the_smallest_complete_example():
    assert len(pathlib.Path(mlp.__file__).read_text().splitlines()) < 60
