import inspect

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import ShardingError, StepError


def unchecked(kind, **settings):
    """An instance of `kind` whose arguments only `kind` itself has checked."""
    return inspect.unwrap(kind.__init__)(object.__new__(kind), **settings)


def planned(factory, *strategies, mesh=None, **settings):
    return jp.plan(factory, mesh or jp.mesh(fsdp=8), list(strategies) or [jp.FSDP()], **settings)


def matrix(*shape):
    return lambda: {"w": jnp.ones(shape)}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(128, 64, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])


def make():
    return Model(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 32), P("fsdp")),
        ((32, 64), P(None, "fsdp")),
        ((64, 64), P("fsdp")),
        ((63, 64), P(None, "fsdp")),
        ((3, 3, 16, 64), P(None, None, None, "fsdp")),
    ],
    ids=str,
)
def test_the_largest_divisible_dim_is_split(shape, spec):
    record = planned(matrix(*shape)).records["w"]
    assert record.storage == record.gradient == record.slots == spec
    assert record.compute == P()
    assert record.reasons == (("FSDP", "the largest dim that divides"),)


@pytest.mark.parametrize(
    ("names", "spec", "why"),
    [
        (("embed", "mlp"), P("fsdp"), "its dim 'embed'"),
        (("mlp", "embed"), P(None, "fsdp"), "its dim 'embed'"),
        (("mlp", None), P(None, "fsdp"), "the largest dim that divides"),
    ],
)
def test_a_dim_named_embed_is_split_first(names, spec, why):
    record = planned(matrix(64, 128), dims=[("w", names)]).records["w"]
    assert (record.storage, record.reasons) == (spec, (("FSDP", why),))


def test_an_embed_dim_that_does_not_divide_gives_way():
    assert planned(matrix(63, 128), dims=[("w", ("embed", "mlp"))]).records["w"].storage == P(None, "fsdp")


def test_stacked_layers_are_never_split():
    """80 layers divide by 8, and are the largest dim."""
    plan = planned(matrix(80, 24, 16), dims=[("w", ("layers", ...))])
    assert plan.records["w"].storage == P(None, "fsdp")
    plan = planned(matrix(16, 80, 24), dims=[("w", (None, "layers", None))])
    assert plan.records["w"].storage == P(None, None, "fsdp")


def test_vectors_and_small_leaves_stay_whole_and_the_plan_says_so():
    plan = planned(lambda: {"w": jnp.ones((64, 64)), "small": jnp.ones((8, 8)), "long": jnp.ones(4096)})
    assert plan.records["small"].reasons == (("FSDP", "whole: 256 bytes < min_bytes=4096"),)
    assert plan.records["long"].reasons == (("FSDP", "whole: a vector"),)
    assert planned(lambda: {"small": jnp.ones((8, 8))}, jp.FSDP(min_bytes=256)).records["small"].storage == P("fsdp")


def test_whole_leaves_what_it_names():
    plan = planned(make, jp.FSDP(whole="emb"))
    assert plan.records["emb.embedding"].storage == P()
    assert plan.records["emb.embedding"].reasons == (("FSDP", "whole: asked for"),)
    assert plan.records["blocks.0.up.kernel"].storage == P(None, "fsdp")


def test_with_tp_the_two_take_different_dims_if_they_can():
    mesh = jp.mesh(fsdp=4, tensor=2)
    plan = planned(make, jp.FSDP(), jp.TP(column=["*.up"], vocab=["emb"]), mesh=mesh)
    record = plan.records["blocks.0.up.kernel"]
    assert (record.storage, record.compute) == (P("fsdp", "tensor"), P(None, "tensor"))
    assert plan.records["emb.embedding"].storage == P("tensor", "fsdp")


def test_totals_divide():
    """Emb 32,768 bytes and 4 x up 32,768 divide by 8; of each block, bias 512 and two norms of 256 stay whole."""
    totals = planned(make).totals()
    assert totals.parameters == totals.gradients == 5 * 32768 // 8 + 4 * (512 + 2 * 256)


def test_frozen_parameters_are_sharded_and_gathered_too():
    plan = planned(make, trainable="emb")
    assert [move.what for move in plan.follow("blocks.0.up.kernel").moves] == ["weight"]
    assert plan.totals().parameters > plan.totals().gradients == 32768 // 8


