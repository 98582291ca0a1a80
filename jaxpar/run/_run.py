"""What any loop needs to survive: where it was, what it saves and when, who asked it to stop.

    model, opt, loader = run.restore((model, opt, loader))
    for step in run.steps(1000):                             # the rest of 1000 steps, counted from 1
        run.log(loss=train_step(model, opt, next(loader)))

A directory is one run: `run.json` says which, `events.jsonl` has a line for each start, restore, save and stop,
`metrics.jsonl` one for each step, and `checkpoints/100` is the state after 100 steps.
"""

import datetime as dt
import json
import logging
import numbers
import os
import pathlib
import signal
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from .. import _processes, checkpoint
from .._errors import CheckpointError, StepError, listed
from .._types import PyTree
from ..checkpoint import Keep
from ..checkpoint._about import versions
from ..checkpoint._parts import plain_json, take_apart
from ..checkpoint._restore import restore_valid
from ..checkpoint._steps import newest, none_valid, root, set_aside, tidy
from . import _signals
from ._events import Events
from ._every import parse_every
from ._writers import Console, JSONLines, Writer

T = TypeVar("T")

EXIT_CODES = {signal.Signals(number).name: 128 + number for number in _signals.SIGNALS}


class Run:
    """Restore, count, log, save and stop, for any loop.

    The loop stays the user's. Saving goes on in the background; a step waits only while its state is copied to host
    memory. The first Ctrl-C or SIGTERM lets the step finish, saves, and ends the loop; a second Ctrl-C leaves at once,
    without saving. After SIGTERM the loop ends with `SystemExit(143)`; after Ctrl-C it just ends, so that a notebook
    goes on: a script may end with `sys.exit(run.exit_code)`, which is 130 then. Outside of the main thread signals are
    not caught, and that is logged.

    With several processes each makes the same calls; process 0 writes files and logs. Signals and times are then agreed
    on at the end of each step, which waits for all processes.

    Args:
        directory: Where the run lives, on a file system that every process sees. Made when needed.
        every: When to save besides the end: a number of steps (`100`, `"100steps"`) or a time (`"10min"`, `"2h"`).
        keep: How many of the last checkpoints are kept, or a `jp.checkpoint.Keep`: also one every so many steps, and
            the best by a metric that the saved step logged. `None` keeps all.
        writers: Where metrics go besides `metrics.jsonl`; a line on the terminal now and then if `None`.
        name: What this run is, kept in `run.json`. A directory of a run with another name is refused.
        metadata: A JSON object to keep with every checkpoint: settings, a plan.

    Attributes:
        directory: The absolute path.
        step: The step under way, or the last one done.
        metrics: The last value of each metric, as floats: one step late while the loop runs.
        stopped_by: Why the loop ended early: `"SIGINT"`, `"SIGTERM"`, or what `stop` was given; else `None`.

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
        every: int | str | None = None,
        keep: int | Keep | None = 3,
        writers: Sequence[Writer] | None = None,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(keep, int) and keep < 1:
            raise CheckpointError(f"keep={keep} would delete every checkpoint. Keep 1 or more, or None for all.")
        self.directory = root(directory)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.stopped_by: str | None = None
        self._every = parse_every(every)
        self.events = Events(self.directory)
        self._keep = keep
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
        self._stop_reason: str | None = None

    @property
    def latest(self) -> int | None:
        """The last step that is saved, or `None`. Its files are there with their sizes; `restore` reads them."""
        return max(checkpoint.steps(self._checkpoints), default=None)

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 130 after Ctrl-C, 143 after SIGTERM (128 plus the signal, as shells have it), else 0."""
        return EXIT_CODES.get(self.stopped_by or "", 0)

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
        self._loose = sorted(take_apart(state).loose)
        latest = self._newest()
        text = f"Process {jax.process_index()} of {jax.process_count()} begins."
        self.events.write("start", text, step=latest or 0, processes=jax.process_count(), versions=versions())
        if latest is not None:
            state = restore_valid(self._checkpoints / str(latest), state, donate=donate)
            self.step = latest
            text = f"{self.directory}: going on after step {latest}."
            _processes.say(logging.INFO, "%s", text)
            if _processes.is_first():
                self.events.write("restore", text, step=latest)
        self._state = state
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
            SystemExit: 143, at the end, after SIGTERM.
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
                text = f"{self._checkpoints}: step {step} is incomplete and was set aside."
                self.events.write("set_aside", text, step=step, why="incomplete")
                _processes.say(logging.WARNING, "%s", text)
        found = newest(self._checkpoints)
        if found.damaged and found.step is None:
            raise none_valid(self._checkpoints, found.damaged)
        for step, lines in found.damaged.items() if _processes.is_first() else ():
            set_aside(self._checkpoints, step, "damaged")
            text = f"{self._checkpoints}: step {step} is damaged ({lines[0]}) and was set aside."
            self.events.write("set_aside", text, step=step, why=lines[0])
        return found.step

    def _steps(self, total: int) -> Iterator[int]:
        with _signals.caught() as request:
            self._in_loop = True
            reason = "left"
            try:
                while self.step < total and self.stopped_by is None:
                    self.step += 1
                    self._is_current = not self._loose
                    yield self.step
                    self._end_step(total, request)
                reason = self.stopped_by or "finished"
            finally:
                self._in_loop = False
                self._leave(reason, request)
        if self.stopped_by == "SIGTERM":
            raise SystemExit(self.exit_code)

    def _end_step(self, total: int, request: _signals.Request) -> None:
        if not self._is_current:
            raise CheckpointError(
                f"Step {self.step} returned new arrays ({', '.join(self._loose[:3])}, ...) and the run holds the old. "
                "In each step, after the update: run.update(state)."
            )
        self._send_metrics()
        number = _processes.greatest(request.number)
        self.stopped_by = signal.Signals(number).name if number else self._stop_reason
        if self.step >= total or self.stopped_by is not None:
            self._save()
            self._finish_saving(wait=True)
        elif self._is_due():
            self._save()
        else:
            self._finish_saving(wait=False)

    def _is_due(self) -> bool:
        if self._every.seconds is not None:
            return bool(_processes.of_first(int(time.monotonic() - self._saved_at >= self._every.seconds)))
        return self._every.steps is not None and self.step % self._every.steps == 0

    def _save(self) -> None:
        self._finish_saving(wait=True)
        arrays = _arrays(self._state)
        if arrays and all(self._seen.get(path, lambda: None)() is leaf for path, leaf in arrays.items()):
            raise CheckpointError(
                f"No array of the state has changed up to step {self.step}: a checkpoint would hold an old state. "
                "If the step makes new objects, hand them over: run.update(state)."
            )
        # Metrics of this step are fetched now: the copy of the state waits for the step anyway.
        self._saving = checkpoint.save_async(
            self._checkpoints, self.step, self._state, metrics=self._flush(), metadata=self._metadata
        )
        self._saved_at = time.monotonic()
        self._seen = _weak(arrays)

    def _finish_saving(self, *, wait: bool) -> None:
        """Make the save under way count, if it is complete; raise if it failed."""
        saving = self._saving
        if saving is None or not (wait or saving.done):
            return
        self._saving = None
        saving.wait()
        text = f"{self.directory}: step {saving.step} is saved."
        _processes.say(logging.INFO, "%s", text)
        if _processes.is_first():
            self.events.write("save", text, step=saving.step)
        if self._keep is not None:
            checkpoint.prune(self._checkpoints, self._keep)

    def _leave(self, reason: str, request: _signals.Request) -> None:
        if request.hurried:
            self.events.write(
                "stop",
                f"Left in step {self.step} by a second Ctrl-C, not saved.",
                step=self.step,
                reason="SIGINT twice",
            )
            return
        try:
            self._finish_saving(wait=True)
            self._flush()
        finally:
            self._now.clear()
            for writer in self._writers if _processes.is_first() else ():
                writer.close()
            self.events.write("stop", f"Left the loop after step {self.step}: {reason}.", step=self.step, reason=reason)

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
