"""What a plan that has its mesh and factory can do: make the model in pieces, place one, batch, refuse."""

import cProfile
import pathlib
import pstats

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import testing
from jaxpar._errors import ShardingError, StepError


class Block(nnx.Module):
    def __init__(self, rngs, dim=64):
        self.up = nnx.Linear(dim, 128, rngs=rngs)
        self.down = nnx.Linear(128, dim, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs, depth=3, dim=64):
        self.emb = nnx.Embed(128, dim, rngs=rngs)
        self.odd = nnx.Param(jax.random.normal(rngs.params(), (63, 65)))
        self.blocks = nnx.List([Block(rngs, dim) for _ in range(depth)])


def make():
    return Model(nnx.Rngs(0))


TP = jp.TP(column="*.up", row="*.down", vocab="emb")
FSDP = jp.FSDP(whole="odd")
BLOCKS = jp.FSDP(whole="odd", blocks="blocks.*")

LAYOUTS = {
    "one device": ({"data": 1}, []),
    "dp": ({"data": 8}, [jp.DP()]),
    "zero": ({"data": 8}, [jp.ZeRO(2)]),
    "fsdp": ({"fsdp": 8}, [FSDP]),
    "blocks": ({"fsdp": 8}, [BLOCKS]),
    "fsdp tp": ({"fsdp": 4, "tensor": 2}, [FSDP, TP]),
    "all": ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), BLOCKS, TP]),
}


def planned(name, factory=make, **settings):
    axes, strategies = LAYOUTS[name]
    return jp.plan(factory, jp.mesh(**axes, allow_unused=True), strategies, **settings)


def arrays(tree):
    """Every array of an nnx object on the host, random-number keys as their data."""
    flat = nnx.to_flat_state(nnx.state(tree))
    values = {".".join(map(str, keys)): variable.get_raw_value() for keys, variable in flat}
    return {
        path: np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)
        for path, value in values.items()
    }


# Born sharded


@pytest.fixture(scope="module")
def alone():
    """The model that one device makes, with no plan anywhere."""
    graphdef, state = jax.jit(lambda: nnx.split(make()))()
    return arrays(nnx.merge(graphdef, state))


@pytest.mark.parametrize("name", LAYOUTS)
def test_init_makes_what_one_device_makes_bit_for_bit(name, alone):
    plan = planned(name)
    found = {}
    for path, leaf in arrays(plan.init()).items():
        found |= {path.replace("each", str(at)): leaf[at] for at in range(3)} if "each" in path else {path: leaf}
    assert found.keys() == alone.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, alone[path], err_msg=path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_init_places_every_leaf_as_the_plan_says(name):
    plan = planned(name)
    model = plan.init()
    for path, sharding in plan.shardings(model).items():
        assert sharding.spec == plan.records[path].storage
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        record = plan.records[".".join(map(str, keys))]
        value = variable.get_raw_value()
        assert value.sharding.is_equivalent_to(plan.sharding(record.storage), value.ndim)


def test_init_does_not_depend_on_whether_the_factory_was_run_before():
    plan = planned("fsdp")
    first, second = arrays(plan.init()), arrays(plan.init())
    assert all((first[path] == second[path]).all() for path in first)


def initialised():
    """A matrix and a stack from each kind of initialiser that JAX has, of 8, 24 and 40 columns."""
    kinds = {
        "lecun_normal": nnx.initializers.lecun_normal(),
        "normal": nnx.initializers.normal(0.02),
        "he_uniform": nnx.initializers.he_uniform(),
        "truncated_normal": nnx.initializers.truncated_normal(),
    }
    shapes = ((16, 8), (16, 16, 8), (8, 16, 24), (8, 40))
    return {
        f"{kind} {shape}": make(key, shape)
        for key, (kind, make) in zip(jax.random.split(jax.random.key(0), len(kinds)), kinds.items(), strict=True)
        for shape in shapes
    }


