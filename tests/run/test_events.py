"""Lines of `events.jsonl`: one a write, whole, and in the order of what happened."""

import json
import socket
import threading

import pytest

from jaxpar.run._events import KINDS, LAUNCHER, Events, read


def write_many(directory, process):
    events = Events(directory, process)
    for step in range(200):
        events.write("save", "x" * 500, step=step)


def test_a_line_has_what_happened_where(tmp_path):
    Events(tmp_path, 3).write("stop", "Stopped.", step=12, reason="SIGTERM")
    (line,) = (tmp_path / "events" / "process_3.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["time", "process", "host", "pid", "kind", "step", "text", "reason"]
    assert (record["process"], record["host"], record["step"]) == (3, socket.gethostname(), 12)
    (event,) = read(tmp_path)
    assert (event.kind, event.more, event.at.utcoffset().total_seconds()) == ("stop", {"reason": "SIGTERM"}, 0)


def test_two_writers_of_one_file_lose_nothing(tmp_path):
    """Process 0 and a launcher, at once."""
    writers = [threading.Thread(target=write_many, args=(tmp_path, process)) for process in (0, LAUNCHER)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for process in (0, LAUNCHER):
        assert [event.step for event in read(tmp_path) if event.process == process] == list(range(200))


def test_a_clock_set_back_reorders_nothing(tmp_path):
    line = lambda hour, step, process: json.dumps(
        {"time": f"2026-01-01T{hour:02}:00:00.000+00:00", "process": process, "host": "a", "pid": 1, "kind": "save",
         "step": step, "text": ""}
    )  # fmt: skip
    (tmp_path / "events").mkdir()
    (tmp_path / "events.jsonl").write_text("\n".join([line(10, 1, 0), line(3, 2, 0), line(12, 4, 0)]))
    (tmp_path / "events" / "process_1.jsonl").write_text(line(11, 3, 1) + "\n")
    assert [event.step for event in read(tmp_path)] == [1, 2, 3, 4]


def test_a_line_cut_short_is_passed_over(tmp_path):
    """As a full disk leaves it; the next line is whole."""
    events = Events(tmp_path, 0)
    events.write("save", "one", step=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')
    events.write("save", "two", step=2)
    assert [event.text for event in read(tmp_path)] == ["one", "two"]


def test_nothing_is_there_yet(tmp_path):
    assert read(tmp_path) == []


def test_a_disk_that_refuses_is_logged(tmp_path, caplog):
    (tmp_path / "events.jsonl").mkdir()
    Events(tmp_path, 0).write("save", "Step 1 is saved.", step=1)
    assert "so this event is in the log alone for now: Step 1 is saved." in caplog.text


def test_a_kind_is_a_known_one(tmp_path):
    assert all(text.endswith(".") for text in KINDS.values())
    with pytest.raises(AssertionError, match="sneeze"):
        Events(tmp_path, 0).write("sneeze", "")
