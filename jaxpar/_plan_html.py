"""A plan as HTML, for notebooks: the table with its long columns wrapped, and one leaf's life.

No script, no file, no colour of its own for text or paper, so that it suits light and dark; where a host strips the
styles, a plain table is left. Axes are underlined in their hues.
"""

import html
from typing import TYPE_CHECKING

from ._palette import marked
from ._plan_text import Life, head_text, rows, totals_text

if TYPE_CHECKING:
    from ._plan import Plan

_CELL = "text-align:left;vertical-align:top;padding:.25em .8em .25em 0;white-space:normal"
_LINE = "margin:.15em 0"


def table(plan: "Plan") -> str:
    """What `plan.table()` says."""
    titles, *body = rows(plan)
    head = "".join(f'<th style="{_CELL}">{html.escape(title)}</th>' for title in titles)
    lines = [f'<tr style="background:none">{_cells(row, plan)}</tr>' for row in body]
    return "\n".join(
        [
            "<div>",
            *_paragraphs(head_text(plan)),
            '<div style="max-height:40em;overflow:auto"><table style="border-collapse:collapse;font-size:.9em">',
            f'<thead><tr style="border-bottom:1px solid">{head}</tr></thead>',
            *("<tbody>", *lines, "</tbody></table></div>"),
            *_paragraphs([*totals_text(plan), *(f"note: {note}" for note in plan.notes)]),
            "</div>",
        ]
    )


def life(story: Life) -> str:
    """What `plan.follow(path)` says: a row for each thing that happens to a leaf."""
    first, *lines = story.text.splitlines()
    axes = sorted({axis for move in story.moves for axis in move.axes})
    body = []
    for line in lines:
        what, _, said = line.strip().partition(" ")
        told = marked(html.escape(said.strip()), axes)
        body.append(
            f'<tr style="background:none"><td style="{_CELL}"><b>{what}</b></td><td style="{_CELL}">{told}</td></tr>'
        )
    return "\n".join(
        [
            f'<div><p style="{_LINE}"><b>{html.escape(first)}</b></p>',
            '<table style="border-collapse:collapse;font-size:.9em">',
            *body,
            "</table></div>",
        ]
    )


def _paragraphs(lines: list[str]) -> list[str]:
    return [f'<p style="{_LINE}">{html.escape(part)}</p>' for line in lines for part in line.splitlines()]


def _cells(row: tuple[str, ...], plan: "Plan") -> str:
    path, shape, spec, size, reasons, moves = ["<br>".join(map(html.escape, cell.split("; "))) for cell in row]
    cells = [
        f"<code>{path}</code>",
        shape,
        f"<code>{marked(spec, plan.axes)}</code>",
        size,
        reasons,
        marked(moves, plan.axes),
    ]
    keep = ("white-space:nowrap", "white-space:nowrap", "white-space:nowrap", "white-space:nowrap", "", "")
    return "".join(f'<td style="{_CELL};{style}">{cell}</td>' for cell, style in zip(cells, keep, strict=True))