@pytest.mark.parametrize("tensor", [1, 8])
def test_initial_values_do_not_depend_on_the_piece_they_lie_in(tensor):
    """1 to 24 columns in a piece. On JAX 0.12 XLA:CPU rounded pieces of four columns otherwise, before it was told."""
    mesh = jp.mesh(fsdp=8 // tensor, tensor=tensor)
    plan = jp.plan(initialised, mesh, [jp.TP(column="*"), jp.FSDP(min_bytes=0)])
    one, ours = jax.jit(initialised)(), plan.init()
    for path in one:
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(one[path]), err_msg=path)


def big():
    """16 MiB in one matrix, and 16 in a stack of blocks."""
    rngs = nnx.Rngs(0)
    blocks = nnx.List([nnx.Linear(512, 1024, use_bias=False, rngs=rngs) for _ in range(8)])
    return {"matrix": nnx.Linear(2048, 2048, use_bias=False, rngs=rngs), "blocks": nnx.Dict(blocks=blocks)}


@pytest.mark.parametrize("strategy", [jp.FSDP(), jp.FSDP(blocks="*.blocks.*")], ids=["list", "stacked"])
def test_no_device_ever_holds_a_whole_matrix(strategy):
    """A piece of either part is 2 MiB, and the initialiser needs a few of them beside the result, not all 16."""
    plan = jp.plan(big, jp.mesh(fsdp=8), [strategy])
    shardings = {path: plan.sharding(record.storage) for path, record in plan.records.items()}
    memory = jax.jit(plan.birth.make, out_shardings=shardings).lower().compile().memory_analysis()

    piece = 2 << 20
    assert plan.totals().parameters == 2 * piece
    assert memory.output_size_in_bytes < 2.1 * piece
    assert memory.temp_size_in_bytes < 5 * piece


def test_a_parameter_dtype_applies_to_parameters_alone():
    plan = planned("fsdp", precision=jp.Precision(param="bfloat16"))
    model = plan.init()
    assert model.emb.embedding.dtype == jnp.bfloat16
    assert plan.totals().parameters < planned("fsdp").totals().parameters
    assert jnp.issubdtype(model.blocks[0].drop.rngs.key.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: {"a": jnp.ones((64, 64)), "f": "text", "n": 3},
        lambda: eqx.nn.MLP(64, 64, 64, 1, key=jax.random.key(0)),
        lambda: TrainState.create(apply_fn=print, params={"w": jnp.ones((64, 64))}, tx=optax.adam(1e-3)),
        lambda: (nnx.Linear(64, 64, rngs=nnx.Rngs(0)), {"t": jnp.ones((64, 64))}),
    ],
    ids=["dict", "equinox", "train state", "mixed"],
)
def test_init_gives_the_users_own_kind_of_object(factory):
    model = jp.plan(factory, jp.mesh(fsdp=8), [jp.FSDP()]).init()
    expected = factory()
    assert type(model) is type(expected)
    assert [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, int | str)] == [
        leaf for leaf in jax.tree.leaves(expected) if isinstance(leaf, int | str)
    ]


# The model as shapes


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_abstract_is_init_without_memory(name):
    plan = planned(name)
    for abstract, real in zip(jax.tree.leaves(plan.abstract()), jax.tree.leaves(plan.init()), strict=True):
        assert (abstract.shape, abstract.dtype) == (real.shape, real.dtype)
        assert abstract.sharding.is_equivalent_to(real.sharding, real.ndim)


# Placing what exists


def test_shard_places_loaded_weights():
    plan = planned("fsdp tp")
    model = make()
    before = arrays(model)
    variable = model.emb.embedding
    assert plan.shard(model) is model
    assert model.emb.embedding is variable
    testing.assert_sharding(model.emb.embedding[...], plan.mesh, P("tensor", "fsdp"))
    after = arrays(model)
    assert all((before[path] == after[path]).all() for path in before)


