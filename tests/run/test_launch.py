"""The launcher: with commands that are quick to start, since it knows nothing of what they compute."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxpar._errors import MeshError
from jaxpar.run import read
from jaxpar.run._events import shortened
from jaxpar.run._group import Group
from jaxpar.run._launch import Launch, launch

# A process as the launcher sees one: it tells its run, beats, and does what its start and its place say.
PROCESS = """
import json, os, pathlib, signal, sys, time

run, plan = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
attempt, slot, rank = (int(os.environ[name]) for name in ("JAXPAR_ATTEMPT", "JAXPAR_SLOT", "JAX_PROCESS_ID"))
what = plan.get(f"{attempt}.{slot}", plan.get(f"{attempt}", plan.get("else", "ends")))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if what == "dies at start":
    sys.exit("no such device")
told = pathlib.Path(os.environ["JAXPAR_LAUNCH"]) / f"run.{os.getpid()}"
told.write_text(str(run))
told.rename(told.with_name("run"))
beats = 0

def beat(step):
    global beats
    beats += 1
    said = {"process": rank, "host": "here", "pid": os.getpid(), "step": step, "total": 9, "beats": beats,
            "time": time.time(), "state": "runs", "attempt": attempt}
    (run / "alive").mkdir(parents=True, exist_ok=True)
    new = run / "alive" / f"new_{rank}"
    new.write_text(json.dumps(said))
    new.rename(run / "alive" / f"process_{rank}.json")

for step in (1, 2, 3, 4):
    beat(step)
    time.sleep(0.15)
    if what == f"dies in {step}":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == f"freezes in {step}":
        os.kill(os.getpid(), signal.SIGSTOP)
    while what in ("stays", f"sticks in {step}"):
        beat(step)
        time.sleep(0.05)
