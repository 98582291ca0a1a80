"""What two reports say otherwise: time, memory, traffic, FLOPs, findings; a row for each thing that differs."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .._plan_text import fold
from ._collectives import Row
from ._traffic import group
from ._units import columns, flops_text, number_text, seconds_text, shortened, size_text

if TYPE_CHECKING:
    from ._report import Report

_HOW = "how it was made"
MOST = 14
"""Rows of a section that are printed."""

TITLES = ("", "", "this", "other", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that two reports say otherwise.

    Attributes:
        section: `"time"`, `"memory"`, `"collectives"`, `"flops"`, `"findings"`, or how the two were made.
        what: The thing: `"all-gather over fsdp: bytes"`.
        mine: The first report's figure; `None` where it has none.
        theirs: The other's.
        unit: Of figures: `"s"`, `"B"`, `"FLOP"` or `""`.
    """

    section: str
    what: str
    mine: Any
    theirs: Any
    unit: str = ""

    @property
    def ratio(self) -> float | None:
        """The other figure over the first, where both are numbers."""
        numbers = [isinstance(each, int | float) for each in (self.mine, self.theirs)]
        return self.theirs / self.mine if all(numbers) and self.mine else None

    def cells(self) -> tuple[str, str, str, str]:
        """In words: the thing, both figures, and how they compare."""
        return self.what, _said(self.mine, self.unit), _said(self.theirs, self.unit), _percent(self.ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What two reports say otherwise. Prints as a table, in a notebook too; false if there is nothing.

    Attributes:
        changes: In the order of a report's sections.
        axes: Of both meshes, as they are coloured.
    """

    changes: tuple[Change, ...]
    axes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "the two reports say the same"
        return "\n".join(columns(self.rows(), right=(2, 3, 4)))

    def _repr_html_(self) -> str:
        from . import _report_html

        return _report_html.difference(self)

    def rows(self) -> list[tuple[str, ...]]:
        """The table, its titles first; of each section the first changes, and how many more."""
        found = [TITLES]
        for section, changes in self.sections().items():
            for place, change in enumerate(changes[:MOST]):
                what, mine, theirs, percent = change.cells()
                first = section if place == 0 else ""
                found.append((first, shortened(what, 44), shortened(mine, 24), shortened(theirs, 24), percent))
            if len(changes) > MOST:
                found.append(("", f"and {len(changes) - MOST} more", "", "", ""))
        return found

    def sections(self) -> dict[str, tuple[Change, ...]]:
        """The changes of each section."""
        names = dict.fromkeys(change.section for change in self.changes)
        return {name: tuple(change for change in self.changes if change.section == name) for name in names}


def difference(mine: "Report", theirs: "Report") -> Difference:
    """What `theirs` says otherwise than `mine`."""
    changes = [
        change
        for part in (_how, _time, _memory, _collectives, _flops, _findings)
        for change in part(mine, theirs)
        if not _same(change.mine, change.theirs)
    ]
    if not changes:  # nothing that a section shows, yet not the same data: say in which field
        changes = [
            Change(section="details", what=field.name, mine="differs", theirs="")
            for field in dataclasses.fields(mine)
            if not _same(getattr(mine, field.name), getattr(theirs, field.name))
        ]
    return Difference(changes=tuple(changes), axes=tuple(dict.fromkeys([*mine.axes, *theirs.axes])))


def _how(mine: "Report", theirs: "Report") -> Iterator[Change]:
    names = ("name", "target", "axes", "num_devices", "strategies", "compiler", "options", "origin", "num_tokens")
    for name in names:
        yield Change(section=_HOW, what=name.replace("_", " "), mine=getattr(mine, name), theirs=getattr(theirs, name))


def _time(mine: "Report", theirs: "Report") -> Iterator[Change]:
    figures = {
        "step": lambda report: report.step_seconds,
        "compute": lambda report: report.compute_seconds,
        "exposed communication": lambda report: report.exposed_communication_seconds,
        "bubble": lambda report: report.timeline and report.timeline.bubble_seconds,
    }
    yield from _figures("time", "s", figures, mine, theirs)
    for name, what in (("mfu", "MFU"), ("hfu", "HFU"), ("tokens_per_second", "tokens a second")):
        yield Change(section="time", what=what, mine=getattr(mine, name), theirs=getattr(theirs, name))


def _memory(mine: "Report", theirs: "Report") -> Iterator[Change]:
    parts = ("peak", "limit", "argument", "output", "temporary", "alias", "code", "host")
    figures = {name: lambda report, name=name: report.memory and getattr(report.memory, name) for name in parts}
    yield from _figures("memory", "B", figures, mine, theirs)
    held = [
        _sums((each.kind, each.bytes) for each in report.memory.held) if report.memory else {}
        for report in (mine, theirs)
    ]
    yield from _keyed("memory", "B", "at the peak: {}", *held)


def _collectives(mine: "Report", theirs: "Report") -> Iterator[Change]:
    one, other = ({(each.kind, each.axes): each for each in report.traffic} for report in (mine, theirs))
    for key in dict.fromkeys([*one, *other]):
        what = f"{key[0]} over {'+'.join(key[1])}"
        for field, unit in (("count", ""), ("bytes", "B"), ("seconds", "s"), ("exposed_seconds", "s")):
            figures = (getattr(each[key], field) if key in each else None for each in (one, other))
            a, b = figures
            yield Change(section="collectives", what=f"{what}: {field.replace('_', ' ')}", mine=a, theirs=b, unit=unit)
        if key in one and key in other and one[key].bytes == other[key].bytes:
            yield from _placed(what, key, mine, theirs)


def _placed(what: str, key: tuple[str, tuple[str, ...]], mine: "Report", theirs: "Report") -> Iterator[Change]:
    """The same traffic from other places of the model, or in other loops."""
    one, other = (
        _together([row for row in report.collectives if (row.kind, row.axes) == key]) for report in (mine, theirs)
    )
    for place in dict.fromkeys([*one, *other]):
        a, b = (group(each[place]).bytes if place in each else None for each in (one, other))
        path, depth = place
        yield Change(
            section="collectives", what=f"{what}, {path or '?'}, loop depth {depth}", mine=a, theirs=b, unit="B"
        )


def _together(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by path and depth, those of equal layers together."""
    found: dict[tuple[str, int], list[Row]] = {}
    for name, members in fold([row.path for row in rows], [(row.bytes, row.count, row.depth) for row in rows]):
        found.setdefault((name, rows[members[0]].depth), []).extend(rows[index] for index in members)
    return found


def _flops(mine: "Report", theirs: "Report") -> Iterator[Change]:
    figures = {
        name: lambda report, name=name: report.flops and getattr(report.flops, name)
        for name in ("model", "model_causal", "hardware")
    }
    yield from _figures("flops", "FLOP", figures, mine, theirs)
    yield Change(
        section="flops", what="peak of one device", mine=mine.peak_flops, theirs=theirs.peak_flops, unit="FLOP"
    )
    paths = [_folded(report.flops.by_path) if report.flops else {} for report in (mine, theirs)]
    yield from _keyed("flops", "FLOP", "{}", *paths)


def _findings(mine: "Report", theirs: "Report") -> Iterator[Change]:
    one, other = ({(each.kind, each.place): each for each in report.findings} for report in (mine, theirs))
    for kind, place in dict.fromkeys([*one, *other]):
        a, b = (each[kind, place].severity if (kind, place) in each else None for each in (one, other))
        yield Change(section="findings", what=f"{kind} at {place}", mine=a, theirs=b)


def _figures(
    section: str, unit: str, figures: dict[str, Callable[["Report"], Any]], mine: "Report", theirs: "Report"
) -> Iterator[Change]:
    for what, figure in figures.items():
        yield Change(section=section, what=what, mine=figure(mine), theirs=figure(theirs), unit=unit)


def _keyed(section: str, unit: str, what: str, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*mine, *theirs]):
        yield Change(section=section, what=what.format(key), mine=mine.get(key), theirs=theirs.get(key), unit=unit)


def _folded(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Sums by path, those of equal layers together."""
    folded = fold([path for path, _ in pairs], [number for _, number in pairs])
    return {name: sum(pairs[index][1] for index in members) for name, members in folded}


def _sums(pairs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, number in pairs:
        found[key] = found.get(key, 0) + number
    return found


def _same(mine: Any, theirs: Any) -> bool:
    both = (mine, theirs)
    return mine == theirs or all(isinstance(each, float) and math.isnan(each) for each in both)


def _said(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, str):
        return value or "none"
    return {"s": seconds_text, "B": size_text, "FLOP": flops_text}.get(unit, number_text)(value)


def _percent(ratio: float | None) -> str:
    if ratio is None or not math.isfinite(ratio):
        return ""
    if ratio >= 2:
        return f"x {ratio:.3g}"
    return f"{100 * (ratio - 1):+.1f} %"
