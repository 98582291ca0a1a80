"""What any loop needs to survive: where it was, what it saves and when, who asked it to stop.

    model, opt, loader = run.restore((model, opt, loader))
    for step in run.steps(1000):                             # the rest of 1000 steps, counted from 1
        run.log(loss=train_step(model, opt, next(loader)))

A directory is one run: `run.json` says which, `events.jsonl` has a line for each event (see `_events`),
`metrics.jsonl` one for each step, `checkpoints/100` is the state after 100 steps, `logs/process_3.log` what process 3
logged, and `alive/process_3.json` says that it lives. `jaxpar status DIRECTORY` reads all of it.
"""

import datetime as dt
import json
import logging
import numbers
import os
import pathlib
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from .. import _processes, checkpoint
from .._crash import on_crash
from .._errors import CheckpointError, StepError, listed
from .._types import PyTree
from ..checkpoint import Keep, _orbax
from ..checkpoint._about import versions
from ..checkpoint._parts import plain_json, take_apart
from ..checkpoint._restore import restore_valid
from ..checkpoint._steps import drop_after, newest, none_valid, prune_known, root, set_aside, tidy
from . import _exits, _launched, _signals
from ._beat import Beat, pulses
from ._events import Events, shortened
from ._every import parse_every
from ._fault import Fault
from ._logs import kept_log
from ._skipped import Skipped
from ._watch import DEFAULT, Watch, Watcher
from ._writers import Console, JSONLines, Writer

T = TypeVar("T")

MOST_BACKS, WITHIN_STEPS = 3, 1000  # how often a run goes back: that often within so many steps is not for the data


