"""A matrix as the tiles it is cut into, and which devices hold each: one model for every picture, drawn or in text.

A side of the matrix is cut by axes, outermost first; what is too many to show is folded, with the first parts and the
last one kept. Axes that cut nothing make copies. A mesh is drawn as the same thing: every device a tile.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Cut = tuple[str, int]
"""An axis, and its size."""

Part = tuple[int | None, ...]
"""Which part of a side: a coordinate for each cut, outermost first. `None`, always last: the parts that are folded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a matrix.

    Attributes:
        caption: Its size, and how it comes about: `64 = fsdp 4 × 16`.
        cuts: The axes that cut it, outermost first.
        most: About how many parts to show.
        length: How long it is drawn, relative to the other side.
    """

    caption: str
    cuts: tuple[Cut, ...] = ()
    most: int
    length: float = 1.0

    def parts(self) -> list[Part]:
        """The parts to show, in order."""
        shown: list[list[int | None]] = [list(range(size)) for _, size in self.cuts]
        for keep in (5, 3):
            for level in sorted(range(len(shown)), key=lambda level: -len(shown[level])):
                if math.prod(map(len, shown)) > self.most and len(shown[level]) > keep + 1:
                    shown[level] = [*range(keep - 1), None, self.cuts[level][1] - 1]
        return list(dict.fromkeys(tuple(_until_fold(part)) for part in itertools.product(*shown)))

    def runs(self, level: int) -> list[tuple[int, int, int]]:
        """`(coordinate, first, last)` of each part of the cut at `level`, as places in `parts()`."""
        runs = []
        for key, group in itertools.groupby(enumerate(self.parts()), key=lambda item: item[1][: level + 1]):
            places = [place for place, _ in group]
            if len(key) > level and key[-1] is not None:
                runs.append((key[-1], places[0], places[-1]))
        return runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A matrix in tiles.

    Attributes:
        rows: Its side from top to bottom.
        columns: Its side from left to right.
        copies: The axes that cut neither, each with its size.
        first: The axes that cut what is not drawn; a tile is that of the first device along them.
        ids: The number of each device, in the shape of the mesh.
        axes: The axes of the mesh.
    """

    rows: Side
    columns: Side
    copies: tuple[Cut, ...]
    ids: np.ndarray
    axes: tuple[str, ...]
    first: tuple[str, ...] = ()

    @property
    def num_copies(self) -> int:
        """How many devices hold each tile."""
        return math.prod(size for _, size in self.copies)

    def holders(self, row: Part, column: Part) -> list[int]:
        """The devices that hold a tile, in the order of the mesh; none for folded ones."""
        if None in row or None in column:
            return []
        cuts = [axis for axis, _ in (*self.rows.cuts, *self.columns.cuts)]
        at: dict[str, Any] = dict(zip(cuts, (*row, *column), strict=True)) | dict.fromkeys(self.first, 0)
        return np.ravel(self.ids[tuple(at.get(axis, slice(None)) for axis in self.axes)]).tolist()

    def copies_text(self) -> str:
        """How often the whole is there."""
        if not self.copies:
            return ""
        return f"{self.num_copies} copies: {' × '.join(f'{axis} {size}' for axis, size in self.copies)}"


def names(ids: list[int]) -> Iterator[str]:
    """Ways to write a list of devices, the fullest first: `0, 2, 4, 6`; `0, 2, … 6`; `0 +3`."""
    if len(ids) > 2 and ids == list(range(ids[0], ids[0] + len(ids))):
        yield f"{ids[0]}–{ids[-1]}"
    elif len(ids) <= 8:
        yield ", ".join(map(str, ids))
    if len(ids) > 3:
        yield f"{ids[0]}, {ids[1]}, … {ids[-1]}"
    if len(ids) > 1:
        yield f"{ids[0]} +{len(ids) - 1}"


def as_text(grid: Grid) -> list[str]:
    """The tiles as lines of text, in a frame."""
    rows, columns = grid.rows.parts(), grid.columns.parts()
    room = 24 if len(columns) <= 3 else 14
    cells = [[_cell(grid, row, column, room) for column in columns] for row in rows]
    width = max(len(cell) for line in cells for cell in line)
    rule = "─" * (width + 2)
    lines = ["┌" + "┬".join([rule] * len(columns)) + "┐"]
    for place, line in enumerate(cells):
        lines.append("│" + "│".join(f" {cell.center(width)} " for cell in line) + "│")
        if place < len(cells) - 1 and len(cells) <= 4:
            lines.append("├" + "┼".join([rule] * len(columns)) + "┤")
    return [*lines, "└" + "┴".join([rule] * len(columns)) + "┘"]


def _until_fold(part: tuple[int | None, ...]) -> Part:
    return part[: part.index(None) + 1] if None in part else part


def _cell(grid: Grid, row: Part, column: Part, room: int) -> str:
    ids = grid.holders(row, column)
    return next((name for name in names(ids) if len(name) <= room), "") if ids else "⋮" if None in row else "⋯"
