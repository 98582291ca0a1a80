"""The proof of a schedule: every op once, everything that it needs there in time, and a place for it until then.

What waits in a buffer, on each stage, and from which tick to which, both included:

    inputs      what came in, from its arrival (for the first part of the model: its F) until the last op that reads it,
                B or W: the backward computes the forward again from it
    gradients   what came back, from its arrival (for the last part of the model: its F, after which the loss is
                known) until its B
    deferred    what a B leaves for its W, from one to the other

Slots are given to the intervals in the order of their start, each the lowest that is free. For intervals that is
optimal: as many slots as there are ever in use at once. One program runs on all stages, so that a ring is as large as
the fullest stage needs it.
"""

import dataclasses
import heapq

from .._errors import ShardingError, listed
from ._table import KINDS, NAMES, Item, Op, Table

Interval = tuple[int, int]
"""The first and the last tick in which something waits."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """A buffer of every stage.

    Attributes:
        size: How many slots it has.
        intervals: How long each `(stage, microbatch, chunk)` is in it.
        slots: In which slot.
        used: The most slots in use at once, by stage.
    """

    size: int
    intervals: dict[Item, Interval]
    slots: dict[Item, int]
    used: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """What a schedule must keep; the head of the file says from when until when."""

    inputs: Ring
    gradients: Ring
    deferred: Ring


def check(table: Table, name: str = "schedule") -> Buffers:
    """Prove that `table` can be run, and say with which buffers.

    Raises:
        ShardingError: Every violation, naming the op, its tick, and the one it needs.
    """
    problems = _form(table) or _completeness(table) or _dependencies(table)
    if problems:
        raise ShardingError("\n".join([f"{name}: it cannot be run.", listed(problems)]))
    return buffers(table)


def buffers(table: Table) -> Buffers:
    """The buffers of a table that is right."""
    ticks = table.ticks
    inputs: dict[Item, Interval] = {}
    gradients: dict[Item, Interval] = {}
    deferred: dict[Item, Interval] = {}
    for item, forward in ticks["F"].items():
        stage, microbatch, chunk = item
        backward = ticks["B"][item]
        before, after = table.before(stage, chunk), table.after(stage, chunk)
        came = forward if before is None else ticks["F"][before[0], microbatch, before[1]] + 1
        inputs[item] = (came, ticks["W"].get(item, backward))
        returned = forward if after is None else ticks["B"][after[0], microbatch, after[1]] + 1
        gradients[item] = (returned, backward)
        if item in ticks["W"]:
            deferred[item] = (backward, ticks["W"][item])
    return Buffers(
        inputs=_ring(table.stages, inputs),
        gradients=_ring(table.stages, gradients),
        deferred=_ring(table.stages, deferred),
    )


def _ring(stages: int, intervals: dict[Item, Interval]) -> Ring:
    slots: dict[Item, int] = {}
    used = []
    for stage in range(stages):
        mine = sorted((span, item) for item, span in intervals.items() if item[0] == stage)
        free: list[int] = []
        busy: list[tuple[int, int]] = []
        made = 0
        for (first, last), item in mine:
            while busy and busy[0][0] < first:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                heapq.heappush(free, made)
                made += 1
            slots[item] = heapq.heappop(free)
            heapq.heappush(busy, (last, slots[item]))
        used.append(made)
    return Ring(size=max(used, default=0), intervals=intervals, slots=slots, used=tuple(used))


def _form(table: Table) -> list[str]:
    """What is wrong with the cells by themselves."""
    problems = []
    if not any(True for _ in table.ops()):
        return ["There is no op in it. Write at least F0 and B0 for every stage."]
    for tick, row in enumerate(table.cells):
        if len(row) != table.stages:
            problems.append(f"Tick {tick} has {len(row)} stages, tick 0 has {table.stages}.")
        for stage, cell in enumerate(row):
            kinds = [op.kind for op in cell]
            for kind in KINDS:
                if kinds.count(kind) > 1:
                    both = " and ".join(str(op) for op in cell if op.kind == kind)
                    problems.append(
                        f"Tick {tick}, stage {stage} runs {both}: a stage runs at most one {kind} in a tick. Move one "
                        "of them to another tick."
                    )
            if kinds != sorted(kinds, key=KINDS.index):
                problems.append(
                    f"Tick {tick}, stage {stage} has {' '.join(map(str, cell))}: write F before B before W, the order "
                    "in which they run."
                )
            problems += [
                f"{op} at tick {tick} on stage {stage}: microbatches and chunks count from 0."
                for op in cell
                if op.microbatch < 0 or op.chunk < 0
            ]
    return problems


def _completeness(table: Table) -> list[str]:
    """Every op once: F and B of each microbatch and chunk on every stage, W where there is one for its B."""
    problems = []
    seen: dict[tuple[int, Op], int] = {}
    for tick, stage, op in table.ops():
        if (stage, op) in seen:
            problems.append(f"{op} is on stage {stage} twice, at ticks {seen[stage, op]} and {tick}. Keep one of them.")
        seen[stage, op] = tick
    for kind in ("F", "B"):
        missing = [
            (stage, Op(kind, microbatch, chunk))
            for stage in range(table.stages)
            for chunk in range(table.chunks)
            for microbatch in range(table.microbatches)
            if (stage, Op(kind, microbatch, chunk)) not in seen
        ]
        problems += [
            f"{op}, the {NAMES[kind]} of microbatch {op.microbatch} through chunk {op.chunk}, is nowhere on stage "
            f"{stage}. The table has {table.microbatches} microbatches and {table.chunks} chunks, and each stage runs "
            "all of them."
            for stage, op in missing
        ]
    return problems


def _dependencies(table: Table) -> list[str]:
    """Everything that an op needs, in time: its own stage's in the same tick, another's a tick earlier."""
    problems = []
    for tick, stage, op in table.ops():
        for where, needed in table.needs(stage, op):
            made = table.ticks[needed.kind][where, needed.microbatch, needed.chunk]
            # F, B and W of one tick run in this order; what another part of the model made travels between ticks.
            travels = needed.kind == op.kind
            if made + travels > tick:
                owner = "its own stage" if where == stage else f"stage {where}"
                arrives = f" and arrives at tick {made + 1}" if travels else ""
                problems.append(
                    f"{op} at tick {tick} on stage {stage} needs {needed} of {owner}, which runs at tick "
                    f"{made}{arrives}. Move {op} to tick {made + travels} or later."
                )
    return problems
