"""What small integers in HLO come to on each device: slice offsets, table look-ups, loop counters.

Enough of an interpreter to tell, from text alone, how often a loop runs and which part of an array each device keeps.
A value is an array `(devices, *dims)`, or `None` where the text does not say.
"""

import re
from collections.abc import Callable

import numpy as np

from ._text import Op, Place, Program, Shape

_MOST_ELEMENTS = 65_536


def evaluate(program: Program, computation: str, name: str, num_devices: int) -> np.ndarray | None:
    """The value of an operation on devices `0 .. num_devices - 1`."""
    return _Values(program, num_devices).at((computation, name))


def depends_on_device(program: Program, computation: str, name: str) -> bool:
    """Whether an operation's value can differ between devices because of `partition-id`, as far as can be seen."""
    seen: set[Place] = set()
    waiting: list[Place | None] = [(computation, name)]
    origins = _Origins(program)
    while waiting:
        place = waiting.pop()
        place = None if place is None else origins.of(place)
        if place is None or place in seen:
            continue
        seen.add(place)
        op = program.op(place)
        if op is None:
            continue
        if op.opcode in ("partition-id", "replica-id"):
            return True
        waiting += [(place[0], operand) for operand in op.operands]
    return False


def trip_count(program: Program, loop: Op) -> int | None:
    """How often a `while` runs its body: as the compiler says, or from a counter compared with a constant."""
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)"?\}', loop.attributes)
    if known:
        return int(known.group(1))
    conditions, bodies = loop.names("condition"), loop.names("body")
    if len(conditions) != 1 or len(bodies) != 1 or not {*conditions, *bodies} <= set(program.computations):
        return None
    origins = _Origins(program)
    condition, body = program.computations[conditions[0]], program.computations[bodies[0]]
    test = origins.op((condition.name, condition.root))
    if test is None or test.opcode != "compare" or len(test.operands) != 2:
        return None
    numbers = _Values(program, 1)
    for side, flip in ((0, False), (1, True)):
        counter = origins.op((test.computation, test.operands[side]))
        index = _carried(program, condition.name, counter)
        bound = numbers.scalar((test.computation, test.operands[1 - side]))
        if index is None or bound is None or not loop.operands:
            continue
        start = numbers.element((loop.computation, loop.operands[0]), index)
        step = _step(program, origins, numbers, body.name, index)
        if start is None or step is None:
            return None
        return _trips(start, step, bound, test.attribute("direction") or "", flip)
    return None


def slices_kept(program: Program, op: Op, index: int | None) -> tuple[Op, ...]:
    """The dynamic-slices that are all that is ever used of a result; `()` if anything else uses it.

    Looks through layout changes, elementwise operations, `-done`, tuples and fusions. `index` picks one result of
    several.
    """
    found: list[Op] = []
    waiting: list[tuple[Op, int | None]] = [(op, index)]
    while waiting:
        made, element = waiting.pop()
        if made.root:
            outside = _caller(program, made.computation)
            if outside is None or outside.opcode not in ("fusion", "call"):
                return ()
            waiting.append((outside, element))
            continue
        users = program.users.get((made.computation, made.name), [])
        if not users:
            return ()
        for user, at in users:
            if user.opcode == "get-tuple-element":
                if element is None or user.attribute("index") == str(element):
                    waiting.append((user, None))
            elif user.opcode == "dynamic-slice" and at == 0 and element is None:
                found.append(user)
            elif user.opcode == "tuple":
                waiting.append((user, at))
            elif user.opcode in ("fusion", "call") and element is None:
                inner = _parameter(program, user, at)
                if inner is None:
                    return ()
                waiting.append((inner, None))
            elif user.opcode in _PASSING or (element is None and _is_elementwise(user, made)):
                waiting.append((user, element))
            else:
                return ()
    return tuple(found)


def piece_in_zeros(program: Program, computation: str, name: str) -> Op | None:
    """The dynamic-update-slice that puts a piece into an array of zeros, if a value is made so."""
    origins = _Origins(program)
    made = origins.op((computation, name))
    for _ in range(8):
        if made is None or made.opcode not in ("convert", "reshape") or not made.operands:
            break
        made = origins.op((made.computation, made.operands[0]))
    if made is None or made.opcode != "dynamic-update-slice":
        return None
    base = origins.op((made.computation, made.operands[0]))
    if base is not None and base.opcode == "broadcast" and base.operands:
        base = origins.op((base.computation, base.operands[0]))
    is_zero = base is not None and base.opcode == "constant" and re.fullmatch(r"-?0(\.0*)?", base.inside.strip())
    return made if is_zero else None


def made_by(program: Program, computation: str, name: str) -> tuple[Op, ...]:
    """What makes a value: the operation of that name, and, where that only hands it on, what is behind it."""
    ops = (program.op((computation, name)), _Origins(program).op((computation, name)))
    return tuple(dict.fromkeys(op for op in ops if op is not None))


