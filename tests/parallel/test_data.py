import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import ShardingError


def make():
    return {"w": jnp.ones((64, 48)), "b": jnp.ones(48)}


def test_parameters_are_whole_and_the_batch_is_split():
    plan = jp.plan(make, jp.mesh(data=8), [jp.DP()])
    for record in plan.records.values():
        assert (record.storage, record.compute, record.gradient, record.slots) == (P(), P(), P(), P())
    assert plan.dims == {"batch": ("data",)}
    assert (plan.replicas, plan.shards) == (("data",), ())


def test_gradients_are_summed_once_a_step():
    (move,) = jp.plan(make, jp.mesh(data=8), [jp.DP()]).follow("w").moves
    assert (move.what, move.kind, move.axes, move.bytes, move.times) == ("gradient", "all-reduce", ("data",), 12288, 1)


def test_every_byte_is_on_every_device():
    totals = jp.plan(make, jp.mesh(data=8), [jp.DP()]).totals()
    assert (totals.parameters, totals.gradients, totals.num_parameters) == (12480, 12480, 3120)


def test_two_axes_of_replicas_are_both_crossed():
    plan = jp.plan(make, jp.mesh(data=4, fsdp=2), [jp.DP(), jp.DP(axis="fsdp")])
    assert plan.batch_axes == ("data", "fsdp")
    assert [move.axes for move in plan.follow("w").moves] == [("data", "fsdp")]


def test_reduce_dtype_is_a_floating_dtype():
    assert jp.DP(reduce_dtype="bfloat16").reduce_dtype == "bfloat16"
    with pytest.raises(ShardingError) as error:
        jp.DP(reduce_dtype="int8")
    assert str(error.value) == "DP: reduce_dtype='int8' is not a floating dtype. Use 'bfloat16' or 'float32'."
