"""A list of strategies is a set of declarations: its order means nothing, and all that is wrong is said at once."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec as P

import jaxpar as jp
from jaxpar import Plan
from jaxpar._errors import ShardingError
from jaxpar._strategy import check_types


class Block(nnx.Module):
    def __init__(self, dim, rngs):
        self.q = nnx.Linear(dim, dim, rngs=rngs)
        self.o = nnx.Linear(dim, dim, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, dim=64):
        self.emb = nnx.Embed(128, dim, rngs=rngs)
        self.blocks = nnx.List([Block(dim, rngs) for _ in range(3)])


def make():
    return Model(nnx.Rngs(0))


def make_odd():
    return Model(nnx.Rngs(0), dim=63)


TP = jp.TP(column=["*.q"], row=["*.o"], vocab=["emb"])


def refused(strategies, factory=make, mesh=None, **settings):
    with pytest.raises(ShardingError) as error:
        jp.plan(factory, mesh or jp.mesh(fsdp=4, tensor=2), strategies, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("axes", "strategies"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), jp.FSDP(), TP, jp.ZeRO(1)]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.ZeRO(2), jp.FSDP(blocks="blocks.*"), TP]),
        ({"data": 4, "fsdp": 2}, [jp.ZeRO(1), jp.FSDP(reduce="step"), TP]),  # TP has nothing to do
        ({"data": 2, "fsdp": 4}, [jp.FSDP(), jp.FSDP(axis="data", min_bytes=0)]),
    ],
    ids=["hsdp", "blocks", "inactive", "two FSDPs"],
)
def test_every_order_of_listing_gives_the_identical_plan(axes, strategies):
    mesh = jp.mesh(**axes)
    plans = [jp.plan(make, mesh, order) for order in itertools.permutations(strategies)]
    assert len({plan.to_json() for plan in plans}) == 1


def test_every_order_gives_the_identical_error():
    orders = itertools.permutations([jp.FSDP(whole=["none"]), jp.TP(column=["*.p"], row=["*.o"])])
    assert len({refused(order, make_odd) for order in orders}) == 1


def test_a_strategy_whose_axis_has_size_1_is_listed_as_inactive():
    """A script does not change between meshes: an axis that the mesh lacks is one of size 1."""
    for mesh in (jp.mesh(fsdp=8), jp.mesh(fsdp=8, tensor=1)):
        plan = jp.plan(make, mesh, [TP, jp.DP(), jp.FSDP()])
        assert plan.inactive == (("DP", "axis 'data' has size 1"), ("TP", "axis 'tensor' has size 1"))
        assert "inactive: TP, axis 'tensor' has size 1\n" in plan.table()
        assert plan.batch_axes == ("fsdp",)


def test_one_device_needs_no_strategy():
    plan = jp.plan(make, jp.mesh(data=1, allow_unused=True), [])
    assert plan.strategies == ()
    assert plan.batch_axes == ()
    assert {record.storage for record in plan.records.values()} == {P()}


def test_an_axis_that_no_strategy_uses_is_an_error():
    assert refused([jp.FSDP()]) == (
        "axis 'tensor' has size 2, but no strategy uses it, so 2 devices would do the same work. "
        "Add TP(column=[...], row=[...]) to the strategies, or leave the axis out of the mesh."
    )
    assert refused([], mesh=jp.mesh(data=8)).startswith("axis 'data' has size 8, but no strategy uses it")


def test_a_users_own_axis_name_is_named_in_a_strategy():
    own = Mesh(np.array(jax.devices()).reshape(4, 2), ("shard", "tensr"), axis_types=(AxisType.Auto,) * 2)
    assert refused([jp.FSDP(axis="shard")], mesh=own) == (
        "axis 'tensr' has size 2, but no strategy uses it, so 2 devices would do the same work. "
        "Did you mean 'tensor'? Name it in a strategy, as in FSDP(axis='tensr'), or leave the axis out of the mesh."
    )
    plan = jp.plan(make, own, [jp.FSDP(axis="shard"), jp.DP(axis="tensr")])
    assert plan.batch_axes == ("shard", "tensr")


def test_a_misspelt_axis_is_an_error():
    assert refused([jp.FSDP(axis="fdsp"), TP]) == (
        "FSDP(axis='fdsp'): the mesh has no axis 'fdsp'; it has {'fsdp': 4, 'tensor': 2}. Did you mean 'fsdp'? "
        "Name one of these, or add the axis to the mesh."
    )


@pytest.mark.parametrize(
    ("strategies", "pair", "axis"),
    [
        ([jp.FSDP(), jp.FSDP(min_bytes=1), TP], "FSDP and FSDP", "fsdp"),
        ([jp.FSDP(), jp.DP(axis="fsdp"), TP], "DP(axis='fsdp') and FSDP", "fsdp"),
        ([jp.FSDP(), jp.ZeRO(1, axis="fsdp"), TP], "FSDP and ZeRO(axis='fsdp')", "fsdp"),
        ([jp.FSDP(reduce="step"), jp.ZeRO(1, axis="fsdp"), TP], "FSDP and ZeRO(axis='fsdp')", "fsdp"),
        ([jp.FSDP(), jp.DP(axis="tensor"), TP], "DP(axis='tensor') and TP", "tensor"),
        ([jp.ZeRO(1, axis="tensor"), jp.FSDP(), TP], "TP and ZeRO(axis='tensor')", "tensor"),
        ([jp.ZeRO(1), jp.ZeRO(2), jp.FSDP(), TP], "ZeRO and ZeRO", "data"),
        ([jp.DP(), jp.DP(), jp.FSDP(), TP], "DP and DP", "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_strategies_on_one_axis_are_an_error(strategies, pair, axis):
    message = f"{pair} are both on axis {axis!r}. Give one of them another axis, or keep one."
    assert refused(strategies) == message
    assert refused(strategies[::-1]) == message


def test_the_same_object_twice_is_two_strategies():
    fsdp = jp.FSDP()
    assert "FSDP and FSDP are both on axis 'fsdp'" in refused([fsdp, fsdp, TP])


def test_dp_and_zero_share_an_axis():
    plan = jp.plan(make, jp.mesh(data=8), [jp.DP(), jp.ZeRO(1)])
    assert plan.batch_axes == ("data",)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([jp.FSDP], "FSDP (the class: call it) is not a strategy"),
        (["fsdp"], "'fsdp' is not a strategy"),
        ([jp.DP(), None], "None is not a strategy"),
        (jp.FSDP, "FSDP (the class: call it) is not a list of strategies"),
        (jp.DP(), f"{jp.DP()!r} is not a list of strategies"),
    ],
    ids=str,
)
def test_what_is_not_a_list_of_strategies_is_an_error(given, shown):
    with pytest.raises(ShardingError) as error:
        check_types(given)
    assert str(error.value).startswith(f"strategies: {shown}. Give ")
    assert str(error.value).endswith("as in [jp.FSDP(), jp.TP(...)].")
    assert check_types([jp.DP()]) == (jp.DP(),)


def test_all_failing_leaves_are_named_at_once_and_folded_over_layers():
    """63 divides by neither 4 nor 2; the biases are too small for FSDP, the embedding's 128 rows fit both."""
    assert refused([jp.FSDP(), jp.TP(column=["*.q"], row=["*.o"], vocab=["emb"])], make_odd) == (
        "5 problems:\n"
        "blocks.0.o.kernel: dim 0 has size 63, but axis 'tensor' has size 2, and 2 does not divide 63. Use a multiple "
        "of 2 (62 or 64 here), or another size of axis 'tensor', or leave this leaf out of TP's patterns. (And so for "
        "2 other layers.)\n"
        "blocks.0.q.bias: dim 0 has size 63, but axis 'tensor' has size 2, and 2 does not divide 63. Use a multiple "
        "of 2 (62 or 64 here), or another size of axis 'tensor', or leave this leaf out of TP's patterns. (And so for "
        "2 other layers.)\n"
        "blocks.0.q.kernel: dim 1 has size 63, but axis 'tensor' has size 2, and 2 does not divide 63. Use a multiple "
        "of 2 (62 or 64 here), or another size of axis 'tensor', or leave this leaf out of TP's patterns. (And so for "
        "2 other layers.)\n"
        "blocks.0.o.kernel: no dim of (63, 63) divides by axis 'fsdp' of size 4. Use a multiple of 4 (60 or 64 here), "
        "or another size of axis 'fsdp', or leave it whole: FSDP(whole=[\"blocks.*.o.kernel\"]). (And so for 2 other "
        "layers.)\n"
        "blocks.0.q.kernel: no dim of (63, 63) divides by axis 'fsdp' of size 4. Use a multiple of 4 (60 or 64 here), "
        "or another size of axis 'fsdp', or leave it whole: FSDP(whole=[\"blocks.*.q.kernel\"]). (And so for 2 other "
        "layers.)"
    )


