"""Small programs, each strategy alone and combined: collectives follow by hand, and each is a move of the plan."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import testing
from jaxpar.explain._expected import expected
from models import moe
from models.moe import config
from tests import _programs
from tests._residual import BLOCKS, DEPTH, DIM, FIRST, HIDDEN, INPUTS, MATRIX, TOKENS, TP, make

GATHER, REDUCE, SCATTER = "all-gather", "all-reduce", "reduce-scatter"
LOSS, NORM = "sum of the loss or of its weight", "norm, of leaves that are cut over these axes"


def square(model, x):
    return jnp.mean(model(x) ** 2)


def narrow(model, x):
    return jnp.mean(model(x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)


EVERY = {MATRIX: 2 * DEPTH, FIRST: 1}  # how many matrices of which size


def each(kind, axes, sizes):
    return {(kind, axes, size): count for size, count in sizes.items()}


def scaled(sizes, size=1.0, count=1):
    return {int(each * size): number * count for each, number in sizes.items()}


def loss(axes, count=1):
    return {(REDUCE, axes, 4): count}


D, F, T = ("data",), ("fsdp",), ("tensor",)
HALVES = {MATRIX // 2: 2 * DEPTH, FIRST: 1}  # of which each of two tensor devices has its half; the first is whole
ACTIVATIONS = 2 * DEPTH  # rows sum their outputs, columns the gradient of their inputs
LAYERS = "of each layer"
BACKWARD, AFTER = "gradient, backward pass", "gradient, after the backward pass"
OWN = "gradient, before the update, of which each device does its part"

BLOCK_WORDS = {
    "weight, forward pass",
    f"weight, forward pass {LAYERS}",
    f"weight, backward pass {LAYERS}, which computes the block again",
    f"gradient, backward pass {LAYERS}",
    BACKWARD,
    LOSS,
}

PROGRAMS = {
    # name: mesh, strategies, what crosses devices in a step, by hand; the words for it
    "dp": (
        {"data": 8},
        [jp.DP()],
        each(REDUCE, D, EVERY) | loss(D),
        {AFTER, LOSS},
    ),
    "zero 1": (
        {"data": 8},
        [jp.ZeRO(1)],
        each(SCATTER, D, EVERY) | each(GATHER, D, EVERY) | loss(D),
        {OWN, "update, after the update", LOSS},
    ),
    "zero 2": (
        {"data": 8},
        [jp.ZeRO(2)],
        each(SCATTER, D, EVERY) | each(GATHER, D, EVERY) | loss(D),
        {BACKWARD, "update, after the update", LOSS},
    ),
    "fsdp": (
        {"fsdp": 8},
        [jp.FSDP()],
        each(GATHER, F, EVERY) | each(SCATTER, F, EVERY) | loss(F),
        {"weight, forward pass", BACKWARD, LOSS},
    ),
    "fsdp blocks": (
        {"fsdp": 8},
        [BLOCKS],
        each(GATHER, F, {MATRIX: 4 * DEPTH, FIRST: 1}) | each(SCATTER, F, EVERY) | loss(F),
        BLOCK_WORDS,
    ),
    "fsdp blocks kept": (
        {"fsdp": 8},
        [jp.FSDP(blocks="blocks.*", remat="none")],
        each(GATHER, F, EVERY) | each(SCATTER, F, EVERY) | loss(F),
        {
            "weight, forward pass",
            f"weight, forward pass {LAYERS}",
            f"gradient, backward pass {LAYERS}",
            BACKWARD,
            LOSS,
        },
    ),
    "tp": (
        {"data": 1, "tensor": 8},
        [TP],
        {(REDUCE, T, TOKENS * DIM * 4): ACTIVATIONS},
        {"activation, forward pass", "activation, backward pass, once for all matrices that read the same activation"},
    ),
    "dp tp": (
        {"data": 4, "tensor": 2},
        [jp.DP(), TP],
        {(REDUCE, T, TOKENS // 4 * DIM * 4): ACTIVATIONS} | each(REDUCE, D, HALVES) | loss(D),
        {
            "activation, forward pass",
            "activation, backward pass, once for all matrices that read the same activation",
            AFTER,
            LOSS,
        },
    ),
    "fsdp tp": (
        {"fsdp": 4, "tensor": 2},
        [jp.FSDP(), TP],
        {(REDUCE, T, TOKENS // 4 * DIM * 4): ACTIVATIONS}
        | each(GATHER, F, HALVES)
        | each(SCATTER, F, HALVES)
        | loss(F),
        {
            "weight, forward pass",
            "activation, forward pass",
            "activation, backward pass, once for all matrices that read the same activation",
            BACKWARD,
            LOSS,
        },
    ),
    "fsdp tp blocks": (
        {"fsdp": 4, "tensor": 2},
        [BLOCKS, TP],
        {(REDUCE, T, TOKENS // 4 * DIM * 4): ACTIVATIONS}
        | each(GATHER, F, {MATRIX // 2: 4 * DEPTH, FIRST: 1})
        | each(SCATTER, F, HALVES)
        | loss(F),
        BLOCK_WORDS
        | {
            f"activation, forward pass {LAYERS}",
            f"activation, backward pass {LAYERS}, once for all matrices that read the same activation",
        },
    ),
    "dp fsdp": (
        {"data": 2, "fsdp": 4},
        [jp.DP(), jp.FSDP()],
        each(GATHER, F, EVERY) | each(SCATTER, F, EVERY) | each(REDUCE, D, scaled(EVERY, 1 / 4)) | loss((*D, *F)),
        {"weight, forward pass", BACKWARD, AFTER, LOSS},
    ),
    "dp fsdp blocks": (
        {"data": 2, "fsdp": 4},
        [jp.DP(), BLOCKS],
        each(GATHER, F, {MATRIX: 4 * DEPTH, FIRST: 1})
        | each(SCATTER, F, EVERY)
        | each(REDUCE, D, scaled(EVERY, 1 / 4))
        | loss((*D, *F)),
        BLOCK_WORDS | {AFTER},
    ),
    "dp fsdp tp blocks": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        [jp.DP(), BLOCKS, TP],
        {(REDUCE, T, TOKENS // 4 * DIM * 4): ACTIVATIONS}
        | each(GATHER, F, {MATRIX // 2: 4 * DEPTH, FIRST: 1})
        | each(SCATTER, F, {MATRIX // 2: 2 * DEPTH})
        | each(REDUCE, D, {MATRIX // 4: 2 * DEPTH})
        | each(REDUCE, (*D, *F), {FIRST: 1})  # whole, as tensor splits neither it nor the batch: `gradient_route`
        | loss((*D, *F)),
        (BLOCK_WORDS - {BACKWARD})
        | {
            AFTER,
            f"activation, forward pass {LAYERS}",
            f"activation, backward pass {LAYERS}, once for all matrices that read the same activation",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    plan: jp.Plan
    found: testing.Traffic
    words: dict[str, str]

    @property
    def moved(self):
        """Executions of a step by kind, axes and bytes."""
        counts = collections.Counter()
        for one in self.found:
            counts[one.kind, one.axes, one.bytes] += one.count
        return dict(counts)

    @property
    def said(self):
        return {part for words in self.words.values() for part in words.split("; ")}


def compile_step(axes, strategies, *, grad=None, function=square, tx=None, **options):
    plan = jp.plan(make, jp.mesh(**axes), strategies, **options)
    model = plan.init()
    optimizer = nnx.Optimizer(model, tx or optax.adam(1e-3), wrt=nnx.Param)
    grad = grad or nnx.value_and_grad(function)

    @plan.jit
    def step(model, optimizer, batch):
        value, gradients = grad(model, batch)
        optimizer.update(model, gradients)
        return value

    found = testing.collectives(step, model, optimizer, plan.batch(np.ones((TOKENS, INPUTS), np.float32)))
    return Compiled(plan, found, words_of(found, plan, num_tokens=TOKENS))


def words_of(found, plan, **options):
    """The words for each instruction by its name, which is its own in these programs."""
    return {name: each.words for (_, name), each in expected(found, plan, **options).items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_collectives_are_those_derived_by_hand_and_moves_of_the_plan(name):
    axes, strategies, moved, said = PROGRAMS[name]
    compiled = compile_step(axes, strategies)
    assert compiled.moved == moved, str(compiled.found)
    assert compiled.said == said


def test_narrow_weights_are_gathered_narrow_and_reduced_wide():
    compiled = compile_step({"fsdp": 8}, [jp.FSDP()], function=narrow, precision=jp.Precision(compute="bfloat16"))
    gathered = {key: count for key, count in compiled.moved.items() if key[0] == SCATTER}
    assert gathered == each(SCATTER, F, EVERY)
    assert compiled.said == {"weight, forward pass", BACKWARD, LOSS}


def test_accumulation_over_replicas_reduces_once():
    grad = jp.value_and_grad(square, accumulate=4)
    compiled = compile_step({"data": 8}, [jp.DP()], grad=grad)
    assert compiled.moved == each(REDUCE, D, EVERY) | loss(D, 2)
    assert compiled.said == {AFTER, LOSS}


def test_accumulation_over_shards_gathers_and_scatters_each_microbatch():
    grad = jp.value_and_grad(square, accumulate=2)
    compiled = compile_step({"fsdp": 8}, [BLOCKS], grad=grad)
    gathers = {MATRIX: 2 * 4 * DEPTH, FIRST: 1}  # the first matrix is gathered before the loop
    assert compiled.moved == each(GATHER, F, gathers) | each(SCATTER, F, scaled(EVERY, count=2)) | loss(F, 2)
    assert "" not in compiled.said


def test_accumulation_over_replicas_and_shards():
    grad = jp.value_and_grad(square, accumulate=2)
    compiled = compile_step({"data": 2, "fsdp": 4}, [jp.DP(), BLOCKS], grad=grad)
    stacked = {DEPTH * MATRIX // 4: 2, FIRST // 4: 1}  # a device's quarter, all layers at once
    gathers = {MATRIX: 2 * 4 * DEPTH, FIRST: 1}
    assert compiled.moved == (
        each(GATHER, F, gathers)
        | each(SCATTER, F, scaled(EVERY, count=2))
        | each(REDUCE, D, stacked)
        | loss(F, 2)
        | loss(D, 2)
    )
    assert "" not in compiled.said
    assert {compiled.words[one.name] for one in compiled.found if one.axes == D and one.bytes >= FIRST // 4} != {""}


def test_a_norm_for_clipping_has_its_own_words():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3))
    compiled = compile_step({"fsdp": 8}, [BLOCKS], tx=tx)
    assert compiled.moved[REDUCE, F, 4] == 1 + 3  # the loss, and each of three stacked leaves
    assert {LOSS, NORM} < compiled.said
    assert "" not in compiled.said


def test_a_gradient_reduced_each_microbatch_is_not_in_the_plan():
    """What XLA makes of a user's own accumulation loop over replicas."""

    def grad(model, batch):
        graph, params = nnx.split(model)
        parts = batch.reshape(4, -1, INPUTS)
        whole = jax.value_and_grad(lambda params, x: square(nnx.merge(graph, params), x))

        def one(total, part):
            value, gradients = whole(params, part)
            return jax.tree.map(jnp.add, total, gradients), value

        total, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)
        return values.mean(), total

    compiled = compile_step({"data": 8}, [jp.DP()], grad=grad)
    inside = {one.name for one in compiled.found if one.depth == 1 and one.bytes >= FIRST}
    assert inside
    assert {compiled.words[name] for name in inside} == {""}


