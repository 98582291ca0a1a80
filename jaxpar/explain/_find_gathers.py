"""What is gathered, or laid out anew, that need not be."""

import re
from collections.abc import Iterator

from .._hlo._text import Op
from .._hlo._values import depends_on_device, slices_kept
from .._hlo._varying import BATCH, bits_of
from ._evidence import SLIGHT, Evidence, Transfer, a, at, counted, named, severity, shape_of, share_of
from ._finding import Finding
from ._flow import Value, reshaped
from ._units import size_text


def gathered_whole(seen: Evidence) -> Iterator[Finding]:
    """Optimiser state that is gathered, and stacks of layers that are gathered at once rather than layer by layer."""
    for number, trail in seen.whole.items():
        leaf = seen.arguments[number]
        for transfer in (seen.transfer_of.get(op.name) for op, _ in trail.uses):
            if transfer is None or transfer.first.kind != "all-gather" or seen.share([transfer]) < SLIGHT:
                continue
            size, axes = size_text(transfer.bytes), named(transfer.first.axes)
            if leaf.kind == "optimizer":
                reason = (
                    f"{leaf.path} is optimiser state, split over {axes}, and is gathered whole: {size} on each device. "
                    "An update needs only the piece that a device owns."
                )
                remedy = (
                    "Give the optimiser gradients that are split as its state is: jp.value_and_grad in a step of "
                    "plan.jit does; in plain JAX, jax.lax.with_sharding_constraint(grads, shardings_of_the_state) "
                    "before the update."
                )
            elif _is_cut_into_layers(seen, transfer):
                reason = (
                    f"{leaf.path} stacks layers, and all of them are gathered over {axes} at once, {size} on each "
                    "device, for a loop that reads one at a time."
                )
                remedy = (
                    'Gather one layer at a time: jp.FSDP(blocks="blocks.*"); in plain JAX, split another dim than the '
                    "first, P(None, axis), and constrain the layer to P() inside the body of the scan."
                )
            else:
                continue
            yield Finding(
                kind="gathered-whole",
                severity=severity(seen.share([transfer])),
                reason=reason,
                place=seen.place(transfer),
                remedy=remedy,
                seconds=seen.seconds(transfer),
                bytes=transfer.bytes,
            )


def rematerialised(seen: Evidence) -> Iterator[Finding]:
    """Arrays gathered whole only to be cut again: two shardings between which the partitioner knows no other way."""
    shown: set[str] = set()
    for transfer in seen.transfers:
        if transfer.first.kind != "all-gather" or seen.share([transfer]) < SLIGHT:
            continue
        several = len(transfer.tensors) > 1
        cuts = [
            cut
            for index in range(len(transfer.tensors))
            for cut in slices_kept(seen.module.program, _done(seen, transfer.op), index if several else None)
        ]
        if not cuts or not all(_takes_own_part(seen, cut) for cut in cuts):
            continue
        shown |= {transfer.first.source, *_operand_shapes(seen, transfer.op)}
        yield Finding(
            kind="full-rematerialisation",
            severity=severity(seen.share([transfer])),
            reason=(
                f"{shape_of(transfer)} is gathered over {named(transfer.first.axes)}, {size_text(transfer.bytes)} on "
                f"each device, {counted(transfer.count, 'time')} a step, and then cut into pieces again: the "
                "partitioner knew no other way from one sharding to the next."
            ),
            place=seen.place(transfer),
            remedy=_REMATERIALISED,
            seconds=seen.seconds(transfer),
            bytes=transfer.bytes,
        )
    complaints = [line for line in seen.compiled.log if "nvoluntary full rematerialization" in line]
    for place, reason in {_where(seen, line): _complaint(line) for line in complaints}.items():
        if place.rpartition(" at ")[2] not in shown and not any(f"takes {shape} " in reason for shape in shown):
            yield Finding(
                kind="full-rematerialisation", severity="warning", reason=reason, place=place, remedy=_REMATERIALISED
            )


def activations_gathered(seen: Evidence) -> Iterator[Finding]:
    """Activations gathered along an axis that splits the batch, which no one asked for: the weights should move."""
    splits_batch = 0
    for number, argument in seen.arguments.items():
        if argument.kind == "batch":
            splits_batch |= seen.argument_axes.get(number, 0)
    found = [
        each
        for each in seen.transfers
        if each.first.kind == "all-gather"
        and not _was_asked_for(each.first.op_name)
        and bits_of(seen.mesh, each.first.axes) & splits_batch
        and seen.varying.operand_bits(each.op, 0) & BATCH
        and not _is_state(seen, each)
        and _is_multiplied(seen, each)
    ]
    if not found or seen.share(found) < SLIGHT:
        return
    worst = max(found, key=lambda each: each.total_bytes)
    axes = named(worst.first.axes)
    yield Finding(
        kind="activation-gathered",
        severity=severity(seen.share(found)),
        reason=(
            f"Activations are gathered over {axes}, which splits the batch, by {counted(len(found), 'collective')} "
            f"that no annotation asks for: {size_text(sum(each.total_bytes for each in found))} a step and device "
            f"({seen.share(found):.0%} of {share_of(seen, found)}), the largest {shape_of(worst)}. The compiler took "
            "the activation for the smaller thing to move."
        ),
        place=seen.place(worst),
        remedy=(
            "Have the weights gathered instead: jp.FSDP() with the loss under jp.value_and_grad, which reads each "
            'parameter whole; or say where the activation lies, jp.constrain(x, "batch", "seq", "embed"), in plain JAX '
            f"jax.lax.with_sharding_constraint(x, P({', '.join(map(repr, worst.first.axes))}))."
        ),
        seconds=sum(map(seen.seconds, found)),
        bytes=worst.bytes,
    )


