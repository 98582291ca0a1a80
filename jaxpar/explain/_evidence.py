"""What findings are drawn from: a compiled program with its arguments, its transfers, and how much each of them weighs.

A *transfer* is one collective instruction with all that is known of it; tensors that the compiler combined are one
transfer. A transfer's weight is its share of the step: of the seconds, where a timeline knows them, else of the bytes.
"""

import dataclasses
import functools as ft
import math
import re
from collections.abc import Sequence
from typing import Any

from .._hlo import Collective, MeshAxes, Module
from .._hlo._module import _walk as walk
from .._hlo._text import Op
from .._hlo._varying import BATCH, Varying, argument_bits, bits_of
from ._collectives import Row
from ._compiled import Argument, Compiled
from ._finding import Severity
from ._flow import Flow, Through, Trail, Value, reshaped
from ._memory import Memory
from ._paths import Paths
from ._timeline import Timeline, mesh_of

SLIGHT, HEAVY = 0.005, 0.05
"""Shares of a step: what is below the first is not worth a line, what is above the second deserves a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective instruction.

    Attributes:
        tensors: What it moves.
        op: The instruction.
        row: What the report says of it, if it has a row.
    """

    tensors: tuple[Collective, ...]
    op: Op
    row: Row | None

    @property
    def first(self) -> Collective:
        """Its largest tensor, which stands for all."""
        return max(self.tensors, key=lambda each: each.bytes)

    @property
    def bytes(self) -> int:
        """Payload on one device each time."""
        return sum(each.bytes for each in self.tensors)

    @property
    def count(self) -> int:
        """Times it runs a step; 1 where a loop does not say."""
        return self.first.count or 1

    @property
    def total_bytes(self) -> int:
        """Payload on one device in a step."""
        return self.bytes * self.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A compiled program and what other parts of the report made of it; see `find` for the fields."""

    module: Module
    compiled: Compiled
    rows: Sequence[Row] = ()
    timeline: Timeline | None = None
    memory: Memory | None = None
    plan: Any = None
    step: Any = None
    fits: str = ""

    @ft.cached_property
    def flow(self) -> Flow:
        """Where values go."""
        return Flow(self.module.program)

    @ft.cached_property
    def mesh(self) -> MeshAxes:
        """Its axes; where nobody named them, those that its collectives run over."""
        return mesh_of(self.module, self.compiled)

    @ft.cached_property
    def paths(self) -> Paths:
        """Names of operations as places in the model."""
        return Paths([each.path for each in self.arguments.values() if each.kind in ("parameter", "frozen")])

    @ft.cached_property
    def sizes(self) -> dict[str, int]:
        """The axes of the mesh that have more than one device."""
        axes = self.mesh
        return {name: size for name, size in zip(axes.names, axes.sizes, strict=True) if size > 1}

    @ft.cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every collective instruction, in the order of the program."""
        rows = {row.name: row for row in self.rows}
        named: dict[tuple[str, str], list[Collective]] = {}
        for each in self.module.collectives(self.mesh):
            named.setdefault((each.computation, each.name), []).append(each)
        ops = ((self.flow.program.op(place), tensors) for place, tensors in named.items())
        return tuple(
            Transfer(tensors=tuple(tensors), op=op, row=rows.get(op.name)) for op, tensors in ops if op is not None
        )

    @ft.cached_property
    def transfer_of(self) -> dict[str, Transfer]:
        """Transfers by the name of the instruction."""
        return {each.op.name: each for each in self.transfers}

    @ft.cached_property
    def counts(self) -> dict[tuple[str, str], int]:
        """How often each operation runs a step, by computation and name; a loop that does not say counts once."""
        found: dict[tuple[str, str], int] = {}
        for visit in walk(self.module.program):
            place = (visit.op.computation, visit.op.name)
            found[place] = found.get(place, 0) + (visit.count or 1)
        return found

    @ft.cached_property
    def matmuls(self) -> tuple[tuple[Op, float], ...]:
        """Operations that multiply matrices, each with its FLOPs in a step on one device."""
        if self.timeline is not None and self.timeline.ops:
            ops = ((self.flow.program.op((each.computation, each.name)), each) for each in self.timeline.ops)
            return tuple((op, each.flops * each.count) for op, each in ops if op is not None and each.flops)
        places = ((self.flow.program.op(place), count) for place, count in self.counts.items())
        return tuple(
            (op, 2.0 * _products(self.flow, op) * n) for op, n in places if op is not None and op.opcode == "dot"
        )

    # Arguments.

    @ft.cached_property
    def aliases(self) -> dict[int, int]:
        """Which argument's memory each result reuses: result to argument."""
        header = self.compiled.text.partition("\n")[0]
        written = header.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
        pairs = re.findall(r"\{\s*(\d*)[\d, ]*\}:\s*\((\d+),", written)
        return {int(result or 0): int(argument) for result, argument in pairs}

    @ft.cached_property
    def arguments(self) -> dict[int, Argument]:
        """The program's arguments by number: as told, or as the text's own names suggest."""
        told = self.compiled.arguments
        if (told and len(told) == len(self.flow.arguments)) or not self.module.program.computations:
            return dict(enumerate(told))
        kept = set(self.aliases.values())
        return {number: _guessed(op, number in kept, bool(kept)) for number, op in self.flow.arguments.items()}

    @ft.cached_property
    def argument_axes(self) -> dict[int, int]:
        """The bits of the axes that split each argument, where known."""
        mesh, found = self.mesh, {}
        for number, op in self.flow.arguments.items():
            told = self.arguments[number].axes
            bits = argument_bits(op, mesh) if told is None else bits_of(mesh, told)
            if bits is not None:
                found[number] = bits
        return found

    def axes_of(self, number: int) -> tuple[str, ...] | None:
        """The axes that split an argument: as told, for of a program that was refused there is no text to ask."""
        told = self.arguments[number].axes
        if told is not None:
            return told
        bits = self.argument_axes.get(number)
        return None if bits is None else self.varying.axes(bits)

    @ft.cached_property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes that split the batch, as far as known."""
        rows = {
            axis
            for number, each in self.arguments.items()
            if each.kind == "batch"
            for axis in self.axes_of(number) or ()
        }
        return tuple(axis for axis in self.sizes if axis in rows)

    @ft.cached_property
    def varying(self) -> Varying:
        """Over which axes each value differs."""
        mesh = self.mesh
        named = [number for number, each in self.arguments.items() if each.kind == "batch"]
        batch = dict.fromkeys(
            named or self.arguments, BATCH
        )  # a function without a batch: all it computes is activation
        everywhere = bits_of(mesh, mesh.names)
        bits = {
            number: self.argument_axes.get(number, everywhere) | batch.get(number, 0) for number in self.flow.arguments
        }
        crossed = {each.op.name: each.first.axes for each in self.transfers}
        return Varying(self.module.program, mesh, bits, crossed)

    @ft.cached_property
    def updated(self) -> dict[int, int]:
        """Which argument each result is the next value of: the one it shares memory with, or is computed from.

        "Computed from" means element by element, in the same shape: as an update is, and a gradient is not.
        """
        found = dict(self.aliases)
        taken = set(found.values())
        root = self.flow.program.computations.get(self.flow.program.entry)
        last = None if root is None else root.ops.get(root.root)
        for number, op in self.flow.arguments.items():
            if number in taken or last is None or not op.shapes or not op.shapes[0].dims:
                continue
            for result in self.flow.follow(Value(op.computation, op.name), elementwise(op.shapes[0].size)).outputs:
                if result not in found and result < len(last.shapes) and last.shapes[result] == op.shapes[0]:
                    found[result] = number
                    break
        return found

    @ft.cached_property
    def whole(self) -> dict[int, Trail]:
        """Where each argument goes as it is, whole, in any dtype or layout."""
        return {
            number: self.flow.follow(Value(op.computation, op.name), reshaped)
            for number, op in self.flow.arguments.items()
            if op.shapes and op.shapes[0].dims
        }

    @ft.cached_property
    def pieces(self) -> dict[str, int]:
        """Operations that read an argument, or one layer of it, by name: its number."""
        found: dict[str, int] = {}
        for number, op in self.flow.arguments.items():
            if op.shapes and op.shapes[0].dims:
                for user, index in self.flow.follow(Value(op.computation, op.name), _cut).uses:
                    if index == 0 or user.opcode in ("dot", "all-gather", "all-gather-start"):
                        found.setdefault(user.name, number)
        return found

    # Places and weights.

    def leaf_of(self, transfer: Transfer, tensor: Collective | None = None) -> Argument | None:
        """The argument that a collective reads a piece of, or whose next value its result becomes part of.

        Of its largest tensor, or of the one given.
        """
        number = self.pieces.get(transfer.op.name)
        if number is None:
            part = transfer.tensors.index(tensor or transfer.first) if len(transfer.tensors) > 1 else None
            start = Value(transfer.op.computation, transfer.op.name, part)
            trail = self.flow.follow(start, elementwise(0))
            reached = [self.updated[result] for result in trail.outputs if result in self.updated]
            parameters = [each for each in reached if self.arguments[each].kind in ("parameter", "frozen")]
            number = next(iter(parameters or reached), None)
        return None if number is None else self.arguments[number]

    def place(self, transfer: Transfer, tensor: Collective | None = None) -> str:
        """Where in the model and in the author's code; of its largest tensor, or of the one given."""
        moved, row = tensor or transfer.first, transfer.row
        leaf = self.leaf_of(transfer, moved)
        named = row.path if row and tensor is None else self.paths.of(moved.op_name).path
        if leaf is None or (leaf.kind == "batch" and named):  # of a batch, the place is where the model takes it
            return at(named, moved.source)
        return at(leaf.path, moved.source)

    @ft.cached_property
    def total_bytes(self) -> int:
        """Everything that crosses devices in a step, on one device."""
        return sum(each.total_bytes for each in self.transfers)

    def seconds(self, transfer: Transfer) -> float:
        """How long all its runs take; 0 if nothing says."""
        if transfer.row is not None:
            return transfer.row.seconds * transfer.count
        if self.timeline is None:
            return 0.0
        known = self.timeline.transfers.get((transfer.op.computation, transfer.op.name))
        return known[0] * transfer.count if known else 0.0

    def share(self, transfers: Sequence[Transfer], part: float = 1.0) -> float:
        """The share of the step that these weigh: of its seconds, where known, else of its traffic."""
        seconds = sum(map(self.seconds, transfers))
        if seconds and self.timeline is not None and self.timeline.step_seconds:
            return seconds * part / self.timeline.step_seconds
        return sum(each.total_bytes for each in transfers) * part / self.total_bytes if self.total_bytes else 0.0