def test_reduce_step_replicates_the_accumulator():
    assert (planned(make).replicas, planned(make).shards) == ((), ("fsdp",))
    plan = planned(make, jp.FSDP(reduce="step"))
    assert (plan.replicas, plan.shards) == (("fsdp",), ())


def test_what_is_held_whole_is_noted():
    (note,) = planned(make).notes
    assert note == (
        "held whole: 5 parameters of 163,840 bytes (blocks.0.up.kernel, blocks.1.up.kernel, blocks.2.up.kernel, ...) "
        "are gathered outside of any scan; the compiler decides how many at once. If some are equal blocks, "
        'FSDP(blocks="blocks.*") gathers one at a time.'
    )
    (note,) = planned(make, jp.FSDP(blocks="blocks.*")).notes
    assert note == (
        "held whole: 1 parameter of 32,768 bytes (emb.embedding) is gathered outside of any scan; the compiler "
        "decides how many at once."
    )


@pytest.mark.parametrize(("remat", "gathers"), [(None, 2), ("full", 2), ("dots", 2), ("none", 1)])
def test_blocks_that_are_computed_again_are_gathered_again(remat, gathers):
    plan = planned(make, jp.FSDP(blocks="blocks.*", remat=remat))
    moves = plan.follow("blocks.each.up.kernel").moves
    assert [(move.what, move.times, move.bytes) for move in moves] == [
        *[("weight", 4, 32768)] * gathers,
        ("gradient", 4, 32768),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduce": "never"}, "FSDP: reduce='never'. Use 'microbatch' or 'step'."),
        (
            {"remat": "full"},
            "FSDP: remat='full' has no effect without blocks=. Name the blocks, or leave remat out.",
        ),
    ],
    ids=["reduce", "remat"],
)
def test_a_setting_without_effect_is_an_error(settings, message):
    with pytest.raises(ShardingError) as error:
        unchecked(jp.FSDP, **settings)
    assert str(error.value) == message
    assert jp.FSDP(blocks="blocks.*", remat="full", reduce="step")


def test_an_unknown_remat_policy_is_an_error():
    with pytest.raises(StepError, match=r"is not a remat policy\. Did you mean 'full'\? Use one of none, full, dots\."):
        jp.remat(make, "ful")


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ShardingError) as error:
        planned(make, jp.FSDP(whole=["emb", "*.upp"]))
    assert str(error.value) == (
        "FSDP: whole: the pattern '*.upp' matches none of 17 leaves. Did you mean 'up'? Modules here are "
        "blocks.*.norm, blocks.*.up, emb."
    )


def test_an_indivisible_leaf_is_an_error_with_both_numbers():
    with pytest.raises(ShardingError) as error:
        planned(matrix(63, 65))
    assert str(error.value) == (
        "w: no dim of (63, 65) divides by axis 'fsdp' of size 8. Use a multiple of 8 (64 or 72 here), or another size "
        "of axis 'fsdp', or leave it whole: FSDP(whole=[\"w\"])."
    )


def test_fsdp_that_changes_nothing_is_an_error():
    with pytest.raises(ShardingError) as error:
        planned(matrix(8, 8), jp.FSDP(axis="data"), mesh=jp.mesh(data=8))
    assert str(error.value) == (
        "FSDP(axis='data') changes nothing: of 1 leaves, the largest of 256 bytes, none is a matrix of at least "
        "min_bytes=4096 that may be split. Lower min_bytes, or use DP(axis='data')."
    )


def test_a_dim_that_another_strategy_has_split_is_named_with_what_is_left():
    """252 divides by 4; the half of it that TP leaves does not."""
    with pytest.raises(ShardingError) as error:
        planned(matrix(63, 252), jp.FSDP(), jp.TP(column="w"), mesh=jp.mesh(fsdp=4, tensor=2))
    assert str(error.value) == (
        "w: no dim of (63, 252), of which a device has (63, 126) already, divides by axis 'fsdp' of size 4. Use a "
        "multiple of 8 (248 or 256 here), or another size of axis 'fsdp', or leave it whole: FSDP(whole=[\"w\"])."
    )
