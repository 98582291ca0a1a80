"""What one device's memory holds at the moment it is fullest, by cause.

XLA makes only totals public. What they are made of is our own account: the buffers that live at the fullest moment of
the schedule (`_liveness`), each with its reason. A buffer that the forward pass writes and the backward pass reads is a
saved activation; one that the backward pass leaves to the update, a gradient; what only moves a parameter, gathered or
cast, is a temporary under the parameter's path. On programs of gigabytes the account meets XLA's peak within kilobytes;
whatever is missing, or too much, is a row `"unattributed"`.

On TPU, XLA's peak is that of arguments together with the fuller memory, and for a program that nearly fits on the chip
that is VMEM; what it exceeds the peak of HBM by is then a row of its own. On CPU, XLA's peak leaves temporaries out, so
that what it allocates stands for it. A program over the limit has no text:
`from_arguments` makes do with its arguments and with what the refusal says.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from .._hlo import HBM, HOST, VMEM
from .._hlo._groups import MeshAxes
from .._hlo._module import Module, _Reader
from .._hlo._text import Op, Program, quoted
from ._compiled import Argument, Compiled, MemoryStats
from ._liveness import Buffer, Liveness, liveness, moments_of
from ._paths import Paths
from ._refusal import allocations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are held at the peak for one reason.

    Attributes:
        kind: `"parameter"`, `"gradient"`, `"optimizer"`, `"model_state"`, `"batch"`, `"activation"` (saved for the
            backward pass), `"temporary"`, `"code"` or `"unattributed"`.
        path: The leaf, or where in the model; `""` where nothing is known.
        bytes: On one device, as the compiler pads them.
        shape: Of the largest array among them, `"bf16[8,2048,4096]"`; `""` for several kinds.
        source: `file:line`, where known.
    """

    kind: str
    path: str
    bytes: int
    shape: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
        peak: The compiler's own figure where it gives a true one; see the head of this file.
        limit: What a program may use; 0 if not known.
        argument: XLA's own figures, from here on; 0 where it gave none.
        output: Results, those that reuse an argument's memory included.
        temporary: Everything between.
        alias: Results that reuse an argument's memory.
        code: The program itself.
        host: Bytes in host memory.
        held: What the peak is made of: sums to `peak`, with a row `"unattributed"` for the difference, which may be
            negative.
        curve: `(position in the schedule, bytes)` of our own account, for a picture.
        origin: `"compiler"`, or `"estimate"` where it refused or was not asked.
    """

    peak: int
    limit: int
    argument: int
    output: int
    temporary: int
    alias: int
    code: int
    host: int
    held: tuple[Held, ...]
    curve: tuple[tuple[int, int], ...] = ()
    origin: str = "compiler"


def memory(module: Module, compiled: Compiled) -> Memory:
    """What one device holds at the fullest moment of `compiled`, whose text is read as `module`.

    Never raises for what the text holds; of text that cannot be read, all is unattributed. Of a program that the
    compiler refused there is no text: see `from_arguments`.
    """
    if compiled.refusal:
        return from_arguments(compiled)
    live = liveness(module, platform=compiled.hardware.kind)
    curve = live.curve((HBM,))
    moment = max(curve, key=lambda point: point[1])[0]
    reasons = _Reasons(module, compiled, live)
    rows = [reasons.held(buffer) for buffer in live.at(moment) if buffer.space == HBM and buffer.bytes]
    host = sum(buffer.bytes for buffer in live.at(moment) if buffer.space == HOST)
    held = _merged(rows)
    stats = compiled.memory
    found = sum(row.bytes for row in held)
    peak = found if stats is None else _peak(stats, compiled)
    arguments = sum(buffer.bytes for buffer in live.buffers if buffer.argument >= 0)
    excess = arguments + max(total for _, total in live.curve((VMEM,))) - found
    if stats is not None and stats.peak and excess > 0:
        held.append(Held(kind="temporary", path=ON_CHIP, bytes=excess))
        found += excess
    if peak != found:
        held.append(Held(kind="unattributed", path="", bytes=peak - found))
    return _with_totals(stats, peak, compiled, tuple(held), curve=moments_of(curve, 2000), host=host)


ON_CHIP = "(on-chip memory)"
"""The path of what XLA's peak counts beyond the peak of HBM."""


