"""Optimiser state of every kind lies with its parameters, and what belongs to none is said."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import ShardingError
from jaxpar._plan import Record
from jaxpar._slots import Matcher


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(256, 512, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(1024, 256, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])


def module():
    return Model(nnx.Rngs(0))


def pytree():
    block = {"up": {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}}
    return {"emb": {"embedding": jnp.ones((1024, 256))}, "blocks": [block, block]}


def kinds(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "vector", params)


EMB, UP, BIAS = "emb.embedding", "blocks.1.up.kernel", "blocks.1.up.bias"
SPECS = {EMB: P("fsdp"), UP: P(None, "fsdp"), BIAS: P()}

TRANSFORMS = {
    "adamw": (optax.adamw(1e-3), ["0.mu", "0.nu"], [EMB, UP, BIAS]),
    "muon": (optax.contrib.muon(1e-3), ["inner_states.muon.inner_state.0.mu"], [EMB, UP]),
    "muon's vectors": (optax.contrib.muon(1e-3), ["inner_states.adam.inner_state.0.nu"], [BIAS]),
    "partition": (
        optax.partition({"matrix": optax.adam(1e-3), "vector": optax.sgd(1e-3, momentum=0.9)}, kinds),
        ["inner_states.matrix.inner_state.0.mu"],
        [EMB, UP],
    ),
    "masked": (
        optax.masked(optax.adam(1e-3), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)),
        ["inner_state.0.nu"],
        [EMB, UP],
    ),
    "MultiSteps": (optax.MultiSteps(optax.adam(1e-3), 2), ["acc_grads", "inner_opt_state.0.mu"], [EMB, UP, BIAS]),
    "schedule-free": (optax.contrib.schedule_free_adamw(1e-3), ["z", "base_optimizer_state.0.nu"], [EMB, UP, BIAS]),
    "adafactor": (optax.adafactor(1e-3), ["0.v"], [BIAS]),
}


@pytest.fixture(scope="module", params=[module, pytree], ids=["nnx", "pytree"])
def plan(request):
    return jp.plan(request.param, jp.mesh(fsdp=8), [jp.FSDP()])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_slots_lie_with_their_parameters(plan, name):
    transform, slots, leaves = TRANSFORMS[name]
    records = plan.records_of(transform)
    for slot in slots:
        for leaf in leaves:
            assert records[f"{slot}.{leaf}"].storage == SPECS[leaf]
            assert records[f"{slot}.{leaf}"].reasons == (("optimizer", f"as {leaf}"),)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_belongs_to_no_parameter_is_small(plan, name):
    """Counts, coefficients, and Adafactor's placeholders of one element."""
    records = plan.records_of(TRANSFORMS[name][0]).values()
    whole = [record for record in records if "belongs to no parameter" in record.reasons[0][1]]
    assert whole
    assert all(record.storage == P() and record.num_elements <= 3 for record in whole)


def test_adafactors_rows_and_columns_lose_one_dim(plan):
    records = plan.records_of(optax.adafactor(1e-3))
    assert records[f"0.v_col.{UP}"].shape == (512,)
    assert records[f"0.v_col.{UP}"].storage == P("fsdp")
    assert records[f"0.v_row.{UP}"].storage == P()
    assert records[f"0.v_col.{EMB}"].shape == (1024,)
    assert records[f"0.v_col.{EMB}"].storage == P("fsdp")
    assert records[f"0.v_col.{UP}"].reasons == (("optimizer", f"slot of {UP} without its dim 0"),)


@pytest.mark.parametrize("name", ["adamw", "muon", "partition", "MultiSteps", "schedule-free", "adafactor"])
def test_an_nnx_optimizer_has_the_same_specs(name):
    """The same leaves by other paths; `optax.MaskedNode`s, which are no arrays, are left out."""
    plan = jp.plan(module, jp.mesh(fsdp=8), [jp.FSDP()])
    transform = TRANSFORMS[name][0]
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(module(), transform, wrt=nnx.Param))
    found = {path: sharding.spec for path, sharding in plan.shardings(optimizer).items()}
    expected = {f"opt_state.{path}": record.storage for path, record in plan.records_of(transform).items()}
    assert found == {**expected, "step": P()}


