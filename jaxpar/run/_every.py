"""How often: a number of steps, or a stretch of time, or whichever of the two comes first."""

import dataclasses
import re
from collections.abc import Sequence

from .._errors import CheckpointError

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """Steps, or seconds, or both (whichever comes first), or neither (never).

    Raises:
        CheckpointError: One is not positive.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if any(value is not None and value <= 0 for value in (self.steps, self.seconds)):
            raise CheckpointError(f"{self}: give steps or seconds, more than 0.")


def parse_every(every: int | str | Sequence[int | str] | None) -> Every:
    """`100`, `"100steps"`, `"90s"`, `"10min"`, `"2h"`, `"1d"`, one of each (`(100, "10min")`) or `None` as an `Every`.

    Raises:
        CheckpointError: It is none of these, or zero, or two of one kind.

    Example:
        >>> parse_every("10min"), parse_every((100, "10min"))
        (Every(steps=None, seconds=600.0), Every(steps=100, seconds=600.0))
    """
    if every is None:
        return Every()
    if isinstance(every, str) and "," in every:  # as on the command line
        every = [int(part) if part.isdigit() else part for part in every.split(",")]
    if not isinstance(every, int | str):
        parts = [parse_every(part) for part in every]
        given = {name: [getattr(part, name) for part in parts if getattr(part, name)] for name in ("steps", "seconds")}
        if not parts or any(len(values) > 1 for values in given.values()):
            raise CheckpointError(f"every={every!r}: give steps, or a time, or one of each: (100, '10min').")
        return Every(**{name: value for name, values in given.items() for value in values})
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
