"""`fit`: the loop written out; resumed, it is the same to the bit."""

import dataclasses
import io
import json
import signal
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import checkpoint
from jaxpar._errors import CheckpointError, DataError
from jaxpar.run import fit
from jaxpar.run._fit import _count, evaluate
from jaxpar.run._progress import Bar, Lines, Pace, duration, progress


@dataclasses.dataclass(frozen=True)
class Line:
    """A stand-in for a program: a sharded matrix, noise from a key in its state, a weighted loss."""

    mesh: jax.sharding.Mesh
    interrupt: dict = dataclasses.field(default_factory=dict)

    @property
    def plan(self):
        return types.SimpleNamespace(batch=lambda batch: jax.device_put(batch, self.sharding("fsdp")))

    def sharding(self, *spec):
        return NamedSharding(self.mesh, P(*spec))

    def init(self):
        w = jax.device_put(jax.random.normal(jax.random.key(0), (8, 8)), self.sharding("fsdp", "tensor"))
        return {"w": w, "key": jax.device_put(jax.random.key(1), self.sharding()), "count": jnp.int32(0)}

    def step(self, state, batch):
        state, metrics = step(state, batch)
        if number := self.interrupt.pop(int(state["count"]), None):
            signal.raise_signal(number)
        return state, metrics

    def eval_step(self, state, batch):
        loss, weight = loss_of(state["w"], batch)
        return {"loss": loss / weight, "weight": weight}


def loss_of(w, batch):
    errors = jnp.sum((batch["x"] @ w) ** 2, axis=1) * batch["weights"]
    return errors.sum(), batch["weights"].sum()


@jax.jit
def step(state, batch):
    key, noise = jax.random.split(state["key"])
    (loss, weight), grads = jax.value_and_grad(loss_of, has_aux=True)(state["w"], batch)
    w = state["w"] - 1e-3 * grads + 1e-3 * jax.random.normal(noise, grads.shape)
    return {"w": w, "key": key, "count": state["count"] + 1}, {"loss": loss / weight, "weight": weight}


