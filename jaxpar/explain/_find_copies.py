"""What is held or computed once more on each device along an axis, though the axis could split it."""

import math
from collections.abc import Iterator, Sequence

from .._hlo._varying import bits_of
from ._compiled import Argument
from ._evidence import HEAVY, Evidence, at, named, severity
from ._finding import Finding
from ._remedies import axis_to_split, fsdp, mesh, zero
from ._units import size_text


def unused_axes(seen: Evidence) -> Iterator[Finding]:
    """Axes that split no argument and that nothing crosses: every device along one does the same work."""
    for axis in _unused(seen):
        size = seen.sizes[axis]
        others = {name: count for name, count in seen.sizes.items() if name != axis}
        grown = max(others, key=lambda name: others[name], default="data")
        smaller = {**others, grown: others.get(grown, 1) * size}
        yield Finding(
            kind="unused-axis",
            severity="warning",
            reason=(
                f"Axis '{axis}' of size {size} splits no argument, and no collective crosses it: all {size} devices "
                f"along it compute the same, and {1 - 1 / size:.0%} of the machine adds nothing."
            ),
            place="",
            remedy=(
                f"Make the mesh without it, {mesh(smaller)}, or give it a strategy: "
                f'jp.DP(axis="{axis}") splits the batch over it, jp.FSDP(axis="{axis}") the parameters too.'
            ),
        )


def replicated(seen: Evidence) -> Iterator[Finding]:
    """Large arguments that are whole on each device along an axis that splits their like, or could."""
    limit = seen.memory.limit if seen.memory and seen.memory.limit else seen.compiled.hardware.memory
    total = sum(each.bytes for each in seen.arguments.values())
    for kind in ("parameter", "frozen", "optimizer"):
        alike = {number: each for number, each in seen.arguments.items() if each.kind == kind}
        split = 0
        for number in alike:
            split |= seen.argument_axes.get(number, 0)
        whole: dict[int, int] = {}
        for number, each in alike.items():
            known = seen.argument_axes.get(number)
            if known is not None and split and not known and each.bytes >= max(_LARGE * total, _LEAST):
                whole[number] = each.bytes
        for number, size in whole.items():
            axes = seen.varying.axes(split)
            ways = math.prod(seen.sizes[axis] for axis in axes)
            saved = size * (1 - 1 / ways)
            if not any(extent % ways == 0 for extent in alike[number].shape):
                continue
            yield Finding(
                kind="replicated",
                severity="warning" if not limit or saved >= HEAVY * limit else "note",
                reason=(
                    f"{alike[number].path} is whole on every device, {size_text(size)}, {size / total:.0%} of all that "
                    f"the step is given. Others of its kind are split over {named(axes)}, which would make it "
                    f"{size_text(size - saved)} on each device.{_why_whole(seen, alike[number].path)}"
                ),
                place=alike[number].path,
                remedy=_split(seen, alike[number].path, kind, axes),
                bytes=int(saved),
            )
        if not split and limit:
            yield from _all_whole(seen, kind, tuple(alike.values()), limit)


def repeated(seen: Evidence) -> Iterator[Finding]:
    """Matmuls that every device along an axis does alike."""
    total = sum(flops for _, flops in seen.matmuls)
    unused = set(_unused(seen))
    for axis in seen.sizes:
        bit = bits_of(seen.mesh, (axis,))
        if axis in unused or not total:
            continue
        found = [
            (flops, op)
            for op, flops in seen.matmuls
            if flops
            and not seen.varying.bits(op) & bit
            and not any(seen.varying.operand_bits(op, index) & bit for index in range(len(op.operands)))
        ]
        share = sum(flops for flops, _ in found) / total
        if share < _REPEATED:
            continue
        _, worst = max(found, key=lambda each: each[0])
        size = seen.sizes[axis]
        wasted = share * (1 - 1 / size)
        seconds = wasted * seen.timeline.compute_seconds if seen.timeline else 0.0
        op_name, source = seen.module.origin(worst)
        yield Finding(
            kind="repeated-compute",
            severity=severity(wasted / 2),  # half a product of the step, at the least
            reason=(
                f"{share:.0%} of the step's FLOPs are done alike on all {size} devices along '{axis}': nothing that "
                f"goes into these matmuls is split over it. The largest gives {', '.join(map(str, worst.shapes))}."
            ),
            place=at(seen.paths.of(op_name).path, source),
            remedy=(
                f"Split one of its dims over '{axis}': the matrix, with "
                f'jp.TP(column=[...], row=[...], vocab=[...], axis="{axis}"), or the activation, with '
                f'jp.TP(sequence=True) or jp.DP(axis="{axis}").'
            ),
            seconds=seconds,
        )


_LARGE, _LEAST = 0.1, 16 * 2**10  # of all arguments, and in bytes: a strategy leaves small leaves whole on purpose
_REPEATED = 0.05  # of all FLOPs


def _unused(seen: Evidence) -> list[str]:
    if not seen.arguments or any(number not in seen.argument_axes for number in seen.arguments):
        return []  # the text does not say how an argument is split
    used = 0
    for bits in seen.argument_axes.values():
        used |= bits
    for transfer in seen.transfers:
        if "?" in transfer.first.axes:
            return []
        used |= bits_of(seen.mesh, [axis.partition("[")[0] for axis in transfer.first.axes])
    return [axis for axis in seen.sizes if not used & bits_of(seen.mesh, (axis,))]


def _why_whole(seen: Evidence, path: str) -> str:
    """What the plan says of a leaf that it leaves whole."""
    record = seen.plan.records.get(path) if seen.plan is not None else None
    said = "; ".join(f"{label}: {why}" for label, why in record.reasons) if record is not None else ""
    return f" The plan says of it: {said}." if said else ""


def _split(seen: Evidence, path: str, kind: str, axes: tuple[str, ...]) -> str:
    if kind == "optimizer":
        return f"{zero(axes[0])} splits optimiser state over {named(axes[:1])}."
    if set(axes) & set(seen.batch_axes):
        return (
            f"{fsdp(seen, axes[0])} takes every matrix of at least min_bytes that its whole= does not name: lower the "
            f"one, or take {path} out of the other."
        )
    there = f', axis="{axes[0]}"' if axes[0] != "tensor" else ""
    return (
        f'Give {path} a rule: jp.TP(vocab=["{path}"]{there}) for an embedding or an output matrix, column= or row= for '
        "any other."
    )


def _all_whole(seen: Evidence, kind: str, alike: Sequence[Argument], limit: int) -> Iterator[Finding]:
    """Optimiser state, or parameters, whole everywhere: data parallelism, dear where they fill the memory."""
    size, axis = sum(each.bytes for each in alike), axis_to_split(seen, kind)
    if not axis or size < _DEAR * limit or any(number not in seen.argument_axes for number in seen.arguments):
        return
    after = size / seen.sizes[axis]
    largest = max(alike, key=lambda each: each.bytes)
    what = "optimiser state is" if kind == "optimizer" else "parameters are"
    yield Finding(
        kind="replicated",
        severity="note",
        reason=(
            f"All {what} whole on every device: {size_text(size)}, {size / limit:.0%} of its memory, the largest "
            f"{largest.path} with {size_text(largest.bytes)}. Split over '{axis}' that would be {size_text(after)}."
        ),
        place=largest.path,
        remedy=f"{zero(axis) if kind == 'optimizer' else fsdp(seen, axis)}.",
        bytes=int(size - after),
    )


_DEAR = 0.2  # of a device's memory
