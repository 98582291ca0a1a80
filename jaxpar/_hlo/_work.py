"""The work of one operation: floating-point operations, bytes through memory, and what the compiler reckons of it.

FLOPs count matrix products and convolutions (a multiply and an add are two), which is what peaks are stated for; the
rest of a program is counted by the bytes it moves. XLA:TPU writes every product as a convolution and puts batch dims
into padded or dilated windows, so that a window position counts only where it meets real data.
"""

import dataclasses
import functools as ft
import math
import re

import numpy as np

from ._text import Computation, Op, Program, Shape

UNKNOWN_CYCLES = 2**64 - 1
"""What XLA:TPU writes where it has no estimate."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one operation does each time: FLOPs of products by the dtype of their operands, and bytes of memory."""

    flops: tuple[tuple[str, float], ...]
    bytes: float

    @property
    def total_flops(self) -> float:
        """Of every dtype together."""
        return sum(count for _, count in self.flops)


def work(program: Program, op: Op) -> Work:
    """The FLOPs and bytes of `op`, the insides of a fusion included."""
    found: dict[str, float] = {}
    _count(program, op, found, ())
    return Work(flops=tuple(sorted(found.items())), bytes=traffic(program, op))


def traffic(program: Program, op: Op) -> float:
    """Bytes that `op` reads from and writes to the device's main memory.

    Slices read and updates write only their part. What the layout puts in on-chip memory costs nothing.
    """
    if is_free(op):
        return 0.0
    computation = program.computations.get(op.computation)
    inner = next((program.computations[name] for name in op.names("calls") if name in program.computations), None)
    if computation is None:
        return 0.0
    if op.opcode != "fusion" or inner is None:
        return _plain_traffic(computation, op)
    read = 0.0
    for index, name in enumerate(op.operands):
        made = computation.ops.get(name)
        if made is not None:
            read += _read_of(program, inner, index, made)
    return read + _written(program, inner, op)


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
        else:
            return whole
    return min(total, whole)


def _written(program: Program, inner: Computation, op: Op) -> float:
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
        elif made is None or made.opcode != "parameter" or index not in aliased:
            total += _main(shape)
    return total


_ALIASED = re.compile(r"\{(\d*)\}:\s*\(")


def _alias_text(op: Op) -> str:
    start = op.attributes.find("output_to_operand_aliasing=")
    return op.attributes[start : op.attributes.find(", calls=", start)] if start >= 0 else ""


def _main(shape: Shape) -> int:
    """Bytes of an array in main memory; nothing for one on the chip."""
    return 0 if shape.space in _ON_CHIP else shape.bytes


def _count(program: Program, op: Op, found: dict[str, float], above: tuple[str, ...]) -> None:
    if op.opcode in ("convolution", "dot"):
        computation = program.computations[op.computation]
        operands = [computation.ops[name] for name in op.operands if name in computation.ops]
        if len(operands) == 2 and operands[0].shapes and operands[1].shapes and op.shapes:
            left, right = operands[0].shapes[0], operands[1].shapes[0]
            flops = _convolution(op, left, right) if op.opcode == "convolution" else _dot(op, left)
            found[left.dtype] = found.get(left.dtype, 0.0) + flops
    elif op.opcode in ("fusion", "call", "async-start"):
        for name in (*op.names("calls"), *op.names("to_apply")):
            if name in program.computations and name not in above:
                for each in program.computations[name].ops.values():
                    _count(program, each, found, (*above, name))
    elif op.opcode == "custom-call" and (op.attribute("custom_call_target") or "").strip('"') in _GEMM:
        computation = program.computations[op.computation]
        left = computation.ops.get(op.operands[0]) if op.operands else None
        if left is not None and left.shapes and op.shapes:
            contracted = _braced_in(op.attributes, "lhs_contracting_dimensions")
            size = math.prod(left.shapes[0].dims[dim] for dim in contracted if dim < len(left.shapes[0].dims))
            found[left.shapes[0].dtype] = found.get(left.shapes[0].dtype, 0.0) + 2.0 * op.shapes[0].size * size


_GEMM = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__triton$gemm")


def _braced_in(text: str, key: str) -> list[int]:
    found = re.search(rf'"{key}":\[([^\]]*)\]', text)
    return [int(part) for part in re.findall(r"\d+", found.group(1))] if found else []


def _dot(op: Op, left: Shape) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
    dims = [int(dim) for dim in found.group(1).split(",") if dim] if found else []
    return 2.0 * op.shapes[0].size * math.prod(left.dims[dim] for dim in dims if dim < len(left.dims))


def _convolution(op: Op, left: Shape, right: Shape) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None or len(labels.group(1)) != len(left.dims) or len(labels.group(2)) != len(right.dims):
        return 0.0
    inputs, kernel, outputs = labels.groups()
    out = dict(zip(outputs, op.shapes[0].dims, strict=False))
    window = _window(op.attributes, sum(label.isdigit() for label in inputs))
    groups = int(op.attribute("batch_group_count") or 1)
    total = 2.0 * out.get("b", 1) * out.get("f", 1) * dict(zip(kernel, right.dims, strict=True)).get("i", 1)
    sizes = dict(zip(inputs, left.dims, strict=True))
    for at, each in enumerate(window):
        total *= _meetings(sizes.get(str(at), 1), out.get(str(at), 1), *each)
    return total / groups


def _window(attributes: str, dims: int) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, low padding, dilation of the input and of the kernel, for each spatial dim."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=", 1) for part in found.group(1).split() if "=" in part) if found else {}

    def numbers(key: str, default: int) -> list[int]:
        parts = given[key].split("x") if key in given else [str(default)] * dims
        return [int(part.split("_")[0]) for part in parts]

    columns = [numbers(key, default) for key, default in (("size", 1), ("stride", 1), ("pad", 0))]
    columns += [numbers(key, 1) for key in ("lhs_dilate", "rhs_dilate")]
    return [tuple(column[at] for column in columns) for at in range(dims)] if all(
        len(column) >= dims for column in columns
    ) else []  # fmt: skip


@ft.lru_cache(maxsize=4096)
def _meetings(size: int, out: int, window: int, stride: int, pad: int, spread: int, apart: int) -> int:
    """How many pairs of an output position and a window position meet an element of the input."""
    if window == 1 and pad == 0 and spread == 1:
        return min(out, -(-size // stride))
    if out * window > 2**24:
        return out * min(window, size)
    at = np.arange(out)[:, None] * stride + np.arange(window)[None, :] * apart - pad
    return int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
