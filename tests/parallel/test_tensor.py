"""Which dim of which leaf is split: flax, Linen, Equinox and bare pytrees; by patterns and by names."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import ShardingError

WHOLE, FIRST, SECOND, THIRD = P(), P("tensor"), P(None, "tensor"), P(None, None, "tensor")


def unchecked(kind, **settings):
    """An instance of `kind` whose arguments only `kind` itself has checked."""
    return inspect.unwrap(kind.__init__)(object.__new__(kind), **settings)


def specs(factory, **settings):
    """The storage of each leaf under TP alone, whole leaves left out."""
    dims = settings.pop("dims", ())
    plan = jp.plan(factory, jp.mesh(tensor=2, allow_unused=True), [jp.TP(**settings)], dims=dims)
    for record in plan.records.values():
        assert record.storage == record.compute == record.gradient == record.slots
    return {path: record.storage for path, record in plan.records.items() if record.storage != WHOLE}


def refused(factory, **settings):
    with pytest.raises(ShardingError) as error:
        specs(factory, **settings)
    return str(error.value)


def rngs():
    return nnx.Rngs(0)


def pair():
    return nnx.List([nnx.Linear(4, 8, rngs=rngs()), nnx.Linear(8, 4, rngs=rngs())])


def test_a_column_and_a_row():
    assert specs(pair, column="0", row="1") == {"0.kernel": SECOND, "0.bias": FIRST, "1.kernel": FIRST}
    plan = jp.plan(pair, jp.mesh(tensor=8), [jp.TP(column="0", row="1")])
    assert plan.records["1.bias"].reasons == (("TP", "whole: added after the sum (row '1')"),)
    assert [plan.records[path].role for path in ("0.kernel", "1.kernel", "0.bias")] == ["column", "row", ""]


def test_attention_is_split_by_heads():
    """LinearGeneral: query (D, heads, head), out (heads, head, D)."""

    def attention():
        return nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs())

    assert specs(attention, column=["query", "key", "value"], row="out") == {
        "key.bias": FIRST,
        "key.kernel": SECOND,
        "out.kernel": FIRST,
        "query.bias": FIRST,
        "query.kernel": SECOND,
        "value.bias": FIRST,
        "value.kernel": SECOND,
    }


@pytest.mark.parametrize(("kernel", "ndim"), [((3,), 3), ((3, 3), 4)], ids=["1d", "2d"])
def test_convolutions_are_split_by_channels(kernel, ndim):
    def convolutions():
        return {name: nnx.Conv(4, 8, kernel, rngs=rngs()) for name in ("a", "b")}

    assert specs(convolutions, column="a", row="b") == {
        "a.kernel": P(*[None] * (ndim - 1), "tensor"),
        "a.bias": FIRST,
        "b.kernel": P(*[None] * (ndim - 2), "tensor"),
    }


def test_linen_modules_are_split_alike():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(8, (3,), name="conv_in")(x)
            x = linen.MultiHeadDotProductAttention(4, name="attention")(x)
            return linen.Dense(4, name="down")(linen.Dense(16, name="up")(x))

    def init():
        return Model().init(jax.random.key(0), jnp.ones((1, 5, 4)))

    found = specs(init, column=["*.query", "*.up", "*.conv_in"], row=["*.out", "*.down"])
    assert found == {
        "params.attention.out.kernel": FIRST,
        "params.attention.query.bias": FIRST,
        "params.attention.query.kernel": SECOND,
        "params.conv_in.bias": FIRST,
        "params.conv_in.kernel": THIRD,
        "params.down.kernel": FIRST,
        "params.up.bias": FIRST,
        "params.up.kernel": SECOND,
    }


def test_equinox_weights_have_the_other_order():
    """Weight (F, D), and (F, D, k, k) of a convolution; a dict's own `weight` is in JAX's order."""
    key = jax.random.key(0)

    def make():
        return {
            "up": eqx.nn.Linear(4, 8, key=key),
            "down": eqx.nn.Linear(8, 4, key=key),
            "conv": eqx.nn.Conv2d(4, 8, 3, key=key),
            "table": eqx.nn.Embedding(16, 4, key=key),
            "plain": {"weight": jnp.ones((4, 8))},
        }

    assert specs(make, column=["up", "conv", "plain"], row=["down"], vocab=["table"]) == {
        "conv.weight": FIRST,
        "conv.bias": FIRST,
        "down.weight": SECOND,
        "plain.weight": SECOND,
        "table.weight": FIRST,
        "up.weight": FIRST,
        "up.bias": FIRST,
    }


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (lambda: {"table": nnx.Embed(16, 4, rngs=rngs())}, FIRST),
        (lambda: {"table": nnx.Linear(4, 16, use_bias=False, rngs=rngs())}, SECOND),
        (lambda: {"table": eqx.nn.Linear(4, 16, use_bias=False, key=jax.random.key(0))}, FIRST),
        (lambda: {"table": {"embedding": jnp.ones((4, 16))}}, FIRST),
        (lambda: {"table": {"kernel": jnp.ones((16, 4))}}, SECOND),
        (lambda: {"table": jnp.ones((16, 4))}, FIRST),
        (lambda: {"table": jnp.ones((4, 16))}, SECOND),
    ],
    ids=["nnx embed", "nnx head", "equinox head", "embedding", "kernel", "tall", "wide"],
)
def test_vocab_splits_an_embeddings_rows_and_a_heads_columns(make, spec):
    assert set(specs(make, vocab=["table", "table.*"] if isinstance(make()["table"], dict) else "table").values()) == {
        spec
    }


@pytest.mark.parametrize(("name", "spec"), [("wte", FIRST), ("lm_head", SECOND), ("unembed", SECOND), ("embed", FIRST)])
def test_a_square_bare_matrix_goes_by_its_name(name, spec):
    assert specs(lambda: {name: jnp.ones((8, 8))}, vocab=name) == {name: spec}


def test_the_blocks_of_a_stack_are_split_within_one_layer():
    def make():
        return jp.Stack(lambda rngs: nnx.Linear(4, 8, rngs=rngs), 6, rngs=rngs())

    assert specs(make, column="each") == {"each.kernel": P(None, None, "tensor"), "each.bias": P(None, "tensor")}


def test_a_vmapped_linear_is_split_by_its_features():
    """(L, D, F): nothing names the first dim, but a Linear's kernel has two."""

    def make():
        return nnx.vmap(lambda rngs: nnx.Linear(4, 8, use_bias=False, rngs=rngs))(rngs().split(6))

    assert specs(make, column="*") == {"kernel": THIRD}
    assert specs(make, row="*") == {"kernel": SECOND}


