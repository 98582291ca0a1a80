"""A step that does not end: each process says where it stands, and leaves with a code that asks to be restarted.

How long a step may take is learned from those before, on all processes alike; time in which a process does not run at
all (stopped, swapped out) is no step's. When it is over, a thread writes one readable line to the events and the stacks
of all threads to `stacks/step_613/process_2.txt`, waits until the other processes have done the same (they hang too, in
the collective that one of them does not enter), and ends the process with code 74. It cannot do so while other code
holds the interpreter's lock; a launcher then misses the process's heartbeat.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import logging
import os
import pathlib
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from types import FrameType

from .._errors import StepError
from ._events import Events
from ._every import parse_every
from ._exits import HUNG

STEPS_KNOWN = 200  # steps from which the deadline is learned
GRACE_SECONDS = 15.0  # for the other processes to write their stacks: they began the step a little sooner or later
LAST_SECONDS = 2.0  # by which process 0 leaves later than the others, as its end aborts them with another code
LOOK_SECONDS = 1.0  # between two looks at how long a step takes

_log = logging.getLogger("jaxpar.run")
_OURS = f"{pathlib.Path(__file__).parent.parent}{os.sep}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hang:
    """How long a step may take.

    Attributes:
        factor: So many times the slowest of the last 200 steps.
        at_least: Never less than this: a step may also evaluate, or wait for a slow disk.
        first: The limit of the first step, which compiles, and of the second.

    Raises:
        StepError: `factor` is not above 1, or a time is none.
    """

    factor: float = 5.0
    at_least: str = "5min"
    first: str = "1h"

    def __post_init__(self) -> None:
        if not self.factor > 1 or None in (parse_every(self.at_least).seconds, parse_every(self.first).seconds):
            raise StepError(f"{self}: give a factor above 1, and times such as '90s', '5min', '1h'.")

    def deadline(self, before: collections.deque[float]) -> float:
        """Seconds that a step may take, after those `before`."""
        if not before:
            return parse_every(self.first).seconds or 0.0
        return max(self.factor * max(before), parse_every(self.at_least).seconds or 0.0)


class Watchdog:
    """Watches the steps of one process, from a thread of its own.

    Args:
        hang: How long a step may take.
        events: Where the line goes; stacks go beside it.
        process: This process's index.
        processes: How many there are.
        leave: What ends the process; a notebook, or a debugger, is told and left alone.
    """

    def __init__(
        self, hang: Hang, events: Events, *, process: int, processes: int, leave: Callable[[int], object] | None = None
    ) -> None:
        self._hang = hang
        self._events = events
        self._process = process
        self._processes = processes
        self._leave = leave or (_only_say if _is_interactive() else os._exit)
        self._before: collections.deque[float] = collections.deque(maxlen=STEPS_KNOWN)
        self._num_steps = 0
        self._step = 0
        self._began: float | None = None
        self._loop_thread = threading.get_ident()
        self._due = 0.0  # when the thread looks next
        self._changed = threading.Condition()
        self._ended = False
        self._has_given_up = False
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """`step` begins, in this thread."""
        with self._changed:
            self._step, self._began, self._loop_thread = step, time.monotonic(), threading.get_ident()
            if self._thread is None:
                self._due = self._began
                self._thread = threading.Thread(target=self._watch, name="jaxpar hang", daemon=True)
                self._thread.start()

    def so_far(self) -> float:
        """Seconds that the step has taken up to now; 0 between steps."""
        with self._changed:
            return time.monotonic() - self._began if self._began is not None else 0.0

    def end(self, longest: float = 0.0) -> None:
        """The step is over: nothing is watched until the next begins. What a save takes is no step's time.

        Args:
            longest: Seconds that it took any process, as they agreed: those that learn the same give up together.
        """
        with self._changed:
            if self._began is not None:
                self._num_steps += 1
                if self._num_steps > 1:  # the first compiles
                    self._before.append(max(time.monotonic() - self._began, longest))
            self._began = None

    def close(self) -> None:
        """End the thread. If it has given a step up, it ends the process: what else goes wrong is a consequence."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=None if self._has_given_up else LOOK_SECONDS)

    def _watch(self) -> None:
        while (given_up := self._next_given_up()) is not None:
            self._report(*given_up)  # without the lock: the loop may go on, and end, while a person is at it

    def _next_given_up(self) -> tuple[int, float] | None:
        """The next step that takes too long, and its seconds; `None` at the end."""
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                if self._began is not None:
                    # As late as this thread looks, the process did not run, or hardly: no fault of the step.
                    self._began = min(self._began + max(now - self._due, 0.0), now)
                    left = self._hang.deadline(self._before) - (now - self._began)
                    if left <= 0:
                        seconds, self._began, self._has_given_up = now - self._began, None, True
                        return self._step, seconds
                    # A step that ends meanwhile does not wake this thread, and the first, which may take an hour, sets
                    # no deadline for those after it: it looks again by itself.
                    self._due = now + min(left, LOOK_SECONDS)
                else:
                    self._due = now + LOOK_SECONDS
                self._changed.wait(self._due - now)
        return None

    def _report(self, step: int, seconds: float) -> None:
        name = f"stacks/step_{step}/process_{self._process}.txt"
        path = self._events.directory / name
        written = path.with_suffix(".tmp")
        usual = "it is the first"
        if self._before:
            usual = f"none of the last {len(self._before)} took more than {max(self._before):.3g} s"
        text = (
            f"Process {self._process} on {socket.gethostname()} hangs in step {step}: {seconds:.0f} s, and {usual}. "
            f"It stands at {_place(self._loop_thread)}"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written.open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            name = f"none, as they could not be written: {error}"
        what = "Left alone, as a person is at it." if self._leave is _only_say else f"Left with code {HUNG}."
        text = f"{text}; stacks: {name}. {what}"
        _log.error("%s", text)
        self._events.write("hang", text, step=step, seconds=round(seconds, 1), stacks=name)
        with contextlib.suppress(OSError):
            written.rename(path)  # by which the others see that all is said here: they may leave
        silent = self._silent(path.parent)
        speakers = [each for each in range(self._processes) if each not in silent]
        if silent and self._process == min(speakers, default=self._process):
            others = ", ".join(map(str, silent))
            text = (
                f"No word from process {others} in step {step}, {GRACE_SECONDS:.0f} s after process {self._process} "
                f"gave it up: dead, frozen, or still at work. Process {self._process} does not wait for it."
            )
            _log.error("%s", text)
            self._events.write("hang", text, step=step, silent=silent)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self._process == 0 and self._processes > 1:
            time.sleep(LAST_SECONDS)
        self._leave(HUNG)
        self._has_given_up = False  # left alone

    def _silent(self, directory: pathlib.Path) -> list[int]:
        """The processes that have not written their stacks when patience ends."""
        until = time.monotonic() + GRACE_SECONDS
        while True:
            silent = [each for each in range(self._processes) if not (directory / f"process_{each}.txt").exists()]
            if self._process in silent:  # the disk refuses: nobody can be waited for
                return []
            if not silent or time.monotonic() > until:
                return silent
            time.sleep(0.1)


def _place(thread: int) -> str:
    """Where a thread stands: the innermost line that is neither Python's, an installed package's nor ours."""
    frame: FrameType | None = sys._current_frames().get(thread)  # noqa: SLF001  # documented, in spite of its name
    innermost = frame
    elsewhere = (sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("purelib") + os.sep, _OURS, "<frozen")
    while frame is not None and frame.f_code.co_filename.startswith(elsewhere):
        frame = frame.f_back
    shown = frame or innermost
    if shown is None:
        return "its end"
    code = shown.f_code
    return f"{pathlib.Path(code.co_filename).name}:{shown.f_lineno} ({code.co_name})"


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules or sys.gettrace() is not None


def _only_say(code: int) -> None:
    """A person at a prompt, in a notebook or in a debugger knows better than a deadline."""
