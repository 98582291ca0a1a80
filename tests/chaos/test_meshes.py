"""One run with a pipeline and without, in one process: the short form of what `make chaos` does to meshes."""

import pytest
from flax import nnx

import jaxpar as jp
from tests import _programs as programs
from tests.chaos import program

EIGHT, PIPE = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "pipe": 2, "tensor": 2}
LEGS = [(2, EIGHT), (4, PIPE), (6, EIGHT)]


def losses(directory, stop, axes):
    """Go on with the run until `stop`; the loss by step."""
    mesh = programs.mesh(**axes)
    plan = jp.plan(lambda: program.Model(nnx.Rngs(0), layers=2), mesh, program.strategies(mesh))
    model = plan.init()
    opt = nnx.Optimizer(model, program.ADAM, wrt=nnx.Param)
    run = jp.Run(directory, writers=())
    found = {}

    @plan.jit
    def train_step(model, opt, batch):
        loss, grads = jp.value_and_grad(program.loss_fn)(model, batch)
        opt.update(model, grads)
        return loss

    with jp.data.Loader(program.Samples(), batch_size=8).to(plan) as batches:
        model, opt, batches = run.restore((model, opt, batches))
        for step in run.steps(stop):
            found[step] = float(train_step(model, opt, next(batches)))
    return found


def test_into_stages_and_back(tmp_path):
    """8 devices, then with stages, then without again: one loss curve."""
    straight = losses(tmp_path / "straight", 6, EIGHT)
    moved = {}
    for stop, axes in LEGS:
        moved |= losses(tmp_path / "moved", stop, axes)
    assert sorted(moved) == sorted(straight) == list(range(1, 7))
    for step, loss in moved.items():
        assert loss == pytest.approx(straight[step], rel=2e-5)
