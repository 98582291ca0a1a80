"""Which buffers a scheduled program holds at every moment of a step, from its text.

The text of a scheduled module lists operations in the order in which they run. Here its computations are laid out on
one line, the body of a loop and each branch where they are called, and every array that an operation makes becomes a
buffer that lives from there to its last use. What XLA keeps in one place is one buffer: what a loop carries (its input,
the body's parameter and result, its output), results that are donated arguments, tuples and bitcasts, the two halves of
an asynchronous operation, an update in place. An elementwise result takes the place of an operand of its size that
nothing reads again, as XLA's buffer assignment lets it; others the place of a donated argument, until its next value is
made.

What XLA's own assignment does beyond that (fragmentation, scratch of kernels) the text does not show.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from .._hlo import Stored, Tree, tree_of
from .._hlo._module import Module
from .._hlo._text import Op, Program


@dataclasses.dataclass(slots=True)
class Buffer:
    """One place in memory.

    Attributes:
        bytes: Padded.
        space: Of memory, as layouts number them.
        start: When its first array is made: a position in the laid-out schedule.
        end: When its last is read.
        stored: Its largest array.
        makers: The operations that write to it, with when.
        readers: The operations that read it, with when.
        argument: The number of the program's parameter that it is, or -1.
        result: Whether it holds a result of the program.
        copies: The number of the parameter of which it is a copy (moved, cast, gathered or sliced), or -1.
    """

    bytes: int
    space: int
    start: int
    end: int
    stored: Stored | None
    makers: list[tuple[int, Op]]
    readers: list[tuple[int, Op]]
    argument: int = -1
    result: bool = False
    copies: int = -1


@dataclasses.dataclass(frozen=True)
class Liveness:
    """The buffers of a program, and how many moments its schedule has."""

    buffers: list[Buffer]
    length: int

    def curve(self, spaces: Iterable[int]) -> list[tuple[int, int]]:
        """`(moment, bytes)` wherever the bytes held in `spaces` change."""
        wanted = set(spaces)
        changes: dict[int, int] = {0: 0}
        for buffer in self.buffers:
            if buffer.space in wanted and buffer.bytes:
                changes[buffer.start] = changes.get(buffer.start, 0) + buffer.bytes
                changes[buffer.end + 1] = changes.get(buffer.end + 1, 0) - buffer.bytes
        total, found = 0, []
        for at in sorted(changes):
            total += changes[at]
            found.append((at, total))
        return found

    def at(self, moment: int) -> list[Buffer]:
        """The buffers that are held at `moment`."""
        return [buffer for buffer in self.buffers if buffer.start <= moment <= buffer.end]


def liveness(module: Module, *, platform: str = "") -> Liveness:
    """The buffers of `module`. Text that is no schedule, or cut, gives those that can be made out.

    Args:
        module: The program.
        platform: `"cpu"`, where all-reduces do not run in place, or another.
    """
    return _Walk(module.program, _IN_PLACE - {"all-reduce"} if platform == "cpu" else _IN_PLACE).run()


Ids = list[int]

_ALIASES = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")
_TO_OPERAND = re.compile(r"output_to_operand_aliasing=\{((?:\{[^{}]*\}:\s*\([^()]*\),?\s*)+)\}")
_SAME = frozenset({
    "bitcast", "opt-barrier", "copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
    "async-done", "async-update", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done", "after-all",
    "add-dependency", "optimization-barrier", "send-done", "recv-done",
})  # fmt: skip
"""Operations whose results lie where their operand, or a part of it, does."""
_PASSING = frozenset({"tuple", "get-tuple-element", "bitcast", "parameter", "opt-barrier", "constant", "after-all"})
"""Operations that read nothing themselves."""
_ELEMENTWISE = frozenset({
    "abs", "add", "and", "atan2", "bitcast-convert", "cbrt", "ceil", "clamp", "compare", "convert", "copy", "cosine",
    "divide", "erf", "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one", "logistic",
    "maximum", "minimum", "multiply", "negate", "not", "or", "popcnt", "power", "reduce-precision", "remainder",
    "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan", "tanh", "xor",
})  # fmt: skip
_IN_PLACE = _ELEMENTWISE | {"scatter", "sort", "all-reduce"}
"""Operations that may write where they read."""
_MOVING = frozenset({
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "dynamic-slice", "iota", "pad", "parameter",
    "partition-id", "reshape", "slice", "transpose", "tuple", "get-tuple-element", "all-gather", "all-gather-start",
    "copy-start", "copy-done", "all-gather-done", "multiply", "add", "compare", "select", "clamp", "subtract",
})  # fmt: skip
"""What the inside of a fusion may do that only moves an array; arithmetic is on indices, or scales."""


class _Walk:
    """One pass over a program in the order in which it runs."""

    def __init__(self, program: Program, in_place: frozenset[str]) -> None:
        self.program = program
        self.in_place = in_place
        self.now = 0
        self.parent: list[int] = []
        self.buffers: list[Buffer] = []
        self.kept: list[tuple[int, Op, Ids, list[Ids]]] = []  # operations that may take an operand's place
        self.elementwise: dict[tuple[str, int], bool] = {}

    def run(self) -> Liveness:
        entry = self.program.computations.get(self.program.entry)
        results: Ids = []
        arguments: dict[int, Ids] = {}
        if entry is not None:
            for op in entry.ops.values():
                number = op.inside.strip()
                if op.opcode == "parameter" and number.isdigit():
                    ids = self._make(tree_of(op.result), op)
                    for each in ids:
                        self.buffers[each].argument = self.buffers[each].copies = int(number)
                    arguments[int(number)] = ids
            results = self._visit(entry.name, arguments, ())
        for output, number, inside in _ALIASES.findall(self._aliasing()):
            at = int(output.split(",")[0]) if output.strip() else 0
            given = arguments.get(int(number), [])
            into = int(inside.split(",")[0]) if inside.strip() else 0
            if at < len(results) and into < len(given):
                self._unite(given[into], results[at])
        for each in results:
            self._find(each).result = True
        self._take_places()
        last = self.now
        found = {id(buffer): buffer for buffer in map(self._find, range(len(self.parent)))}
        for buffer in found.values():
            if buffer.argument >= 0:
                buffer.start, buffer.end = 0, last
            elif buffer.result:
                buffer.end = last
        _lend(list(found.values()))
        return Liveness(list(found.values()), last)

    def _aliasing(self) -> str:
        header = self.program.header
        start = header.find("input_output_alias={")
        return header[start : header.find("entry_computation_layout", start)] if start >= 0 else ""

    # Buffers.

    def _make(self, tree: Tree, op: Op) -> Ids:
        return [self._new(leaf, op) for leaf in tree.leaves]

    def _new(self, stored: Stored, op: Op) -> int:
        self.parent.append(len(self.parent))
        self.buffers.append(
            Buffer(
                bytes=stored.bytes,
                space=stored.space,
                start=self.now,
                end=self.now,
                stored=stored,
                makers=[(self.now, op)],
                readers=[],
            )
        )
        return len(self.parent) - 1

    def _root(self, each: int) -> int:
        while self.parent[each] != each:
            self.parent[each] = self.parent[self.parent[each]]
            each = self.parent[each]
        return each

    def _find(self, each: int) -> Buffer:
        return self.buffers[self._root(each)]

    def _unite(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        if one == other:
            return
        kept, lost = self.buffers[one], self.buffers[other]
        if lost.bytes > kept.bytes or kept.stored is None:
            kept.stored = lost.stored
        kept.bytes, kept.space = max(kept.bytes, lost.bytes), min(kept.space, lost.space)
        kept.start, kept.end = min(kept.start, lost.start), max(kept.end, lost.end)
        kept.makers += lost.makers
        kept.readers += lost.readers
        kept.argument = max(kept.argument, lost.argument)
        kept.result = kept.result or lost.result
        if kept.copies != lost.copies:
            kept.copies = kept.argument
        self.parent[other] = one

    def _read(self, ids: Iterable[int], op: Op) -> None:
        for each in ids:
            buffer = self._find(each)
            if buffer.end < self.now or not buffer.readers:
                buffer.readers.append((self.now, op))
            buffer.end = max(buffer.end, self.now)

    # Operations.

    def _visit(self, name: str, arguments: dict[int, Ids], inside: tuple[str, ...]) -> Ids:
        """Lay out computation `name`; where its results lie."""
        computation = self.program.computations.get(name)
        if computation is None or name in inside:
            return []
        known: dict[str, Ids] = {}
        trees: dict[str, Tree] = {}
        for op in computation.ops.values():
            self.now += 1
            trees[op.name] = tree = tree_of(op.result)
            operands = [known.get(operand, []) for operand in op.operands]
            if op.opcode == "parameter":
                number = op.inside.strip()
                given = arguments.get(int(number)) if number.isdigit() else None
                known[op.name] = self._make(tree, op) if given is None else given
            else:
                known[op.name] = self._results(op, tree, operands, trees, (*inside, name))
        if computation.root:
            return known[computation.root]
        return known[next(reversed(known))] if known else []

    def _results(self, op: Op, tree: Tree, operands: list[Ids], trees: dict[str, Tree], inside: tuple[str, ...]) -> Ids:
        num = len(tree.leaves)
        every = [each for ids in operands for each in ids]
        if op.opcode == "tuple":
            return every if len(every) == num else self._make(tree, op)
        if op.opcode == "get-tuple-element":
            of = trees.get(op.operands[0]) if op.operands else None
            index = op.attribute("index") or ""
            part = of.range_of(int(index)) if of is not None and index.isdigit() else range(0)
            return [every[at] for at in part] if part and part[-1] < len(every) else self._make(tree, op)
        if op.opcode == "while":
            return self._loop(op, tree, operands, inside)
        if op.opcode == "conditional":
            return self._branches(op, tree, operands, inside)
        if op.opcode == "call":
            given = dict(enumerate(operands))
            found = [self._visit(name, given, inside) for name in op.names("to_apply")]
            self._read(every, op)
            return found[0] if found and len(found[0]) == num else self._make(tree, op)
        if op.opcode not in _PASSING:
            self._read(every, op)
        if op.opcode in _SAME:
            return self._same(op, tree, every)
        if op.opcode == "constant":
            return self._constant(tree, op)
        if op.opcode.endswith("-start"):
            return self._started(op, tree, every)
        made = self._make(tree, op)
        self._alias_as_told(op, made, operands)
        if op.opcode == "dynamic-update-slice" and operands and len(operands[0]) == 1 and num == 1:
            self.kept.append((self.now, op, made, operands[:1]))
        elif op.opcode == "fusion" or op.opcode in self.in_place:
            self.kept.append((self.now, op, made, operands))
        self._note_copy(op, made, operands)
        return made

    def _constant(self, tree: Tree, op: Op) -> Ids:
        """Constants are part of the program."""
        made = self._make(tree, op)
        for each in made:
            self.buffers[each].bytes = 0
        return made

    def _loop(self, op: Op, tree: Tree, operands: list[Ids], inside: tuple[str, ...]) -> Ids:
        carried = operands[0] if operands and len(operands[0]) == len(tree.leaves) else self._make(tree, op)
        for name in op.names("condition"):
            self._visit(name, {0: carried}, inside)
        for name in op.names("body"):
            for before, after in zip(carried, self._visit(name, {0: carried}, inside), strict=False):
                self._unite(before, after)
        self.now += 1
        self._read(carried, op)
        return carried

    def _branches(self, op: Op, tree: Tree, operands: list[Ids], inside: tuple[str, ...]) -> Ids:
        names = op.names("branch_computations") or (*op.names("true_computation"), *op.names("false_computation"))
        made: Ids = []
        for index, name in enumerate(names):
            given = operands[index + 1] if index + 1 < len(operands) else []
            found = self._visit(name, {0: given}, inside)
            made = made or found
            for before, after in zip(made, found, strict=False):
                self._unite(before, after)
        self.now += 1
        self._read([each for ids in operands for each in ids], op)
        return made if len(made) == len(tree.leaves) else self._make(tree, op)

    def _same(self, op: Op, tree: Tree, every: Ids) -> Ids:
        """Each result is the last of the operand's arrays that is like it: a `-start` has its operands first."""
        found = []
        for leaf in tree.leaves:
            like = [each for each in every if _alike(self.buffers[each].stored, leaf)]
            exact = [each for each in like if self.buffers[each].space == leaf.space]
            if len(every) == len(tree.leaves) == 1:
                found.append(every[0])
            elif like:
                found.append((exact or like)[-1])
            else:
                found.append(self._new(leaf, op))
        return found

    def _started(self, op: Op, tree: Tree, every: Ids) -> Ids:
        """The first half of an asynchronous operation gives back its operands, then its results."""
        waiting = list(every)
        copies = {self._find(each).copies for each in every}
        found = []
        several = len(tree.leaves) > 1
        for index, leaf in enumerate(tree.leaves):
            # `copy-start` gives its result first; alike arrays otherwise are the operands, as these come first.
            operand = None
            if several and not (op.opcode == "copy-start" and index == 0):
                operand = next((each for each in waiting if _alike(self.buffers[each].stored, leaf)), None)
            if operand is not None:
                waiting.remove(operand)
                found.append(operand)
            else:
                found.append(self._new(leaf, op))
                if len(copies) == 1:
                    self.buffers[found[-1]].copies = next(iter(copies))
        return found

    def _alias_as_told(self, op: Op, made: Ids, operands: list[Ids]) -> None:
        told = _TO_OPERAND.search(op.attributes)
        for output, operand, part in _ALIASES.findall(told.group(1)) if told else ():
            at = int(output.split(",")[0]) if output.strip() else 0
            into = int(part.split(",")[0]) if part.strip() else 0
            if at < len(made) and int(operand) < len(operands) and into < len(operands[int(operand)]):
                self._unite(operands[int(operand)][into], made[at])

    def _note_copy(self, op: Op, made: Ids, operands: list[Ids]) -> None:
        """Results that are a parameter of the program moved, cast, gathered or sliced, and nothing else."""
        sources = {self._find(each).copies for ids in operands for each in ids if self.buffers[each].bytes > 4096}
        if len(sources) != 1 or -1 in sources or not (op.opcode in _MOVING or self._only_moves(op)):
            return
        for each in made:
            self.buffers[each].copies = next(iter(sources))

    def _only_moves(self, op: Op) -> bool:
        if op.opcode != "fusion":
            return False
        inner = [self.program.computations[name] for name in op.names("calls") if name in self.program.computations]
        return bool(inner) and all(each.opcode in _MOVING for one in inner for each in one.ops.values())

    # Results in the place of operands.

    def _take_places(self) -> None:
        for now, op, made, operands in self.kept:
            for each in made:
                result = self._find(each)
                if result.argument >= 0 or result.start != now or not result.bytes:
                    continue  # it has its place: of a donated argument, or of a loop
                for index, ids in enumerate(operands):
                    for operand in ids:
                        place = self._find(operand)
                        free = place.argument < 0 and place.end == now and place is not result
                        same = place.bytes == result.bytes and place.space == result.space
                        if free and same and self._goes_elementwise(op, index):
                            self._unite(operand, each)
                            break
                    else:
                        continue
                    break

    def _goes_elementwise(self, op: Op, index: int) -> bool:
        """Whether each element of the result depends on the operand's element at its own place alone."""
        if op.opcode != "fusion":
            return True
        name = next(iter(op.names("calls")), "")
        if (name, index) not in self.elementwise:
            self.elementwise[name, index] = self._elementwise_inside(name, index)
        return self.elementwise[name, index]

    def _elementwise_inside(self, name: str, index: int) -> bool:
        computation = self.program.computations.get(name)
        if computation is None:
            return False
        waiting = [
            op for op in computation.ops.values() if op.opcode == "parameter" and op.inside.strip() == str(index)
        ]
        seen: set[str] = set()
        while waiting:
            op = waiting.pop()
            if op.name in seen:
                continue
            seen.add(op.name)
            for user, at in self.program.users.get((name, op.name), []):
                in_place = user.opcode == "dynamic-update-slice" and at == 0
                if not (in_place or user.opcode in _ELEMENTWISE or user.opcode in ("bitcast", "tuple")):
                    return False
                waiting.append(user)
        return True


