"""Which meshes are tried, how they are ranked, and what a comparison says."""

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpar as jp
from jaxpar._hardware import parse
from jaxpar.cli import main
from jaxpar.compare import Candidate
from jaxpar.compare._candidates import Search
from jaxpar.compare._rank import ranked, why
from jaxpar.compare._scale import number, scaled
from jaxpar.explain._estimate import estimate
from models import gpt
from models.mlp import mlp


@pytest.fixture(scope="module")
def large():
    """8 billion parameters and four million tokens over 64 chips; nothing compiled."""
    return jp.compare(gpt.llama_8b(), "v5p-128", batch="4M-tokens", seq=4096, compile=0, price=4.0)


def test_every_product_of_the_axes_is_tried(large):
    tried = [each.axes for each in (*large.candidates, *large.rejected)]
    products = {
        (d, f, 64 // d // f) for d in (1, 2, 4, 8, 16, 32, 64) for f in (1, 2, 4, 8, 16, 32, 64) if 64 % (d * f) == 0
    }
    assert len(tried) == len(products) == 28
    assert {tuple(axes.get(axis, 1) for axis in ("data", "fsdp", "tensor")) for axes in tried} == products
    assert all(size > 1 for axes in tried for size in axes.values())


def test_the_batch_is_as_asked_for(large):
    assert (large.num_tokens, large.rows, large.seq) == (4 * 2**20, 1024, 4096)
    assert all(each.report.num_tokens == 4 * 2**20 for each in large.candidates)


def test_what_does_not_fit_says_by_how_much(large):
    alone = next(each for each in large.rejected if each.axes == {"data": 64})
    assert alone.reason.startswith("does not fit: state and gradients alone 119.7 GiB of 95.7 GiB")
    assert "optimizer 59.8 GiB" in alone.reason  # AdamW's two moments of 8,030,261,248 parameters
    for each in large.candidates:
        assert each.report.memory.peak <= each.report.memory.limit


def test_microbatches_are_as_few_as_fit(large):
    for each in large.candidates:
        recipe = dataclasses.replace(scaled(gpt.llama_8b(), 1024, 4096), accumulate=max(1, each.accumulate // 2))
        program = recipe.on(jp.mesh("v5p-128", **each.axes))
        if each.accumulate > 1:
            assert estimate(program).memory.peak > each.report.memory.limit
            return
    pytest.fail("no mesh needed microbatches: the case shows nothing")


def test_a_margin_asks_for_more_microbatches():
    """What a compiler needed beyond the estimate is expected of the other meshes: they are fitted with it."""
    search, hardware = Search(scaled(gpt.llama_8b(), 1024, 4096)), parse("v5p-128")
    first = search.look(hardware, {"fsdp": 64})
    search.margin = 1.01 * first.report.memory.limit / first.report.memory.peak
    second = search.look(hardware, {"fsdp": 64})
    assert second.accumulate == 2 * first.accumulate
    search.margin = 100.0
    assert search.look(hardware, {"fsdp": 64}).reason.startswith("does not fit")


def test_days_and_cost_follow_from_the_step(large):
    best = large.best
    days = best.seconds * 20 * large.num_parameters / large.num_tokens / 86_400
    assert large.days(best) == pytest.approx(days)
    assert large.cost(best) == pytest.approx(days * 24 * 64 * 4.0)


def test_it_prints_renders_draws_and_goes_to_json(large, tmp_path):
    text = str(large)
    assert "1   " in text
    assert "not possible" in text
    page = large.to_html()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    bundle = large._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert len(json.dumps(bundle)) < 200_000
    large.draw().save(tmp_path / "compare.svg")
    data = json.loads(large.to_json())
    assert data["candidates"][0]["axes"] == large.candidates[0].axes
    assert len(data["candidates"]) + len(data["rejected"]) == 28
    assert data["verdicts"] == list(large.verdicts)


def test_a_small_model_needs_no_sharding():
    """Simpler is better, and it says so."""
    found = jp.compare(mlp(), "v5e:2x4", batch=4096, compile=0)
    assert found.best.axes == {"data": 8}
    assert any("Simpler is better" in each for each in found.verdicts)


def test_a_tie_goes_to_the_simpler_mesh(large):
    one, two = (next(each for each in large.candidates if each.num_axes == count) for count in (1, 2))

    def at(candidate: Candidate, seconds: float) -> Candidate:
        timeline = dataclasses.replace(candidate.report.timeline, step_seconds=seconds)
        return dataclasses.replace(candidate, report=dataclasses.replace(candidate.report, timeline=timeline))

    assert ranked([at(two, 1.00), at(one, 1.04)])[0].num_axes == 1
    assert ranked([at(two, 1.00), at(one, 1.06)])[0].num_axes == 2
    assert "simpler is better" in why(at(one, 1.04), at(two, 1.00))
    assert " beats " in why(at(two, 1.00), at(one, 1.5))


def test_the_difference_is_told_in_collectives(large):
    candidates = {tuple(each.axes): each for each in large.candidates}
    first, second = candidates["fsdp",], candidates["fsdp", "tensor"]
    assert "all-reduce over tensor" in why(first, second)


def test_axes_are_those_of_the_strategies():
    recipe = dataclasses.replace(mlp(), strategies=[jp.FSDP()])
    found = jp.compare(recipe, "v5e:2x4", batch=4096, compile=0)
    assert [each.axes for each in (*found.candidates, *found.rejected)] == [{"fsdp": 8}]


def test_an_indivisible_dim_is_named():
    def loss(params, batch):
        return jnp.mean((batch["x"].astype(params["up"].dtype) @ params["up"] @ params["down"]) ** 2)

    recipe = jp.Recipe(
        model=lambda: {"up": jnp.zeros((64, 96)), "down": jnp.zeros((96, 64))},
        loss=loss,
        optimizer=optax.sgd(0.1),
        strategies=[jp.DP(), jp.TP(column=["up"], row=["down"])],
        batch={"x": np.zeros((128, 64), np.float32)},
    )
    found = jp.compare(recipe, "v5e:8x8", compile=0)
    reasons = {tuple(each.axes.items()): each.reason for each in found.rejected}
    assert "down: dim 0 has size 96, but axis 'tensor' has size 64" in reasons[("tensor", 64),]
    assert (("data", 64),) not in reasons


def test_tensor_stays_within_a_slice():
    found = jp.compare(mlp(), "2xv5e:2x2", batch=4096, compile=0)
    crossing = [each for each in found.rejected if "cross slices" in each.reason]
    assert [each.axes for each in crossing] == [{"tensor": 8}]
    assert any(each.axes == {"data": 2, "tensor": 4} for each in found.candidates)


def test_several_targets_are_compared_by_days_and_cost():
    found = jp.compare(gpt.tiny(), "v5e:2x2, v5p:2x2x1", compile=0, price={"v5e": 1.2, "v5p": 4.2}, tokens="1B")
    assert found.targets == ("v5e:2x2", "v5p:2x2x1")
    assert "days and costs" in found.verdicts[-1]
    assert math.prod(found.of("v5p:2x2x1")[0].axes.values()) == 4


@pytest.mark.parametrize(
    ("batch", "seq", "rows"),
    [
        ("4M-tokens", 4096, 1024),
        ("4M-tokens", 2048, 2048),
        ("100k-tokens", 1000, 100),
        ("512", None, 512),
        (64, 128, 64),
        ("64-rows", None, 64),
    ],
)
def test_batches_are_read(batch, seq, rows):
    made = scaled(gpt.llama_7b(), batch, seq)
    assert made.batch["tokens"].shape == (rows, seq or 4096)
    assert made.batch["weights"].shape == made.batch["tokens"].shape
    assert made.batch["sample"].shape == (rows,)


@pytest.mark.parametrize(
    ("batch", "seq", "said"),
    [
        ("100-tokens", 4096, "no whole number of sequences of 4096. Nearest: 4096 tokens"),
        ("many", None, "Write rows, 1024, or tokens"),
        (0, None, "at least one row"),
        (None, 0, "at least 1"),
    ],
)
def test_other_batches_are_errors(batch, seq, said):
    with pytest.raises(jp.StepError) as error:
        scaled(gpt.llama_7b(), batch, seq)
    assert said in str(error.value)


def test_tokens_and_seq_need_a_sequence():
    for batch, seq in (("4k-tokens", None), (None, 128)):
        with pytest.raises(jp.StepError, match=r"no sequence|no array of integers"):
            scaled(mlp(), batch, seq)


def test_a_sequence_that_may_be_another_dim_too_is_an_error():
    recipe = gpt.tiny()
    mask = jax.ShapeDtypeStruct((16, 64, 64), jnp.bool_)
    with pytest.raises(jp.StepError, match=r"mask \(16, 64, 64\)"):
        scaled(dataclasses.replace(recipe, batch={**recipe.batch, "mask": mask}), None, 32)


def test_the_model_may_refuse_the_sequence():
    with pytest.raises(jp.StepError, match="max_positions=64"):
        jp.compare(gpt.tiny(), "v5e:2x2", seq=128, compile=0)


def test_numbers_of_tokens_are_read():
    assert [number(each) for each in ("1T", "300B", "2.5b", 7)] == [10**12, 3 * 10**11, 2_500_000_000, 7]


@pytest.mark.parametrize(
    ("target", "said"),
    [("cpu:8", "how fast cpu:8 is"), ("", "no target"), ("v5q-8", "v5q")],
)
def test_other_targets_are_errors(target, said):
    with pytest.raises(jp.MeshError, match=said):
        jp.compare(mlp(), target, compile=0)


def test_an_interrupt_keeps_what_is_done():
    """Ctrl-C as the first mesh is about to be compiled: the table is there, of estimates."""

    class Interrupt(logging.Handler):
        def emit(self, record):
            if "compiling" in record.getMessage():
                raise KeyboardInterrupt

    logger, handler = logging.getLogger("jaxpar"), Interrupt()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        found = jp.compare(mlp(), "v5e:2x2", batch=4096, compile=1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert found.interrupted
    assert found.candidates
    assert not any(each.is_compiled for each in found.candidates)
    assert "interrupted" in " ".join(found.notes)


@pytest.mark.libtpu
def test_the_best_are_compiled_and_told_apart():
    found = jp.compare(mlp(), "v5e:2x2", batch=8192, compile=2)
    compiled = [each for each in found.candidates if each.is_compiled]
    assert len(compiled) == 2
    assert found.candidates[:2] == tuple(compiled)
    assert all(each.report.compiler for each in compiled)
    assert {each.estimate.origin for each in compiled} == {"estimate"}


def test_the_command_line_prints_a_table_or_json(capsys):
    words = ["compare", "models.gpt:tiny", "--target", "v5e:2x2", "--compile", "0", "--batch", "4k-tokens"]
    assert main([*words, "--price", "v5e=1.2", "--tokens", "1B"]) == 0
    assert "days for 1B tokens" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 4096
    assert main([*words, "--price", "cheap"]) == 2
    assert "--price 'cheap'" in capsys.readouterr().err
