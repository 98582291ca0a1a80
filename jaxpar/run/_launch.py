"""`launch`: a group of processes on this machine, started again when it fails, on fewer places if it must.

    start ──> watch ──> all end well ─────────────────────────────> 0
                │
                ├─ SIGTERM, Ctrl-C: handed on; all save ──────────> 75, 130
                ├─ one dies, freezes, or no step is completed:
                │    the others are killed (they wait for it)
                │    · the same step failed 3 times, or 5 failures without a new checkpoint ──> 70
                │    · a place that fails twice before its first step is left out (elastic)
                │    └─ wait 1, 2, 4 ... 60 s ──> start again, from the last checkpoint
                └─ a place is out for a while (elastic): all save and stop; start again with it

The processes' `Run` tells how far they are (`alive/`), so nothing here touches a device or reads a checkpoint.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from .. import _cluster, _devices
from .._errors import MeshError
from . import _exits, _launched
from ._beat import Pulse, pulses
from ._events import LAUNCHER, Events, read, shortened
from ._group import Ended, Group

LAST = ("error", "hang", "disagree", "nan", "spike")  # events that are the last words of a process
POLL = 0.1
SETTLE = 0.2  # in which the ends of others are seen, so that the cause is named rather than the first that was noticed
OUT_AFTER = 2  # failures of one place before its first step, one after another
MOST_BACKOFF = 60.0
MOST_WORDS = 240  # characters of last words that are repeated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What to start, and when to give up.

    Attributes:
        command: What each process runs.
        num_processes: How many.
        least: With how few it goes on when a process does not come back; by default with no fewer.
        devices_per_process: CPU devices that each process simulates. By default the GPUs of this machine are shared
            out, and without GPUs each process has one CPU device.
        restarts: Failures in a row, without a new checkpoint between, after which it gives up.
        same_step: Failures in one step, one after another, after which it gives up.
        backoff: Seconds to wait before the first restart; twice as long before the next without a new checkpoint.
        frozen_after: Seconds without a beat of a process that lives, after which the group is killed.
        stuck_after: Seconds in which no process completes a step, after which the group is killed; the first step,
            which compiles, may take four times as long.
        grace: Seconds that the processes have to save and leave after a signal; then they are killed.
        regrow: Seconds until a place that was left out is tried again; twice as long after each vain try.

    Raises:
        MeshError: A number is out of range, or the machine's GPUs do not suffice.
    """

    command: tuple[str, ...]
    num_processes: int
    least: int | None = None
    devices_per_process: int | None = None
    restarts: int = 5
    same_step: int = 3
    backoff: float = 1.0
    frozen_after: float = 60.0
    stuck_after: float = 1800.0
    grace: float = 120.0
    regrow: float = 600.0

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value}: more than 0"
            for name, value in dataclasses.asdict(self).items()
            if isinstance(value, int | float) and value <= 0
        ]
        if not self.command:
            wrong.append("command: nothing to start; write it after `--`")
        if self.least is not None and self.least > self.num_processes:
            wrong.append(f"least={self.least}: at most num_processes={self.num_processes}")
        if wrong:
            raise MeshError("\n".join(["A group cannot be launched:", *wrong]))


