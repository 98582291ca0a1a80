"""One spelling of paths for every kind of state, and nothing lost on the way there and back."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from jaxpar import _tree
from jaxpar._errors import ShardingError


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.scale = 0.5


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Attention(rngs), Attention(rngs)])
        self.head = self.blocks[0].q  # tied
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def test_an_nnx_module_is_walked_by_reference():
    assert list(_tree.leaves(Model(nnx.Rngs(0)))) == [
        "blocks.0.q.kernel",  # and not head.kernel, which is the same variable
        "blocks.1.q.kernel",
        "norm.bias",
        "norm.mean",
        "norm.scale",
        "norm.var",
    ]


@pytest.mark.parametrize("wrap", [lambda m: (m, 3), lambda m: {"0": m}, lambda m: [m]], ids=["tuple", "dict", "list"])
def test_a_container_of_modules_is_a_graph(wrap):
    assert "0.blocks.1.q.kernel" in _tree.leaves(wrap(Model(nnx.Rngs(0))))


def linear_state():
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    return TrainState.create(apply_fn=print, params=params, tx=optax.adam(1e-3))


@dataclasses.dataclass
class Plain:
    w: object


jax.tree_util.register_dataclass(Plain, ["w"], [])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: {"a": {"b": np.ones(2)}, "c": [np.ones(1), np.float32(1)]}, ["a.b", "c.0", "c.1"]),
        (lambda: Plain(np.ones(2)), ["w"]),
        (lambda: jnp.ones(2), [""]),
        (lambda: jax.ShapeDtypeStruct((2,), "float32"), [""]),
        (lambda: {"f": print, "s": "text", "n": 3, "w": np.ones(1)}, ["w"]),
        (lambda: eqx.nn.Linear(2, 3, key=jax.random.key(0)), ["weight", "bias"]),
        (lambda: linear_state().params, ["dense.bias", "dense.kernel"]),
    ],
)
def test_a_pytree_is_walked_by_jax(make, expected):
    assert list(_tree.leaves(make())) == expected


def test_a_train_state_has_its_optimiser_under_its_own_names():
    paths = list(_tree.leaves(linear_state()))
    assert "params.dense.kernel" in paths
    assert "opt_state.0.mu.dense.kernel" in paths


@pytest.mark.parametrize(
    "make",
    [lambda: {"a": np.arange(3.0), "f": print, "n": 3}, linear_state, lambda: (Model(nnx.Rngs(0)), {"x": np.ones(2)})],
)
def test_build_puts_together_what_flatten_took_apart(make):
    flat = _tree.flatten(make())
    doubled = {path: leaf + leaf for path, leaf in flat.leaves.items()}
    again = _tree.flatten(flat.build(doubled))

    assert again.leaves.keys() == flat.leaves.keys()
    assert again.kinds == flat.kinds
    assert all((again.leaves[path] == doubled[path]).all() for path in doubled)


def test_build_keeps_what_is_no_array():
    built = _tree.flatten({"a": np.ones(2), "f": print, "n": 3}).build({"a": np.zeros(2)})
    assert built["f"] is print
    assert built["n"] == 3


def test_replace_changes_a_module_in_place_and_rebuilds_a_pytree():
    model = Model(nnx.Rngs(0))
    variable = model.blocks[1].q.kernel
    assert _tree.replace(model, {"blocks.1.q.kernel": jnp.zeros((4, 4))}) is model
    assert model.blocks[1].q.kernel is variable
    assert not variable[...].any()
    assert model.blocks[0].q.kernel[...].any()
    assert model.head is model.blocks[0].q

    params = {"a": np.ones(2), "b": np.ones(2)}
    new = _tree.replace(params, {"a": np.zeros(2)})
    assert not new["a"].any()
    assert new["b"] is params["b"]
    assert params["a"].all()


def test_two_leaves_with_one_path_are_an_error():
    with pytest.raises(ShardingError) as error:
        _tree.flatten({"a.b": np.ones(1), "a": {"b": np.ones(1)}})
    assert str(error.value) == (
        "Two leaves have the path 'a.b': a key with a dot in it collides with a nested one. Rename one of the two."
    )
    assert len(_tree.leaves({"a.b": np.ones(1), "a": {"c": np.ones(1)}})) == 2
