"""The collectives of a compiled program, as data: what each does, over which mesh axes, how often, from which line.

`read(text)` takes optimised HLO text (`compiled.as_text()`, on CPU, TPU or GPU) and gives a `Module`;
`module.collectives(mesh)` lists what crosses devices in one step. The words are the textbook's, whatever the compiler
wrote: a TPU `all-reduce-scatter` fusion, and CPU's all-reduce of which each device keeps only its own slice, are a
reduce-scatter; TPU's all-reduce of zeros with a device's own piece in them is an all-gather; a pair `-start`/`-done`
is one collective; a loop multiplies by its trip count.

Text in, data out: neither JAX nor devices are needed. Nothing here raises on text that cannot be read; see
`Module.unread`.
"""

import collections
import dataclasses
import pathlib
import re

import numpy as np

from . import _values as values
from ._groups import MeshAxes, axes_behind, axes_of, axes_written, groups_of, pairs_of
from ._text import Op, Program, Shape, arrays_in, parse, quoted, short_file

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
"""What a collective can do, in the textbook's words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One tensor that crosses devices.

    A combined collective of three tensors is three of these with one `name`: counts a tensor do not depend on what the
    compiler combined, counts by `name` are the rounds.

    Attributes:
        kind: What it does, one of `KINDS`.
        spelling: What the compiler wrote.
        axes: The mesh axes it runs over, in mesh order. Part of an axis is written `fsdp[2/4]`; `?` stands for groups
            that are no product of axes.
        dtype: Of the payload, in HLO's spelling (`f32`).
        shape: Of the payload, as `bytes` counts it.
        bytes: Payload on one device, each time: the operand of an all-reduce, reduce-scatter, all-to-all or permute,
            the *result* of an all-gather; so that a reduce-scatter and the all-gather that undoes it weigh the same.
        count: Times it runs in one call of the program; `None` in a loop whose trip count is not known.
        depth: Number of loops around it.
        conditional: Whether it is in a branch: then `count` is the most it can be.
        op_name: Where the program's author made it, as JAX names it. Of a tensor that was combined with others, and
            whose makers kept no name, the one that the instruction has.
        source: `file:line` of the author's code, where the compiler kept it.
        name: The instruction; equal for tensors combined into one.
        channel: XLA's `channel_id`.
        computation: That holds the instruction.
    """

    kind: str
    spelling: str
    axes: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int | None
    depth: int
    conditional: bool
    op_name: str
    source: str
    name: str
    channel: int | None
    computation: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A `while` in the program: how often its body runs each time it is met (`None`: not known), and where it is."""

    name: str
    trips: int | None
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A compiled program, read.

    Attributes:
        program: Its computations and operations.
        unread: What could not be read; empty for text that a known compiler wrote.
    """

    program: Program
    unread: tuple[str, ...]

    def collectives(self, mesh: MeshAxes) -> tuple[Collective, ...]:
        """Every collective between different devices of `mesh`, in the order of the text."""
        return _Reader(self.program, mesh).collectives()

    def members(self, collective: Collective, mesh: MeshAxes) -> np.ndarray | None:
        """Which positions of `mesh` exchange data in `collective`, a row a group; of a permute `(source, target)` rows.

        Of the first slice alone where the program is written for one slice; `None` where it cannot be read.
        """
        op = self.program.op((collective.computation, collective.name))
        return None if op is None else _Reader(self.program, mesh).members(op)

    def axes(self, num_devices: int, slices: tuple[int, ...] = ()) -> MeshAxes:
        """A mesh whose axes are those that the collectives run over, for a program whose mesh is not known.

        A collective may spell the mesh, names and all. Else sizes are such that each group is a product of axes, and
        the names are `slice` for what joins several slices, and `x`, `y`, ... outermost first, for the rest.
        """
        flat = MeshAxes(names=("x",), sizes=(num_devices,), slices=slices)
        reader = _Reader(self.program, flat)
        groups = []
        for visit in _walk(self.program):
            found = reader.groups(visit.op)
            if found is not None:
                groups.append(found)
                written = axes_written(visit.op.attributes, flat)
                if written is not None:
                    return written
        return axes_behind(groups, flat)

    def trips(self, loop: Op) -> int | None:
        """How often the body of a `while` runs each time it is met; `None` if that is not known."""
        return values.trip_count(self.program, loop)

    def origin(self, op: Op) -> tuple[str, str]:
        """The name that JAX gave an operation and its `file:line`, or those of the nearest one that kept them."""
        return _Reader(self.program, MeshAxes(names=(), sizes=())).origin(op)

    def loops(self) -> tuple[Loop, ...]:
        """Every `while` that the program can run."""
        reader = _Reader(self.program, MeshAxes(names=(), sizes=()))
        found: dict[tuple[str, str], Loop] = {}
        for visit in _walk(self.program):
            if visit.op.opcode == "while":
                op_name, source = reader.origin(visit.op)
                found[visit.op.computation, visit.op.name] = Loop(
                    name=visit.op.name, trips=values.trip_count(self.program, visit.op), op_name=op_name, source=source
                )
        return tuple(found.values())

    def op_counts(self) -> collections.Counter[str]:
        """Operations by opcode, each counted once however often it runs.

        Everything that can run is counted, insides of fusions, loops and branches too; the scalar functions of
        reductions are not.
        """
        seen = {(visit.op.computation, visit.op.name): visit.op.opcode for visit in _walk(self.program)}
        return collections.Counter(seen.values())


