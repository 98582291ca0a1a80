"""Invariant 1 for the models of the folder: each with its own rules computes, on every mesh, what one device computes.

Losses, gradients, parameters updated by SGD, and batch statistics. CI runs a few combinations in which everything is
met; `make matrix` runs all.
"""

import dataclasses
import functools as ft
import itertools

import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar.testing import MeshCase
from models import bert, classify, moe, resnet, vit
from models.bert import config as bert_config
from models.moe import config as moe_config
from models.resnet import config as resnet_config
from models.vit import config as vit_config
from tests import _programs as programs
from tests.contract.test_numbers import REPLICAS

ROWS, T, V = 48, 8, 32
SMALL = {"vocab_size": V, "max_positions": T, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 16}
MOE = dataclasses.replace(moe_config.TINY, **SMALL, num_kv_heads=2)
TIGHT = dataclasses.replace(MOE, dispatch=jp.Capacity(factor=1.0), num_shared=0)  # drops what does not fit
BERT = dataclasses.replace(bert_config.TINY, **SMALL, mask=V - 1)
VIT = dataclasses.replace(vit_config.TINY, image=6, embed_dim=16, mlp_dim=16)  # nine patches and a token
RESNET = resnet_config.TINY


def texts():
    """With two documents in some sequences, and more masked in some rows than in others."""
    fields = programs.texts(ROWS, V - 1)
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))
    second = (at >= 5) & (np.arange(ROWS)[:, None] % 3 == 0)
    return fields | {
        "positions": np.where(second, at - 5, at),
        "segments": second.astype(np.int32),
        "sample": np.arange(ROWS, dtype=np.int32),
    }


def images(side):
    random = np.random.default_rng(0)
    return {
        "image": random.standard_normal((ROWS, side, side, 1)).astype(np.float32),
        "label": random.integers(0, 10, ROWS).astype(np.int32),
        "weight": (random.random(ROWS) > 0.3).astype(np.float32),
    }


def case(name, make, loss, batch, dims=()):
    return programs.Case(name=name, make=make, loss=loss, batch=batch, tensor={}, dims=dims, is_narrow=True)


def alone(loss):
    """A loss without what it says beside."""
    return lambda model, batch: loss(model, batch)[0]


MODELS = {
    "moe": (
        case("moe", lambda: moe.MoE(MOE, rngs=nnx.Rngs(0)), alone(moe.loss), texts(), tuple(moe.recipes.dims)),
        moe.strategies(MOE),
    ),
    "moe-tight": (
        case("moe-tight", lambda: moe.MoE(TIGHT, rngs=nnx.Rngs(0)), alone(moe.loss), texts(), tuple(moe.recipes.dims)),
        moe.strategies(TIGHT),
    ),
    "bert": (case("bert", lambda: bert.Bert(BERT, rngs=nnx.Rngs(0)), bert.loss, texts()), bert.strategies(BERT)),
    "vit": (
        case("vit", lambda: vit.ViT(VIT, rngs=nnx.Rngs(0)), alone(classify.loss), images(6)),
        vit.strategies(VIT),
    ),
    "resnet": (
        case("resnet", lambda: resnet.ResNet(RESNET, rngs=nnx.Rngs(0)), alone(classify.loss), images(8)),
        resnet.recipes.strategies(),
    ),
}
MESHES = {
    "moe": [
        *(MeshCase(data=2, fsdp=2, tensor=2), MeshCase(expert=8), MeshCase(data=2, expert=2, tensor=2)),
        *(MeshCase(fsdp=2, expert=4), MeshCase(data=2, expert=2, context=2), MeshCase(expert=2, context=2, tensor=2)),
        *(MeshCase(fsdp=2, expert=2, context=2), MeshCase(data=2, pipe=2, expert=2), MeshCase(pipe=2, expert=4)),
        *(MeshCase(fsdp=2, pipe=2, expert=2), MeshCase(pipe=2, expert=2, context=2), MeshCase(data=4, pipe=2)),
    ],
    "moe-tight": [
        *(MeshCase(data=2, expert=4), MeshCase(fsdp=2, expert=2, tensor=2), MeshCase(pipe=2, expert=2, tensor=2)),
    ],
    "bert": [
        *(MeshCase(data=2, fsdp=2, tensor=2), MeshCase(fsdp=2, context=2, tensor=2), MeshCase(data=2, context=4)),
        *(MeshCase(data=2, pipe=2, tensor=2), MeshCase(pipe=2, context=2, tensor=2)),
    ],
    "vit": [
        *(MeshCase(data=2, fsdp=2, tensor=2), MeshCase(data=2, fsdp=2, context=2), MeshCase(context=2, tensor=4)),
        *(MeshCase(data=2, fsdp=2, pipe=2), MeshCase(fsdp=2, pipe=2, context=2)),
    ],
    "resnet": [
        *(MeshCase(data=4, fsdp=2), MeshCase(data=2, context=4), MeshCase(fsdp=2, context=2), MeshCase(fsdp=8)),
        MeshCase(data=2, fsdp=2, context=2),
    ],
}
SHARDS = {"fsdp": {}, "fsdp-step": {"reduce": "step"}}
METHODS = ("allgather", "ulysses", "ring")


