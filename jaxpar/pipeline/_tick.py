"""A schedule as numbers: for each tick and stage, what to run on which microbatch and slot; what the executor reads.

-1 means: nothing. A slot is a place in a ring of `Buffers`.
"""

import dataclasses

import numpy as np

from ._schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ticks:
    """Integers by tick and stage; the last four by tick alone, the same for all stages.

    Attributes:
        arrives: The slot for the activation that came from the stage before.
        forward: The microbatch to run forward.
        forward_chunk: Through which chunk.
        forward_slot: The slot of its input.
        returns: The slot for the gradient that came from the stage after.
        backward: The microbatch to run backward.
        backward_chunk: Through which chunk.
        backward_slot: The slot of its input.
        gradient_slot: The slot of its gradient.
        enters: The microbatch that the first part of the model takes in.
        enters_slot: The slot for it on the first stage.
        leaves: The microbatch whose result the last part of the model gives to the loss.
        leaves_slot: The slot for its gradient on the last stage.
        done: The microbatch whose gradient leaves the first part of the model.
    """

    arrives: np.ndarray
    forward: np.ndarray
    forward_chunk: np.ndarray
    forward_slot: np.ndarray
    returns: np.ndarray
    backward: np.ndarray
    backward_chunk: np.ndarray
    backward_slot: np.ndarray
    gradient_slot: np.ndarray
    enters: np.ndarray
    enters_slot: np.ndarray
    leaves: np.ndarray
    leaves_slot: np.ndarray
    done: np.ndarray


BY_STAGE = (
    "arrives", "forward", "forward_chunk", "forward_slot", "returns", "backward", "backward_chunk", "backward_slot",
    "gradient_slot",
)  # fmt: skip


WORK = {each: f"pipeline_{each}" for each in ("enters", "forward", "leaves", "backward", "done")}
"""What a tick may do, each under a condition, and the scope in the compiled program that its operations are in."""


def times_of(schedule: Schedule) -> dict[str, tuple[int, int]]:
    """For each piece of `WORK`: in how many ticks some stage does it, and in how many each stage.

    With the loss and the embedding no stage waits for another: all do their part of them.
    """
    ticks = ticks_of(schedule)
    found = {}
    for name in WORK:
        does = getattr(ticks, name) >= 0
        some = int(does.any(axis=1).sum() if does.ndim > 1 else does.sum())
        found[name] = (some, int(does[:, 0].sum()) if does.ndim > 1 else some)
    return found


def ticks_of(schedule: Schedule) -> Ticks:
    """The numbers of a schedule of forwards and whole backwards."""
    each = {name: np.full((schedule.num_ticks, schedule.stages), -1, np.int32) for name in BY_STAGE}
    alone = ("enters", "enters_slot", "leaves", "leaves_slot", "done")
    shared = {name: np.full(schedule.num_ticks, -1, np.int32) for name in alone}
    inputs, gradients = schedule.buffers.inputs, schedule.buffers.gradients
    for tick, stage, op in schedule.ops():
        item = (stage, op.microbatch, op.chunk)
        is_first = schedule.before(stage, op.chunk) is None
        is_last = schedule.after(stage, op.chunk) is None
        if op.kind == "F":
            each["forward"][tick, stage] = op.microbatch
            each["forward_chunk"][tick, stage] = op.chunk
            each["forward_slot"][tick, stage] = inputs.slots[item]
            if is_first:
                shared["enters"][tick], shared["enters_slot"][tick] = op.microbatch, inputs.slots[item]
            else:
                each["arrives"][inputs.intervals[item][0], stage] = inputs.slots[item]
        else:
            each["backward"][tick, stage] = op.microbatch
            each["backward_chunk"][tick, stage] = op.chunk
            each["backward_slot"][tick, stage] = inputs.slots[item]
            each["gradient_slot"][tick, stage] = gradients.slots[item]
            came = gradients.intervals[item][0]
            if is_last:
                shared["leaves"][came], shared["leaves_slot"][came] = op.microbatch, gradients.slots[item]
            else:
                each["returns"][came, stage] = gradients.slots[item]
            if is_first:
                shared["done"][tick] = op.microbatch
    return Ticks(**each, **shared)
