"""One thing that is wrong with a step, why, where, and what to do about it."""

import dataclasses
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding.

    Attributes:
        kind: Its name, `"reduction-in-loop"`: what a test or a filter asks for.
        severity: `"error"`: wrong results or a hang; `"warning"`: costs time or memory; `"note"`: worth knowing.
        reason: What is so, with the numbers.
        place: Path in the model and `file:line`, as far as known.
        remedy: What to change.
        seconds: What it costs a step, as predicted; 0 if that is not known.
        bytes: What it costs in memory on a device; 0 if nothing.
    """

    kind: str
    severity: Severity
    reason: str
    place: str
    remedy: str
    seconds: float = 0.0
    bytes: int = 0