@pytest.mark.parametrize("name", ["stack", "gpt"])
def test_a_split_vocabulary_has_its_own_words(name):
    case = _programs.CASES[name]
    plan = jp.plan(case.make, jp.mesh(data=2, tensor=4), [jp.DP(), jp.TP(**case.tensor)])
    model = plan.init()

    @plan.jit
    def step(model, batch):
        return jp.value_and_grad(case.loss)(model, batch)[0]

    found = testing.collectives(step, model, plan.batch(case.batch))
    tokens = case.batch["tokens"].size
    local = tokens // 2
    words = words_of(found, plan, num_tokens=tokens)
    said = {one.name: words[one.name] for one in found if one.axes == ("tensor",) and math.prod(one.shape) == local}
    assert said
    assert all("softmax, over a split vocabulary" in each for each in said.values())
    embedded = [one for one in found if one.depth == 0 and math.prod(one.shape) == local * _programs.D]
    assert embedded
    assert all("embedded rows" in words[one.name] for one in embedded)


def test_experts_in_stages_have_their_own_words():
    """Rows and how many there are of them by all-to-all; what is no expert's is summed over them each microbatch."""
    small = {"embed_dim": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 40}
    cfg = dataclasses.replace(config.TINY, **small, max_positions=8)
    batch = {name: np.zeros((32, 8), np.int32) for name in ("tokens", "labels")}
    batch["weights"] = np.ones((32, 8), np.float32)
    chosen = [*moe.strategies(cfg), jp.PP(microbatches=2)]
    factory = lambda: moe.MoE(cfg, rngs=nnx.Rngs(0))
    plan = jp.plan(factory, jp.mesh(pipe=2, expert=4), chosen, dims=list(moe.recipes.dims))
    found = testing.collectives(plan.jit(jp.value_and_grad(moe.loss, has_aux=True)), plan.init(), plan.batch(batch))
    words = words_of(found, plan, num_tokens=32 * 8)
    said = collections.defaultdict(set)
    for one in found:
        if one.axes == ("expert",):
            said[one.kind].add(words[one.name].partition(",")[0])
    assert said["all-to-all"] == {"activation", "how many rows each expert gets"}
    assert said[REDUCE] <= {"gradient", LOSS}


