"""Each model of the folder: a golden loss, published sizes, and (`make matrix`) that its recipe learns on every mesh.

That strategies change no number is in tests/contract/test_models.py.
"""

import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from models import bert, data, moe, resnet, vit
from models.bert import config as bert_config
from models.moe import config as moe_config
from models.resnet import config as resnet_config
from models.vit import config as vit_config
from tests import _programs as programs

FIRST = {"moe": 5.571298122406006, "bert": 5.584005832672119, "vit": 2.346907615661621, "resnet": 2.388545274734497}
"""The loss of the first batch, in nats, by one device."""

MESHES = {
    "moe": [{"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}, {"expert": 8}, {"data": 4, "tensor": 2}],
    "bert": [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}],
    "vit": [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}],
    "resnet": [{"data": 4, "fsdp": 2}, {"data": 8}, {"fsdp": 8}],
}
MODELS = {"moe": moe, "bert": bert, "vit": vit, "resnet": resnet}
STEPS = 20


@ft.cache
def recipe_of(name, accumulate=1):
    return dataclasses.replace(MODELS[name].tiny(), accumulate=accumulate)


@ft.cache
def loader_of(name):
    recipe = recipe_of(name)
    if name in ("vit", "resnet"):
        return jp.data.Loader(data.digits()[0], batch_size=recipe.batch_size)
    return jp.data.Loader(data.text()[0], batch_size=recipe.batch_size, seq_len=recipe.batch["tokens"].shape[1])


def batch_of(name, index):
    """Real data, but for the first batch of text: the standard library's sources differ between Pythons."""
    if name in ("vit", "resnet") or index:
        return loader_of(name).batch(index)
    random = np.random.default_rng(0)
    rows, seq = recipe_of(name).batch["tokens"].shape
    text = (np.cumsum(random.integers(0, 3, (rows, seq + 1)), axis=1) % 256).astype(np.int32)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq)),
        "segments": np.zeros((rows, seq), np.int32),
        "weights": (random.random((rows, seq)) > 0.2).astype(np.float32),
        "sample": np.arange(rows, dtype=np.int32),
    }


def mean_of(recipe, model, batch):
    found = recipe.loss(model, batch)
    total, weight = found[0] if recipe.has_aux else found
    return total / weight


@ft.cache
def alone(name):
    """Loss and gradient norm of the first batch, by plain JAX on one device."""
    recipe, batch = recipe_of(name), batch_of(name, 0)

    @nnx.jit
    def step(model, batch):
        value, grads = nnx.value_and_grad(lambda model: mean_of(recipe, model, batch))(model)
        return value, sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)) ** 0.5

    value, norm = step(nnx.jit(recipe.model)(), batch)
    return float(value), float(norm)


def check(name, axes, accumulate=1, strategies=None, steps=STEPS):
    recipe = recipe_of(name, accumulate)
    if strategies is not None:
        recipe = dataclasses.replace(recipe, strategies=strategies)
    program = recipe.on(programs.mesh(**axes))
    state, losses = program.init(), []
    for index in range(steps):
        state, metrics = program.step(state, program.plan.batch(batch_of(name, index)))
        losses.append(float(metrics["loss"]))
        if index == 0 and (accumulate == 1 or recipe.separable):
            value, norm = alone(name)
            np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert program.train_step.num_compilations == 1
    assert steps < STEPS or np.mean(losses[-3:]) < losses[0] - 0.3, losses
    return program, state, metrics


@pytest.mark.parametrize("name", MODELS)
def test_the_first_loss_is_what_it_was(name):
    recipe = recipe_of(name)
    first = jax.jit(lambda batch: mean_of(recipe, recipe.model(), batch))(batch_of(name, 0))
    np.testing.assert_allclose(first, FIRST[name], rtol=1e-5)


def test_a_recipe_keeps_the_state_of_its_model():
    """The residual network's statistics go with the step, whose first loss and gradients are one device's."""
    _, state, _ = check("resnet", MESHES["resnet"][0], steps=1)
    assert any((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(nnx.state(state["model"], nnx.BatchStat)))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "axes", "accumulate"),
    [(name, axes, accumulate) for name, meshes in MESHES.items() for axes in meshes for accumulate in (1, 2)],
    ids=str,
)
def test_it_learns_its_small_real_data_on_every_mesh(name, axes, accumulate):
    check(name, axes, accumulate)