def test_shard_rebuilds_a_pytree_from_the_host():
    def factory():
        return {"a": {"w": jnp.ones((64, 32))}, "b": jnp.ones((64, 32))}

    plan = jp.plan(factory, jp.mesh(fsdp=8), [jp.FSDP()])
    loaded = jax.tree.map(np.asarray, factory())
    placed = plan.shard(loaded)
    assert placed["a"]["w"].sharding.spec == P("fsdp")
    assert isinstance(loaded["a"]["w"], np.ndarray)
    assert plan.shard(loaded["a"])["w"].sharding.spec == P("fsdp")  # a part of a model

    state = plan.shard(optax.adam(1e-3).init(loaded))
    assert state[0].mu["a"]["w"].sharding.spec == P("fsdp")
    assert state[0].count.sharding.spec == P()


def test_shard_refuses_parameters_that_the_plan_does_not_have():
    plan = jp.plan(lambda: {"a": {"w": jnp.ones((64, 32))}}, jp.mesh(fsdp=8), [jp.FSDP()])
    with pytest.raises(ShardingError) as error:
        plan.shard({"a": {"w": np.ones((64, 16))}, "extra": {"w": np.ones((64, 32))}, "ids": np.ones(3, np.int32)})
    assert str(error.value) == (
        "the plan has no parameter for\n"
        "a.w (64, 16): here it is (64, 32)\n"
        "extra.w (64, 32)\n"
        "Plan this model: jp.plan(lambda: Model(...), ...)."
    )
    assert plan.shard({"a": {"w": np.ones((64, 32))}, "ids": np.ones(3, np.int32)})["ids"].sharding.spec == P()

    with pytest.raises(ShardingError) as error:
        planned("fsdp").shard(Model(nnx.Rngs(0), depth=4, dim=72))
    assert "emb.embedding (128, 72): here it is (128, 64)\n" in str(error.value)
    assert "blocks.3.up.kernel (72, 128)\n" in str(error.value)


# Shardings of anything


def test_shardings_have_the_structure_of_what_was_asked():
    def factory():
        return {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}

    plan = jp.plan(factory, jp.mesh(data=8), [jp.ZeRO(1)])
    state = TrainState.create(apply_fn=print, params=factory(), tx=optax.adam(1e-3))
    shardings = plan.shardings(state)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))
    assert shardings.params["w"].spec == P()
    assert shardings.opt_state[0].nu["w"].spec == P("data")
    assert shardings.step.spec == P()
    placed = jax.device_put(state, shardings)
    assert placed.opt_state[0].nu["w"].sharding == shardings.opt_state[0].nu["w"]

    gradients = plan.shardings(jax.eval_shape(factory))
    assert gradients["w"].spec == P()


# Hardware that is not here


def test_a_plan_for_hardware_that_is_not_here_can_be_looked_at():
    target = jp.mesh("v5p:8x16x16", fsdp=512, tensor=4)
    plan = jp.plan(lambda: {"up": jnp.ones((4096, 4096))}, target, [jp.FSDP(), jp.TP(column="up")])
    assert plan.table().startswith("v5p:8x16x16: 2048 TPU v5p chips")
    assert plan.abstract()["up"].sharding.spec == P("fsdp", "tensor")
    assert plan.shardings({"up": np.ones((4096, 4096))})["up"].spec == P("fsdp", "tensor")

    for what, call in {
        "init": plan.init,
        "shard": lambda: plan.shard({"up": np.ones((4096, 4096))}),
        "batch": lambda: plan.batch(np.ones((8, 2))),
    }.items():
        with pytest.raises(ShardingError) as error:
            call()
        assert str(error.value).startswith(f"plan.{what}: this plan is for hardware that is not attached here (")
        assert str(error.value).endswith(
            "It can be printed, drawn and compared; to run it, make the mesh from attached devices or from "
            "jp.simulate(n)."
        )

    step = plan.jit(lambda params, x: x @ jp.gather(params)["up"])
    with pytest.raises(StepError, match=r"is not attached here.*jp\.simulate"):
        step({"up": np.ones((4096, 4096))}, np.ones((512, 4096)))


