"""`PP`: where the layers lie, what moves, and what is refused before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar.testing import collectives
from models import gpt
from models.gpt import config
from tests import _programs as programs

GPT = dataclasses.replace(config.TINY, embed_dim=16, mlp_dim=32, vocab_size=32, num_layers=8, num_heads=2)


def texts(rows=16, seq=4):
    random = np.random.default_rng(0)
    tokens, labels = (random.integers(0, GPT.vocab_size, (rows, seq)).astype(np.int32) for _ in range(2))
    weights = random.uniform(size=(rows, seq)).astype(np.float32)
    return {"tokens": tokens, "labels": labels, "weights": weights, "sample": np.arange(rows, dtype=np.int32)}


def make(**changes):
    return lambda: gpt.GPT(dataclasses.replace(GPT, **changes), rngs=nnx.Rngs(0))


def small(**settings):
    return lambda: Given(**settings)


def plan_on(strategies, *, model=None, **axes):
    return jp.plan(model or make(), programs.mesh(**axes), strategies)


def refused(strategies, *, model=None, loss=gpt.loss, rows=16, options=None, **axes):
    """What planning, or tracing a step under the plan, says."""

    def traced():
        plan = plan_on(strategies, model=model, **axes)
        plan.jit(jp.value_and_grad(loss, **(options or {}))).lower(plan.abstract(), texts_on(plan, rows))

    with pytest.raises(ValueError) as caught:
        traced()
    return str(caught.value)


def texts_on(plan, rows):
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.batch_sharding)
    return jax.tree.map(place, texts(rows))


# ---- the plan


def test_where_the_layers_lie():
    """With chunks a stage's layers do not follow one another, and still are one piece of an array: nothing moves."""
    plain = plan_on([jp.DP(), jp.PP(microbatches=4)], data=2, pipe=4)
    record = plain.records["blocks.each.mlp.up.kernel"]
    assert (record.shape, record.storage) == ((8, 16, 32), jax.P("pipe"))
    chunked = plan_on([jp.FSDP(min_bytes=1024), jp.PP(microbatches=4, chunks=2)], fsdp=2, pipe=4)
    record = chunked.records["blocks.each.mlp.up.kernel"]
    assert (record.shape, record.storage) == ((2, 4, 16, 32), jax.P(None, "pipe", None, "fsdp"))
    assert record.compute == jax.P(None, "pipe")
    assert "stage 1: layers 1, 5; " in "".join(chunked.notes)
    assert "On every stage: embed.embedding, norm.scale." in "".join(chunked.notes)
    gathers = [move for move in chunked.moves(record) if move.what == "weight"]
    assert [(move.axes, move.times) for move in gathers] == [(("fsdp",), 2)] * 2  # a stage has two of the layers
    assert jp.Plan.from_json(chunked.to_json()).diff(chunked) == []
    assert chunked.totals().parameters < plain.totals().parameters


def test_what_a_stage_holds_is_drawn_and_followed():
    """A tile is drawn with the devices of one stage, and tensor parallelism sums within a stage."""
    plan = plan_on([jp.DP(), jp.PP(microbatches=2), gpt.tensor_rules(GPT)], data=2, pipe=2, tensor=2)
    path = "blocks.each.mlp.up.kernel"
    drawn = str(plan.draw(path))
    assert "8 layers stacked, one is drawn, on the first of pipe" in drawn
    assert "│ 0, 4 │ 1, 5 │" in drawn
    assert "2 copies: data 2" in drawn
    sums = [move.axes for move in plan.moves(plan.records[path]) if move.what == "activation"]
    assert sums == [("tensor",)]


def test_without_the_axis_it_rests_and_the_order_of_listing_is_nothing():
    resting = plan_on([jp.DP(), jp.PP(microbatches=4, chunks=2)], data=8)
    assert resting.inactive == (("PP", "axis 'pipe' has size 1"),)
    assert resting.records == plan_on([jp.DP()], data=8).records
    one = [jp.DP(), jp.FSDP(min_bytes=1024), jp.PP(microbatches=2)]
    first, second = (plan_on(each, data=2, fsdp=2, pipe=2) for each in (one, one[::-1]))
    assert first.diff(second) == []


def test_initial_parameters_are_those_of_one_device():
    plan = plan_on([jp.DP(), jp.PP(microbatches=4, chunks=2)], data=2, pipe=2)
    born = jax.jit(make())()
    for mine, single in zip(*(jax.tree.leaves(nnx.state(each)) for each in (plan.init(), born)), strict=True):
        np.testing.assert_array_equal(np.asarray(mine).reshape(single.shape), single)


# ---- the step


