"""The picture of a schedule: a row for each stage, time from left to right, a box for each op with its microbatch.

    stage 0  ░0░1░2░3▓0▓░4▓1▓░5▓2▓   ▓3▓   ▓4▓   ▓5▓     forwards pale, backwards in the colour of the axis `pipe`,
    stage 1    ░0░1░2▓0▓░3▓1▓░4▓2▓░5▓3▓   ▓4▓   ▓5▓      weight gradients dark; of several chunks, later ones darker;
                                                         what is blank is bubble

Long schedules repeat themselves: the picture then has their beginning and their end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from .. import _draw_scene as scenes, _palette
from .._draw_scene import INK, Label, Line, Scene, Shape, beside, box, words
from .._drawing import Drawing
from ._simulate import Simulation, Span
from ._table import KINDS, NAMES, Op, Table

_WIDTH, _LEFT, _RIGHT = 860.0, 54.0, 96.0
_ROW, _GAP = 22.0, 4.0
_SMALL = 10
_MOST_BOXES = 900
_MOST_COLUMNS = 24
_FOLD = 26.0


def draw(table: Table, simulation: Simulation, title: str) -> Drawing:
    """The chart of a schedule as it was simulated."""
    text = "\n".join([title, said(simulation), *as_text(table)])
    head = scenes.above([words(title, size=12, bold=True), words(said(simulation), size=_SMALL, opacity=0.75)], 2)
    scene = scenes.above([head, _chart(table, simulation), _legend(table)], 10)
    return Drawing(text, scenes.framed(scene, 14), title)


def said(simulation: Simulation) -> str:
    """What a simulation found, in a line."""
    peak = max(simulation.peak)
    return (
        f"time {simulation.time:g}, bubble {100 * simulation.bubble:.1f}%, at most {peak:g} "
        f"{'microbatch' if peak == 1 else 'microbatches'} held on a stage"
    )


def as_text(table: Table) -> list[str]:
    """The table in characters: a column for each tick, a line for each stage and kind of op."""
    columns: list[int | None] = list(range(table.num_ticks))
    if len(columns) > _MOST_COLUMNS:
        half = _MOST_COLUMNS // 2
        columns = [*columns[:half], None, *columns[-half:]]
    kinds = [kind for kind in KINDS if table.ticks[kind]]
    lines: list[list[str]] = [["tick", *("⋯" if tick is None else str(tick) for tick in columns)]]
    for stage in range(table.stages):
        for kind in kinds:
            row = [f"stage {stage}" if kind == kinds[0] else ""]
            for tick in columns:
                cell = () if tick is None else table.cells[tick][stage]
                row.append("⋯" if tick is None else next((str(op) for op in cell if op.kind == kind), "·"))
            lines.append(row)
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


@dataclasses.dataclass(frozen=True)
class _Scale:
    """From times to places; what lies between `until` and `since` is not drawn."""

    unit: float
    until: float
    since: float

    @property
    def is_folded(self) -> bool:
        return self.since > self.until

    def shows(self, span: Span) -> bool:
        """Whether an op lies in what is drawn."""
        return not self.is_folded or span.end <= self.until or span.start >= self.since

    def at(self, time: float) -> float:
        """The place of a time, from the left of the rows."""
        if not self.is_folded or time <= self.until:
            return time * self.unit
        return (time - self.since + self.until) * self.unit + _FOLD


def _chart(table: Table, simulation: Simulation) -> Scene:
    scale = _scale(simulation)
    rows = []
    for stage, spans in enumerate(simulation.spans):
        shapes: list[Shape] = [Label(at=(0, _ROW / 2 + 4), text=f"stage {stage}", size=_SMALL)]
        end = scale.at(simulation.time)
        shapes.append(Line(points=((_LEFT, _ROW), (_LEFT + end, _ROW)), opacity=0.25))
        for span in spans:
            if scale.shows(span):
                shapes += _box(span, table, scale)
        if scale.is_folded:
            middle = _LEFT + scale.at(scale.until) + _FOLD / 2
            shapes.append(Label(at=(middle, _ROW / 2 + 4), text="⋯", anchor="middle", opacity=0.6))
        held = f"holds {simulation.peak[stage]:g}"
        shapes.append(Label(at=(_WIDTH, _ROW / 2 + 4), text=held, size=_SMALL, anchor="end", opacity=0.75))
        rows.append(Scene(_WIDTH, _ROW, tuple(shapes)))
    return scenes.above([*rows, _ruler(simulation, scale)], _GAP)


def _scale(simulation: Simulation) -> _Scale:
    spans = sorted(span for stage in simulation.spans for span in stage)
    room = _WIDTH - _LEFT - _RIGHT
    if len(spans) <= _MOST_BOXES:
        return _Scale(room / simulation.time, simulation.time, simulation.time)
    until = spans[_MOST_BOXES // 2].start
    since = sorted(span.end for span in spans)[-_MOST_BOXES // 2]
    return _Scale((room - _FOLD) / (until + simulation.time - since), until, since)


def _box(span: Span, table: Table, scale: _Scale) -> list[Shape]:
    x, width = _LEFT + scale.at(span.start), (span.end - span.start) * scale.unit
    fill, opacity = _shade(span.op, table.chunks)
    inner = width - 1 if width > 4 else width
    shapes: list[Shape] = [box(x, 0, inner, _ROW, fill=fill, opacity=opacity)]
    if scenes.text_width(str(table.microbatches - 1), _SMALL) < width:  # all boxes of a kind have numbers, or none
        ink = _palette.on(fill) if fill != INK else INK
        text, at = str(span.op.microbatch), (x + inner / 2, _ROW / 2 + 4)
        shapes.append(Label(at=at, text=text, size=_SMALL, anchor="middle", color=ink))
    return shapes


def _shade(op: Op, chunks: int) -> tuple[str, float]:
    """The fill of a box and how strong it is."""
    depth = op.chunk / max(chunks - 1, 1)
    if op.kind == "B":
        return _palette.hues(["pipe"])["pipe"], (0.5 + 0.5 * depth) if chunks > 1 else 0.9
    return INK, 0.1 + 0.2 * depth if op.kind == "F" else 0.5


def _ruler(simulation: Simulation, scale: _Scale) -> Scene:
    ends: list[tuple[float, Literal["start", "end"]]] = [(0.0, "start"), (simulation.time, "end")]
    if scale.is_folded:
        ends[1:1] = [(scale.until, "end"), (scale.since, "start")]
    shapes: list[Shape] = []
    for time, anchor in ends:
        x = _LEFT + scale.at(time)
        shapes.append(Line(points=((x, 0), (x, 4)), opacity=0.5))
        shapes.append(Label(at=(x, 14), text=f"{time:g}", size=_SMALL, anchor=anchor, opacity=0.75))
    return Scene(_WIDTH, 16, tuple(shapes))


def _legend(table: Table) -> Scene:
    marks: list[Scene] = []
    for kind in KINDS:
        if not table.ticks[kind]:
            continue
        shown: Sequence[int] = range(table.chunks) if kind != "W" else [0]
        swatches = []
        for chunk in shown:
            fill, opacity = _shade(Op(kind, 0, chunk), table.chunks)
            swatches.append(Scene(10, 14, (box(0, 2, 10, 10, fill=fill, opacity=opacity),)))
        name = NAMES[kind]
        if table.chunks > 1 and kind != "W":
            name = f"{name}, chunks 0 to {table.chunks - 1}"
        marks.append(beside([beside(swatches, 1), words(name, size=_SMALL)], 6))
    return beside(marks, 20)