def strategies(name, replicas, shards, method, shape):
    """A model's own, with these for `DP()` and `FSDP()`, and sequences and stages where the mesh has them."""
    _, own = MODELS[name]
    settings = {jp.FSDP: {"min_bytes": 0, **SHARDS[shards]}, jp.ZeRO: {"min_bytes": 0}}
    listed = [*REPLICAS[replicas], *(each for each in own if not isinstance(each, jp.DP))]
    found = [dataclasses.replace(each, **settings.get(type(each), {})) for each in listed]
    if "context" in shape:
        ordered = name in ("bert", "vit", "resnet")  # these see all places, and go by them
        found.append(jp.CP(method=method, balance="none" if ordered and method != "ulysses" else None))
    return [*found, *([jp.PP(microbatches=3)] if "pipe" in shape else [])]


def applies(name, replicas, shards, method, shape, accumulate):
    """Whether it makes sense, and is not another one's twin: of what rests, the first stands."""
    context = shape.get("context", 1)
    return (
        (shape.get("data", 1) > 1 or replicas == "dp")
        and (shape.get("fsdp", 1) > 1 or shards == "fsdp")
        and (context > 1 or method == "allgather")
        and (accumulate == 1 or ("pipe" not in shape and name != "resnet"))  # batch statistics are a microbatch's
        and (method == "allgather" or name != "resnet")  # rows of an image attend to nothing
        and (method != "ring" or "pipe" not in shape)
        and (method != "ulysses" or 4 % (context * shape.get("tensor", 1)) == 0)
        and (name != "moe-tight" or context == 1)  # slots are of a whole sequence
    )


def check(name, replicas, shards, method, shape, accumulate):
    case, _ = MODELS[name]
    chosen = strategies(name, replicas, shards, method, shape)
    trained = programs.train(case, programs.mesh(**shape), chosen, accumulate=accumulate)
    programs.check_same(case, trained)
    assert trained.step.num_compilations == 1
    jp.testing.assert_sharding(trained.state[0], trained.plan)
    if name == "resnet":
        table = jp.testing.compare(statistics_of(trained.state[0]), statistics(), None)
        assert table.ok, str(table)
    return trained


def statistics_of(model):
    """The running means and variances, by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    return {".".join(map(str, path)): np.asarray(leaf.get_raw_value()) for path, leaf in flat}


@ft.cache
def statistics():
    """Those after the two steps, by nothing but Flax on one device."""
    case, _ = MODELS["resnet"]

    @nnx.jit
    def step(model, opt, batch):
        _, gradients = nnx.value_and_grad(lambda model: programs.mean_of(case.loss(model, batch)))(model)
        opt.update(model, gradients)

    model = nnx.jit(case.make)()
    opt = nnx.Optimizer(model, optax.sgd(programs.LEARNING_RATE), wrt=nnx.Param)
    for _ in range(2):
        step(model, opt, case.batch)
    return statistics_of(model)


NAMES = ("name", "replicas", "shards", "method", "shape", "accumulate")
FACTORS = (list(REPLICAS), list(SHARDS), METHODS)


FEW = [
    ("moe", "dp", "fsdp", "ring", MeshCase(data=2, expert=2, context=2), 2),
    ("moe", "zero2", "fsdp", "allgather", MeshCase(data=2, pipe=2, expert=2), 1),
    ("moe", "zero2", "fsdp", "allgather", MeshCase(data=4, pipe=2), 1),
    ("bert", "dp", "fsdp-step", "ulysses", MeshCase(fsdp=2, context=2, tensor=2), 2),
    ("vit", "dp", "fsdp", "allgather", MeshCase(fsdp=2, pipe=2, context=2), 1),
    ("resnet", "dp", "fsdp", "allgather", MeshCase(data=2, context=4), 1),
    ("resnet", "dp", "fsdp-step", "allgather", MeshCase(fsdp=2, context=2), 1),
]
"""Of each model the meshes in which most is split, every kind of strategy beside every other kind."""


@pytest.mark.parametrize(NAMES, FEW)
def test_same_numbers(name, replicas, shards, method, shape, accumulate):
    check(name, replicas, shards, method, shape, accumulate)


@pytest.mark.matrix
@pytest.mark.parametrize(
    NAMES,
    [
        each
        for name, meshes in MESHES.items()
        for each in itertools.product([name], *FACTORS, meshes, [1, 2])
        if applies(*each)
    ],
)
def test_same_numbers_everywhere(name, replicas, shards, method, shape, accumulate):
    check(name, replicas, shards, method, shape, accumulate)
