"""Tiny programs whose collectives follow by hand, compiled here; and what `assert_traffic` says when they differ."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar._errors import ShardingError
from jaxpar.testing import Expect, assert_traffic, collectives, mesh_shapes


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def placed(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def mapped(mesh, into, out):
    """`fn` on each device's part, with collectives by hand."""
    return lambda fn: jax.shard_map(fn, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)


MESH = {"fsdp": 4, "tensor": 2}


@pytest.fixture
def mesh():
    return make_mesh(**MESH)


# Each kind, by hand.


def test_psum_is_an_all_reduce(mesh):
    f = mapped(mesh, P("fsdp", "tensor"), P(None, "tensor"))(lambda x: lax.psum(x, "fsdp"))
    x = placed(mesh, (8, 4), "fsdp", "tensor")
    assert_traffic(f, {("all-reduce", "fsdp"): Expect(count=1, bytes=2 * 2 * 4, rounds=1)}, x)


def test_psum_over_two_axes(mesh):
    f = mapped(mesh, P("fsdp", "tensor"), P())(lambda x: lax.psum(x, ("tensor", "fsdp")))
    x = placed(mesh, (8, 4), "fsdp", "tensor")
    assert_traffic(f, {("all-reduce", ("fsdp", "tensor")): 1}, x)
    assert_traffic(f, {("all-reduce", ("tensor", "fsdp")): 1}, x)  # a set of axes, whatever order it is written in


def test_psum_scatter_is_a_reduce_scatter(mesh):
    f = mapped(mesh, P(None, "tensor"), P("fsdp", "tensor"))(lambda x: lax.psum_scatter(x, "fsdp", tiled=True))
    x = placed(mesh, (8, 4), None, "tensor")
    assert_traffic(f, {("reduce-scatter", "fsdp"): Expect(count=1, bytes=8 * 2 * 4)}, x)


@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather(mesh, dim):
    spec = ("fsdp", None) if dim == 0 else (None, "fsdp")
    f = mapped(mesh, P(*spec), P())(lambda x: lax.all_gather(x, "fsdp", axis=dim, tiled=True))
    assert_traffic(f, {("all-gather", "fsdp"): Expect(count=1, bytes=8 * 8 * 4)}, placed(mesh, (8, 8), *spec))


def test_all_to_all(mesh):
    f = mapped(mesh, P("fsdp"), P(None, "fsdp"))(lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True))
    assert_traffic(f, {("all-to-all", "fsdp"): Expect(count=1, bytes=2 * 8 * 4)}, placed(mesh, (8, 8), "fsdp"))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_ppermute_moves_along_its_axis(mesh, axis):
    ring = [(i, (i + 1) % MESH[axis]) for i in range(MESH[axis])]
    f = mapped(mesh, P("fsdp", "tensor"), P("fsdp", "tensor"))(lambda x: lax.ppermute(x, axis, ring))
    assert_traffic(f, {("collective-permute", axis): 1}, placed(mesh, (8, 4), "fsdp", "tensor"))


def test_axes_of_size_one_move_nothing():
    mesh = make_mesh(data=1, fsdp=8)
    f = mapped(mesh, P(), P())(lambda x: lax.psum(x, "data"))
    assert collectives(f, placed(mesh, (8, 8))) == ()


def test_devices_in_another_order():
    """Groups are positions in the mesh, not device ids."""
    devices = np.array(jax.devices())[[3, 1, 2, 0, 7, 6, 5, 4]].reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    f = mapped(mesh, P("fsdp", "tensor"), P("fsdp"))(lambda x: lax.psum(x, "tensor"))
    assert_traffic(f, {("all-reduce", "tensor"): 1}, placed(mesh, (8, 4), "fsdp", "tensor"))


# Loops and branches.


def test_a_scan_multiplies(mesh):
    @mapped(mesh, P("fsdp", "tensor"), P("fsdp", "tensor"))
    def f(x):
        return lax.scan(lambda h, _: (jnp.sin(lax.psum(h, "fsdp")), None), x, length=5)[0]

    x = placed(mesh, (8, 4), "fsdp", "tensor")
    assert_traffic(f, {("all-reduce", "fsdp"): Expect(count=5, bytes=5 * 16, rounds=5)}, x)
    assert_traffic(f, {("all-reduce", "fsdp", 1): 5}, x)


