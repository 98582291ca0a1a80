"""How much memory an array takes where its layout says it lies: TPU tiles pad it, and not every array is in HBM.

A layout is written after the dims: `{2,1,0:T(8,128)(2,1)S(1)}`. First the dims from minor to major, then tiles (the
minor dims are padded to whole ones), then the memory space. `(2,1)` packs two rows of 16 bits in one of 32, which pads
nothing more.
"""

import dataclasses
import functools as ft
import math
import re

from ._text import Shape

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces of a TPU that hold arrays; others hold semaphores and scalars."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One array as it is stored.

    Attributes:
        shape: Of the array.
        bytes: With padding.
        space: The memory it lies in, `HBM` unless its layout says so.
    """

    shape: Shape
    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """The arrays of a result's type: one, or a tuple of trees."""

    array: Stored | None
    parts: tuple["Tree", ...] = ()

    @ft.cached_property
    def leaves(self) -> tuple[Stored, ...]:
        """All arrays in order."""
        return (self.array,) if self.array is not None else tuple(leaf for part in self.parts for leaf in part.leaves)

    def range_of(self, index: int) -> range:
        """Which leaves part `index` of a tuple has; none where there is no such part."""
        if not 0 <= index < len(self.parts):
            return range(0)
        before = sum(len(part.leaves) for part in self.parts[:index])
        return range(before, before + len(self.parts[index].leaves))


@ft.lru_cache(maxsize=65536)
def tree_of(result: str) -> Tree:
    """The type written in `result`; what cannot be read is an array of no bytes."""
    stack: list[list[Tree]] = [[]]
    for token in _TOKEN.finditer(result):
        mark = token.group()
        if mark == "(":
            stack.append([])
        elif mark == ")":
            if len(stack) > 1:
                parts = stack.pop()
                stack[-1].append(Tree(None, tuple(parts)))
        else:
            stack[-1].append(Tree(_stored(*token.groups())))
    while len(stack) > 1:  # the text was cut
        parts = stack.pop()
        stack[-1].append(Tree(None, tuple(parts)))
    return stack[0][0] if len(stack[0]) == 1 else Tree(None, tuple(stack[0]))


_TOKEN = re.compile(r"[()]|\b([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?|\btoken\b|\bopaque\b")
_TILE = re.compile(r"\(([\d,*]*)\)")


def _stored(dtype: str | None, dims: str | None, layout: str | None) -> Stored:
    if dtype is None:
        return Stored(shape=Shape(dtype="token", dims=()), bytes=0, space=HBM)
    sizes = tuple(int(size) for part in (dims or "").split(",") if (size := part.strip().lstrip("<=")).isdigit())
    shape = Shape(dtype=dtype, dims=sizes)
    order, _, rest = (layout or "").partition(":")
    space = re.search(r"S\((\d+)\)", rest)
    tiles = re.search(r"T((?:\([\d,*]*\))+)", rest)
    padded = _padded(sizes, order, tiles.group(1)) if tiles else shape.size
    num_bytes = shape.bytes if padded == shape.size else -(-padded * shape.bytes // max(shape.size, 1))
    return Stored(shape=shape, bytes=num_bytes, space=int(space.group(1)) if space else HBM)


def _padded(sizes: tuple[int, ...], order: str, tiles: str) -> int:
    """Elements with the padding that the first, largest tile asks for."""
    minor_to_major = [int(part) for part in order.split(",") if part.strip().isdigit()]
    if sorted(minor_to_major) != list(range(len(sizes))):
        minor_to_major = list(range(len(sizes) - 1, -1, -1))
    tile = [int(part) for part in _TILE.findall(tiles)[0].split(",") if part.isdigit()]
    ordered = [sizes[dim] for dim in reversed(minor_to_major)]  # major to minor
    ordered = [1] * (len(tile) - len(ordered)) + ordered
    for back, size in enumerate(reversed(tile), start=1):
        if size > 0:
            ordered[-back] = -(-ordered[-back] // size) * size
    return math.prod(ordered)
