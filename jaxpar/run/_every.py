"""How often: a number of steps, or a stretch of time."""

import dataclasses
import re

from .._errors import CheckpointError

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """Steps, or seconds, or neither (never).

    Raises:
        CheckpointError: Both are given, or one is not positive.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.seconds) if value is not None]
        if len(given) > 1 or any(value <= 0 for value in given):
            raise CheckpointError(f"{self}: give steps or seconds, more than 0.")


def parse_every(every: int | str | None) -> Every:
    """`100`, `"100steps"`, `"90s"`, `"10min"`, `"2h"`, `"1d"` or `None` as an `Every`.

    Raises:
        CheckpointError: It is none of these, or zero.

    Example:
        >>> parse_every("10min")
        Every(steps=None, seconds=600.0)
    """
    if every is None:
        return Every()
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(steps?|s|min|h|d)", str(every).strip())
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return Every(steps=every)
    if found and found[2].startswith("step") and found[1].isdigit() and int(found[1]):
        return Every(steps=int(found[1]))
    if found and found[2] in SECONDS and float(found[1]):
        return Every(seconds=float(found[1]) * SECONDS[found[2]])
    raise CheckpointError(
        f"every={every!r} is neither steps nor a time. Write 100 or '100steps', or '90s', '10min', '2h', '1d'."
    )