def test_the_reference_decoder_as_it_is():
    """Dropout masks are those of one device; what is frozen stays; aux is averaged; norms are clipped."""

    def loss(model, batch):
        total, weight = gpt.loss(model, batch)
        return (total, weight), {"halved": total / (2 * weight)}

    recipe = jp.Recipe(
        model=make(dropout=0.3), loss=loss, optimizer=optax.sgd(0.1), strategies=[jp.DP()], batch=texts(),
        has_aux=True, clip_norm=0.5, trainable=lambda path: ".k." not in path and ".down." not in path,
    )  # fmt: skip
    staged = dataclasses.replace(recipe, strategies=[jp.DP(), jp.PP(microbatches=4, chunks=2)])
    found = []
    for program in (staged.on(programs.mesh(data=2, pipe=2)), recipe.on(programs.mesh(data=1))):
        _, metrics = program.step(program.init(), program.plan.batch(recipe.batch))
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["halved"] == pytest.approx(found[0]["loss"] / 2, rel=1e-5)


@pytest.mark.parametrize(("rows", "is_whole"), [(32, False), (16, True)])
def test_what_every_stage_computes_is_said(rows, is_whole):
    """Microbatches of 2 rows on a replica are dealt out to 2 stages, those of 1 are not."""
    plan = plan_on([jp.DP(), jp.PP(microbatches=4)], data=4, pipe=2)
    step = plan.jit(jp.value_and_grad(gpt.loss))
    step.lower(plan.abstract(), texts_on(plan, rows))
    said = [note for note in step.notes if "each of 2 stages computes all" in note]
    assert len(said) == is_whole
    assert all("1 row on a replica" in note and "a multiple of 2 rows" in note for note in said)


def test_stages_split_the_vocabulary():
    """Outside of what TP splits it over; then no stage computes the ends for another, however few rows there are."""
    chosen = [jp.DP(), jp.FSDP(min_bytes=0), gpt.tensor_rules(GPT), jp.PP(microbatches=4, vocab="embed")]
    plan = plan_on(chosen, fsdp=2, pipe=2, tensor=2)
    record = plan.records["embed.embedding"]
    assert (record.storage, record.compute) == (jax.P(("pipe", "tensor"), "fsdp"), jax.P(("pipe", "tensor")))
    assert "On every stage: norm.scale." in "".join(plan.notes)
    assert plan.dims["vocab"] == ("pipe", "tensor")
    step = plan.jit(jp.value_and_grad(gpt.loss), donate=False)
    value, _ = step(plan.init(), plan.batch(texts(8)))
    single, _ = nnx.jit(jp.value_and_grad(gpt.loss))(make()(), texts(8))
    assert not any("computes all" in note for note in step.notes)
    assert float(value) == pytest.approx(float(single), rel=1e-6)  # gradients: contract/test_pipelines.py
    logits = [each for each in collectives(step, plan.init(), plan.batch(texts(8))) if "pipe" in each.axes]
    assert {each.kind for each in logits if each.kind != "collective-permute"} == {"all-reduce"}


UNEVEN = """\
embed.embedding: dim 0 has size 31, 31 on a device, but axis 'pipe' has size 2, and 2 does not divide 31. Use a \
multiple of 2 (30 or 32 here), or another size of axis 'pipe', or leave this leaf out of PP's vocab."""


@pytest.mark.parametrize(
    ("vocab", "said"), [("embd", "PP: vocab: the pattern 'embd' matches none of 2 leaves. Did you"), ("embed", UNEVEN)]
)
def test_what_cannot_be_split_over_stages(vocab, said):
    assert said in refused([jp.DP(), jp.PP(microbatches=4, vocab=vocab)], model=make(vocab_size=31), data=4, pipe=2)


