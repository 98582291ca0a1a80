"""`Run`: any loop goes on where it was, says what it did, and leaves when asked."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar import _tree, checkpoint
from jaxpar._errors import CheckpointError, StepError
from jaxpar.run import Run, read
from jaxpar.run._every import Every, parse_every
from tests._peers import peers


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


class Loader:
    """Batches by position."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return np.random.default_rng(self.position).normal(size=(8, 8)).astype(np.float32)

    def __iter__(self):
        return self

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.layer(x))


def make_state(mesh):
    model = Model(nnx.Rngs(0))
    opt = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for tree in (model, opt):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P()))
        _tree.replace(tree, {path: place(leaf) for path, leaf in _tree.leaves(tree).items()})
    return model, opt, Loader()


@nnx.jit
def train_step(model, opt, batch):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(batch) ** 2))(model)
    opt.update(model, grads)
    return loss


def train(directory, mesh, total, body=lambda step, run: None, **options):
    """A user's own loop, from a new state, as a new process would run it."""
    run = Run(directory, **{"writers": (), **options})
    model, opt, loader = run.restore(make_state(mesh))
    seen = []
    for step in run.steps(total):
        run.log(loss=train_step(model, opt, next(loader)))
        seen.append(step)
        body(step, run)
    leaves = {path: np.asarray(jax.random.key_data(x) if "key" in path else x).tobytes() for path, x in
              _tree.leaves((model, opt)).items()}  # fmt: skip
    return run, seen, (leaves, loader.position)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def events(directory):
    return [(line["kind"], line["step"]) for line in lines(directory / "events.jsonl")]


def interrupt_at(step, *numbers):
    def body(now, run):
        if now == step:
            for number in numbers:
                signal.raise_signal(number)

    return body


def test_resume_is_bitwise(mesh, tmp_path):
    """Parameters, optimiser, dropout's RNG and data position: six steps are three and three."""
    _, steps, straight = train(tmp_path / "a", mesh, 6)
    assert steps == [1, 2, 3, 4, 5, 6]
    train(tmp_path / "b", mesh, 3)
    run, steps, resumed = train(tmp_path / "b", mesh, 6)
    assert steps == [4, 5, 6]
    assert resumed == straight
    assert run.latest == 6
    losses = [[line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert losses[0] == losses[1]


def test_a_crash_repeats_from_the_last_save(mesh, tmp_path):
    def crash(step, run):
        if step == 5:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        train(tmp_path / "b", mesh, 6, crash, every=2)
    assert checkpoint.steps(tmp_path / "b" / "checkpoints") == [2, 4]
    _, steps, resumed = train(tmp_path / "b", mesh, 6)
    assert steps == [5, 6]
    assert resumed == train(tmp_path / "a", mesh, 6)[2]
    assert events(tmp_path / "b") == [
        ("start", 0), ("save", 2), ("save", 4), ("stop", 5), ("start", 4), ("restore", 4), ("save", 6), ("stop", 6),
    ]  # fmt: skip
    reasons = [line["reason"] for line in lines(tmp_path / "b" / "events.jsonl") if line["kind"] == "stop"]
    assert reasons == ["left", "finished"]


def test_the_last_are_kept(mesh, tmp_path):
    train(tmp_path, mesh, 5, every=1, keep=2)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 5]
    train(tmp_path, mesh, 8, every=1, keep=None)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 5, 6, 7, 8]


def test_saves_by_time(mesh, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def body(step, run):
        nonlocal now
        now += 4

    train(tmp_path, mesh, 7, body, every="10s")
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 6, 7]