def resharded(seen: Evidence) -> Iterator[Finding]:
    """Activations laid out anew where neither an annotation nor the plan asks for it, and it weighs."""
    windows = {each.first.op_name for each in seen.transfers if "windowed_dot_general" in each.op.computation}
    for transfer in seen.transfers:
        first, row = transfer.first, transfer.row
        if first.kind not in ("all-to-all", "collective-permute") or first.op_name in windows:
            continue
        asked = _was_asked_for(first.op_name) or bool(row is not None and row.expected)
        share = seen.share([transfer])
        is_activation = seen.varying.operand_bits(transfer.op, 0) & BATCH and not _is_state(seen, transfer)
        if asked or share < SLIGHT or not is_activation:
            continue
        yield Finding(
            kind="reshard",
            severity=severity(share) if row is not None and row.expected == "" else "note",
            reason=(
                f"{a(first.kind).capitalize()} of {shape_of(transfer)} over {named(first.axes)}, "
                f"{counted(transfer.count, 'time')} a step, lays an activation out anew, and neither the plan nor an "
                f"annotation is seen to ask for it: {share:.0%} of {share_of(seen, [transfer])}."
            ),
            place=seen.place(transfer),
            remedy=(
                "Two neighbouring operations want different dims split. Name the dims before and after this line, "
                'jp.constrain(x, "batch", "seq", "embed"), so that they agree; a reshape that merges a split dim with '
                "another needs the split one first."
            ),
            seconds=seen.seconds(transfer),
            bytes=transfer.bytes,
        )


_REMATERIALISED = (
    "Let the array change in two steps that each move one axis, by a constraint between them, or keep one sharding "
    "across this line: jax.lax.with_sharding_constraint(x, ...) right before it, or jp.constrain with the dims named "
    "as they are after it."
)
_ASKED = frozenset(
    {"sharding_constraint", "shard_map", "all_gather", "all_to_all", "ppermute", "reshard", "device_put"}
)


def _operand_shapes(seen: Evidence, op: Op) -> list[str]:
    made = (seen.module.program.op((op.computation, name)) for name in op.operands)
    return [str(shape) for each in made if each is not None for shape in each.shapes]


def _complaint(line: str) -> str:
    """What XLA says while it partitions; the program that comes of it does not keep that."""
    way = re.search(r"from sharding (\{.*?\}) to (\{.*?\}) efficiently", line)
    array = re.search(r"= (\w+\[[\d,]*\])", line)
    said = f" from {way.group(1)} to {way.group(2)}" if way else ""
    return (
        f"The compiler says that it takes {array.group(1) if array else 'an array'}{said} only by making it whole on "
        "every device."
    )


def _where(seen: Evidence, line: str) -> str:
    """The place that a complaint names: by itself, or as the program knows the operation of that name."""
    name = re.search(r'op_name="([^"]*)"', line)
    file, number = re.search(r'source_file="([^"]*)"', line), re.search(r"source_line=(\d+)", line)
    if file and number:
        return at(seen.paths.of(name.group(1)).path if name else "", f"{file.group(1)}:{number.group(1)}")
    if name is None:
        return ""
    origin = seen.paths.of(name.group(1))
    return at(origin.path, _source_of(seen, name.group(1))) or origin.primitive


def _source_of(seen: Evidence, name: str) -> str:
    """The line of an operation that may be gone: its own, or of what is left of its module and primitive, or module."""
    origin = seen.paths.of(name)
    sources: list[str] = ["", "", ""]
    for op in seen.flow.by_name.values():
        found = re.search(r'op_name="([^"]*)"', op.attributes)
        if found is None:
            continue
        other = seen.paths.of(found.group(1))
        if found.group(1) == name:
            nearness = 0
        elif origin.path and other.path == origin.path:
            nearness = 1 if other.primitive == origin.primitive else 2
        else:
            continue
        sources[nearness] = sources[nearness] or seen.module.origin(op)[1]
    return next(filter(None, sources), "")


def _done(seen: Evidence, op: Op) -> Op:
    """The `-done` of an asynchronous pair, which has the result; any other operation itself."""
    for user, _ in seen.module.program.users.get((op.computation, op.name), ()):
        if op.opcode.endswith("-start") and user.opcode == op.opcode.replace("-start", "-done"):
            return user
    return op


def _takes_own_part(seen: Evidence, cut: Op) -> bool:
    return any(depends_on_device(seen.module.program, cut.computation, name) for name in cut.operands[1:])


def _is_cut_into_layers(seen: Evidence, transfer: Transfer) -> bool:
    """Whether a gathered stack goes into a loop that reads one layer a round."""
    op = _done(seen, transfer.op)
    trail = seen.flow.follow(Value(op.computation, op.name), reshaped)
    return any(
        use.opcode == "dynamic-slice"
        and index == 0
        and not _takes_own_part(seen, use)
        and seen.counts.get((use.computation, use.name), 0) > 1
        for use, index in trail.uses
    )


def _is_state(seen: Evidence, transfer: Transfer) -> bool:
    """Whether what is gathered is a weight, or other state, as it is given."""
    number = seen.pieces.get(transfer.op.name)
    return number is not None and seen.arguments[number].kind != "batch"


def _is_multiplied(seen: Evidence, transfer: Transfer) -> bool:
    op = _done(seen, transfer.op)
    trail = seen.flow.follow(Value(op.computation, op.name), reshaped)
    return any(use.opcode in ("dot", "convolution", "custom-call") for use, _ in trail.uses)


def _was_asked_for(op_name: str) -> bool:
    return bool(_ASKED & set(re.split(r"[/:();]", op_name)))
