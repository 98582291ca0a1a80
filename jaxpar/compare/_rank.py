"""Which of several meshes comes first, and what makes it faster than the next.

Times that differ by less than the error of the comparison are a tie, which goes to the simpler mesh: fewer axes, then
fewer microbatches, then `data` rather than `fsdp` rather than `tensor`. What is uncertain alike on all meshes (how fast
one device computes) does not count as error.
"""

from collections.abc import Sequence

from .._mesh import AXES
from ..explain import Report, Row
from ._candidates import Candidate

TIE = {"compiled": 0.02, "estimate": 0.05}
"""By how much, of the faster time, two meshes must differ to be told apart."""
LEAST = 1e-4
"""Seconds: differences below this are a matter of how steps are started, which nothing here knows."""


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """`candidates`, compiled ones first, each time the simplest of those that are as fast as the fastest left."""
    order: list[Candidate] = []
    for compiled in (True, False):
        left = sorted((each for each in candidates if each.is_compiled == compiled), key=lambda each: each.seconds)
        while left:
            equal = [each for each in left if each.seconds <= left[0].seconds * (1 + tie(left[0], each))]
            first = min(equal, key=_simplicity)
            order.append(first)
            left.remove(first)
    return order


def _simplicity(candidate: Candidate) -> tuple[int, int, list[int], float]:
    """Fewer axes, fewer microbatches, replicas before shards before split matrices; then the time."""
    order = [AXES.index(axis) for axis in candidate.axes]
    return candidate.num_axes, candidate.accumulate, order, candidate.seconds


def tie(one: Candidate, other: Candidate) -> float:
    """By how much, of the faster time, these two must differ."""
    share = TIE["compiled" if one.is_compiled and other.is_compiled else "estimate"]
    return max(share, LEAST / min(one.seconds, other.seconds))


def why(first: Candidate, second: Candidate) -> str:
    """Why `first` comes before `second`: the collectives that differ, or that it is simpler."""
    gain = second.seconds / first.seconds - 1
    differ = _differences(first.report, second.report)
    told = "; ".join(differ[:3]) or "no kind of collective by more than 0.2% of a step"
    times = f"{seconds_text(first.seconds)} against {seconds_text(second.seconds)} a step"
    if abs(gain) <= tie(first, second):
        simpler = (
            "it has fewer axes, and simpler is better"
            if first.num_axes < second.num_axes
            else "it takes fewer microbatches"
            if first.accumulate < second.accumulate
            else "replicas are simpler than shards, and shards than split matrices"
            if first.num_axes == second.num_axes and list(first.axes) != list(second.axes)
            else "the first is faster by so much"
        )
        return (
            f"{first.name} and {second.name} are as fast as one another, as far as can be told ({times}, "
            f"{abs(gain):.1%}; {tie(first, second):.0%} is the least that counts): {simpler}. What differs: {told}."
        )
    return f"{first.name} beats {second.name} by {gain:.0%} ({times}): {told}."


def _differences(first: Report, second: Report) -> list[str]:
    """What differs, the largest first: time exposed by each kind of collective, and computation."""
    mine, theirs = _exposed(first), _exposed(second)
    found: list[tuple[float, str]] = []
    for kind, axes in mine.keys() | theirs.keys():
        a, b = mine.get((kind, axes), (0.0, 0.0)), theirs.get((kind, axes), (0.0, 0.0))
        name = f"{kind} over {'+'.join(axes)}"
        text = f"{name} keeps it waiting for {seconds_text(a[0])}, the other for {seconds_text(b[0])}"
        if a[1] == 0:
            text = f"it has no {name}, for which the other waits {seconds_text(b[0])}"
        elif b[1] == 0:
            text = f"its {name} costs {seconds_text(a[0])}, and the other has none"
        found.append((abs(a[0] - b[0]), text))
    compute = [each.timeline.compute_seconds if each.timeline else 0.0 for each in (first, second)]
    found.append(
        (
            abs(compute[0] - compute[1]),
            f"it computes for {seconds_text(compute[0])}, the other for {seconds_text(compute[1])}",
        )
    )
    least = 0.002 * max(each.timeline.step_seconds if each.timeline else 0.0 for each in (first, second))
    return [text for size, text in sorted(found, key=lambda each: -each[0]) if size > least]


def _exposed(report: Report) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """Exposed seconds and wire bytes of each kind of collective over each set of axes."""
    found: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}
    for row in report.collectives:
        key = (row.kind, row.axes)
        exposed, wire = found.get(key, (0.0, 0.0))
        found[key] = (exposed + row.exposed_seconds, wire + _wire(row))
    return found


def _wire(row: Row) -> float:
    return row.wire_bytes * (row.count or 1)


def seconds_text(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} µs"
    )
