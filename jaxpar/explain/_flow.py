"""Where a value of a compiled program goes: through tuples, fusions, calls and loops, to what computes with it.

A *value* is one array: an operation and, where that gives a tuple, which part. Whatever only hands a value on is looked
through: copies, the boundaries of fusions, calls and branches, and loops, whose body hands its results to its own next
round and to what follows the loop.
"""

import dataclasses
import functools as ft
from collections.abc import Callable

from .._hlo._text import Op, Program

Through = Callable[[Op, int], bool]
"""Whether to follow a value on through an operation that takes it as its operand of that number."""


@dataclasses.dataclass(frozen=True)
class Value:
    """One array of a program. `part`: which one, of an operation that gives a tuple."""

    computation: str
    name: str
    part: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trail:
    """Where a value goes.

    Attributes:
        values: Everything that it is on the way.
        uses: `(operation, number of the operand)` of what computes with it and is not followed.
        outputs: Which of the program's results it is.
    """

    values: frozenset[Value]
    uses: tuple[tuple[Op, int], ...]
    outputs: tuple[int, ...]


_HANDED_ON = frozenset({
    "copy", "copy-start", "copy-done", "bitcast", "opt-barrier", "async-done", "async-update", "all-reduce-done",
    "all-gather-done", "collective-permute-done", "slice-start", "slice-done",
})  # fmt: skip  # slice-start: XLA:TPU brings an array near in pieces, and joins them by ConcatBitcast
RESHAPED = frozenset({"convert", "reshape", "transpose", "bitcast-convert", "reduce-precision"})
"""Operations after which a value is the same array in another dtype or layout."""


def reshaped(op: Op, _: int) -> bool:
    """Follow an array into other dtypes and layouts."""
    return op.opcode in RESHAPED


