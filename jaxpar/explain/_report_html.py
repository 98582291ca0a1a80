"""A report as HTML: what the text says, with pictures in between; for a notebook, or a page of its own.

No script and no file; colours mark axes alone, so that it suits light and dark. Where a host strips pictures and styles
a plain document of tables is left. Long tables are folded away, and end with what they leave out.
"""

import dataclasses
import html
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .. import _draw_scene as scenes, _palette
from .._draw_scene import Scene
from . import _report_draw as pictures, _report_tables as tables
from ._report_diff import MOST, TITLES, Difference
from ._report_tables import Bar, Part, Table

if TYPE_CHECKING:
    from ._report import Report

_MOST_ROWS = 60
"""Of a whole table; a report stays under 200 kB."""

_STYLE = """
.jaxpar-report{font-size:.92em;line-height:1.45;max-width:70em}
.jaxpar-report h2{font-size:1.25em;margin:.2em 0 .3em}
.jaxpar-report h3{font-size:1.08em;margin:1.6em 0 .2em}
.jaxpar-report p{margin:.15em 0;max-width:56em}
.jaxpar-report .said{opacity:.75}
.jaxpar-report .figures{display:flex;flex-wrap:wrap;gap:.8em 2.6em;margin:.9em 0 .4em;padding:0}
.jaxpar-report .figures div{margin:0}
.jaxpar-report .figures b{display:block;font-size:1.45em;font-weight:600;line-height:1.2}
.jaxpar-report .wide{overflow-x:auto;margin:.5em 0}
.jaxpar-report table{border-collapse:collapse;font-size:.92em;margin:0}
.jaxpar-report th,.jaxpar-report td{text-align:left;vertical-align:top;padding:.22em 1em .22em 0}
.jaxpar-report th,.jaxpar-report td{border:0;background:none}
.jaxpar-report th{font-weight:normal;opacity:.65;white-space:nowrap;border-bottom:1px solid}
.jaxpar-report tr{background:none}
.jaxpar-report td{overflow-wrap:anywhere}
.jaxpar-report td:not([class]){min-width:6em}
.jaxpar-report td{border-bottom:1px solid #8883}
.jaxpar-report .n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.jaxpar-report .k{white-space:nowrap}
.jaxpar-report .bar{min-width:7em}
.jaxpar-report .bar div{height:.75em;margin-top:.3em;background:currentColor}
.jaxpar-report summary{cursor:pointer;opacity:.75;margin:.4em 0}
.jaxpar-report details table{font-size:.85em}
.jaxpar-report .picture{margin:.5em 0}
.jaxpar-report .picture svg{width:100%;height:auto}
.jaxpar-report .finding{margin:.7em 0;padding-left:.8em;border-left:3px solid #8886}
.jaxpar-report .error{border-left:5px solid}
.jaxpar-report .warning{border-left:3px solid}
""".strip()


_PICTURES: dict[str, Callable[["Report"], Scene]] = {
    "time": lambda report: pictures.scene_of(report, "timeline"),
    "memory": pictures.stack,  # the bars of the table have its shades
    "collectives": lambda report: pictures.scene_of(report, "collectives"),
}


