"""A plan is data: what it says is derived by hand here, goes to JSON and back, and agrees with what is compiled."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import Move, Plan, testing
from jaxpar._errors import ShardingError
from tests._residual import BLOCKS, DEPTH, DIM, HIDDEN, INPUTS, MATRIX, TOKENS, TP, Block, make

CASES = {
    "dp": ({"data": 8}, [jp.DP()]),
    "zero 1": ({"data": 8}, [jp.ZeRO(1)]),
    "zero 2": ({"data": 8}, [jp.ZeRO(2)]),
    "fsdp": ({"fsdp": 8}, [jp.FSDP()]),
    "fsdp blocks": ({"fsdp": 8}, [BLOCKS]),
    "fsdp blocks kept": ({"fsdp": 8}, [jp.FSDP(blocks="blocks.*", remat="none")]),
    "tp": ({"data": 1, "tensor": 8}, [TP]),
    "fsdp tp": ({"fsdp": 4, "tensor": 2}, [jp.FSDP(), TP]),
    "fsdp tp blocks": ({"fsdp": 4, "tensor": 2}, [BLOCKS, TP]),
    "dp tp": ({"data": 4, "tensor": 2}, [jp.DP(), TP]),
}


def planned(name, factory=make, **settings):
    axes, strategies = {**CASES, **HYBRIDS}[name]
    return jp.plan(factory, jp.mesh(**axes), strategies, **settings)


def shown(moves):
    return [(move.what, move.kind, move.axes, move.bytes, move.times) for move in moves]


# What moves, by hand

GATHER, REDUCE, SCATTER = "all-gather", "all-reduce", "reduce-scatter"

UP_MOVES = {
    "dp": [("gradient", REDUCE, ("data",), MATRIX, 1)],
    "zero 1": [("gradient", SCATTER, ("data",), MATRIX, 1), ("update", GATHER, ("data",), MATRIX, 1)],
    "zero 2": [("gradient", SCATTER, ("data",), MATRIX, 1), ("update", GATHER, ("data",), MATRIX, 1)],
    "fsdp": [("weight", GATHER, ("fsdp",), MATRIX, 1), ("gradient", SCATTER, ("fsdp",), MATRIX, 1)],
    "fsdp blocks": [
        ("weight", GATHER, ("fsdp",), MATRIX, DEPTH),
        ("weight", GATHER, ("fsdp",), MATRIX, DEPTH),
        ("gradient", SCATTER, ("fsdp",), MATRIX, DEPTH),
    ],
    "fsdp blocks kept": [
        ("weight", GATHER, ("fsdp",), MATRIX, DEPTH),
        ("gradient", SCATTER, ("fsdp",), MATRIX, DEPTH),
    ],
    "tp": [("activation", REDUCE, ("tensor",), DIM * 4, 1)],
    "fsdp tp": [
        ("weight", GATHER, ("fsdp",), MATRIX // 2, 1),
        ("activation", REDUCE, ("tensor",), DIM * 4, 1),
        ("gradient", SCATTER, ("fsdp",), MATRIX // 2, 1),
    ],
    "fsdp tp blocks": [
        ("weight", GATHER, ("fsdp",), MATRIX // 2, DEPTH),
        ("weight", GATHER, ("fsdp",), MATRIX // 2, DEPTH),
        ("activation", REDUCE, ("tensor",), DIM * 4, DEPTH),
        ("gradient", SCATTER, ("fsdp",), MATRIX // 2, DEPTH),
    ],
    "dp tp": [
        ("activation", REDUCE, ("tensor",), DIM * 4, 1),
        ("gradient", REDUCE, ("data",), MATRIX // 2, 1),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_the_moves_of_one_matrix(name):
    plan = planned(name)
    path = "blocks.each.up.kernel" if "blocks" in name else "blocks.1.up.kernel"
    assert shown(plan.follow(path).moves) == UP_MOVES[name]
    assert plan.moves(plan.records[path]) == plan.follow(path).moves


HYBRIDS = {
    "dp fsdp": ({"data": 2, "fsdp": 4}, [jp.DP(), jp.FSDP()]),
    "dp fsdp blocks": ({"data": 2, "fsdp": 4}, [jp.DP(), BLOCKS]),
    "dp fsdp tp blocks": ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), BLOCKS, TP]),
    "zero 1 fsdp": ({"data": 2, "fsdp": 4}, [jp.ZeRO(1), jp.FSDP()]),
    "zero 2 fsdp blocks": ({"data": 2, "fsdp": 4}, [jp.ZeRO(2), BLOCKS]),
}


@pytest.mark.parametrize("name", [*CASES, *HYBRIDS])
@pytest.mark.parametrize("transform", [nnx.value_and_grad, jp.value_and_grad], ids=["users own", "jaxpars"])
def test_follow_agrees_with_the_compiled_step(name, transform):
    """Every collective of the step is a move of some leaf, or the sum of the loss; every move is a collective."""
    plan = planned(name)
    model = plan.init()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @plan.jit
    def step(model, optimizer, batch):
        loss, grads = transform(lambda model, x: jnp.mean(model(x) ** 2))(model, batch)
        optimizer.update(model, grads)
        return loss

    found = testing.collectives(step, model, optimizer, plan.batch(np.ones((TOKENS, INPUTS), np.float32)))
    compiled = sorted((each.kind, each.axes, each.bytes) for each in found for _ in range(each.count or 0))
    tokens = TOKENS // plan.num_batch_shards
    told = [
        (move.kind, move.axes, move.bytes * (tokens if move.per_token else 1))
        for path in plan.records
        for move in plan.follow(path).moves
        for _ in range(move.times)
    ]
    loss = [("all-reduce", plan.batch_axes, 4)] if plan.num_batch_shards > 1 else []
    assert compiled == sorted(told + loss), str(found)


class Language(nnx.Module):
    """A model whose first matrix is a table; tied, it is also its last."""

    def __init__(self, rngs, *, tied):
        self.embed = nnx.Embed(128, DIM, rngs=rngs)
        self.block = Block(rngs)
        self.head = None if tied else nnx.Linear(DIM, 128, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.block(self.embed(ids))
        return self.embed.attend(x) if self.head is None else self.head(x)


def language_step(plan, call):
    """What a training step of 64 tokens moves, and the step."""
    model = plan.init()
    step = plan.jit(jp.value_and_grad(lambda model, ids: jax.nn.logsumexp(call(model, ids), axis=-1).mean()))
    found = testing.collectives(step, model, plan.batch(np.arange(64, dtype=np.int32).reshape(16, 4)))
    return sorted((each.kind, each.axes, each.bytes) for each in found), step


def gradients_told(plan):
    moves = [move for path in plan.records for move in plan.follow(path).moves]
    return [(move.kind, move.axes, move.bytes) for move in moves for _ in range(move.times)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tables_are_summed_whole_and_gather_no_activation(tied):
    """Of 64 tokens, fewer than the table has rows: over two axes a scatter-add cannot have what a product has."""
    plan = jp.plan(
        lambda: Language(nnx.Rngs(0), tied=tied), jp.mesh(data=2, fsdp=4), [jp.DP(), jp.FSDP()], optimizer=optax.sgd(0)
    )
    found, step = language_step(plan, lambda model, ids: model(ids))
    table = (REDUCE, ("data", "fsdp"), 128 * DIM * 4)
    twice = [table] * tied  # what is made of a tied table at either end is summed by itself
    assert gradients_told(plan).count(table) == 1
    assert found == sorted([*gradients_told(plan), *twice, (REDUCE, ("data", "fsdp"), 4)])
    assert step.notes == ()


def test_a_table_that_no_name_tells_is_found_where_it_is_looked_up():
    params = {"words": jnp.ones((128, DIM)), "out": jnp.ones((DIM, 128))}
    plan = jp.plan(lambda: params, jp.mesh(data=2, fsdp=4), [jp.DP(), jp.FSDP()])
    found, step = language_step(plan, lambda params, ids: params["words"][ids] @ params["out"])
    gathers = [(kind, axes, size) for kind, axes, size in found if kind not in (REDUCE, SCATTER)]
    assert gathers == [(GATHER, ("fsdp",), 128 * DIM * 4)] * 2
    assert (REDUCE, ("data", "fsdp"), 128 * DIM * 4) in found
    assert step.notes == (
        "looked up by index, which the plan did not foresee: words; these gradients are summed whole, as a table's",
    )


def test_a_hybrid_of_zero_and_fsdp():
    plan = jp.plan(make, jp.mesh(data=2, fsdp=4), [jp.ZeRO(1), jp.FSDP()])
    assert shown(plan.follow("blocks.0.up.kernel").moves) == [
        ("weight", GATHER, ("fsdp",), MATRIX, 1),
        ("gradient", SCATTER, ("fsdp",), MATRIX, 1),
        ("gradient", SCATTER, ("data",), MATRIX // 4, 1),
        ("update", GATHER, ("data",), MATRIX // 4, 1),
    ]


def test_a_gather_moves_compute_bytes_and_a_reduction_stored_ones():
    plan = planned("fsdp", precision=jp.Precision(compute="bfloat16"))
    assert [move.bytes for move in plan.follow("blocks.0.up.kernel").moves] == [MATRIX // 2, MATRIX]


def test_sequence_parallel_pairs_scatter_and_gather():
    plan = jp.plan(make, jp.mesh(tensor=8), [jp.TP(column="*.up", row="*.down", sequence=True)])
    forward, backward = plan.follow("blocks.0.down.kernel").moves
    assert (forward.kind, backward.kind) == (SCATTER, GATHER)
    assert (forward.when, backward.when) == ("forward pass", "backward pass")
    assert {move.kind for move in plan.follow("blocks.0.up.kernel").moves} == {SCATTER, GATHER}


def test_frozen_leaves_are_gathered_and_not_reduced():
    plan = planned("fsdp blocks", trainable="inp")
    assert shown(plan.follow("blocks.each.up.kernel").moves) == [("weight", GATHER, ("fsdp",), MATRIX, DEPTH)]


# Totals, by hand

WEIGHTS = 4 * (INPUTS * DIM + DEPTH * 2 * DIM * HIDDEN)


@pytest.mark.parametrize(
    ("name", "parameters", "gradients", "optimizer"),
    [
        ("dp", WEIGHTS, WEIGHTS, 2 * WEIGHTS + 4),
        ("zero 1", WEIGHTS, WEIGHTS, 2 * WEIGHTS // 8 + 4),
        ("zero 2", WEIGHTS, WEIGHTS // 8, 2 * WEIGHTS // 8 + 4),
        ("fsdp", WEIGHTS // 8, WEIGHTS // 8, 2 * WEIGHTS // 8 + 4),
        ("fsdp blocks", WEIGHTS // 8, WEIGHTS // 8, 2 * WEIGHTS // 8 + 4),
        ("tp", *[4 * INPUTS * DIM + DEPTH * 2 * MATRIX // 8] * 2, 2 * (4 * INPUTS * DIM + DEPTH * 2 * MATRIX // 8) + 4),
    ],
)
def test_totals(name, parameters, gradients, optimizer):
    totals = planned(name, optimizer=optax.adam(1e-3)).totals()
    assert (totals.parameters, totals.gradients, totals.optimizer) == (parameters, gradients, optimizer)
    assert totals.total == parameters + gradients + optimizer
    assert totals.num_parameters == totals.num_trainable == WEIGHTS // 4


def test_totals_are_what_devices_hold():
    plan = planned("fsdp tp")
    pieces = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(nnx.state(plan.init()))]
    assert plan.totals().parameters == sum(pieces)


def test_totals_of_what_is_no_parameter():
    def mixed():
        return {"params": {"w": jnp.ones((64, 64))}, "stats": {"mean": jnp.ones(64)}, "key": jax.random.key(0)}

    plan = jp.plan(mixed, jp.mesh(fsdp=8), [jp.FSDP()])
    totals = plan.totals()
    assert (totals.parameters, totals.other, totals.optimizer) == (2048, 256 + 8, None)
    assert totals.total == 2048 + 2048 + 264


# JSON


def odd():
    return {
        "half": jnp.ones((64, 64), jnp.bfloat16),
        "tiny": jnp.ones((128, 64), jnp.float8_e4m3fn),
        "scalar": jnp.float32(1),
        "ids": jnp.ones(3, jnp.int8),
        "key": jax.random.key(0),
        "rbg": jax.random.split(jax.random.key(0, impl="rbg"), 3),
        "fast": jax.random.key(0, impl="unsafe_rbg"),
    }


@pytest.mark.parametrize("name", [*CASES, "odd dtypes"])
def test_json_goes_both_ways(name):
    if name == "odd dtypes":
        plan = jp.plan(odd, jp.mesh(fsdp=8), [jp.FSDP()], optimizer=optax.adam(1e-3))
    else:
        plan = planned(name, optimizer=optax.adafactor(1e-3), trainable=None if "tp" in name else "*.up")
    again = Plan.from_json(plan.to_json())
    assert again == Plan(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)})
    assert again.diff(plan) == plan.diff(again) == []
    assert again.table() == plan.table()
    assert again.totals() == plan.totals()
    assert again.to_json() == plan.to_json()
    path = next(iter(plan.records))
    assert again.follow(path) == plan.follow(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", "null", '{"format": 1}', '{"format": 1, "records": [{}]}'])
def test_what_is_not_a_plan_is_an_error(text):
    with pytest.raises(ShardingError) as error:
        Plan.from_json(text)
    assert str(error.value).startswith("this is not the JSON of a plan (")
    assert str(error.value).endswith("). Write it with plan.to_json().")


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"axes": ["fsdp"]},
        {"axes": {"fsdp": "8"}},
        {"records": {"w": 1}},
        {"records": [{"path": "w"}]},
        {"dims": None},
    ],
    ids=str,
)
def test_a_plan_with_one_wrong_field_is_an_error(change):
    fields = json.loads(planned("fsdp").to_json())
    with pytest.raises(ShardingError, match="this is not the JSON of a plan"):
        Plan.from_json(json.dumps({**fields, **change}))


def test_a_plan_of_another_format_is_an_error():
    fields = json.loads(planned("fsdp").to_json())
    with pytest.raises(ShardingError) as error:
        Plan.from_json(json.dumps({**fields, "format": 2}))
    assert str(error.value) == "this plan has format 2, and this version of jaxpar reads 1. Plan again."


# Differences


def test_a_diff_says_what_the_other_says_otherwise():
    one, other = planned("fsdp", optimizer=optax.sgd(1e-3)), planned("fsdp tp", optimizer=optax.adam(1e-3))
    lines = one.diff(other)
    assert "axes: {'fsdp': 8} | {'fsdp': 4, 'tensor': 2}" in lines
    assert "strategies: ('FSDP()',) | ('FSDP()', \"TP(column=('*.up',), row=('*.down',))\")" in lines
    assert f"blocks.0.up.kernel.storage: {P(None, 'fsdp')} | {P('fsdp', 'tensor')}" in lines
    assert "blocks.0.up.kernel.role:  | column" in lines
    assert "0.mu.inp.kernel: not here | there" in lines
    assert not any(line.startswith("inp.kernel.storage") for line in lines)
    assert "0.mu.inp.kernel: here | not there" in other.diff(one)


def test_equal_plans_do_not_differ():
    assert planned("fsdp").diff(planned("fsdp")) == []


# Words


def test_the_table():
    def model():
        return {"up": jnp.ones((64, 128)), "norm": jnp.ones(64), "key": jax.random.key(0)}

    plan = jp.plan(model, jp.mesh(fsdp=4, tensor=2), [jp.FSDP(), jp.TP(column="up")], optimizer=optax.sgd(1e-3))
    lines = plan.table().splitlines()
    assert lines[1:5] == ["axes: fsdp=4 x tensor=2", "strategies FSDP(), TP(column=('up',))", "batch over fsdp", ""]
    moves = (
        "all-gather weight over fsdp 16.0 KiB; all-reduce activation over tensor 256 B a token; "
        "reduce-scatter gradient over fsdp 16.0 KiB"
    )
    rows = [tuple(filter(None, map(str.strip, line.split("  ")))) for line in lines[5:10]]
    assert rows[0] == ("path", "shape", "spec", "per device", "decided by", "moves a step")
    assert rows[2:] == [
        ("key", "key<fry> scalar", "whole", "8 B", "rng: the same on every device", "-"),
        (
            "norm",
            "float32 64",
            "whole",
            "256 B",
            "FSDP: whole: 256 bytes < min_bytes=4096",
            "all-reduce gradient over fsdp 256 B",
        ),
        (
            "up",
            "float32 64x128",
            "[fsdp, tensor]",
            "4.0 KiB",
            "TP: column 'up'; FSDP: the largest dim that divides",
            moves,
        ),
    ]
    assert "8,256 parameters" in lines
    assert "per device: parameters 4.2 KiB, gradients 4.2 KiB, optimiser 0 B, other 8 B; together 8.5 KiB" in lines
    assert str(plan) == plan.table()


def test_equal_layers_are_folded_and_unequal_ones_are_not():
    table = planned("fsdp").table()
    assert "\nblocks.[0-2].down.kernel  float32 256x64  [fsdp, -]  24.0 KiB " in table
    assert "all-gather weight over fsdp 64.0 KiB x3; reduce-scatter gradient over fsdp 64.0 KiB x3\n" in table
    table = planned("fsdp", trainable=["inp", "blocks.1.*"]).table()
    assert "\nblocks.1.down.kernel " in table
    assert "\nblocks.[0,2].down.kernel " in table
    assert "frozen; FSDP: the largest dim that divides" in table


def test_layers_that_are_not_a_full_grid_are_not_folded():
    def ragged():
        return {"a": [{"b": [jnp.ones((64, 64))] * count} for count in (2, 1)]}

    table = jp.plan(ragged, jp.mesh(fsdp=8), [jp.FSDP()]).table()
    assert all(f"\na.{at} " in table for at in ("0.b.0", "0.b.1", "1.b.0"))


def test_a_gather_that_is_repeated_is_one_entry():
    assert (
        "all-gather weight over fsdp 64.0 KiB x6; reduce-scatter gradient over fsdp 64.0 KiB x3"
        in planned("fsdp blocks").table()
    )


def test_the_price_of_accumulation():
    (line,) = [line for line in planned("fsdp").table().splitlines() if line.startswith("accumulation")]
    assert line == (
        'accumulation over fsdp: reduce="microbatch" holds 49.5 KiB of gradients and reduces every microbatch; '
        'reduce="step" holds 396.0 KiB and reduces once a step; this plan: "microbatch"'
    )
    assert "accumulation" not in planned("dp").table()


def test_follow_tells_a_life():
    plan = planned("fsdp tp blocks")
    life = plan.follow("blocks.each.down.kernel")
    gathered = "  gathered  all-gather weight over fsdp 32.0 KiB x3"
    assert str(life) == life.text
    assert life.text == (
        "blocks.each.down.kernel  float32 (3, 256, 64), 192.0 KiB\n"
        "  stored    [-, tensor, fsdp]: 24.0 KiB a device (TP: row '*.down'; FSDP: the largest dim that divides)\n"
        f"{gathered}, forward pass of each layer\n"
        f"{gathered}, backward pass of each layer, which computes the block again\n"
        "  used      [-, tensor, -] as float32, one layer at a time\n"
        "  summed    all-reduce activation over tensor 256 B a token x3, forward pass of each layer\n"
        "  reduced   reduce-scatter gradient over fsdp 32.0 KiB x3, backward pass of each layer\n"
        "  updated   [-, tensor, fsdp], with its optimiser state"
    )


def test_follow_tells_of_zero_and_of_nothing_to_reduce():
    text = planned("zero 1").follow("inp.kernel").text
    assert "  reduced   reduce-scatter gradient over data 12.0 KiB, before the update, of which each device" in text
    assert "  collected all-gather update over data 12.0 KiB, after the update" in text
    assert (
        "  reduced   not: every device has the whole gradient of its piece" in planned("tp").follow("inp.kernel").text
    )


def test_follow_names_the_nearest_path():
    with pytest.raises(ShardingError) as error:
        planned("fsdp").follow("blocks.0.up.kernal")
    assert str(error.value) == (
        "blocks.0.up.kernal: the plan has no such leaf. Did you mean 'blocks.0.up.kernel'? See plan.records for its 7 "
        "paths."
    )


def test_a_notebook_shows_text_and_html():
    bundle = planned("fsdp")._repr_mimebundle_()
    assert bundle["text/plain"] == planned("fsdp").table()
    assert "<table" in bundle["text/html"]


def test_a_plan_is_small():
    """No array, no device: bytes of JSON do not depend on the size of the model."""
    text = planned("fsdp", lambda: {"w": jnp.zeros((1 << 20, 1 << 14))}).to_json()
    assert len(text) < 2000
    assert math.prod(Plan.from_json(text).records["w"].shape) == 1 << 34


def test_a_move_is_per_token_only_for_activations():
    move = Move(what="weight", kind=GATHER, axes=("fsdp",), bytes=1, times=1, when="")
    assert not move.per_token
    assert dataclasses.replace(move, what="activation").per_token