def test_saves_by_steps_and_by_time(mesh, tmp_path, monkeypatch):
    """At multiples of 5, and 10 seconds after the last save."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def body(step, run):
        nonlocal now
        now += 4

    train(tmp_path, mesh, 9, body, every=(5, "10s"), keep=None)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 5, 8, 9]


@pytest.mark.parametrize("every", [(100, 200), ("10min", "1h"), ()], ids=str)
def test_every_is_one_of_each(every, tmp_path):
    with pytest.raises(CheckpointError, match="give steps, or a time, or one of each"):
        Run(tmp_path, every=every)


def test_plain_arrays_are_handed_over(mesh, tmp_path):
    step = jax.jit(lambda params, x: jax.tree.map(lambda w: w - 0.1 * x.sum(), params), donate_argnums=0)

    def train(directory, total):
        run = Run(directory, every=1, writers=())
        sharding = NamedSharding(mesh, P("fsdp"))
        params = {"w": jax.device_put(jnp.ones((8, 8)), sharding), "b": jnp.zeros(8)}
        params, loader, epoch = run.restore((params, Loader(), 0), donate=True)
        for epoch in run.steps(total):
            params = step(params, next(loader))
            run.update((params, loader, epoch))
        assert params["w"].sharding == sharding
        return {path: np.asarray(x).tobytes() for path, x in params.items()}, loader.position, epoch

    straight = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    assert train(tmp_path / "b", 4) == straight == (straight[0], 4, 4)


def test_an_old_state_is_never_saved(tmp_path):
    """The new arrays were not handed over; or a module was made anew in the step."""
    run = Run(tmp_path / "a", writers=())
    run.restore({"w": jnp.ones(3), "model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))})
    with pytest.raises(CheckpointError) as caught:
        list(run.steps(3))
    assert str(caught.value) == (
        "Step 1 returned new arrays (w, ...) and the run holds the old. In each step, after the update: "
        "run.update(state)."
    )
    run = Run(tmp_path / "b", every=2, writers=())
    run.restore(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match="No array of the state has changed up to step 2"):
        list(run.steps(3))
    assert checkpoint.steps(tmp_path / "b" / "checkpoints") == []


def test_functional_nnx_state_is_handed_over(tmp_path):
    """An `nnx.State` is new after each jitted step, though its variables could be changed in place."""
    run = Run(tmp_path, writers=())
    run.restore(nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError, match=r"run\.update\(state\)"):
        list(run.steps(1))


def test_metrics_are_fetched_one_step_late(tmp_path):
    """Nothing of a step is read while that step may still run."""
    written, model = [], nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    class Writer:
        def write(self, step, metrics):
            written.append((run.step, step, dict(metrics)))

        def close(self):
            written.append("close")

    run = Run(tmp_path, writers=[Writer()])
    run.restore(model)
    for step in run.steps(3):
        model.bias[...] += 1.0
        run.log(loss=jnp.float32(step), n=step)
        run.log({"eval/loss": np.float32(0.5)})
    run.log(final=7)
    expected = {"loss": 1.0, "n": 1.0, "eval/loss": 0.5}
    assert written[0] == (2, 1, expected)
    assert [entry if entry == "close" else entry[:2] for entry in written] == [(2, 1), (3, 2), (3, 3), "close", (3, 3)]
    assert run.metrics == {"loss": 3.0, "n": 3.0, "eval/loss": 0.5, "final": 7.0}
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]
    assert all(type(value) is float for value in written[0][2].values())


def test_metrics_are_scalars(tmp_path):
    run = Run(tmp_path, writers=())
    with pytest.raises(StepError) as caught:
        run.log(loss=jnp.ones(8), note="fine", ok=1.0, flag=True)
    assert str(caught.value) == (
        "loss: an array of shape (8,)\nnote: a str\nA metric is one number. Reduce it (x.mean()), or leave it out."
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=str)
def test_signals_finish_the_step_and_save(number, code, mesh, tmp_path, caplog):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as caught:
            train(tmp_path, mesh, 6, interrupt_at(3, number))
        assert caught.value.code == code
    else:
        run, steps, _ = train(tmp_path, mesh, 6, interrupt_at(3, number))
        assert (run.stopped_by, run.exit_code, steps) == ("SIGINT", code, [1, 2, 3])
        assert list(run.steps(6)) == []
        assert "This run was stopped by SIGINT: no step is done." in caplog.text
    assert f"{number.name}: finishing this step, then saving." in caplog.text
    assert lines(tmp_path / "events.jsonl")[-1]["reason"] == number.name
    assert {n: signal.getsignal(n) for n in before} == before

    _, steps, resumed = train(tmp_path, mesh, 6)
    assert steps == [4, 5, 6]
    assert resumed == train(tmp_path / "straight", mesh, 6)[2]


def test_a_second_ctrl_c_leaves_at_once(mesh, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, mesh, 6, interrupt_at(3, signal.SIGINT, signal.SIGINT))
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert lines(tmp_path / "events.jsonl")[-1]["reason"] == "SIGINT twice"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("leave", ["break", "raise"])
def test_handlers_are_put_back_however_the_loop_ends(leave, tmp_path):
    model, before = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), signal.getsignal(signal.SIGINT)
    run = Run(tmp_path, writers=())
    run.restore(model)
    try:
        for _ in run.steps(3):
            assert signal.getsignal(signal.SIGINT) is not before
            if leave == "break":
                break
            raise RuntimeError
    except RuntimeError:
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before
    assert events(tmp_path) == [("start", 0), ("stop", 1)]


def test_an_ignored_signal_stays_ignored(mesh, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(tmp_path, mesh, 2, interrupt_at(1, signal.SIGINT))[1] == [1, 2]
    finally:
        signal.signal(signal.SIGINT, before)


def test_stop_finishes_the_step_and_saves(mesh, tmp_path):
    run, steps, _ = train(tmp_path, mesh, 6, lambda step, run: run.stop("good enough") if step == 2 else None)
    assert (steps, run.stopped_by, run.exit_code, run.latest) == ([1, 2], "good enough", 0, 2)


def test_in_another_thread_signals_are_left_alone(mesh, tmp_path, caplog):
    before, found = signal.getsignal(signal.SIGINT), []
    body = lambda step, run: found.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=train, args=(tmp_path, mesh, 2, body))
    thread.start()
    thread.join()
    assert found == [before, before]
    assert "not in the main thread: Ctrl-C and SIGTERM will not save first." in caplog.text
    assert checkpoint.latest(tmp_path / "checkpoints") == 2


def test_a_failed_save_is_raised_at_the_next_step(mesh, tmp_path, monkeypatch):
    def write(path, arrays):
        def finish():
            raise OSError("No space left on device")

        return finish

    monkeypatch.setattr(checkpoint._orbax, "write", write)
    seen = []

    def body(step, run):
        seen.append(step)
        if run._saving:
            run._saving._thread.join()  # it has failed by the end of this step

    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, mesh, 6, body, every=2)
    assert str(caught.value).startswith(
        f"Step 2 could not be saved at {tmp_path}/checkpoints/2: No space left on device"
    )
    assert seen == [1, 2, 3]


def test_incomplete_steps_are_set_aside(mesh, tmp_path, caplog):
    train(tmp_path, mesh, 2)
    (tmp_path / "checkpoints" / "3").mkdir()
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    _, steps, _ = train(tmp_path, mesh, 3)
    assert steps == [3]
    assert "step 3 is incomplete and was set aside, as 3.incomplete." in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "3.incomplete"]
    assert ("set_aside", 3) in events(tmp_path)


def flip_a_bit(step):
    file = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_step_is_set_aside_and_done_again(mesh, tmp_path, caplog):
    train(tmp_path / "b", mesh, 4, every=2)
    flip_a_bit(tmp_path / "b" / "checkpoints" / "4")
    _, steps, resumed = train(tmp_path / "b", mesh, 6, every=2)
    assert steps == [3, 4, 5, 6]
    assert resumed == train(tmp_path / "a", mesh, 6)[2]
    assert "step 4 is DAMAGED, so the latest valid step is 2." in caplog.text
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["2", "4", "4.damaged", "6"]
    (why,) = [line["why"] for line in lines(tmp_path / "b" / "events.jsonl") if line["kind"] == "set_aside"]
    assert why.endswith(": other bytes than were saved (SHA-256)")


def test_a_run_whose_steps_are_all_damaged_does_not_start_anew(mesh, tmp_path):
    train(tmp_path, mesh, 2)
    flip_a_bit(tmp_path / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match=r"checkpoints holds no valid checkpoint: step 2 is damaged\."):
        train(tmp_path, mesh, 4)


def test_the_best_are_kept_by_what_their_own_step_logged(tmp_path):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    keep = checkpoint.Keep(last=1, best=2, metric="eval/loss")
    run = Run(tmp_path, every=1, keep=keep, writers=(), metadata={"note": "best"})
    run.restore(model)
    for step in run.steps(7):
        model.bias[...] += 1.0
        if step != 6:
            run.log({"eval/loss": jnp.float32([5, 1, 3, 2, 4, 0, 9][step - 1])})
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 7]
    assert checkpoint.metadata(tmp_path / "checkpoints", 4) == {"run": None, "note": "best"}


def test_a_run_of_another_program_is_refused(mesh, tmp_path):
    train(tmp_path, mesh, 2, name="gpt tiny")
    with pytest.raises(CheckpointError, match=r"another program: 13 leaves differ \(11 in the checkpoint, 2 here\)"):
        Run(tmp_path).restore(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError) as caught:
        Run(tmp_path, name="mlp").restore(make_state(mesh))
    assert str(caught.value).startswith(f"{tmp_path} holds a run of 'gpt tiny', started 20")
    assert str(caught.value).endswith("saved up to step 2; this one is 'mlp'. Choose another directory.")
    assert train(tmp_path, mesh, 3, name="gpt tiny")[1] == [3]


def test_a_directory_of_something_else_is_refused(mesh, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, mesh, 2)
    assert str(caught.value) == (
        f"{tmp_path} holds metrics.jsonl, which no Run wrote (there is no run.json). Choose another directory."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_knows_no_state_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"Before the loop: state = run\.restore\(state\)\."):
        Run(tmp_path).steps(3)


def test_a_loader_without_a_state_is_refused(mesh, tmp_path):
    model, _, _ = make_state(mesh)
    with pytest.raises(CheckpointError, match="1: a list_iterator has no get_state and set_state"):
        Run(tmp_path).restore((model, iter([1, 2])))


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, Every()), (100, Every(steps=100)), ("100", None), ("100steps", Every(steps=100)),
        ("1 step", Every(steps=1)), ("90s", Every(seconds=90.0)), ("10min", Every(seconds=600.0)),
        ("1.5h", Every(seconds=5400.0)), ("1d", Every(seconds=86400.0)),
        ((100, "10min"), Every(steps=100, seconds=600.0)), ("10min,100", Every(steps=100, seconds=600.0)),
        ("1.5steps", None), ("10mins", None),
        (0, None), (-1, None), (True, None), ("0s", None), ("", None),
    ],
    ids=repr,
)  # fmt: skip
def test_every(every, expected, tmp_path):
    if expected is not None:
        assert parse_every(every) == expected
        return
    with pytest.raises(CheckpointError) as caught:
        Run(tmp_path, every=every)
    assert str(caught.value) == (
        f"every={every!r} is neither steps nor a time. Write 100 or '100steps', or '90s', '10min', '2h', '1d'."
    )


def test_keep_is_positive(tmp_path):
    with pytest.raises(CheckpointError, match="keep=0 would delete every checkpoint"):
        Run(tmp_path, keep=0)


def test_it_logs_through_logging(mesh, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="jaxpar"):
        train(tmp_path, mesh, 1)
        train(tmp_path, mesh, 2)
    assert f"{tmp_path}: step 1 is saved." in caplog.messages
    assert f"{tmp_path}: going on after step 1." in caplog.messages


SCRIPT = """
    import os, signal, sys, time
    import jax.numpy as jnp
    from jaxpar.run import Run, read

    run = Run(sys.argv[1], every=5, writers=())
    w, = run.restore((jnp.zeros(3),))
    for step in run.steps(10_000):
        w = w + step
        run.update((w,))
        if step == 12:
            while run.latest != 10:
                time.sleep(0.01)
            print("twelve", flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_processes_that_are_killed(number, child_env, tmp_path):
    """SIGTERM saves step 12 and exits with 75; kill -9 leaves what was saved, and nothing half-visible."""
    script = textwrap.dedent(SCRIPT)
    if number == signal.SIGTERM:
        script = script.replace("time.sleep(60)", "os.kill(os.getpid(), signal.SIGTERM)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a"], env=child_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"twelve\n"
    if number == signal.SIGKILL:
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == (75 if number == signal.SIGTERM else -9), errors.decode()
    expected = [5, 10, 12] if number == signal.SIGTERM else [5, 10]
    assert checkpoint.steps(tmp_path / "a" / "checkpoints") == expected
    (w,) = checkpoint.restore(tmp_path / "a" / "checkpoints", (jnp.zeros(3),))
    assert w.tolist() == [float(sum(range(expected[-1] + 1)))] * 3


PEER = """
    import os, signal, sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxpar.run import Run, read

    index = int(sys.argv[1])
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    zeros = np.zeros((8, 2), np.float32)
    w = jax.make_array_from_callback(zeros.shape, NamedSharding(mesh, P("data")), lambda rows: zeros[rows])
    step_of = jax.jit(lambda w: (w + 1, w.mean()))
    run = Run(sys.argv[3], every="1h", writers=())
    w, = run.restore((w,))
    for step in run.steps(100):
        w, loss = step_of(w)
        run.update((w,))
        run.log(loss=loss)
        if (index, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.multiprocess
def test_processes_stop_at_the_same_step(child_env, tmp_path):
    """SIGTERM to process 1 alone: both save step 5 and exit with 75; one process restores it."""
    ended = peers(PEER, 2, tmp_path, env=child_env, devices=2)
    assert [peer.code for peer in ended] == [75, 75], ended
    assert events(tmp_path) == [("start", 0), ("save", 5), ("stop", 5)]
    (notice,) = [event for event in read(tmp_path) if event.kind == "notice"]
    assert (notice.process, notice.step) == (1, 5)
    assert notice.text == f"SIGTERM came to process 1 on {notice.host}: saving step 5."
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 2.0, 3.0, 4.0]
    (w,) = checkpoint.restore(tmp_path / "checkpoints", (jnp.zeros((8, 2)),))
    assert w.tolist() == [[5.0] * 2] * 8
