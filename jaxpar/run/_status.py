"""What happened to a run, in ten lines, from its files alone: on any machine that sees its directory."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence

from .._errors import CheckpointError
from .._hardware import counted
from ..checkpoint import steps as complete_steps
from ._beat import Pulse, pulses
from ._events import Event, read
from ._progress import duration

FAULTS = (
    "died", "frozen", "stuck", "error", "hang", "nan", "spike", "disagree", "save_failed", "set_aside", "lost",
)  # fmt: skip
SHOWN = 4  # faults that have a line each: the last ones
SILENT = 30.0  # seconds without a beat after which a process counts as gone
WIDTH = 230


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands. Prints as ten lines at most.

    Attributes:
        directory: Where it lives.
        name: What `Run` or `fit` was given as its name.
        state: `"running"`, `"finished"`, `"stopped"`, `"failed"`, or `"silent"`: it should run, and nothing is heard.
        step: The last step that was begun.
        total: Steps of the whole run; 0 if that is not known.
        saved: The last complete checkpoint, if there is one.
        starts: How often its processes were started.
        again: Steps that were done twice, because a process died before they were saved.
        faults: What went wrong, the oldest first.
        now: What the processes of the last start say.
        silence: Seconds since one of them was heard of.
        ended: How the run ended, if it did: the last line of its events.
    """

    directory: pathlib.Path
    name: str | None
    state: str
    step: int
    total: int
    saved: int | None
    starts: int
    again: int
    faults: Sequence[Event]
    now: Sequence[Pulse]
    silence: float
    ended: str

    def __str__(self) -> str:
        return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in self._lines())

    def _lines(self) -> list[str]:
        of = f" of {self.total:,}" if self.total else ""
        name = f" ({self.name})" if self.name else ""
        saved = "nothing is saved" if self.saved is None else f"step {self.saved:,} is saved"
        lines = [f"{self.directory}{name}: {self.state}, step {self.step:,}{of}, {saved}"]
        counts = f"{counted(len(self.faults), 'fault')}, {counted(self.again, 'step')} done again"
        lines.append(f"started {_times(self.starts)}, {counts}")
        hidden = len(self.faults) - SHOWN
        if hidden > 0:
            lines.append(f"  ... {hidden} earlier faults: see events.jsonl")
        lines += [f"  {event.time[5:19].replace('T', ' ')}  {_one_line(event.text)}" for event in self.faults[-SHOWN:]]
        if self.state in ("running", "silent"):
            heard = f"heard of {duration(self.silence)} ago"
            lines.append(f"now: {_who(self.now)}, {heard}")
        elif self.ended:
            lines.append(f"end: {_one_line(self.ended)}")
        return lines


def status(directory: str | os.PathLike[str]) -> Status:
    """Read what happened to the run in `directory`: what failed, where, what was done about it, and who runs now.

    Reads a few small files, and touches no device.

    Raises:
        CheckpointError: There is no run.

    Example:
        >>> import tempfile
        >>> run = jp.Run(tempfile.mkdtemp(), writers=(), name="demo")
        >>> model = run.restore(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> for step in run.steps(3):
        ...     model.bias[...] += 1.0
        >>> print(status(run.directory))
        /... (demo): finished, step 3 of 3, step 3 is saved
        started once, 0 faults, 0 steps done again
        end: Finished: step 3 is saved.
    """
    home = pathlib.Path(directory).absolute()
    if not (home / "run.json").is_file():
        raise CheckpointError(
            f"{home} holds no run: there is no run.json. Give the directory that Run or fit was given."
        )
    events = read(home)
    starts = [event for event in events if event.kind == "start"]
    alive = list(pulses(home).values())
    newest = max((pulse.attempt for pulse in alive), default=0)
    count = int(starts[-1].more.get("processes", 1)) if starts else 0
    now = [pulse for pulse in alive if pulse.attempt == newest and pulse.process < count]
    saved = complete_steps(home / "checkpoints")
    silence = max(0.0, time.time() - max((pulse.time for pulse in now), default=0.0))
    ends = [event for event in events if event.kind in ("start", "stop", "error", "died", "give_up", "done")]
    return Status(
        directory=home,
        name=json.loads((home / "run.json").read_text()).get("name"),
        state=_state(ends, now, silence),
        step=max([pulse.step for pulse in now] + saved[-1:], default=0),
        total=max((pulse.total for pulse in now), default=0),
        saved=max(saved, default=None),
        starts=sum(event.process == 0 for event in starts),
        again=sum(int(event.more.get("again", 0)) for event in starts if event.process == 0),
        faults=_faults(events),
        now=now,
        silence=silence,
        ended=ends[-1].text if ends else "",
    )


def _state(ends: Sequence[Event], now: Sequence[Pulse], silence: float) -> str:
    last = next((event for event in reversed(ends) if event.kind != "done"), None)
    if last is None:
        return "silent"
    if last.kind == "stop":
        reason = last.more.get("reason")
        return "finished" if reason == "finished" else "failed" if reason == "left" else "stopped"
    if last.kind in ("error", "give_up"):
        return "failed"
    return "running" if silence < SILENT and any(pulse.state == "runs" for pulse in now) else "silent"


def _faults(events: Sequence[Event]) -> list[Event]:
    """What went wrong. A launcher names the process that was the cause; others failed as they waited for it."""
    is_launched = any(event.kind == "died" for event in events)
    doubled = ("error", "save_failed") if is_launched else ()
    return [event for event in events if event.kind in FAULTS and event.kind not in doubled]


def _who(now: Sequence[Pulse]) -> str:
    """The processes by host: `4 processes on node7 (0: pid 812, 1: pid 813), node8 (...)`."""
    hosts: dict[str, list[str]] = {}
    for pulse in now:
        hosts.setdefault(pulse.host, []).append(f"{pulse.process}: pid {pulse.pid}")
    parts = [f"{host} ({', '.join(those[:8])}{', ...' if len(those) > 8 else ''})" for host, those in hosts.items()]
    return f"{len(now)} process{'es' if len(now) != 1 else ''} on {', '.join(parts)}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _one_line(text: str) -> str:
    return " ".join(text.split())
