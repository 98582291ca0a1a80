"""Patterns, names of dims, and how complaints are worded."""

import re

import pytest

from jaxpar import _rules
from jaxpar._errors import ShardingError
from jaxpar._rules import Draft, Leaf, matches


def leaf(path="w", shape=(8, 12), **fields):
    return Leaf(path=path, shape=shape, itemsize=4, **fields)


def draft(*leaves, **sizes):
    return Draft(sizes=sizes, leaves={each.path: each for each in leaves})


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.q", "blocks.0.attn.q.kernel", True),
        ("*.q", "q.kernel", True),
        ("*.q", "q", True),
        ("q", "q.kernel", True),
        ("*.q", "blocks.0.kq.kernel", False),
        ("q", "blocks.q.kernel", False),
        ("*.q.kernel", "blocks.0.q.kernel", True),
        ("*.q.kernel", "blocks.0.q.bias", False),
        ("blocks.[01].q", "blocks.1.q.kernel", True),
        ("blocks.[01].q", "blocks.2.q.kernel", False),
        ("blocks.*", "blocks.0.mlp.up.kernel", True),
        ("*", "anything.at.all", True),
        ("*.mlp", "blocks.0.mlp.up.kernel", False),  # the module that holds it, not one further up: write *.mlp.*
        ("*.mlp.*", "blocks.0.mlp.up.kernel", True),
        ("*.Q", "blocks.0.q.kernel", False),
    ],
)
def test_a_pattern_names_a_leaf_or_the_module_that_holds_it(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_a_pattern_that_matches_nothing_names_the_nearest_part():
    paths = [f"blocks.{index}.attn.{name}.kernel" for index in range(3) for name in ("query", "key")]
    assert _rules.check_patterns(["*.query", "blocks.2.*"], paths, "TP: column") == []
    (problem,) = _rules.check_patterns(["*.qeury"], paths, "TP: column")
    assert problem == (
        "TP: column: the pattern '*.qeury' matches none of 6 leaves. Did you mean 'query'? "
        "Modules here are blocks.*.attn.key, blocks.*.attn.query."
    )


def test_predicates_take_a_pattern_several_a_function_or_nothing():
    for chosen in ("*.lora", ["*.lora", "*.none"], lambda path: "lora" in path):
        chooses = _rules.predicate(chosen)
        assert chooses("blocks.0.lora.a")
        assert not chooses("blocks.0.q.kernel")
    assert _rules.predicate(None)("anything")


def test_rules_name_dims():
    leaves = {path: leaf(path) for path in ("up.w", "down.w", "other")}
    rules = _rules.as_rules([("up", ("embed", "mlp")), ("down", ["mlp", None])])
    assert _rules.name_dims(leaves, rules) == []
    assert leaves["up.w"].names == ("embed", "mlp")
    assert leaves["down.w"].names == ("mlp", None)
    assert leaves["other"].names is None


def test_a_rule_beside_another_that_says_the_same_is_fine():
    leaves = {"up.w": leaf("up.w")}
    rules = _rules.as_rules([("up", ("embed", "mlp")), ("*.w", ("embed", "mlp")), ("up.*", ("embed", ...))])
    assert _rules.name_dims(leaves, rules[:2]) == []
    assert _rules.name_dims(leaves, rules) == [
        "up.w: the rules 'up' and 'up.*' both match and differ. Make one narrower."
    ]


def test_a_first_dim_called_layers_stacks_blocks():
    leaves = {"w": leaf(shape=(4, 8, 12)), "b": leaf("b", (4, 8))}
    assert _rules.name_dims(leaves, _rules.as_rules([("*", ("layers", ...))])) == []
    assert [(each.layers, each.names) for each in leaves.values()] == [(1, (None, None)), (1, (None,))]
    assert leaves["w"].ndim == 2


def test_a_rule_written_for_one_block_serves_the_stack_of_them():
    stacked = leaf(shape=(4, 8, 12), layers=1)
    assert _rules.name_dims({"w": stacked}, _rules.as_rules([("w", ("embed", "mlp"))])) == []
    assert (stacked.layers, stacked.names) == (1, ("embed", "mlp"))


@pytest.mark.parametrize("names", [("embed",), ("embed", "mlp", "kv"), (..., "embed")], ids=str)
def test_a_rule_names_every_dim(names):
    (problem,) = _rules.name_dims({"w": leaf()}, _rules.as_rules([("w", names)]))
    assert re.fullmatch(
        r"w: the rule 'w' names \d dims \[.*\], but the leaf has 2, of shape \(8, 12\)\. Name each dim, None for one "
        r"without a name\.",
        problem,
    )


@pytest.mark.parametrize("rule", ["w", ("w", "embed"), ("w", (1, 2)), (("w",), ("embed",)), ("w", None)], ids=str)
def test_what_is_not_a_rule_is_an_error(rule):
    with pytest.raises(ShardingError) as error:
        _rules.as_rules([rule])
    assert str(error.value) == (
        f"dims: {rule!r} is not a rule. Write (pattern, names), as in ('*.q.kernel', ('embed', 'heads')), None for a "
        "dim without a name, and ... last for all that follow."
    )


def test_the_models_own_names_must_fit_its_leaves():
    assert _rules.check_names({"w": leaf(names=("embed", "mlp")), "v": leaf("v")}) == []
    (problem,) = _rules.check_names({"w": leaf(shape=(3, 8, 12), names=("embed", "mlp"))})
    assert problem == (
        "w: the model names 2 dims ['embed', 'mlp'], but the leaf has 3, of shape (3, 8, 12). If a vmap stacks it, "
        "name that dim: nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: 'layers'})."
    )


def test_names_that_no_strategy_reads_are_noted():
    known = {"w": leaf(names=("embed", "mlp")), "v": leaf("v", names=(None, "vocab"))}
    assert _rules.unused_names(known) == []
    strange = {**known, "x": leaf("x", names=("model", "embed")), "y": leaf("y", names=("model", None))}
    assert _rules.unused_names(strange) == [
        "dims named 'model' (2 leaves) mean nothing to any strategy; they read embed, expert, heads, kv, mlp, vocab."
    ]


@pytest.mark.parametrize(
    ("shape", "fields", "dim"),
    [
        ((8, 12), {}, 1),
        ((8, 8), {}, 0),
        ((8, 13), {}, 0),
        ((7, 13), {}, None),
        ((0, 13), {}, None),
        ((), {}, None),
        ((16, 8, 4), {"layers": 1}, 0),
        ((8, 16, 4), {"names": (None, "layers", None)}, 0),
    ],
    ids=str,
)
def test_the_largest_dim_that_divides(shape, fields, dim):
    each = leaf(shape=shape, **fields)
    assert _rules.largest_divisible(each, draft(each, fsdp=4), 4, field="storage") == dim


def test_a_dim_that_nobody_has_split_comes_first():
    each = leaf(shape=(8, 64))
    each.split(1, "tensor", by="TP", why="", where=("storage",))
    plan = draft(each, fsdp=4, tensor=4)
    assert _rules.largest_divisible(each, plan, 4, field="storage") == 0
    assert _rules.largest_divisible(each, plan, 4, field="slots") == 1
    assert _rules.largest_divisible(each, plan, 16, field="storage") == 1  # 64 over tensor=4 leaves 16


def test_the_way_out_gives_the_nearest_sizes():
    assert _rules.way_out(65, "tensor", 4) == "Use a multiple of 4 (64 or 68 here), or another size of axis 'tensor'"
    assert _rules.way_out(3, "tensor", 4) == "Use a multiple of 4 (4 here), or another size of axis 'tensor'"


def test_problems_of_equal_layers_are_one():
    plan = draft(fsdp=4)
    plan.problems += [f"blocks.{index}.w: too odd, FSDP(whole=['blocks.{index}.w'])." for index in range(3)]
    with pytest.raises(ShardingError) as error:
        plan.raise_problems()
    assert str(error.value) == ("blocks.0.w: too odd, FSDP(whole=['blocks.0.w']). (And so for 2 other layers.)")


def test_problems_that_differ_in_a_size_are_several():
    plan = draft(fsdp=4)
    plan.problems += ["blocks.0.w: 4 does not divide 65.", "blocks.1.w: 4 does not divide 67."]
    with pytest.raises(ShardingError) as error:
        plan.raise_problems()
    assert str(error.value) == "2 problems:\nblocks.0.w: 4 does not divide 65.\nblocks.1.w: 4 does not divide 67."
    draft(fsdp=4).raise_problems()
