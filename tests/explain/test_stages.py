"""The pipeline of a report: from the compiled program and the schedule, which says how often each branch is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar.explain import Report

WIDTH, LAYERS = 256, 4


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


def explained(mesh, m, *, rows):
    plan = jp.plan(
        lambda: jp.Stack(lambda rngs: Block(rngs=rngs), LAYERS, rngs=nnx.Rngs(0)), mesh, [jp.PP(microbatches=m)]
    )
    step = plan.jit(jp.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2)))
    batch = jax.ShapeDtypeStruct((rows * m, WIDTH), np.float32, sharding=plan.batch_sharding)
    return jp.explain(step, plan.abstract(), batch)


def test_a_step_with_stages_says_what_they_hold_send_and_wait_for():
    p, m, rows = 4, 6, 4
    report = explained(jp.mesh(pipe=p, allow_unused=True), m, rows=rows)
    found, schedule = report.pipeline, jp.schedule("1f1b", stages=p, microbatches=m)
    activation = rows * WIDTH * 4
    assert found.held == schedule.buffers.inputs.used == (6, 5, 3, 1)
    assert (found.slots, found.slot_bytes) == (7, activation)
    assert found.bubble == pytest.approx((p - 1) / (m + p - 1))
    # Forward; again in the backward, but for its last product; and two products for each.
    assert found.flops == m * (1 + 1 / 2 + 2) * (2 * 2 * 4 * WIDTH * rows * WIDTH) * LAYERS / p
    assert found.sent_bytes >= 2 * schedule.num_ticks * activation  # forth and back
    text = report.table("pipeline")
    assert "1f1b: 4 stages, 6 microbatches, 12 ticks, over pipe: bubble 33 % of the ticks" in text
    assert "stage 0" in text
    assert Report.from_json(report.to_json()).pipeline == found


def test_a_step_without_stages_has_no_such_part():
    report = jp.explain(jax.jit(lambda x: x @ x), jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert report.pipeline is None
    assert "Pipeline" not in report.table()


@pytest.mark.libtpu
def test_bubbles_have_their_time():
    """A stage computes in m ticks each way, and waits in the p - 1 more that others need."""
    p, m = 4, 4
    report = explained(jp.mesh("v5e:2x2", pipe=p), m, rows=8192)
    line = report.timeline
    total = line.compute_seconds + line.exposed_communication_seconds + line.bubble_seconds
    assert total == pytest.approx(line.step_seconds)
    products = [each for each in line.ops if each.flops]
    assert {each.count for each in products} == {m}  # a stage has as many, in more ticks
    least = sum(each.seconds * each.count for each in products)
    assert (p - 1) / m * least < line.bubble_seconds < (p - 1) / m * line.compute_seconds
    drawn = sum(event.seconds for event in line.events if event.lane == "compute")
    assert drawn == pytest.approx(line.compute_seconds, rel=0.01)


def test_flops_of_a_step_with_stages_are_those_without():
    """What a stage computes again in its backward pass is not the model's, nor is a bubble anyone's."""
    m, rows = 6, 4
    report = explained(jp.mesh(pipe=4, allow_unused=True), m, rows=rows)
    products = 2 * 2 * 4 * WIDTH * WIDTH * rows * m * LAYERS
    assert report.flops.model == 3 * products
    # The stage forward again, for the inputs of its blocks; and each block, but for its last product, by its remat.
    assert report.flops.hardware == (3 + 1 + 1 / 2) * products
