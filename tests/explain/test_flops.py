"""FLOPs of programs, each derived by hand: layers, attention, loops, remat, accumulation; in jaxprs and in HLO."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hardware, _hlo
from jaxpar.explain._compiled import Compiled
from jaxpar.explain._flops import count, from_hlo
from jaxpar.explain._subject import subject
from jaxpar.testing import MeshCase
from models import moe
from models.moe import config
from tests import _programs as programs

B, D, F, L = 16, 32, 64, 3
UP = 2 * B * D * F
"""FLOPs of one product of [B, D] with [D, F]."""


def ones(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def counted(function, *args):
    return count(jax.make_jaxpr(function)(*args))


def both(function, *args):
    """Counted in the jaxpr, and in the program compiled for one device."""
    text = jax.jit(function).lower(*args).compile().as_text()
    compiled = Compiled(
        name="f", text=text, hardware=_hardware.parse("cpu:1"), axes=_hlo.MeshAxes(names=("data",), sizes=(1,))
    )
    return counted(function, *args), from_hlo(_hlo.read(text), compiled)


def mlp(params, x):
    return jnp.sin(x @ params["up"]) @ params["down"]


PARAMS = {"up": ones(D, F), "down": ones(F, D)}
STACK = {"up": ones(L, D, F), "down": ones(L, F, D)}


def loss(params, x):
    return jnp.sum(mlp(params, x) ** 2)


def stacked(params, x, block=mlp):
    return jnp.sum(jax.lax.scan(lambda x, one: (block(one, x), None), x, params)[0] ** 2)


def test_a_layer():
    for found in both(mlp, PARAMS, ones(B, D)):
        assert (found.model, found.model_causal, found.hardware) == (2 * UP, 2 * UP, 2 * UP)
        assert found.by_dtype == (("float32", 2 * UP),)


def test_a_gradient_takes_two_products_for_one():
    """Of the first layer none is taken with respect to the input."""
    for found in both(jax.value_and_grad(loss), PARAMS, ones(B, D)):
        assert found.model == found.hardware == (2 + 1 + 2) * UP


def test_a_scan_counts_every_layer():
    for found in both(jax.value_and_grad(stacked), STACK, ones(B, D)):
        assert found.model == found.hardware == L * (2 + 4) * UP


def test_what_remat_computes_again_is_hardware_only():
    """Of each layer the first product; the second's result is not needed."""
    remat = ft.partial(stacked, block=jax.checkpoint(mlp))
    for found in both(jax.value_and_grad(remat), STACK, ones(B, D)):
        assert found.model == L * (2 + 4) * UP
        assert found.hardware == L * (2 + 4 + 1) * UP


