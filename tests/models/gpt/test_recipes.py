import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar._errors import ShardingError
from models import gpt
from models.gpt import config

ALL = [
    "gpt2_small",
    "gpt2_medium",
    "gpt2_large",
    "gpt2_xl",
    "llama_1b",
    "llama_7b",
    "llama_8b",
    "llama_13b",
    "llama_34b",
    "llama_70b",
]


def batch_like(spec, vocab_size, seed=0):
    """Text with something to learn: each token is near the one before. Two segments a row, some tokens masked."""
    random = np.random.default_rng(seed)
    rows, seq = spec["tokens"].shape
    text = (np.cumsum(random.integers(0, 3, (rows, seq + 1)), axis=1) % vocab_size).astype(np.int32)
    half = np.arange(seq) >= seq // 2
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "positions": np.broadcast_to(np.arange(seq) - half * (seq // 2), (rows, seq)).astype(np.int32),
        "segments": np.broadcast_to(half, (rows, seq)).astype(np.int32),
        "weights": (random.random((rows, seq)) > 0.2).astype(np.float32),
        "sample": np.arange(rows, dtype=np.int32),
    }


UNEVEN = {"gpt2_small": 12, "gpt2_large": 20, "gpt2_xl": 25}  # heads


@pytest.mark.parametrize("name", UNEVEN)
def test_heads_that_do_not_divide_are_an_error(name):
    with pytest.raises(ShardingError, match=rf"attn\.q\.kernel: dim 1 is {UNEVEN[name]} heads, but axis 'tensor' has "):
        getattr(gpt, name)().on(jp.mesh("v5e:8x16", fsdp=16, tensor=8))


@pytest.mark.parametrize("name", [name for name in ALL if name not in UNEVEN])
def test_every_other_size_has_a_plan_on_a_pod(name):
    """Every matrix divides over 16 × 8 chips, the vocabulary too."""
    plan = getattr(gpt, name)().on(jp.mesh("v5e:8x16", fsdp=16, tensor=8)).plan
    matrices = [record for record in plan.records.values() if record.path.endswith(("kernel", "embedding"))]
    assert matrices
    assert all("fsdp" in str(record.storage) and "tensor" in str(record.storage) for record in matrices)


CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("changes", "accumulate", "axes"),
    [
        ({}, 1, CUBE),
        ({"dropout": 0.2}, 4, CUBE),
        ({"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "tied": False}, 2, CUBE),
        ({"num_kv_heads": 2}, 1, {"fsdp": 2, "tensor": 4}),
        ({"num_kv_heads": 1, "bias": True}, 2, {"data": 2, "tensor": 4}),
    ],
    ids=["llama", "dropout-accumulated", "gpt2-untied", "2 kv heads of 4", "1 kv head of 4"],
)
def test_a_step_is_that_of_one_device(changes, accumulate, axes):
    """Loss and gradient norm, on eight devices and on one: same initial values, same masks."""
    cfg = dataclasses.replace(config.TINY, max_positions=16, **changes)
    recipe = gpt.recipe(cfg, batch=16, accumulate=accumulate, learning_rate=1e-2, warmup=1, steps=100)
    batch = batch_like(recipe.batch, cfg.vocab_size)

    @nnx.jit
    def single(model, batch):
        def mean(model):
            total, weight = gpt.loss(model, batch)
            return total / weight

        value, grads = nnx.value_and_grad(mean)(model)
        return value, sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)) ** 0.5

    loss, norm = single(recipe.model(), batch)
    program = recipe.on(jp.mesh(**axes))
    state, metrics = program.step(program.init(), program.plan.batch(batch))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert program.step(state, program.plan.batch(batch))[1]["loss"] < loss


def test_few_key_heads_are_made_whole_and_move_nothing_forward():
    """Two of them for four devices, which were halves of a head before, exchanged in every layer."""
    recipe = gpt.tiny(batch=8)
    plan = recipe.on(jp.mesh(fsdp=2, tensor=4)).plan
    keys = plan.records["blocks.each.attn.k.kernel"]
    assert (keys.compute, keys.role) == (jax.P(), "shared")
    assert "TP: whole: 2 heads for tensor=4, all of them on each device" in plan.table()
    (moved,) = [move for move in plan.moves(keys) if move.what == "activation"]
    assert (moved.kind, moved.axes, moved.bytes) == ("all-reduce", ("tensor",), 4 * config.TINY.head_dim * 2)

    batch = plan.batch(batch_like(recipe.batch, config.TINY.vocab_size))
    found = jp.testing.collectives(plan.jit(recipe.loss), plan.init(), batch)
    over_tensor = [each for each in found if any("tensor" in axis for axis in each.axes)]
    assert {each.kind for each in over_tensor} == {"all-reduce"}, str(found)
    found = jp.testing.collectives(plan.jit(jp.value_and_grad(recipe.loss)), plan.init(), batch)
    assert {each.kind for each in found} == {"all-reduce", "all-gather", "reduce-scatter"}, str(found)


def test_vectors_do_not_decay():
    """With a gradient of zero everywhere, a step shrinks matrices and leaves norms and biases alone."""
    cfg = dataclasses.replace(config.TINY, bias=True)
    recipe = gpt.recipe(cfg, batch=2, warmup=1)

    @jax.jit
    def update():
        params = nnx.state(recipe.model(), nnx.Param)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return recipe.optimizer.update(zeros, recipe.optimizer.init(params), params)[0]

    updates = update()
    still = {"scale", "bias"}
    for path, update in nnx.to_flat_state(updates):
        assert bool((update[...] == 0).all()) == (path[-1] in still), path
