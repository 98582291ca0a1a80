"""Reading a parameter is linear: it can be differentiated twice, forward over reverse and reverse over reverse.

A Hessian-vector product and a gradient penalty of a model with an embedding that is used at both ends, against one
device.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _tree, testing
from tests import _programs as programs
from tests._residual import Block

WORDS, DIM, HIDDEN, ROWS, LENGTH = 64, 32, 64, 16, 4
TP = jp.TP(column="*up", row="*down")
MESHES = {
    "fsdp": ({"fsdp": 8}, [jp.FSDP()]),
    "tp": ({"data": 4, "tensor": 2}, [jp.DP(), TP]),
    "dp fsdp tp": ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), jp.FSDP(), TP]),
    "zero": ({"data": 8}, [jp.ZeRO(1)]),
}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (WORDS, DIM)) / 8)
        self.blocks = jp.Stack(lambda rngs: Block(rngs, DIM, HIDDEN), 2, rngs=rngs)

    def __call__(self, ids):
        return self.blocks(self.embed[...][ids]) @ self.embed.T


def module():
    return Model(nnx.Rngs(0))


def pytree():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (WORDS, DIM), "up": (DIM, HIDDEN), "down": (HIDDEN, DIM)}
    return {name: jax.random.normal(key, shape) / 8 for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def logits_of(params, ids):
    x = params["embed"][ids]
    return (x + jnp.tanh(x @ params["up"]) @ params["down"]) @ params["embed"].T


def loss_of(logits, batch):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["next"][..., None], axis=-1)
    return -jnp.mean(picked)


def batch():
    ids = np.random.default_rng(0).integers(0, WORDS, (ROWS, LENGTH + 1)).astype(np.int32)
    return {"ids": ids[:, :-1], "next": ids[:, 1:]}


def direction(tree):
    """Another point of the same structure, different in every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [jnp.cos(leaf * (3 + index)) for index, leaf in enumerate(leaves)])


def gradient_of_module(model, batch, accumulate=None):
    """The parameters of a module, and a function of them that gives the gradient."""
    graphdef, params = nnx.split(model, nnx.Param)

    def gradient(params):
        loss = lambda model, batch: loss_of(model(batch["ids"]), batch)
        run = nnx.grad(loss) if accumulate is None else jp.value_and_grad(loss, accumulate=accumulate)
        out = run(nnx.merge(graphdef, params), batch)
        return out if accumulate is None else out[1]

    return params, gradient


def gradient_of_pytree(params, batch, accumulate=1):
    loss = lambda params, batch: loss_of(logits_of(params, batch["ids"]), batch)
    return params, lambda params: jp.value_and_grad(loss, accumulate=accumulate)(params, batch)[1]


def hessian_product(gradient_of, model, batch, **settings):
    """H v, forward over reverse."""
    params, gradient = gradient_of(model, batch, **settings)
    return jax.jvp(gradient, (params,), (direction(params),))[1]


def penalty_gradient(gradient_of, model, batch, **settings):
    """The gradient of |gradient|^2, reverse over reverse: 2 H gradient."""
    params, gradient = gradient_of(model, batch, **settings)
    return jax.grad(lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient(params))))(params)


KINDS = {
    "nnx": (module, gradient_of_module, {}),
    "nnx accumulated": (module, gradient_of_module, {"accumulate": 2}),
    "pytree": (pytree, gradient_of_pytree, {}),
    "pytree accumulated": (pytree, gradient_of_pytree, {"accumulate": 2}),
}


@ft.cache
def alone(kind, twice, *, wide=False):
    """On one device, in float32 or float64."""
    make, gradient_of, settings = KINDS[kind]
    model = nnx.jit(make)() if kind.startswith("nnx") else jax.jit(make)()
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard" if wide else "strict"):
        if wide and kind.startswith("nnx"):
            nnx.update(model, widened(nnx.state(model)))
        elif wide:
            model = widened(model)
        return programs.host(_tree.leaves(twice(gradient_of, model, batch(), **settings)))


def widened(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize(
    ("twice", "kind", "name"),
    [
        (hessian_product, "nnx", "fsdp"),
        (hessian_product, "nnx", "tp"),
        (hessian_product, "nnx accumulated", "dp fsdp tp"),
        (hessian_product, "pytree", "dp fsdp tp"),
        (hessian_product, "pytree", "zero"),
        (hessian_product, "pytree accumulated", "fsdp"),
        (penalty_gradient, "nnx", "dp fsdp tp"),
        (penalty_gradient, "pytree", "tp"),
        (penalty_gradient, "pytree accumulated", "zero"),
    ],
)
def test_second_derivatives_are_those_of_one_device(twice, kind, name):
    axes, strategies = MESHES[name]
    make, gradient_of, settings = KINDS[kind]
    plan = jp.plan(make, jp.mesh(**axes), strategies)
    step = plan.jit(lambda model, batch: twice(gradient_of, model, batch, **settings))
    found = programs.host(_tree.leaves(step(plan.init(), plan.batch(batch()))))
    table = testing.compare(found, alone(kind, twice), alone(kind, twice, wide=True), group="gradients")
    assert table.ok, str(table)
