"""Where in the model, and in which phase, an operation is made: from JAX's names alone, and in compiled programs."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar.explain._paths import Origin, Paths

KNOWN = [
    "blocks.each.attn.q.kernel",
    "blocks.each.attn.k.kernel",
    "blocks.each.mlp.up.kernel",
    "embed.embedding",
]


IN_BLOCK = "jit(f)/jvp(blocks)/while/body/closed_call/each"
BACK = "jit(f)/transpose(jvp(blocks))/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
    ("name", "path", "phase", "primitive"),
    [
        (f"{IN_BLOCK}/attn/q/dot_general", "blocks.each.attn.q", "forward", "dot_general"),
        (f"{BACK}/each/attn/q/dot_general", "blocks.each.attn.q", "backward", "dot_general"),
        (f"{BACK}/rematted_computation/each/attn/jit(silu)/mul", "blocks.each.attn", "recomputed", "mul"),
        ("jit(f)/update/mul", "", "update", "mul"),
        ("jit(f)/sin", "", "", "sin"),
        # An einsum's letters are a scope too, and say nothing.
        (f"{IN_BLOCK}/attn/vmap(BTNH,BSNH->BNTS)/dot_general", "blocks.each.attn", "forward", "dot_general"),
        # A compiler drops the first scopes, merges operations, joins names, cuts names short.
        ("jit(f)/each/attn/mul", "blocks.each.attn", "", "mul"),
        (f"{IN_BLOCK}/attn/(q/dot_general:k/dot_general)", "blocks.each.attn", "forward", "dot_general"),
        ("jit(f)/(jvp()/reduce_sum:transpose(jvp(embed))/dot_general)", "", "backward", ""),
        ("jit(f)/jvp(embed)/add;jit(f)/jvp(blocks)/mul", "embed", "forward", "add"),
        ("jit(f)/transpose(jvp(", "", "backward", ""),
        # What a plan moves is named by its whole path.
        (f"{IN_BLOCK}/attn/@{KNOWN[0]}/transpose", KNOWN[0], "forward", "transpose"),
        # A scope that is no module's stays.
        (f"{IN_BLOCK}/attn/rope/mul", "blocks.each.attn.rope", "forward", "mul"),
        ("arrays[3]", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_names(name, path, phase, primitive):
    assert Paths(KNOWN).of(name) == Origin(path=path, phase=phase, primitive=primitive)


@pytest.mark.parametrize(
    "name", ["((((" * 3000, "/" * 5000, "jit(" * 50, ")(:;/", "(a:(b:c)", "\x00/é/dot_general", "@"]
)
def test_garbage_is_a_name(name):
    assert isinstance(Paths(KNOWN).of(name), Origin)


def test_linen_names_get_the_parameters_spelling():
    paths = Paths(["params.block_0.Dense_0.kernel", "params.block_1.Dense_0.kernel"])
    name = "jit(f)/transpose(jvp(Model))/block_1/Dense_0/dot_general"
    assert paths.of(name).path == "params.block_1.Dense_0"
    assert Paths().of(name).path == "Model.block_1.Dense_0"  # where nothing is known, as it is written


def test_an_end_that_several_modules_share_names_none():
    paths = Paths(["blocks.0.up.kernel", "blocks.1.up.kernel"])
    assert paths.of("jit(f)/jvp(blocks/1)/up/dot_general").path == "blocks.1.up"
    assert paths.of("jit(f)/up/mul").path == "up"


class Block(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.drop = nnx.Dropout(0.0)

    def __call__(self, x):
        return x + self.drop(self.down(jnp.sin(self.up(x))))


class Model(nnx.Module):
    def __init__(self, dim, depth, *, rngs):
        self.blocks = nnx.List([Block(dim, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(dim, 8, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(x.shape[-1])(jnp.sin(nn.Dense(2 * x.shape[-1])(x))), None


class LinenModel(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            many = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = many(name="blocks")(x, None)
        else:
            for index in range(2):
                x, _ = LinenBlock(name=f"block_{index}")(x)
        return nn.Dense(8, name="head")(x)


def origins(plan, lowered):
    """(path, phase) of every matrix product of the compiled program."""
    text = lowered.compile().as_text()
    paths = Paths(plan.records)
    names = re.findall(r' dot\(.*op_name="([^"]*)"', text)
    return {(place.path, place.phase) for place in map(paths.of, names) if place.primitive == "dot_general"}


def nnx_step(blocks):
    plan = jp.plan(lambda: Model(16, 2, rngs=nnx.Rngs(0)), jp.mesh(fsdp=8), [jp.FSDP(blocks=blocks, min_bytes=0)])
    model = plan.init()
    opt = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @plan.jit
    def step(model, opt, x):
        loss, grads = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
        opt.update(model, grads)
        return loss

    return plan, step.lower(model, opt, plan.batch(np.ones((16, 16), np.float32)))


def linen_step(scan):
    model = LinenModel(scan)
    plan = jp.plan(lambda: model.init(jax.random.key(0), jnp.ones((8, 16))), jp.mesh(fsdp=8), [jp.FSDP(min_bytes=0)])
    params = plan.init()

    @plan.jit
    def step(params, x):
        loss, grads = jp.value_and_grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2))(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    return plan, step.lower(params, plan.batch(np.ones((16, 16), np.float32)))


@pytest.mark.parametrize(
    ("make", "modules", "recomputed"),
    [
        (lambda: nnx_step(None), {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"}, set()),
        (lambda: nnx_step("blocks.*"), {"blocks.each.up", "blocks.each.down", "head"}, {"blocks.each.up"}),
        (
            lambda: linen_step(False),
            {f"params.block_{block}.Dense_{dense}" for block in (0, 1) for dense in (0, 1)} | {"params.head"},
            set(),
        ),
        (
            lambda: linen_step(True),
            {"params.blocks.Dense_0", "params.blocks.Dense_1", "params.head"},
            {"params.blocks.Dense_1"},  # the inner one: Linen counts them as they are made
        ),
    ],
    ids=["nnx", "nnx scanned", "linen", "linen scanned"],
)
def test_every_product_is_in_its_module(make, modules, recomputed):
    """Forward and backward, scanned and not; what full remat computes again is told apart."""
    plan, lowered = make()
    wanted = {(module, phase) for module in modules for phase in ("forward", "backward")}
    assert origins(plan, lowered) == wanted | {(module, "recomputed") for module in recomputed}


def test_modules_are_left_as_they_were():
    before = Block.__call__, nnx.Linear.__call__, nnx.Optimizer.update
    nnx_step(None)
    assert (Block.__call__, nnx.Linear.__call__, nnx.Optimizer.update) == before


def test_a_step_that_fails_leaves_modules_as_they_were():
    before = Block.__call__
    plan = jp.plan(lambda: Block(16, rngs=nnx.Rngs(0)), jp.mesh(fsdp=8), [jp.FSDP(min_bytes=0)])
    with pytest.raises(TypeError, match="dot_general requires"):
        plan.jit(lambda model, x: model(x))(plan.init(), plan.batch(np.ones((16, 5), np.float32)))
    assert Block.__call__ is before