def test_nested_scans_multiply_twice(mesh):
    @mapped(mesh, P("fsdp", "tensor"), P("fsdp", "tensor"))
    def f(x):
        def outer(h, _):
            h = lax.scan(lambda g, _: (jnp.sin(lax.psum(g, "fsdp")), None), h, length=5)[0]
            return jnp.cos(lax.pmean(h, "tensor")), None

        return lax.scan(outer, lax.psum(x, ("fsdp", "tensor")), length=3)[0]

    assert_traffic(
        f,
        {("all-reduce", "fsdp", 2): 15, ("all-reduce", "tensor", 1): 3, ("all-reduce", ("fsdp", "tensor"), 0): 1},
        placed(mesh, (8, 4), "fsdp", "tensor"),
    )


def test_a_loop_over_data_is_unknown(mesh):
    @mapped(mesh, (P("fsdp"), P()), P("fsdp"))
    def f(x, n):
        return lax.fori_loop(0, n, lambda _, h: jnp.sin(lax.psum(h, "fsdp")), x)

    args = placed(mesh, (8, 4), "fsdp"), placed(mesh, (), dtype=jnp.int32)
    assert_traffic(f, {("all-reduce", "fsdp"): None}, *args)
    with pytest.raises(AssertionError, match="a loop does not say how often it runs"):
        assert_traffic(f, {("all-reduce", "fsdp"): 1}, *args)


def test_branches_are_marked(mesh):
    @mapped(mesh, (P("fsdp", "tensor"), P()), P("fsdp", "tensor"))
    def f(x, n):
        return lax.cond(n > 0, lambda x: lax.psum(jnp.sin(x), "fsdp"), lambda x: lax.psum(jnp.cos(x), "tensor"), x)

    traffic = collectives(f, placed(mesh, (8, 4), "fsdp", "tensor"), placed(mesh, (), dtype=jnp.int32))
    assert sorted((each.axes, each.conditional) for each in traffic) == [(("fsdp",), True), (("tensor",), True)]


# What the partitioner adds.


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


@pytest.mark.parametrize("shape", mesh_shapes(("data", "tensor")))
def test_data_parallel_gradients_cross_once(shape):
    """The batch is split over `data`: one all-reduce of the gradient, and nothing where `data` is 1."""
    mesh = make_mesh(**shape)
    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P()))
    args = placed(mesh, (32, 64)), placed(mesh, (16, 32), "data")
    assert_traffic(
        step, {("all-reduce", "data", 0): Expect(count=1, bytes=32 * 64 * 4)} if shape["data"] > 1 else {}, *args
    )


def test_fsdp_gathers_and_scatters(mesh):
    """On CPU the reduce-scatter is an all-reduce of which each device slices its own rows."""
    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P("fsdp")))
    args = placed(mesh, (32, 64), "fsdp"), placed(mesh, (64, 32), "fsdp")
    assert_traffic(step, {("all-gather", "fsdp"): 1, ("reduce-scatter", "fsdp"): 1}, *args)
    [scatter] = [each for each in collectives(step, *args) if each.kind == "reduce-scatter"]
    assert (scatter.bytes, sorted(scatter.shape)) == (32 * 64 * 4, [32, 64])


def test_scanned_layers(mesh):
    """Six layers, weights over both axes: everything that moves is in the loop.

    Forward and backward gather the weight over fsdp and the activation over tensor; the gradients of both are
    scattered back.
    """

    def scanned(w, x):
        return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)

    step = jax.jit(jax.grad(scanned), out_shardings=NamedSharding(mesh, P(None, "fsdp", "tensor")))
    args = placed(mesh, (6, 256, 256), None, "fsdp", "tensor"), placed(mesh, (64, 256), "fsdp")
    assert_traffic(
        step,
        {
            ("all-gather", "fsdp", 1): 12,
            ("all-gather", "tensor", 1): 12,
            ("reduce-scatter", "fsdp", 1): 6,
            ("reduce-scatter", "tensor", 1): 6,
        },
        *args,
    )