def test_the_way_out_works():
    plan = jp.plan(make_odd, jp.mesh(fsdp=4, tensor=2), [jp.FSDP(whole=["blocks.*"]), jp.TP(vocab=["emb"])])
    assert plan.records["emb.embedding"].storage == P(("tensor", "fsdp"))
    assert plan.records["blocks.0.q.kernel"].storage == P()
    assert plan.records["blocks.0.q.kernel"].reasons == (("FSDP", "whole: asked for"),)


@pytest.mark.parametrize(
    ("chosen", "trained"),
    [("*.o", 6), (["*.o", "emb"], 7), (lambda path: path.endswith("bias"), 6), (None, 13)],
    ids=["pattern", "patterns", "function", "all"],
)
def test_trainable_chooses_what_has_gradients_and_optimiser_state(chosen, trained):
    plan = jp.plan(make, jp.mesh(fsdp=8), [jp.FSDP()], trainable=chosen)
    assert sum(record.slot == "parameter" for record in plan.records.values()) == trained
    assert sum(record.slot == "frozen" for record in plan.records.values()) == 13 - trained


def test_trainable_that_chooses_nothing_is_an_error():
    fsdp = {"strategies": [jp.FSDP()], "mesh": jp.mesh(fsdp=8)}
    assert refused(**fsdp, trainable=["*.o", "*.lora"]) == (
        "trainable: the pattern '*.lora' matches none of 13 leaves. Modules here are blocks.*.o, blocks.*.q, emb."
    )
    assert refused(**fsdp, trainable=lambda path: False) == (
        "trainable chooses none of 13 parameters. Leave it out to train all."
    )


def test_strategies_are_listed_with_the_settings_that_are_not_defaults():
    plan = jp.plan(make, jp.mesh(data=4, fsdp=2), [jp.ZeRO(2, min_bytes=1), jp.FSDP(blocks="blocks.*")])
    assert plan.strategies == ("FSDP(blocks='blocks.*')", "ZeRO(2, min_bytes=1)")
    assert json.loads(plan.to_json())["strategies"] == list(plan.strategies)
    assert isinstance(plan, Plan)


def test_a_bare_array_is_a_model():
    plan = jp.plan(lambda: jnp.ones((64, 64)), jp.mesh(fsdp=8), [jp.FSDP()])
    assert list(plan.records) == [""]
