"""A pipeline computes what one device computes, moves what it must, and holds what its schedule says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import pipeline
from jaxpar.testing import assert_same, collectives

LAYERS, WIDTH, VOCAB, SEQ = 8, 6, 10, 3


def embed(ends, batch):
    return ends["table"][batch["tokens"]]


def block(layer, x, batch):
    return x + jnp.tanh(x @ layer["up"] + batch["shift"]) @ layer["down"]


def loss(ends, x, batch):
    """Tied to the embedding, and weighted, so that a mean of means is another number."""
    logits = x @ ends["table"].T
    picked = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    weights = batch["weights"]
    return ((jax.nn.logsumexp(logits, -1) - picked) * weights).sum(), weights.sum()


MODEL = pipeline.Model(embed=embed, block=block, loss=loss)


@jax.value_and_grad
def _on_one_device(parameters, batch):
    ends, blocks = parameters
    x = jax.lax.scan(lambda x, layer: (block(layer, x, batch), None), embed(ends, batch), blocks)[0]
    total, weight = loss(ends, x, batch)
    return total / weight


def on_one_device(ends, blocks, batch):
    return _on_one_device((ends, blocks), batch)


def arguments(rows, width=WIDTH, seq=SEQ):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
    ends = {"table": normal(VOCAB, width)}
    blocks = {"up": normal(LAYERS, width, 2 * width), "down": normal(LAYERS, 2 * width, width)}
    batch = {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, seq))),
        "labels": jnp.asarray(rng.integers(0, VOCAB, (rows, seq))),
        "weights": jnp.asarray(rng.uniform(size=(rows, seq)), jnp.float32),
        "shift": normal(rows, seq, 1),
    }
    return ends, blocks, batch


def mesh(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


# schedule, stages, microbatches (below, at and above the stages), chunks, replicas, rows of a microbatch on a replica
# (where stages divide them, each computes the ends for its part); 8 devices, less in two cases
CASES = [
    ("1f1b", 4, 5, 2, 2, 1),
    ("gpipe", 2, 3, 2, 4, 4),
    ("1f1b", 8, 3, 1, 1, 1),
    ("gpipe", 4, 4, 1, 2, 4),
    ("1f1b", 1, 2, 1, 2, 1),
    ("1f1b", 2, 1, 1, 1, 2),
]


@pytest.mark.parametrize(("name", "p", "m", "v", "replicas", "rows"), CASES, ids=str)
def test_it_computes_what_one_device_computes(name, p, m, v, replicas, rows):
    schedule = jp.schedule(name, stages=p, microbatches=m, chunks=v)
    run = pipeline.value_and_grad(MODEL, schedule, mesh(data=replicas, pipe=p), replicas=("data",))
    assert_same(jax.jit(run), on_one_device, arguments(rows * m * replicas), grads=False)


def test_a_schedule_of_ones_own_runs():
    """The order of separate programs, which no named schedule has; on an axis of another name."""
    schedule = jp.Schedule.of_orders(["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"])
    run = pipeline.value_and_grad(MODEL, schedule, mesh(stage=2), axis="stage")
    assert_same(jax.jit(run), on_one_device, arguments(3), grads=False)


def test_bfloat16_runs_and_adds_up_in_float32():
    """XLA on CPU aborts on a sum in bfloat16 in a region that is manual over some axes only."""
    arguments_32 = arguments(6)
    arguments_16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arguments_32)
    schedule = jp.schedule("1f1b", stages=2, microbatches=3)
    value, gradients = jax.jit(pipeline.value_and_grad(MODEL, schedule, mesh(data=2, pipe=2), replicas=("data",)))(
        *arguments_16
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradients)} == {"float32"}
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    assert float(value) == pytest.approx(float(on_one_device(*arguments_32)[0]), rel=2**-7)


def test_beside_fsdp_and_tensor_parallelism():
    """These axes are the compiler's; and it makes no permute in a branch that only some stages take."""
    here = mesh(pipe=2, fsdp=2, tensor=2)
    ends, blocks, batch = arguments(4)
    specs = {"up": P("pipe", "fsdp", "tensor"), "down": P("pipe", "tensor", "fsdp")}
    placed = {name: jax.device_put(blocks[name], NamedSharding(here, spec)) for name, spec in specs.items()}
    run = jax.jit(pipeline.value_and_grad(MODEL, jp.schedule("1f1b", stages=2, microbatches=2), here))
    assert_same(run, on_one_device, (ends, placed, batch), grads=False)
    assert not [each for each in collectives(run, ends, placed, batch, mesh=here) if permutes_in_a_branch(each)]


def permutes_in_a_branch(each):
    return each.kind == "collective-permute" and each.conditional


def test_two_permutes_a_tick_and_one_reduction_a_step():
    p, m = 4, 6
    here = mesh(data=2, pipe=p)
    schedule = jp.schedule("1f1b", stages=p, microbatches=m)
    run = jax.jit(pipeline.value_and_grad(MODEL, schedule, here, replicas=("data",)))
    found = collectives(run, *arguments(m * 2), mesh=here)
    permutes = [each for each in found if each.kind == "collective-permute"]
    assert [each.axes for each in permutes] == [("pipe",)] * 2
    assert [each.count for each in permutes] == [schedule.num_ticks] * 2
    assert not [each for each in permutes if each.conditional]
    over_data = [each for each in found if "data" in each.axes]
    assert {each.kind for each in over_data} == {"all-reduce"}
    assert all(each.depth == 0 for each in over_data)
    assert {each.kind for each in found} == {"collective-permute", "all-reduce"}


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("gpipe", 2)])
def test_bubbles_are_not_computed(name, v):
    """Every block runs once forward and once again in its backward, for each microbatch, and never in a bubble."""
    p, m, runs = 4, 5, []

    def counted(layer, x, batch):
        jax.debug.callback(lambda _: runs.append(1), x.ravel()[0])  # of `x`, or it would be taken out of the loop
        return block(layer, x, batch)

    model = dataclasses.replace(MODEL, block=counted)
    schedule = jp.schedule(name, stages=p, microbatches=m, chunks=v)
    jax.block_until_ready(jax.jit(pipeline.value_and_grad(model, schedule, mesh(pipe=p)))(*arguments(m)))
    jax.effects_barrier()
    assert len(runs) == 2 * m * LAYERS


REFUSED = {
    "axis": (("1f1b", 4, 4, 1), {"pip": 4}, 4, "the mesh has no axis 'pipe'; it has {'pip': 4}."),
    "stages": (
        ("1f1b", 4, 4, 1),
        {"pipe": 2},
        4,
        "the schedule has 4 stages, but axis 'pipe' has size 2. Use stages=2",
    ),
    "weights apart": (("zb-h1", 2, 2, 1), {"pipe": 2}, 2, "computes gradients of weights apart (W)."),
    "layers": (
        ("1f1b", 2, 2, 3),
        {"pipe": 2},
        2,
        "8 layers do not divide into 2 stages of 3 chunks. Use 6 or 12 layers",
    ),
    "rows": (
        ("1f1b", 2, 4, 1),
        {"pipe": 2},
        6,
        "a batch of 6 rows does not divide into 4 microbatches. Use 4 or 8 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_divide_is_refused_before_compilation(case):
    (name, p, m, v), axes, rows, message = REFUSED[case]
    schedule = jp.schedule(name, stages=p, microbatches=m, chunks=v)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(pipeline.value_and_grad(MODEL, schedule, mesh(**axes)), *arguments(rows))
    assert message in str(caught.value)