@pytest.mark.parametrize(
    ("names", "spec", "role"),
    [
        (("embed", "mlp"), SECOND, "column"),
        (("mlp", "embed"), FIRST, "row"),
        (("embed", "heads"), SECOND, "column"),
        (("kv", "embed"), FIRST, "row"),
        (("vocab", "embed"), FIRST, "table"),
        (("heads", "kv"), FIRST, ""),
    ],
)
def test_names_of_dims_decide_where_no_pattern_does(names, spec, role):
    plan = jp.plan(lambda: {"w": jnp.ones((8, 16))}, jp.mesh(tensor=8), [jp.TP()], dims=[("w", names)])
    record = plan.records["w"]
    assert (record.storage, record.role) == (spec, role)
    assert record.reasons == (("TP", f"its dim {next(name for name in names if name != 'embed')!r}"),)


def test_patterns_and_names_may_agree_and_must_not_differ():
    def make():
        return {"w": jnp.ones((8, 16))}

    assert specs(make, column="w", dims=[("w", ("embed", "mlp"))]) == {"w": SECOND}
    assert refused(make, row="w", dims=[("w", ("embed", "mlp"))]) == (
        "w: row='w' splits dim 0, but its dims ['embed', 'mlp'] say dim 1. Drop the pattern or the dims."
    )


