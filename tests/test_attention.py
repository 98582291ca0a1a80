import dataclasses
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

import jaxpar as jp
from jaxpar import _blockwise, _kernels
from jaxpar._errors import ShardingError
from jaxpar._sequence import ContextSplit
from jaxpar.testing import compare
from tests import _attention as written


def attend(given, *, segments=False, **options):
    return jp.attention(
        *(given[name] for name in "qkv"),
        positions=given["positions"],
        segments=given["segments"] if segments else None,
        **options,
    )


@pytest.mark.parametrize(
    ("mask", "key_heads", "length"),
    [("causal", 2, 29), ("window", 8, 24), ("both sides", 1, 29), ("segments", 4, 31), ("all", 1, 7), ("all", 8, 29)],
)
def test_blocks_make_the_whole(mask, key_heads, length, monkeypatch):
    """Outputs and gradients, over blocks that fill up (29 in blocks of 8) and that do not."""
    given, settings = written.inputs(length, key_heads), written.MASKS[mask]
    monkeypatch.setattr(_kernels, "BLOCK", 8)
    found = jax.jit(lambda given: written.results(lambda x: attend(x, kernel="blockwise", **settings), given))(given)
    table = compare(found, *written.reference(given, **settings))
    assert table.ok, str(table)


def test_positions_decide_and_not_places():
    """A permuted sequence gives the permuted result; without positions, places are positions."""
    given = jax.tree.map(jnp.asarray, written.inputs(12, 2))
    order = np.random.default_rng(1).permutation(12)
    permuted = {name: x[:, order] for name, x in given.items()}
    run = jax.jit(lambda given: attend(given, window=5))
    expected = jax.jit(lambda given: jp.attention(given["q"], given["k"], given["v"], window=5))(given)
    np.testing.assert_allclose(run(given), expected, atol=1e-6)
    np.testing.assert_allclose(run(permuted), expected[:, order], atol=1e-6)


def test_a_token_that_sees_nothing_gets_zeros():
    """And moves no gradient; of the others nothing is lost."""
    given = jax.tree.map(jnp.asarray, written.inputs(4, 8, rows=1))
    keys = _blockwise.Marks(jnp.array([[1, 2, 3, 4]]), None)
    setting = _blockwise.Setting(causal=True, window=None, scale=0.5)

    def total(q):
        heads = _blockwise.Heads(q[:, :, :, None], given["k"], given["v"])
        out = _blockwise.blockwise(heads, _blockwise.Marks(jnp.arange(4)[None], None), keys, setting)
        return out.sum(), out

    (_, out), d_q = jax.jit(jax.value_and_grad(total, has_aux=True))(given["q"])
    assert (out[0, 0] == 0).all()
    assert (d_q[0, 0] == 0).all()
    assert (out[0, 1] != 0).all()
    assert jnp.isfinite(d_q).all()


def test_memory_grows_with_the_length_alone():
    """Twice the tokens take twice the memory, not four times, and no array is as large as all scores."""

    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        step = jax.jit(jax.grad(lambda q: jp.attention(q, q, q, kernel="blockwise").sum()))
        compiled = step.lower(q).compile()
        shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < length * length / 4
        return compiled.memory_analysis().temp_size_in_bytes

    short, long, longer = (temporary(length) for length in (4096, 8192, 16384))
    assert longer - long <= 1.1 * 2 * (long - short)


def test_xla_can_be_differentiated_twice():
    given = jax.tree.map(jnp.asarray, written.inputs(6, 2, rows=1))
    total = lambda kernel: lambda q: (attend({**given, "q": q}, kernel=kernel) ** 2).sum()

    @jax.jit
    def run(q):
        product = jax.jvp(jax.grad(total("xla")), (q,), (jnp.ones_like(q),))[1]
        return jax.grad(total("xla"))(q), jax.grad(total("blockwise"))(q), product

    mine, theirs, product = run(given["q"])
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert jnp.abs(product).max() > 0.1


# ---- which kernel


ASKED = _kernels.Asked(causal=True, window=None, scale=1.0, segments=False, positions=True, name=None)
CONTEXT = ContextSplit(axis="context", size=8, method="allgather")
RING = dataclasses.replace(CONTEXT, method="ring")