def from_arguments(compiled: Compiled) -> Memory:
    """The memory of a program that the compiler refused, as far as its arguments and the refusal tell.

    The compiler's one figure (`compiled.needed`) is the peak. Arguments are known exactly, but for padding; the
    largest other allocations are those that the refusal lists; the rest is unattributed.
    """
    rows = [
        Held(kind=_KINDS.get(each.kind, "model_state"), path=each.path, bytes=each.bytes, shape=_written(each))
        for each in compiled.arguments
    ]
    paths = Paths(each.path for each in compiled.arguments if each.kind in ("parameter", "frozen"))
    for each in allocations(compiled.refusal):
        if each.is_argument and compiled.arguments:
            continue
        origin = paths.of(each.op_name)
        kind = "temporary" if not each.is_argument else _kind_by_name(each.op_name, donated=True)
        rows.append(Held(kind=kind, path=origin.path or each.op_name, bytes=each.bytes, shape=each.shape))
    held = _merged(rows)
    found = sum(row.bytes for row in held)
    peak = compiled.needed or found
    if peak != found:
        held.append(Held(kind="unattributed", path="", bytes=peak - found))
    memory = _with_totals(compiled.memory, peak, compiled, tuple(held), curve=(), host=0)
    argument = memory.argument or sum(each.bytes for each in compiled.arguments)
    return dataclasses.replace(memory, argument=argument, origin="estimate")


_KINDS = {
    "parameter": "parameter",
    "frozen": "parameter",
    "optimizer": "optimizer",
    "model_state": "model_state",
    "rng": "model_state",
    "batch": "batch",
}
_ORDER = ("parameter", "optimizer", "model_state", "batch", "gradient", "activation", "temporary", "code")
_FEWEST = 0.002  # of the whole: rows below are one row of their kind
_HLO_DTYPES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "int32": "s32",
    "uint32": "u32",
}


def _peak(stats: MemoryStats, compiled: Compiled) -> int:
    return stats.peak if stats.peak and compiled.hardware.kind != "cpu" else _allocated(stats)


def _allocated(stats: MemoryStats) -> int:
    return stats.argument + stats.output - stats.alias + stats.temporary


def _with_totals(
    stats: MemoryStats | None,
    peak: int,
    compiled: Compiled,
    held: tuple[Held, ...],
    *,
    curve: tuple[tuple[int, int], ...],
    host: int,
) -> Memory:
    if stats is not None:
        host = stats.host_argument + stats.host_output - stats.host_alias + stats.host_temporary or host
    return Memory(
        peak=peak,
        limit=compiled.hardware.memory,
        argument=stats.argument if stats else 0,
        output=stats.output if stats else 0,
        temporary=stats.temporary if stats else 0,
        alias=stats.alias if stats else 0,
        code=stats.code if stats else 0,
        host=host,
        held=held,
        curve=curve,
    )


def _written(argument: Argument) -> str:
    dtype = _HLO_DTYPES.get(argument.dtype, argument.dtype)
    return f"{dtype}[{','.join(map(str, argument.shape))}]"


def _merged(rows: Iterable[Held]) -> list[Held]:
    """One row for each kind and path, largest first within a kind; small ones of a kind are one."""
    rows = list(rows)
    least = _FEWEST * sum(row.bytes for row in rows)
    totals: dict[tuple[str, str], int] = collections.Counter()
    for row in rows:
        totals[row.kind, row.path] += row.bytes
    groups: dict[tuple[str, str], list[Held]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.path if totals[row.kind, row.path] >= least else ""), []).append(row)
    found = [_one(kind, path, members) for (kind, path), members in groups.items()]
    return sorted(found, key=lambda row: (_ORDER.index(row.kind), not row.path, -row.bytes))


def _one(kind: str, path: str, rows: Sequence[Held]) -> Held:
    alone = {row.path for row in rows} == {rows[0].path}
    largest = max(rows, key=lambda row: row.bytes)
    return Held(
        kind=kind,
        path=rows[0].path if alone else path,
        bytes=sum(row.bytes for row in rows),
        shape=largest.shape,
        source=largest.source,
    )


