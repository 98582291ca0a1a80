"""Everything that watches over a run, behind the four moments of a step: it begins, metrics, the others, it ends.

Watchers are values: `Hang`, `Slow`, `Loss`, `Replicas`. What one finds is a line among the events; a `Fault` besides
has the run go back to a checkpoint. Every process must come to the same fault, so what they find apart is agreed on.
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from .. import _waits
from .._errors import StepError
from ._events import Events
from ._fault import Fault
from ._hang import Hang, Watchdog
from ._loss import Judge, Loss
from ._replicas import Replicas, odd_ones, told
from ._slow import Comparison, Slow

Watcher = Hang | Slow | Loss | Replicas
K = TypeVar("K")

DEFAULT: tuple[Watcher, ...] = (Hang(), Slow(), Loss())

CODES = ("", "spike", "nan", "nan")  # of faults, so that a process may tell another; the last is of one that came again


class Watch:
    """The watchers of one run, in this process.

    Args:
        watchers: At most one of a kind.
        events: Where they write.
    Raises:
        StepError: Two are of one kind.
    """

    def __init__(self, watchers: Sequence[Watcher], events: Events) -> None:
        kinds = [type(each).__name__ for each in watchers]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise StepError(f"watch: {', '.join(twice)} is there twice. Leave one.")
        slow, loss = _of(watchers, Slow), _of(watchers, Loss)
        self._replicas = _of(watchers, Replicas)
        self._comparison = Comparison(slow) if slow else None
        self._judge = Judge(loss) if loss else None
        self._hang = _of(watchers, Hang)
        self._watchdog: Watchdog | None = None
        self._events = events
        self._began, self._waited = time.monotonic(), 0.0
        self._longest = 0.0  # seconds that this step took any process
        self._fault: Fault | None = None
        self._equal_at = 0  # the last step whose replicas were compared, and equal

    @property
    def times(self) -> Sequence[float]:
        """Own seconds of each process in the last step; empty before it, and if nothing compares them."""
        return self._comparison.times if self._comparison else ()

    def start(self, step: int, metrics: pathlib.Path) -> None:
        """The run is about to go on after `step`, from a checkpoint that is sound.

        Args:
            step: Steps done.
            metrics: What was logged up to there, a line a step.
        """
        self._equal_at = step
        if self._judge is not None and step:
            self._judge.remember(metrics, step)

    def begin(self, step: int) -> None:
        """A step begins."""
        if self._hang is not None and self._watchdog is None:
            self._watchdog = Watchdog(
                self._hang, self._events, process=jax.process_index(), processes=jax.process_count()
            )
        if self._watchdog is not None:
            self._watchdog.begin(step)
        self._began, self._waited, self._longest = time.monotonic(), _waits.seconds(), 0.0

    def own_microseconds(self) -> int:
        """What this process took so far in this step."""
        own = time.monotonic() - self._began - (_waits.seconds() - self._waited)
        return min(round(1e6 * own), 2**31 - 1)

    def milliseconds(self) -> int:
        """What this step took so far, waiting and all."""
        return min(round(1e3 * self._watchdog.so_far()), 2**31 - 1) if self._watchdog is not None else 0

    def seen(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of `step`, which may be the one before the last."""
        if self._judge is not None and self._fault is None:
            self._fault = self._judge.seen(step, metrics)

    def codes(self) -> tuple[int, int]:
        """What was found in the metrics, to be agreed on: a code, and the step."""
        if self._fault is None:
            return 0, 0
        again = len(self._fault.skip) > 1
        return CODES.index(self._fault.kind) + again, self._fault.step

    def fault(self, code: int, step: int) -> Fault | None:
        """The fault that any process found in the metrics, the same on all."""
        mine, self._fault = self._fault, None
        if not code:
            return None
        text = mine.text if mine is not None and mine.step == step else f"another process found it, in step {step}"
        sound = step - 1 if CODES[code] == "spike" else max(step - 2, 0)
        skip = (step - 1, step) if code == len(CODES) - 1 else (step,)
        return Fault(kind=CODES[code], step=step, text=text, sound=sound, skip=skip)

    def compared(self, step: int, microseconds: Sequence[int], milliseconds: int) -> None:
        """What each process took by itself in this step, and what the slowest took with all that it waited for."""
        self._longest = 1e-3 * milliseconds
        if self._comparison is None:
            return
        for process, text in self._comparison.seen([1e-6 * each for each in microseconds]).items():
            if process == jax.process_index():  # its own line has its host
                self._events.write("slow", text, step=step, seconds=list(self.times))

    def replicas(self, step: int, arrays: Callable[[], Mapping[str, Any]]) -> Fault | None:
        """Copies that differ after `step`, if it is time to look. A collective of all processes."""
        if self._replicas is None or step % self._replicas.every:
            return None
        found = odd_ones(arrays())
        if found:
            return Fault(kind="disagree", step=step, text=f"After step {step} {told(found)}", sound=self._equal_at)
        self._equal_at = step
        return None

    def back_to(self, step: int) -> None:
        """The run has gone back to the checkpoint of `step`."""
        self._fault = None
        self._equal_at = min(self._equal_at, step)
        if self._judge is not None:
            self._judge.back_to(step)

    def end(self) -> None:
        """The step is over; saving is no part of it."""
        if self._watchdog is not None:
            self._watchdog.end(self._longest)

    def close(self) -> None:
        """The loop is left."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None


def _of(watchers: Sequence[Watcher], kind: type[K]) -> K | None:
    return next((each for each in watchers if isinstance(each, kind)), None)