@pytest.mark.matrix
def test_images_split_by_rows_have_the_same_numbers():
    """Neighbours exchange the rows that a convolution reaches, and batch statistics are those of the whole batch."""
    program, state, _ = check("resnet", {"data": 2, "context": 4}, strategies=[jp.DP(), jp.CP(balance="none")])
    batch = program.plan.batch(batch_of("resnet", 0))
    traffic = jp.testing.collectives(program.train_step, state["model"], state["optimizer"], batch)
    assert any(each.kind == "collective-permute" and each.axes == ("context",) for each in traffic), str(traffic)


@pytest.mark.parametrize(
    ("side", "axes", "message"),
    [
        (6, {"context": 4}, "6 tokens does not divide over context=4"),
        (8, {"context": 8}, r"dim 1 \('seq'\) has size 4, which context=8 \(8 parts\) does not divide"),
    ],
)
def test_rows_of_an_image_that_do_not_divide_are_refused(side, axes, message):
    """At the batch, or at the layer that halves them: nothing is padded in silence."""
    recipe = dataclasses.replace(recipe_of("resnet"), strategies=[jp.CP(balance="none")])
    plan = recipe.on(programs.mesh(**axes)).plan
    batch = {**batch_of("resnet", 0), "image": np.zeros((32, side, side, 1), np.float32)}
    with pytest.raises(jp.ShardingError, match=message):
        plan.jit(recipe.loss).lower(plan.abstract(), plan.batch(batch))


@pytest.mark.parametrize(
    ("name", "make", "published"),
    [
        ("MIXTRAL_8X7B", lambda: moe.MoE(moe_config.MIXTRAL_8X7B, rngs=nnx.Rngs(0)), 46_702_792_704),
        ("MIXTRAL_8X22B", lambda: moe.MoE(moe_config.MIXTRAL_8X22B, rngs=nnx.Rngs(0)), 140_620_634_112),
        ("BERT_BASE", lambda: bert.Bert(bert_config.BERT_BASE, rngs=nnx.Rngs(0)), 109_514_298),
        ("BERT_LARGE", lambda: bert.Bert(bert_config.BERT_LARGE, rngs=nnx.Rngs(0)), 335_174_458),
        ("VIT_B16", lambda: vit.ViT(vit_config.VIT_B16, rngs=nnx.Rngs(0)), 86_567_656),
        ("VIT_L16", lambda: vit.ViT(vit_config.VIT_L16, rngs=nnx.Rngs(0)), 304_326_632),
        ("RESNET18", lambda: resnet.ResNet(resnet_config.RESNET18, rngs=nnx.Rngs(0)), 11_689_512),
        ("RESNET50", lambda: resnet.ResNet(resnet_config.RESNET50, rngs=nnx.Rngs(0)), 25_557_032),
        ("RESNET101", lambda: resnet.ResNet(resnet_config.RESNET101, rngs=nnx.Rngs(0)), 44_549_160),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, make, published):
    model = nnx.eval_shape(make)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == published


@pytest.mark.parametrize(("name", "axes"), [("mixtral_8x7b", {"fsdp": 16, "expert": 8}), ("bert_base", {"fsdp": 128})])
def test_a_named_size_has_a_plan_on_a_pod(name, axes):
    recipe = getattr(moe if "mixtral" in name else bert, name)()
    plan = recipe.on(jp.mesh("v5e:8x16", **axes)).plan
    matrices = [record for record in plan.parameters if record.path.endswith(("kernel", "embedding", "up", "down"))]
    assert matrices
    assert all("fsdp" in str(record.storage) for record in matrices)


def test_guesses_belong_to_the_example():
    """The same id, the same places, wherever it lies in a batch; about as many as asked for."""
    tokens, sample = jnp.zeros((64, 64), jnp.int32), jnp.arange(64)
    changed, chosen = bert.model.corrupt(tokens, sample, bert_config.TINY)
    again, _ = bert.model.corrupt(tokens[10:], sample[10:], bert_config.TINY)
    np.testing.assert_array_equal(again, changed[10:])
    assert abs(float(chosen.mean()) - 0.15) < 0.02
    assert not ((changed != tokens) & (chosen == 0)).any()
    assert abs(float((changed == bert_config.TINY.mask).mean() / chosen.mean()) - 0.8) < 0.05