def test_zero_splits_slots_and_leaves_parameters():
    plan = jp.plan(pytree, jp.mesh(data=8), [jp.ZeRO(1)])
    state = jax.eval_shape(optax.adafactor(1e-3).init, jax.eval_shape(pytree))
    shardings = plan.shardings({"params": jax.eval_shape(pytree), "state": state})
    assert shardings["params"]["blocks"][1]["up"]["kernel"].spec == P()
    assert shardings["state"][0].v_col["blocks"][1]["up"]["kernel"].spec == P("data")


def test_a_train_states_optimiser_is_born_sharded():
    def make():
        model = linen.Dense(512)
        params = model.init(jax.random.key(0), jnp.ones((1, 256)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))

    plan = jp.plan(make, jp.mesh(data=8), [jp.ZeRO(1)])
    state = plan.init()
    assert state.params["kernel"].sharding.spec == P()
    assert state.opt_state[0].mu["kernel"].sharding.spec == P(None, "data")
    assert plan.totals().optimizer == 2 * (256 * 512 * 4 // 8 + 512 * 4) + 4
    assert {sharding.spec for sharding in jax.tree.leaves(plan.shardings(state))} == {P(), P(None, "data")}


def test_an_nnx_optimizer_made_by_the_factory_is_born_sharded():
    def make():
        model = module()
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}

    made = jp.plan(make, jp.mesh(fsdp=8), [jp.FSDP()]).init()
    assert made["optimizer"].opt_state[0].mu["blocks"][1]["up"]["kernel"].sharding.spec == P(None, "fsdp")
    assert made["model"].blocks[1].up.kernel.sharding.spec == P(None, "fsdp")


def test_what_belongs_to_no_parameter_is_noted():
    """Nobody can tell the rows of a square matrix from its columns."""

    def square():
        return {"layers": [jnp.ones((256, 256)) for _ in range(3)]}

    plan = jp.plan(square, jp.mesh(fsdp=8), [jp.FSDP()], optimizer=optax.adafactor(1e-3))
    assert plan.optimizer_records["0.v_row.layers.0"].storage == P()
    assert (
        "note: optimiser state that belongs to no parameter is whole: 6,144 bytes (*.v_row.layers.*, *.v_col.layers.*)"
        in plan.table()
    )


# The matcher alone


def matcher(*records):
    return Matcher(
        {
            path: Record(path=path, shape=shape, dtype=jnp.dtype("float32"), storage=spec, slots=spec)
            for path, shape, spec in records
        }
    )


def test_the_longest_suffix_wins():
    found = matcher(("a.w", (4, 8), P("x")), ("b.w", (4, 8), P(None, "x")))
    assert found.match("state.mu.a.w", (4, 8)).record.path == "a.w"
    assert found.match("b.w", (4, 8)).record.path == "b.w"
    assert found.match("b.w", (4, 8)).is_parameter
    assert not found.match("state.mu.b", (4, 8))


def test_a_part_of_a_path_is_enough_if_it_is_clear():
    found = matcher(("model.a.w", (4, 8), P("x")), ("model.b.w", (4, 8), P("x")))
    assert found.match("a.w", (4, 8)).storage == P("x")
    assert found.match("w", (4, 8)).storage == P("x")  # either: they lie alike


def test_two_that_lie_differently_are_an_error():
    found = matcher(("0.w", (4, 8), P("x")), ("1.w", (4, 8), P(None, "x")))
    assert found.match("mu.1.w", (4, 8)).record.path == "1.w"
    with pytest.raises(ShardingError) as error:
        found.match("mu.w", (4, 8))
    assert str(error.value) == (
        f"mu.w: belongs to 0.w or to 1.w, which lie differently ({P('x')} and {P(None, 'x')}). "
        "Pass both models to the step in one container, under the names the plan has."
    )


def test_a_slot_of_a_shape_of_its_own_is_not_taken_for_a_namesakes():
    """Rows of a.w (8, 8) are as long as those of b.w (8, 4), and belong to neither dim of b.w."""
    found = matcher(("a.w", (8, 8), P("x")), ("b.w", (8, 4), P("x")))
    assert found.match("v_row.a.w", (8,)) is None
    assert found.match("v_row.b.w", (8,)).storage == P("x")
    assert found.match("count", ()) is None