class Run:
    """Restore, count, log, save and stop, for any loop.

    The loop stays the user's. Saving goes on in the background; a step waits only while its state is copied to host
    memory. The first Ctrl-C or SIGTERM, and a notice of JAX's preemption service, lets the step finish, saves, and ends
    the loop; a second Ctrl-C leaves at once, without saving. After SIGTERM or a notice the loop ends with
    `SystemExit(75)`, by which schedulers know that it may be started again; after Ctrl-C it just ends, so that a
    notebook goes on: a script may end with `sys.exit(run.exit_code)`, which is 130 then. Outside of the main thread
    signals are not caught, and that is logged.

    With several processes (`jp.initialize()`) each makes the same calls; process 0 writes metrics and checkpoints'
    descriptions. Signals and times are then agreed on at the end of each step, which waits for all processes.

    Args:
        directory: Where the run lives, on a file system that every process sees. Made when needed.
        every: When to save besides the end: a number of steps (`100`, `"100steps"`), a time (`"10min"`, `"2h"`), or
            both, `(100, "10min")`: at each multiple of 100 steps, and 10 minutes after the last save.
        keep: How many of the last checkpoints are kept, or a `jp.checkpoint.Keep`: also one every so many steps, and
            the best by a metric that the saved step logged. `None` keeps all.
        writers: Where metrics go besides `metrics.jsonl`; a line on the terminal now and then if `None`.
        name: What this run is, kept in `run.json`. A directory of a run with another name is refused.
        metadata: A JSON object to keep with every checkpoint: settings, a plan.
        watch: What is looked for, of `jaxpar.run`: `Hang()` ends a process whose step does not end, `Slow()` names a
            process that holds up the others, `Loss()` goes back before a loss that is no number and leaves out its
            batch (`Loss(spike=10)`: also before one that is far above the usual). These are there if nothing is given,
            and cost nothing. `Replicas(every=100)` compares the copies of every array. `()` looks for nothing.

    Attributes:
        directory: The absolute path.
        step: The step under way, or the last one done.
        metrics: The last value of each metric, as floats: one step late while the loop runs.
        stopped_by: Why the loop ended early: `"SIGINT"`, `"SIGTERM"`, `"preemption"`, or what `stop` was given; else
            `None`; `"rollback"` if it must be started again to go back.
        events: Writes lines of `events.jsonl`.

    Raises:
        CheckpointError: `every` or `keep` cannot be understood.

    Example:
        >>> import tempfile
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> run = Run(tempfile.mkdtemp(), every="10min", writers=())
        >>> model = run.restore(model)
        >>> for step in run.steps(3):
        ...     model.bias[...] += 1.0
        ...     run.log(bias=model.bias[...].sum())
        >>> run.metrics, run.latest
        ({'bias': 12.0}, 3)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | str | Sequence[int | str] | None = None,
        keep: int | Keep | None = 3,
        writers: Sequence[Writer] | None = None,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        watch: Sequence[Watcher] = DEFAULT,
    ) -> None:
        if isinstance(keep, int) and keep < 1:
            raise CheckpointError(f"keep={keep} would delete every checkpoint. Keep 1 or more, or None for all.")
        self.directory = root(directory)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.stopped_by: str | None = None
        self._every = parse_every(every)
        self.events = Events(self.directory)
        self._watch = Watch(watch, self.events)
        self._backs: list[int] = []  # steps from which the run went back
        self._is_followed = False  # whether the loop takes its state from the run
        self._tells_no_more = False
        self._keep = Keep(last=keep) if isinstance(keep, int) else keep
        self._name = name
        self._metadata = {"run": name, **plain_json(dict(metadata or {}), "metadata")}
        shown = (Console(),) if writers is None else tuple(writers)
        self._writers = (JSONLines(self.directory / "metrics.jsonl"), *shown)
        self._state: PyTree = None
        self._is_restored = False
        self._loose: list[str] = []  # leaves of the state that a step returns anew
        self._is_current = False  # whether `_state` is the one after this step
        self._seen: dict[str, weakref.ref[jax.Array]] = {}  # the arrays last restored or saved
        self._in_loop = False
        self._now: dict[str, Any] = {}  # metrics of this step
        self._behind: tuple[int, dict[str, Any]] | None = None  # of the step before, still on the devices perhaps
        self._saving: checkpoint.Saving | None = None
        self._saved_at = time.monotonic()
        self._sound: int | None = None  # the last step that was restored or saved
        self._stop_reason: str | None = None
        self._beat: Beat | None = None
        self._forget: Callable[[], None] = lambda: None

    @property
    def latest(self) -> int | None:
        """The last step that is saved, or `None`. Its files are there with their sizes; `restore` reads them."""
        return max(checkpoint.steps(self._checkpoints), default=None)

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 130 after Ctrl-C, 75 after SIGTERM or a preemption notice (start it again), else 0."""
        return _exits.OF_STOP.get(self.stopped_by or "", _exits.DONE)

    @property
    def state(self) -> PyTree:
        """The state that the run holds, after this step or as restored.

        After a fault the run goes back to a checkpoint and does the steps from there again. Modules and optimisers go
        back with it. A loop over plain arrays begins each step by `state, loader = run.state` to go back too; without
        that it leaves with code 76, so that a launcher starts it again from the checkpoint.
        """
        self._is_followed = True
        return self._state

    def restore(self, state: T, *, donate: bool = False) -> T:
        """Take charge of `state`, as the latest checkpoint has it if there is one, and as it is otherwise.

        Modules and optimisers are changed in place, and a loader is set to its next batch. For a state of plain arrays
        go on with what this returns, and hand each new state to `update`.

        Args:
            state: All that must survive: modules, optimisers, pytrees, loaders (anything with `get_state` and
                `set_state`, whose state is JSON), in a tuple, list or dict. Random numbers are leaves of a model.
            donate: Delete the arrays of `state` before a checkpoint is read, as memory may not hold both. Modules and
                optimisers let go of theirs anyway.
        Raises:
            CheckpointError: The directory holds something else, or a run of another program; or the state holds
                something that cannot be saved.
        """
        self._claim()
        _launched.tell_run(self.directory)
        self._loose = sorted(take_apart(state).loose)
        latest = self._newest()
        self._begin(latest or 0)
        if latest is not None:
            state = restore_valid(self._checkpoints / str(latest), state, donate=donate)
            self.step = self._sound = latest
            text = f"{self.directory}: going on after step {latest}."
            _processes.say(logging.INFO, "%s", text)
            if _processes.is_first():
                self.events.write("restore", text, step=latest)
        _orbax.prepare()
        self._state = state
        self._skipped = Skipped(self.directory)
        self._watch.start(self.step, self.directory / "metrics.jsonl")
        self._is_restored = True
        self._saved_at = time.monotonic()
        self._seen = _weak(_arrays(state))
        return state

    def steps(self, total: int) -> Iterator[int]:
        """The steps that remain of `total`, counted from 1: after step 100, 100 steps have been done.

        After each step metrics go out and checkpoints are made as asked; the last step is saved. Leaving the loop by
        `break` or an exception saves nothing: `run.stop("why")` finishes the step and saves.

        Raises:
            CheckpointError: `restore` was not called, or a checkpoint could not be made.
            SystemExit: 75, at the end, after SIGTERM or a preemption notice.
        """
        if not self._is_restored:
            raise CheckpointError(
                f"{self.directory}: the run does not know what to save. Before the loop: state = run.restore(state)."
            )
        if self.stopped_by is not None:
            text = "This run was stopped by %s: no step is done. To go on, make a new Run."
            _processes.say(logging.WARNING, text, self.stopped_by)
        return self._steps(total)

    def log(self, metrics: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Add metrics to this step; those of one step become one line.

        Does not wait: what is on the devices is fetched while the next step runs.

        Args:
            metrics: Scalars by name, for names that are no identifiers (`{"eval/loss": loss}`).
            **named: Scalars by name.
        Raises:
            StepError: Naming every metric that is not a scalar number.
        """
        given = {**(metrics or {}), **named}
        lines = [
            f"{name}: {_kind(value)}"
            for name, value in given.items()
            if np.shape(value) or not isinstance(value, numbers.Number | np.generic | np.ndarray | jax.Array)
        ]
        if lines:
            raise StepError(f"{listed(lines)}\nA metric is one number. Reduce it (x.mean()), or leave it out.")
        for value in given.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._now.update(given)
        if not self._in_loop:
            self._send_metrics()
            self._flush()

    def update(self, state: PyTree) -> None:
        """Hand over the state after this step. Needed for arrays that no module or optimiser holds."""
        self._state = state
        self._is_current = True

    def stop(self, reason: str = "asked") -> None:
        """End the loop after this step, saved. With several processes, all of them must call it in the same step."""
        self._stop_reason = reason

    @property
    def _checkpoints(self) -> pathlib.Path:
        return self.directory / "checkpoints"

    def _newest(self) -> int | None:
        """The newest valid step; what is damaged after it is set aside, so that its number is free again."""
        if _processes.is_first():
            for step in tidy(self._checkpoints):
                text = f"{self._checkpoints}: step {step} is incomplete and was set aside, as {step}.incomplete."
                self.events.write("set_aside", text, step=step, why="incomplete")
                _processes.say(logging.WARNING, "%s", text)
        found = newest(self._checkpoints)
        if found.damaged and found.step is None:
            raise none_valid(self._checkpoints, found.damaged)
        for step, lines in found.damaged.items() if _processes.is_first() else ():
            set_aside(self._checkpoints, step, "damaged")
            text = f"{self._checkpoints}: step {step} is damaged ({lines[0]}) and was set aside, as {step}.damaged."
            self.events.write("set_aside", text, step=step, why=lines[0])
        return found.step

    def _begin(self, step: int) -> None:
        """Say that this process is here."""
        process, count = jax.process_index(), jax.process_count()
        before = pulses(self.directory).get(process)
        again = max(0, before.step - step) if before else 0
        listener = weakref.WeakMethod(self._tell_jump)
        self._beat = Beat(
            self.directory, process, attempt=_launched.attempt(), each_step=_launched.is_launched(),
            on_jump=lambda seconds: listen(seconds) if (listen := listener()) else None,
        )  # fmt: skip
        self._beat.once(step)
        self.events.write(
            "start",
            f"Process {process} of {count} begins after step {step}."
            + (f" Steps {step + 1} to {step + again} are done again." if again else ""),
            step=step,
            again=again,
            processes=count,
            attempt=_launched.attempt(),
            versions=versions(),
        )

    def _on_crash(self, error: BaseException) -> None:
        self._watch.close()
        words = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}")
        ended = f"Process {jax.process_index()} on {socket.gethostname()} ended in step {self.step}"
        text = f"{ended}; started again, it goes on from {self._told_sound()}. {words}"
        self.events.write("error", text, step=self.step, words=words)
        if self._beat is not None:
            self._beat.stop("error")

    def _tell_jump(self, seconds: float) -> None:
        where = f"of process {jax.process_index()} on {socket.gethostname()}"
        how = f"{seconds:.0f} s forth (or its machine slept)" if seconds > 0 else f"{-seconds:.0f} s back"
        text = f"The clock {where} jumped {how} in step {self.step}. Nothing was done: no step goes by it."
        self.events.write("clock", text, step=self.step, seconds=round(seconds))

    def _told_sound(self) -> str:
        return "the beginning" if self._sound is None else f"step {self._sound}"

    def _steps(self, total: int) -> Iterator[int]:
        with _signals.caught() as request, kept_log(self.directory, jax.process_index()):
            self._in_loop = True
            if self._beat is not None:
                self._beat.start(self.step, total)
            listener = weakref.WeakMethod(self._on_crash)  # a state is not held for last words alone
            self._forget()
            self._forget = on_crash(lambda error: listen(error) if (listen := listener()) else None)
            reason = "left"
            try:
                while self.step < total and self.stopped_by is None:
                    self.step += 1
                    self._is_current = not self._loose
                    if self._beat is not None:
                        self._beat.step(self.step)
                    self._watch.begin(self.step)
                    self._pass_over()
                    yield self.step
                    self._end_step(total, request)
                reason = self.stopped_by or "finished"
            finally:
                self._in_loop = False
                self._leave(reason, request)
        if self.exit_code in (_exits.AGAIN, _exits.BACK):
            raise SystemExit(self.exit_code)

    def _end_step(self, total: int, request: _signals.Request) -> None:
        if not self._is_current:
            raise CheckpointError(
                f"Step {self.step} returned new arrays ({', '.join(self._loose[:3])}, ...) and the run holds the old. "
                "In each step, after the update: run.update(state)."
            )
        own = self._watch.own_microseconds()
        self._send_metrics()
        # One collective for all that the processes must agree on. The time is that of process 0.
        is_time = int(_processes.is_first() and self._is_time())
        rows = _processes.gathered(request.number, is_time, own, self._watch.milliseconds(), *self._watch.codes())
        number, is_due, _, longest, *_ = (max(column) for column in zip(*rows, strict=True))
        self._watch.compared(self.step, [row[2] for row in rows], longest)
        fault = self._watch.fault(*max((row[4], row[5]) for row in rows))
        fault = fault or self._watch.replicas(self.step, lambda: _arrays(self._state))
        if fault is not None and self._go_back(fault):
            return
        self.stopped_by = signal.Signals(number).name if number else self._stop_reason
        if self.stopped_by is None and _processes.preempted(self.step):
            self.stopped_by = "preemption"
        if (request.number and not request.is_told) or self.stopped_by == "preemption":
            request.is_told = True
            what = request.name if request.number else "A preemption notice"
            text = f"{what} came to process {jax.process_index()} on {socket.gethostname()}: saving step {self.step}."
            self.events.write("notice", text, step=self.step)
        is_last = self.step >= total or self.stopped_by is not None
        if is_last or is_due or (self._every.steps is not None and self.step % self._every.steps == 0):
            # Metrics of this step are fetched now: the copy of the state waits for the step anyway.
            metrics = self._flush()
            fault = self._watch.fault(*max(map(tuple, _processes.gathered(*self._watch.codes()))))
            if fault is not None and self._go_back(fault):
                self.stopped_by = self.stopped_by if self.stopped_by == "rollback" else None
                return
            self._watch.end()
            self._save(metrics)
            if is_last:
                self._finish_saving(wait=True)
        else:
            self._watch.end()
            self._finish_saving(wait=False)

    def _is_time(self) -> bool:
        return self._every.seconds is not None and time.monotonic() - self._saved_at >= self._every.seconds

    def _save(self, metrics: Mapping[str, float]) -> None:
        self._finish_saving(wait=True)
        arrays = _arrays(self._state)
        if arrays and all(self._seen.get(path, lambda: None)() is leaf for path, leaf in arrays.items()):
            raise CheckpointError(
                f"No array of the state has changed up to step {self.step}: a checkpoint would hold an old state. "
                "If the step makes new objects, hand them over: run.update(state)."
            )
        self._saving = checkpoint.save_async(
            self._checkpoints, self.step, self._state, metrics=metrics, metadata=self._metadata
        )
        self._saved_at = time.monotonic()
        self._seen = _weak(arrays)

    def _finish_saving(self, *, wait: bool) -> None:
        """Make the save under way count, if it is complete; raise if it failed."""
        saving = self._saving
        if saving is None or not (wait or saving.done):
            return
        self._saving = None
        try:
            saving.wait()
        except CheckpointError as error:
            ends = f"Process {jax.process_index()} on {socket.gethostname()} ends"
            text = f"{error} {ends}; started again, it goes on from {self._told_sound()}."
            self.events.write("save_failed", text, step=saving.step)
            raise
        self._sound = saving.step
        text = f"{self.directory}: step {saving.step} is saved."
        _processes.say(logging.INFO, "%s", text)
        if _processes.is_first():
            self.events.write("save", text, step=saving.step)
        if self._keep is not None:
            prune_known(self._checkpoints, self._keep, valid=saving.step)

    def _go_back(self, fault: Fault) -> bool:
        """Go back to the last checkpoint before a fault; whether that was done."""
        self._watch.end()
        self._finish_saving(wait=True)
        sound = [step for step in checkpoint.steps(self._checkpoints) if step <= fault.sound]
        step = _processes.of_first(max(sound, default=-1))
        if step < 0 and fault.kind != "disagree":
            if not self._tells_no_more:
                self._tell_fault(fault, "There is no checkpoint before it to go back to, so the run goes on.")
            self._tells_no_more = True
            return False
        self._backs = [each for each in self._backs if each > fault.step - WITHIN_STEPS] + [fault.step]
        if step < 0 or len(self._backs) > MOST_BACKS:
            why = (
                "there is no checkpoint before it to go back to"
                if step < 0
                else f"the run went back {MOST_BACKS} times within {WITHIN_STEPS} steps already"
            )
            self._tell_fault(fault, f"The run ends: {why}.")
            raise StepError(f"{self.directory}: {fault.text}, and {why}. Mend what causes it, then go on with the run.")
        in_place = not self._loose or self._is_followed
        skipped = f"; the batch of step {' and '.join(map(str, fault.skip))} is left out" if fault.skip else ""
        again = "" if in_place else ", when it is started again (code 76)"
        self._tell_fault(fault, f"The run goes back to step {step}{skipped}{again}.")
        self._skipped.add(fault.skip)
        if _processes.is_first():
            self.events.write(
                "rollback", f"Back from step {self.step} to step {step}.", step=step, again=self.step - step
            )
            drop_after(self._checkpoints, step)
        if not in_place:
            self.stopped_by = "rollback"
            return True
        found = self._newest()
        self._now.clear()
        self._behind = None
        if found is None or found > step:
            raise none_valid(self._checkpoints, {})
        self._state = restore_valid(self._checkpoints / str(found), self._state, donate=bool(self._loose))
        self._sound = found
        self.step, self._saved_at, self._seen = found, time.monotonic(), _weak(_arrays(self._state))
        self._watch.back_to(found)
        return True

    def _tell_fault(self, fault: Fault, done: str) -> None:
        text = f"{fault.text}. {done}"
        _processes.say(logging.ERROR, "%s: %s", self.directory, text)
        if _processes.is_first():
            self.events.write(fault.kind, text, step=fault.step)

    def _pass_over(self) -> None:
        """Leave out the batches that this step must not have: once for each time that it is listed."""
        for _ in range(self._skipped.times(self.step)):
            iterators = [each for each in take_apart(self._state).holders.values() if hasattr(each, "__next__")]
            for each in iterators:
                next(each, None)
            if _processes.is_first():
                text = f"A batch is left out before step {self.step}."
                none = f"Step {self.step} cannot leave out its batch: the run holds no iterator of batches."
                self.events.write("skip", text if iterators else none, step=self.step)

    def _leave(self, reason: str, request: _signals.Request) -> None:
        self._watch.close()
        if request.hurried:
            self._tell_stop(f"Left in step {self.step} by a second Ctrl-C, not saved.", "SIGINT twice")
            return
        try:
            self._finish_saving(wait=True)
            self._flush()
        finally:
            self._now.clear()
            for writer in self._writers if _processes.is_first() else ():
                writer.close()
            if reason == "left":
                text = f"Left the loop in step {self.step}, by break or an exception: that step is not saved."
            elif reason == "rollback":
                text = f"Left in step {self.step} to go back; exit code {self.exit_code}."
            elif reason == "finished":
                text = f"Finished: step {self.step} is saved."
            else:
                text = f"Stopped by {reason} after step {self.step}, saved; exit code {self.exit_code}."
            self._tell_stop(text, reason)

    def _tell_stop(self, text: str, reason: str) -> None:
        self.events.write("stop", text, step=self.step, reason=reason)
        if self._beat is not None:
            self._beat.stop(reason)
        if reason != "left":  # an exception may be on its way
            self._forget()

    def _send_metrics(self) -> None:
        """Write the metrics of the step before, whose values are there by now, and hold back those of this step."""
        self._flush()
        if self._now:
            self._behind = self.step, dict(self._now)
            self._now.clear()

    def _flush(self) -> dict[str, float]:
        """Write the metrics that are held back, and return them."""
        if self._behind is None:
            return {}
        step, metrics = self._behind
        self._behind = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._watch.seen(step, values)
        self.metrics.update(values)
        for writer in self._writers if _processes.is_first() else ():
            writer.write(step, values)
        return values

    def _claim(self) -> None:
        """Refuse a directory that is somebody else's; otherwise make it this run's."""
        about = self.directory / "run.json"
        if about.exists():
            found = json.loads(about.read_text())
            if self._name and found["name"] and found["name"] != self._name:
                raise CheckpointError(
                    f"{self.directory} holds a run of {found['name']!r}, started {found['started']}, saved up to step "
                    f"{self.latest or 0}; this one is {self._name!r}. Choose another directory."
                )
            return
        theirs = [name for name in ("checkpoints", "events.jsonl", "metrics.jsonl") if (self.directory / name).exists()]
        if theirs and _processes.is_first():
            raise CheckpointError(
                f"{self.directory} holds {', '.join(theirs)}, which no Run wrote (there is no run.json). "
                "Choose another directory."
            )
        if _processes.is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
            # By one rename: other processes, and a run after a crash, see all of it or nothing.
            written = about.with_suffix(".tmp")
            written.write_text(json.dumps({"format": 1, "name": self._name, "started": _now()}) + "\n")
            written.rename(about)


def _arrays(state: PyTree) -> dict[str, jax.Array]:
    return {path: leaf for path, leaf in take_apart(state).arrays.items() if isinstance(leaf, jax.Array)}


def _weak(arrays: Mapping[str, jax.Array]) -> dict[str, weakref.ref[jax.Array]]:
    """Which arrays these are, without holding them."""
    return {path: weakref.ref(leaf) for path, leaf in arrays.items()}


def _kind(value: Any) -> str:
    return f"an array of shape {np.shape(value)}" if np.shape(value) else f"a {type(value).__name__}"


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