# By hand, without a compiler


def collective(kind=GATHER, axes=F, shape=(DIM, HIDDEN), count=1, **fields):
    size = 4 * math.prod(shape)
    return testing.Collective(
        **{
            "kind": kind,
            "spelling": kind,
            "axes": axes,
            "dtype": "f32",
            "shape": shape,
            "bytes": size,
            "count": count,
            "depth": 0,
            "conditional": False,
            "op_name": "",
            "source": "",
            "name": "a",
            "computation": "",
            "channel": None,
            **fields,
        }
    )


@pytest.fixture
def plan():
    def factory():
        return {"wide": jnp.ones((DIM, HIDDEN)), "first": jnp.ones((INPUTS, DIM))}

    return jp.plan(factory, jp.mesh(fsdp=8), [jp.FSDP()])


def test_a_weight_gathered_more_often_than_the_plan_says_is_not_expected(plan):
    once, again = collective(name="a"), collective(name="b")
    assert words_of([once, again], plan) == {"a": "weight, forward pass", "b": ""}
    assert words_of([collective(count=2)], plan) == {"a": ""}


@pytest.mark.parametrize(
    "fields",
    [{"axes": D}, {"kind": REDUCE}, {"shape": (DIM, DIM)}, {"kind": "all-to-all"}, {"kind": "collective-permute"}],
    ids=str,
)
def test_what_differs_from_a_move_is_not_expected(plan, fields):
    assert words_of([collective()], plan) == {"a": "weight, forward pass"}
    assert words_of([collective(**fields)], plan) == {"a": ""}


def test_a_match_names_the_leaves_of_that_size(plan):
    assert expected([collective()], plan)["", "a"].paths == ("wide",)
    assert expected([collective(shape=(INPUTS, DIM))], plan)["", "a"].paths == ("first",)


def test_a_loop_that_does_not_say_how_often_it_runs_is_believed(plan):
    assert words_of([collective(count=None)], plan) == {"a": "weight, forward pass"}


def test_tensors_combined_with_others_are_told_of(plan):
    strange = collective(shape=(4, 4))
    assert words_of([collective(), strange], plan) == {
        "a": "weight, forward pass; and 1 of 2 tensors that the plan does not expect"
    }
    assert words_of([collective(shape=(1024, 1024)), collective()], plan) == {"a": ""}  # most of its bytes are strange