print("ended", os.environ["JAX_NUM_PROCESSES"], flush=True)
"""


def started(tmp_path, plan, num=2, **options):
    command = (sys.executable, "-S", "-E", "-c", PROCESS, str(tmp_path), json.dumps(plan))
    options = {"backoff": 0.05, "devices_per_process": 1, **options}
    return launch(Launch(command=command, num_processes=num, **options))


def told(tmp_path, kind):
    return [event.text for event in read(tmp_path) if event.kind == kind]


def test_all_end_well(tmp_path, capsys):
    assert started(tmp_path, {}) == 0
    out = capsys.readouterr().out
    assert sorted(out.splitlines()) == ["[0] ended 2", "[1] ended 2", "jaxpar launch: All 2 processes ended well."]
    assert (tmp_path / "logs" / "process_1.log").read_text() == "ended 2\n"
    assert told(tmp_path, "done") == ["All 2 processes ended well."]


def test_what_each_process_is_given(tmp_path, capsys):
    script = "import os; print(*(os.environ.get(name) for name in {}))".format(
        ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"]
    )
    group = Group((sys.executable, "-S", "-E", "-c", script), [0, 2], devices=4, gpus={}, place=tmp_path, attempt=1)
    for member in group.members:
        member.join()
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"[{rank}] 2 {rank} cpu 4 {os.environ['PJRT_NPROC']}" for rank in (0, 1)
    ]
    assert [end.code for end in group.ended()] == [0, 0]


def test_a_death_is_told_and_the_group_starts_again(tmp_path):
    assert started(tmp_path, {"1.1": "dies in 2", "1": "stays"}) == 0
    (text,) = told(tmp_path, "died")
    assert text.startswith("Process 1 of 2 on ")
    assert "died in step 2: SIGKILL. The others, which wait for it, were killed. " in text
    assert text.endswith("Starting 2 again in 0.1 s, from the beginning. Last words: last words.")


def test_last_words_are_the_whole_exception(tmp_path, capsys):
    """What it says first is the matter, and what it says last the way out."""
    script = "print('begun')\nraise ValueError('two axes, and one is known:\\ndata\\nName it.')"
    command = (sys.executable, "-S", "-E", "-c", script)
    assert launch(Launch(command=command, num_processes=1, devices_per_process=1, restarts=1, backoff=0.05)) == 70
    assert "Last words: ValueError: two axes, and one is known: data Name it." in capsys.readouterr().out


def test_last_words_keep_both_ends_of_a_long_message():
    assert shortened("a word or two") == "a word or two"
    found = shortened(f"could not be saved: {'x' * 500}: No space left on device", 60)
    assert found.startswith("could not be saved: xxx")
    assert found.endswith("xxx: No space left on device"[-20:])
    assert len(found) < 61


def test_one_step_that_fails_again_and_again(tmp_path):
    assert started(tmp_path, {"else": "dies in 3"}, num=1) == 70
    texts = told(tmp_path, "died")
    assert len(texts) == 3
    assert texts[-1].endswith(
        "Giving up: step 3 failed 3 times, one after another. Its batch, the code or a device is at fault: starting "
        "again will not help. Last words: last words."
    )
    assert len(told(tmp_path, "give_up")) == 1


def test_different_steps_that_fail_are_not_one(tmp_path):
    """Allowed beside the last: as many failures, of steps 1, 2 and 3."""
    assert started(tmp_path, {"1": "dies in 1", "2": "dies in 2", "3": "dies in 3"}, num=1) == 0


def test_failures_without_a_checkpoint_between(tmp_path, capsys):
    assert started(tmp_path, {"else": "dies at start"}, num=1, restarts=2) == 70
    out = capsys.readouterr().out
    assert "died before its first step: exit code 1. Starting 1 again in 0.1 s, from the beginning. Last" in out
    assert "Last words: no such device." in out
    assert "in 0.1 s" in out  # and twice as long before the next
    assert "Giving up: 3 failures, one after another, without a new checkpoint between." in out


def test_a_frozen_process_is_named_and_killed(tmp_path):
    assert started(tmp_path, {"1.1": "freezes in 2", "1": "stays"}, frozen_after=3.0) == 0
    (text,) = told(tmp_path, "frozen")
    assert "Process 1 of 2" in text
    assert "froze in step 2: it lives and was not heard of for 3 s; killed." in text


def test_a_stuck_group_is_killed(tmp_path):
    assert started(tmp_path, {"1": "sticks in 3"}, stuck_after=2.0) == 0
    (text,) = told(tmp_path, "stuck")
    assert "is stuck in step 3: no step was completed for 2 s; killed." in text


def test_elastic_goes_on_with_fewer_and_grows_again(tmp_path, capsys):
    plan = {"1.2": "dies in 2", "1": "stays", "2.2": "dies at start", "3.2": "dies at start", "2": "stays",
            "3": "stays", "4": "stays"}  # fmt: skip
    assert started(tmp_path, plan, num=3, least=2, regrow=1.0) == 0
    (lost,) = told(tmp_path, "lost")
    assert lost == ("Place 2 did not come back, 2 times: going on with 2 processes. It is tried again in 1 s.")
    assert told(tmp_path, "grow") == ["Trying 3 processes again: the 2 that run save and stop first."]
    assert told(tmp_path, "done") == ["All 3 processes ended well."]
    assert "[2] ended 3" in capsys.readouterr().out


def test_no_fewer_than_it_may(tmp_path):
    assert started(tmp_path, {"else": "dies at start"}, num=2, least=2, restarts=3) == 70
    assert told(tmp_path, "lost") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
def test_signals_are_handed_on(number, code, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def send():
        while len(list((tmp_path / "alive").glob("process_*.json"))) < 2:  # both listen to signals by then
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert started(tmp_path, {"else": "stays"}, grace=30.0) == code
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_do_not_outlive_their_launcher(tmp_path, child_env):
    command = [sys.executable, "-S", "-E", "-c", PROCESS, tmp_path, '{"else": "stays"}']
    jaxpar = [sys.executable, "-m", "jaxpar", "launch", "-n", "1", "--devices-per-process", "1", "--"]
    launcher = subprocess.Popen([*jaxpar, *command], env=child_env, stdout=subprocess.DEVNULL)
    alive = tmp_path / "alive" / "process_0.json"
    while not alive.exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    pid = json.loads(alive.read_text())["pid"]
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}"):  # noqa: PTH110
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"num_processes": 0}, "num_processes=0: more than 0"),
        ({"least": 3}, "least=3: at most num_processes=2"),
        ({"command": ()}, "command: nothing to start; write it after `--`"),
    ],
    ids=str,
)
def test_what_cannot_be_launched(wrong, line):
    with pytest.raises(MeshError) as caught:
        Launch(**{"command": ("true",), "num_processes": 2, **wrong})
    assert str(caught.value).splitlines() == ["A group cannot be launched:", line]


def test_gpus_that_cannot_be_shared(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr("jaxpar._devices.only_cpu", lambda: False)
    with pytest.raises(MeshError, match="2 processes cannot share the 3 GPUs of this machine evenly"):
        launch(Launch(command=("true",), num_processes=2))
