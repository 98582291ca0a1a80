"""`status`: the night, from files alone."""

import re
import time

import pytest
from flax import nnx

from jaxpar._errors import CheckpointError
from jaxpar.run import Events, Run, read, status
from jaxpar.run._beat import SIZE, Beat, pulses


def run_to(directory, total, stop=None):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    run = Run(directory, every=2, writers=(), name="night")
    run.restore(model)
    for step in run.steps(total):
        model.bias[...] += 1.0
        if step == stop:
            raise RuntimeError("out of luck")


def test_a_night(tmp_path):
    with pytest.raises(RuntimeError):
        run_to(tmp_path, 6, stop=5)
    assert status(tmp_path).state == "failed"
    events = Events(tmp_path, "launcher")
    for step in range(6):
        events.write(
            "died", f"Process 1 of 2 on node7 (pid 8) died in step {step}: SIGKILL. Starting 2 again.", step=step
        )
    run_to(tmp_path, 8)
    found = status(tmp_path)
    lines = str(found).splitlines()
    assert len(lines) == 8
    assert lines[0] == f"{tmp_path} (night): finished, step 8 of 8, step 8 is saved"
    assert lines[1] == "started twice, 6 faults, 1 step done again"
    assert lines[2] == "  ... 2 earlier faults: see events.jsonl"
    assert [line[18:] for line in lines[3:7]] == [
        f"Process 1 of 2 on node7 (pid 8) died in step {step}: SIGKILL. Starting 2 again." for step in (2, 3, 4, 5)
    ]
    assert lines[7] == "end: Finished: step 8 is saved."


def test_who_runs_now(tmp_path, monkeypatch):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    run = Run(tmp_path, writers=())
    run.restore(model)
    for step in run.steps(3):
        model.bias[...] += 1.0
        if step == 2:
            found = status(tmp_path)
            assert (found.state, found.total, found.saved) == ("running", 3, None)
            (pulse,) = found.now
            assert str(found).splitlines()[-1].startswith(f"now: 1 process on {pulse.host} (0: pid {pulse.pid}), heard")
            monkeypatch.setattr("jaxpar.run._status.SILENT", 0.0)  # nothing is heard of it
            assert status(tmp_path).state == "silent"
    assert status(tmp_path).state == "finished"


def test_nothing_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no run: there is no run\.json"):
        status(tmp_path)


def test_a_clock_that_jumps_is_told(tmp_path, monkeypatch):
    """Once each way; nothing else goes by it."""
    monkeypatch.setattr("jaxpar.run._beat.SECONDS", 0.01)
    honest, shift = time.time, [0.0]
    monkeypatch.setattr("time.time", lambda: honest() + shift[0])
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    run = Run(tmp_path, writers=())
    run.restore(model)
    told = lambda: [event.text for event in read(tmp_path) if event.kind == "clock"]
    for step in run.steps(2):
        model.bias[...] += 1.0
        beats = pulses(tmp_path)[0].beats
        while pulses(tmp_path)[0].beats < beats + 2:
            time.sleep(0.01)
        shift[0] = 480.0 * (step == 1)
        while len(told()) < step:
            time.sleep(0.01)
    forth, back = told()
    assert re.fullmatch(
        r"The clock of process 0 on \S+ jumped 480 s forth \(or its machine slept\) in step 1\. Nothing was "
        r"done: no step goes by it\.",
        forth,
    )
    assert " jumped 480 s back in step 2. " in back


def test_a_beat_is_rewritten_in_place(tmp_path):
    beat = Beat(tmp_path, 3, attempt=2, each_step=True)
    beat.once(7)
    beat.start(7, 10)
    beat.step(8)
    beat.stop("finished")
    pulse = pulses(tmp_path)[3]
    assert (pulse.step, pulse.total, pulse.state, pulse.attempt, pulse.beats) == (8, 10, "finished", 2, 4)
    assert beat.path.stat().st_size == SIZE
    (tmp_path / "alive" / "process_4.json").write_text("{")
    assert list(pulses(tmp_path)) == [3]
