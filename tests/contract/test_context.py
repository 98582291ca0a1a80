"""Invariant 1 for sequences that are split: CP with every other strategy computes what one device computes.

The methods, masks and heads of attention itself are in tests/parallel/test_context.py; here is what is around it: where
gradients are summed, the two ends of the vocabulary, accumulation, sequence-parallel norms, optimiser state in pieces.
CI runs a few combinations in which everything is met; `make matrix` runs all.
"""

import itertools
import math

import pytest

import jaxpar as jp
from jaxpar.testing import MeshCase
from tests import _programs as programs
from tests.contract import test_numbers as numbers

METHODS = {
    "allgather": {},
    "ring": {"method": "ring"},
    "ulysses": {"method": "ulysses"},
    "hybrid": {"method": "hybrid", "heads": 2},
    "ring, summed once": {"method": "ring", "reduce": "step"},
    "allgather, summed once": {"reduce": "step"},
}
MESHES = [
    *(MeshCase(context=4), MeshCase(data=2, context=4), MeshCase(fsdp=2, context=4), MeshCase(context=4, tensor=2)),
    *(
        MeshCase(data=2, fsdp=2, context=2),
        MeshCase(tensor=2, context=2, fsdp=2),
        MeshCase(data=2, context=2, tensor=2),
    ),
]
CASE = programs.CASES["gpt"]


def check(method, replicas, shards, tensor, shape, accumulate):
    strategies = [*numbers.strategies(replicas, shards, tensor, CASE), jp.CP(**METHODS[method])]
    trained = programs.train(CASE, programs.mesh(**shape), strategies, accumulate=accumulate)
    programs.check_same(CASE, trained)
    assert trained.step.num_compilations == 1
    assert any(note.startswith("attention: ") for note in trained.step.notes)
    jp.testing.assert_sharding(trained.state[0], trained.plan)


NAMES = ("method", "replicas", "shards", "tensor", "shape", "accumulate")
FEW = [
    ("ring", "dp", "fsdp", "tp", MESHES[1], 2),
    ("ulysses", "zero2", "fsdp-step", "tp", MESHES[4], 2),
    ("allgather", "dp", "fsdp", "tp-seq-vocab", MESHES[5], 2),
    ("ring, summed once", "dp", "fsdp", "tp-vocab", MESHES[6], 2),
]


@pytest.mark.parametrize(NAMES, FEW)
def test_same_numbers(method, replicas, shards, tensor, shape, accumulate):
    check(method, replicas, shards, tensor, shape, accumulate)


def applies(method, replicas, shards, tensor, shape, accumulate):
    split = math.prod(shape.get(axis, 1) for axis in ("context", "tensor"))
    return (
        numbers.applies(replicas, shards, tensor, CASE, shape, accumulate)
        and (method != "hybrid" or shape["context"] > 2)
        and not ("seq" in tensor and programs.T % split)
    )


FACTORS = (METHODS, numbers.REPLICAS, ["fsdp", "fsdp-step"], numbers.TENSOR, MESHES, [1, 2])


@pytest.mark.matrix
@pytest.mark.parametrize(NAMES, [each for each in itertools.product(*FACTORS) if applies(*each)])
def test_same_numbers_everywhere(method, replicas, shards, tensor, shape, accumulate):
    check(method, replicas, shards, tensor, shape, accumulate)
