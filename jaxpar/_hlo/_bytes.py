"""What one operation costs a device besides FLOPs: bytes through its main memory, and the compiler's own estimate."""

import re

from ._text import Computation, Op, Program, Shape

UNKNOWN_CYCLES = 2**63 - 1
"""What XLA:TPU writes where it has no estimate, or 2^64 - 1."""

_ON_CHIP = (1, 2, 3, 4)
"""Memory spaces of XLA:TPU that are not HBM: vector memory, and the small ones of scalars and flags."""

_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "token", "domain", "add-dependency",
})  # fmt: skip


def is_free(op: Op) -> bool:
    """Whether an operation only names data, and takes no time."""
    return op.opcode in _FREE or (op.opcode == "custom-call" and op.attribute("custom_call_target") in _RENAMING)


_RENAMING = ('"ConcatBitcast"', '"AllocateBuffer"', '"AssumeGatherIndicesInBound"', '"Sharding"', '"SliceBitcast"')


def cycles(op: Op) -> int | None:
    """The compiler's own estimate of an operation, in cycles; `None` where there is none."""
    found = _CYCLES.search(op.attributes)
    known = None if found is None else int(found.group(1))
    return None if known is None or known >= UNKNOWN_CYCLES else known


_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)"?')


def traffic(program: Program, op: Op) -> float:
    """Bytes that `op` reads from and writes to the device's main memory.

    Slices read and updates write only their part. What the layout puts in on-chip memory costs nothing.
    """
    if is_free(op):
        return 0.0
    computation = program.computations.get(op.computation)
    inner = _called(program, op)
    if computation is None:
        return 0.0
    if op.opcode != "fusion" or inner is None:
        return _plain_traffic(computation, op)
    read = 0.0
    for index, name in enumerate(op.operands):
        made = computation.ops.get(name)
        if made is not None:
            read += _read_of(program, inner, index, made)
    return read + _written(inner, op)


def _called(program: Program, op: Op) -> Computation | None:
    return next((program.computations[name] for name in op.names("calls") if name in program.computations), None)


def _plain_traffic(computation: Computation, op: Op) -> float:
    written = float(sum(_main(shape) for shape in op.shapes))
    operands = [computation.ops[name] for name in op.operands if name in computation.ops]
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if op.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2.0 * sum(_main(shape) for shape in operands[1].shapes)
    if op.opcode in ("broadcast", "iota", "rng-bit-generator"):
        return written
    return written + sum(_main(shape) for made in operands for shape in made.shapes)


def _read_of(program: Program, inner: Computation, index: int, made: Op) -> float:
    """Bytes that a fusion reads of its operand `index`: only the slices, if slices are all it takes."""
    whole = float(sum(_main(shape) for shape in made.shapes))
    parameter = next(
        (op for op in inner.ops.values() if op.opcode == "parameter" and op.inside.strip() == str(index)), None
    )
    if parameter is None or whole == 0:
        return whole
    total = 0.0
    for user, at in program.users.get((inner.name, parameter.name), []):
        if user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and at == 0:
            continue  # in place
        elif user.opcode == "fusion" and (nested := _called(program, user)) is not None:
            total += _read_of(program, nested, at, parameter)
        elif user.opcode == "tuple" or _is_collective(user):
            continue  # handed on, or sent: links are another account
        else:
            return whole
    return min(total, whole)


def _written(inner: Computation, op: Op) -> float:
    """Bytes that a fusion writes: of an update in place only the part."""
    aliased = {int(index or 0) for index in _ALIASED.findall(_alias_text(op))}
    root = inner.ops.get(inner.root)
    if root is None:
        return float(sum(_main(shape) for shape in op.shapes))
    results = [root] if root.opcode != "tuple" else [inner.ops.get(name) for name in root.operands]
    if len(results) != len(op.shapes):
        return float(sum(_main(shape) for shape in op.shapes))
    total = 0.0
    for index, (made, shape) in enumerate(zip(results, op.shapes, strict=True)):
        while made is not None and made.opcode == "bitcast" and made.operands:
            made = inner.ops.get(made.operands[0])
        if made is not None and made.opcode == "dynamic-update-slice" and len(made.operands) > 1:
            update = inner.ops.get(made.operands[1])
            total += sum(part.bytes for part in update.shapes) if update is not None and _main(shape) else 0
        elif made is None or not (_is_collective(made) or (made.opcode == "parameter" and index in aliased)):
            total += _main(shape)
    return total


def _is_collective(op: Op) -> bool:
    return op.opcode.startswith(("all-", "reduce-scatter", "collective-"))


_ALIASED = re.compile(r"\{(\d*)\}:\s*\(")


def _alias_text(op: Op) -> str:
    start = op.attributes.find("output_to_operand_aliasing=")
    return op.attributes[start : op.attributes.find(", calls=", start)] if start >= 0 else ""


def _main(shape: Shape) -> int:
    """Bytes of an array in main memory; nothing for one on the chip."""
    return 0 if shape.space in _ON_CHIP else shape.bytes