# A batch


def test_a_batch_is_split_over_the_batch_axes():
    plan = planned("all")
    batch = plan.batch({"x": np.arange(24.0).reshape(8, 3), "scale": np.float32(2), "name": "train"})
    assert batch["x"].sharding.spec == P(("data", "fsdp"))
    assert batch["scale"].sharding.spec == P()
    assert batch["name"] == "train"
    np.testing.assert_array_equal(batch["x"], np.arange(24.0).reshape(8, 3))


@pytest.mark.parametrize(
    ("rows", "fits"), [(7, "4 or 8"), (3, "4"), (9, "8 or 12")], ids=["between", "too few", "too many"]
)
def test_a_batch_that_does_not_divide_is_an_error(rows, fits):
    with pytest.raises(ShardingError) as error:
        planned("all").batch({"x": np.ones((rows, 3))})
    assert str(error.value) == (
        f"a batch of {rows} does not divide over 4 devices (data 2 x fsdp 2). Use a batch of {fits}, or fill it up "
        "with rows of weight 0: jp.data.pad_batch(batch, to)."
    )


def test_arrays_of_different_lengths_are_no_batch():
    with pytest.raises(ShardingError) as error:
        planned("all").batch({"x": np.ones((8, 3)), "y": np.ones(4)})
    assert str(error.value) == (
        "the arrays of a batch have different leading sizes:\nx: 8 rows\ny: 4 rows\nGive each the batch as first dim."
    )


# Scale


class Attention(nnx.Module):
    def __init__(self, rngs, dim=8192, kv=1024, hidden=28672):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.q, self.k, self.v, self.o = linear(dim, dim), linear(dim, kv), linear(dim, kv), linear(dim, dim)
        self.gate, self.up, self.down = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)


class Large(nnx.Module):
    def __init__(self, rngs, depth, stacked):
        self.emb = nnx.Embed(128256, 8192, rngs=rngs)
        self.blocks = (
            jp.Stack(Attention, depth, rngs=rngs) if stacked else nnx.List([Attention(rngs) for _ in range(depth)])
        )


def large(depth, *, stacked=False, blocks=None, calls=None):
    def factory():
        if calls is not None:
            calls.append(1)
        return Large(nnx.Rngs(0), depth, stacked)

    tp = jp.TP(column=["*.q", "*.k", "*.v", "*.gate", "*.up"], row=["*.o", "*.down"], vocab="emb")
    mesh = jp.mesh("v5p:8x16x16", fsdp=512, tensor=4)
    return jp.plan(factory, mesh, [jp.FSDP(blocks=blocks), tp], optimizer=optax.adamw(1e-3))


def test_a_70b_model_is_traced_once():
    calls = []
    plan = large(80, stacked=True, calls=calls)
    assert calls == [1]
    totals = plan.totals()
    assert totals.num_parameters == 69_501_714_432
    assert totals.parameters == 2 * totals.num_parameters * 4 // 2 // 2048
    assert totals.optimizer == 2 * totals.parameters + 4
    assert len(plan.table()) < 6000


@pytest.mark.parametrize("blocks", [None, "blocks.*"], ids=["list", "stacked"])
def test_planning_is_linear_in_the_number_of_leaves(blocks):
    """Calls of our own functions, those of the model's factory left out; a quadratic step would make it 16 times."""

    def calls(depth):
        profile = cProfile.Profile()
        profile.runcall(large, depth, blocks=blocks)
        ours = pathlib.Path(jp.__file__).parent
        return sum(
            count
            for (file, _, _), (_, count, *_) in pstats.Stats(profile).stats.items()
            if ours in pathlib.Path(file).parents
        )

    assert calls(8) < 4.5 * calls(2)


def test_planning_allocates_nothing():
    before = {id(array) for array in jax.live_arrays()}
    plan = large(2)
    plan.table()
    plan.abstract()
    assert not [array for array in jax.live_arrays() if id(array) not in before and array.nbytes > 1024]
