"""How a run of known length is getting on: a bar on a terminal, plain lines elsewhere."""

import collections
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._writers import Console, Writer

if TYPE_CHECKING:
    from rich.progress import Progress


class Pace:
    """Steps a second over the last steps, and what follows from it.

    Args:
        total: Steps of the whole run.
    Attributes:
        per_step: What one step takes in, in `unit`s.
        unit: `"tokens"` or `"examples"`.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.per_step = 0
        self.unit = "examples"
        self._done: collections.deque[tuple[float, int]] = collections.deque(maxlen=50)

    def tick(self, step: int) -> None:
        """`step` is done, now."""
        self._done.append((time.monotonic(), step))

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """Loss, speed and time left, as far as they are known."""
        found = [f"{name} {metrics[name]:.4g}" for name in ("loss", "eval/loss") if name in metrics]
        (began, first), (now, last) = self._done[0], self._done[-1]
        if last == first or now == began:  # the first step also compiled: it says nothing about the others
            return found
        speed = (last - first) / (now - began)
        found.append(f"{speed * self.per_step:,.0f} {self.unit}/s")
        found.append(f"{duration((self.total - last) / speed)} left")
        return found


class Lines:
    """A line now and then: `step 100/1000  loss 2.345  12,345 tokens/s  1m 20s left`."""

    def __init__(self, pace: Pace, seconds: float = 5.0) -> None:
        self._pace = pace
        self._console = Console(seconds)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.tick(step)
        line = "  ".join([f"step {step}/{self._pace.total}", *self._pace.notes(metrics)])
        self._console.show(line)
        if "eval/loss" in metrics:
            self._console.close()  # rare, and worth a line each time

    def close(self) -> None:
        self._console.close()


class Bar:
    """A bar that redraws itself, by rich."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._shown: Progress | None = None
        self._eval = ""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.tick(step)
        if "eval/loss" in metrics:
            self._eval = f"eval/loss {metrics['eval/loss']:.4g}"
        notes = self._pace.notes({name: value for name, value in metrics.items() if name != "eval/loss"})
        self._shown = self._shown or self._start()
        self._shown.update(self._shown.task_ids[0], completed=step, notes="  ".join(filter(None, [*notes, self._eval])))

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def _start(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        shown = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[notes]}"))
        shown.add_task("", total=self._pace.total, notes="")
        shown.start()
        return shown


def progress(pace: Pace) -> Writer:
    """A `Bar` if standard output is a terminal, else `Lines`."""
    return Bar(pace) if sys.stdout.isatty() else Lines(pace)


def duration(seconds: float) -> str:
    """`"45s"`, `"1m 20s"`, `"3h 05m"` or `"2d 04h"`.

    Example:
        >>> duration(80.0)
        '1m 20s'
    """
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{smaller}"
    return f"{whole}s"