_PASSING = ("all-reduce-done", "async-done", "opt-barrier", "copy-start", "copy-done")
_ELEMENTWISE = frozenset({
    "abs", "add", "and", "bitcast", "bitcast-convert", "ceil", "clamp", "compare", "convert", "copy", "cosine",
    "divide", "exponential", "floor", "log", "logistic", "maximum", "minimum", "multiply", "negate", "not", "or",
    "power", "reduce-precision", "remainder", "reshape", "round-nearest-even", "rsqrt", "select", "sign", "sine",
    "sqrt", "subtract", "tanh", "transpose", "xor",
})  # fmt: skip


def _is_elementwise(op: Op, operand: Op) -> bool:
    """Whether every element of the result comes from one element of the operand, and none is lost."""
    if op.opcode not in _ELEMENTWISE or len(op.shapes) != 1:
        return False
    return not operand.shapes or op.shapes[0].size == operand.shapes[-1].size


def _caller(program: Program, computation: str) -> Op | None:
    """The one operation that calls a computation; `None` if none does, or several do."""
    callers = program.callers.get(computation, [])
    return callers[0] if len(callers) == 1 else None


def _parameter(program: Program, caller: Op, index: int) -> Op | None:
    for name in (*caller.names("calls"), *caller.names("to_apply")):
        for op in program.computations[name].ops.values() if name in program.computations else ():
            if op.opcode == "parameter" and op.inside.strip() == str(index):
                return op
    return None


class _Origins:
    """Where a value was made: back through copies, fusion and call boundaries, tuples, and loops that only carry it."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def op(self, place: Place) -> Op | None:
        found = self.of(place)
        return None if found is None else self.program.op(found)

    def of(self, place: Place) -> Place | None:
        for _ in range(256):
            op = self.program.op(place)
            if op is None:
                return None
            after = self._back(op)
            if after is None:
                return place
            place = after
        return None

    def element(self, place: Place, index: int) -> Place | None:
        """Where the `index`-th part of a tuple was made, one step back."""
        found = self.of(place)
        op = None if found is None else self.program.op(found)
        if op is None:
            return None
        if op.opcode == "tuple":
            return (op.computation, op.operands[index]) if index < len(op.operands) else None
        if op.opcode == "while":
            return self._invariant(op, index)
        if op.opcode == "parameter":
            loop = _caller(self.program, op.computation)
            if loop is not None and loop.opcode == "while":
                return self._invariant(loop, index)
        if op.opcode == "fusion":
            inner = self._root(op)
            return None if inner is None else self.element(inner, index)
        return None

    def _invariant(self, loop: Op, index: int) -> Place | None:
        """The loop's own `index`-th input, if the body hands it on unchanged."""
        for name in loop.names("body"):
            body = self.program.computations.get(name)
            last = None if body is None else body.ops.get(body.root)
            if body is None or last is None or last.opcode != "tuple" or index >= len(last.operands):
                return None
            at: Op | None = body.ops.get(last.operands[index])
            while at is not None and at.opcode == "copy" and at.operands:
                at = body.ops.get(at.operands[0])
            if _carried(self.program, name, at) != index:
                return None
        return self.element((loop.computation, loop.operands[0]), index) if loop.operands else None

    def _back(self, op: Op) -> Place | None:
        if op.opcode in ("copy", "bitcast", "opt-barrier", "copy-done", "copy-start") and op.operands:
            return (op.computation, op.operands[0])
        if op.opcode == "fusion" and len(op.shapes) == 1:
            return self._root(op)
        if op.opcode == "parameter":
            caller = _caller(self.program, op.computation)
            number = op.inside.strip()
            if caller is None or caller.opcode not in ("fusion", "call", "async-start") or not number.isdigit():
                return None
            return (caller.computation, caller.operands[int(number)]) if int(number) < len(caller.operands) else None
        if op.opcode == "get-tuple-element" and op.operands:
            index = op.attribute("index")
            return self.element((op.computation, op.operands[0]), int(index)) if index and index.isdigit() else None
        return None

    def _root(self, op: Op) -> Place | None:
        for name in op.names("calls"):
            inner = self.program.computations.get(name)
            if inner is not None and inner.root in inner.ops:
                return (name, inner.root)
        return None


