"""A loss that is no number, or far above those before: the run goes back and leaves that batch out.

What is judged is what the loop logs, which is known one step late and is fetched anyway, so this costs nothing. It is a
function of the logged values alone: every process, and a run that was resumed, judges alike.
"""

import collections
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping

from .._errors import StepError
from ._fault import Fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Watch what is logged as `loss`.

    Attributes:
        metrics: Names of logged metrics that must be finite; the first is the one whose spikes are looked for.
        spike: How many times the usual scatter above the median of the last `window` steps is a spike: 10 is a rare
            one, 5 a common one. The scatter is the median distance from the median, times 1.48, as of a normal
            distribution. `None` looks for none.
        window: Steps that tell what is usual; before as many are known, there is no spike.

    Raises:
        StepError: A number is not positive, or there is no metric.
    """

    metrics: tuple[str, ...] = ("loss", "grad_norm")
    spike: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        if not self.metrics or self.window < 3 or (self.spike is not None and not self.spike > 0):
            raise StepError(f"{self}: name a metric, and give a spike above 0 and a window of 3 steps or more.")


class Judge:
    """Judges the metrics of one step after another.

    Args:
        loss: What to look for.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._before: collections.deque[tuple[int, float]] = collections.deque(maxlen=loss.window)
        self._last_bad: int | None = None

    def seen(self, step: int, metrics: Mapping[str, float]) -> Fault | None:
        """What is wrong with the metrics of `step`."""
        for name in self._loss.metrics:
            value = metrics.get(name)
            if value is not None and not math.isfinite(value):
                return self._not_finite(step, name, value)
        value = metrics.get(self._loss.metrics[0])
        if value is None:
            return None
        limit = self._limit()
        if limit is not None and value > limit:
            name = self._loss.metrics[0]
            usual = statistics.median(each for _, each in self._before)
            text = f"{name} is {value:.4g} in step {step}, and {usual:.4g} is usual ({limit:.4g} at most)"
            return Fault(kind="spike", step=step, text=text, sound=step - 1, skip=(step,))
        self._before.append((step, value))
        return None

    def remember(self, file: pathlib.Path, step: int) -> None:
        """Take what is usual from the lines of a run that goes on after `step`: it judges as if never stopped."""
        if self._loss.spike is None or not file.is_file():
            return
        values: dict[int, float] = {}
        for line in file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a full disk
                continue
            value = record.get(self._loss.metrics[0])
            if value is not None and record["step"] <= step and math.isfinite(value):
                values[record["step"]] = value  # of a step that was done again, the later line holds
        self._before.extend(sorted(values.items()))

    def back_to(self, step: int) -> None:
        """Forget what was seen after `step`: those steps are done again."""
        kept = [pair for pair in self._before if pair[0] <= step]
        self._before.clear()
        self._before.extend(kept)

    def _not_finite(self, step: int, name: str, value: float) -> Fault:
        # The parameters may have gone bad in the step before, whose own loss was finite still. So the state before
        # that one is gone back to; and if another batch in this place fares no better, the one before it is left out.
        again = self._last_bad == step
        self._last_bad = step
        text = f"{name} is {value} in step {step}" + (", again" if again else "")
        skip = (step - 1, step) if again and step > 1 else (step,)
        return Fault(kind="nan", step=step, text=text, sound=max(step - 2, 0), skip=skip)

    def _limit(self) -> float | None:
        if self._loss.spike is None or len(self._before) < self._loss.window:
            return None
        values = [value for _, value in self._before]
        middle = statistics.median(values)
        scatter = 1.4826 * statistics.median(abs(value - middle) for value in values)
        return middle + self._loss.spike * scatter if scatter else None
