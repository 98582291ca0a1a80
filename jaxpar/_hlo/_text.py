"""Optimised HLO text, taken apart into computations and operations. No JAX, no meaning yet: `_module` reads that.

Reads what `compiled.as_text()` prints for CPU, TPU and GPU, and HLO text files that something else compiled. Nothing
here raises: a line that cannot be read is kept in `Program.unread`, and the rest is read as if it were absent.
"""

import dataclasses
import functools as ft
import math
import pathlib
import re
from collections.abc import Iterator

BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
"""Bits of an element; every other float8 spelling (`f8e4m3fn`, ...) has 8."""


Place = tuple[str, str]
"""A computation, and the name of an operation in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One array in HLO: the per-device shape.

    `space` is the memory that its layout names (`S(1)`): on TPU 0 is HBM, 1 is VMEM, 5 is the host's; 0 where the text
    does not say. It is no part of what makes two shapes equal.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = dataclasses.field(default=0, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        bits = 8 if self.dtype.startswith("f8") else BITS.get(self.dtype, 0)
        return (self.size * bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One instruction.

    Attributes:
        name: Unique in its computation.
        opcode: As XLA spells it.
        shapes: The result's arrays, a tuple flattened.
        operands: Names of the operands, in the same computation.
        inside: The text in the parentheses: a constant's value, a parameter's number.
        attributes: The text after them.
        computation: Name of the computation that holds it.
        root: Whether it is that computation's result.
        result: The text of the result's type, with layouts.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    computation: str
    root: bool
    result: str = ""

    def attribute(self, key: str) -> str | None:
        """The word, number or `{...}` after `key=`, without the percent sign of a name."""
        found = _attribute(key).search(self.attributes)
        if found is None:
            return None
        value = found.group(1)
        return value.lstrip("%")

    def names(self, key: str) -> tuple[str, ...]:
        """The computations after `key=`: one name, or a list in braces."""
        value = self.attribute(key)
        return () if value is None else tuple(_NAME.findall(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Instructions in printed order, and the name of the one that is the result (`""`: none was marked)."""

    name: str
    ops: dict[str, Op]
    root: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A module of HLO text.

    Attributes:
        name: The module's name.
        num_partitions: As the header says; 1 where it says nothing.
        entry: Name of the computation that runs.
        frames: `stack_frame_id` to `(file, line)`, innermost first.
        unread: Lines and parts that could not be read, each with its reason.
        header: The module's first line: what aliases what, the layouts of its arguments.
    """

    name: str
    num_partitions: int
    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[tuple[str, int], ...]]
    unread: tuple[str, ...]
    header: str = ""

    @ft.cached_property
    def callers(self) -> dict[str, list[Op]]:
        """The operations that call each computation, those aside that only apply it to scalars."""
        found: dict[str, list[Op]] = {}
        for computation in self.computations.values():
            for op in computation.ops.values():
                for name in {name for key in _CALLING.get(op.opcode, ()) for name in op.names(key)}:
                    found.setdefault(name, []).append(op)
        return found

    @ft.cached_property
    def users(self) -> dict[Place, list[tuple[Op, int]]]:
        """Who uses the result of each operation in its computation, and as which operand."""
        found: dict[Place, list[tuple[Op, int]]] = {}
        for computation in self.computations.values():
            for op in computation.ops.values():
                for index, operand in enumerate(op.operands):
                    found.setdefault((computation.name, operand), []).append((op, index))
        return found

    def op(self, place: Place) -> Op | None:
        """The operation at `place`, if there is one."""
        computation = self.computations.get(place[0])
        return None if computation is None else computation.ops.get(place[1])


_CALLING = {
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async-start": ("calls",),
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}
_NAME = re.compile(r"[\w.\-]+")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_OP = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+")
_NEXT = re.compile(r"^\s+(ROOT\s+)?%?[\w.\-]+\s+=\s+|^(ENTRY\s+)?%?[\w.\-]+\s+\(|^}\s*$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{[^{}]*?S\((\d+)\)[^{}]*\})?|\b(token)\b")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPERAND = re.compile(r"%?([\w.\-]+)\s*$")
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\s*$")
_ROW = re.compile(r"^\d+ ")
_FIELD = re.compile(r"(\w+)=(-?\d+)")


def parse(text: str) -> Program:
    """Take HLO `text` apart. Garbage gives an empty program whose `unread` says so."""
    name, num_partitions, entry, heading = "", 1, "", ""
    computations: dict[str, Computation] = {}
    unread: list[str] = []
    tables: dict[str, list[str]] = {}
    table: list[str] | None = None
    current, root = "", ""
    ops: dict[str, Op] = {}
    for number, line in _lines(text):
        if current:
            if line.startswith("}"):
                computations[current] = Computation(name=current, ops=ops, root=root)
                current = ""
            elif line.strip():
                op = _read_op(line, current)
                if op is None:
                    unread.append(f"line {number}: {line.strip()[:120]}")
                else:
                    ops[op.name] = op
                    root = op.name if op.root else root
        elif line.startswith("HloModule"):
            name, heading = line.split()[1].rstrip(",") if len(line.split()) > 1 else "", line
            partitions = re.search(r"num_partitions=(\d+)", line)
            num_partitions = int(partitions.group(1)) if partitions else 1
        elif title := _TABLE.match(line):
            table = tables.setdefault(title.group(1), [])
        elif header := _HEADER.match(line):
            current, root, ops = header.group(2), "", {}
            entry = current if header.group(1) else entry
            table = None
        elif line.strip():
            if table is None or not _ROW.match(line):
                unread.append(f"line {number}: {line.strip()[:120]}")
            else:
                table.append(line)
    if current:
        computations[current] = Computation(name=current, ops=ops, root=root)
        unread.append(f"computation {current}: the text ends before its closing brace")
    if entry not in computations:
        unread.append("no ENTRY computation: this is not the text of a whole HLO module")
        entry = ""
    return Program(
        name=name,
        num_partitions=num_partitions,
        computations=computations,
        entry=entry,
        frames=_frames(tables),
        unread=tuple(unread),
        header=heading,
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of `text` with their numbers; one that its own brackets leave open is joined with what follows.

    XLA:TPU breaks `kernel_metadata={` of a Pallas kernel over three lines, the last of which looks like the end of a
    computation.
    """
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if held:
            if _NEXT.match(line):  # never closed: the text was cut
                yield first, held
                held = ""
            else:
                held += line
                if not line.startswith("}}"):
                    continue
                yield first, held
                held = ""
                continue
        if line.endswith("={"):
            held, first = line, number
        else:
            yield number, line
    if held:
        yield first, held


