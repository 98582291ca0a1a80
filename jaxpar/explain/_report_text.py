"""A report as text of at most 118 columns: a headline, the step as a strip for each lane, parts with tables."""

import textwrap
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._errors import ShardingError, nearest
from . import _report_tables as tables
from ._report_tables import Bar, Part, Table
from ._timeline import Timeline
from ._units import bar, columns, seconds_text, shortened

if TYPE_CHECKING:
    from ._report import Report

WIDTH = 118
_BAR = 10
_STRIP = 84
_SHORTEST_PATH = 12


def text(report: "Report") -> str:
    """The report on one screen or little more; what is left out is counted."""
    lines = _wrapped(tables.title(report), "")
    for line in tables.made(report):
        lines += _wrapped(line, "  ")
    lines.append("")
    lines += [f"  {what:<9}{', '.join(filter(None, figures))}" for what, *figures in tables.headline(report)]
    if report.timeline is not None:
        lines += strip(report.timeline)
    for part in tables.parts(report):
        lines += ["", *part_text(part)]
    for note in report.notes:
        lines += _wrapped(f"note: {note}", "")
    if report.unread:
        number = "one thing" if len(report.unread) == 1 else f"{len(report.unread)} things, such as"
        lines.append(f"not read of the program: {number}")
        lines += [f"  {shortened(each, WIDTH - 2)}" for each in report.unread[:3]]
    return "\n".join(lines)


def whole(report: "Report", section: str) -> str:
    """All of one part."""
    if section not in tables.PARTS:
        raise ShardingError(
            f"report.table: there is no section {section!r}.{nearest(section, tables.PARTS)} "
            f"They are: {', '.join(tables.PARTS)}."
        )
    return "\n".join(part_text(tables.PARTS[section](report, True)))


def strip(line: Timeline) -> list[str]:
    """The step from left to right, a lane a line: the fuller a character, the busier the lane."""
    lanes = lanes_of(line)
    if not lanes or not line.step_seconds > 0:
        return []
    width = max(map(len, lanes))
    found = [""]
    for lane in lanes:
        busy = [0.0] * _STRIP
        for event in line.events:
            if event.lane == lane:
                _fill(busy, event.start / line.step_seconds * _STRIP, event.seconds / line.step_seconds * _STRIP)
        marks = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(each * 8 + 0.3 * (each > 0)))] for each in busy)
        total = sum(event.seconds for event in line.events if event.lane == lane)
        found.append(f"  {lane:<{width}} │{marks}│ {seconds_text(total)}")
    ruler = f"0{seconds_text(line.step_seconds):>{_STRIP - 1}}"
    return [*found, f"  {'':<{width}}  {ruler}"]


def lanes_of(line: Timeline) -> list[str]:
    """The lanes that have events, computation first, then as they begin."""
    names = dict.fromkeys(event.lane for event in sorted(line.events, key=lambda event: event.start))
    return sorted(names, key=lambda name: name != "compute")


def _fill(busy: list[float], start: float, length: float) -> None:
    for place in range(max(int(start), 0), min(int(start + length) + 1, len(busy))):
        busy[place] += max(0.0, min(start + length, place + 1) - max(start, place))


def part_text(part: Part) -> list[str]:
    """One part: a sentence, its tables, its notes."""
    lines = _wrapped(f"{part.title}: {part.lead}", "")
    if part.name == "findings":
        lines += [line for table in part.tables for line in _findings(table)]
    else:
        lines += tables_text(part.tables)
    for note in part.notes:
        lines += _wrapped(note, "  ")
    return lines


def tables_text(shown: Sequence[Table]) -> list[str]:
    """Tables one under another."""
    return [line for table in shown for line in _table(table)]


def _table(table: Table) -> list[str]:
    rows = [table.titles, *([_cell(cell) for cell in row] for row in table.rows)]
    lines = columns(_narrowed(rows, table.paths), right=table.right)
    lines += [table.rest] if table.rest else []
    return [f"  {line}" for line in lines]


def _narrowed(rows: Sequence[Sequence[str]], paths: Sequence[int]) -> list[list[str]]:
    """The rows with the cells of `paths` cut so that a line fits, the widest column first."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    shown = sum(width > 0 for width in widths)
    excess = sum(widths) + 2 * (shown - 1) + 2 - WIDTH
    while excess > 0:
        widest = max(paths, key=lambda index: widths[index], default=None)
        if widest is None or widths[widest] <= _SHORTEST_PATH:
            break
        widths[widest] -= 1
        excess -= 1
    return [[shortened(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _cell(cell: str | Bar) -> str:
    return bar(cell.fraction, _BAR) if isinstance(cell, Bar) else cell


def _findings(table: Table) -> list[str]:
    """Findings are sentences: a paragraph each."""
    lines = []
    for row in table.rows:
        severity, kind, costs, place, reason, remedy = typing.cast(tuple[str, ...], row)
        head = f"{severity} {kind}" + (f" ({costs})" if costs else "") + (f" at {place}" if place else "")
        lines += _wrapped(head, "  ")
        lines += [*_wrapped(reason, "    "), *_wrapped(remedy, "    ")]
    return [*lines, *([f"  {table.rest}"] if table.rest else [])]


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
