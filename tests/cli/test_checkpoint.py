"""`jaxpar checkpoint ls|show|verify|convert|diff`: what each prints, and how it exits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import checkpoint
from jaxpar.checkpoint._diff import Difference
from jaxpar.cli import main


def tree(fill):
    layers = {str(index): {"w": jnp.full((4, 8), fill + index), "n": jnp.int32(index)} for index in range(3)}
    return {"blocks": layers, "b": jnp.ones(5)}, {"mu": jnp.zeros(2)}, 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with two steps."""
    home = tmp_path_factory.mktemp("run")
    (home / "run.json").write_text("{}")
    for step, fill in ((1, 0.0), (2, 0.5)):
        checkpoint.save(
            home / "checkpoints",
            step,
            tree(fill),
            metrics={"loss": 1 / step},
            metadata={"run": "demo", "plan": "x" * 200},
        )
    return home


def out(capsys, *words, code=0):
    assert main(["checkpoint", *map(str, words)]) == code
    return capsys.readouterr().out


def err(capsys, *words):
    assert main(["checkpoint", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_ls(saved, capsys):
    (saved / "checkpoints" / "3").mkdir(exist_ok=True)
    lines = out(capsys, "ls", saved).splitlines()
    (saved / "checkpoints" / "3").rmdir()
    assert lines[0].split() == ["step", "saved", "(UTC)", "size", "arrays"]
    assert lines[1].split()[0] == "1"
    assert lines[1].endswith("KiB       8  loss 1")
    assert lines[2].endswith("KiB       8  loss 0.5")
    assert lines[3].endswith("INCOMPLETE: an empty directory")


@pytest.mark.parametrize("words", [["checkpoints/2"], ["", "--step", "2"], ["checkpoints"]])
def test_show(words, saved, capsys):
    text = out(capsys, "show", saved / words[0], *words[1:])
    assert text.startswith(f"{saved}/checkpoints/2\nsaved 20")
    assert "metrics:\n  loss: 0.5\nmetadata:\n  run: demo\n  plan: xxxx" in text
    assert "0.blocks.1.w  (4, 8) float32  128 B\n" in text
    assert text.splitlines()[-1].split() == ["2", "a", "Python", "int", "7"]


def test_verify(saved, tmp_path, capsys):
    assert "step 1 is whole" in out(capsys, "verify", saved)
    checkpoint.convert(saved / "checkpoints", tmp_path, part="0")
    file = max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    text = out(capsys, "verify", tmp_path, code=1)
    assert text.startswith(f"{tmp_path}: step 2 is damaged.\n2: {file.relative_to(tmp_path / '2')}: ")
    assert err(capsys, "convert", tmp_path, "-o", tmp_path / "new", "--dtype", "bfloat16").startswith("jaxpar: ")
    assert "is not a directory" in err(capsys, "verify", tmp_path / "none")
    assert "holds no checkpoint" in err(capsys, "verify", tmp_path / "2" / "state")
    assert "is one step, and --step 1 another" in err(capsys, "verify", tmp_path / "2", "--step", "1")


def test_convert_and_diff(saved, tmp_path, capsys):
    """Joined, cut, rounded: each is restored, and each compares with what it was made of."""
    words = ["convert", saved, "--part", "0", "-o"]
    out(capsys, *words, tmp_path / "joined", "--join", "blocks")
    like = {
        "blocks": {"each": {"w": np.zeros((3, 4, 8), np.float32), "n": np.zeros(3, np.int32)}},
        "b": np.ones(5, "f"),
    }
    found = checkpoint.restore(tmp_path / "joined", like)
    assert found["blocks"]["each"]["w"][:, 0, 0].tolist() == [0.5, 1.5, 2.5]

    out(capsys, "convert", tmp_path / "joined", "-o", tmp_path / "cut", "--cut", "blocks")
    assert out(capsys, "diff", tmp_path / "cut", tmp_path / "joined") == "7 leaves are equal, bit for bit.\n"
    out(capsys, "convert", tmp_path / "cut", "-o", tmp_path / "small", "--dtype", "bfloat16")
    like = {"blocks": {str(i): {"w": jnp.zeros((4, 8), jnp.bfloat16), "n": jnp.int32(0)} for i in range(3)}}
    assert checkpoint.restore(tmp_path / "small", like, part="")["blocks"]["2"]["w"][0, 0] == 2.5
    assert checkpoint.verify(tmp_path / "small") == [2]

    text = out(capsys, "diff", saved, saved, "--step", 1, "--other-step", 2, code=1)
    assert text == (
        "0.blocks.0.w: 32 of 32 elements differ, by at most 0.5 (of at most 0.5)\n"
        "0.blocks.1.w: 32 of 32 elements differ, by at most 0.5 (of at most 1.5)\n"
        "0.blocks.2.w: 32 of 32 elements differ, by at most 0.5 (of at most 2.5)\n"
        "metric loss: 1.0, 0.5\n"
        "5 leaves are equal, bit for bit.\n"
    )
    text = out(capsys, "diff", saved, tmp_path / "small", code=1)
    assert "0.b: (5,) float32 in the first, nothing in the second\n" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Nothing would change"),
        (["--part", "5"], "there is no array below '5'."),
        (["--cut", "block"], "there is no stack 'block'"),
        (["--join", "layers"], "there are no layers layers.0, layers.1, ... to join."),
        (["--dtype", "int8"], "dtype='int8': give float32, bfloat16, float16 or float64."),
        (["--step", "9", "--part", "0"], "holds no complete checkpoint of step 9."),
    ],
)
def test_conversions_that_are_refused(words, expected, saved, tmp_path, capsys):
    assert expected in err(capsys, "convert", saved, "-o", tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


def test_other_versions_are_no_difference():
    assert not Difference(leaves=(), values=(), around=("version jax: '0.10.2', '0.12.0'",), num_same=1)
    assert Difference(leaves=(), values=(), around=("metric loss: 1.0, 2.0",), num_same=1)