def read(text: str) -> Module:
    """Read optimised HLO text. Never raises for what the text holds; see `Module.unread`.

    Example:
        >>> from jaxpar import _hlo
        >>> module = _hlo.read(jax.jit(lambda x: x + 1.0).lower(jnp.ones(3)).compile().as_text())
        >>> module.collectives(_hlo.MeshAxes(names=("data",), sizes=(8,)))
        ()
    """
    program = parse(text)
    unread = list(program.unread)
    for visit in _walk(program):
        op = visit.op
        if _kind_of(op.opcode) not in (None, "collective-permute") and groups_of(op.attributes, 1) is None:
            unread.append(f"{op.name}: replica groups in an unknown notation: {op.attributes.strip(' ,')[:120]}")
        if op.opcode == "while" and not set(op.names("body")) <= set(program.computations):
            unread.append(f"{op.name}: its body is not in the text")
    return Module(program=program, unread=tuple(dict.fromkeys(unread)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Visit:
    op: Op
    count: int | None
    depth: int
    conditional: bool
    callers: tuple[Op, ...]


def _walk(program: Program) -> list[_Visit]:
    """Every operation that can run, with how often; once for each place that calls its computation."""
    found: list[_Visit] = []

    def enter(name: str, count: int | None, depth: int, conditional: bool, callers: tuple[Op, ...]) -> None:
        computation = program.computations.get(name)
        if computation is None or any(caller.computation == name for caller in callers):  # no such, or recursive
            return
        for op in computation.ops.values():
            found.append(_Visit(op=op, count=count, depth=depth, conditional=conditional, callers=callers))
            inner = (*callers, op)
            if op.opcode == "while":
                trips = values.trip_count(program, op)
                times = None if trips is None or count is None else count * trips
                enter_all(op.names("body"), times, depth + 1, conditional, inner)
                enter_all(op.names("condition"), times, depth + 1, conditional, inner)
            elif op.opcode == "conditional":
                branches = op.names("branch_computations") or (
                    *op.names("true_computation"),
                    *op.names("false_computation"),
                )
                enter_all(branches, count, depth, True, inner)
            elif op.opcode in ("fusion", "async-start"):
                enter_all(op.names("calls"), count, depth, conditional, inner)
            elif op.opcode == "call":
                enter_all(op.names("to_apply"), count, depth, conditional, inner)

    def enter_all(names: tuple[str, ...], count: int | None, depth: int, conditional: bool, at: tuple[Op, ...]) -> None:
        for name in names:
            enter(name, count, depth, conditional, at)

    enter(program.entry, 1, 0, False, ())
    return found


def _kind_of(opcode: str) -> str | None:
    """The kind of a collective that starts here; nothing for other operations and for `-done` halves."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


class _Reader:
    """One program on one mesh; holds what is looked up again and again."""

    def __init__(self, program: Program, mesh: MeshAxes) -> None:
        self.program = program
        self.mesh = mesh

    def collectives(self) -> tuple[Collective, ...]:
        found: dict[tuple[str, str, int], Collective] = {}
        visits = _walk(self.program)
        started = {
            (visit.op.opcode, visit.op.attribute("channel_id")) for visit in visits if _fused_phase(visit.op) == "start"
        }
        continued: set[tuple[str, str | None]] = set()
        for visit in visits:
            op = visit.op
            if _fused_phase(op) == "later":
                key = (op.opcode, op.attribute("channel_id"))
                if key in started or key in continued:
                    continue  # XLA:TPU writes an asynchronous collective in each fusion that it overlaps
                continued.add(key)
            for index, collective in enumerate(self._tensors(visit)):
                place = (op.computation, op.name, index)
                earlier = found.get(place)
                found[place] = collective if earlier is None else _added(earlier, collective)
        return tuple(found.values())

    def _tensors(self, visit: _Visit) -> list[Collective]:
        op = visit.op
        kind = _kind_of(op.opcode)
        if kind is None:
            return self._between_slices(visit) if op.opcode == "send" else []
        if kind == "collective-permute":
            groups = None
            axes = self._axes_moved(pairs_of(op.attributes))
        else:
            groups = groups_of(op.attributes, self._partitions())
            axes = self._axes(groups)
        if axes == ():
            return []
        group_size = 1 if groups is None else groups.shape[1]
        shapes = _payloads(kind, op, self._operand_shapes(op), group_size)
        found = []
        for index, shape in enumerate(shapes):
            does, spelling = kind, op.opcode
            if kind == "all-reduce" and groups is not None:
                fused = any(caller.names("calls")[:1] == (op.computation,) for caller in visit.callers[-1:])
                if fused and op.computation.startswith("all-reduce-scatter"):
                    does, spelling = "reduce-scatter", "fusion all-reduce-scatter"
                elif self._keeps_own_part(op, index, len(shapes), groups):
                    does, spelling = "reduce-scatter", f"{op.opcode} and slice"
                elif self._puts_own_part(op, index, groups):
                    does, spelling = "all-gather", f"dynamic-update-slice and {op.opcode}"
            part = index if len(shapes) > 1 else None
            found.append(self._collective(visit, does, spelling, axes, shape, part))
        return found

    def _collective(
        self,
        visit: _Visit,
        kind: str,
        spelling: str,
        axes: tuple[str, ...],
        shape: Shape,
        part: int | None = None,
    ) -> Collective:
        op = visit.op
        op_name, source = self.origin(op, visit.callers) if part is None else self._origin_of_part(visit, kind, part)
        channel = op.attribute("channel_id")
        return Collective(
            kind=kind,
            spelling=spelling,
            axes=axes,
            dtype=shape.dtype,
            shape=shape.dims,
            bytes=shape.bytes,
            count=visit.count,
            depth=visit.depth,
            conditional=visit.conditional,
            op_name=op_name,
            source=source,
            name=op.name,
            channel=int(channel) if channel and channel.isdigit() else None,
            computation=op.computation,
        )

    def _operand_shapes(self, op: Op) -> list[Shape]:
        """The arrays of an operation's operands; as written in place where the compiler writes them there."""
        written = arrays_in(op.inside)
        if written:
            return list(written)
        ops = self.program.computations[op.computation].ops
        return [shape for name in op.operands if name in ops for shape in ops[name].shapes]

    # Axes.

    def groups(self, op: Op) -> np.ndarray | None:
        """The replica groups of a collective by mesh position; `None` of a permute, and of what is none."""
        if _kind_of(op.opcode) in (None, "collective-permute"):
            return None
        found = groups_of(op.attributes, self._partitions())
        positions = self._positions()
        return None if found is None or found.size == 0 or found.max() >= len(positions) else positions[found]

    def members(self, op: Op) -> np.ndarray | None:
        """As `Module.members`."""
        positions = self._positions()
        if _kind_of(op.opcode) == "collective-permute":
            pairs = pairs_of(op.attributes)
        elif op.opcode == "send":
            given = re.search(r'_xla_send_recv_source_target_pairs="?(\{\{.*?\}\})', op.attributes)
            if given is None:
                return self._across_slices()
            pairs = pairs_of(f"source_target_pairs={given.group(1)}")
        else:
            return self.groups(op)
        return None if pairs.size == 0 or pairs.max() >= len(positions) else positions[pairs]

    def _across_slices(self) -> np.ndarray | None:
        slices = np.asarray(self.mesh.slices)
        parts = [np.flatnonzero(slices == each) for each in sorted(set(self.mesh.slices))]
        return np.stack(parts, axis=1) if parts and len({len(part) for part in parts}) == 1 else None

    def _partitions(self) -> int:
        several = self.program.num_partitions
        return several if 1 < several < self.mesh.size and self.mesh.slices else self.mesh.size

    def _positions(self) -> np.ndarray:
        """The mesh position of each partition of this program: of its own slice, where there are several."""
        if self._partitions() == self.mesh.size:
            return np.arange(self.mesh.size)
        slices = np.asarray(self.mesh.slices)
        return np.flatnonzero(slices == slices[0])

    def _axes(self, groups: np.ndarray | None) -> tuple[str, ...]:
        positions = self._positions()
        if groups is None or groups.size == 0 or groups.max() >= len(positions):
            return ("?",)
        return axes_of(positions[groups], self.mesh)

    def _axes_moved(self, pairs: np.ndarray) -> tuple[str, ...]:
        """The axes along which any pair moves; `()` if every device keeps its own."""
        positions = self._positions()
        if pairs.size == 0 or pairs.max() >= len(positions):
            return ("?",) if pairs.size else ()
        here, there = (np.unravel_index(positions[pairs[:, side]], self.mesh.sizes) for side in (0, 1))
        return tuple(name for name, a, b in zip(self.mesh.names, here, there, strict=True) if not np.array_equal(a, b))

    def _between_slices(self, visit: _Visit) -> list[Collective]:
        """A `send` that is one side of a collective: between TPU slices, or a permute that XLA:GPU took apart."""
        op = visit.op
        shapes = self._operand_shapes(op)[:1]
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
        if transfer and self.mesh.slices and shapes:
            kind = transfer.group(1).lower().replace("_", "-").replace("one-to-one", "collective-permute")
            groups, shape = self._across_slices(), shapes[0]
            if groups is None:
                return []
            if kind == "all-gather":
                shape = Shape(dtype=shape.dtype, dims=(groups.shape[1], *shape.dims))
            return [self._collective(visit, kind, f"send {transfer.group(1)}", axes_of(groups, self.mesh), shape)]
        pairs = re.search(r'_xla_send_recv_source_target_pairs="?(\{\{.*?\}\})', op.attributes)
        if pairs and shapes:
            axes = self._axes_moved(pairs_of(f"source_target_pairs={pairs.group(1)}"))
            return [self._collective(visit, "collective-permute", "send", axes, shapes[0])] if axes else []
        return []

    # Reduce-scatter, spelt as an all-reduce of which every device keeps its own slice.

    def _keeps_own_part(self, op: Op, index: int, num_results: int, groups: np.ndarray) -> bool:
        slices = values.slices_kept(self.program, op, index if num_results > 1 else None)
        return bool(slices) and all(self._own(each, groups) for each in slices)

    # All-gather, spelt as an all-reduce of arrays that are zero but for the piece of each device (XLA:TPU, of small
    # pieces).

    def _puts_own_part(self, op: Op, index: int, groups: np.ndarray) -> bool:
        put = (
            values.piece_in_zeros(self.program, op.computation, op.operands[index])
            if len(op.operands) > index
            else None
        )
        shapes = [] if put is None else self._operand_shapes(put)
        if put is None or len(shapes) < 2 or shapes[1].size * groups.shape[1] != shapes[0].size:
            return False
        return self._own(put, groups)

    def _own(self, taken: Op, groups: np.ndarray) -> bool:
        """Whether a dynamic-slice keeps, or a dynamic-update-slice writes, another part on each device of a group."""
        shapes = self._operand_shapes(taken)
        pieces = taken.shapes if taken.opcode == "dynamic-slice" else shapes[1:]
        first = 1 if taken.opcode == "dynamic-slice" else 2  # of the operands that are offsets
        if not shapes or not pieces or len(taken.operands) != first + len(shapes[0].dims):
            return False
        full, part = shapes[0], pieces[0]
        if part.size * groups.shape[1] > full.size:
            return False
        count = int(groups.max()) + 1
        offsets = [values.evaluate(self.program, taken.computation, name, count) for name in taken.operands[first:]]
        cut = [dim for dim, size in enumerate(part.dims) if size < full.dims[dim]]
        known = [(offset, part.dims[dim]) for dim in cut if (offset := offsets[dim]) is not None]
        if len(known) < len(cut):  # a table that the text elides: believe the sizes
            exact = part.size * groups.shape[1] == full.size
            unknown = [taken.operands[first + dim] for dim in cut if offsets[dim] is None]
            return exact and all(values.depends_on_device(self.program, taken.computation, name) for name in unknown)
        steps = [np.broadcast_to(offset.ravel(), (count,)) // size for offset, size in known]
        return all(len({tuple(step[member] for step in steps) for member in group}) == len(group) for group in groups)

    # Where an operation comes from.

    def origin(self, op: Op, callers: tuple[Op, ...] = ()) -> tuple[str, str]:
        """`op_name` and `file:line` of an operation, or of the nearest one that kept them.

        The partitioner drops both from some of what it adds: then a caller has them (a TPU fusion), else a user of the
        result, else an operand.
        """
        waiting = [op]
        if callers and callers[-1].opcode in ("fusion", "async-start"):
            waiting.append(callers[-1])
        operands = [self.program.op((op.computation, name)) for name in op.operands]
        op_name, source, seen = "", "", 0
        argument = ""  # the name of one, which a gather may have, tells nothing of the model
        while waiting and seen < 16 and not (op_name and source):
            near = waiting.pop(0)
            name = quoted("op_name", near)
            argument = argument or name
            op_name = op_name or (name if "/" in name else "")
            source, seen = source or self._source(near), seen + 1
            waiting += [user for user, _ in self.program.users.get((near.computation, near.name), [])]
            if not waiting:
                waiting, operands = [each for each in operands if each is not None], []
        return op_name or argument, source

    def _origin_of_part(self, visit: _Visit, kind: str, part: int) -> tuple[str, str]:
        """As `origin`, of one tensor of several that the compiler combined.

        The instruction has the name of one of them, or of all in one. So a tensor that is reduced has the name of what
        computes it, any other that of what it is used for; where these kept none, that of the instruction.
        """
        op = visit.op
        if kind in ("all-reduce", "reduce-scatter"):
            names = op.operands[part : part + 1]
            near = [made for name in names for made in values.made_by(self.program, op.computation, name)]
        else:
            near = self._users_of_part(op, part)
        for each in near:
            op_name = "" if each.opcode == "parameter" else quoted("op_name", each)
            if op_name:
                return op_name, self._source(each)
        return self.origin(op, visit.callers)

    def _users_of_part(self, op: Op, part: int) -> list[Op]:
        users = [user for user, _ in self.program.users.get((op.computation, op.name), [])]
        if len(users) == 1 and users[0].opcode.endswith("-done"):
            return self._users_of_part(users[0], part)
        taken = [user for user in users if user.opcode == "get-tuple-element" and user.attribute("index") == str(part)]
        return [
            *taken,
            *(user for each in taken for user, _ in self.program.users.get((each.computation, each.name), [])),
        ]

    def _source(self, op: Op) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", op.attributes)
        if frame:
            places = self.program.frames.get(int(frame.group(1)), ())
        else:
            line = re.search(r"source_line=(\d+)", op.attributes)
            file = quoted("source_file", op)
            places = ((file, int(line.group(1)) if line else 0),) if file else ()
        own = [place for place in places if not _is_library(place[0])] or list(places)
        return f"{short_file(own[0][0])}:{own[0][1]}" if own else ""


_PACKAGE = str(pathlib.Path(__file__).resolve().parents[1]) + "/"


def _is_library(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file or file.startswith((_PACKAGE, "<"))


def _fused_phase(op: Op) -> str:
    """`"start"` or `"later"` for the parts of a TPU asynchronous collective fusion, nothing for anything else."""
    found = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', op.attributes)
    return "" if found is None or _kind_of(op.opcode) is None else "start" if found.group(1) == "-1" else "later"


def _payloads(kind: str, op: Op, operands: list[Shape], group_size: int) -> list[Shape]:
    """The arrays that a collective moves, as `Collective.bytes` counts them."""
    arrays = [shape for shape in operands if shape.dtype != "token"]
    if kind == "all-gather":
        found = re.search(r"\bdimensions=\{(\d+)\}", op.attributes)
        dim = int(found.group(1)) if found else 0
        return [_grown(shape, dim, group_size) for shape in arrays]
    if kind == "all-to-all" and len(arrays) > 1:  # the pieces of one tensor, one for each device
        return [Shape(dtype=arrays[0].dtype, dims=(len(arrays), *arrays[0].dims))]
    if kind == "ragged-all-to-all":  # the operand; then the output buffer, offsets and sizes
        return arrays[:1]
    if kind == "collective-permute":  # XLA:TPU may pass the output buffer too
        return arrays[:1]
    return arrays


def _grown(shape: Shape, dim: int, times: int) -> Shape:
    dims = [size * times if at == dim else size for at, size in enumerate(shape.dims)]
    return Shape(dtype=shape.dtype, dims=tuple(dims))


def _added(one: Collective, other: Collective) -> Collective:
    """Two runs of one operation, called from two places."""
    known = one.count is not None and other.count is not None
    count = (one.count or 0) + (other.count or 0) if known else None
    return dataclasses.replace(one, count=count, depth=max(one.depth, other.depth))