def arrays_in(text: str) -> tuple[Shape, ...]:
    """Every array type written in `text`, in order."""
    found = []
    for dtype, dims, space, token in _ARRAY.findall(text):
        sizes = tuple(int(size.lstrip("<=") or 0) for size in dims.split(",") if size.strip(" <=").isdigit())
        found.append(Shape(dtype=token or dtype, dims=sizes, space=int(space or 0)))
    return tuple(found)


def _read_op(line: str, computation: str) -> Op | None:
    start = _OP.match(line)
    if start is None:
        return None
    at = start.end()
    if line.startswith("(", at):
        end = _closing(line, at)
    else:
        space = line.find(" ", at)
        end = len(line) if space < 0 else space
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inside, attributes, written = line[opcode.end() : close - 1], line[close:], opcode.group(1)
    literal = written in ("constant", "parameter", "iota")
    if written in _ASYNC_CALLS:
        attributes = attributes.replace("to_apply=", "calls=", 1)
    return Op(
        name=start.group(2),
        opcode=_ASYNC_CALLS.get(written, written),
        shapes=arrays_in(line[at:end]),
        operands=() if literal else _operands(inside),
        inside=inside,
        attributes=attributes,
        computation=computation,
        root=start.group(1) is not None,
        result=line[at:end],
    )


_ASYNC_CALLS = {"call-start": "async-start", "call-update": "async-update", "call-done": "async-done"}
"""What XLA:TPU writes for work beside a TensorCore, on the SparseCores: on TPU 7x collectives too."""

_BRACKET = re.compile(r'["(){}\[\]]')


def _closing(line: str, at: int) -> int:
    """The place just after the bracket that closes the one at `at`; the end of the line if nothing does."""
    depth, quoted = 0, False
    for found in _BRACKET.finditer(line, at):
        mark = found.group()
        if mark == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if mark in "({[" else -1
            if depth == 0:
                return found.end()
    return len(line)


def _operands(inside: str) -> tuple[str, ...]:
    inside = _COMMENT.sub("", inside)
    if "(" not in inside and "[" not in inside and "{" not in inside:  # names alone: nearly every line
        parts = inside.split(",")
    else:
        parts, depth, begin = [], 0, 0
        for place, mark in enumerate(inside):
            depth += (mark in "({[") - (mark in ")}]")
            if mark == "," and depth == 0:
                parts.append(inside[begin:place])
                begin = place + 1
        parts.append(inside[begin:])
    return tuple(found.group(1) for part in parts if (found := _OPERAND.search(part)))


@ft.lru_cache(maxsize=256)
def _attribute(key: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|[\s,]){re.escape(key)}=(\{{[^{{}}]*\}}|\"[^\"]*\"|[^\s,{{}}]+)")


def _frames(tables: dict[str, list[str]]) -> dict[int, tuple[tuple[str, int], ...]]:
    """Stack frames by id, innermost first. A parent is written as its id plus one, so that 1 is "no parent"."""
    files = {int(row.split()[0]): row.partition(" ")[2].strip().strip('"') for row in tables.get("FileNames", [])}
    places = {int(row.split()[0]): dict(_FIELD.findall(row)) for row in tables.get("FileLocations", [])}
    rows = {int(row.split()[0]): dict(_FIELD.findall(row)) for row in tables.get("StackFrames", [])}
    found: dict[int, tuple[tuple[str, int], ...]] = {}
    for frame in rows:
        below: dict[int, tuple[str, int]] = {}  # what leads to a frame whose chain is known, or to none
        at = frame
        while at in rows and at not in found and at not in below:
            place = places.get(int(rows[at].get("file_location_id", 0)), {})
            below[at] = (files.get(int(place.get("file_name_id", 0)), ""), int(place.get("line", 0)))
            at = int(rows[at].get("parent_frame_id", 1)) - 1
        chain = found.get(at, ())
        for each, here in reversed(below.items()):
            chain = found[each] = (here, *chain)
    return found


def short_file(path: str) -> str:
    """`path` from the working directory where it lies below it or beside it, as written otherwise."""
    here = pathlib.Path.cwd()
    for prefix, root in (("", f"{here}/"), ("../", f"{here.parent}/")):
        if path.startswith(root):
            return prefix + path.removeprefix(root)
    return path


def quoted(key: str, op: Op) -> str:
    """An attribute in quotes, such as the `op_name` of the metadata; `""` if there is none."""
    found = re.search(rf'\b{key}="((?:[^"\\]|\\.)*)"', op.attributes)
    return found.group(1) if found else ""
