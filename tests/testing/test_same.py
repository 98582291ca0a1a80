"""`assert_same` and the criterion: what passes, what fails, and that a mutant cannot hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar.testing import assert_same, compare, mesh_shapes


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": normal(16, 64), "down": normal(64, 16, seed=1)}


@pytest.mark.parametrize("shape", mesh_shapes(("data", "tensor")))
def test_tensor_parallel_mlp(shape):
    """Column then row: one psum over tensor; weights sharded by hand, in a region of its own."""
    mesh = make_mesh(**shape)
    sharded = jax.shard_map(
        lambda params, x: lax.psum(mlp(params, x), "tensor"),
        mesh=mesh,
        in_specs=({"up": P(None, "tensor"), "down": P("tensor")}, P("data")),
        out_specs=P("data"),
    )
    table = assert_same(sharded, mlp, (PARAMS, normal(8, 16, seed=2)))
    assert table.reference == "float64 on one device"
    assert [(row.group, row.path) for row in table.rows] == [
        ("gradients", "0.down"),
        ("gradients", "0.up"),
        ("gradients", "1"),
        ("outputs", "(result)"),
    ]


def test_placed_arguments():
    mesh = make_mesh(fsdp=4, tensor=2)
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, P("fsdp"))) for name, leaf in PARAMS.items()}
    x = jax.device_put(normal(8, 16), NamedSharding(mesh, P("fsdp")))
    assert assert_same(mlp, mlp, (placed, x)).ok


def mean_over(mesh, local):
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


@pytest.mark.parametrize(
    ("local", "grads"),
    [
        (loss, False),  # no psum: one device's part
        (lambda w, x: lax.psum(loss(w, x), "data"), False),  # a sum of means
        (lambda w, x: lax.pmean(loss(w, x), "tensor"), False),  # over the wrong axis
        (lambda w, x: lax.pmean(loss(w * (1 + 1e-5), x), "data"), False),  # a hundred ulps
        (lambda w, x: lax.pmean(loss(lax.stop_gradient(w), x), "data"), True),  # the value is right, the gradient not
    ],
)
def test_mutants_are_killed(local, grads):
    mesh = make_mesh(data=4, tensor=2)
    args = normal(16, 16), normal(8, 16, seed=1)
    right = mean_over(mesh, lambda w, x: lax.pmean(loss(w, x), "data"))
    assert_same(right, loss, args, grads=False)
    with pytest.raises(AssertionError, match="The sharded run differs from one device"):
        assert_same(mean_over(mesh, local), loss, args, grads=grads)


def test_a_wrong_gradient_alone_is_named():
    """Outputs agree; only `grads=True` sees the second argument's gradient."""

    def forgetful(w, x):
        return loss(lax.stop_gradient(w), x)

    args = normal(16, 16), normal(8, 16, seed=1)
    assert assert_same(forgetful, loss, args, grads=False).ok
    with pytest.raises(AssertionError) as failure:
        assert_same(forgetful, loss, args)
    lines = str(failure.value).splitlines()
    assert lines[1].startswith("FAIL  gradients  0 ")
    assert [line[:4] for line in lines[2:4]] == ["ok  ", "ok  "]
    assert "Worst: gradients 0" in lines[-1]


def test_layers_and_their_state():
    """Parameters of a layer are compared by path, and so is the state that a call changes."""

    class Block(nnx.Module):
        def __init__(self, scale):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
            self.scale = scale

        def __call__(self, x):
            return self.norm(self.linear(x)) * self.scale

    x = normal(16, 8)
    table = assert_same(Block(2.0), Block(2.0), (x,))
    assert table.reference == "float64 on one device"
    assert {row.path for row in table.rows if row.group == "updates"} == {"0.norm.mean", "0.norm.var"}
    assert "0.linear.kernel" in {row.path for row in table.rows if row.group == "gradients"}
    with pytest.raises(AssertionError):
        assert_same(Block(2.0), Block(1.0), (x,))


