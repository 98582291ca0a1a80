"""Where experts lie, what a plan says they move, and what the compiled step does."""

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import testing
from jaxpar._errors import ShardingError
from tests import _programs as programs
from tests.test_experts import DIMS, D, E, F, params, sharded

STRATEGIES = [jp.DP(), jp.FSDP(min_bytes=0), jp.TP(), jp.EP()]


def planned(factory=params, dims=DIMS, strategies=STRATEGIES, **axes):
    return jp.plan(factory, programs.mesh(**axes), strategies, dims=dims)


def test_experts_are_split_by_the_expert_and_inside_as_matrices_are():
    plan = planned(expert=2, fsdp=2, tensor=2)
    up, down = plan.records["up"], plan.records["down"]
    assert (up.storage, up.compute) == (P("expert", "fsdp", "tensor"), P("expert", None, "tensor"))
    assert (down.storage, down.compute) == (P("expert", "tensor", "fsdp"), P("expert", "tensor"))
    assert plan.records["router"].compute == P()
    assert plan.batch_axes == ("expert", "fsdp")
    assert plan.shards == ("expert", "fsdp")


def test_what_a_plan_says_is_what_a_step_moves():
    """Each kind over each axis, of the experts' matrices: tokens, sums of hidden features, gradients."""
    plan = planned(data=2, expert=2, tensor=2)
    moves = {
        path: [(move.what, move.kind, move.axes) for move in plan.moves(plan.records[path])] for path in ("up", "down")
    }
    assert (
        moves["up"]
        == moves["down"]
        == [
            ("activation", "all-to-all", ("expert",)),
            ("activation", "all-to-all", ("expert",)),
            ("activation", "all-reduce", ("tensor",)),
            ("gradient", "all-reduce", ("data",)),
        ]
    )
    assert all(move.bytes == 4 * D for move in plan.moves(plan.records["up"]) if move.what == "activation")
    (gradient,) = [move for move in plan.moves(plan.records["up"]) if move.what == "gradient"]
    assert gradient.bytes == 4 * E // 2 * D * F // 2
    assert "chosen tokens to their experts" in str(plan.follow("up"))

    _, step, args = sharded(jp.Capacity(factor=E / 2), accumulate=1, data=2, expert=2, tensor=2)
    traffic = testing.collectives(step, *args)
    number = lambda kind, *axes: sum(each.kind == kind and each.axes == axes for each in traffic)
    assert number("all-to-all", "expert") == 4  # up and gate read the same tokens
    assert number("all-reduce", "tensor") == 3  # the third is of the weights of choices, B T K
    expected = jp.explain(step, *args).collectives
    unexpected = [each for each in expected if not each.expected and each.kind == "all-to-all"]
    assert not unexpected, str(expected)


def test_a_number_that_does_not_divide_is_an_error_and_one_that_does_is_not():
    def make(number):
        return lambda: {"up": jnp.ones((number, 4, 8)), "down": jnp.ones((number, 8, 4))}

    dims = [("up", ("expert", "embed", "mlp")), ("down", ("expert", "mlp", "embed"))]
    assert planned(make(16), dims, [jp.EP()], expert=8).records["up"].storage == P("expert")
    with pytest.raises(ShardingError, match=r"up: dim 0 is 12 experts, but axis 'expert' has size 8, and 8 does not"):
        planned(make(12), dims, [jp.EP()], expert=8)


def test_nothing_to_split_is_an_error():
    with pytest.raises(ShardingError, match=r"EP splits nothing: no leaf has a dim named 'expert'. Name it"):
        planned(dims=(), strategies=[jp.EP()], expert=8)
    with pytest.raises(ShardingError, match=r"axis 'expert' has size 8, but no strategy uses it.* Add EP\(\) to"):
        planned(strategies=[jp.DP()], expert=8)
    with pytest.raises(ShardingError, match=r"experts are the first dim of a leaf for jp.experts"):
        planned(lambda: {"up": jnp.ones((4, 8))}, [("up", ("embed", "expert"))], [jp.EP()], expert=8)


def test_order_changes_nothing_and_an_axis_of_one_rests():
    one, other = planned(expert=4, tensor=2), planned(expert=4, tensor=2, strategies=STRATEGIES[::-1])
    assert not one.diff(other)
    assert ("EP", "axis 'expert' has size 1") in planned(data=8).inactive
    assert jp.EP(axis="e").label == "EP(axis='e')"
    renamed = planned(strategies=[jp.EP(axis="e")], e=8)
    assert renamed.records["up"].storage == P("e")
