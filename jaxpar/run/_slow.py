"""A process that holds up the others, by its own time a step.

Own time is that of a step without what is spent inside steps of a plan: its input and its Python. A process that waits
for another in its own code looks as slow as the one that it waits for: where it fetches the loss (`Run` fetches it a
step later), or, on the CPU alone, calls a step that spans processes and is no plan's.
"""

import collections
import dataclasses
import statistics
from collections.abc import Sequence

from .._errors import StepError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow:
    """Compare the processes, at no cost: they exchange a few numbers at the end of each step anyway.

    Attributes:
        ratio: A process is slow if it takes so many times what the others take, as medians.
        steps: Over how many steps.
        at_least: Seconds a step that it must take longer; less is noise.

    Raises:
        StepError: `ratio` is not above 1, or `steps` not above 0.
    """

    ratio: float = 1.5
    steps: int = 20
    at_least: float = 0.05

    def __post_init__(self) -> None:
        if not self.ratio > 1 or self.steps < 1:
            raise StepError(f"{self}: give a ratio above 1, over at least 1 step.")


class Comparison:
    """The last steps of all processes.

    Attributes:
        times: Seconds of the last step, by process.
    """

    def __init__(self, slow: Slow) -> None:
        self._slow = slow
        self._rows: collections.deque[Sequence[float]] = collections.deque(maxlen=slow.steps)
        self._named: set[int] = set()
        self.times: Sequence[float] = ()

    def seen(self, times: Sequence[float]) -> dict[int, str]:
        """A line for each process that has become slow.

        Args:
            times: Own seconds of each process in this step.
        """
        self.times = times
        self._rows.append(times)
        if len(times) < 2 or len(self._rows) < self._slow.steps:
            return {}
        usual = [statistics.median(column) for column in zip(*self._rows, strict=True)]
        found = {}
        for process, mine in enumerate(usual):
            others = statistics.median(usual[:process] + usual[process + 1 :])
            if mine <= self._slow.ratio * others or mine - others < self._slow.at_least:
                self._named.discard(process)
            elif process not in self._named:
                self._named.add(process)
                quickest = min(range(len(usual)), key=usual.__getitem__)
                found[process] = (
                    f"Process {process} takes {mine:.3g} s a step by itself, the others {others:.3g} s (process "
                    f"{quickest} is the quickest, {usual[quickest]:.3g} s), over {self._slow.steps} steps. Nothing was "
                    "done: look at its input and its machine."
                )
        return found
