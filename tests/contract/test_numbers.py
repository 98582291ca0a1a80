"""Invariant 1: every strategy, alone and combined, on every mesh shape, computes what one device computes.

All strategies are always listed: on a mesh where an axis has size 1, its strategies rest, so the mesh decides which of
them meet. CI runs a pairwise covering array, in which everything below meets everything else once; `make matrix` runs
every combination, less what is another one's twin: four microbatches are the program of two with another trip count,
and no strategy sees the container that a Linen or an Equinox model is (test_any_pytree.py does).
"""

import itertools

import pytest

import jaxpar as jp
from jaxpar.testing import MeshCase, mesh_shapes, pairwise
from tests import _programs as programs

REPLICAS = {
    "dp": [jp.DP()],
    "zero1": [jp.ZeRO(1)],
    "zero2": [jp.DP(), jp.ZeRO(2)],
    "zero2-step": [jp.ZeRO(2, reduce="step")],
}
SHARDS = {"fsdp": {}, "fsdp-step": {"reduce": "step"}, "blocks": {}, "blocks-dots": {"remat": "dots"}}
TENSOR = ("tp", "tp-vocab", "tp-seq", "tp-seq-vocab")
MESHES = [
    *(MeshCase(data=8, fsdp=1, tensor=1), MeshCase(data=1, fsdp=8, tensor=1), MeshCase(data=1, fsdp=1, tensor=8)),
    *(MeshCase(data=4, fsdp=1, tensor=2), MeshCase(data=1, fsdp=4, tensor=2), MeshCase(data=2, fsdp=2, tensor=2)),
    *(MeshCase(tensor=2, fsdp=2, data=2), MeshCase(data=3, fsdp=2)),
]
EVERY_MESH = list(dict.fromkeys([*mesh_shapes(("data", "fsdp", "tensor")), *MESHES, MeshCase(fsdp=3, tensor=2)]))
FACTORS = (list(REPLICAS), list(SHARDS), TENSOR)
CASES = list(programs.CASES.values())
DISTINCT = [case for case in CASES if case.name not in ("linen", "equinox")]


def applies(replicas, shards, tensor, case, shape, accumulate):
    """Whether a combination makes sense, and is not another one's twin: of strategies that rest, the first stands."""
    chosen = {"data": (replicas, REPLICAS), "fsdp": (shards, SHARDS), "tensor": (tensor, TENSOR)}
    if any(shape.get(axis, 1) == 1 and name != next(iter(names)) for axis, (name, names) in chosen.items()):
        return False
    return (
        (case.blocks is not None or not shards.startswith("blocks"))
        and (shards != "blocks-dots" or case.name != "stack")  # that model says itself what its jp.Stack keeps
        and ("vocab" not in tensor or "vocab" in case.tensor)
        and ("seq" not in tensor or case.has_seq or shards.startswith("blocks"))
    )


def strategies(replicas, shards, tensor, case):
    rules = {kind: patterns for kind, patterns in case.tensor.items() if kind != "vocab" or "vocab" in tensor}
    settings = SHARDS[shards] | ({"blocks": case.blocks} if shards.startswith("blocks") else {})
    return [*REPLICAS[replicas], jp.FSDP(**settings), jp.TP(**rules, sequence="seq" in tensor)]


def check(replicas, shards, tensor, case, shape, accumulate):
    trained = programs.train(
        case, programs.mesh(**shape), strategies(replicas, shards, tensor, case), accumulate=accumulate
    )
    programs.check_same(case, trained)
    assert trained.step.num_compilations == 1
    jp.testing.assert_sharding(trained.state[0], trained.plan)


NAMES = ("replicas", "shards", "tensor", "case", "shape", "accumulate")


@pytest.mark.parametrize(NAMES, pairwise(*FACTORS, CASES, MESHES, [1, 2, 4], where=applies))
def test_same_numbers(replicas, shards, tensor, case, shape, accumulate):
    check(replicas, shards, tensor, case, shape, accumulate)


@pytest.mark.matrix
@pytest.mark.parametrize(
    NAMES, [each for each in itertools.product(*FACTORS, DISTINCT, EVERY_MESH, [1, 2]) if applies(*each)]
)
def test_same_numbers_everywhere(replicas, shards, tensor, case, shape, accumulate):
    check(replicas, shards, tensor, case, shape, accumulate)