def test_a_module_as_first_argument():
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    apply = lambda layer, x: layer(x)
    rows = assert_same(apply, apply, (layer, normal(4, 8))).rows
    assert {row.path for row in rows} == {"0.kernel", "0.bias", "1", "(result)"}


def test_a_compiled_step_runs_as_it_is():
    """Anything with a `plan`: called outside of any trace, on copies of the arguments; its updates are compared."""

    class Step:
        plan = "a plan"

        def __init__(self, rate):
            self.rate = rate

        def __call__(self, layer, x):
            assert not isinstance(x, jax.core.Tracer)
            return step(layer, x, self.rate)

    def step(layer, x, rate=0.1):
        value, grads = nnx.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2))(layer)
        layer.kernel.set_value(layer.kernel.get_value() - rate * grads.kernel.get_value())
        return value

    args = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), normal(4, 8)
    before = np.asarray(args[0].kernel.get_value())
    table = assert_same(Step(0.1), step, args, grads=False)
    assert [(row.group, row.path) for row in table.rows] == [("outputs", "(result)"), ("updates", "0.kernel")]
    assert np.array_equal(args[0].kernel.get_value(), before)
    with pytest.raises(AssertionError, match=r"FAIL  updates    0\.kernel"):
        assert_same(Step(0.2), step, args, grads=False)
    with pytest.raises(AssertionError, match=r"FAIL  updates    0\.kernel"):
        assert_same(Step(0.0), step, args, grads=False)
    with pytest.raises(ValueError, match="cannot be differentiated: grads=False"):
        assert_same(Step(0.1), step, args)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing would be compared"):
        assert_same(lambda x: None, lambda x: None, (normal(3),), grads=False)


def test_integers_must_be_equal():
    tokens = np.arange(8, dtype=np.int32)
    assert assert_same(lambda x: x * 2, lambda x: x * 2, (tokens,), grads=False).ok
    with pytest.raises(AssertionError, match=r"allowed 0\.0e"):
        assert_same(lambda x: jnp.where(x == 3, 7, x * 2), lambda x: x * 2, (tokens,), grads=False)
    with pytest.raises(ValueError, match="nothing can be differentiated: grads=False"):
        assert_same(lambda x: x * 2, lambda x: x * 2, (tokens,))


def test_random_numbers_fall_back_on_float32():
    key = jax.random.key(0)

    def dropped(key, x):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)

    table = assert_same(dropped, dropped, (key, normal(8, 4)))
    assert table.reference == (
        "the single-device run, within 1e-05: the reference draws random numbers, which differ in float64"
    )
    with pytest.raises(AssertionError, match="draws random numbers"):
        assert_same(lambda key, x: dropped(jax.random.fold_in(key, 1), x), dropped, (key, normal(8, 4)))


@pytest.mark.parametrize(
    ("reference", "reason", "bound"),
    [
        (lambda x: x.astype(jnp.float32) * 2.0, "casts to float32 inside", "1e-05"),
        (lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32), "casts to bfloat16, float32 inside", "3e-02"),
    ],
)
def test_casts_fall_back_on_float32(reference, reason, bound):
    table = assert_same(reference, reference, (normal(8),))
    assert reason in table.reference
    assert f"within {bound}" in table.reference


def test_a_reference_that_refuses_float64():
    def strict(x):
        if x.dtype != jnp.float32:
            raise TypeError("float32 only")
        return x * 2.0

    assert "raises TypeError" in assert_same(strict, strict, (normal(8),)).reference


def test_args_are_a_tuple():
    with pytest.raises(TypeError, match="args"):
        assert_same(jnp.sin, jnp.sin, normal(3))
    assert assert_same(jnp.sin, jnp.sin, (normal(3),)).ok


# The criterion, on numbers.


def test_twice_the_single_device_error():
    exact = {"w": np.array([1.0, 4.0])}
    single = {"w": np.array([1.0, 4.0], np.float32) + np.float32(1e-4)}
    off = lambda error: {"w": (np.array([1.0, 4.0]) + error).astype(np.float32)}
    assert compare(off(1.9e-4), single, exact).ok
    assert compare(off(-1.9e-4), single, exact).ok
    assert not compare(off(2.1e-4), single, exact).ok


