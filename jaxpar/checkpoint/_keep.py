"""Which checkpoints of a directory stay."""

import dataclasses
import math
from collections.abc import Mapping

from .._errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """The last few, and also one every so many steps, and also the best by a metric; the others go.

    Args:
        last: How many of the newest.
        every: Keep for good the first checkpoint at or after each multiple of so many steps.
        best: How many of the best by `metric`. A checkpoint whose step had no such metric, or NaN, is none of them.
        metric: A name that the step logged: `"eval/loss"`.
        highest: Whether the highest is the best (an accuracy) rather than the lowest (a loss).

    Raises:
        CheckpointError: A number is not 1 or more, or a setting has no effect without another.

    Example:
        >>> keep = Keep(last=1, every=100, best=1, metric="eval/loss")
        >>> sorted(keep.of({50: {"eval/loss": 2.0}, 100: {}, 150: {"eval/loss": 1.0}, 200: {}, 250: {}, 300: {}}))
        [100, 150, 200, 300]
    """

    last: int = 3
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    highest: bool = False

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every), ("best", self.best)):
            if value is not None and value < 1:
                deleted = " would delete every checkpoint" if name == "last" else ""
                raise CheckpointError(f"{name}={value}{deleted or ' keeps none'}. Give 1 or more, or leave it out.")
        if (self.best is None) != (self.metric is None) or (self.highest and self.best is None):
            raise CheckpointError(f"{self}: best and metric go together: best=2, metric='eval/loss'.")

    def of(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay, of those whose metrics these are."""
        steps = sorted(metrics)
        stay = set(steps[-self.last :])
        if self.every is not None:
            firsts: dict[int, int] = {}
            for step in steps:
                firsts.setdefault(step // self.every, step)
            stay |= {step for nth, step in firsts.items() if nth}
        if self.best is not None and self.metric is not None:
            ranked = [(metrics[step].get(self.metric, math.nan), step) for step in steps]
            sign = -1 if self.highest else 1
            # Of equals the newer one.
            ranked = sorted((sign * value, -step) for value, step in ranked if not math.isnan(value))
            stay |= {-step for _, step in ranked[: self.best]}
        return stay
