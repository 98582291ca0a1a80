"""`jaxpar explain` and `jaxpar export`: what they print, where, and what they make of files that are no programs."""

import gzip
import json
import lzma
import pathlib
import sys

import pytest

from jaxpar.cli import main
from jaxpar.explain import Report

HLO = sorted((pathlib.Path(__file__).parents[1] / "data" / "hlo").glob("*.txt"))

MODULE = """
import jax
import jax.numpy as jnp
import optax

import jaxpar as jp

print("a user's module may print")

recipe = jp.Recipe(
    model=lambda: {"w": jnp.ones((64, 64)) / 64},
    loss=lambda params, batch: jnp.mean((batch["x"].astype(params["w"].dtype) @ params["w"]) ** 2),
    optimizer=optax.adamw(1e-3),
    strategies=[jp.FSDP()],
    batch={"x": jax.ShapeDtypeStruct((16, 64), jnp.float32)},
)


def step():
    return (lambda w, x: (x @ w).sum(), *(jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2)))
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def target_of(file):
    """Hardware of as many devices as the text is for."""
    kind, several = file.name[:3], "two_slices" in file.name
    number = int(file.read_text().partition("num_partitions=")[2].partition(",")[0].split()[0])
    targets = {"tpu4": "v5e:2x2", "tpu8": "v5e:2x4", "tpu16": "v5e:4x4", "gpu8": "h100:8"}
    return "2xv5e:2x2" if several else targets[f"{kind}{number}"]


def printed(words, capsys):
    """The one JSON object that a command prints."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_one_object_with_the_whole_report(capsys):
    assert main(["explain", "mine:recipe", "--mesh", "cpu:8:fsdp=8", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert {
        "step_seconds",
        "compute_seconds",
        "exposed_communication_seconds",
        "peak_bytes",
        "mfu",
        "collectives",
    } <= set(found)
    assert found["origin"] == "compiled"
    assert found["unread"] == []
    assert found["peak_bytes"] > 0
    assert Report.from_json(captured.out).axes == {"fsdp": 8}
    assert "a user's module may print" in captured.err
    assert "compiled in " in captured.err


def test_tables_and_a_page(capsys, here):
    assert main(["explain", "mine:recipe", "--mesh", "cpu:8:fsdp=8", "--html", "report.html"]) == 0
    assert "Collectives:" in capsys.readouterr().out
    assert (here / "report.html").read_text().startswith("<!doctype html>")


def test_a_step_with_its_arguments(capsys):
    found = printed(["explain", "mine:step"], capsys)
    assert (found["num_devices"], found["collectives"]) == (1, [])


@pytest.mark.parametrize("file", HLO, ids=lambda file: file.stem)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.05], ids=["whole", "cut", "head"])
def test_text_of_another_compilation(file, share, capsys, here):
    """Whole or cut anywhere: a report, and what it could not read."""
    text = file.read_text()
    (here / "a.hlo").write_text(text[: int(len(text) * share)])
    found = printed(["explain", "--hlo", "a.hlo", "--target", target_of(file)], capsys)
    assert found["target"] == target_of(file).replace("h100:8", "h100:1x8")
    assert found["compiler"] == ""
    if share == 1.0:
        assert found["unread"] == []
        assert found["collectives"]


def entry(line):
    return f"HloModule a\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  {line}\n}}\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\x01 not HLO \xff",
        entry("ROOT %c = f32[8]{0} broadcast(%x), dimensions={0}"),
        entry("ROOT %y = f32[8]{0} frobnicate(%x)"),
        entry("ROOT %w = f32[8]{0} while(%x), condition=%gone, body=%gone"),
    ],
    ids=["empty", "garbage", "no collectives, one device", "unknown operation", "a loop without a body"],
)
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:8", "cpu:8"])
def test_what_is_no_program_gives_a_partial_report(text, target, capsys, here):
    (here / "a.hlo").write_text(text)
    found = printed(["explain", "--hlo", "a.hlo", "--target", target], capsys)
    assert found["collectives"] == []
    is_program = "ENTRY" in text and "gone" not in text
    assert bool(found["unread"]) == (not is_program)
    assert not any("Error" in line for line in found["unread"])


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_packed_text_may_end_too_early(suffix, capsys, here):
    pack = {".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    file = next(file for file in HLO if file.stem == "tpu_fsdp_scan")
    (here / f"a{suffix}").write_bytes(pack(file.read_bytes()))
    whole = printed(["explain", "--hlo", f"a{suffix}", "--target", target_of(file)], capsys)
    assert whole["unread"] == []
    content = (here / f"a{suffix}").read_bytes()
    (here / f"a{suffix}").write_bytes(content[: len(content) // 2])
    assert (
        "ends too early"
        in printed(["explain", "--hlo", f"a{suffix}", "--target", target_of(file)], capsys)["unread"][0]
    )
    (here / f"a{suffix}").write_bytes(b"neither")
    assert (
        "is not whole" in printed(["explain", "--hlo", f"a{suffix}", "--target", target_of(file)], capsys)["unread"][0]
    )


def test_the_axes_of_a_text_may_be_named(capsys):
    file = next(file for file in HLO if file.stem == "tpu_fsdp_scan")
    found = printed(["explain", "--hlo", str(file), "--target", "v5e:2x4:data=2,fsdp=2,tensor=2"], capsys)
    assert found["axes"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert {axis for row in found["collectives"] for axis in row["axes"]} <= set(found["axes"])


@pytest.mark.libtpu
def test_export_here_and_explain_there(capsys, here):
    """The file says as much as the recipe."""
    words = ["--mesh", "v5e:2x2:fsdp=4", "--options", "no-windowed-einsum"]
    assert main(["export", "mine:recipe", *words, "-o", "a.step"]) == 0
    assert "jaxpar explain a.step" in capsys.readouterr().out
    apart = printed(["explain", "a.step", "--cache", "cache"], capsys)
    direct = printed(["explain", "mine:recipe", *words, "--cache", "cache"], capsys)
    assert direct["options"] == {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    called = ("compile_seconds", "collectives", "findings")  # with the lines of this test that asked for them
    assert [name for name in direct if name not in called and apart[name] != direct[name]] == []
    rows = [[{**row, "source": ""} for row in each["collectives"]] for each in (apart, direct)]
    assert rows[0] == rows[1] != []
    assert direct["unread"] == []
    assert direct["step_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain"], "name one thing to explain"),
        (["explain", "mine:recipe", "--hlo", "a.hlo", "--target", "v5e:2x2"], "name one thing to explain"),
        (["explain", "--hlo", "a.hlo"], "--target v5e:16x16"),
        (["explain", "--hlo", "none.hlo", "--target", "v5e:2x2"], "none.hlo"),
        (["explain", "--hlo", "a.hlo", "--target", "v9:2x2"], "no chip is called 'v9'"),
        (["explain", "mine:recipe", "--target", "v5e:2x2"], "--target is for --hlo"),
        (["explain", "a.hlo"], "is not an exported step"),
        (["explain", "a.hlo", "--mesh", "v5e:2x2:fsdp=4"], "leave these out"),
        (["explain", "mine:recipe", "--mesh", "v5e:2x2:fsdp=4", "--options", "fast"], "v5e has no set 'fast'"),
        (["export", "mine:step", "-o", "a.step"], "has no mesh"),
    ],
    ids=lambda each: each if isinstance(each, str) else " ".join(each[1:]) or "nothing",
)
def test_refusals_are_one_message(words, message, capsys, here):
    (here / "a.hlo").write_text("HloModule a")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
