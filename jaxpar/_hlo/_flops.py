"""Floating-point operations of single HLO operations, from text: products, convolutions, attention kernels.

A multiply and an add are two. As model FLOPs are counted everywhere, only what a matrix unit does counts; elementwise
work and reductions do not. XLA:TPU writes a matrix product as a convolution whose padding stands for batch or free
dims, so of a convolution only the products that meet no padding count.

A kernel that the text does not show inside (`tpu_custom_call`, cuDNN attention) is counted by the shapes of its
queries, keys and values if it is attention, by the cost that its author gave otherwise, and is not known without one.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from ._text import Op, Program, Shape, arrays_in, quoted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of one operation computes; an operation that calls others is not one of these.

    Attributes:
        kind: `"matmul"`, `"convolution"`, `"attention"`, or `"kernel"` for other custom calls.
        flops: That are run. Of causal attention in blocks, those in blocks that are not wholly masked.
        full: What the mathematics needs, without a mask: scores that a backward kernel computes again left out.
        causal: Half of `full` for attention known to be causal, `full` for everything else.
        dtype: Of the operands, in HLO's spelling.
        known: False for a kernel of which nothing is known; it then counts as none.
    """

    kind: str
    flops: float
    full: float
    causal: float
    dtype: str
    known: bool = True


def flops_of(program: Program, op: Op) -> float:
    """FLOPs of one run of `op` on one device, those of the computations that it calls included.

    Of branches the longest counts; a loop counts its body once, as whoever walks the loop knows how often it runs.
    """
    return _flops(program, op, ())


def work_of(program: Program, op: Op) -> Work | None:
    """The work of `op` itself; `None` if it computes nothing or only calls others."""
    try:
        if op.opcode == "dot":
            return _dot(program, op)
        if op.opcode == "ragged-dot":
            return _filled(op, _ragged_dot(program, op))
        if op.opcode == "convolution":
            return _convolution(program, op)
        if op.opcode == "custom-call":
            return _filled(op, _custom_call(program, op))
    except (ValueError, IndexError, ZeroDivisionError, OverflowError):  # attributes that no compiler writes
        return None
    return None


FILLED = "filled_{}_of_{}"
"""A scope around grouped products: so many of the rows they are given are in a group, the rest room (`filled`)."""


def filled(name: str) -> float:
    """The part of a grouped product's rows that its kernel computes, by the name of the operation."""
    found = re.search(FILLED.format(r"(\d+)", r"(\d+)"), name)
    return int(found[1]) / int(found[2]) if found else 1.0


def _flops(program: Program, op: Op, inside: tuple[str, ...]) -> float:
    if op.opcode == "conditional":
        branches = op.names("branch_computations") or (*op.names("true_computation"), *op.names("false_computation"))
        return max((_sum(program, name, inside) for name in branches), default=0.0)
    keys = _CALLS.get(op.opcode)
    if keys is not None:
        return sum(_sum(program, name, inside) for key in keys for name in op.names(key))
    work = work_of(program, op)
    return 0.0 if work is None else work.flops


def _sum(program: Program, name: str, inside: tuple[str, ...]) -> float:
    computation = program.computations.get(name)
    if computation is None or name in inside:  # no such, or recursive
        return 0.0
    return sum(_flops(program, op, (*inside, name)) for op in computation.ops.values())


_CALLS = {"fusion": ("calls",), "async-start": ("calls",), "call": ("to_apply",), "while": ("body",)}


def _filled(op: Op, work: Work | None) -> Work | None:
    share = filled(quoted("op_name", op))
    if work is None or share == 1.0:
        return work
    flops, full, causal = (each * share for each in (work.flops, work.full, work.causal))
    return dataclasses.replace(work, flops=flops, full=full, causal=causal)


def _operands(program: Program, op: Op) -> list[Shape]:
    """One array an operand, as written in place where the compiler does so; the first of a tuple."""
    written = [shape for shape in arrays_in(op.inside) if shape.dtype != "token"]
    if len(written) >= len(op.operands) > 0:
        return written
    ops = program.computations[op.computation].ops
    return [ops[name].shapes[0] for name in op.operands if name in ops and ops[name].shapes]


def _product(kind: str, flops: float, operands: list[Shape]) -> Work:
    return Work(kind=kind, flops=flops, full=flops, causal=flops, dtype=_dtype(operands))


def _dtype(operands: list[Shape]) -> str:
    """Of the first that is of floats: an embedding may be a product with truth values."""
    return next((shape.dtype for shape in operands if shape.dtype[0] in "bf"), operands[0].dtype if operands else "")