def _kind_by_name(name: str, *, donated: bool) -> str:
    """What an argument is, by what JAX calls it, where nothing else says so: `state['opt_state'][0]['mu']`."""
    words = set(re.findall(r"[a-z_]+", name.lower()))
    if words & {"opt", "optimizer", "optimizer_state", "opt_state", "mu", "nu", "momentum"}:
        return "optimizer"
    if words & {"rng", "rngs", "key", "batch_stats"} and not words & {"params", "kernel"}:
        return "model_state"
    return "parameter" if donated or words & {"params", "model", "kernel", "weights"} else "batch"


class _Reasons:
    """Why each buffer of one program is there."""

    def __init__(self, module: Module, compiled: Compiled, live: Liveness) -> None:
        self.program: Program = module.program
        self.reader = _Reader(module.program, MeshAxes(names=(), sizes=()))
        self.compiled = compiled
        self.entry = self._entry_parameters()
        self.arguments = self._matched(compiled.arguments)
        self.paths = Paths(each.path for each in self.arguments.values() if each.kind in ("parameter", "frozen"))
        self.phases: dict[tuple[str, str], str] = {}
        backward = [
            at for buffer in live.buffers for at, op in buffer.makers if self._phase(op) in ("backward", "recomputed")
        ]
        self.first_backward = min(backward, default=None)
        self.donated = {each.argument for each in live.buffers if each.argument >= 0 and each.result}
        self.like = self._dims_of_parameters()

    def held(self, buffer: Buffer) -> Held:
        """The row of one buffer."""
        stored = buffer.stored
        shape = "" if stored is None else str(stored.shape)
        if buffer.argument >= 0:
            kind, path = self._argument(buffer.argument)
            return Held(kind=kind, path=path, bytes=buffer.bytes, shape=shape)
        maker = self._maker(buffer)
        kind, path = self._reason(buffer, maker)
        return Held(kind=kind, path=path, bytes=buffer.bytes, shape=shape, source=self.reader.origin(maker)[1])

    def _entry_parameters(self) -> dict[int, Op]:
        computation = self.program.computations.get(self.program.entry)
        ops = computation.ops.values() if computation is not None else ()
        return {int(op.inside): op for op in ops if op.opcode == "parameter" and op.inside.strip().isdigit()}

    def _matched(self, arguments: tuple[Argument, ...]) -> dict[int, Argument]:
        """What each parameter of the program is. JAX leaves unused ones out, but keeps the numbers in their names."""
        if len(arguments) == len(self.entry):
            return dict(enumerate(arguments))
        numbered = {at: _NUMBERED.fullmatch(quoted("op_name", op)) for at, op in self.entry.items()}
        found = {at: int(name.group(1)) for at, name in numbered.items() if name is not None}
        if len(found) < len(self.entry) or max(found.values(), default=0) >= len(arguments):
            return {}
        return {at: arguments[number] for at, number in found.items()}

    def _argument(self, number: int) -> tuple[str, str]:
        if number in self.arguments:
            argument = self.arguments[number]
            return _KINDS.get(argument.kind, "model_state"), argument.path
        op = self.entry.get(number)
        name = quoted("op_name", op).replace("\\'", "'") if op is not None else ""
        return _kind_by_name(name, donated=number in self.donated), ".".join(re.findall(r"\w+", name))

    def _dims_of_parameters(self) -> dict[tuple[int, ...], set[int]]:
        """Dims that a parameter, its gradient or one layer of these has on a device: whole, or sharded over some axes.

        Only of matrices; vectors look like too much else.
        """
        found: dict[tuple[int, ...], set[int]] = {}
        factors = {1}
        for size in self.compiled.axes.sizes:
            factors |= {each * size for each in factors}
        for number, op in self.entry.items():
            if self._argument(number)[0] != "parameter" or not op.shapes:
                continue
            local = op.shapes[0].dims
            for dim in range(len(local)):
                for factor in factors:
                    whole = (*local[:dim], local[dim] * factor, *local[dim + 1 :])
                    for drop in range(-1, len(whole)):
                        dims = _signature(whole[:drop] + whole[drop + 1 :] if drop >= 0 else whole)
                        if len(dims) > 1:
                            found.setdefault(dims, set()).add(number)
        return found

    def _phase(self, op: Op) -> str:
        key = (op.computation, op.name)
        if key not in self.phases:
            self.phases[key] = self.paths.of(quoted("op_name", op)).phase
        return self.phases[key]

    def _when(self, at: int, op: Op) -> str:
        """The phase of an operation that runs at `at`; what has none after gradients exist is the update."""
        phase = self._phase(op)
        if not phase and self.first_backward is not None and at > self.first_backward and quoted("op_name", op):
            return "update"
        return phase

    def _maker(self, buffer: Buffer) -> Op:
        """The operation that says most of a buffer: not the one that only makes room for it or fills it with zeros."""
        makers = [op for _, op in buffer.makers]
        telling = [op for op in makers if quoted("op_name", op) and op.opcode not in _EMPTY]
        return next(iter(telling or makers))

    def _reason(self, buffer: Buffer, maker: Op) -> tuple[str, str]:
        written = {self._when(at, op) for at, op in buffer.makers if op.opcode not in _EMPTY}
        read = {self._when(at, op) for at, op in buffer.readers}
        path = self._path(maker)
        alike = self._parameters_like(buffer)
        if buffer.copies >= 0:
            kind, source = self._argument(buffer.copies)
            return "temporary", source if kind == "parameter" else path
        gathered = any("all-gather" in op.name or "all-gather" in op.opcode for _, op in buffer.makers)
        if alike and not gathered:
            in_loop = any(op.computation != self.program.entry for _, op in buffer.makers)
            if "backward" in written or ("update" in read and "update" in written and in_loop):
                leaves = {self._argument(number)[1] for number in alike}
                here = {leaf for leaf in leaves if path and leaf.startswith(f"{path}.")} or leaves
                return "gradient", here.pop() if len(here) == 1 else path
        if "backward" in written and "update" in read and "forward" not in written:
            return "gradient", path
        if "forward" in written and read & {"backward", "recomputed"}:
            return "activation", path
        return "temporary", path

    def _parameters_like(self, buffer: Buffer) -> set[int]:
        if buffer.stored is None or buffer.stored.shape.dtype[0] not in "bf":
            return set()
        return self.like.get(_signature(buffer.stored.shape.dims), set())

    def _path(self, op: Op) -> str:
        """Where an operation is in the model; of one that only puts a value among others, where that value is."""
        value = self._stacked(op)
        name = quoted("op_name", value) if value is not None else ""
        return self.paths.of(name or self.reader.origin(op)[0]).path

    def _stacked(self, op: Op) -> Op | None:
        """The operation whose result a dynamic-update-slice, alone or in a fusion, puts into its buffer."""
        outer = op
        if op.opcode == "fusion":
            inner = [self.program.computations.get(name) for name in op.names("calls")]
            updates = [
                each for one in inner if one is not None for each in one.ops.values() if each.opcode == _STACKING
            ]
            if not updates:
                return None
            op = updates[0]
        elif op.opcode != _STACKING:
            return None
        at: Op | None = op
        operand = 1
        for _ in range(16):
            if at is None or len(at.operands) <= operand:
                break
            at, operand = self.program.op((at.computation, at.operands[operand])), 0
            if at is None or at.opcode == "parameter":
                break
            if at.opcode not in _CARRYING:
                return at
        if at is not None and at.opcode == "parameter" and at.computation != outer.computation:
            number = at.inside.strip()
            if number.isdigit() and int(number) < len(outer.operands):
                return self.program.op((outer.computation, outer.operands[int(number)]))
        return None


_NUMBERED = re.compile(r"\w+\[(\d+)\]")
_STACKING = "dynamic-update-slice"
_EMPTY = ("broadcast", "constant", "parameter", "custom-call")
_CARRYING = ("bitcast", "copy", "convert", "reshape", "transpose", "broadcast")


def _signature(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size != 1))


def by_kind(memory: Memory) -> dict[str, int]:
    """Bytes at the peak by kind."""
    found: dict[str, int] = collections.defaultdict(int)
    for row in memory.held:
        found[row.kind] += row.bytes
    return dict(found)
