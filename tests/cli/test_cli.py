"""The command line: each command in-process and once as a process, what it prints, and how it refuses."""

import json
import subprocess
import sys
import textwrap
import time

import jax
import pytest

import jaxpar as jp
from jaxpar.cli import main

MODULE = '''
import jax
import jax.numpy as jnp
import optax

import jaxpar as jp


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


SIZES = {"x": 64, "y": 32}


def _recipe(**changes):
    fields = {
        "model": lambda: {"w": jnp.ones((64, 32)) / 64},
        "loss": loss,
        "optimizer": optax.adamw(1e-3),
        "strategies": [jp.DP(), jp.FSDP()],
        "batch": {name: jax.ShapeDtypeStruct((16, size), jnp.float32) for name, size in SIZES.items()},
        "accumulate": 2,
    }
    return jp.Recipe(**(fields | changes))


recipe = _recipe()
long = _recipe(batch={name: jax.ShapeDtypeStruct((1 << 40, size), jnp.float32) for name, size in SIZES.items()})
wrong = _recipe(strategies=[jp.DP(reduce=lambda grads, axes: {p: jax.lax.pmean(g, axes) for p, g in grads.items()})])


def bigrams(rows=16):
    """Each byte is guessed from the byte before."""

    def loss(params, batch):
        logits = jax.nn.log_softmax(params["table"][batch["tokens"]])
        guessed = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
        return -jnp.sum(guessed * batch["weights"]), jnp.sum(batch["weights"])

    tokens = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
    batch = {"tokens": tokens, "labels": tokens, "weights": jax.ShapeDtypeStruct((rows, 32), jnp.float32)}
    return _recipe(model=lambda: {"table": jnp.zeros((256, 256))}, loss=loss, batch=batch, optimizer=optax.sgd(10.0))


number = 3


def asks(rows):
    return _recipe()


def fails():
    raise ValueError("the user's own mistake")
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with a module of recipes and a text; what a command leaves behind goes with it."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "text").mkdir()
    for index in range(4):
        (tmp_path / "text" / f"{index}.txt").write_text(f"{index} the cat sat on the mat. " * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)
    jax.config.update("jax_compilation_cache_dir", cache)


# ---- plan


def test_plan_prints_the_table_and_the_totals(capsys):
    assert main(["plan", "mine:recipe", "--mesh", "data=2,fsdp=4"]) == 0
    out = capsys.readouterr().out
    assert "cpu:8" in out
    assert "axes: data=2 x fsdp=4" in out
    assert "w     float32 64x32" in out
    assert "2,048 parameters" in out
    assert "global batch 16 = 1 per device x 2 microbatches x 8 batch shards" in out


def test_plan_follows_one_leaf(capsys):
    assert main(["plan", "mine:recipe", "--mesh", "fsdp=8", "--follow", "w"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("w  float32 (64, 32)")
    assert "axes:" not in out


def test_plan_goes_to_json_and_to_a_picture(here):
    assert main(["plan", "mine:recipe", "--mesh", "fsdp=8", "--json", "plan.json", "--draw", "plan.svg"]) == 0
    read = jp.Plan.from_json((here / "plan.json").read_text())
    assert read.axes == {"fsdp": 8}
    assert (here / "plan.svg").read_text().startswith("<svg")


def test_a_70b_model_on_2048_chips_is_planned_in_seconds(capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    start = time.process_time()
    assert main(["plan", "models.gpt:llama_70b", "--mesh", "meshes/v5p_8x16x16.toml"]) == 0
    assert time.process_time() - start < 30
    out = capsys.readouterr().out
    assert "v5p:8x16x16: 2048 TPU v5p chips" in out
    assert "70,553,706,496 parameters" in out
    assert all(f"blocks.each.{name}" in out for name in ("attn.q.kernel", "mlp.down.kernel", "attn_norm.scale"))


def test_the_environment_names_a_mesh_too_and_the_command_line_counts_more(capsys, monkeypatch):
    monkeypatch.setenv("JAXPAR_MESH", "data=8")
    assert main(["plan", "mine:recipe"]) == 0
    assert "axes: data=8" in capsys.readouterr().out
    assert main(["plan", "mine:recipe", "--mesh", "fsdp=8"]) == 0
    assert "axes: fsdp=8" in capsys.readouterr().out


# ---- verify


def test_verify_says_yes_with_0_and_no_with_1(capsys):
    assert main(["verify", "mine:recipe", "--mesh", "data=2,fsdp=4"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert all(group in out for group in ("outputs", "gradients", "updates"))
    assert main(["verify", "mine:wrong", "--mesh", "data=8"]) == 1
    assert "FAIL  gradients" in capsys.readouterr().out


def test_verify_of_a_smaller_recipe(capsys):
    """The numbers of fewer rows, and as refused as in Python."""
    assert main(["verify", "mine:long", "--mesh", "data=8", "--batch-size", "16"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert main(["verify", "mine:recipe", "--mesh", "data=8", "--layers", "2"]) == 2
    assert "it has no jp.Stack" in capsys.readouterr().err


# ---- train


def train(*more):
    words = ["train", "mine:bigrams", "--mesh", "data=2,fsdp=4", "--data", "text", "--directory", "run", *more]
    return main(words)


def losses(here):
    lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_train_learns_saves_and_goes_on(here, capsys):
    assert train("--steps", "3") == 0
    out = capsys.readouterr().out
    assert "tokens to train on" in out
    assert "3 steps in " in out
    assert "eval/loss" in out
    assert (here / "run" / "plan.svg").exists()
    assert jp.Plan.from_json((here / "run" / "plan.json").read_text()).axes == {"data": 2, "fsdp": 4}
    assert losses(here)[3] < losses(here)[1]

    assert train("--steps", "4") == 2
    assert "run holds a run, saved up to step 3" in capsys.readouterr().err

    assert train("--steps", "5", "--resume") == 0
    assert list(losses(here)) == [1, 2, 3, 4, 5]


def test_train_wants_a_batch_of_text(capsys):
    assert main(["train", "mine:recipe", "--data", "text", "--mesh", "data=8"]) == 2
    err = capsys.readouterr().err
    assert "jaxpar train reads text, for recipes whose batch has tokens and labels" in err
    assert "'x': (16, 64)" in err


def test_train_wants_a_vocabulary_that_is_large_enough(here, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(300)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(here / "tokenizer.json"))
    assert train("--tokenizer", "tokenizer.json") == 2
    assert "300 token ids" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_train_names_a_path_without_text(capsys):
    assert main(["train", "mine:bigrams", "--data", "nowhere", "--mesh", "data=8"]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---- doctor


def test_doctor_prints_versions_devices_extras_and_environment(capsys, monkeypatch):
    monkeypatch.setenv("JAXPAR_MESH", "fsdp=4")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    parts = {part.splitlines()[0]: part for part in out.strip().split("\n\n")}
    assert list(parts) == ["versions", "devices", "extras", "environment"]
    assert f"python {sys.version_info[0]}.{sys.version_info[1]}" in parts["versions"]
    assert all(f"\n  {name} " in parts["versions"] for name in ("jaxpar", "jax", "jaxlib", "flax", "optax", "grain"))
    assert "(cpu)" in parts["devices"]
    assert "jp.simulate(8)" in parts["devices"]
    assert "wandb: metrics in Weights & Biases:" in parts["extras"]
    assert "JAXPAR_MESH=fsdp=4" in parts["environment"]


def test_doctor_works_where_jax_does_not(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "JAX does not start: " in out
    assert "no_such_platform" in out
    assert "JAX_PLATFORMS=cpu jaxpar doctor" in out


def test_doctor_works_with_nothing_installed(child_env, request):
    """Not even tyro and numpy: only what Python brings, and this checkout."""
    env = {**child_env, "PYTHONPATH": str(request.config.rootpath)}
    done = run([sys.executable, "-S", "-m", "jaxpar", "doctor"], env)
    assert done.returncode == 0, done.stderr
    assert "jax is not installed: pip install jax" in done.stdout
    assert "tyro is not installed: pip install tyro" in done.stdout
    assert "hf: tokenisers and weights of Hugging Face: not installed: pip install 'jaxpar[hf]'" in done.stdout


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "mine"], "'mine' does not name a recipe. Write MODULE:NAME, as in models.gpt:demo."),
        (["plan", "mein:recipe"], "there is no module 'mein' in "),
        (["plan", "mein:recipe"], "Did you mean 'mine'?"),
        (["plan", "mine:recip"], "mine has no 'recip'. Did you mean 'recipe'?"),
        (["plan", "mine:number"], "mine:number is an int, not a recipe. Name a jp.Recipe, or a function"),
        (["plan", "mine:asks"], "mine:asks takes arguments."),
        (["plan", "mine:recipe", "--mesh", "fdsp=8"], "Did you mean 'fsdp'?"),
        (["plan", "mine:recipe", "--mesh", "fsdp=3"], "makes 3"),
        (["plan", "mine:recipe", "--mesh", "no.toml"], "There is no mesh file 'no.toml'."),
        (["plan", "mine:recipe", "--mesh", "v6p-8"], "'v6p-8'"),
        (["plan", "mine:recipe", "--mesh", "fsdp=8", "--follow", "u"], "the plan has no such leaf"),
        (["plan", "mine:recipe", "--mesh", "fsdp=8", "--draw", "plan.gif"], "plan.gif"),
        (["plan", "mine:recipe", "--mesh", "fsdp=8", "--json", "no/plan.json"], "no/plan.json"),
        (["plan", "mine:fails"], "the user's own mistake\n(ValueError; --traceback shows where it comes from.)"),
        (["verify", "mine:recipe", "--mesh", "v5p-16:fsdp=8"], "not attached"),
    ],
    ids=lambda each: each if isinstance(each, str) else " ".join(each[1:]),
)
def test_refusals_are_one_message(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxpar: ")
    assert message in err
    assert "Traceback" not in err


def test_traceback_shows_where(capsys):
    with pytest.raises(ValueError, match="the user's own mistake"):
        main(["plan", "mine:fails", "--traceback"])


def test_a_module_that_does_not_import_is_not_called_missing(here, capsys):
    (here / "broken.py").write_text("import no_such_package\n")
    assert main(["plan", "broken:recipe"]) == 2
    err = capsys.readouterr().err
    assert "No module named 'no_such_package'" in err
    assert "there is no module 'broken'" not in err


def test_what_cannot_be_parsed_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plna", "mine:recipe"])
    assert stopped.value.code == 2


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "plan", "verify", "doctor", "--traceback"))


# ---- as processes


def run(words, env):
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_each_command_is_a_process_that_simulates_its_devices(here, child_env):
    """From a terminal nothing is set up: the CPU has one device, and `--mesh` says eight."""
    env = {name: value for name, value in child_env.items() if name != "JAX_NUM_CPU_DEVICES"}
    words = [sys.executable, "-m", "jaxpar"]
    commands = textwrap.dedent("""
        plan mine:recipe --mesh cpu:8:fsdp=4,data=2
        verify mine:recipe --mesh data=4,fsdp=2
        train mine:bigrams --mesh cpu:8:data=8 --data text --directory run --steps 2
        doctor
    """)
    for command in commands.strip().splitlines():
        done = run([*words, *command.split()], env)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout, command


def test_launch_starts_a_command_with_options_of_its_own(capsys):
    """What stands after `--` is not ours, `--help` and `--traceback` neither."""
    command = [sys.executable, "-S", "-E", "-c", "import sys; print(sys.argv[1:])", "-n", "3", "--traceback", "--help"]
    assert main(["launch", "-n", "1", "--devices-per-process", "1", "--", *command]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "[0] ['-n', '3', '--traceback', '--help']"


def test_launch_writes_a_batch_script(capsys):
    assert main(["launch", "--slurm", "-n", "4", "--nodes", "2", "--time", "1:00:00", "--", "python", "train.py"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=2\n" in out
    assert "#SBATCH --time=1:00:00\n" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-n", "2"], "A group cannot be launched:\ncommand: nothing to start; write it after `--`"),
        (["--elastic", "4", "--", "true"], "--elastic 4: write MIN:MAX, such as 2:4."),
        (["-n", "3", "--elastic", "2:4", "--", "true"], "-n 3 and --elastic 2:4 name two numbers of processes."),
        (["--grace", "100", "--", "true"], "--grace 100: a time, such as 90s or 10min."),
        (["--slurm", "--elastic", "2:4", "--", "true"], "have no effect with --slurm. Leave them out."),
    ],
    ids=str,
)
def test_what_launch_refuses(words, line, capsys):
    assert main(["launch", *words]) == 2
    assert line in capsys.readouterr().err


def test_status_of_nothing(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run: there is no run.json." in capsys.readouterr().err