def test_activations_follow():
    def dims(**settings):
        return jp.plan(pair, jp.mesh(tensor=8), [jp.TP(column="0", row="1", **settings)]).dims

    assert dims() == {"heads": ("tensor",), "kv": ("tensor",), "mlp": ("tensor",)}
    assert dims(sequence=True) == {**dims(), "seq": ("tensor",)}
    plan = jp.plan(lambda: {"table": jnp.ones((16, 4))}, jp.mesh(tensor=8), [jp.TP(vocab="table")])
    assert plan.dims["vocab"] == ("tensor",)


def test_a_scalar_stays_whole_and_the_plan_says_so():
    plan = jp.plan(lambda: {"a": jnp.ones((4, 8)), "s": jnp.ones(())}, jp.mesh(tensor=8), [jp.TP(column="*")])
    assert plan.records["s"].reasons == (("TP", "whole: a scalar (column '*')"),)


def test_two_lists_that_match_one_leaf_are_an_error():
    assert refused(pair, column=["0", "1"], row="1") == (
        "2 problems:\n"
        "1.bias: column='1' and row='1' both match. Make one of the patterns narrower.\n"
        "1.kernel: column='1' and row='1' both match. Make one of the patterns narrower."
    )
    assert len(specs(pair, column=["0", "0.kernel"], row="1")) == 3  # two of one kind agree


def test_an_indivisible_dim_is_an_error_with_both_numbers():
    assert refused(lambda: {"w": jnp.ones((4, 7))}, column="w") == (
        "w: dim 1 has size 7, but axis 'tensor' has size 2, and 2 does not divide 7. Use a multiple of 2 (6 or 8 "
        "here), or another size of axis 'tensor', or leave this leaf out of TP's patterns."
    )


def attention(heads, kv_heads, size=4):
    """Matrices of as many heads, flat: a plan is not told where one ends."""
    return lambda: {
        "q": jnp.ones((8, heads * size)),
        "k": {"kernel": jnp.ones((8, kv_heads * size)), "bias": jnp.ones(kv_heads * size)},
        "o": jnp.ones((heads * size, 8)),
    }


def headed(make, devices=4, heads=None, **settings):
    mesh = jp.mesh(tensor=devices, allow_unused=True)
    return jp.plan(make, mesh, [jp.TP(column=["q", "k"], row="o", heads=heads or {}, **settings)])


def test_heads_are_split_whole_or_shared():
    plan = headed(attention(8, 2), heads={"[qo]": 8, "k": 2})
    assert [plan.records[path].storage for path in ("q", "o", "k.kernel", "k.bias")] == [SECOND, FIRST, WHOLE, WHOLE]
    assert [plan.records[path].role for path in ("q", "o", "k.kernel", "k.bias")] == ["column", "row", "shared", ""]
    reason = ("TP", "whole: 2 heads for tensor=4, all of them on each device")
    assert plan.records["k.kernel"].reasons == plan.records["k.bias"].reasons == (reason,)
    (move,) = plan.follow("k.kernel").moves
    assert (move.kind, move.axes, move.bytes, move.when) == (
        "all-reduce",
        ("tensor",),
        2 * 4 * 4,
        "backward pass, of heads that devices share",
    )
    plan = headed(attention(8, 4), heads={"[qo]": 8, "k": 4})
    assert (plan.records["k.kernel"].storage, plan.records["k.kernel"].role) == (SECOND, "column")


