"""What a schedule costs: when each stage runs what, its bubbles, and how many activations it holds.

Two clocks. In one program for all devices (`"ticks"`, what runs here) both neighbours' permutes end a tick, so that a
stage starts the next one when itself and both neighbours are done. With a program for each stage (`"stages"`, as
other frameworks run pipelines) a stage waits only for what its next op needs. Where transfers take no time, the two
clocks agree for all named schedules but `zb-h1`.

Costs are those of one microbatch through one device's whole share, all its chunks: F, B, W as in the literature.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from .._errors import ShardingError
from ._table import Op, Table


@dataclasses.dataclass(frozen=True, order=True)
class Span:
    """An op in time, on its stage."""

    start: float
    end: float
    op: Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a schedule costs, in the unit of the costs it was given.

    Attributes:
        time: From the first op to the end of the last.
        bubble: The part of it in which a device idles, on average: idle / total.
        idle: The time that it idles.
        peak: By stage, the most activations it holds at once, in microbatches through a device's whole share: from
            the F of a microbatch and chunk until its last op.
        spans: By stage, what it runs when.
    """

    time: float
    bubble: float
    idle: float
    peak: tuple[float, ...]
    spans: tuple[tuple[Span, ...], ...]


def simulate(
    table: Table,
    *,
    forward: float,
    backward: float,
    weight: float,
    transfer: float,
    clock: Literal["ticks", "stages"],
) -> Simulation:
    """Run a table that can be run.

    Args:
        table: The schedule.
        forward: F, the time of one forward.
        backward: B, of the gradient of the input; what it computes again counts here.
        weight: W, of the gradient of the weights.
        transfer: The time that one activation or gradient takes to a neighbour, not hidden by computation.
        clock: Who waits for whom; see the head of the file.

    Raises:
        ShardingError: A negative cost, no cost at all, or another clock.
    """
    costs = {"forward": forward, "backward": backward, "weight": weight, "transfer": transfer}
    for name, value in costs.items():
        if value < 0:
            raise ShardingError(f"simulate: {name} is {value}. Times are not negative.")
    if not forward + backward + weight > 0:
        raise ShardingError("simulate: forward, backward and weight are all 0. Give one of them a time.")
    if clock not in ("ticks", "stages"):
        raise ShardingError(f"simulate: clock={clock!r}. Use 'ticks' (one program) or 'stages' (a program for each).")

    def cost(stage: int, op: Op) -> float:
        item = (stage, op.microbatch, op.chunk)
        whole = weight if op.kind == "B" and item not in table.ticks["W"] else 0.0
        return ({"F": forward, "B": backward, "W": weight}[op.kind] + whole) / table.chunks

    spans = (_in_step if clock == "ticks" else _apart)(table, cost, transfer)
    time = max(span.end for stage in spans for span in stage)
    work = sum(span.end - span.start for stage in spans for span in stage) / table.stages
    return Simulation(
        time=time, bubble=1 - work / time, idle=time - work, peak=_peak(table), spans=tuple(map(tuple, spans))
    )


def _in_step(table: Table, cost: Callable[[int, Op], float], transfer: float) -> list[list[Span]]:
    spans: list[list[Span]] = [[] for _ in range(table.stages)]
    ends = [0.0] * table.stages
    for tick, row in enumerate(table.cells):
        if tick and table.stages > 1:
            around = [max(ends[stage - 1], ends[(stage + 1) % table.stages]) for stage in range(table.stages)]
            ends = [max(own, other + transfer) for own, other in zip(ends, around, strict=True)]
        for stage, cell in enumerate(row):
            for op in cell:
                spans[stage].append(Span(ends[stage], ends[stage] + cost(stage, op), op))
                ends[stage] = spans[stage][-1].end
    return spans


def _apart(table: Table, cost: Callable[[int, Op], float], transfer: float) -> list[list[Span]]:
    spans: list[list[Span]] = [[] for _ in range(table.stages)]
    ends = [0.0] * table.stages
    done: dict[tuple[int, Op], float] = {}
    for _, stage, op in table.ops():
        # Ticks are in the order of need, so that what an op needs is done.
        needs = [done[where, need] + (transfer if where != stage else 0.0) for where, need in table.needs(stage, op)]
        start = max([ends[stage], *needs])
        ends[stage] = done[stage, op] = start + cost(stage, op)
        spans[stage].append(Span(start, ends[stage], op))
    return spans


def _peak(table: Table) -> tuple[float, ...]:
    held, most = [0] * table.stages, [0] * table.stages
    for _, stage, op in table.ops():
        item = (stage, op.microbatch, op.chunk)
        last = "W" if item in table.ticks["W"] else "B"
        held[stage] += (op.kind == "F") - (op.kind == last)
        most[stage] = max(most[stage], held[stage])
    return tuple(number / table.chunks for number in most)
