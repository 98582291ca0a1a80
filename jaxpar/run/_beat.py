"""A small file that says that a process lives, and in which step it is: `alive/process_3.json`.

A thread rewrites it every second, so a process that was stopped (`kill -STOP`), swapped out or cut off from its storage
is told from one that waits in a collective, whose thread goes on. A launcher and `jaxpar status` read it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

SECONDS = 1.0
JUMP_SECONDS = 60.0  # by which the wall clock must differ from one beat to the next to be told
MOST_JUMPS = 10  # told of one process: a clock that swings would fill the events
SIZE = 512  # bytes of a record: always the same, so that a rewrite in place needs no room on a full disk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulse:
    """What the file says.

    Attributes:
        process: The process's index.
        host: The machine's name.
        pid: The process's number there.
        step: The step under way, or the last one done.
        total: Steps of the whole run; 0 before they are known.
        beats: Counts up: a reader needs no clock that agrees with the writer's.
        time: Seconds since 1970, by the writer's clock.
        state: `"runs"`, or how the process left its loop.
        attempt: Which start of the group this is, from 1.
    """

    process: int
    host: str
    pid: int
    step: int
    total: int
    beats: int
    time: float
    state: str
    attempt: int


class Beat:
    """Writes the file of this process, from `start` to `stop`.

    Args:
        directory: Where the run lives.
        process: The process's index.
        attempt: Which start of the group this is.
        each_step: Write at each step too, so that a reader knows in which one the process died.
        on_jump: Called with the seconds by which the wall clock was set forth, or back if they are negative.
    """

    def __init__(
        self, directory: pathlib.Path, process: int, *, attempt: int, each_step: bool,
        on_jump: Callable[[float], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.path = place(directory, process)
        self._each_step = each_step
        self._on_jump = on_jump
        self._num_jumps = 0
        self._said: dict[str, Any] = {
            "process": process, "host": socket.gethostname(), "pid": os.getpid(), "step": 0, "total": 0, "beats": 0,
            "time": 0.0, "state": "runs", "attempt": attempt,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def once(self, step: int) -> None:
        """Say that this process is here, after `step`, and no more until it starts."""
        self._said["step"] = step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def start(self, step: int, total: int) -> None:
        """Begin to beat."""
        self._said |= {"total": total, "state": "runs"}
        self._ended.clear()
        self.once(step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"beat {self.path}", daemon=True)
            self._thread.start()

    def step(self, step: int) -> None:
        """`step` begins."""
        self._said["step"] = step
        if self._each_step:
            self._write()

    def stop(self, state: str) -> None:
        """The loop was left, and how."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._said["state"] = state
        self._write()

    def _work(self) -> None:
        ahead = _ahead()
        while not self._ended.wait(SECONDS):
            before, ahead = ahead, _ahead()
            if abs(ahead - before) > JUMP_SECONDS and self._num_jumps < MOST_JUMPS:
                self._num_jumps += 1
                self._on_jump(ahead - before)
            self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a disk that refuses it must not end the run
            self._said |= {"beats": self._said["beats"] + 1, "time": round(time.time(), 3)}
            text = json.dumps(self._said).ljust(SIZE - 1) + "\n"
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, text.encode(), 0)
            finally:
                os.close(descriptor)


def _ahead() -> float:
    """The wall clock's seconds before the clock that nobody sets."""
    return time.time() - time.monotonic()


def place(directory: pathlib.Path, process: int) -> pathlib.Path:
    """The file of one process."""
    return directory / "alive" / f"process_{process}.json"


def pulses(directory: pathlib.Path) -> dict[int, Pulse]:
    """What every process last said, by index."""
    found = {}
    for file in (directory / "alive").glob("process_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            pulse = Pulse(**json.loads(file.read_text()))
            found[pulse.process] = pulse
    return dict(sorted(found.items()))