class Batches:
    """Batch n is a function of n; ends after `num` of them."""

    def __init__(self, num=10**6):
        self.num = num
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.num:
            raise StopIteration
        self.position += 1
        rng = np.random.default_rng(self.position)
        return {"x": rng.normal(size=(8, 8)).astype(np.float32), "weights": np.ones(8, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Endless(Batches):
    num_steps = None


ONES = np.ones((8, 8), np.float32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def run_fit(mesh, directory, steps, interrupt=None, **options):
    """As a new process would: a new program, new data."""
    data = Batches()
    fitted = fit(Line(mesh, interrupt or {}), data, steps=steps, directory=directory, **options)
    state = {
        name: np.asarray(jax.random.key_data(x) if name == "key" else x).tobytes() for name, x in fitted.state.items()
    }
    return fitted, (state, data.position)


def losses(directory):
    return [
        (line["step"], line["loss"]) for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    ]


def test_resume_is_bitwise(mesh, tmp_path):
    fitted, straight = run_fit(mesh, tmp_path / "a", 6)
    assert (fitted.steps, fitted.stopped_by, fitted.exit_code) == (6, None, 0)
    assert fitted.directory == tmp_path / "a"
    run_fit(mesh, tmp_path / "b", 3)
    resumed, state = run_fit(mesh, tmp_path / "b", 6, resume=True)
    assert state == straight
    assert state[1] == 6
    assert resumed.metrics == fitted.metrics
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert resumed.state["w"].sharding == NamedSharding(mesh, P("fsdp", "tensor"))
    again, state = run_fit(mesh, tmp_path / "b", 6, resume=True)
    assert state == straight
    assert again.steps == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupted(number, mesh, tmp_path):
    _, straight = run_fit(mesh, tmp_path / "a", 6)
    if number == signal.SIGINT:
        fitted, _ = run_fit(mesh, tmp_path / "b", 6, {3: number}, every=2)
        assert (fitted.steps, fitted.stopped_by, fitted.exit_code) == (3, "SIGINT", 130)
    else:
        with pytest.raises(SystemExit) as caught:
            run_fit(mesh, tmp_path / "b", 6, {3: number}, every=2)
        assert caught.value.code == 75
    assert checkpoint.steps(tmp_path / "b" / "checkpoints") == [2, 3]
    assert run_fit(mesh, tmp_path / "b", 6, resume=True)[1] == straight


def test_onto_another_mesh(mesh, tmp_path):
    other = jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    straight, _ = run_fit(mesh, tmp_path / "a", 6)
    run_fit(mesh, tmp_path / "b", 3)
    resumed, (_, position) = run_fit(other, tmp_path / "b", 6, resume=True)
    np.testing.assert_allclose(resumed.state["w"], straight.state["w"], rtol=1e-5)
    assert resumed.state["w"].sharding.mesh == other
    assert position == 6


def test_a_run_is_not_started_over(mesh, tmp_path):
    run_fit(mesh, tmp_path, 2)
    with pytest.raises(CheckpointError) as caught:
        run_fit(mesh, tmp_path, 4)
    assert str(caught.value) == (
        f"{tmp_path} holds a run, saved up to step 2. Go on with it by resume=True (--resume on the command line), or "
        "choose another directory."
    )
    assert run_fit(mesh, tmp_path / "new", 1, resume=True)[0].steps == 1


def test_evaluation_is_the_mean_over_weights(mesh, tmp_path):
    """Batches of unequal weight: the mean over examples, not the mean of the batches' means."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 8)).astype(np.float32)
    weights = np.repeat(np.float32([1, 1, 0]), 8) * rng.integers(1, 9, 24).astype(np.float32)
    weights[3:8] = 0
    batches = [{"x": x[i : i + 8], "weights": weights[i : i + 8]} for i in (0, 8, 16)]
    program = Line(mesh)
    w = np.asarray(program.init()["w"], np.float64)
    expected = float((((x @ w) ** 2).sum(1) * weights).sum() / weights.sum())
    assert evaluate(program, program.init(), batches) == pytest.approx(expected, rel=1e-6)
    assert evaluate(program, program.init(), lambda: iter(batches)) == pytest.approx(expected, rel=1e-6)

    fitted, _ = run_fit(mesh, tmp_path, 5, eval_data=batches, eval_every=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4, 5]
    assert fitted.metrics["eval/loss"] == evaluate(program, fitted.state, batches)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_data": iter([])}, "eval_data gave no batch: an iterator serves one evaluation, so give a list"),
        (
            {"eval_data": [{"x": np.ones((8, 8), np.float32), "weights": np.zeros(8, np.float32)}]},
            "weights that are all",
        ),
        ({"eval_data": Endless()}, "eval_data has no end"),
        ({"eval_every": 2}, "eval_every=2 has no effect without eval_data."),
        ({"eval_every": "2min", "eval_data": []}, "eval_every='2min': evaluation goes by steps"),
    ],
)
def test_evaluation_that_cannot_be(options, expected, mesh, tmp_path):
    with pytest.raises(DataError, match=expected):
        run_fit(mesh, tmp_path, 1, **options)


def test_data_without_a_state(mesh, tmp_path):
    with pytest.raises(DataError) as caught:
        fit(Line(mesh), [{"x": 1}], steps=1, directory=tmp_path)
    assert str(caught.value) == (
        "data: a list_iterator has no get_state and set_state, so a resumed run would repeat batches. "
        "Use jaxpar.data.Loader, or give both methods (their state is JSON)."
    )


def test_data_that_ends_early(mesh, tmp_path):
    with pytest.raises(DataError, match=r"steps=6, and the data ends after 4\. Give fewer, or endless data\."):
        fit(Line(mesh), Batches(4), steps=6, directory=tmp_path, every=2)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4]
    known = Batches(4)
    known.num_steps = 4
    with pytest.raises(DataError, match=r"steps=6, and the data ends after 4\. Give fewer, or endless data\."):
        fit(Line(mesh), known, steps=6, directory=tmp_path / "new", every=2)
    assert not (tmp_path / "new").exists()


def test_prefetched_loader(mesh, tmp_path):
    """`jaxpar.data.Loader` is prefetched onto the devices, and its position is that of the batches used."""
    data = pytest.importorskip("jaxpar.data")
    samples = [
        {"x": x, "weights": np.float32(1)} for x in np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    ]
    program = Line(mesh)
    plan = types.SimpleNamespace(mesh=mesh, batch_axes=("fsdp",), batch=None, context=None)
    program = types.SimpleNamespace(init=program.init, step=program.step, eval_step=program.eval_step, plan=plan)

    def train(directory, steps):
        loader = data.Loader(samples, batch_size=8, seed=0)
        held_out = data.Loader(samples[:20], batch_size=8, epochs=1)
        fitted = fit(program, loader, steps=steps, directory=directory, resume=True, eval_data=held_out)
        return np.asarray(fitted.state["w"]).tobytes(), loader.step, fitted.metrics

    straight = train(tmp_path / "a", 7)
    train(tmp_path / "b", 3)
    assert train(tmp_path / "b", 7) == straight
    assert straight[1] == 7


def test_an_equinox_recipe(tmp_path):
    """A model with functions among its leaves trains, is saved and resumed, to the bit."""

    def mean(model, batch):
        return jnp.mean((jax.vmap(model)(batch["x"]) - 1) ** 2)

    recipe = jp.Recipe(
        model=lambda: eqx.nn.MLP(8, 8, 32, 2, key=jax.random.key(0)),
        loss=mean,
        optimizer=optax.adamw(1e-2),
        strategies=[jp.FSDP(min_bytes=0)],
        batch=next(Batches()),
    )

    def train(directory, steps):
        program = recipe.on(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,)))
        return fit(program, Batches(), steps=steps, directory=directory, resume=True, eval_data=[next(Batches())])

    straight = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    resumed = train(tmp_path / "b", 4)
    assert isinstance(resumed.state["model"], eqx.nn.MLP)
    assert resumed.state["model"].activation is straight.state["model"].activation
    assert eqx.tree_equal(resumed.state, straight.state)
    assert straight.metrics["eval/loss"] < straight.metrics["loss"]


def test_lines_say_what_is_left(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(1000)
    pace.per_step, pace.unit = 4096, "tokens"
    shown = Lines(pace)
    for step, at in [(1, 30.0), (2, 32.0), (11, 50.0)]:
        now = at
        shown.write(step, {"loss": 2.34567, "weight": 1.0})
    shown.close()
    shown.write(12, {"loss": 2.0, "eval/loss": 1.5})
    assert capsys.readouterr().out == (
        "step 1/1000  loss 2.346\n"
        "step 11/1000  loss 2.346  2,048 tokens/s  32m 58s left\n"
        "step 12/1000  loss 2  eval/loss 1.5  2,253 tokens/s  29m 56s left\n"
    )


def test_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    assert isinstance(progress(Pace(10)), Lines)
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = progress(Pace(10))
    assert isinstance(bar, Bar)
    bar.write(3, {"loss": 1.25, "eval/loss": 1.5})
    bar.close()
    bar.close()
    assert "3/10" in terminal.getvalue()
    assert "loss 1.25" in terminal.getvalue()
    assert "eval/loss 1.5" in terminal.getvalue()


def test_fit_prints_lines_when_not_a_terminal(mesh, tmp_path, capsys):
    run_fit(mesh, tmp_path, 3)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 1/3  loss ")
    assert out[-1].startswith("step 3/3  loss ")
    assert out[-1].endswith(" examples/s  0s left")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"tokens": np.zeros((8, 16), np.int32), "weights": np.ones((8, 16))}, (128, "tokens")),
        ({"inputs": np.zeros((8, 16), np.float32)}, (8, "examples")),
        ((np.zeros((8, 28, 28)), np.zeros(8, np.int32)), (8, "examples")),
        ({"scalar": 3}, (0, "examples")),
    ],
)
def test_what_a_batch_counts(batch, expected):
    assert _count(batch) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (80.0, "1m 20s"), (11100.0, "3h 05m"), (187200.0, "2d 04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