@pytest.mark.parametrize(
    ("made", "heads", "message"),
    [
        (
            attention(6, 2),
            {"q": 6, "k": 2},
            (
                "q: dim 1 is 6 heads, but axis 'tensor' has size 4, and 4 does not divide 6. Use a multiple of 4 (4 or "
                "8 here), or another size of axis 'tensor', or leave this leaf out of TP's patterns."
            ),
        ),
        (
            attention(2, 2),
            {"o": 2},
            (
                "o: dim 0 is 2 heads, but axis 'tensor' has size 4, and 4 does not divide 2. Use a multiple of 4 (4 "
                "here), or another size of axis 'tensor', or leave this leaf out of TP's patterns."
            ),
        ),
        (
            attention(8, 2),
            {"q": 5},
            (
                "q: heads['q'] is 5, which does not divide the 32 features that are to be split. Give the number of "
                "heads, not of features."
            ),
        ),
        (
            attention(8, 2),
            {"q": 8, "[qo]": 4},
            "q: heads['q'] and heads['[qo]'] both match and differ. Make one of the patterns narrower.",
        ),
        (
            attention(8, 2),
            {"keys": 2},
            "TP: heads: the pattern 'keys' matches none of 4 leaves. Modules here are k, o, q.",
        ),
        (
            lambda: {"q": jnp.ones((8, 8)), "k": jnp.ones((8, 2, 4)), "o": jnp.ones((8, 8))},
            {},
            (
                "k: dim 1 has size 2, but axis 'tensor' has size 4, and 4 does not divide 2. Use a multiple of 4 (4 "
                "here), or another size of axis 'tensor', or leave this leaf out of TP's patterns. If devices may "
                "share them, TP(heads={'k': 2})."
            ),
        ),
    ],
    ids=["indivisible", "a row", "no head", "two numbers", "nothing", "too few, unsaid"],
)
def test_heads_that_do_not_fit_are_an_error(made, heads, message):
    with pytest.raises(ShardingError) as error:
        headed(made, heads=heads)
    assert str(error.value) == message


def test_heads_of_what_is_not_split_are_an_error():
    with pytest.raises(ShardingError) as error:
        jp.plan(attention(8, 2), jp.mesh(tensor=4, allow_unused=True), [jp.TP(column="q", row="o", heads={"k": 2})])
    assert str(error.value) == "TP: heads['k'] has no effect: TP splits none of its leaves. Leave it out."
    with pytest.raises(ShardingError) as error:
        unchecked(jp.TP, heads={"q": 0})
    assert str(error.value) == "TP: heads['q'] is 0. Use the number of heads, 1 or more."


def test_a_pattern_that_matches_nothing_is_an_error():
    assert refused(pair, column=["0"], row=["1", "2"]) == (
        "TP: row: the pattern '2' matches none of 4 leaves. Modules here are *."
    )


def names_of_the_field():
    return {name: nnx.Linear(4, 4, rngs=rngs()) for name in ("q", "o", "up", "down")} | {
        "wte": nnx.Embed(16, 4, rngs=rngs())
    }


PROPOSAL = "For this model, try TP(column=['*.q', '*.up'], row=['*.down', '*.o'], vocab=['*.wte'])."


def test_a_tp_that_matches_nothing_proposes_the_rule():
    assert refused(names_of_the_field) == f"TP splits nothing. {PROPOSAL}"
    assert refused(names_of_the_field, column="*.gate") == (
        "TP: column: the pattern '*.gate' matches none of 9 leaves. Modules here are down, o, q, up, .... " + PROPOSAL
    )
    assert len(specs(names_of_the_field, column=["*.q", "*.up"], row=["*.down", "*.o"], vocab=["*.wte"])) == 7


def test_the_proposal_for_strange_names_is_to_name_them():
    assert refused(lambda: {"layers": [jnp.ones((4, 8)) for _ in range(3)]}) == (
        "TP splits nothing. Name the modules to split, TP(column=[...], row=[...]); the matrices here are "
        "layers.* (4, 8)."
    )


def test_a_pattern_is_text():
    with pytest.raises(ShardingError) as error:
        unchecked(jp.TP, column=[3])
    assert str(error.value) == "TP: column holds 3, which is no pattern. Use strings such as '*.q'."
    assert jp.TP(column="*.q").column == ("*.q",)