def chosen(platform, *, split=None, length=4096, features=128, dtype=jnp.bfloat16, precision="default", **asked):
    mesh = {"tpu": "v5e:2x4", "gpu": "h100:1x8", "cpu": None}[platform]
    mesh = jp.mesh(data=8) if mesh is None else jp.mesh(mesh, data=8)
    q = jax.ShapeDtypeStruct((1, length, 8, features), dtype)
    with jax.default_matmul_precision(precision):
        return _kernels.choose(dataclasses.replace(ASKED, **asked), q, mesh=mesh, split=split)


def test_each_platform_has_its_kernel():
    assert chosen("cpu", length=1024).words == "attention: xla on cpu"
    assert chosen("cpu", length=2048).words == "attention: xla on cpu"
    assert chosen("cpu", length=1500).words == "attention: blockwise on cpu"
    assert chosen("tpu", positions=False).words == "attention: splash on tpu"
    assert chosen("tpu", name="xla").words == "attention: xla on tpu"
    nan = "NaN where positions do not go up by one in a segment: kernel='xla' or 'blockwise' takes any"
    assert chosen("tpu").words == f"attention: splash on tpu; {nan}"
    assert chosen("tpu", split=CONTEXT).words == f"attention: allgather over context=8, splash on tpu; {nan}"
    assert chosen("tpu", split=RING).words == f"attention: ring over context=8, splash on tpu; {nan}"
    assert chosen("gpu").words.startswith("attention: xla on gpu, not cudnn: no GPU is here")


def test_a_kernel_is_that_of_the_platform_that_is_traced_for():
    """Also by a function that was traced for another before."""
    q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    step = jax.jit(lambda q: jp.attention(q, q, q))
    for platform, is_kernel in (("cpu", False), ("tpu", True), ("cpu", False)):
        with _kernels.traced_for(platform), jax.default_matmul_precision("default"):
            assert ("pallas_call" in str(jax.make_jaxpr(step)(q))) == is_kernel


@pytest.mark.parametrize(
    ("platform", "asked", "reason"),
    [
        ("tpu", {"length": 800, "split": CONTEXT}, "100 queries of 128 features are no multiples of 128"),
        ("tpu", {"split": RING, "window": 9}, "where a window ends"),
        ("tpu", {"split": dataclasses.replace(RING, zigzag=True), "length": 1024}, "64 queries of 128"),
        ("tpu", {"precision": "highest", "split": CONTEXT}, "jax_default_matmul_precision='highest' cannot be had"),
        ("cpu", {"name": "splash"}, "this is cpu"),
        ("tpu", {"name": "cudnn"}, "this is tpu"),
        ("cpu", {"name": "xla", "split": RING}, "ring merges parts"),
    ],
)
def test_what_cannot_work_is_said(platform, asked, reason):
    """As the reason of another choice, or as an error if the kernel was named."""
    if "name" in asked:
        with pytest.raises(ShardingError, match=reason):
            chosen(platform, **asked)
    else:
        found = chosen(platform, **asked)
        assert found.name == "blockwise"
        assert reason in found.words


def test_shapes_that_do_not_fit():
    q, k = jnp.ones((2, 4, 6, 8)), jnp.ones((2, 4, 4, 8))
    assert jp.attention(q, k[:, :, :3], k[:, :, :3]).shape == q.shape
    for args, options, said in (
        ((q, k, k), {}, "6 query heads and 4 key heads"),
        ((q, q, k), {}, r"v \(2, 4, 4, 8\)"),
        ((q, q, q), {"positions": jnp.arange(4)}, r"positions \(4,\)"),
        ((q, q, q), {"window": 0}, "window is 0"),
        ((q, q, q), {"kernel": "flash"}, "'blockwise', 'splash', 'cudnn', 'xla'"),
    ):
        with pytest.raises(ShardingError, match=said):
            inspect.unwrap(jp.attention)(*args, **options)


def test_a_scan_over_layers_keeps_no_masks():
    """Marks are alike in every layer: JAX computed the masks of all blocks before the loop, and kept them."""
    x = jax.ShapeDtypeStruct((2, 2048, 2, 4), jnp.float32)

    def loss(x):
        return jax.lax.scan(lambda x, _: (jp.attention(x, x, x, kernel="blockwise"), None), x, None, length=2)[0].sum()

    shapes = {variable.aval.shape for variable in variables_of(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)}
    assert (2, 2, 1, 512, 512) in shapes  # scores of one pair of blocks
    assert max(map(math.prod, shapes)) < 2 * 2048**2


def variables_of(jaxpr):
    """What every operation of a program makes, in its loops too."""
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for inner in jax_core.jaxprs_in_params(eqn.params):
            yield from variables_of(inner)