def _dims(op: Op, key: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", op.attribute(key) or "")]


# Matrix products.


def _dot(program: Program, op: Op) -> Work:
    operands = _operands(program, op)
    return _product("matmul", 2.0 * op.shapes[0].size * _contracted(op, operands), operands)


def _contracted(op: Op, operands: list[Shape]) -> int:
    return math.prod(operands[0].dims[dim] for dim in _dims(op, "lhs_contracting_dims"))


def _ragged_dot(program: Program, op: Op) -> Work:
    """Rows in groups, each group by its own matrix; or, where the grouped dim is contracted, one product a group."""
    operands = _operands(program, op)
    flops = 2.0 * op.shapes[0].size * _contracted(op, operands)
    ragged = _dims(op, "lhs_ragged_dims")
    if ragged and ragged[0] in _dims(op, "lhs_contracting_dims"):
        flops /= operands[2].dims[-1]  # the groups' results are stacked, their rows share the dim
    return _product("matmul", flops, operands)


def _convolution(program: Program, op: Op) -> Work:
    left, right = _operands(program, op)[:2]
    kind = "convolution" if 'conv_general_dilated"' in op.attributes else "matmul"  # by what JAX called it
    return _product(kind, _convolved(op, left, right, op.shapes[0]), [left, right])


def _convolved(op: Op, left: Shape, right: Shape, out: Shape) -> float:
    """FLOPs of the convolution `left` with `right` to `out`; products with padding or dilation left out."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels") or "")
    if labels is None:
        return 0.0
    in_labels, kernel_labels, out_labels = labels.groups()
    window = op.attribute("window") or ""
    taps = 1.0
    num_spatial = len(in_labels) - 2
    size, stride, dilate, rhs_dilate = (
        _window(window, key, num_spatial) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    pads = re.search(r"\bpad=([\w\-]+)", window)
    low = [int(pad.split("_")[0]) for pad in pads.group(1).split("x")] if pads else [0] * num_spatial
    for at in range(num_spatial):
        taps *= num_taps(
            num_out=out.dims[out_labels.index(str(at))],
            num_in=left.dims[in_labels.index(str(at))],
            size=size[at],
            stride=stride[at],
            low=low[at],
            dilate=dilate[at],
            rhs_dilate=rhs_dilate[at],
        )
    groups = int(op.attribute("batch_group_count") or 1)
    rows = left.dims[in_labels.index("b")] / groups
    return 2.0 * rows * right.dims[kernel_labels.index("i")] * right.dims[kernel_labels.index("o")] * taps


def _window(window: str, key: str, num: int) -> list[int]:
    found = re.search(rf"\b{key}=([\dx]+)", window)
    return [int(part) for part in found.group(1).split("x")] if found else [1] * num


def num_taps(*, num_out: int, num_in: int, size: int, stride: int, low: int, dilate: int, rhs_dilate: int) -> float:
    """Of the pairs (place in the result, place in the window), how many meet an element of the input.

    `place * stride + tap * rhs_dilate - low` must be a multiple of `dilate` in `[0, (num_in - 1) * dilate]`.
    """
    tap = np.arange(size, dtype=np.int64) * rhs_dilate - low
    first = np.maximum(0, -(tap // stride))  # the least place that is not before the input
    last = np.minimum(num_out - 1, ((num_in - 1) * dilate - tap) // stride)
    common = math.gcd(stride, dilate)
    period = dilate // common
    if period == 1:
        found = np.maximum(0, last - first + 1) * (tap % common == 0)
        return float(found.sum())
    residue = (-tap // common) * pow(stride // common, -1, period) % period  # places that are this, modulo the period
    start = first + (residue - first) % period
    found = np.maximum(0, (last - start) // period + 1) * (tap % common == 0)
    return float(found.sum())


# Kernels.


def _custom_call(program: Program, op: Op) -> Work | None:
    target = (op.attribute("custom_call_target") or "").strip('"')
    if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        return _gemm(program, op)
    if target.startswith("__cudnn$conv"):
        return _cudnn_convolution(program, op, target)
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(program, op, target)
    if target == "tpu_custom_call":
        return _pallas(program, op)
    cost = _given_cost(op)
    return None if cost is None else _product("kernel", cost, _operands(program, op))


def _gemm(program: Program, op: Op) -> Work:
    operands = _operands(program, op)
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
    dims = [int(part) for part in re.findall(r"\d+", found.group(1))] if found else []
    return _product("matmul", 2.0 * op.shapes[0].size * math.prod(operands[0].dims[dim] for dim in dims), operands)


def _cudnn_convolution(program: Program, op: Op, target: str) -> Work:
    """The three of a convolution and its gradients, each by the shapes of the forward one."""
    first, second = _operands(program, op)[:2]
    result = op.shapes[0]
    if "BackwardInput" in target:
        flops = _convolved(op, result, second, first)
    elif "BackwardFilter" in target:
        flops = _convolved(op, first, result, second)
    else:
        flops = _convolved(op, first, second, result)
    return _product("convolution", flops, [first, second])


def _cudnn_attention(program: Program, op: Op, target: str) -> Work:
    scores = re.search(r'"intermediate_tensor_shape":\{[^{}]*"dimensions":\[([^\]]*)\]', op.attributes)
    query = _operands(program, op)[0]
    size = math.prod(int(part) for part in re.findall(r"\d+", scores.group(1))) if scores else 0
    one = 2.0 * size * query.dims[-1]
    full = one * (4 if "Backward" in target else 2)
    run = one * (5 if "Backward" in target else 2)
    causal = re.search(r'"mask_type":"\w*CAUSAL', op.attributes) is not None
    return Work(
        kind="attention",
        flops=run / 2 if causal else run,  # its tiles are small
        full=full,
        causal=full / 2 if causal else full,
        dtype=query.dtype,
        known=scores is not None,
    )


_ATTENTION = re.compile(r"splash|flash|attention|attn|mha|mqa")
_LAYOUT_SEQ_MINOR = "2"


def _pallas(program: Program, op: Op) -> Work:
    operands = _operands(program, op)
    found = _attention(op, operands, f"{op.name}/{quoted('op_name', op)}")
    if found is not None:
        return found
    cost = _given_cost(op)
    return dataclasses.replace(_product("kernel", cost or 0.0, operands), known=cost is not None)


def _attention(op: Op, operands: list[Shape], words: str) -> Work | None:
    layouts = dict(re.findall(r'([qkv])_layout\\*": (\d)', op.attributes))
    fused = 'use_fused_bwd_kernel\\": true' in op.attributes
    return attention(words, operands, op.shapes, layouts=layouts, fused=fused)


def attention(
    words: str,
    operands: Sequence[Shape],
    results: Sequence[Shape],
    *,
    layouts: dict[str, str] | None = None,
    fused: bool = False,
) -> Work | None:
    """The work of an attention kernel that is called `words`; `None` if its operands are not those of one.

    Queries, keys and values are the first three arrays of floats with heads. The forward pass has two products of
    (queries, keys, head dim), the backward pass four; but every kernel of that computes the scores again, so that `dkv`
    runs four, `dq` three, both in one five. Which blocks a splash kernel skips is in a constant that text leaves out:
    that the mask is causal is taken from its being computed from positions; blocks right of the diagonal are then
    skipped.
    """
    arrays = [shape for shape in operands if len(shape.dims) >= 3 and shape.dtype[:1] in ("b", "f")]
    if not _ATTENTION.search(words.lower()) or len(arrays) < 3:
        return None
    query, key, value = arrays[:3]
    layouts = layouts or {}
    num_queries, query_dim = _sides(query, layouts.get("q"))
    num_keys, key_dim = _sides(key, layouts.get("k"))
    _, value_dim = _sides(value, layouts.get("v"))
    if query_dim != key_dim or not query_dim:
        return None
    last = words.rstrip("/").lower()
    if "dkv" in last:
        both = fused or sum(shape.dtype[:1] in ("b", "f") for shape in results) > 2
        run = 2 * value_dim + (3 if both else 2) * query_dim
        needed = run - query_dim
    elif re.search(r"(?<![a-z])dq(?![a-z])", last):
        run, needed = value_dim + 2 * query_dim, query_dim
    else:
        run = needed = query_dim + value_dim
    pairs = 2.0 * (query.size // query_dim) * num_keys
    masks = [
        shape for shape in operands if shape.dtype in ("s8", "s32") and len(shape.dims) == 3 and shape.dims[0] == 1
    ]
    positions = any(shape.dtype == "s32" and len(shape.dims) == 2 for shape in operands)
    causal = bool(masks) and positions and num_queries == num_keys
    return Work(
        kind="attention",
        flops=pairs * run * (_blocks_run(masks[0].dims[1], masks[0].dims[2]) if causal else 1.0),
        full=pairs * needed,
        causal=pairs * needed / 2 if causal else pairs * needed,
        dtype=query.dtype,
    )


def _sides(shape: Shape, layout: str | None) -> tuple[int, int]:
    """Sequence length and head dim."""
    sequence, head = shape.dims[-2:]
    return (head, sequence) if layout == _LAYOUT_SEQ_MINOR else (sequence, head)


def _blocks_run(rows: int, columns: int) -> float:
    """The share of blocks, `rows` of queries by `columns` of keys, that hold a key not after a query."""
    run = sum(min(columns, -(-(row + 1) * columns // rows)) for row in range(rows))
    return run / (rows * columns)


def _given_cost(op: Op) -> float | None:
    found = re.search(r'"cost_estimate":\s*\{[^{}]*"flops":\s*"?(\d+)', op.attributes)
    return float(found.group(1)) if found else None