def page(report: "Report") -> str:
    """A page of its own."""
    name = html.escape(tables.title(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title>\n<style>body{{font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif;"
        f"margin:2em auto;max-width:68em;padding:0 1.2em}}</style></head>\n<body>\n{body(report)}\n</body></html>\n"
    )


def body(report: "Report") -> str:
    """The report as a piece of a page."""
    lines = [
        f"<style>\n{_STYLE}\n</style>",
        '<div class="jaxpar-report">',
        f"<h2>{html.escape(tables.title(report))}</h2>",
    ]
    lines += [_said(line) for line in tables.made(report)]
    lines += ['<div class="figures">', *(_figure(*row) for row in tables.headline(report)), "</div>"]
    for part, everything in zip(tables.parts(report), tables.parts(report, whole=True), strict=True):
        lines += [f"<h3>{part.title}</h3>", _said(part.lead)]
        if part.tables and part.name in _PICTURES:
            lines.append(_picture(_PICTURES[part.name](report)))
        if part.name == "findings":
            lines += _findings(part)
        else:
            lines += [
                _table(_plain(table) if part.name == "collectives" else table, report.axes) for table in part.tables
            ]
            lines += _everything(part, everything, report.axes)
        lines += [_said(note) for note in part.notes]
    if report.axes:
        lines += ["<h3>Mesh</h3>", _picture(pictures.scene_of(report, "mesh"))]
    lines += [_said(f"note: {note}") for note in report.notes]
    if report.unread:
        lines += ["<h3>Not read of the program</h3>", *map(_said, report.unread[:10])]
        lines += [_said(f"and {len(report.unread) - 10} more")] if len(report.unread) > 10 else []
    return "\n".join([*lines, "</div>"])


def difference(found: Difference) -> str:
    """What two reports say otherwise, as a piece of a page: a table for each section."""
    lines = [f"<style>\n{_STYLE}\n</style>", '<div class="jaxpar-report">']
    for section, changes in found.sections().items():
        rows = tuple(change.cells() for change in changes)
        is_text = any(isinstance(value, str) for change in changes for value in (change.mine, change.theirs))
        wrapped = (0, 1, 2) if is_text else (0,)  # the settings of two programs are long
        table = Table(titles=TITLES[1:], rows=rows, right=() if is_text else (1, 2, 3), paths=wrapped)
        lines.append(f"<h3>{html.escape(section)}</h3>")
        if len(rows) <= MOST:
            lines.append(_table(table, found.axes))
            continue
        few = dataclasses.replace(table, rows=rows[:MOST], rest=f"and {len(rows) - MOST} more")
        lines += [_table(few, found.axes), *_folded_away(table, found.axes, "difference.changes has them")]
    return "\n".join([*lines, *([] if found else [_said(str(found))]), "</div>"])


def _figure(what: str, figure: str, aside: str) -> str:
    said = f'<span class="said">{html.escape(aside)}</span>'
    return f"<div>{html.escape(what)}<b>{html.escape(figure)}</b>{said}</div>"


def _picture(scene: Scene) -> str:
    drawn = scenes.svg(scenes.framed(scene, 2), alone=False)
    return f'<div class="picture" style="max-width:{1.15 * scene.width:.0f}px">{drawn}</div>'


def _said(line: str) -> str:
    return f'<p class="said">{html.escape(line)}</p>'


def _table(table: Table, axes: Collection[str], rest: str = "") -> str:
    kept = [index for index, _ in enumerate(table.titles) if any(row[index] for row in table.rows)]
    head = "".join(f"<th{_class(table, index)}>{html.escape(table.titles[index])}</th>" for index in kept)
    lines = [
        "<tr>" + "".join(_cell(row[index], _class(table, index), axes) for index in kept) + "</tr>"
        for row in table.rows
    ]
    said = [_said(rest or table.rest)] if rest or table.rest else []
    return "\n".join(['<div class="wide"><table>', f"<tr>{head}</tr>", *lines, "</table></div>", *said])


def _plain(table: Table) -> Table:
    """A table without its bars, beside a picture that has them."""
    rows = tuple(tuple("" if isinstance(cell, Bar) else cell for cell in row) for row in table.rows)
    return dataclasses.replace(table, rows=rows)


def _class(table: Table, index: int) -> str:
    if index in table.right:
        return ' class="n"'
    return "" if index in table.paths else ' class="k"'


def _cell(cell: str | Bar, style: str, axes: Collection[str]) -> str:
    if isinstance(cell, str):
        return f"<td{style}>{_palette.marked(html.escape(cell), axes)}</td>"
    hues = _palette.hues(axes)
    colours = [hues.get(axis.partition("[")[0], "#7f7f7f") for axis in cell.axes]
    width = f"width:{max(100 * min(cell.fraction, 1.0), 0.8 * (cell.fraction > 0)):.1f}%"
    if not colours:
        return f'<td class="bar"><div style="{width};opacity:{cell.shade:g}"></div></td>'
    each = 100 / len(colours)
    stops = ",".join(f"{hue} {place * each:.0f}% {(place + 1) * each:.0f}%" for place, hue in enumerate(colours))
    paint = colours[0] if len(colours) == 1 else f"linear-gradient({stops})"
    return f'<td class="bar"><div style="{width};background:{paint}"></div></td>'


def _everything(part: Part, everything: Part, axes: Collection[str]) -> list[str]:
    """The whole tables, folded away, where they say more than the short ones."""
    longer = [table for table in everything.tables if table not in part.tables]
    where = f"report.table({part.name!r}) has them"
    return [line for table in longer for line in _folded_away(table, axes, where)]


def _folded_away(table: Table, axes: Collection[str], where: str) -> list[str]:
    number = len(table.rows)
    cut = dataclasses.replace(table, rows=table.rows[:_MOST_ROWS])
    rest = f"and {number - _MOST_ROWS} more: {where}" if number > _MOST_ROWS else ""
    return [f"<details><summary>all {number:,} rows</summary>", _table(cut, axes, rest), "</details>"]


def _findings(part: Part) -> list[str]:
    lines: list[str] = []
    for table in part.tables:
        for row in table.rows:
            severity, kind, costs, place, reason, remedy = map(_text, row)
            told = " · ".join(filter(None, (severity, costs, place)))
            lines.append(
                f'<div class="finding {severity}"><p><b>{kind}</b> <span class="said">{told}</span></p>'
                f"<p>{reason}</p><p>{remedy}</p></div>"
            )
        lines += [_said(table.rest)] if table.rest else []
    return lines


def _text(cell: str | Bar) -> str:
    return html.escape(cell) if isinstance(cell, str) else ""
