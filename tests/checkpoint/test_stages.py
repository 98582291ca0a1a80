"""A checkpoint of a pipeline is read without one, and back: layers have one order, whatever dims count them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _tree
from tests import _programs as programs

D, LAYERS = 8, 8


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.up(x))


class Scanned(nnx.Module):
    def __init__(self, seed):
        self.blocks = jp.Stack(Block, LAYERS, rngs=nnx.Rngs(seed))


class Single(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])


LAYOUTS = {
    "stages": (Scanned, {"data": 2, "pipe": 4}, [jp.DP(), jp.ZeRO(1, min_bytes=0), jp.PP(microbatches=4)]),
    "chunks": (Scanned, {"fsdp": 2, "pipe": 2}, [jp.FSDP(min_bytes=0), jp.PP(microbatches=4, chunks=2)]),
    "more chunks": (Scanned, {"pipe": 2}, [jp.PP(microbatches=4, chunks=4)]),
    "no pipe": (Scanned, {"fsdp": 4}, [jp.FSDP(min_bytes=0)]),
    "single layers": (Single, {"fsdp": 4}, [jp.FSDP(min_bytes=0)]),
}


def state(layout, seed):
    """A model and its optimiser, every array of it from `seed`."""
    kind, axes, strategies = LAYOUTS[layout]
    plan = jp.plan(lambda: kind(seed), programs.mesh(**axes), strategies)
    model = plan.init()
    opt = plan.make(lambda model: nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), model)
    kernels = jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model, nnx.Param))
    nnx.update(opt.opt_state[0].mu, kernels)
    return plan, (model, opt)


def rows(tree):
    """Every kernel, layer by layer, without the dims that count these."""
    leaves = {path: np.asarray(leaf) for path, leaf in _tree.leaves(tree).items() if path.endswith("kernel")}
    groups = {path.split("blocks")[0]: [] for path in leaves}
    for path, leaf in leaves.items():
        groups[path.split("blocks")[0]].append(leaf.reshape(-1, D, D))
    return {name: np.concatenate(found) for name, found in groups.items()}


CHANGES = [
    *(("chunks", "no pipe"), ("no pipe", "chunks"), ("stages", "more chunks"), ("chunks", "more chunks")),
    *(("single layers", "chunks"), ("chunks", "single layers")),
]


@pytest.mark.parametrize(("saved", "here"), CHANGES, ids=str)
def test_it_is_read_in_another_layout(saved, here, tmp_path):
    _, before = state(saved, seed=1)
    jp.checkpoint.save(tmp_path, 1, before)
    plan, like = state(here, seed=2)
    expected, placed = rows(before), {path: leaf.sharding for path, leaf in _tree.leaves(like).items()}
    after = jp.checkpoint.restore(tmp_path, like)
    found = rows(after)
    assert set(found) == set(expected)
    assert len(found) == 3  # the model, two moments
    for name, kernels in expected.items():
        np.testing.assert_array_equal(found[name], kernels)
    assert {path: leaf.sharding for path, leaf in _tree.leaves(after).items()} == placed
    jp.testing.assert_sharding(after[0], plan)


def test_another_number_of_layers_is_refused(tmp_path):
    jp.checkpoint.save(tmp_path, 1, {"blocks": {"each": {"w": jnp.ones((2, 3, 4))}}})
    with pytest.raises(jp.CheckpointError, match=r"\(2, 3, 4\) float32 in the checkpoint, \(8, 4\) float32 here"):
        jp.checkpoint.restore(tmp_path, {"blocks": {"each": {"w": jnp.ones((8, 4))}}})
    there = jp.checkpoint.restore(tmp_path, {"blocks": {"each": {"w": jnp.ones((6, 4))}}})
    assert there["blocks"]["each"]["w"].shape == (6, 4)