def test_accumulation_is_as_much_as_one_batch():
    def accumulated(params, x):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(stacked)(params, part)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), x.reshape(4, B // 4, D))[0]

    for found in both(accumulated, STACK, ones(B, D)):
        assert found.model == pytest.approx(L * (2 + 4) * UP, rel=1e-12)


def attention(q, k, v, **mask):
    return jnp.sum(jax.nn.dot_product_attention(q, k, v, **mask) ** 2)


T, HEADS, DIM = 16, 4, 8
QUERY = ones(2, T, HEADS, DIM)
ONE = 2 * 2 * HEADS * T * T * DIM
"""FLOPs of one of attention's products."""


def positions_mask(positions):
    return positions[:, None, :, None] >= positions[:, None, None, :]


@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [
        (lambda p: {}, False),
        (lambda p: {"is_causal": True}, True),
        (lambda p: {"mask": positions_mask(p)}, True),
        (lambda p: {"mask": positions_mask(p) & (p[:, None, :, None] // 4 == p[:, None, None, :] // 4)}, True),
        (lambda p: {"mask": p[:, None, :, None] == p[:, None, None, :]}, False),  # segments alone
        (lambda p: {"bias": jnp.where(positions_mask(p), 0.0, -1e9)}, True),
    ],
    ids=["none", "flag", "positions", "positions and segments", "segments", "bias"],
)
@pytest.mark.parametrize("remat", [False, True])
def test_causal_attention_is_half(mask, is_causal, remat):
    """Two products forward, four backward, and each of them is known to be masked."""

    def f(q, k, v, p):
        return attention(q, k, v, **mask(p))

    found = counted(
        jax.grad(jax.checkpoint(f) if remat else f, argnums=(0, 1, 2)), *[QUERY] * 3, ones(2, T, dtype=np.int32)
    )
    assert found.model == 6 * ONE
    assert found.model_causal == (3 if is_causal else 6) * ONE
    assert found.hardware == (8 if remat else 6) * ONE


def test_a_mask_of_labels_is_not_causal():
    """A vocabulary's mask compares an order too, but of scores that are no square of heads."""

    def f(hidden, head, labels):
        logits = hidden @ head
        return jnp.sum(jnp.where(jnp.arange(head.shape[1])[None] >= labels[:, None], logits, 0.0))

    found = counted(f, ones(T, D), ones(D, T), ones(T, dtype=np.int32))
    assert found.model == found.model_causal == 2 * T * D * T


def test_the_longest_branch():
    found = counted(
        lambda p, x, w: jax.lax.cond(p, lambda: x @ w, lambda: x @ w @ w.T @ w), True, ones(B, D), ones(D, D)
    )
    assert found.model == 3 * 2 * B * D * D


def test_a_while_loop_counts_once_and_says_so():
    found = counted(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), ones(B, D), ones(D, D))
    assert found.model == 2 * B * D * D
    assert "while" in found.notes[0]


def test_a_manual_region_counts_every_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    region = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"),
        mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor", None)),
        out_specs=P("data", None),
    )
    found = counted(region, ones(B, D), ones(D, F))
    assert found.model == UP


def test_what_devices_compute_alike_is_needed_once():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    region = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    found = counted(region, ones(B, D), ones(D, F))
    assert (found.model, found.hardware) == (UP, 2 * UP)


def test_grouped_products():
    def f(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    assert counted(f, ones(B, D), ones(4, D, F), ones(4, dtype=np.int32)).model == UP


EXPERTS = dataclasses.replace(
    config.TINY, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=64, max_positions=16
)
MESHES = [
    *(MeshCase(expert=8), MeshCase(data=2, expert=2, tensor=2), MeshCase(expert=2, context=4)),
    *(MeshCase(data=4, pipe=2), MeshCase(pipe=2, tensor=4), MeshCase(pipe=2, expert=4)),
]


@pytest.fixture(scope="module")
def on_one_device():
    return of_experts({"data": 1})


def of_experts(axes):
    rows = {name: np.zeros((16, 16), np.int32) for name in ("tokens", "labels", "positions")}
    chosen = [*moe.strategies(EXPERTS), jp.CP(), jp.PP(microbatches=4)]
    make = lambda: moe.MoE(EXPERTS, rngs=nnx.Rngs(0))
    plan = jp.plan(make, programs.mesh(**axes), chosen, dims=list(moe.recipes.dims))
    step = plan.jit(jp.value_and_grad(moe.loss, has_aux=True))
    made = subject(step, (plan.abstract(), rows | {"weights": np.ones((16, 16), np.float32)}), {}, None)
    return count(jax.make_jaxpr(made.function)(*made.shapes), plan=plan)


@pytest.mark.parametrize("axes", MESHES)
def test_a_model_needs_as_much_on_every_mesh(axes, on_one_device):
    """Regions over some axes, and in one another; buffers for the worst; stages; copies, as of a head on each stage.

    But for the scores that blockwise attention, over `context`, computes again: 0.8% here.
    """
    found = of_experts(axes)
    assert found.model == pytest.approx(on_one_device.model, rel=1e-2)
    assert found.hardware < 1.4 * on_one_device.hardware


def test_convolutions():
    """A 3 x 3 window "same" over 8 x 8: 22 of 24 taps a side meet the image, forward and in both gradients."""

    def f(x, w):
        return jnp.sum(
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2
        )

    one = 2 * 2 * 4 * 5 * 22**2
    assert counted(jax.grad(f, argnums=(0, 1)), ones(2, 8, 8, 4), ones(3, 3, 4, 5)).model == 3 * one


def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]


@pytest.mark.parametrize(("estimate", "flops"), [(None, 4 * 2 * 8**3), (pl.CostEstimate(77, 0, 0), 77)], ids=str)
def test_kernels(estimate, flops):
    """By the author's estimate; else the grid times the body."""
    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    kernel = pl.pallas_call(
        double, out_shape=ones(32, 8), grid=(4,), in_specs=[spec], out_specs=spec, cost_estimate=estimate
    )
    assert counted(kernel, ones(32, 8)).hardware == flops


def test_many_devices_count_together():
    """What the compiler shards counts once over all; what every device computes alike, on each."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for spec, times in ((P("data"), 1), (P(), 8)):
        x, w = (
            jax.ShapeDtypeStruct(s, np.float32, sharding=jax.NamedSharding(mesh, p))
            for s, p in (((B, D), spec), ((D, F), P()))
        )
        text = jax.jit(jnp.dot).lower(x, w).compile().as_text()
        axes = _hlo.mesh_axes(mesh)
        compiled = Compiled(name="f", text=text, hardware=_hardware.parse("cpu:8"), axes=axes)
        assert from_hlo(_hlo.read(text), compiled).hardware == times * UP


@pytest.mark.parametrize(
    "text",
    ["", "HloModule", "ENTRY %e {\n  ROOT %d = f32[2]{0} dot(%a, %b), lhs_contracting_dims={0}\n}", "\x00(((\n}"],
)
def test_garbage_has_no_flops(text):
    compiled = Compiled(name="f", text=text, hardware=_hardware.parse("cpu:1"), axes=_hlo.MeshAxes(names=(), sizes=()))
    assert from_hlo(_hlo.read(text), compiled).hardware == 0
