"""What a plan learns of a model from one trace: leaves, kinds, names of dims, stacked blocks."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxpar as jp
from jaxpar._birth import check_factory, conceive
from jaxpar._errors import ShardingError

normal = nnx.initializers.lecun_normal()


class Block(nnx.Module):
    def __init__(self, rngs, dim=8, act=jax.nn.gelu):
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs, make_block=Block, depth=3):
        self.emb = nnx.Embed(32, 8, rngs=rngs)
        self.blocks = nnx.List([make_block(rngs) for _ in range(depth)])


def born(factory):
    return conceive(factory, blocks={})


def stacked(factory, pattern="blocks.*", remat=None):
    return conceive(factory, blocks={pattern: remat})


def refused(factory, pattern="blocks.*", remat=None):
    with pytest.raises(ShardingError) as error:
        stacked(factory, pattern, remat)
    return str(error.value)


# What is what


def test_an_nnx_models_leaves_have_the_kinds_of_their_variables():
    class Kinds(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.w = nnx.Param(jnp.ones(3, jnp.bfloat16))

    birth = born(lambda: Kinds(nnx.Rngs(0)))
    assert {path: slot for path, slot in birth.slots.items() if not path.startswith("drop")} == {
        "norm.bias": "parameter",
        "norm.scale": "parameter",
        "norm.mean": "model_state",
        "norm.var": "model_state",
        "w": "parameter",
    }
    assert {slot for path, slot in birth.slots.items() if path.startswith("drop")} == {"rng"}
    assert birth.owners["norm.scale"] == "BatchNorm"
    assert birth.shapes["w"].dtype == jnp.bfloat16


def test_a_train_states_groups_say_what_its_leaves_are():
    def make():
        model = linen.Dense(4)
        params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))

    slots = born(make).slots
    assert slots["params.kernel"] == "parameter"
    assert slots["opt_state.0.mu.kernel"] == "optimizer"
    assert "step" not in slots  # a Python int until the first update


def test_linen_variables_beside_params_are_model_state():
    birth = born(lambda: linen.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((2, 3))))
    assert birth.slots["params.scale"] == "parameter"
    assert birth.slots["batch_stats.mean"] == "model_state"


def test_a_bare_pytrees_floating_leaves_are_its_parameters():
    birth = born(lambda: {"w": jnp.ones((2, 2)), "step": jnp.zeros((), jnp.int32), "key": jax.random.key(0), "f": max})
    assert birth.slots == {"w": "parameter", "step": "model_state", "key": "rng"}


def test_the_factory_is_traced_once_and_allocates_nothing():
    calls = []

    def make():
        calls.append(1)
        return {"w": jnp.zeros((1 << 20, 1 << 16))}  # 256 GiB

    plan = jp.plan(make, jp.mesh(fsdp=8), [jp.FSDP()], optimizer=optax.adam(1e-3))
    assert calls == [1]
    assert plan.totals().optimizer == 2 * plan.totals().parameters + 4


# What is no factory


@pytest.mark.parametrize(
    "make",
    [
        lambda: Model(nnx.Rngs(0)),
        lambda: {"w": jnp.ones(3)},
        lambda: np.ones(3),
        lambda: eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)),  # callable, but a model
        lambda: 3,
    ],
    ids=["nnx", "dict", "array", "equinox", "number"],
)
def test_a_model_in_place_of_its_factory_is_an_error(make):
    model = make()
    with pytest.raises(ShardingError) as error:
        check_factory(model)
    assert str(error.value) == (
        "the model must come from a function that makes it, so that it is born sharded, but a "
        f"{type(model).__name__} was given. Write jp.plan(lambda: Model(...), ...); for weights that exist already, "
        "plan.shard(model)."
    )


def test_a_partial_or_a_class_is_a_factory():
    class Mine(nnx.Linear):
        def __init__(self):
            super().__init__(2, 2, rngs=nnx.Rngs(0))

    assert "emb.embedding" in born(ft.partial(lambda seed: Model(nnx.Rngs(seed)), 0)).shapes
    assert "kernel" in born(Mine).shapes


def test_a_factory_that_makes_nothing_is_an_error():
    with pytest.raises(ShardingError, match=r"the factory makes no array\. Give a function that returns the model"):
        born(lambda: {"f": print})


def test_a_factory_that_draws_from_outside_streams_is_an_error():
    rngs = nnx.Rngs(0)
    with pytest.raises(ShardingError) as error:
        born(lambda: Model(rngs))
    assert str(error.value) == (
        "the factory changes an nnx object that was made outside of it, such as its random-number streams. Make all it "
        "needs inside: jp.plan(lambda: Model(..., rngs=nnx.Rngs(0)), ...)."
    )


def test_the_users_own_errors_pass():
    with pytest.raises(ZeroDivisionError):
        born(lambda: {"w": 1 / 0})


# Names of dims


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_init": nnx.with_partitioning(normal, ("embed", "mlp"))},
        {"kernel_metadata": {"out_sharding": ("embed", "mlp")}},
    ],
    ids=["with_partitioning", "kernel_metadata"],
)
def test_nnx_metadata_names_dims(settings):
    birth = born(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0), **settings))
    assert birth.names == {"kernel": ("embed", "mlp")}
    assert birth.layers == {}


def test_a_params_own_metadata_names_dims():
    class Bare(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((2, 3)), out_sharding=("embed", None))

    assert born(Bare).names == {"w": ("embed", None)}


def named_linear(rngs):
    return nnx.Linear(4, 8, kernel_init=nnx.with_partitioning(normal, ("embed", "mlp")), rngs=rngs)


def test_a_vmapped_nnx_model_names_its_layers():
    """The kernel carries the name, and its bias, which carries none, is stacked with it."""
    metadata = {nnx.PARTITION_NAME: "layers"}
    birth = born(lambda: nnx.vmap(named_linear, transform_metadata=metadata)(nnx.Rngs(0).split(3)))
    assert birth.names == {"kernel": ("embed", "mlp")}
    assert birth.layers.keys() == {"kernel", "bias"}
    assert birth.remat == frozenset()


def test_a_vmapped_nnx_model_that_does_not_name_its_layers_is_an_error():
    with pytest.raises(ShardingError, match="kernel: the model names 2 dims") as error:
        jp.plan(
            lambda: nnx.vmap(named_linear)(nnx.Rngs(0).split(3)), jp.mesh(fsdp=8), [jp.FSDP(min_bytes=0, whole="bias")]
        )
    assert "nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: 'layers'})" in str(error.value)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        kernel_init = linen.with_partitioning(normal, ("embed", "mlp"))
        x = linen.Dense(16, kernel_init=kernel_init, name="up")(x)
        kernel_init = linen.with_logical_partitioning(normal, ("mlp", "embed"))
        return linen.Dense(8, kernel_init=kernel_init, name="down")(x), None


def test_linens_boxes_name_dims_and_patterns_do_not_see_them():
    birth = born(lambda: Dense().init(jax.random.key(0), jnp.ones((2, 8))))
    assert birth.names == {"params.up.kernel.value": ("embed", "mlp"), "params.down.kernel.value": ("mlp", "embed")}
    assert birth.aliases["params.up.kernel.value"] == "params.up.kernel"

    for strategy in (jp.TP(), jp.TP(column=["*.up"], row=["*.down"])):
        plan = jp.plan(lambda: Dense().init(jax.random.key(0), jnp.ones((2, 8))), jp.mesh(tensor=8), [strategy])
        assert plan.records["params.up.kernel.value"].storage == jax.P(None, "tensor")
        assert plan.records["params.down.kernel.value"].storage == jax.P("tensor")


def test_a_linen_scan_names_its_layers():
    scanned = linen.scan(
        Dense, {"params": 0}, split_rngs={"params": True}, length=3, metadata_params={linen.PARTITION_NAME: "layers"}
    )
    birth = born(lambda: scanned().init(jax.random.key(0), jnp.ones((2, 8))))
    assert birth.names == {"params.up.kernel.value": ("embed", "mlp"), "params.down.kernel.value": ("mlp", "embed")}
    assert birth.layers.keys() == {
        "params.up.kernel.value",
        "params.up.bias",
        "params.down.kernel.value",
        "params.down.bias",
    }


def test_a_dims_rule_names_the_layers_of_a_model_that_does_not():
    def make():
        return nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs))(nnx.Rngs(0).split(8))

    plan = jp.plan(make, jp.mesh(fsdp=8), [jp.FSDP()], dims=[("*", ("layers", ...))])
    assert [(record.layers, record.storage) for record in plan.records.values()] == [
        (1, jax.P()),
        (1, jax.P(None, "fsdp")),
    ]
    assert plan.follow("kernel").moves[0].times == 8


def test_equinox_modules_own_their_weights_and_dicts_do_not():
    birth = born(lambda: {"mlp": eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0)), "weight": jnp.ones((2, 2))})
    assert birth.owners["mlp.layers.0.weight"] == "Linear"
    assert "weight" not in birth.owners


# Stacking blocks


def test_equal_blocks_are_stacked():
    def make():
        return Model(nnx.Rngs(0))

    birth = stacked(make)
    assert birth.shapes["blocks.each.up.kernel"].shape == (3, 8, 16)
    assert birth.layers.keys() == {
        f"blocks.each.{name}" for name in ("up.kernel", "up.bias", "down.kernel", "down.bias")
    }
    assert birth.remat == birth.layers.keys()
    assert not any(path.startswith("blocks.0") for path in birth.shapes)
    assert stacked(make, remat="none").remat == frozenset()


def test_several_lists_are_stacked_by_one_pattern():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.encoder = Model(rngs)
            self.decoder = Model(rngs, depth=2)

    birth = stacked(lambda: Two(nnx.Rngs(0)), "*.blocks.*")
    assert birth.shapes["encoder.blocks.each.up.kernel"].shape == (3, 8, 16)
    assert birth.shapes["decoder.blocks.each.up.kernel"].shape == (2, 8, 16)
    one = stacked(lambda: Two(nnx.Rngs(0)), "encoder.blocks.*")
    assert "decoder.blocks.1.up.kernel" in one.shapes


def test_a_list_inside_the_blocks_stays_as_it_is():
    class Nested(nnx.Module):
        def __init__(self, rngs, **_):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])

    birth = stacked(lambda: Model(nnx.Rngs(0), Nested))
    assert birth.shapes["blocks.each.layers.1.kernel"].shape == (3, 4, 4)
    inner = stacked(lambda: Model(nnx.Rngs(0), Nested), "blocks.*.layers.*")
    assert inner.shapes["blocks.2.layers.each.kernel"].shape == (2, 4, 4)


def test_a_list_of_lists_is_stacked_where_the_pattern_says():
    class Grid(nnx.Module):
        def __init__(self, rngs):
            self.rows = nnx.List([nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]) for _ in range(3)])

    birth = stacked(lambda: Grid(nnx.Rngs(0)), "rows.[0-9].*")
    assert birth.shapes["rows.2.each.kernel"].shape == (2, 4, 4)


def test_modules_in_a_container_are_stacked():
    birth = stacked(lambda: (Model(nnx.Rngs(0)), {"critic": Model(nnx.Rngs(1))}), "*.blocks.*")
    assert {"0.blocks.each.up.kernel", "1.critic.blocks.each.up.kernel"} <= birth.shapes.keys()


def test_a_models_own_stack_is_taken_as_it_is():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.stack = jp.Stack(Block, 3, rngs=rngs, remat="dots")

    for birth in (born(lambda: Own(nnx.Rngs(0))), stacked(lambda: Own(nnx.Rngs(0)), "stack.*")):
        assert birth.shapes["stack.each.up.kernel"].shape == (3, 8, 16)
        assert "stack.each.up.kernel" in birth.layers
    assert stacked(lambda: Own(nnx.Rngs(0)), "stack", "dots").layers
    assert refused(lambda: Own(nnx.Rngs(0)), "stack", "full") == (
        "stack: the model's own jp.Stack has remat='dots', FSDP asks for 'full'. Set it in the model, and leave it out "
        "of FSDP."
    )


def test_a_variable_that_all_blocks_share_is_not_stacked():
    def make():
        rngs = nnx.Rngs(0)
        table = nnx.Param(jnp.ones((4, 4)))

        class Sharing(Block):
            def __init__(self, rngs):
                super().__init__(rngs)
                self.table = table

        model = Model(rngs, Sharing)
        model.also = table
        return model

    birth = stacked(make)
    shared = [path for path in birth.shapes if path.endswith(("table", "also"))]
    assert len(shared) == 1
    assert birth.shapes[shared[0]].shape == (4, 4)
    assert shared[0] not in birth.layers


@pytest.mark.parametrize("outside", ["aaa", "zzz"], ids=["before the blocks", "after the blocks"])
def test_a_variable_that_one_block_shares_is_an_error(outside):
    def make():
        model = Model(nnx.Rngs(0))
        setattr(model, outside, model.blocks[1].up)
        return model

    assert refused(make) == (
        "blocks.*: these blocks are not equal, so they cannot be stacked:\n"
        "blocks.1.up.bias and the rest of the model share a variable, which the other blocks do not\n"
        "blocks.1.up.kernel and the rest of the model share a variable, which the other blocks do not\n"
        "Share a variable among all blocks or none, or leave these out of FSDP(blocks=...)."
    )


def test_a_variable_that_some_blocks_share_is_an_error():
    def make():
        model = Model(nnx.Rngs(0))
        model.blocks[2].up.kernel = model.blocks[0].up.kernel
        return model

    assert "blocks.0.up.kernel and blocks.2.up.kernel share a variable, which the other blocks do not" in refused(make)


def test_blocks_of_other_shapes_are_an_error_naming_each():
    def make():
        dims = iter((8, 16, 8))
        return Model(nnx.Rngs(0), lambda rngs: Block(rngs, dim=next(dims)))

    message = refused(make)
    assert message.startswith("blocks.*: these blocks are not equal, so they cannot be stacked:\n")
    assert "blocks.1.up.kernel is float32[16, 32], blocks.0.up.kernel is float32[8, 16]\n" in message
    assert "blocks.1.down.bias is float32[16], blocks.0.down.bias is float32[8]\n" in message
    assert "blocks.2" not in message
    assert message.endswith(
        "Give FSDP(blocks=...) a pattern of equal blocks only, or leave it out and hold the blocks whole."
    )


def test_blocks_of_other_settings_are_an_error():
    def make():
        acts = iter((jax.nn.gelu, jax.nn.relu, jax.nn.gelu))
        return Model(nnx.Rngs(0), lambda rngs: Block(rngs, act=next(acts)))

    message = refused(make)
    assert "blocks.1.act is " in message
    assert "blocks.2" not in message


def test_a_pattern_of_no_list_is_an_error():
    assert refused(lambda: Model(nnx.Rngs(0)), "layers.*") == (
        "blocks='layers.*' matches no list of blocks. Lists of modules here: blocks.*. Name one of them, as in "
        "FSDP(blocks='blocks.*'), or leave blocks out."
    )
    assert "Did you mean 'blocks.*'? Lists of modules here: blocks.*." in refused(lambda: Model(nnx.Rngs(0)), "block.*")
    assert "This model has no nnx.List of modules." in refused(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_list_that_holds_no_modules_is_an_error():
    class Arrays(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))])
            self.none = nnx.List([])

    assert refused(Arrays) == (
        "blocks='blocks.*': blocks.0 is a Param, and only modules can be stacked. Name a list of modules, or leave "
        "blocks out."
    )
    assert "blocks='none.*': none is empty, and only modules" in refused(Arrays, "none.*")


def test_blocks_of_a_plain_pytree_are_an_error():
    assert refused(lambda: {"blocks": [{"w": jnp.ones((4, 4))}] * 2}) == (
        "blocks='blocks.*': only nnx modules can be stacked, and the factory makes a dict. Stack equal blocks "
        "yourself, name their first dim, dims=[('blocks.*', ('layers', ...))], and scan over it, with jp.gather(layer) "
        "in the body."
    )