def test_three_axes_hybrid():
    """HSDP by hand: scattered over fsdp, what is left reduced over data, gathered again; tensor takes no part."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    @mapped(mesh, P(("data", "fsdp")), P())
    def f(x):
        own = lax.psum(lax.psum_scatter(x, "fsdp", tiled=True), "data")
        return lax.all_gather(jnp.sin(own), "fsdp", tiled=True)

    assert_traffic(
        f,
        {
            ("reduce-scatter", "fsdp"): Expect(count=1, bytes=4 * 4 * 4),
            ("all-reduce", "data"): Expect(count=1, bytes=2 * 4 * 4),
            ("all-gather", "fsdp"): Expect(count=1, bytes=4 * 4 * 4),
        },
        placed(mesh, (16, 4), ("data", "fsdp")),
    )


def test_a_resharding_is_an_all_to_all():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    axes = ("data", "fsdp", "tensor")
    f = lambda x: lax.with_sharding_constraint(x * 2.0, NamedSharding(mesh, P(None, axes)))
    assert_traffic(f, {("all-to-all", axes): 1}, placed(mesh, (64, 256), axes))


def test_combined_gradients_are_counted_one_by_one(mesh):
    """Two gradients in one combined all-reduce: two tensors, one round."""

    def two(w, x):
        return jnp.sum((jnp.tanh(x @ w[0]) @ w[1]) ** 2)

    step = jax.jit(jax.grad(two), out_shardings=NamedSharding(mesh, P()))
    args = (placed(mesh, (256, 512)), placed(mesh, (512, 128))), placed(mesh, (64, 256), "fsdp")
    both = 4 * (256 * 512 + 512 * 128)
    assert_traffic(step, {("all-reduce", "fsdp"): Expect(count=2, rounds=1, bytes=both)}, *args)
    with pytest.raises(AssertionError, match="1 rounds instead of 2"):
        assert_traffic(step, {("all-reduce", "fsdp"): Expect(count=2, rounds=2)}, *args)


def test_sources_are_the_users_lines(mesh):
    def f(x):
        return jnp.sum(x)  # here

    [each] = collectives(f, placed(mesh, (8, 4), "fsdp"))
    line = f.__code__.co_firstlineno + 1
    assert each.source.endswith(f"test_traffic.py:{line}")
    assert "reduce_sum" in each.op_name


# What may be given.


def test_whatever_can_be_compiled(mesh):
    x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp")))
    f = ft.partial(jnp.sum, axis=0)
    lowered = jax.jit(f).lower(x)
    forms = [
        collectives(f, x),
        collectives(jax.jit(f), x),
        collectives(lowered),
        collectives(lowered.compile()),
        collectives(lowered, mesh=mesh),
    ]
    assert len({tuple(each) for each in forms}) == 1
    assert [(each.kind, each.axes) for each in forms[0]] == [("all-reduce", ("fsdp",))]


def test_nnx_modules(mesh):
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    x = placed(mesh, (8, 4), "fsdp")
    total = lambda layer, x: layer(x).sum()
    assert_traffic(total, {("all-reduce", "fsdp"): 1}, layer, x)
    assert_traffic(nnx.jit(total), {("all-reduce", "fsdp"): 1}, layer, x)


def test_a_step_of_a_plan_brings_its_mesh(mesh):
    """Anything with `lower` and `plan.mesh`; here the arguments are on no mesh that could be guessed."""

    class Plan:
        def __init__(self):
            self.mesh = mesh

    class Step:
        plan = Plan()

        def lower(self, x):
            return jax.jit(jnp.sum, in_shardings=NamedSharding(mesh, P("fsdp"))).lower(x)

    assert_traffic(Step(), {("all-reduce", "fsdp"): 1}, jax.ShapeDtypeStruct((8, 4), jnp.float32))


def test_no_mesh_to_be_found(mesh):
    with pytest.raises(ShardingError, match=r"on no mesh, so no axis can be named\. Place them, or give mesh="):
        collectives(jnp.sum, jnp.ones(8))
    assert collectives(jnp.sum, jnp.ones(8), mesh=mesh) == ()


def test_two_meshes(mesh):
    other = make_mesh(data=8)
    args = placed(mesh, (8,), "fsdp"), placed(other, (8,), "data")
    with pytest.raises(ShardingError, match="on 2 meshes"):
        collectives(jnp.add, *args)
    assert {each.axes for each in collectives(jnp.add, *args, mesh=other)} <= {
        ("data",),
        ("data[4/8]",),
        ("data[2/8]",),
        ("?",),
    }


def test_a_mesh_of_another_size(mesh):
    x = placed(mesh, (8, 4), "fsdp")
    small = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    with pytest.raises(ShardingError, match=r"runs on 8 devices, the mesh \{'fsdp': 4\} has 4"):
        collectives(jnp.sum, x, mesh=small)


def test_arguments_that_would_have_no_effect(mesh):
    x = placed(mesh, (8, 4), "fsdp")
    with pytest.raises(ShardingError, match="compiled already"):
        collectives(jax.jit(jnp.sum).lower(x), x)
    with pytest.raises(ShardingError, match="have no effect"):
        assert_traffic(collectives(jnp.sum, x), {}, x)
    with pytest.raises(ShardingError, match="have no effect"):
        assert_traffic((), {}, mesh=mesh)


# What is wrong is said.


def test_wrong_expectations_fail(mesh):
    x = placed(mesh, (8, 4), "fsdp")
    right = {("all-reduce", "fsdp"): 1}
    assert_traffic(jnp.sum, right, x)
    wrong = [
        {},
        {("all-reduce", "fsdp"): 0},
        {("all-reduce", "fsdp"): 2},
        {("all-reduce", "fsdp"): None},
        {("all-reduce", "tensor"): 1},
        {("all-reduce", ("fsdp", "tensor")): 1},
        {("reduce-scatter", "fsdp"): 1},
        {("all-reduce", "fsdp", 1): 1},
        {("all-reduce", "fsdp"): Expect(count=1, bytes=8)},
        {**right, ("all-gather", "fsdp"): 1},
    ]
    for expected in wrong:
        with pytest.raises(AssertionError, match="What moves between devices is not as expected"):
            assert_traffic(jnp.sum, expected, x)


def test_the_failure_shows_both_tables_and_the_compiler(mesh):
    with pytest.raises(AssertionError) as failure:
        assert_traffic(jnp.sum, {("all-gather", "fsdp"): 3}, placed(mesh, (8, 4), "fsdp"))
    message = str(failure.value)
    assert f"XLA:CPU, jax {jax.__version__}, on (fsdp=4, tensor=2)" in message
    rows = [line.split() for line in message.splitlines()]
    assert ["!", "all-gather", "fsdp", "any", "3", "0", "missing", "3"] in rows
    assert ["!", "all-reduce", "fsdp", "0", "-", "1", "surplus", "1"] in rows
    assert "all-reduce over fsdp: f32[], 4 B x 1, loop depth 0, at " in message


def test_keys_that_name_nothing(mesh):
    x = placed(mesh, (8, 4), "fsdp")
    with pytest.raises(ShardingError, match=r"'allreduce' is no collective\. Did you mean 'all-reduce'"):
        assert_traffic(jnp.sum, {("allreduce", "fsdp"): 1}, x)
    with pytest.raises(ShardingError, match=r"no axis 'fdsp'\. Did you mean 'fsdp'"):
        assert_traffic(jnp.sum, {("all-reduce", "fdsp"): 1}, x)
    with pytest.raises(ShardingError, match="is not \\(kind, axes\\)"):
        assert_traffic(jnp.sum, {"all-reduce": 1}, x)


def test_filtered_collectives(mesh):
    """What is given may be filtered first: here scalars do not count."""

    def f(x):
        return jnp.sum(x), jnp.sum(x, axis=0)

    traffic = collectives(f, placed(mesh, (8, 4), "fsdp"))
    assert_traffic(traffic, {("all-reduce", "fsdp"): 2})
    assert_traffic([each for each in traffic if each.shape], {("all-reduce", "fsdp"): 1})
    assert "2 collectives by XLA:CPU" in str(traffic)
