"""What the TPU compiler makes of a plan, without a TPU: peak memory of FSDP, and how gradients are reduced."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import jaxpar as jp
from jaxpar import testing
from models import gpt

pytestmark = pytest.mark.libtpu

MIB = 2**20


@ft.cache
def tpu_devices(topology):
    from jax.experimental import topologies

    return np.array(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def tpu_mesh(topology, **axes):
    devices = tpu_devices(topology).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


class Block(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.up = nnx.Linear(dim, 4 * dim, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Blocks(nnx.Module):
    def __init__(self, dim, depth, *, rngs):
        self.blocks = nnx.List([Block(dim, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def lowered(plan, transform, loss, batch):
    """A whole training step, lowered for the plan's mesh from shapes alone."""
    model = plan.abstract()
    opt = nnx.eval_shape(lambda model: nnx.Optimizer(model, transform, wrt=nnx.Param), model)

    @plan.jit
    def train_step(model, opt, batch):
        value, grads = loss(model, batch)
        opt.update(model, grads)
        return value

    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.batch_sharding), batch)
    return train_step.lower(model, opt, batch)


def test_one_block_is_whole_at_a_time():
    """1 GiB of repeated blocks over 8 chips, 128 MiB each, peaks under 350 MiB."""
    mesh = tpu_mesh("v5e:2x4", fsdp=8)
    plan = jp.plan(lambda: Blocks(1024, 32, rngs=nnx.Rngs(0)), mesh, [jp.FSDP(blocks="blocks.*")])
    assert sum(record.num_bytes for record in plan.parameters) == 1024 * MIB

    loss = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
    compiled = lowered(plan, optax.sgd(0.1), loss, jax.ShapeDtypeStruct((64, 1024), jnp.float32)).compile()

    assert compiled.memory_analysis().peak_memory_in_bytes < 350 * MIB
    gathers = [each for each in testing.collectives(compiled, mesh=mesh) if each.kind == "all-gather"]
    weights = {(1024, 4096), (4096, 1024)}
    assert gathers
    assert {tuple(size for size in each.shape if size != 1) for each in gathers} <= weights  # and no activation


def test_accumulation_reduces_once():
    """Over 8 microbatches gradients cross `data` once, outside every loop, on TPU too."""
    mesh = tpu_mesh("v5e:2x4", data=2, fsdp=2, tensor=2)
    recipe = gpt.tiny(accumulate=8, batch=64)
    program = recipe.on(mesh)
    plan = program.plan

    loss = jp.value_and_grad(recipe.loss, accumulate=recipe.accumulate)
    compiled = lowered(plan, optax.sgd(0.1), loss, recipe.batch).compile()

    over_data = [each for each in testing.collectives(compiled, mesh=mesh) if "data" in each.axes]
    assert over_data
    assert {(each.depth, each.count) for each in over_data} == {(0, 1)}
    assert {each.kind for each in over_data} <= {"all-reduce", "reduce-scatter"}


def sums(strategies, *, accumulate=1, **axes):
    """How a step with Adam sums the gradients of two blocks, 1024 wide: kind, spelling, axes and bytes of each."""
    mesh = tpu_mesh("v5e:2x4", **axes)
    plan = jp.plan(lambda: Blocks(1024, 2, rngs=nnx.Rngs(0)), mesh, strategies)
    loss = jp.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), accumulate=accumulate)
    compiled = lowered(plan, optax.adam(1e-3), loss, jax.ShapeDtypeStruct((64, 1024), jnp.float32)).compile()
    found = testing.collectives(compiled, mesh=mesh)
    reductions = [each for each in found if math.prod(each.shape) > 1 and each.kind in ("all-reduce", "reduce-scatter")]
    return {(each.kind, each.spelling, each.axes, math.ceil(each.bytes / MIB)) for each in reductions}, found


FUSED = ("reduce-scatter", "fusion all-reduce-scatter")


def test_gradients_are_scattered_over_one_axis_and_summed_over_the_other_in_pieces():
    """Not summed whole over both and then cut, which is 1.75 times their bytes on the wire, rather than once."""
    found, _ = sums([jp.DP(), jp.FSDP()], data=2, fsdp=4)
    assert found >= {(*FUSED, ("fsdp",), 16), ("all-reduce", "all-reduce", ("data",), 4)}
    assert all(axes != ("data", "fsdp") for _, _, axes, _ in found)


def test_accumulated_gradients_too():
    """The pieces of each microbatch are scattered; they cross the other axis when all have been added."""
    found, traffic = sums([jp.DP(), jp.FSDP()], accumulate=2, data=2, fsdp=4)
    assert found == {(*FUSED, ("fsdp",), 16), ("all-reduce", "all-reduce", ("data",), 4)}
    assert {(each.axes, each.depth) for each in traffic if each.bytes >= MIB and each.kind != "all-gather"} == {
        (("fsdp",), 1),
        (("data",), 0),
    }


def test_tensor_parallel_gradients_too():
    found, _ = sums([jp.DP(), jp.FSDP(), jp.TP(column="*.up", row="*.down")], data=2, fsdp=2, tensor=2)
    activations = ("all-reduce", "all-reduce", ("tensor",), 1)
    assert found == {(*FUSED, ("fsdp",), 8), ("all-reduce", "all-reduce", ("data",), 4), activations}


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_scatters_gradients_and_gathers_parameters(stage):
    """At either stage a real reduce-scatter: no more on the wire than an all-reduce of the gradients."""
    found, traffic = sums([jp.ZeRO(stage)], data=8)
    assert found == {(*FUSED, ("data",), 16)}
    assert [each.bytes for each in traffic if each.kind == "all-gather"] == [16 * MIB] * 4