def severity(share: float) -> Severity:
    """What a share of the step deserves."""
    return "warning" if share >= HEAVY else "note"


def a(noun: str) -> str:
    """`a gather`, `an all-gather`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def are(number: int) -> str:
    """`is` or `are`."""
    return "is" if number == 1 else "are"


def counted(number: int, noun: str) -> str:
    """`1 gather`, `2 gathers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shape_of(transfer: Transfer) -> str:
    """Its largest tensor as HLO writes it."""
    first = transfer.first
    return f"{first.dtype}[{','.join(map(str, first.shape))}]"


def share_of(seen: Evidence, transfers: Sequence[Transfer]) -> str:
    """What `Evidence.share` is a share of."""
    return "the step's time" if any(map(seen.seconds, transfers)) else "all traffic"


def at(path: str, source: str) -> str:
    """A place in words."""
    return " at ".join(filter(None, (path, source)))


def named(axes: Sequence[str]) -> str:
    """Axes in words: `'data'`, `'data' and 'fsdp'`."""
    return " and ".join(f"'{axis}'" for axis in axes)


def _products(flow: Flow, dot: Op) -> int:
    """Multiplications of a `dot`."""
    left = flow.program.op((dot.computation, dot.operands[0])) if dot.operands else None
    dims = [int(dim) for dim in re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")]
    if left is None or not left.shapes or not dot.shapes or any(dim >= len(left.shapes[0].dims) for dim in dims):
        return 0
    return dot.shapes[0].size * math.prod(left.shapes[0].dims[dim] for dim in dims)


_ARITHMETIC = frozenset({
    "abs", "add", "and", "clamp", "compare", "divide", "exponential", "log", "maximum", "minimum", "multiply", "negate",
    "not", "or", "power", "rsqrt", "select", "sign", "sqrt", "subtract", "tanh",
})  # fmt: skip
_MOVED = frozenset({"dynamic-update-slice", "slice", "dynamic-slice", "pad", "concatenate"})


def elementwise(size: int) -> Through:
    """Follow an array through arithmetic that keeps its `size`, 0 for any; it may be put into a larger one."""

    def through(op: Op, index: int) -> bool:
        if op.opcode in _MOVED:
            return size == 0 and index < 2
        if op.opcode not in _ARITHMETIC and not reshaped(op, index):
            return False
        return size == 0 or (len(op.shapes) == 1 and op.shapes[0].size == size)

    return through


def _cut(op: Op, index: int) -> bool:
    """Follow an array, and one layer of it that a loop takes, in any dtype or layout."""
    return reshaped(op, index) or (op.opcode in ("dynamic-slice", "slice") and index == 0)


_OPTIMIZER = frozenset({"opt", "opt_state", "optimizer", "optimizer_state", "mu", "nu", "momentum", "trace"})
_RANDOM = frozenset({"rng", "rngs", "key", "keys", "dropout"})


def _guessed(op: Op, is_kept: bool, some_kept: bool) -> Argument:
    """What the name of an argument suggests: `state['optimizer']['mu']` is optimiser state."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', op.attributes)
    words = re.findall(r"\w+", found.group(1) if found else "")
    path = ".".join(word for word in words if word != "value") or op.name
    shape = op.shapes[0] if op.shapes else None
    if some_kept and not is_kept:
        kind = "batch"
    elif _RANDOM & set(words):
        kind = "rng"
    elif _OPTIMIZER & set(words):
        kind = "optimizer"
    else:
        kind = "parameter" if is_kept else "other"
    return Argument(
        path=path,
        kind=kind,
        shape=shape.dims if shape else (),
        dtype=shape.dtype if shape else "",
        bytes=sum(each.bytes for each in op.shapes),
        donated=is_kept,
    )