def test_a_leaf_that_one_device_gets_right_has_a_floor_of_four_ulps():
    exact = {"w": np.array([0.0, 1.0])}
    single = {"w": np.array([0.0, 1.0], np.float32)}
    ulp = np.finfo(np.float32).eps
    assert compare({"w": np.array([3.9 * ulp, 1.0], np.float32)}, single, exact).ok
    assert not compare({"w": np.array([4.1 * ulp, 1.0], np.float32)}, single, exact).ok


def test_exact_zeros():
    zeros = {"w": np.zeros(3), "v": np.zeros(2)}
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), zeros)
    assert compare(single, single, zeros).ok
    assert not compare({**single, "w": np.full(3, 1e-30, np.float32)}, single, zeros).ok


def test_noise_around_zero_is_judged_by_the_largest_leaf():
    """The gradient of a key's bias is zero in exact arithmetic; what is left of it depends on the order of sums."""
    exact = {"bias": np.array([1e-17]), "kernel": np.array([1.0])}
    single = {"bias": np.array([1e-9], np.float32), "kernel": np.array([1.0], np.float32)}
    assert compare({**single, "bias": np.array([-5e-9], np.float32)}, single, exact).ok
    assert not compare({**single, "bias": np.array([2e-7], np.float32)}, single, exact).ok
    large = {"bias": np.array([1e-3]), "kernel": np.array([1.0])}  # no noise: a real leaf, if a small one
    assert not compare({"bias": np.array([1.00001e-3], np.float32), "kernel": single["kernel"]},
                       {"bias": np.array([1e-3], np.float32), "kernel": single["kernel"]}, large).ok  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        ({}, "the sharded run lacks it"),
        ({"w": np.ones(2, np.float32), "x": np.ones(1, np.float32)}, "the single-device run lacks it"),
        ({"w": np.ones(3, np.float32)}, "float32[3] instead of float32[2]"),
        ({"w": np.ones(2, np.float16)}, "float16[2] instead of float32[2]"),
        ({"w": np.array([1, np.nan], np.float32)}, "NaN or infinite"),
        ({"w": np.array([1, np.inf], np.float32)}, "NaN or infinite"),
    ],
)
def test_what_no_number_says(ours, note):
    single = {"w": np.ones(2, np.float32)}
    table = compare(ours, single, {"w": np.ones(2)})
    assert not table.ok
    assert note in str(table)
    assert compare(single, single, {"w": np.ones(2)}).ok


def test_nan_where_one_device_has_nan():
    single = {"w": np.array([1, np.nan, -np.inf], np.float32)}
    assert compare(single, single, {"w": np.array([1, np.nan, -1e300])}).ok
    assert not compare({"w": np.array([1, np.nan, np.inf], np.float32)}, single, None).ok


def test_without_float64_the_bound_holds():
    single = {"w": np.array([1.0, 2.0], np.float32)}
    near, far = ({"w": np.array([1.0, 2.0 + off], np.float32)} for off in (1.5e-5, 3e-5))
    assert compare(near, single, None).ok
    assert not compare(far, single, None).ok
    assert compare(far, single, None, bound=1e-4).ok


def test_tables_add_up_and_name_the_worst():
    exact, single = np.ones(2), np.ones(2, np.float32)
    off = single + np.float32(2e-7)
    both = compare(single, single, exact) + compare({"w": off}, {"w": single}, {"w": exact}, group="updates")
    assert both.ok
    assert (both.worst.group, both.worst.path) == ("updates", "w")
    assert str(both).endswith(
        "2 of 2 leaves agree with float64 on one device. Worst: updates w, 0.5 of what is allowed."
    )
    assert compare({}, {}, {}).worst is None


def test_keys_and_python_numbers():
    ours = {"loss": 1.0, "key": jax.random.key(0), "step": 3}
    assert compare(ours, ours, None).ok
    assert not compare({**ours, "key": jax.random.key(1)}, ours, None).ok
    assert not compare({**ours, "step": 4}, ours, None).ok
