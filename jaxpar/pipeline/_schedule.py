"""`Schedule`: a table that was proven, with its name; what users make, read, time, draw and save."""

import dataclasses
import functools as ft
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, Self

from .._drawing import Drawing
from ._check import Buffers, buffers, check
from ._csv import from_csv, ops_of, to_csv
from ._gantt import as_text, draw
from ._named import in_order, most_held, named
from ._simulate import Simulation, simulate
from ._table import Table


def schedule(name: str, *, stages: int, microbatches: int, chunks: int = 1) -> "Schedule":
    """A pipeline schedule by its name.

    Args:
        name: `"gpipe"`: all forwards, then all backwards; holds all microbatches. `"1f1b"`: each backward as soon as
            it can be; the same time, and holds 2 · stages - 1 microbatches at most. `"zb-h1"`: as 1f1b, with the
            gradients of weights apart and later, where they fill bubbles.
        stages: Devices along the axis `pipe`.
        microbatches: Parts of a batch; bubbles take (stages - 1) / (chunks · microbatches + stages - 1) of the time
            (`"gpipe"` and `"1f1b"`).
        chunks: Parts of the model on each stage. With 2 or more, `"gpipe"` is the circular or breadth-first schedule
            and `"1f1b"` the interleaved one: as many times less bubble, for as many times more transfers.

    Raises:
        ShardingError: No schedule of that name, a number below 1, or chunks where it has none.

    Example:
        >>> print(jp.schedule("1f1b", stages=2, microbatches=4))
        1f1b: 2 stages, 4 microbatches, 6 ticks
        tick     0   1   2   3   4   5
        stage 0  F0  F1  F2  F3  ·   ·
                 ·   ·   B0  B1  B2  B3
        stage 1  ·   F0  F1  F2  F3  ·
                 ·   B0  B1  B2  B3  ·
    """
    return Schedule(named(name, stages=stages, microbatches=microbatches, chunks=chunks).cells, name)


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule(Table):
    """Which stage runs what at which tick, proven to be right. Made by `jp.schedule`, from a file, or from orders.

    The last line of a notebook cell shows it as a chart; `print` shows its table.

    Attributes:
        cells: By tick and stage, what runs there.
        name: For titles and messages.

    Raises:
        ShardingError: It cannot be run: an op that is missing, twice, or before what it needs; names all of them, each
            with its tick and the op that it needs.

    Example:
        >>> schedule = jp.schedule("1f1b", stages=4, microbatches=8)
        >>> schedule.buffers.inputs.size, schedule.simulate().time
        (7, 33.0)
    """

    name: str = "schedule"

    def __post_init__(self) -> None:
        check(self, self.name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A schedule of your own from a CSV file, as `save` writes it.

        Raises:
            ShardingError: The file is not of this form, or the schedule cannot be run.
        """
        path = pathlib.Path(path)
        return cls(from_csv(path.read_text(encoding="utf-8"), str(path)).cells, path.name)

    @classmethod
    def of_orders(cls, orders: Sequence[str], name: str = "schedule") -> Self:
        """A schedule from what each stage runs one after another: an op a tick, each as early as it can be.

        Args:
            orders: One for each stage, as `"F0 F1 B0 B1"`.
            name: For titles and messages.

        Raises:
            ShardingError: A word is no op, or stages wait for one another for ever.

        Example:
            >>> jp.Schedule.of_orders(["F0 F1 B0 B1", "F0 B0 F1 B1"]).num_ticks
            6
        """
        return cls(
            in_order([ops_of(order, f"{name}, stage {stage}") for stage, order in enumerate(orders)]).cells, name
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV: a row for each tick, a column for each stage."""
        pathlib.Path(path).write_text(to_csv(self), encoding="utf-8")

    @ft.cached_property
    def buffers(self) -> Buffers:
        """What each stage must keep from when until when, and the sizes of the rings that hold it."""
        return buffers(self)

    @property
    def room(self) -> int:
        """Slots for inputs that a stage sets aside: those it uses, and of `"1f1b"` as many as it ever uses.

        So that a step that fits goes on to fit with more microbatches. With less than that `"gpipe"` takes as long, and
        holds no more.
        """
        used = self.buffers.inputs.size
        return max(used, most_held(self.stages, self.chunks)) if self.name == "1f1b" else used

    def simulate(
        self,
        *,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        transfer: float = 0.0,
        clock: Literal["ticks", "stages"] = "ticks",
    ) -> Simulation:
        """How long it takes, how much of that is bubble, and how many activations each stage holds.

        Args:
            forward: The time of one microbatch's forward through one device's share of the model.
            backward: Of the gradient of its input; what is computed again counts here.
            weight: Of the gradient of its weights.
            transfer: Of moving one activation or gradient to a neighbour, not hidden by computation.
            clock: `"ticks"`: one program on all devices, in which each tick ends with a transfer to both neighbours.
                `"stages"`: a program for each stage, which waits only for what its next op needs.

        Raises:
            ShardingError: A negative time, or no time at all.

        Example:
            >>> split = jp.schedule("zb-h1", stages=4, microbatches=8)
            >>> split.simulate().time, split.simulate(clock="stages").time
            (30.0, 27.0)
        """
        return simulate(self, forward=forward, backward=backward, weight=weight, transfer=transfer, clock=clock)

    def draw(
        self,
        *,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        transfer: float = 0.0,
        clock: Literal["ticks", "stages"] = "ticks",
    ) -> Drawing:
        """The chart of the stages over time, for costs as in `simulate`; `.save("chart.svg")` writes it."""
        found = self.simulate(forward=forward, backward=backward, weight=weight, transfer=transfer, clock=clock)
        return draw(self, found, self.title)

    @property
    def title(self) -> str:
        """Its name and its numbers."""
        parts = [f"{self.stages} stages", f"{self.microbatches} microbatches"]
        if self.chunks > 1:
            parts.append(f"{self.chunks} chunks")
        return f"{self.name}: {', '.join(parts)}, {self.num_ticks} ticks"

    def __str__(self) -> str:
        return "\n".join([self.title, *as_text(self)])

    def __repr__(self) -> str:
        return f"Schedule({self.title})"

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.draw()._repr_mimebundle_(**options)
