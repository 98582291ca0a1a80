"""The collectives of a report, together by what they do and which axes they cross."""

import dataclasses
from collections.abc import Iterable

from ._collectives import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """All collectives of one kind over the same axes, in one step.

    Attributes:
        kind: In the textbook's word.
        axes: The mesh axes.
        num_rows: Collectives in the program.
        count: Times that they run; `None` if a loop does not say, and then the sums take such a loop once.
        bytes: Payload on one device.
        wire_bytes: What one device sends.
        seconds: Predicted, hidden or not.
        exposed_seconds: Of these, how long the device waits.
        num_unexpected: How many of the rows the plan does not expect; `None` without a plan.
    """

    kind: str
    axes: tuple[str, ...]
    num_rows: int
    count: int | None
    bytes: int
    wire_bytes: int
    seconds: float
    exposed_seconds: float
    num_unexpected: int | None


def groups(rows: Iterable[Row]) -> tuple[Group, ...]:
    """`rows` together by kind and axes, the longest first."""
    together: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        together.setdefault((row.kind, row.axes), []).append(row)
    return tuple(sorted((group(each) for each in together.values()), key=lambda each: (-each.seconds, -each.bytes)))


def group(rows: list[Row]) -> Group:
    """Rows of one kind over the same axes as one."""
    counts = [row.count for row in rows]
    known = [row.expected for row in rows if row.expected is not None]
    return Group(
        kind=rows[0].kind,
        axes=rows[0].axes,
        num_rows=len(rows),
        count=None if None in counts else sum(count or 0 for count in counts),
        bytes=sum(row.bytes * runs(row) for row in rows),
        wire_bytes=sum(row.wire_bytes * runs(row) for row in rows),
        seconds=sum(row.seconds * runs(row) for row in rows),
        exposed_seconds=sum(row.exposed_seconds for row in rows),
        num_unexpected=sum(text == "" for text in known) if known else None,
    )


def runs(row: Row) -> int:
    """How often `row` runs a step; once where a loop does not say."""
    return 1 if row.count is None else row.count
