"""One matrix in tiles, as shapes: rulers in the colours of the axes, seams between tiles, edges of the copies behind.

caption            256 = tensor 2 × 128
ruler                [  0  ][  1  ]
[0]         ┌──────┬──────┐
64 =     [0]         │ 0, 4 │ 1, 5 ││
fsdp 2   [1]         ├──────┼──────┤│   a seam has the colour of the axis that makes it
× 32     [1]         │ 2, 6 │ 3, 7 ││
└──────┴──────┘│   an edge, one for a copy behind, that of the axis along which it lies
──────────────┘
"""

import math
from collections.abc import Sequence

import numpy as np

from . import _draw_grid as grids, _draw_scene as scenes, _palette
from ._draw_grid import Cut, Grid, Part, Side
from ._draw_scene import Area, Label, Line, Scene, Shape, box

SMALL = 10
"""The size of captions."""

_CELL_AREA, _ROW_HEIGHT, _BAR = 15_000, 20, 15


def sheet(grid: Grid, hues: dict[str, str]) -> Scene:
    """A matrix in tiles: rulers in the colours of the axes, lines between tiles, edges of copies behind."""
    rows, columns = grid.rows.parts(), grid.columns.parts()
    widest = max((_fullest(grid, row, column) for row in rows for column in columns), default=0.0)
    ratio = min(max(grid.columns.length / grid.rows.length, 0.5), 2.5)
    room = 64 if len(columns) > 3 else 100
    width = max(
        math.sqrt(_CELL_AREA * ratio),
        len(columns) * min(max(widest + 10, 30), room),
        scenes.text_width(grid.columns.caption, SMALL) + 4,
    )
    tall = math.sqrt(_CELL_AREA / ratio) if grid.rows.caption else 36
    height = max(tall, len(rows) * _ROW_HEIGHT, scenes.text_width(grid.rows.caption, SMALL) + 4)
    left, top = _margin(grid.rows, upright=True), _margin(grid.columns)
    across, down = _places(columns, width), _places(rows, height)
    shapes: list[Shape] = []
    first = int(np.ravel(grid.ids)[0])
    for row, (y0, y1) in zip(rows, down, strict=True):
        for column, (x0, x1) in zip(columns, across, strict=True):
            shapes += _tile(grid, (row, column), (left + x0, top + y0, x1 - x0, y1 - y0), first)
    shapes += _seams(grid.columns, across, hues, (left, top), height, upright=True)
    shapes += _seams(grid.rows, down, hues, (left, top), width, upright=False)
    corners = ((left, top), (left + width, top), (left + width, top + height), (left, top + height), (left, top))
    shapes.append(Line(points=corners, opacity=0.7))
    shapes += _ruler(grid.columns, across, hues, at=left, upright=False)
    shapes += _ruler(grid.rows, down, hues, at=top, upright=True)
    most = 3 if len(grid.copies) == 1 else 2
    edges = [hues[axis] for axis, size in grid.copies for _ in range(min(size - 1, most))][:6]
    for place, hue in enumerate(edges):
        shapes.append(_edge(left, top, width, height, 2 + 6 * place, hue))
    bottom = top + height + 6 * len(edges)
    if grid.copies:
        note = grid.copies_text()
        shapes.append(Label(at=(left, bottom + 14), text=note, size=SMALL))
        bottom += 18
        width = max(width, scenes.text_width(note, SMALL) - 6 * len(edges))
    return Scene(left + width + 6 * len(edges) + 2, bottom + 2, tuple(shapes))


def _fullest(grid: Grid, row: Part, column: Part) -> float:
    name = next(grids.names(grid.holders(row, column)), "")
    return scenes.text_width(name, 11)


def _margin(side: Side, *, upright: bool = False) -> float:
    return (16 if side.caption else 0) + sum(_bar(cut, upright=upright) + 3 for cut in side.cuts)


def _bar(cut: Cut, *, upright: bool) -> float:
    """How thick the ruler of an axis is: its coordinates must fit."""
    return max(_BAR, 4 + scenes.text_width(str(cut[1] - 1), SMALL)) if upright else _BAR


def _places(parts: Sequence[Part], length: float) -> list[tuple[float, float]]:
    """Where each part begins and ends; folded ones are narrower."""
    weights = [0.7 if None in part else 1.0 for part in parts]
    unit, place, places = length / sum(weights), 0.0, []
    for weight in weights:
        places.append((place, place + weight * unit))
        place += weight * unit
    return places


def _tile(grid: Grid, part: tuple[Part, Part], where: tuple[float, float, float, float], first: int) -> list[Shape]:
    x, y, width, height = where
    ids = grid.holders(*part)
    middle = (x + width / 2, y + height / 2 + 4)
    if not ids:
        mark = "⋮" if None in part[0] else "⋯"
        return [Label(at=middle, text=mark, anchor="middle", opacity=0.6)]
    shapes: list[Shape] = [box(x, y, width, height, opacity=0.3 if first in ids else 0.06)]
    name = next((name for name in grids.names(ids) if scenes.text_width(name, 11) <= width), None)
    if name:
        shapes.append(Label(at=middle, text=name, anchor="middle", bold=first in ids))
    return shapes


def _seams(
    side: Side, places: Sequence[tuple[float, float]], hues: dict[str, str], at: tuple[float, float], length: float,
    *, upright: bool,
) -> list[Shape]:  # fmt: skip
    """The lines between parts, in the colour of the axis that makes them, outer axes thicker."""
    shapes: list[Shape] = []
    parts = side.parts()
    for before, after, (place, _) in zip(parts, parts[1:], places[1:], strict=False):
        level = next(level for level, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        axis = side.cuts[level][0]
        x, y = at
        ends = ((x + place, y), (x + place, y + length)) if upright else ((x, y + place), (x + length, y + place))
        is_outer = level == 0 and len(side.cuts) > 1
        shapes.append(Line(points=ends, color=hues[axis], width=4.0 if is_outer else 2.5))
    return shapes


def _ruler(
    side: Side, places: Sequence[tuple[float, float]], hues: dict[str, str], *, at: float, upright: bool
) -> list[Shape]:
    """Above or left of a matrix: its size, and a bar for each axis with the coordinates along it."""
    shapes: list[Shape] = []
    middle = at + (places[-1][1]) / 2
    if side.caption:
        place = (11, middle) if upright else (middle, 11)
        shapes.append(Label(at=place, text=side.caption, size=SMALL, anchor="middle", turned=upright))
    offset = 16.0
    for level, (axis, size) in enumerate(side.cuts):
        thick = _bar((axis, size), upright=upright)
        for coordinate, first, last in side.runs(level):
            start, end = at + places[first][0] + 1, at + places[last][1] - 1
            corner = (offset, start, thick, end - start) if upright else (start, offset, end - start, thick)
            shapes.append(box(*corner, fill=hues[axis]))
            center = (corner[0] + corner[2] / 2, corner[1] + corner[3] / 2 + 3.6)
            ink = _palette.on(hues[axis])
            shapes.append(Label(at=center, text=str(coordinate), size=SMALL, anchor="middle", color=ink))
        offset += thick + 3
    return shapes


def _edge(left: float, top: float, width: float, height: float, out: float, hue: str) -> Area:
    """What shows of a sheet behind another: its right and its lower edge, `out` further."""
    thick, x, y = 4, left + width + out, top + height + out
    points = (
        (x, top + out + thick), (x + thick, top + out + thick), (x + thick, y + thick),
        (left + out + thick, y + thick), (left + out + thick, y), (x, y),
    )  # fmt: skip
    return Area(points=points, fill=hue)
