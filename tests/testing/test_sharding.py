"""`assert_sharding`: each "rejects" has its "allows"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar._errors import ShardingError
from jaxpar.testing import assert_sharding


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2, 1), ("fsdp", "tensor", "data"), axis_types=(AxisType.Auto,) * 3)


def put(mesh, shape, *spec):
    return jax.device_put(jnp.ones(shape), NamedSharding(mesh, P(*spec)))


def test_equal_placements(mesh):
    tree = {"w": put(mesh, (8, 4), "fsdp", "tensor"), "b": put(mesh, (4,))}
    assert_sharding(tree, mesh, {"w": P("fsdp", "tensor"), "b": P()})
    assert_sharding(tree, mesh, {"w": P("fsdp", "tensor"), "b": P(None)})
    assert_sharding(tree, mesh, {"w": P("fsdp", ("tensor", "data")), "b": P("data")})  # data has size 1
    assert_sharding(tree["b"], mesh, P())


def test_all_wrong_leaves_are_listed(mesh):
    tree = {"a": put(mesh, (8, 4), "fsdp"), "b": put(mesh, (8, 4), "tensor"), "c": put(mesh, (8,)), "d": np.ones(8)}
    with pytest.raises(AssertionError) as failure:
        assert_sharding(tree, mesh, {"a": P("fsdp"), "b": P("fsdp"), "c": P("tensor"), "d": P()})
    message = str(failure.value)
    assert message.startswith("3 of 4 leaves are not placed as expected:\n")
    assert "b: is P('tensor'" in message
    assert "c: is P()" in message
    assert "d: is on no device (ndarray)" in message
    assert "a: " not in message


def test_one_device_is_not_the_mesh(mesh):
    with pytest.raises(AssertionError, match="on 1 device"):
        assert_sharding({"a": jnp.ones(8)}, mesh, P())


def test_specs_for_all_below(mesh):
    tree = {"mlp": {"up": put(mesh, (8, 4), "fsdp"), "down": put(mesh, (8, 4), "fsdp")}, "head": put(mesh, (8,))}
    assert_sharding(tree, mesh, {"mlp": P("fsdp"), "head": P()})
    assert_sharding(tree, mesh, {"mlp": {"up": P("fsdp"), "down": P("fsdp")}, "head": P()})
    assert_sharding(tree, mesh, {"mlp": P("fsdp"), "mlp.down": P("fsdp"), "head": P()})
    with pytest.raises(AssertionError, match=r"mlp\.down: is"):
        assert_sharding(tree, mesh, {"mlp": P("fsdp"), "mlp.down": P("tensor"), "head": P()})


def test_specs_that_fit_nothing(mesh):
    tree = {"head": put(mesh, (8,))}
    with pytest.raises(ShardingError, match="no leaf at haed"):
        assert_sharding(tree, mesh, {"head": P(), "haed": P()})
    with pytest.raises(AssertionError, match="head: no spec is given for it"):
        assert_sharding(tree, mesh, {})


def test_nothing_to_assert(mesh):
    with pytest.raises(ShardingError, match="nothing would be asserted"):
        assert_sharding({}, mesh, P())
    with pytest.raises(ShardingError, match="specs are missing"):
        assert_sharding({"a": jnp.ones(8)}, mesh)


def test_nnx_modules(mesh):
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    layer.kernel.set_value(put(mesh, (8, 4), "fsdp"))
    layer.bias.set_value(put(mesh, (4,)))
    assert_sharding(layer, mesh, {"kernel": P("fsdp"), "bias": P()})
    with pytest.raises(AssertionError, match="kernel: is"):
        assert_sharding(layer, mesh, {"kernel": P("tensor"), "bias": P()})


def test_a_plan_says_the_specs(mesh):
    class Plan:
        """What a plan is here: shardings for a tree, as a tree or by path."""

        def __init__(self, spec):
            self.spec = spec

        def shardings(self, tree):
            return jax.tree.map(lambda _: NamedSharding(mesh, self.spec), tree)

    tree = {"blocks": [put(mesh, (8, 4), "fsdp"), put(mesh, (8, 4), "fsdp")]}
    assert_sharding(tree, Plan(P("fsdp")))
    with pytest.raises(AssertionError, match="2 of 2 leaves"):
        assert_sharding(tree, Plan(P("tensor")))
    with pytest.raises(ShardingError, match="the plan says the specs"):
        assert_sharding(tree, Plan(P()), P())
