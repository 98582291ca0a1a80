import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpar._dropout import dropout
from jaxpar._errors import ShardingError
from tests.test_constrain import inside, layout

KEY = jax.random.key(3)
X = jnp.ones((8, 6, 10), jnp.float32)
IDS = jnp.arange(8) + 100


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_masks_are_bitwise_the_same_on_every_mesh(sizes):
    plan = layout({}, data=sizes[0], fsdp=sizes[1])
    x = jax.device_put(X, jax.NamedSharding(plan.mesh, P("data")))
    found = inside(plan, lambda x, i: dropout(x, 0.3, key=KEY, ids=i), x, IDS)
    np.testing.assert_array_equal(found, dropout(X, 0.3, key=KEY, ids=IDS))


def test_a_mask_belongs_to_its_example():
    """In a microbatch, in another order, or in a replica of a `vmap`, an example keeps its mask."""
    whole = dropout(X, 0.3, key=KEY, ids=IDS)
    np.testing.assert_array_equal(dropout(X[5:7], 0.3, key=KEY, ids=IDS[5:7]), whole[5:7])
    np.testing.assert_array_equal(dropout(X, 0.3, key=KEY, ids=IDS[::-1]), whole[::-1])
    replicas = jax.vmap(lambda x, ids: dropout(x, 0.3, key=KEY, ids=ids))(X.reshape(2, 4, 6, 10), IDS.reshape(2, 4))
    np.testing.assert_array_equal(replicas.reshape(X.shape), whole)
    assert len({row.tobytes() for row in np.asarray(whole)}) == 8  # and no two share one


def test_what_is_kept_is_scaled_up():
    x = dropout(jnp.ones((4, 20_000), jnp.bfloat16), 0.25, key=KEY, ids=jnp.arange(4))
    assert x.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(x, np.float32))) == {0.0, float(jnp.bfloat16(1 / 0.75))}
    assert abs(float((x == 0).mean()) - 0.25) < 0.01


def test_rate_zero_draws_nothing():
    assert dropout(X, 0.0, key=KEY, ids=IDS) is X


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_out_of_range_is_an_error(rate):
    with pytest.raises(ShardingError, match=f"rate is {rate}; it must be at least 0 and below 1"):
        dropout(X, rate, key=KEY, ids=IDS)


def test_ids_must_name_each_example():
    with pytest.raises(ShardingError, match=r"ids have shape \(4,\), but x \(8, 6, 10\) holds \(8,\) examples"):
        dropout(X, 0.1, key=KEY, ids=IDS[:4])
