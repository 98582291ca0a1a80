"""Over which mesh axes each value of a program differs between devices, and which values come of the batch.

A partitioned program is one text for all devices, so what a value *is* depends on where: on the piece of an argument
that lies there, and on the device's own number. From those two it spreads to whatever is computed of them; an
all-reduce or all-gather ends it for its axes. What does not differ along an axis is held, or computed, once more on
each device along it. Where the text does not say how an argument is split it is taken to differ everywhere, so that
nothing is called a copy that may not be one.

Values are sets of bits: one for each axis in mesh order, and `BATCH`, which marks what comes of the batch.
"""

import functools as ft
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ._groups import MeshAxes, pairs_of
from ._text import Op, Program
from ._values import evaluate

BATCH = 1 << 62
"""The bit of a value that is computed from the batch."""

_Bits: TypeAlias = "int | list[_Bits]"


class Varying:
    """One program on one mesh, gone through once.

    Args:
        program: Its text, read.
        mesh: Its axes.
        arguments: By number, the bits of each argument that is known; see `argument_bits` for what the text says.
        crossed: By name, the axes that each collective runs over.
    """

    def __init__(
        self, program: Program, mesh: MeshAxes, arguments: dict[int, int], crossed: dict[str, tuple[str, ...]]
    ) -> None:
        self.program = program
        self.mesh = mesh
        self.arguments = arguments
        self.crossed = {name: bits_of(mesh, axes) for name, axes in crossed.items()}
        self.everywhere = bits_of(mesh, mesh.names)
        self.known: dict[tuple[str, str], _Bits] = {}
        self._given: dict[str, list[_Bits]] = {}
        self._open: set[str] = set()  # computations that are being gone through: a damaged text may call itself
        self._numbers: dict[tuple[str, str], int] = {}
        if program.entry:
            self._run(program.entry, [])

    def bits(self, op: Op) -> int:
        """The bits of an operation's result, its parts together; of an operation that never runs, all axes."""
        return _flat(self.known.get((op.computation, op.name), self.everywhere))

    def operand_bits(self, op: Op, index: int) -> int:
        """The bits of one of its operands."""
        known = self.known.get((op.computation, op.operands[index])) if index < len(op.operands) else None
        return self.everywhere if known is None else _flat(known)

    def axes(self, bits: int) -> tuple[str, ...]:
        """The names of axes."""
        return tuple(name for place, name in enumerate(self.mesh.names) if bits >> place & 1)

    def _run(self, name: str, given: Sequence[_Bits]) -> _Bits:
        computation = self.program.computations.get(name)
        if computation is None or name in self._open:
            return self.everywhere | _flat(list(given))
        given = list(given)
        if self._given.get(name) != given:  # the rounds of a loop around give most insides what they had
            self._open.add(name)
            for op in computation.ops.values():
                self.known[name, op.name] = self._of(op, given)
            self._open.remove(name)
            self._given[name] = given
        return self.known.get((name, computation.root), self.everywhere)

    def _of(self, op: Op, given: Sequence[_Bits]) -> _Bits:
        operands = [self.known.get((op.computation, each), 0) for each in op.operands]
        opcode = op.opcode
        if opcode == "parameter":
            number = int(op.inside) if op.inside.strip().isdigit() else 0
            if op.computation == self.program.entry:
                return self.arguments.get(number, self.everywhere)
            return given[number] if number < len(given) else self.everywhere
        if opcode == "tuple":
            return operands
        if opcode == "get-tuple-element":
            index = op.attribute("index") or ""
            whole = operands[0] if operands else 0
            if isinstance(whole, list) and index.isdigit() and int(index) < len(whole):
                return whole[int(index)]
            return _flat(whole)
        if opcode in ("fusion", "call", "async-start"):
            inside = (*op.names("calls"), *op.names("to_apply"))
            return self._run(inside[0], operands) if inside else _flat(operands)
        if opcode == "while":
            return self._loop(op, operands[0] if operands else 0)
        if opcode == "conditional":
            return self._branches(op, operands)
        if opcode in ("opt-barrier", "copy", "bitcast", "async-done", "copy-done") and operands:
            return operands[0]
        return self._computed(op, _flat(operands))

    def _loop(self, op: Op, carried: _Bits) -> _Bits:
        for _ in range(len(self.mesh.names) + 2):  # each round adds a bit somewhere, or is the last
            after = carried
            for body in op.names("body"):
                after = _join(after, self._run(body, [carried]))
            for condition in op.names("condition"):
                after = _spread(after, _flat(self._run(condition, [after])))
            if after == carried:
                break
            carried = after
        return carried

    def _branches(self, op: Op, operands: list[_Bits]) -> _Bits:
        names = op.names("branch_computations") or (*op.names("true_computation"), *op.names("false_computation"))
        results = [self._run(name, operands[at + 1 : at + 2]) for at, name in enumerate(names)]
        joined = ft.reduce(_join, results) if results else _flat(operands)
        return _spread(joined, _flat(operands[:1]))

    def _computed(self, op: Op, bits: int) -> int:
        kind = op.opcode.removesuffix("-start")
        if kind in ("partition-id", "replica-id"):
            return self.everywhere
        if kind in ("all-reduce", "all-gather", "collective-broadcast"):
            return bits & ~self.crossed.get(op.name, 0)
        if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
            return bits | self.crossed.get(op.name, 0)
        if kind == "collective-permute":
            pairs = pairs_of(op.attributes)
            reaches_all = len(np.unique(pairs[:, 1])) >= self.mesh.size if pairs.size else False
            return bits if reaches_all else bits | self.everywhere  # a device that nothing reaches has zeros
        if kind in ("recv", "infeed"):
            return bits | self.everywhere
        return self._narrowed(op, bits)

    def _narrowed(self, op: Op, bits: int) -> int:
        """The axes over which a number that comes of `partition-id` really differs: `partition-id / 4` not over all."""
        is_number = len(op.shapes) == 1 and op.shapes[0].size == 1 and op.shapes[0].dtype[0] in "sup"
        if not is_number or bits & self.everywhere != self.everywhere or len(self.mesh.names) < 2:
            return bits
        place = (op.computation, op.name)
        if place not in self._numbers:
            value = evaluate(self.program, op.computation, op.name, self.mesh.size)
            self._numbers[place] = -1 if value is None else self._differs(value)
        known = self._numbers[place]
        return bits if known < 0 else known | bits & BATCH

    def _differs(self, value: np.ndarray) -> int:
        grid = value.reshape(self.mesh.sizes)
        return sum(1 << at for at in range(grid.ndim) if (grid != grid.take([0], axis=at)).any())


