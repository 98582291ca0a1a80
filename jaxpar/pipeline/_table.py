"""A schedule as data: which stage runs what at which tick.

    tick   stage 0    stage 1       F2     forward of microbatch 2
    0      F0                       F2.1   of its chunk 1, where a stage holds several
    1      F1         F0 B0         B0     backward; where there is a W0 too, only what the stage before waits for
    2      F2 B0      F1 B1         W0     the gradient of the weights
    3      B1         F2 B2

A stage is a device along the axis `pipe`. With `chunks`, the model is cut into stages × chunks parts, and part
`chunk * stages + stage` lies on that stage: the last stage sends to the first one, which goes on with the next chunk.
In a tick a stage runs at most one F, one B and one W, in this order; between ticks what it made moves to its
neighbours, so that they have it one tick later. Gaps are bubbles.
"""

import dataclasses
import functools as ft
from collections.abc import Iterator
from typing import Literal

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")
"""Forward, backward, weight gradient: the order within a tick."""

NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "W": "weight gradient"}


@dataclasses.dataclass(frozen=True, order=True)
class Op:
    """One piece of work: the forward, backward or weight gradient of a microbatch through a chunk."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Cell = tuple[Op, ...]
"""What a stage runs in one tick; empty in a bubble."""

Item = tuple[int, int, int]
"""A stage, a microbatch and a chunk: what has one forward and one backward."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells by tick and stage; every tick has as many cells as there are stages."""

    cells: tuple[tuple[Cell, ...], ...]

    @property
    def num_ticks(self) -> int:
        """How many ticks there are."""
        return len(self.cells)

    @ft.cached_property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.cells[0]) if self.cells else 0

    @ft.cached_property
    def microbatches(self) -> int:
        """How many microbatches there are."""
        return 1 + max((op.microbatch for _, _, op in self.ops()), default=-1)

    @ft.cached_property
    def chunks(self) -> int:
        """How many chunks a stage holds."""
        return 1 + max((op.chunk for _, _, op in self.ops()), default=0)

    def ops(self) -> Iterator[tuple[int, int, Op]]:
        """Every `(tick, stage, op)`, in the order of the ticks."""
        for tick, row in enumerate(self.cells):
            for stage, cell in enumerate(row):
                for op in cell:
                    yield tick, stage, op

    @ft.cached_property
    def ticks(self) -> dict[str, dict[Item, int]]:
        """By kind, the tick of each `(stage, microbatch, chunk)`."""
        found: dict[str, dict[Item, int]] = {kind: {} for kind in KINDS}
        for tick, stage, op in self.ops():
            found[op.kind][stage, op.microbatch, op.chunk] = tick
        return found

    @property
    def splits_backward(self) -> bool:
        """Whether some weight gradients are computed apart from the backward."""
        return bool(self.ticks["W"])

    def before(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """The stage and the chunk that feed this one; `None` for the first part of the model."""
        if stage:
            return stage - 1, chunk
        return (self.stages - 1, chunk - 1) if chunk else None

    def after(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """The stage and the chunk that this one feeds; `None` for the last part of the model."""
        if stage < self.stages - 1:
            return stage + 1, chunk
        return (0, chunk + 1) if chunk < self.chunks - 1 else None

    def needs(self, stage: int, op: Op) -> list[tuple[int, Op]]:
        """What must have run before `op` on `stage`: `(stage, op)` each, what comes from its own stage first."""
        made_from: dict[Kind, Kind] = {"B": "F", "W": "B"}
        own = made_from.get(op.kind)
        found = [] if own is None else [(stage, dataclasses.replace(op, kind=own))]
        around = {"F": self.before, "B": self.after}.get(op.kind)
        source = None if around is None else around(stage, op.chunk)
        return found if source is None else [*found, (source[0], dataclasses.replace(op, chunk=source[1]))]
