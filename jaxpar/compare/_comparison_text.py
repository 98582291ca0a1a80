"""A comparison as text and as HTML: one table a target, the reasons against the others, and what follows from it."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import _palette
from .._draw_scene import svg
from .._plan_text import bytes_text, columns
from ._candidates import Candidate, Rejected
from ._rank import seconds_text

if TYPE_CHECKING:
    from ._comparison import Comparison

_MOST = 12
"""Rows of a table; the rest is counted."""


def text(comparison: "Comparison") -> str:
    """All of it, in lines."""
    lines = [title(comparison)]
    for target in comparison.targets:
        lines += ["", heading(comparison, target), *table_text(comparison, target)]
    if comparison.rejected:
        lines += ["", "not possible", *(f"  {line}" for line in rejections(comparison))]
    lines += ["", *comparison.verdicts, *(f"note: {note}" for note in comparison.notes)]
    return "\n".join(lines)


def title(comparison: "Comparison") -> str:
    """What is trained, and on how much at once."""
    batch = f"{comparison.rows:,} rows"
    if comparison.seq is not None:
        batch = f"{comparison.num_tokens:,} tokens ({comparison.rows:,} sequences of {comparison.seq:,})"
    return f"{comparison.name}: {comparison.num_parameters:,} parameters, a batch of {batch}"


def heading(comparison: "Comparison", target: str) -> str:
    """The hardware in words, and what an hour of it costs."""
    here = comparison.of(target)
    said = here[0].report.hardware if here else target
    price = comparison.price.get(target)
    return said + (f"; {price:g} a chip and hour" if price is not None else "")


def header(comparison: "Comparison") -> list[str]:
    """The titles of a table's columns."""
    unit = "tokens" if comparison.seq is not None else "rows"
    trained = f"days for {_short(comparison.train_tokens)} {unit}"
    last = [trained, *(["cost"] if comparison.price else [])] if comparison.train_tokens else []
    return ["", "mesh", "memory", "step", "low - high", "exposed", "MFU", f"{unit}/s", *last, "by"]


def cells(comparison: "Comparison", number: int, candidate: Candidate) -> list[str]:
    """One row of a table."""
    report, timeline, memory = candidate.report, candidate.report.timeline, candidate.report.memory
    assert timeline is not None, "only hardware whose speed is known is compared"
    cost = comparison.cost(candidate)
    waits = timeline.exposed_communication_seconds
    return [
        str(number),
        candidate.name,
        f"{bytes_text(memory.peak)} of {bytes_text(memory.limit)}" if memory else "?",
        seconds_text(timeline.step_seconds),
        f"{seconds_text(timeline.low)} - {seconds_text(timeline.high)}",
        f"{seconds_text(waits)} ({waits / timeline.step_seconds:.0%})",
        f"{report.mfu:.1%}" if report.mfu is not None else "?",
        f"{report.tokens_per_second:,.0f}" if report.tokens_per_second is not None else "?",
        *([f"{comparison.days(candidate):,.3g}"] if comparison.train_tokens else []),
        *([f"{cost:,.0f}" if cost is not None else "?"] if comparison.price and comparison.train_tokens else []),
        "compiler" if candidate.is_compiled else "estimate",
    ]


def table_text(comparison: "Comparison", target: str) -> list[str]:
    """The table of one target, and how many more there are."""
    here = comparison.of(target)
    if not here:
        return ["no mesh fits"]
    rows = [header(comparison), *(cells(comparison, at, each) for at, each in enumerate(here[:_MOST], 1))]
    more = [f"and {len(here) - _MOST} slower ones"] if len(here) > _MOST else []
    return [*columns(rows).splitlines(), *more]


def rejections(comparison: "Comparison") -> list[str]:
    """The reasons against meshes, equal ones together."""
    together: dict[tuple[str, str], list[Rejected]] = {}
    for each in comparison.rejected:
        kind = "does not fit" if each.reason.startswith("does not fit") else each.reason
        together.setdefault((each.target, kind), []).append(each)
    lines = []
    for (target, _), same in together.items():
        first = f"{target}: " if len(comparison.targets) > 1 else ""
        shown = same if same[0].reason.startswith("does not fit") else same[:1]
        for each in shown[:_MOST]:
            others = f" (and {len(same) - 1} more meshes)" if len(shown) < len(same) else ""
            lines.append(f"{first}{_axes(each.axes)}{others}: {each.reason}")
        if len(shown) > _MOST:
            lines.append(f"{first}and {len(shown) - _MOST} more that do not fit")
    return lines


def html_page(comparison: "Comparison", *, alone: bool) -> str:
    """Tables, picture and verdicts as HTML; `alone` as a page of its own."""
    axes = {axis for each in comparison.candidates for axis in each.axes}
    parts = [f"<h3>{html.escape(title(comparison))}</h3>"]
    if comparison.candidates:
        parts.append(svg(comparison.draw().scene, alone=False))
    for target in comparison.targets:
        parts.append(f"<h4>{html.escape(heading(comparison, target))}</h4>")
        here = comparison.of(target)
        if here:
            rows = [cells(comparison, at, each) for at, each in enumerate(here[:_MOST], 1)]
            parts.append(_html_table(header(comparison), rows, axes))
        if len(here) > _MOST:
            parts.append(f"<p>and {len(here) - _MOST} slower ones</p>")
    parts += [f"<p>{_palette.marked(html.escape(each), axes)}</p>" for each in comparison.verdicts]
    if comparison.rejected:
        items = "".join(f"<li>{html.escape(each)}</li>" for each in rejections(comparison))
        parts.append(f"<details open><summary>not possible</summary><ul>{items}</ul></details>")
    parts += [f"<p><small>{html.escape(each)}</small></p>" for each in comparison.notes]
    body = "\n".join(parts)
    if not alone:
        return f"<div>{body}</div>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(comparison.name)}: which mesh</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}</style>"
        f"</head>\n<body>{body}</body></html>\n"
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], axes: set[str]) -> str:
    style = ' style="text-align:left;padding:2px 10px 2px 0;white-space:nowrap"'
    cell = lambda tag, value: f"<{tag}{style}>{_palette.marked(html.escape(value), axes)}</{tag}>"
    lines = ["<tr>" + "".join(cell("th", each) for each in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", each) for each in row) + "</tr>" for row in rows]
    return f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>'


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _axes(axes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in axes.items())
