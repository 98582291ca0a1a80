"""A step that does not end: reported with stacks and the line that stands still, and the process leaves."""

import ctypes
import re
import threading
import time

import pytest

from jaxpar import CheckpointError, StepError
from jaxpar.run import Hang, _hang
from jaxpar.run._events import Events, read
from jaxpar.run._hang import Watchdog


def stand_still(until):
    until.wait(20)


@pytest.fixture
def left():
    return threading.Event()


def dog(hang, directory, left, **given):
    codes = []
    leave = lambda code: (codes.append(code), left.set())
    return Watchdog(hang, Events(directory), **{"process": 0, "processes": 1, **given}, leave=leave), codes


def test_a_hang_after_quick_steps(tmp_path, left):
    watchdog, codes = dog(Hang(factor=2, at_least="1s", first="20s"), tmp_path, left)
    for step in (1, 2, 3):
        watchdog.begin(step)
        watchdog.end()
    watchdog.begin(4)
    stand_still(left)
    assert left.is_set()
    assert codes == [_hang.HUNG] == [74]
    (event,) = read(tmp_path)
    line = stand_still.__code__.co_firstlineno + 1
    assert re.fullmatch(
        r"Process 0 on \S+ hangs in step 4: \d s, and none of the last 2 took more than \S+ s\. It stands at "
        rf"test_hang\.py:{line} \(stand_still\); stacks: stacks/step_4/process_0\.txt\. Left with code 74\.",
        event.text,
    )
    assert (event.kind, event.step) == ("hang", 4)
    stacks = (tmp_path / event.more["stacks"]).read_text()
    assert "in stand_still" in stacks and stacks.count("File ") > 3  # noqa: PT018
    watchdog.close()


def test_the_deadline_is_learned(tmp_path, left):
    """Not from the first step, which compiles; and what lies between steps is not watched."""
    watchdog, codes = dog(Hang(factor=4, at_least="1s", first="20s"), tmp_path, left)
    watchdog.begin(1)
    time.sleep(0.5)
    watchdog.end()
    time.sleep(1.2)
    watchdog.begin(2)
    time.sleep(0.6)
    watchdog.end()
    watchdog.begin(3)  # may take 2.4 s
    time.sleep(1.5)
    watchdog.end()
    watchdog.close()
    assert codes == []
    assert len(watchdog._before) == 2
    assert watchdog._hang.deadline(watchdog._before) > 4 * 1.0  # by 1.5 s, less what a busy machine did not let it run


def test_a_process_that_does_not_run_is_not_hung(tmp_path, left, monkeypatch):
    """As when it is stopped, or its machine swaps: here a call keeps the interpreter's lock for twice the deadline."""
    monkeypatch.setattr(_hang, "LOOK_SECONDS", 0.1)
    watchdog, codes = dog(Hang(factor=2, at_least="1s"), tmp_path, left)
    for step in (1, 2):
        watchdog.begin(step)
        watchdog.end()
    watchdog.begin(3)
    ctypes.PyDLL(None).usleep(2_000_000)
    time.sleep(0.3)
    assert watchdog.so_far() < 1  # of 2.3
    watchdog.end()
    watchdog.close()
    assert codes == []


def test_processes_learn_one_deadline(tmp_path, left):
    """That of the one which took longest, so that they give up together."""
    watchdog, _ = dog(Hang(factor=2, at_least="1s"), tmp_path, left)
    for step in (1, 2):
        watchdog.begin(step)
        watchdog.end(longest=30.0)
    assert watchdog._hang.deadline(watchdog._before) == 60
    watchdog.close()


def test_the_silent_process_is_named(tmp_path, left, monkeypatch):
    monkeypatch.setattr(_hang, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(_hang, "LAST_SECONDS", 0.0)
    (tmp_path / "stacks" / "step_1").mkdir(parents=True)
    (tmp_path / "stacks" / "step_1" / "process_2.txt").touch()
    watchdog, codes = dog(Hang(first="1s"), tmp_path, left, process=0, processes=3)
    watchdog.begin(1)
    stand_still(left)
    assert codes == [74]
    hang, silence = read(tmp_path)
    assert "it is the first" in hang.text
    assert silence.text.startswith("No word from process 1 in step 1, 0 s after process 0 gave it up")
    assert silence.more["silent"] == [1]


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"at_least": "100"}, {"first": "3 steps"}])
def test_what_is_no_time(wrong):
    with pytest.raises((StepError, CheckpointError)):
        Hang(**wrong)
    Hang(factor=1.5, at_least="1s", first="2h")
