"""The processes that a launcher has started: their environment, their output, their end.

Each is a session of its own, so that whatever it starts ends with it. What it writes is read by a thread: onto the
terminal with its rank, into the run's `logs/process_3.log`, and its end is remembered as its last words.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from .._devices import THREADS
from . import _launched, _logs
from ._events import shortened

COLOURS = (36, 33, 35, 32, 34, 31, 96, 93)  # of a terminal, by rank
MOST_LINES = 10_000  # held until it is known where they go
TAIL = 300  # lines in which an exception is looked for
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit): ")
LOGGED = re.compile(r"(INFO|WARNING|ERROR|CRITICAL):|Traceback ")  # what threads say after the last words

# What a process does before it becomes the command: ask Linux to kill it when the launcher dies, however that dies.
# (`preexec_fn` would do it too, and runs JAX's own hooks against forking.)
PR_SET_PDEATHSIG = 1
TIED = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        rank: Its index in the group.
        slot: Its place on the machine.
        pid: Its number.
        code: As `subprocess` has it: negative for a signal.
        at: When, by `time.monotonic`.
        words: The last line that it wrote, or the exception that it ended by.
    """

    rank: int
    slot: int
    pid: int
    code: int
    at: float
    words: str


class Member:
    """One process, and the thread that reads it."""

    def __init__(
        self, command: Sequence[str], rank: int, slot: int, env: Mapping[str, str], place: pathlib.Path
    ) -> None:
        self.rank = rank
        self.slot = slot
        self.ended: Ended | None = None
        self._place = place
        self._lines: collections.deque[str] = collections.deque(maxlen=MOST_LINES)
        self._words = ""
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._process = subprocess.Popen(
            _tied(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._thread = threading.Thread(target=self._read, name=f"process {rank}", daemon=True)
        self._thread.start()

    def signal(self, number: int) -> None:
        """Send a signal to it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def look(self) -> None:
        """If it has ended, end what it has started: that would keep its output open."""
        if self.ended is None and self._process.poll() is not None:
            self.signal(signal.SIGKILL)

    def join(self) -> None:
        """Wait until it has ended and all of its output is where it belongs."""
        self._thread.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._take(line.decode(errors="replace").rstrip("\n"))
        code = self._process.wait()
        self._keep()
        words = (_exception(self._tail) if code > 0 else "") or self._words
        self.ended = Ended(rank=self.rank, slot=self.slot, pid=self.pid, code=code, at=time.monotonic(), words=words)

    def _take(self, line: str) -> None:
        _show(self.rank, line)
        self._lines.append(line)
        self._tail.append(line)
        if line.strip(" -") and not line.startswith("[Gloo]"):  # which greets on every connection
            self._words = shortened(line.strip())
        self._keep()

    def _keep(self) -> None:
        """Put the lines that are held into the run's log, once there is a run."""
        run = _launched.told_run(self._place)
        if run is None or not self._lines:
            return
        text = "".join(f"{line}\n" for line in self._lines)
        try:
            path = _logs.place(run, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(text)
        except OSError:  # a full disk: they were on the terminal
            pass
        self._lines.clear()


class Group:
    """The processes of one attempt.

    Args:
        command: What each of them runs.
        slots: Their places on the machine; the rank of a process is the index of its place here.
        devices: CPU devices that each simulates, or `None` for attached GPUs.
        gpus: GPUs of each place, as JAX counts them; used without `devices`.
        place: The launcher's directory.
        attempt: Which start this is.
    """

    def __init__(
        self, command: Sequence[str], slots: Sequence[int], *, devices: int | None, gpus: Mapping[int, Sequence[int]],
        place: pathlib.Path, attempt: int,
    ) -> None:  # fmt: skip
        address = f"127.0.0.1:{free_port()}"
        self.began = time.monotonic()
        self.members = []
        for rank, slot in enumerate(slots):
            env = {
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "JAX_NUM_PROCESSES": str(len(slots)),
                "JAX_PROCESS_ID": str(rank),
                _launched.DIRECTORY: str(place),
                _launched.ATTEMPT: str(attempt),
                _launched.SLOT: str(slot),
            }
            if len(slots) > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
            if devices is not None:
                env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
                env.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
                env.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS * devices)))
            else:
                env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, gpus[slot]))
            self.members.append(Member(command, rank, slot, env, place))

    def ended(self) -> list[Ended]:
        """Those that have ended, the first to end first."""
        for member in self.members:
            member.look()
        return sorted((member.ended for member in self.members if member.ended), key=lambda ended: ended.at)

    def living(self) -> list[Member]:
        """Those that have not."""
        return [member for member in self.members if member.ended is None]

    def signal(self, number: int) -> None:
        """Send a signal to those that live."""
        for member in self.living():
            member.signal(number)

    def end(self) -> None:
        """Kill those that live, and wait for all output. A process that was stopped ends too."""
        self.signal(signal.SIGKILL)
        for member in self.members:
            member.join()


def _exception(tail: Sequence[str]) -> str:
    """The exception by which Python ended, in one line; messages of several lines say first what is the matter.

    One of ours is preferred: threads that go on for a moment may end by others.
    """
    begins = [at for at, line in enumerate(tail) if EXCEPTION.match(line)]
    own = [at for at in begins if tail[at].startswith("jaxpar._errors.")]
    if not begins:
        return ""
    first, *more = list(tail)[(own or begins)[-1] :]
    name, _, said = first.partition(": ")
    rest = itertools.takewhile(lambda line: not LOGGED.match(line), more)
    return shortened(" ".join(" ".join([f"{name.rpartition('.')[2]}: {said}", *rest]).split()))


def _tied(command: Sequence[str]) -> list[str]:
    """The command, whose process does not outlive this one (on Linux)."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-S", "-E", "-c", TIED, str(os.getpid()), *command]


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_lock = threading.Lock()


def _show(rank: int, line: str) -> None:
    """One line on the terminal, with its rank, in colour if it is one."""
    tag = f"[{rank}]"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        tag = f"\033[{COLOURS[rank % len(COLOURS)]}m{tag}\033[0m"
    with _lock, contextlib.suppress(OSError, ValueError):
        sys.stdout.write(f"{tag} {line}\n")
        sys.stdout.flush()
