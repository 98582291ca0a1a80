"""The command line: what it prints, what it refuses, and how it exits."""

import json
import pathlib
import subprocess
import sys

import pytest

import jaxpar as jp
from jaxpar.cli import main

ROOT = pathlib.Path(__file__).parent.parent.parent

TINY = """
import jax, jax.numpy as jnp, optax
import jaxpar as jp
from models.gpt import config, recipes

def small():
    return recipes.recipe(config.TINY, batch=8, seq=32, warmup=2, steps=10)

wrong = 3
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    (tmp_path / "their_app.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("their_app", None)
    return tmp_path


def test_plan(capsys, tmp_path):
    code = main(["plan", "models.mlp:mlp", "--mesh", "data=2,fsdp=2,tensor=2", "--json", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert code == 0
    assert "up.kernel" in out
    assert "[fsdp, tensor]" in out
    assert "global batch 64 = 16 per device x 1 microbatches x 4 batch shards" in out
    assert jp.Plan.from_json((tmp_path / "plan.json").read_text()).axes == {"data": 2, "fsdp": 2, "tensor": 2}


def test_plan_of_hardware_that_is_not_here(capsys):
    """70B parameters over 2,048 chips, on this machine, without any of them."""
    assert main(["plan", "models.gpt:llama_70b", "--mesh", str(ROOT / "meshes/v5p_8x16x16.toml")]) == 0
    out = capsys.readouterr().out
    assert "2048 TPU v5p chips" in out
    assert "70,553,706,496 parameters" in out
    assert "per device: parameters" in out


def test_follow_and_draw(capsys, tmp_path):
    picture = tmp_path / "up.svg"
    words = ["plan", "models.mlp:mlp", "--mesh", "fsdp=8", "--follow", "up.kernel", "--draw", str(picture)]
    assert main(words) == 0
    assert "gathered" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")


def test_verify(capsys, app):
    assert main(["verify", "their_app:small", "--mesh", "data=2,fsdp=2,tensor=2"]) == 0
    assert "leaves agree" in capsys.readouterr().out


def test_train_and_resume(capsys, app):
    (app / "text").mkdir()
    for index in range(20):
        (app / "text" / f"{index}.txt").write_text(f"file {index}: all work and no play makes jack a dull boy.\n" * 40)
    words = ["train", "their_app:small", "--mesh", "data=2,fsdp=2,tensor=2", "--data", "text", "--directory", "run"]

    assert main([*words, "--steps", "4"]) == 0
    assert "4 steps in" in capsys.readouterr().out
    assert main([*words, "--steps", "6"]) == 2
    assert "holds a run, saved up to step 4" in capsys.readouterr().err
    assert main([*words, "--steps", "6", "--resume"]) == 0

    lines = [json.loads(line) for line in (app / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "eval/loss" in lines[-1]
    assert (app / "run" / "plan.svg").exists()


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("versions", "jax ", "devices", "8 x cpu", "extras", "environment"):
        assert word in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models.gpt", "does not name a recipe. Write MODULE:NAME"),
        ("no_such_app:recipe", "there is no module 'no_such_app'"),
        ("models.gpt:lama_70b", "Did you mean 'llama_70b'?"),
        ("their_app:wrong", "is a int, not a recipe"),
    ],
)
def test_names_that_lead_nowhere(name, message, capsys, app):
    assert main(["plan", name]) == 2
    assert message in capsys.readouterr().err


def test_a_mesh_that_does_not_fit(capsys):
    assert main(["plan", "models.mlp:mlp", "--mesh", "fsdp=3"]) == 2
    assert "jaxpar: " in capsys.readouterr().err


def test_data_that_is_not_text(capsys):
    assert main(["train", "models.mlp:mlp", "--mesh", "fsdp=8"]) == 2
    assert "jaxpar train reads text" in capsys.readouterr().err


def test_traceback(app):
    with pytest.raises(jp.StepError):
        main(["plan", "their_app:wrong", "--traceback"])


def test_as_a_process(child_env):
    done = subprocess.run(
        [sys.executable, "-m", "jaxpar", "plan", "models.mlp:mlp", "--mesh", "meshes/cpu_8.toml"],
        env=child_env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "axes: data=2 x fsdp=2 x tensor=2" in done.stdout