class Flow:
    """The ways of values through one program, looked up as asked."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @ft.cached_property
    def by_name(self) -> dict[str, Op]:
        """Operations by name: XLA gives each name once in a module."""
        return {op.name: op for each in self.program.computations.values() for op in each.ops.values()}

    @ft.cached_property
    def arguments(self) -> dict[int, Op]:
        """The parameters of the whole program by their number."""
        entry = self.program.computations.get(self.program.entry)
        ops = () if entry is None else entry.ops.values()
        return {int(op.inside): op for op in ops if op.opcode == "parameter" and op.inside.strip().isdigit()}

    def follow(self, start: Value, through: Through) -> Trail:
        """Where `start` goes, through what hands it on and through operations that `through` allows."""
        seen, waiting = {start}, [start]
        uses: dict[tuple[str, str, int], tuple[Op, int]] = {}
        outputs: set[int] = set()
        while waiting:
            value = waiting.pop()
            for after in self._after(value, through, uses, outputs):
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return Trail(values=frozenset(seen), uses=tuple(uses.values()), outputs=tuple(sorted(outputs)))

    def back(self, value: Value, through: frozenset[str] = RESHAPED) -> Value:
        """Where a value was made, or the loop variable that it is; looks through what hands it on and `through`."""
        for _ in range(256):
            op = self.program.op((value.computation, value.name))
            before = None if op is None else self._before(op, value.part, through)
            if before is None:
                return value
            value = before
        return value

    def loop_of(self, value: Value) -> Op | None:
        """The `while` whose variable a value is: a part of the parameter of its body."""
        op = self.program.op((value.computation, value.name))
        if op is None or op.opcode != "parameter" or value.part is None:
            return None
        return next((each for each in self._callers(value.computation, "while") if self._is_body(each, value)), None)

    # One step on.

    def _after(
        self,
        value: Value,
        through: Through,
        uses: dict[tuple[str, str, int], tuple[Op, int]],
        outputs: set[int],
    ) -> list[Value]:
        op = self.program.op((value.computation, value.name))
        found = self._out_of(op, value.part, outputs) if op is not None and op.root else []
        for user, index in self.program.users.get((value.computation, value.name), ()):
            result = Value(user.computation, user.name)
            opcode = user.opcode
            if opcode == "get-tuple-element":
                if value.part is None or user.attribute("index") == str(value.part):
                    found.append(result)
            elif opcode == "tuple":
                found.append(Value(user.computation, user.name, index))
            elif opcode in ("fusion", "call", "async-start"):
                inside = self._parameters((*user.names("calls"), *user.names("to_apply")), index, value.part)
                found += inside
                if not inside:
                    uses[user.computation, user.name, index] = (user, index)
            elif opcode == "while":
                found += self._parameters((*user.names("body"), *user.names("condition")), 0, value.part)
            elif opcode == "conditional" and index > 0:
                found += self._parameters(_branches(user)[index - 1 : index], 0, value.part)
            elif opcode in _HANDED_ON or "ConcatBitcast" in user.attributes:
                found.append(dataclasses.replace(result, part=value.part if opcode == "opt-barrier" else None))
            elif through(user, index):
                found.append(result)
            else:
                uses[user.computation, user.name, index] = (user, index)
        return found

    def _out_of(self, root: Op, part: int | None, outputs: set[int]) -> list[Value]:
        """Where the result of a computation goes: to whoever calls it."""
        if root.computation == self.program.entry:
            outputs.add(part or 0)
            return []
        found = []
        for caller in self.program.callers.get(root.computation, ()):
            if caller.opcode != "while":
                found.append(Value(caller.computation, caller.name, part))
            elif root.computation in caller.names("body"):
                found.append(Value(caller.computation, caller.name, part))
                found += self._parameters((*caller.names("body"), *caller.names("condition")), 0, part)
        return found

    def _parameters(self, computations: tuple[str, ...], number: int, part: int | None) -> list[Value]:
        found = []
        for name in computations:
            op = self._numbered(name).get(number)
            if op is not None:
                found.append(Value(name, op.name, part))
        return found

    @ft.cache  # noqa: B019  one Flow lives as long as its report is made
    def _numbered(self, computation: str) -> dict[int, Op]:
        made = self.program.computations.get(computation)
        ops = () if made is None else made.ops.values()
        return {int(op.inside): op for op in ops if op.opcode == "parameter" and op.inside.strip().isdigit()}

    # One step back.

    def _before(self, op: Op, part: int | None, through: frozenset[str]) -> Value | None:
        if op.opcode == "get-tuple-element" and op.operands:
            index = op.attribute("index")
            return Value(op.computation, op.operands[0], int(index)) if index and index.isdigit() else None
        if op.opcode == "tuple" and part is not None and part < len(op.operands):
            return Value(op.computation, op.operands[part])
        handed_on = op.opcode in _HANDED_ON or op.opcode in through or "ConcatBitcast" in op.attributes
        if handed_on and op.operands:
            return Value(op.computation, op.operands[0], part)
        if op.opcode in ("fusion", "call"):
            for name in (*op.names("calls"), *op.names("to_apply")):
                made = self.program.computations.get(name)
                if made is not None and made.root in made.ops:
                    return Value(name, made.root, part)
        if op.opcode == "parameter":
            return self._into(op, part)
        if op.opcode == "while" and part is not None and self._hands_on(op, part):
            return Value(op.computation, op.operands[0], part)
        return None

    def _into(self, parameter: Op, part: int | None) -> Value | None:
        """What the caller of a computation gives for its parameter; for a loop, only what never changes."""
        callers = self.program.callers.get(parameter.computation, [])
        if len(callers) != 1 or not parameter.inside.strip().isdigit():
            return None
        caller, number = callers[0], int(parameter.inside)
        if caller.opcode == "while":
            unchanged = part is not None and self._hands_on(caller, part)
            return Value(caller.computation, caller.operands[0], part) if unchanged else None
        if caller.opcode == "conditional":
            number = 1 + _branches(caller).index(parameter.computation)
        return Value(caller.computation, caller.operands[number], part) if number < len(caller.operands) else None

    def _hands_on(self, loop: Op, part: int) -> bool:
        """Whether a loop's body gives its variable back as it was."""
        for name in loop.names("body"):
            body = self.program.computations.get(name)
            last = None if body is None else body.ops.get(body.root)
            if body is None or last is None or last.opcode != "tuple" or part >= len(last.operands):
                return False
            at = body.ops.get(last.operands[part])
            while at is not None and at.opcode in ("copy", "bitcast") and at.operands:
                at = body.ops.get(at.operands[0])
            if at is None or at.opcode != "get-tuple-element" or at.attribute("index") != str(part):
                return False
            source = body.ops.get(at.operands[0])
            if source is None or source.opcode != "parameter":
                return False
        return bool(loop.operands)

    def _callers(self, computation: str, opcode: str) -> list[Op]:
        return [each for each in self.program.callers.get(computation, ()) if each.opcode == opcode]

    def _is_body(self, loop: Op, value: Value) -> bool:
        return value.computation in loop.names("body")


def _branches(conditional: Op) -> tuple[str, ...]:
    return conditional.names("branch_computations") or (
        *conditional.names("true_computation"),
        *conditional.names("false_computation"),
    )
