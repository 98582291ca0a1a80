"""What happened to a run: a line of JSON for each event, to be read by people, by `jaxpar status` and by scripts.

    {"time": "2026-11-25T22:31:04.120+00:00", "process": 2, "host": "node7", "pid": 812, "kind": "stop", "step": 613,
     "text": "Stopped by SIGTERM after step 613, saved.", "reason": "SIGTERM"}

`events.jsonl` holds the lines of process 0 and of a launcher, `events/process_2.jsonl` those of process 2: a network
file system may lose lines that two machines append to one file. `read` puts them together.
"""

import dataclasses
import datetime as dt
import heapq
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import jax

from ._lines import Lines

KINDS = {
    "start": "A process begins after `step`: 0, or the one to be restored; it does `again` steps once more.",
    "restore": "The state of `step` was read.",
    "save": "The checkpoint of `step` is complete.",
    "save_failed": "The checkpoint of `step` could not be written.",
    "set_aside": "The checkpoint of `step` is incomplete or damaged, and no longer under its number.",
    "notice": "A signal or a preemption notice asks this process to stop.",
    "stop": "A process leaves its loop in good order; `reason` says why.",
    "error": "A process ends by an exception that nobody caught: its last words.",
    "hang": "A step takes far longer than those before; `stacks` says where each process stands.",
    "slow": "One process is slower than the others, and named.",
    "clock": "A wall clock jumped by `seconds`.",
    "nan": "A loss or gradient is not a number, or infinite.",
    "spike": "A loss is far above those before.",
    "rollback": "The run goes back to the checkpoint of `step`.",
    "skip": "A batch is left out.",
    "disagree": "Replicas of one array differ: silent corruption, on the device named.",
    "launch": "A launcher starts `processes` processes.",
    "died": "A launcher sees a process end; `code` is its exit code, negative for a signal.",
    "frozen": "A launcher hears nothing from a process that lives.",
    "stuck": "A launcher sees no step completed for too long.",
    "lost": "A launcher goes on without a process that does not come back.",
    "grow": "A launcher takes back a process that was lost.",
    "give_up": "A launcher starts nothing any more; `why` says so.",
    "done": "A launcher saw every process end well.",
}
"""Every kind of event, and what it says."""

LAUNCHER = "launcher"

_log = logging.getLogger("jaxpar.run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One line.

    Attributes:
        time: UTC, as ISO 8601 has it, by the clock of its host.
        process: The process's index, or `"launcher"`.
        host: The machine's name.
        pid: The process's number there.
        kind: One of `KINDS`.
        step: Steps done, or the step under way; `None` if it is not known.
        text: One readable line: what happened, where, and what was done about it.
        more: What else this kind of event holds.
    """

    time: str
    process: int | str
    host: str
    pid: int
    kind: str
    step: int | None
    text: str
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def at(self) -> dt.datetime:
        """`time`, to reckon with."""
        return dt.datetime.fromisoformat(self.time)


class Events:
    """Writes the events of one process.

    Args:
        directory: Where the run lives.
        process: The process's index, by default JAX's; `"launcher"` for a launcher.

    Example:
        >>> import tempfile
        >>> events = Events(tempfile.mkdtemp())
        >>> events.write("save", "Step 100 is saved.", step=100)
        >>> [(event.kind, event.step, event.text) for event in read(events.directory)]
        [('save', 100, 'Step 100 is saved.')]
    """

    def __init__(self, directory: str | os.PathLike[str], process: int | str | None = None) -> None:
        self.directory = pathlib.Path(directory)
        self._process = process
        self._lines: Lines | None = None

    def write(self, kind: str, text: str, *, step: int | None = None, **more: Any) -> None:
        """Add a line, in one write. A disk that refuses it is logged, not raised: the run matters more.

        The line then waits for room, and goes before the next.

        Args:
            kind: One of `KINDS`.
            text: One readable line, with what was done about it.
            step: Steps done, or the step under way.
            **more: What JSON can hold.
        """
        assert kind in KINDS, kind
        process = jax.process_index() if self._process is None else self._process
        record = {
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "process": process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "kind": kind,
            "step": step,
            "text": " ".join(text.split()),
            **more,
        }
        if self._lines is None:
            name = "events.jsonl" if process in (0, LAUNCHER) else f"events/process_{process}.jsonl"
            self._lines = Lines(self.directory / name)
        if error := self._lines.add(json.dumps(record)):
            _log.error("%s: %s, so this event is in the log alone for now: %s", self._lines.path, error, text)

    def flush(self) -> None:
        """Write the lines that wait for room on the disk, if there is some by now."""
        if self._lines is not None:
            self._lines.flush()


def shortened(words: str, most: int = 600) -> str:
    """`words` less their middle, where they are many: an error says first what failed, and last why, or what to do."""
    if len(words) <= most:
        return words
    half = (most - len(" ... ")) // 2
    return f"{words[:half]} ... {words[-half:]}"


def read(directory: str | os.PathLike[str]) -> list[Event]:
    """The events of all processes, in the order in which they happened.

    Each file's own order is kept, whatever its clock did; between files it goes by time. A line that was cut short (by
    a full disk) is passed over.

    Args:
        directory: Where the run lives.
    """
    home = pathlib.Path(directory)
    files = [home / "events.jsonl", *sorted((home / "events").glob("process_*.jsonl"))]
    return [event for _, event in heapq.merge(*map(_in_order, files), key=lambda pair: pair[0])]


def _in_order(file: pathlib.Path) -> Iterator[tuple[str, Event]]:
    """Each event with the latest time up to it, by which files are merged: a clock set back moves nothing."""
    latest = ""
    if not file.is_file():
        return
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            event = Event(**{name: record.pop(name) for name in _FIELDS}, more=record)
        except (ValueError, KeyError, AttributeError):
            continue
        latest = max(latest, event.time)
        yield latest, event


_FIELDS = [field.name for field in dataclasses.fields(Event) if field.name != "more"]