def test_a_call_without_a_derivative_sends_layers_to_all_stages():
    """A program's evaluation runs the forwards of the schedule, but for batches that its microbatches do not divide.

    What JAX is to differentiate by itself is refused, with what to use.
    """
    plan = plan_on([jp.FSDP(min_bytes=1024), jp.PP(microbatches=2, chunks=2)], model=small(), fsdp=2, pipe=2)
    model, batch = plan.init(), texts()
    step = plan.jit(mean_square, donate=False)
    expected = float(jax.jit(mean_square)(jax.jit(small())(), batch))
    assert float(step(model, plan.batch(batch))) == pytest.approx(expected, rel=1e-6)
    fewer = plan.batch(jax.tree.map(lambda leaf: leaf[:6], batch))  # six rows are no two microbatches on two devices
    recipe = jp.Recipe(model=small(), loss=mean_square, optimizer=optax.sgd(0.1), strategies=plan.values, batch=batch)
    program = recipe.on(plan.mesh)
    evaluated = [float(program.eval_step({"model": model}, each)["loss"]) for each in (plan.batch(batch), fewer)]
    few = float(mean_square(jax.jit(small())(), jax.tree.map(lambda leaf: leaf[:6], batch)))
    assert evaluated == pytest.approx([expected, few], rel=1e-6)
    with pytest.raises(jp.StepError, match=r"differentiate the loss with jp\.value_and_grad"):
        plan.jit(nnx.value_and_grad(mean_square))(model, plan.batch(batch))


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_bfloat16_and_the_stacks_own_remat(remat):
    plan = jp.plan(
        small(remat=remat), programs.mesh(pipe=2), [jp.PP(microbatches=2)], precision=jp.Precision(compute="bfloat16")
    )
    value, gradients = plan.jit(jp.value_and_grad(mean_square))(plan.init(), plan.batch(texts()))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradients)} == {"float32"}
    single, expected = jp.value_and_grad(mean_square)(jax.jit(small())(), texts())
    assert float(value) == pytest.approx(float(single), rel=2**-6)
    for mine, theirs in zip(*(jax.tree.leaves(each) for each in (gradients, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2**-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("reduce", ["microbatch", "step"])
def test_gradients_cross_replicas_once_and_streams_the_stages_twice_a_tick(reduce):
    """On data 2 x fsdp 2 x pipe 2: data outside of every loop; fsdp in it, or outside too.

    Layers are gathered where blocks read them: for the forward, again for the backward, and by the remat of each block.
    """
    strategies = [jp.DP(), jp.FSDP(min_bytes=1024, reduce=reduce), jp.PP(microbatches=2)]
    plan = plan_on(strategies, model=small(), data=2, fsdp=2, pipe=2)
    found = collectives(plan.jit(jp.value_and_grad(mean_square)), plan.init(), plan.batch(texts()))
    over_data = [each for each in found if "data" in each.axes]
    assert {each.depth for each in over_data} == {0}
    assert len(over_data) <= len(plan.records) + 2  # each leaf once, the loss and its weight
    permutes = [each for each in found if each.kind == "collective-permute"]
    assert [(each.axes, each.count, each.conditional) for each in permutes] == [(("pipe",), 4, False)] * 2
    over_pipe = [each for each in found if each.kind == "all-gather" and "pipe" in each.axes]
    assert not [each for each in over_pipe if each.shape[-2:] == (16, 16)]  # activations, never a weight
    of_layers = [each for each in found if each.shape[-2:] == (16, 16)]
    gathers = [each for each in of_layers if each.kind == "all-gather"]
    assert [(each.axes, each.count, each.depth) for each in gathers] == [(("fsdp",), 2 * 4, 2)] * 3  # layers x ticks
    sums = [each for each in of_layers if each.kind == "reduce-scatter"]
    assert [(each.axes, each.depth) for each in sums] == [(("fsdp",), 2 if reduce == "microbatch" else 0)]


# ---- what is refused


class TwoStacks(nnx.Module):
    def __init__(self):
        linear = lambda rngs: nnx.Linear(16, 16, rngs=rngs)
        self.embed = nnx.Embed(32, 16, rngs=nnx.Rngs(0))
        self.first, self.second = (jp.Stack(linear, 4, rngs=nnx.Rngs(0)) for _ in range(2))


class Given(nnx.Module):
    """Gives its blocks, or does not, what depends on a parameter; or calls its stack otherwise."""

    def __init__(self, how="well", remat="full"):
        self.how = how
        self.embed = nnx.Embed(32, 16, rngs=nnx.Rngs(0))
        self.scale = nnx.Param(jnp.ones(16))
        self.blocks = jp.Stack(Scaled, 4, rngs=nnx.Rngs(0), remat=remat)

    def __call__(self, tokens):
        x, ones = self.embed(tokens), jnp.ones(16)
        if self.how == "parameter":
            return self.blocks(x, self.scale[...])
        if self.how == "twice":
            return self.blocks(self.blocks(x, ones), ones)
        if self.how == "inside":
            return jax.checkpoint(self.blocks)(x, ones)
        return self.blocks(x, ones) if self.how == "well" else x


class Scaled(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, scale):
        return jnp.tanh(self.linear(x)) * scale[None, None]


def mean_square(model, batch):
    return jnp.mean(model(batch["tokens"]) ** 2)


PP = jp.PP(microbatches=4)
STAGES = {"pipe": 2}
FOUR = jp.PP(schedule=jp.schedule("1f1b", stages=4, microbatches=4))


def given(how):
    return {**STAGES, "model": lambda: Given(how), "loss": mean_square}


REFUSED = {
    "rows": (
        [jp.DP(), PP],
        {"rows": 12, "data": 2, **STAGES},
        "into 4 microbatches (PP) over 2 devices that split it. Use a batch of 8 or 16, or 3 or 6 microbatches.",
    ),
    "layers": (
        [jp.PP(microbatches=4, chunks=3)],
        STAGES,
        "PP: blocks: 8 layers do not divide into 2 stages of 3 chunks. Use 6 or 12 layers",
    ),
    "accumulate": ([PP], {**STAGES, "options": {"accumulate": 2}}, "or use PP(microbatches=8)."),
    "separable": ([PP], {**STAGES, "options": {"separable": False}}, "the loss says it is not separable"),
    "no stack": (
        [PP],
        {**STAGES, "model": lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0))},
        "PP: no stack in this model. A pipeline needs an nnx model with one stack of equal blocks",
    ),
    "two stacks": ([PP], {**STAGES, "model": TwoStacks}, "PP: the model has 2 stacks (first, second)"),
    "parameter": ([PP], given("parameter"), "depends on the parameter 'scale'"),
    "twice": ([PP], given("twice"), "the loss calls a stack of blocks twice"),
    "inside": ([PP], given("inside"), "inside of a transformation"),
    "never": ([PP], given("never"), "does not call the model's stack"),
    "stages": ([FOUR], STAGES, "has 4 stages, but axis 'pipe' has size 2"),
    "sequences once": (
        [jp.CP(balance="none", reduce="step"), PP],
        {"context": 2, **STAGES},
        "PP beside CP(reduce='step'): a stage sums the gradients",
    ),
    "ring": ([jp.CP(method="ring"), PP], {"context": 2, **STAGES}, "PP beside CP(method='ring'): its keys go round by"),
    "no strategy": ([jp.DP()], {"data": 2, **STAGES}, "Add PP(microbatches=...) to the strategies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_is_compiled(case):
    strategies, settings, message = REFUSED[case]
    assert message in refused(strategies, **settings)


def test_strategies_that_cannot_be_run_are_refused_when_made(tmp_path):
    with pytest.raises(jp.ShardingError, match="into how many microbatches"):
        jp.PP()
    with pytest.raises(jp.ShardingError, match=r"computes gradients of weights apart .* \(full remat\)"):
        jp.PP(schedule="zb-h1", microbatches=4)
    with pytest.raises(jp.ShardingError, match="microbatches=8, but the schedule '1f1b' has 4"):
        jp.PP(schedule=jp.schedule("1f1b", stages=2, microbatches=4), microbatches=8)
    path = tmp_path / "mine.csv"
    jp.schedule("1f1b", stages=2, microbatches=3).save(path)
    assert jp.PP(schedule=path).schedule.microbatches == 3
    path.write_text(path.read_text().replace("F2", "F3", 1))
    with pytest.raises(jp.ShardingError, match="F2"):
        jp.PP(schedule=str(path))


# ---- what would never end


class Turned(nnx.Module):
    """A block that is laid out by rows, then by columns, then by rows: of that the partitioner makes permutes."""

    def __init__(self, turns, *, rngs):
        self.up, self.turns = nnx.Linear(8, 8, rngs=rngs), turns

    def __call__(self, x):
        x = jnp.tanh(self.up(x))
        if self.turns:
            x = jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec("fsdp", "tensor"))
            x = jax.lax.with_sharding_constraint(jnp.sin(x), jax.sharding.PartitionSpec("tensor", "fsdp"))
        return x


@pytest.mark.parametrize("turns", [True, False])
def test_a_step_whose_stages_would_wait_for_one_another_is_refused(turns):
    plan = plan_on(
        [jp.FSDP(min_bytes=0), jp.TP(column=["*.up"]), jp.PP(microbatches=2)],
        model=lambda: jp.Stack(lambda rngs: Turned(turns, rngs=rngs), 2, rngs=nnx.Rngs(0)),
        fsdp=2,
        tensor=2,
        pipe=2,
    )
    step = plan.jit(jp.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2)))
    model, batch = plan.init(), plan.batch(np.ones((8, 8), np.float32))
    with jax.set_mesh(plan.mesh):
        if turns:
            with pytest.raises(jp.StepError, match=r"(?s)it would never end\..*along 'pipe' take and others do not"):
                step(model, batch)
        else:
            asked = []
            listen = lambda event, **_: asked.append(event) if "compile_requests" in event else None
            jax.monitoring.register_event_listener(listen)
            assert np.isfinite(step(model, batch)[0])
            jax.monitoring.unregister_event_listener(listen)
            assert len(asked) == step.num_compilations == 1  # what was looked through is what runs
