import dataclasses
import inspect

import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import ShardingError


def unchecked(kind, **settings):
    """An instance of `kind` whose arguments only `kind` itself has checked."""
    return inspect.unwrap(kind.__init__)(object.__new__(kind), **settings)


def make():
    return {"w": jnp.ones((64, 48)), "b": jnp.ones(48)}


def planned(*strategies, factory=make, mesh=None, **settings):
    return jp.plan(factory, mesh or jp.mesh(data=8), list(strategies), optimizer=optax.adam(1e-3), **settings)


def without_text(plan):
    """A plan less the words that say which strategies made it."""
    records = {path: dataclasses.replace(record, reasons=()) for path, record in plan.records.items()}
    return records, plan.optimizer_records, plan.dims, plan.replicas, plan.shards, plan.totals()


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["1", "2", "3 axes"]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_alone_is_dp_with_zero(stage, axes):
    others = [jp.FSDP(), jp.TP(column=["w"])]
    mesh = jp.mesh(**axes)
    alone = planned(jp.ZeRO(stage), *others, mesh=mesh)
    assert without_text(alone) == without_text(planned(jp.DP(), jp.ZeRO(stage), *others, mesh=mesh))


@pytest.mark.parametrize(("stage", "gradient"), [(1, P()), (2, P("data"))])
def test_the_update_is_split_and_the_parameters_are_whole(stage, gradient):
    plan = planned(jp.ZeRO(stage))
    record = plan.records["w"]
    assert (record.storage, record.compute) == (P(), P())
    assert record.gradient == gradient
    assert record.slots == P("data")
    assert plan.optimizer_records["0.mu.w"].storage == P("data")


def test_small_leaves_keep_whole_slots_and_the_plan_says_so():
    record = planned(jp.ZeRO(1)).records["b"]
    assert record.slots == P()
    assert record.reasons == (("ZeRO", "slots whole: 192 bytes < min_bytes=4096"),)
    assert planned(jp.ZeRO(1, min_bytes=192)).records["b"].slots == P("data")


def test_a_leaf_that_does_not_divide_keeps_whole_slots_and_the_plan_says_so():
    plan = planned(jp.ZeRO(1), factory=lambda: {"odd": jnp.ones((63, 65)), "even": jnp.ones((64, 64))})
    assert plan.records["odd"].reasons == (("ZeRO", "slots whole: no dim of (63, 65) divides by 8"),)
    assert plan.records["even"].slots == P("data")


def test_totals_count_pieces():
    """w: 12,288 bytes, b: 192; Adam keeps two of each, and a count of 4 bytes."""
    totals = {stage: planned(jp.ZeRO(stage)).totals() for stage in (1, 2)}
    assert {each.parameters for each in totals.values()} == {12480}
    assert {each.optimizer for each in totals.values()} == {2 * (12288 // 8 + 192) + 4}
    assert (totals[1].gradients, totals[2].gradients) == (12480, 12288 // 8 + 192)


def test_with_fsdp_on_another_axis_slots_are_split_over_both():
    """Hybrid sharding: parameters over fsdp, replicated over data; optimiser state over both."""
    plan = planned(jp.ZeRO(2), jp.FSDP(), mesh=jp.mesh(data=2, fsdp=4))
    record = plan.records["w"]
    assert record.storage == P("fsdp")
    assert record.compute == P()
    assert record.slots == record.gradient == P("fsdp", "data")
    assert plan.optimizer_records["0.nu.w"].storage == P("fsdp", "data")
    assert plan.batch_axes == ("data", "fsdp")
    assert (plan.replicas, plan.shards) == ((), ("data", "fsdp"))


def test_reduce_step_keeps_a_whole_accumulator():
    assert planned(jp.ZeRO(2)).shards == ("data",)
    plan = planned(jp.ZeRO(2, reduce="step"))
    assert (plan.replicas, plan.shards) == (("data",), ())


def test_frozen_leaves_have_no_slots():
    plan = planned(jp.ZeRO(1), factory=lambda: {"w": jnp.ones((64, 48)), "v": jnp.ones((64, 48))}, trainable="v")
    assert plan.records["w"].slot == "frozen"
    assert plan.records["w"].slots == P()
    assert plan.follow("w").moves == ()
    assert list(plan.optimizer_records) == ["0.count", "0.mu.v", "0.nu.v"]
    assert (plan.totals().num_trainable, plan.totals().gradients) == (3072, 12288)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 3}, "ZeRO: stage is 3. Use 1 or 2; stage 3, sharded parameters, is FSDP()."),
        (
            {"stage": 1, "reduce": "step"},
            "ZeRO: reduce='step' has no effect at stage 1, which always reduces once. Leave it out.",
        ),
    ],
    ids=["stage", "reduce"],
)
def test_a_wrong_setting_is_an_error(settings, message):
    with pytest.raises(ShardingError) as error:
        unchecked(jp.ZeRO, **settings)
    assert str(error.value) == message
    assert jp.ZeRO(2, reduce="step").stage == 2


def test_zero_that_changes_nothing_is_an_error():
    with pytest.raises(ShardingError) as error:
        planned(jp.ZeRO(1, min_bytes=1 << 20))
    assert str(error.value) == (
        "ZeRO changes nothing: of 2 leaves, the largest of 12288 bytes, none is trained, at least min_bytes=1048576, "
        "and has a dim that data=8 divides. Lower min_bytes, or use DP()."
    )
