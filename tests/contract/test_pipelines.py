"""Invariant 1 in a pipeline: every schedule, beside every other strategy, computes what one device computes.

Losses, gradients and parameters updated by SGD, of a model with tied ends and a masked loss. CI runs a covering array,
in which every schedule meets every number of stages, every way to fill them, and other strategies; `make matrix` runs
all combinations.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar.testing import pairwise
from tests import _programs as programs

D, F, V, T, LAYERS, ROWS = 8, 16, 16, 3, 16, 96


class Block(nnx.Module):
    """Hands on its stream: activations and how far these went. Is given a field of the batch beside it."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, stream, shift):
        x, layer = stream
        hidden = jnp.tanh(self.up(x) + shift[..., None] / (1 + layer.astype(x.dtype)))
        return jp.constrain(x + self.down(hidden) / LAYERS, "batch", None, "embed"), layer + 1


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks = jp.Stack(Block, LAYERS, rngs=rngs)

    def __call__(self, tokens, shift):
        x = jp.embed(self.embed.embedding[...], tokens)
        x, _ = self.blocks((x, jnp.int32(0)), shift)
        return x @ self.embed.embedding[...].T


def loss(model, batch):
    return programs.of_tokens(model(batch["tokens"], batch["shift"]), batch)


def texts():
    random = np.random.default_rng(0)
    text = random.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    kept = random.random((ROWS, T)) < np.linspace(0.1, 1, ROWS)[:, None]
    shift = random.standard_normal((ROWS, T)).astype(np.float32)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "weights": kept.astype(np.float32), "shift": shift}


CASE = programs.Case(
    name="pipelined",
    make=lambda: Model(nnx.Rngs(0)),
    loss=loss,
    batch=texts(),
    tensor={"column": ["*.up"], "row": ["*.down"]},
)
SCHEDULES = {"gpipe": ("gpipe", 1), "1f1b": ("1f1b", 1), "circular": ("gpipe", 2), "interleaved": ("1f1b", 2)}
MICROBATCHES = {"below": {1: 1, 2: 1, 4: 3, 8: 6}, "at": {1: 1, 2: 2, 4: 4, 8: 8}, "above": {1: 3, 2: 3, 4: 6, 8: 12}}
FSDP = jp.FSDP(min_bytes=0)
TP = jp.TP(**CASE.tensor)
VOCAB = jp.TP(**CASE.tensor, vocab=["embed"])
ZERO = [jp.DP(), jp.ZeRO(1, min_bytes=0)]
BESIDE = {
    "nothing": ({}, []),
    "zero1-stages": ({"data": 2}, ZERO),
    "tp-vocab": ({"tensor": 2}, [VOCAB]),
    "dp-fsdp": ({"data": 2, "fsdp": 2}, [jp.DP(), FSDP]),
}
MORE = {
    "fsdp": ({"fsdp": 2}, [FSDP]),
    "fsdp-step": ({"fsdp": 2}, [jp.FSDP(min_bytes=0, reduce="step")]),
    "dp": ({"data": 2}, [jp.DP()]),
    "zero1": ({"data": 2}, ZERO),
    "zero2": ({"data": 2}, [jp.ZeRO(2, min_bytes=0)]),
    "zero2-step": ({"data": 2}, [jp.DP(), jp.ZeRO(2, min_bytes=0, reduce="step")]),
    "tp": ({"tensor": 2}, [TP]),
    "dp-tp": ({"data": 2, "tensor": 2}, [jp.DP(), TP]),
    "fsdp-tp": ({"fsdp": 2, "tensor": 2}, [FSDP, TP]),
    "fsdp-stages": ({"fsdp": 2}, [FSDP]),
    "fsdp-tp-stages": ({"fsdp": 2, "tensor": 2}, [FSDP, VOCAB]),
    "dp-fsdp-tp": ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), FSDP, TP]),
}
SPLIT = ("zero1-stages", "fsdp-stages", "fsdp-tp-stages")
"""In these the stages split the vocabulary."""

FACTORS = (list(SCHEDULES), [1, 2, 4, 8], list(MICROBATCHES))


def fits(schedule, stages, microbatches, beside):
    """Whether eight devices can hold it, and it is no other one's twin: without stages there is no schedule."""
    axes, _ = {**BESIDE, **MORE}[beside]
    twin = stages == 1 and (schedule != "1f1b" or microbatches != "at")
    return not twin and stages * np.prod(list(axes.values()), dtype=int) <= 8


def is_full(schedule, stages, microbatches, beside):
    """Of these, the ones that use most devices; and a pipeline that rests is a plan without one (test_pipeline.py)."""
    return fits(schedule, stages, microbatches, beside) and stages > 1 and (stages == 8) == (beside == "nothing")


def check(schedule, stages, microbatches, beside):
    axes, strategies = {**BESIDE, **MORE}[beside]
    name, chunks = SCHEDULES[schedule]
    vocab = ["embed"] if beside in SPLIT else ()
    pipeline = jp.PP(schedule=name, microbatches=MICROBATCHES[microbatches][stages], chunks=chunks, vocab=vocab)
    trained = programs.train(CASE, programs.mesh(pipe=stages, **axes), [*strategies, pipeline])
    programs.check_same(CASE, trained)
    assert trained.step.num_compilations == 1
    jp.testing.assert_sharding(trained.state[0], trained.plan)


NAMES = ("schedule", "stages", "microbatches", "beside")


@pytest.mark.parametrize(NAMES, pairwise(*FACTORS, list(BESIDE), where=is_full))
def test_same_numbers(schedule, stages, microbatches, beside):
    check(schedule, stages, microbatches, beside)


@pytest.mark.matrix
@pytest.mark.parametrize(NAMES, [each for each in itertools.product(*FACTORS, [*BESIDE, *MORE]) if fits(*each)])
def test_same_numbers_everywhere(schedule, stages, microbatches, beside):
    check(schedule, stages, microbatches, beside)