class _Values:
    """Values on each device, looked up once."""

    def __init__(self, program: Program, num_devices: int) -> None:
        self.program = program
        self.num_devices = num_devices
        self.origins = _Origins(program)
        self.known: dict[Place, np.ndarray | None] = {}

    def at(self, place: Place) -> np.ndarray | None:
        origin = self.origins.of(place)
        made = None if origin is None else self.program.op(origin)
        if origin is None or made is None:
            return None
        if origin not in self.known:
            self.known[origin] = None  # a value that needs itself is not known
            self.known[origin] = self._run(made)
        value, wanted = self.known[origin], self.program.op(place)
        if value is None or wanted is None or len(wanted.shapes) != 1 or value[0].size != wanted.shapes[0].size:
            return value
        return value.reshape(self.num_devices, *wanted.shapes[0].dims)  # a bitcast on the way changes the shape

    def scalar(self, place: Place) -> int | None:
        value = self.at(place)
        return int(value.ravel()[0]) if value is not None and value[0].size == 1 else None

    def element(self, place: Place, index: int) -> int | None:
        made = self.origins.element(place, index)
        return None if made is None else self.scalar(made)

    def _run(self, op: Op) -> np.ndarray | None:
        if len(op.shapes) != 1 or op.shapes[0].size > _MOST_ELEMENTS:
            return None
        dims = op.shapes[0].dims
        if op.opcode == "constant":
            return self._constant(op.inside, op.shapes[0])
        if op.opcode == "partition-id":
            return np.arange(self.num_devices)
        if op.opcode == "replica-id":
            return np.zeros(self.num_devices, dtype=np.int64)
        operands = [self.at((op.computation, name)) for name in op.operands]
        known = [value for value in operands if value is not None]
        if not known or len(known) < len(operands):
            return None
        try:
            value = self._apply(op, known, dims)
        except (TypeError, ValueError):  # another number of operands, or shapes that only XLA can match
            return None
        return value if value is not None and value.shape == (self.num_devices, *dims) else None

    def _constant(self, written: str, shape: Shape) -> np.ndarray | None:
        words = re.findall(r"true|false|-?\d+", written)
        if shape.dtype[0] not in "sup" or len(words) != shape.size:  # not an integer, or a long one, elided
            return None
        numbers = np.asarray([_TRUTH[word] if word in _TRUTH else int(word) for word in words], dtype=object)
        if any(abs(number) >= 2**63 for number in numbers):
            return None
        return np.broadcast_to(numbers.astype(np.int64).reshape(shape.dims), (self.num_devices, *shape.dims))

    def _apply(self, op: Op, operands: list[np.ndarray], dims: tuple[int, ...]) -> np.ndarray | None:
        if op.opcode in ("convert", "reshape"):
            return operands[0].reshape(self.num_devices, *dims)
        if op.opcode == "broadcast":
            if operands[0][0].size != 1:
                return None
            return np.broadcast_to(operands[0].reshape(-1, *[1] * len(dims)), (self.num_devices, *dims))
        if op.opcode == "dynamic-slice":
            table, *starts = operands
            if table.ndim != 2 or len(starts) != 1:
                return None
            first = np.clip(starts[0].ravel(), 0, table.shape[1] - dims[0])
            return np.stack([row[at : at + dims[0]] for row, at in zip(table, first, strict=True)])
        if op.opcode == "compare":
            compare = _COMPARE.get(op.attribute("direction") or "")
            return None if compare is None else compare(operands[0], operands[1]).astype(np.int64)
        run = _ARITHMETIC.get(op.opcode)
        return None if run is None else run(*operands)


_TRUTH = {"true": 1, "false": 0}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": lambda a, b: np.where(b == 0, 0, a // np.where(b == 0, 1, b)),
    "remainder": lambda a, b: np.where(b == 0, 0, a % np.where(b == 0, 1, b)),
    "minimum": np.minimum,
    "maximum": np.maximum,
    "and": np.bitwise_and,
    "shift-left": np.left_shift,
    "shift-right-logical": np.right_shift,
    "clamp": lambda low, value, high: np.clip(value, low, high),
    "select": lambda test, yes, no: np.where(test != 0, yes, no),
}


def _carried(program: Program, computation: str, op: Op | None) -> int | None:
    """The index of the loop variable that `op` reads, if it reads one of `computation`'s."""
    if op is None or op.opcode != "get-tuple-element" or op.computation != computation or not op.operands:
        return None
    source = program.computations[computation].ops.get(op.operands[0])
    index = op.attribute("index")
    return int(index) if source is not None and source.opcode == "parameter" and index and index.isdigit() else None


def _step(program: Program, origins: _Origins, numbers: _Values, body: str, index: int) -> int | None:
    """What one pass of the body adds to the loop variable `index`."""
    last = program.computations[body].ops.get(program.computations[body].root)
    if last is None or last.opcode != "tuple" or index >= len(last.operands):
        return None
    following = origins.op((body, last.operands[index]))
    if following is None or following.opcode not in ("add", "subtract") or len(following.operands) != 2:
        return None
    sides = [(following.computation, name) for name in following.operands]
    for counter, other in ((0, 1), (1, 0)) if following.opcode == "add" else ((0, 1),):
        if _carried(program, body, origins.op(sides[counter])) == index:
            step = numbers.scalar(sides[other])
            return None if step is None else step if following.opcode == "add" else -step
    return None


def _trips(start: int, step: int, bound: int, direction: str, flip: bool) -> int | None:
    if flip:  # constant < counter
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(bound - start + (direction == "LE")) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(start - bound + (direction == "GE")) // -step))
    if direction == "NE" and step and (bound - start) % step == 0 and (bound - start) // step >= 0:
        return (bound - start) // step
    return None
