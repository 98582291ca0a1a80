"""Reductions that are repeated, and then added up, though one of the sum would do: by a loop, or one written out."""

import collections
import dataclasses
from collections.abc import Iterator

from .._hlo import Collective
from .._hlo._text import Op
from .._hlo._values import trip_count
from ._evidence import SLIGHT, Evidence, Transfer, are, counted, elementwise, named, severity, share_of
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


def reductions_added_up(seen: Evidence) -> Iterator[Finding]:
    """The same of a loop that is written out: gradients of one parameter, each reduced, that are only added up.

    What tells them from sums of different things, as of a table that is used at both ends of a model, is that one line
    of the model made them all.
    """
    groups: dict[tuple[tuple[str, ...], int], list[list[_Term]]] = {}
    for terms in _sums(seen):
        if len(terms) > 1:
            groups.setdefault((terms[0].tensor.axes, len(terms)), []).append(terms)
    for (axes, times), found in groups.items():
        terms = [term for terms in found for term in terms]
        moved = sum(term.tensor.bytes * (term.tensor.count or 1) for term in terms)
        transfers = list({id(term.transfer): term.transfer for term in terms}.values())
        part = moved / max(sum(each.total_bytes for each in transfers), 1)  # of transfers that move other things too
        share = seen.share(transfers, part * (1 - 1 / times))
        if share < SLIGHT:
            continue
        largest = max(found, key=lambda terms: terms[0].tensor.bytes)[0]
        yield Finding(
            kind="reduction-in-loop",
            severity=severity(share),
            reason=(
                f"{counted(len(found), 'gradient')} {are(len(found))} summed over {named(axes)} {times} times a step, "
                f"and what comes of it is only added up: {size_text(moved)} a step and device, where "
                f"{size_text(moved / times)} for the sum would do. That is {share:.0%} of {share_of(seen, transfers)}."
            ),
            place=seen.place(largest.transfer, largest.tensor),
            remedy=(
                f"If these are microbatches, accumulate with jp.value_and_grad(loss, accumulate={times}) in a step of "
                f"plan.jit, which reduces over {named(axes)} once a step. If one matrix is used {times} times, or in a "
                "loop of your own, let each replica keep its sum and reduce that: jax.shard_map around the gradient, "
                "with one jax.lax.psum at its end."
            ),
            seconds=sum(map(seen.seconds, transfers)) * part * (1 - 1 / times),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Term:
    """A reduced array that goes into a sum, and into nothing else; `adds`: the additions that it is part of."""

    transfer: Transfer
    tensor: Collective
    adds: frozenset[Value]


def _sums(seen: Evidence) -> list[list[_Term]]:
    """Reduced arrays by what they are added up to, where the sum goes to the parameters."""
    alike: dict[object, list[_Term]] = collections.defaultdict(list)
    for transfer in seen.transfers:
        for index, tensor in enumerate(transfer.tensors):
            if tensor.kind != "all-reduce" or not tensor.shape:
                continue
            part = index if len(transfer.tensors) > 1 else None
            adds = _additions(seen, Value(transfer.op.computation, transfer.op.name, part))
            if adds:
                origin = seen.paths.of(tensor.op_name)
                key = (tensor.axes, tensor.shape, tensor.count, origin.path, origin.primitive, tensor.source)
                alike[key].append(_Term(transfer=transfer, tensor=tensor, adds=adds))
    return [terms for each in alike.values() for terms in _joined(each)]


def _additions(seen: Evidence, start: Value) -> frozenset[Value]:
    """All additions that a value goes into, one after the other; none if it, or its sum, is no update's alone."""
    found: set[Value] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        trail = seen.flow.follow(value, _scaled)
        if trail.outputs or not trail.uses or any(op.opcode != "add" for op, _ in trail.uses):
            continue  # the sum itself: whatever is made of it
        sums = {Value(op.computation, op.name) for op, _ in trail.uses}
        waiting += sums - found
        found |= sums
    return frozenset(each for each in found if seen.flow.follow(each, elementwise(0)).outputs)


def _joined(terms: list[_Term]) -> list[list[_Term]]:
    """Terms that meet in an addition, together."""
    groups: list[list[_Term]] = []
    for term in terms:
        met = [group for group in groups if any(term.adds & other.adds for other in group)]
        groups = [group for group in groups if group not in met]
        groups.append([*(other for group in met for other in group), term])
    return groups


def _scaled(op: Op, index: int) -> bool:
    """Follow an array through what may as well be done to its sum with others."""
    is_square = op.opcode == "multiply" and len(set(op.operands)) == 1
    is_scale = op.opcode in ("negate", "multiply") or (op.opcode == "divide" and index == 0)
    return reshaped(op, index) or (is_scale and not is_square)


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
