"""Checkpoints of released formats are read by every later version, on whatever Orbax and JAX there are.

To store another: `save(HERE / "format_N", 7, tree(jax.random.key(7)))`, by the oldest Python and JAX that we support.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import checkpoint

HERE = pathlib.Path(__file__).parent / "stored"


def tree(key):
    return {
        "w": jnp.arange(12.0).reshape(3, 4),
        "layers": [{"b": jnp.full(2, index, jnp.bfloat16)} for index in range(2)],
        "key": key,
        "epoch": 3,
    }


@pytest.mark.parametrize("home", sorted(HERE.iterdir()), ids=lambda home: home.name)
def test_a_stored_checkpoint(home):
    expected = tree(jax.random.key(7))
    like = {**tree(jax.random.key(0)), "w": jnp.zeros((3, 4)), "layers": {"b": np.zeros((2, 2), jnp.bfloat16)}}
    found = checkpoint.restore(home, {**like, "epoch": 0})
    assert found["w"].tolist() == expected["w"].tolist()
    assert found["layers"]["b"].tolist() == [[0, 0], [1, 1]]
    assert found["epoch"] == 3
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(expected["key"]).tolist()
    assert checkpoint.metadata(home) == {"note": home.name}