def launch(what: Launch) -> int:
    """Start processes on this machine, watch them, and start them again when they fail. Returns an exit code.

    0 when all have ended well; 75 when a signal stopped them, saved (start it again); 130 after Ctrl-C; 70 when it
    gave up. Each process finds the others by `jp.initialize()`, and goes on from the last checkpoint by `jp.Run` or
    `jp.fit`. What they write appears here with their ranks, and in the run's `logs`.

    Raises:
        MeshError: The GPUs of this machine cannot be shared out so.

    Example:
        >>> import sys
        >>> launch(Launch(command=(sys.executable, "-c", "print('hello')"), num_processes=2, devices_per_process=1))
        [...] hello
        [...] hello
        jaxpar launch: All 2 processes ended well.
        0
    """
    place = pathlib.Path(tempfile.mkdtemp(prefix="jaxpar-launch-"))
    try:
        return _Supervisor(what, place).run()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why a group ended, on which process."""

    kind: str
    rank: int
    slot: int
    pid: int
    code: int | None
    step: int | None
    words: str


class _Supervisor:
    def __init__(self, what: Launch, place: pathlib.Path) -> None:
        self.what = what
        self.place = place
        self.slots = list(range(what.num_processes))
        self.gpus = _shared_gpus(what)
        self.devices = what.devices_per_process or (None if self.gpus else 1)
        self.attempt = 0
        self.in_row = 0  # failures without a new checkpoint between
        self.steps: list[int | None] = []  # in which the last failures were
        self.saved: int | None = None
        self.early: dict[int, int] = {}  # by place: failures in a row before a first step
        self.grow_at = float("inf")
        self.regrow = what.regrow
        self.asked = 0  # the signal that asks to stop
        self.asked_at = float("inf")
        self.events: Events | None = None

    def run(self) -> int:
        with self._signals():
            while True:
                self.attempt += 1
                group = Group(
                    self.what.command, self.slots, devices=self.devices, gpus=self.gpus, place=self.place,
                    attempt=self.attempt,
                )  # fmt: skip
                try:
                    found = self._watch(group)
                finally:
                    group.end()
                if isinstance(found, int):
                    return found
                if found is not None and (code := self._after(found)) is not None:
                    return code
                if self.asked:
                    return self._stopped(group.ended())

    def _watch(self, group: Group) -> int | _Failure | None:
        """An exit code, or what went wrong, or `None` to start again."""
        watched = _Watched(group)
        is_growing, told = False, False
        while True:
            time.sleep(POLL)
            if self.events is not None:
                self.events.flush()  # what a full disk refused
            ended = group.ended()
            bad = _failed(ended)
            if self.asked and not told:
                told = True
                group.signal(self.asked)
            if not group.living():
                if not bad and is_growing and any(end.code == _exits.AGAIN for end in ended):
                    return None
                if self.asked or not bad:
                    return self._stopped(ended)
            if self.asked and time.monotonic() - self.asked_at > self.what.grace:
                self._say(
                    "give_up", f"After {self.what.grace:.0f} s the processes had not stopped; killed.", why="grace"
                )
                return self._stopped(ended)
            if bad and not self.asked:
                return self._died(watched)
            if (failure := self._silent(watched)) and not self.asked:
                return failure
            if not is_growing and not self.asked and time.monotonic() > self.grow_at and watched.is_in_loop():
                is_growing = True
                self._grow(group)

    def _died(self, watched: "_Watched") -> _Failure:
        watched.look(self._pulses())
        time.sleep(SETTLE)
        bad = _failed(watched.group.ended())
        # A process that was frozen makes the others end by JAX's heartbeat; it is the one to name.
        for member, seconds in watched.silent():
            if seconds > _cluster.HEARTBEAT_SECONDS / 2:
                return self._frozen(watched, member, seconds)
        # Peers of a dead process fail within milliseconds, by exceptions: the one that a signal ended is the cause.
        bad = sorted(bad, key=lambda end: (end.code >= 0 or end.code == -signal.SIGABRT, end.at))
        first = bad[0]
        words = self._last_words(first)
        return _Failure(
            kind="died", rank=first.rank, slot=first.slot, pid=first.pid, code=first.code,
            step=watched.step_of(first.rank), words=words,
        )  # fmt: skip

    def _silent(self, watched: "_Watched") -> _Failure | None:
        watched.look(self._pulses())
        for member, seconds in watched.silent():
            if seconds > self.what.frozen_after:
                return self._frozen(watched, member, seconds)
        if watched.without_step() > self.what.stuck_after * (1 if watched.has_stepped else 4):
            rank, slot, pid, step = watched.last()
            words = f"no step was completed for {watched.without_step():.0f} s"
            return _Failure(kind="stuck", rank=rank, slot=slot, pid=pid, code=None, step=step, words=words)
        return None

    def _frozen(self, watched: "_Watched", rank: int, seconds: float) -> _Failure:
        member = watched.group.members[rank]
        return _Failure(
            kind="frozen", rank=rank, slot=member.slot, pid=member.pid, code=None, step=watched.step_of(rank),
            words=f"it lives and was not heard of for {seconds:.0f} s",
        )  # fmt: skip

    def _after(self, failure: _Failure) -> int | None:
        """Tell it, and decide: an exit code, or `None` to start again."""
        count = len(self.slots)
        saved = self._saved()
        progress = saved is not None and saved > (-1 if self.saved is None else self.saved)
        self.in_row = 1 if progress else self.in_row + 1
        self.saved = saved if saved is not None else self.saved
        self.steps = [*self.steps, failure.step][-self.what.same_step :]
        if failure.step is None:
            self.early[failure.slot] = self.early.get(failure.slot, 0) + 1
        else:
            self.early.clear()
        where = f"in step {failure.step}" if failure.step is not None else "before its first step"
        how = {
            "died": f"died {where}: {_exits.told(failure.code or 0)}.",
            "frozen": f"froze {where}: {failure.words}; killed.",
            "stuck": f"is stuck {where}: {failure.words}; killed.",
        }[failure.kind]
        words = shortened(failure.words, MOST_WORDS)
        said = f" Last words: {words.rstrip('.')}." if failure.kind == "died" and words else ""
        others = " The others, which wait for it, were killed." if count > 1 else ""
        text = f"Process {failure.rank} of {count} on {socket.gethostname()} (pid {failure.pid}) {how}{others}"
        why = self._why_not()
        lost = self._leave_out(failure) if why is None else ""
        pause = min(self.what.backoff * 2 ** (self.in_row - 1), MOST_BACKOFF)
        back = f"from step {self.saved}" if self.saved is not None else "from the beginning"
        then = f"Giving up: {why}" if why else f"Starting {len(self.slots)} again in {pause:.1f} s, {back}."
        self._say(failure.kind, f"{text} {then}{said}", step=failure.step, rank=failure.rank, code=failure.code,
                  words=failure.words, saved=self.saved, processes=count)  # fmt: skip
        if lost:
            self._say("lost", lost, slot=failure.slot, processes=len(self.slots))
        if why:
            self._write("give_up", f"The launcher gave up: {why}", step=failure.step, why=why)
            return _exits.GAVE_UP
        until = time.monotonic() + pause
        while time.monotonic() < until and not self.asked:
            time.sleep(POLL)
        return self._stopped([]) if self.asked else None

    def _why_not(self) -> str | None:
        """Why it is not started again, if it is not."""
        step = self.steps[-1]
        if step is not None and len(self.steps) == self.what.same_step and set(self.steps) == {step}:
            return (
                f"step {step} failed {self.what.same_step} times, one after another. Its batch, the code or a device "
                "is at fault: starting again will not help."
            )
        if self.in_row > self.what.restarts:
            return f"{self.in_row} failures, one after another, without a new checkpoint between."
        return None

    def _leave_out(self, failure: _Failure) -> str:
        """Go on without a place that does not come back, if that is allowed; says so."""
        if self.what.least is None or self.early.get(failure.slot, 0) < OUT_AFTER or len(self.slots) <= self.what.least:
            return ""
        self.slots.remove(failure.slot)
        self.early.clear()
        self.in_row = 1
        self.grow_at = time.monotonic() + self.regrow
        text = f"Place {failure.slot} did not come back, {OUT_AFTER} times: going on with {len(self.slots)} processes. "
        text += f"It is tried again in {self.regrow:.0f} s."
        self.regrow *= 2
        return text

    def _grow(self, group: Group) -> None:
        back = sorted(set(range(self.what.num_processes)) - set(self.slots))
        self.grow_at = float("inf")
        self.slots = sorted([*self.slots, *back])
        text = f"Trying {len(self.slots)} processes again: the {len(group.members)} that run save and stop first."
        self._say("grow", text, processes=len(self.slots))
        group.signal(signal.SIGTERM)

    def _stopped(self, ended: Sequence[Ended]) -> int:
        """The exit code of a group that ended well, or was asked to stop."""
        codes = {end.code for end in ended}
        if not self.asked and codes == {_exits.DONE}:
            count = len(self.slots)
            self._say("done", f"All {count} processes ended well." if count > 1 else "The process ended well.")
            return _exits.DONE
        if codes == {_exits.DONE}:  # after Ctrl-C a loop just ends; a signal may also come after the last step
            return _exits.INTERRUPTED if self.asked == signal.SIGINT else _exits.DONE
        if codes and codes <= {_exits.DONE, _exits.AGAIN}:
            return _exits.AGAIN
        return 128 + self.asked if self.asked else max(codes, default=_exits.GAVE_UP)

    def _last_words(self, ended: Ended) -> str:
        run = _launched.told_run(self.place)
        told = [event for event in read(run) if event.kind in LAST and event.pid == ended.pid] if run else []
        words = str(told[-1].more.get("words", told[-1].text)) if told else ended.words
        return words.replace(f"{run}{os.sep}", "") if run else words  # it stands in the run's own events

    def _saved(self) -> int | None:
        """The last checkpoint that a process says is complete."""
        run = _launched.told_run(self.place)
        steps = [event.step for event in read(run) if event.kind in ("save", "restore")] if run else []
        return steps[-1] if steps else None

    def _pulses(self) -> dict[int, Pulse]:
        run = _launched.told_run(self.place)
        found = pulses(run) if run else {}
        return {rank: pulse for rank, pulse in found.items() if pulse.attempt == self.attempt}

    def _say(self, kind: str, text: str, *, step: int | None = None, **more: object) -> None:
        sys.stdout.write(f"jaxpar launch: {text}\n")
        sys.stdout.flush()
        self._write(kind, text, step=step, **more)

    def _write(self, kind: str, text: str, *, step: int | None = None, **more: object) -> None:
        if self.events is None and (run := _launched.told_run(self.place)):
            self.events = Events(run, LAUNCHER)
        if self.events is not None:
            self.events.write(kind, text, step=step, **more)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, SIGTERM and Ctrl-C are handed on to the group; a second Ctrl-C kills it."""

        def on_signal(number: int, _frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked, self.asked_at = self.asked or number, time.monotonic()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Watched:
    """What is known of a group from its pulses, by the launcher's own clock: those of others may jump."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.has_stepped = False
        self._beats: dict[int, tuple[int, float]] = {}  # by rank: the count of beats, and since when
        self._pulses: dict[int, Pulse] = {}
        self._furthest: dict[int, int] = {}
        self._stepped_at = time.monotonic()

    def look(self, found: dict[int, Pulse]) -> None:
        """Take in what the processes say now."""
        now = time.monotonic()
        for rank, pulse in found.items():
            if rank not in self._beats or self._beats[rank][0] != pulse.beats:
                self._beats[rank] = pulse.beats, now
            if rank in self._furthest and pulse.step > self._furthest[rank]:
                self.has_stepped = self.has_stepped or pulse.total > 0
                self._stepped_at = now
            self._furthest[rank] = pulse.step
        self._pulses |= found  # one that is being written just now was read before

    def silent(self) -> list[tuple[int, float]]:
        """Ranks of processes that live and are in their loop, with the seconds since they were heard of."""
        now = time.monotonic()
        living = {member.rank for member in self.group.living()}
        return [
            (rank, now - at)
            for rank, (_, at) in self._beats.items()
            if rank in living and self._pulses[rank].state == "runs" and self._pulses[rank].total
        ]

    def is_in_loop(self) -> bool:
        """Whether every process is in its loop, where it takes a signal as a request."""
        looping = [pulse for pulse in self._pulses.values() if pulse.total and pulse.state == "runs"]
        return len(looping) == len(self.group.members)

    def without_step(self) -> float:
        """Seconds since a process completed a step; 0 while none is in its loop."""
        is_in_loop = any(pulse.total and pulse.state == "runs" for pulse in self._pulses.values())
        return time.monotonic() - self._stepped_at if is_in_loop else 0.0

    def step_of(self, rank: int) -> int | None:
        """The step under way on a process; `None` before its first."""
        pulse = self._pulses.get(rank)
        return pulse.step if pulse and pulse.total else None

    def last(self) -> tuple[int, int, int, int | None]:
        """Rank, place, pid and step of the process that is furthest behind, of those that are known."""
        rank = min(self._pulses, key=lambda rank: self._pulses[rank].step)
        member = self.group.members[rank]
        return rank, member.slot, member.pid, self.step_of(rank)


def _failed(ended: Sequence[Ended]) -> list[Ended]:
    """The processes that ended neither well nor because they were asked to."""
    return [end for end in ended if end.code not in (_exits.DONE, _exits.AGAIN)]


def _shared_gpus(what: Launch) -> dict[int, list[int]]:
    """The GPUs of each place; none if the CPU is simulated, or there are none."""
    if what.devices_per_process is not None or _devices.only_cpu() or not (gpus := _cluster.num_gpus(os.environ)):
        return {}
    share, over = divmod(gpus, what.num_processes)
    if over or not share:
        raise MeshError(
            f"{what.num_processes} processes cannot share the {gpus} GPUs of this machine evenly. Start "
            f"{gpus} or a number that divides it, choose GPUs by CUDA_VISIBLE_DEVICES, or simulate CPU devices: "
            "--devices-per-process 1."
        )
    return {slot: list(range(slot * share, (slot + 1) * share)) for slot in range(what.num_processes)}
