"""The pipeline of a step: what its stages hold for the backward pass, what they send, and how long they idle.

Bytes and operations are those of the compiled program; how often a stage does what, and what waits in it meanwhile, is
what the schedule says, for the program is one and the same for all stages.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .._hlo import Module, work_of
from .._hlo._module import _walk as walk
from ..parallel import PP
from ..pipeline._tick import WORK, times_of
from ._collectives import Row
from ._ticks import schedule_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The stages of a step.

    Attributes:
        axis: The mesh axis whose devices are the stages.
        schedule: Its name and its numbers.
        ticks: How many there are.
        flops: Of one device in a step, in the blocks and in the two ends.
        bubble: The share of the ticks' work for which a stage waits for others, as it is done in lockstep.
        slots: Of the ring of inputs, on each stage.
        slot_bytes: Of one slot: what one microbatch sends to the next stage.
        held: By stage, the slots that are in use at once.
        sent_bytes: By one device in a step: to the next stage, to the one before, and to all of them at the two ends.
    """

    axis: str
    schedule: str
    ticks: int
    flops: float
    bubble: float
    slots: int
    slot_bytes: int
    held: tuple[int, ...]
    sent_bytes: int


def pipeline(plan: Any, module: Module, rows: Sequence[Row]) -> Pipeline | None:
    """The pipeline of a compiled step; `None` if its plan has none."""
    schedule = schedule_of(plan)
    if schedule is None:
        return None
    axis = plan.strategy(PP).axis
    times = {WORK[name]: found for name, found in times_of(schedule).items()}
    some, own = 0.0, 0.0
    for visit in walk(module.program):
        work = work_of(module.program, visit.op)
        if work is None:
            continue
        scopes = {scope for op in (*visit.callers, visit.op) for scope in module.origin(op)[0].split("/")}
        each = next((times[scope] for scope in scopes if scope in times), None)
        if each is not None:
            run = work.flops * (visit.count or 1) / schedule.num_ticks
            some, own = some + run * each[0], own + run * each[1]
    over = [row for row in rows if row.axes == (axis,) and row.depth == 1]
    steps = [row.bytes for row in over if row.kind == "collective-permute" and not row.conditional]
    ends = sum(
        (row.wire_bytes or row.bytes) * _runs(row, times, module) for row in over if row.kind != "collective-permute"
    )
    return Pipeline(
        axis=axis,
        schedule=schedule.title,
        ticks=schedule.num_ticks,
        flops=own,
        bubble=1 - own / some if some else schedule.simulate().bubble,
        slots=schedule.room,
        slot_bytes=max(steps, default=0),
        held=schedule.buffers.inputs.used,
        sent_bytes=round(sum(steps) * schedule.num_ticks + ends),
    )


def _runs(row: Row, times: dict[str, tuple[int, int]], module: Module) -> int:
    """How often a collective of the two ends runs: in the ticks that have one."""
    for computation in module.program.computations.values():
        op = computation.ops.get(row.name)
        if op is not None:
            scopes = module.origin(op)[0].split("/")
            return next((times[scope][1] for scope in scopes if scope in times), row.count or 1)
    return row.count or 1