def _lend(buffers: list[Buffer]) -> None:
    """Put others where a donated argument lies, from its last reading until its next value is made there.

    As XLA's buffer assignment does: large ones first, each into the smallest place that is free for all of its life.
    """
    places = sorted(
        ((each.bytes, each.space, gap, []) for each in buffers if (gap := _unused(each))), key=lambda place: place[0]
    )
    own = [each for each in buffers if each.bytes and each.argument < 0 and not each.result]
    for each in sorted(own, key=lambda each: -each.bytes):
        for size, space, (last, first), lent in places:
            fits = each.bytes <= size and each.space == space and last < each.start and each.end < first
            if fits and all(each.end < start or end < each.start for start, end in lent):
                lent.append((each.start, each.end))
                each.bytes = 0
                break


def _unused(buffer: Buffer) -> tuple[int, int] | None:
    """When a donated argument is read for the last time, and when its next value is made."""
    made = min((at for at, _ in buffer.makers if at > 0), default=0)
    if buffer.argument < 0 or not buffer.result or any(at == made for at, _ in buffer.readers):
        return None  # not donated; or its next value is made in place
    return max((at for at, _ in buffer.readers if at < made), default=0), made


def _alike(stored: Stored | None, other: Stored) -> bool:
    return stored is not None and stored.shape == other.shape


def moments_of(curve: Sequence[tuple[int, int]], most: int) -> tuple[tuple[int, int], ...]:
    """At most about `most` points of `curve`: the highest of each stretch."""
    step = max(1, -(-len(curve) // most))
    return tuple(max(curve[at : at + step], key=lambda point: point[1]) for at in range(0, len(curve), step))