def bits_of(mesh: MeshAxes, axes: Sequence[str]) -> int:
    """The bits of axes. One of size 1 has none, for nothing differs along it, nor has part of an axis, `fsdp[2/4]`."""
    sizes = dict(zip(mesh.names, mesh.sizes, strict=True))
    return sum(1 << place for place, name in enumerate(mesh.names) if name in axes and sizes[name] > 1)


def argument_bits(op: Op, mesh: MeshAxes) -> int | None:
    """The axes that split an argument, as its own line in the text says; `None` where it does not."""
    if op.shapes and not any(shape.dims for shape in op.shapes):
        return 0  # a number cannot be split
    written = re.search(r"sharding=\{(.*?)\}(?:,|$)", op.attributes)
    if written is None:
        return None
    if written.group(1).strip() in ("replicated", "maximal device=0"):
        return 0
    tiled = re.fullmatch(
        r"devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\s*(last_tile_dim_replicate)?.*",
        written.group(1).strip(),
    )
    if tiled is None:
        return None
    tiles, source, order, listed, rest = tiled.groups()
    shape = [int(size) for size in tiles.split(",")]
    try:
        if source:
            devices = np.arange(mesh.size, dtype=np.int64).reshape([int(size) for size in source.split(",")])
            devices = devices.transpose([int(dim) for dim in order.split(",")]) if order else devices
        else:
            devices = np.asarray([int(device) for device in listed.split(",")], dtype=np.int64)
    except ValueError:  # written for another mesh
        return None
    if int(np.prod(shape)) != mesh.size or not np.array_equal(np.sort(devices.ravel()), np.arange(mesh.size)):
        return None
    copies = shape[-1] if rest else 1
    tile = np.empty(mesh.size, dtype=np.int64)
    tile[devices.ravel()] = np.arange(mesh.size) // copies
    grid = tile.reshape(mesh.sizes)
    return sum(1 << at for at in range(grid.ndim) if (grid != grid.take([0], axis=at)).any())


def _flat(bits: "_Bits | list[_Bits]") -> int:
    if isinstance(bits, int):
        return bits
    return ft.reduce(lambda all_, each: all_ | _flat(each), bits, 0)


def _join(one: _Bits, other: _Bits) -> _Bits:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_join(a, b) for a, b in zip(one, other, strict=True)]
    return _flat(one) | _flat(other)


def _spread(bits: _Bits, more: int) -> _Bits:
    """A value of which it depends on `more` whether it is made at all."""
    return _mapped(bits, lambda each: each | more) if more else bits


def _mapped(bits: _Bits, change: Callable[[int], int]) -> _Bits:
    return [_mapped(each, change) for each in bits] if isinstance(bits, list) else change(bits)
