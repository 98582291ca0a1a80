"""Reductions that a loop repeats though one after it would do."""

from collections.abc import Iterator

from .._hlo._text import Op
from .._hlo._values import trip_count
from ._evidence import SLIGHT, Evidence, Transfer, are, counted, named, severity, share_of
from ._finding import Finding
from ._flow import Value, reshaped
from ._units import size_text


def reductions_in_loops(seen: Evidence) -> Iterator[Finding]:
    """All-reduces whose sum over a loop is all that is wanted of them: one, after the loop, would do.

    A reduce-scatter in a loop is FSDP's or ZeRO(2)'s choice, a sharded accumulator, and no fault. Nor is an all-reduce
    that the next round of the loop computes with.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Transfer]] = {}
    for transfer in seen.transfers:
        loop = _accumulated_in(seen, transfer)
        if loop:
            groups.setdefault((loop, transfer.first.axes), []).append(transfer)
    for (loop, axes), found in groups.items():
        trips = trip_count(seen.module.program, seen.flow.by_name[loop]) or 1
        share = seen.share(found, 1 - 1 / trips)
        if trips < 2 or share < SLIGHT:
            continue
        moved = sum(each.total_bytes for each in found)
        tensors = [tensor for each in found for tensor in each.tensors]
        yield Finding(
            kind="reduction-in-loop",
            severity=severity(share),
            reason=(
                f"{counted(len(tensors), 'sum')} over {named(axes)} {are(len(tensors))} taken in each of {trips} "
                f"rounds of a loop that only adds them up: {size_text(moved)} a step and device, where "
                f"{size_text(moved / trips)} after the loop would do. That is {share:.0%} of {share_of(seen, found)}."
            ),
            place=seen.place(max(found, key=lambda each: each.total_bytes)),
            remedy=(
                f"Accumulate with jp.value_and_grad(loss, accumulate={trips}) in a step of plan.jit, which reduces "
                f"over {named(axes)} once a step; in a loop of your own, let each replica keep its sum (jax.shard_map "
                "around the loop, or a leading replica dim) and reduce it after the loop."
            ),
            seconds=sum(map(seen.seconds, found)) * (1 - 1 / trips),
        )


def _accumulated_in(seen: Evidence, transfer: Transfer) -> str:
    """The loop that adds up what an all-reduce gives and does nothing else with it; `""` if there is none.

    A combined all-reduce counts if its largest tensor is added up.
    """
    first = transfer.first
    if first.kind != "all-reduce" or not first.depth or not first.shape:
        return ""
    part = transfer.tensors.index(first) if len(transfer.tensors) > 1 else None
    trail = seen.flow.follow(Value(transfer.op.computation, transfer.op.name, part), _linear(seen))
    for op, index in trail.uses:
        loop = _accumulator(seen, op, 1 - index) if op.opcode == "add" else None
        if loop is not None:
            return loop.name
    return ""


def _linear(seen: Evidence):  # noqa: ANN202
    """Follow a sum through what may as well be done after summing over the rounds of a loop."""

    def through(op: Op, index: int) -> bool:
        if op.opcode in ("add", "subtract"):
            return len(op.operands) == 2 and _accumulator(seen, op, 1 - index) is None
        if op.opcode == "dynamic-update-slice":
            return index < 2
        if op.opcode == "divide":
            return index == 0
        return reshaped(op, index) or op.opcode in (
            "negate",
            "multiply",
            "slice",
            "dynamic-slice",
            "pad",
            "concatenate",
        )

    return through


def _accumulator(seen: Evidence, add: Op, index: int) -> Op | None:
    """The loop of which the operand of `add` is a variable that is used for nothing else and becomes its result."""
    variable, first = _variable(seen, Value(add.computation, add.operands[index]))
    loop = seen.flow.loop_of(variable)
    if loop is None:
        return None
    read = seen.flow.follow(variable, lambda op, place: op is first or reshaped(op, place))
    others = [op for op, _ in read.uses if op is not add]
    becomes = variable in seen.flow.follow(Value(add.computation, add.name), reshaped).values
    return loop if becomes and not others else None


def _variable(seen: Evidence, value: Value) -> tuple[Value, Op | None]:
    """The loop variable that `value` is, and the `select` that it comes through, if any.

    XLA:TPU sinks a sum's first value into the loop (WhileLoopFusibleSinking): `select(first round, 0, variable)`.
    """
    found = seen.flow.back(value)
    op = seen.flow.program.op((found.computation, found.name))
    for operand in op.operands[1:] if op is not None and op.opcode == "select" else ():
        behind = seen.flow.back(Value(found.computation, operand))
        if seen.flow.loop_of(behind) is not None:
            return behind, op
    return found, None
