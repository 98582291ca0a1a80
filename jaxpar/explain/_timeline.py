"""When each operation of a step runs: computation, communication, and what of it hides behind the other.

The scheduled program is walked in its own order. A device computes one thing at a time; a transfer takes the links it
needs, in the order of issue, and the device goes on until the operation that wants the result. So a synchronous
collective is exposed whole, a `-start`/`-done` pair by what is left of it at its `-done`, and an XLA:TPU asynchronous
collective fusion by what is left after the last fusion that carries it. A loop runs twice here, then repeats its second
pass; what each pass sends and none waits for (reductions between slices, which the compiler may hand to the next pass)
queues on its links, and the step ends when all has arrived.
"""

import dataclasses
import math
import re

import numpy as np

from .. import _hlo
from .._hlo import Collective, MeshAxes, Module, Op
from ..pipeline import Schedule as PipelineSchedule
from ..pipeline._tick import WORK, times_of
from ._coefficients import Coefficients, bounds, coefficients
from ._compiled import Compiled
from ._cost import Cost, cost, seconds
from ._paths import Paths
from ._wire import Transfer, fabric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a device does for a while, or equal things in a row.

    Attributes:
        lane: `"compute"`, the collective's axes joined by a comma (`"fsdp"`), `"to host"` or `"from host"`.
        start: Seconds since the step began.
        seconds: How long, all repetitions together.
        count: Repetitions that are drawn as one: a loop's iterations.
        name: `"all-gather"`, `"matmul"`, `"attention"`.
        path: Where in the model.
        depth: Loops around it.
    """

    lane: str
    start: float
    seconds: float
    count: int
    name: str
    path: str
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTime:
    """How long one instruction is taken to run each time, and by which reckoning.

    Attributes:
        computation: That holds it.
        name: The instruction.
        seconds: Each time.
        count: Times a step; a loop whose trip count is not known counts once.
        flops: Each time.
        bytes: Read and written, each time.
        origin: `"cycles"` (the compiler's own), `"roofline"`, `"kernel"` (a custom call by its own FLOPs and bytes) or
            `"link"` (communication).
    """

    computation: str
    name: str
    seconds: float
    count: int
    flops: float
    bytes: float
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A predicted step.

    Attributes:
        step_seconds: The whole step.
        compute_seconds: The device computes.
        communication_seconds: Something is on a link, hidden or not.
        exposed_communication_seconds: The device waits for a link: `step_seconds` less `compute_seconds` and
            `bubble_seconds`.
        bubble_seconds: The device waits for another stage of a pipeline.
        low: Of `step_seconds`, as far as the coefficients are uncertain.
        high: The same, upwards.
        events: What a picture shows, folded: some hundreds at most.
        ops: Every instruction that takes time.
        exposed: Exposed seconds of each collective by `(computation, instruction)`, all runs together.
        transfers: Seconds of each collective, each time, wire bytes and the algorithm, by `(computation, instruction)`.
        notes: What was assumed, and what could not be told.
    """

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    bubble_seconds: float
    low: float
    high: float
    events: tuple[Event, ...]
    ops: tuple[OpTime, ...] = ()
    exposed: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    transfers: dict[tuple[str, str], tuple[float, int, str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def predict(module: Module, compiled: Compiled, pipeline: PipelineSchedule | None = None) -> Timeline | None:
    """The timeline of one step of `compiled`, read as `module`; `None` for hardware of which no speed is known.

    Never raises for what the text holds: what cannot be told is in `notes`. With the schedule of its pipeline it is
    known how often a stage takes each branch of a tick, and how often it waits for others that do.
    """
    if not compiled.hardware.hbm_bandwidth or not module.program.entry:
        return None
    schedule = _Schedule(module, compiled, pipeline)
    middle = _Run(schedule, coefficients(), record=True)
    middle.all()
    faster, slower = 0.0, 0.0
    for fast, slow in bounds():
        faster += min(0.0, _Run(schedule, fast, record=False).all() - middle.now) ** 2
        slower += max(0.0, _Run(schedule, slow, record=False).all() - middle.now) ** 2
    return Timeline(
        step_seconds=middle.now,
        compute_seconds=middle.computing,
        communication_seconds=middle.communicating,
        exposed_communication_seconds=middle.now - middle.computing - middle.waiting,
        bubble_seconds=middle.waiting,
        low=middle.now - math.sqrt(faster),
        high=middle.now + math.sqrt(slower),
        events=_folded(middle.counted(), middle.now),
        ops=tuple(dataclasses.replace(each, count=round(middle.runs[place])) for place, each in middle.ops.items()),
        exposed=dict(middle.exposed),
        transfers={place: (each.seconds, each.wire_bytes, each.algorithm) for place, each in middle.transfers.items()},
        notes=tuple(dict.fromkeys((*schedule.notes, *middle.notes))),
    )


def mesh_of(module: Module, compiled: Compiled) -> MeshAxes:
    """The mesh of a program; where nobody named its axes, those that its collectives run over."""
    axes, hardware = compiled.axes, compiled.hardware
    unnamed = not axes.names or (axes.names == (UNNAMED,) and axes.size == hardware.num_devices)
    if not unnamed:
        return axes
    per_slice = hardware.num_devices // hardware.num_slices
    several = hardware.num_slices > 1 and hardware.kind == "tpu"
    slices = tuple(at // per_slice for at in range(hardware.num_devices)) if several else ()
    return module.axes(hardware.num_devices, axes.slices or slices)


UNNAMED = "devices"
"""The one axis of a program whose mesh is not known."""

_Place = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Load:
    """A transfer that an operation starts: a collective among `groups`, or a copy between memories, without any."""

    place: _Place
    kind: str
    bytes: float
    lane: str
    groups: np.ndarray | None = None


class _Schedule:
    """What the program is, whatever the coefficients: looked up once, run many times."""

    def __init__(self, module: Module, compiled: Compiled, pipeline: PipelineSchedule | None) -> None:
        self.module = module
        self.ticks = 0 if pipeline is None else pipeline.num_ticks
        self.times = {} if pipeline is None else {WORK[each]: found for each, found in times_of(pipeline).items()}
        self.program = module.program
        self.hardware = compiled.hardware
        self.axes = mesh_of(module, compiled)
        self.fabric = fabric(self.hardware, self.axes)
        self.paths = Paths(each.path for each in compiled.arguments if each.kind in ("parameter", "frozen"))
        self.notes: list[str] = []
        self.costs: dict[_Place, Cost | None] = {}
        self.named: dict[_Place, str] = {}
        self.timed: dict[str, list[Op]] = {}
        self.counted: dict[_Place, int | None] = {}
        self.loads: dict[_Place, _Load] = {}
        self.tensors: dict[_Place, list[Collective]] = {}
        for collective in module.collectives(self.axes):
            self.tensors.setdefault((collective.computation, collective.name), []).append(collective)
        self.carried: dict[str, dict[str, list[tuple[str, _Place]]]] = {}

    def cost(self, op: Op) -> Cost | None:
        place = (op.computation, op.name)
        if place not in self.costs:
            self.costs[place] = cost(self.module, op, self.hardware)
        return self.costs[place]

    def steps(self, computation: str) -> list[Op]:
        """The operations of a computation that may take time."""
        if computation not in self.timed:
            found = self.program.computations.get(computation)
            ops = [] if found is None else found.ops.values()
            self.timed[computation] = [op for op in ops if not _hlo.is_free(op)]
        return self.timed[computation]

    def path(self, op: Op) -> str:
        """Where in the model `op` was made."""
        place = (op.computation, op.name)
        if place not in self.named:
            self.named[place] = self.paths.of(self.module.origin(op)[0]).path
        return self.named[place]

    def shares(self, branch: Op) -> tuple[float, float] | None:
        """Of a branch of a pipeline's tick: in which share of ticks some stage takes it, and in which each does."""
        names = self.module.origin(branch)[0].split("/") if self.times else ()
        found = next((self.times[name] for name in names if name in self.times), None)
        return None if found is None else (found[0] / self.ticks, found[1] / self.ticks)

    def trips(self, loop: Op) -> int | None:
        """How often a loop runs its body."""
        place = (loop.computation, loop.name)
        if place not in self.counted:
            self.counted[place] = self.module.trips(loop)
        return self.counted[place]

    def load(self, place: _Place) -> _Load | None:
        """The collective at `place`, all its tensors together."""
        if place in self.loads:
            return self.loads[place]
        tensors = self.tensors.get(place)
        if not tensors:
            return None
        groups = self.module.members(tensors[0], self.axes)
        if groups is None:
            self.notes.append(f"{place[1]}: which devices it joins cannot be read; it is taken to take no time")
            return None
        whole = any(" and " in each.spelling for each in tensors)  # an all-reduce with a slice moves as one
        kind = "all-reduce" if whole else max(tensors, key=lambda each: each.bytes).kind
        found = _Load(
            place=place,
            kind=kind,
            bytes=float(sum(each.bytes for each in tensors)),
            lane=",".join(tensors[0].axes) or "?",
            groups=groups,
        )
        self.loads[place] = found
        return found

    def copy(self, op: Op) -> _Load:
        """The copy between memories that `op` starts."""
        place = (op.computation, op.name)
        if place not in self.loads:
            self.loads[place] = self._copy(op, place)
        return self.loads[place]

    def _copy(self, op: Op, place: _Place) -> _Load:
        made = [shape for each in self._operands(op) for shape in each.shapes if shape.dims]
        arrays = [shape for shape in op.shapes if shape.dims]
        lane = "memory"
        if made and made[0].space == _HOST:
            lane = "to host" if op.opcode.startswith("dynamic-update") else "from host"
        elif any(shape.space == _HOST for shape in arrays):
            lane = "to host"
        moved = min((shape.bytes for shape in (*made, *arrays)), default=0)  # of a slice or an update, the part
        return _Load(place=place, kind="copy", bytes=float(moved), lane=lane)

    def _operands(self, op: Op) -> list[Op]:
        ops = self.program.computations[op.computation].ops
        return [ops[name] for name in op.operands if name in ops]

    def carriers(self, computation: str) -> dict[str, list[tuple[str, _Place]]]:
        """For each operation of a computation that holds collectives inside: `(phase, the collective's place)`.

        Phases: `"start"`, `"done"`, `"through"` (the transfer goes on), `"whole"` (it starts and ends here).
        """
        if computation not in self.carried:
            self.carried[computation] = self._carriers(computation)
        return self.carried[computation]

    def _carriers(self, computation: str) -> dict[str, list[tuple[str, _Place]]]:
        inside: dict[str, list[tuple[tuple[str, str], _Place]]] = {}
        sequence: dict[tuple[str, str], list[str]] = {}
        for op in self.program.computations[computation].ops.values():
            if op.opcode != "fusion":
                continue
            found = [
                ((inner.opcode, inner.attribute("channel_id") or inner.name), (inner.computation, inner.name))
                for inner in self._inner(op, ())
                if inner.opcode.removesuffix("-start") in _hlo.KINDS
            ]
            if found:
                inside[op.name] = found
                for key, _ in found:
                    sequence.setdefault(key, []).append(op.name)
        result: dict[str, list[tuple[str, _Place]]] = {}
        first: dict[tuple[str, str], _Place] = {}
        for name, found in inside.items():
            for key, place in found:
                first.setdefault(key, place)
                steps = sequence[key]
                if len(steps) == 1:
                    phase = "whole"
                else:
                    phase = "start" if name == steps[0] else "done" if name == steps[-1] else "through"
                result.setdefault(name, []).append((phase, first[key]))
        return result

    def _inner(self, op: Op, above: tuple[str, ...]) -> list[Op]:
        found = []
        for name in op.names("calls"):
            if name in self.program.computations and name not in above:
                for inner in self.program.computations[name].ops.values():
                    found += [inner, *self._inner(inner, (*above, name))] if inner.opcode == "fusion" else [inner]
        return found


class _Run:
    """One walk through the schedule with one set of coefficients."""

    def __init__(self, schedule: _Schedule, known: Coefficients, *, record: bool) -> None:
        self.schedule = schedule
        self.program = schedule.program
        self.known = known
        self.record = record
        self.now = 0.0
        self.computing = 0.0
        self.waiting = 0.0  # for other stages
        self.communicating = 0.0
        self.free: dict[str, float] = {}  # when each side, network or memory is next free
        self.last: dict[str, _Load] = {}  # what used it last
        self.busy = 0.0  # until when some link is
        self.weight = 1.0
        self.depth = 0
        self.pending: dict[object, tuple[float, _Load]] = {}
        self.took: dict[_Place, float] = {}  # by an operation, once reckoned
        self.transfers: dict[_Place, Transfer] = {}
        self.exposed: dict[_Place, float] = {}
        self.ops: dict[_Place, OpTime] = {}
        self.runs: dict[_Place, float] = {}  # how often each of these runs
        self.events: list[Event] = []
        self.repeats: list[float] = []  # how often each of these happens
        self.notes: list[str] = []

    def counted(self) -> list[Event]:
        """The events, with how often each happens."""
        pairs = zip(self.events, self.repeats, strict=True)
        return [dataclasses.replace(event, count=round(times)) for event, times in pairs if round(times)]

    def all(self) -> float:
        """The whole program; when it ends, all that it sent having arrived."""
        self._computation(self.program.entry, ())
        for lane, load in self.last.items():
            if load.lane != "memory":
                self._expose(load, self.free.get(lane, 0.0))
        return self.now

    def _computation(self, name: str, above: tuple[str, ...]) -> None:
        if name in above or name not in self.program.computations:
            return
        carriers = self.schedule.carriers(name)
        for op in self.schedule.steps(name):
            if op.opcode == "while":
                self._loop(op, (*above, name))
            elif op.opcode == "conditional":
                self._branch(op, (*above, name))
            elif op.opcode == "call":
                for inner in op.names("to_apply"):
                    self._computation(inner, (*above, name))
            elif op.name in carriers:
                self._carrier(op, carriers[op.name])
            else:
                self._plain(op)

    # Control flow.

    def _loop(self, op: Op, above: tuple[str, ...]) -> None:
        trips = self.schedule.trips(op)
        if trips is None:
            self.notes.append(f"{op.name}: how often this loop runs is not known; it is taken to run once")
            trips = 1
        bodies = op.names("body")
        if trips < 1 or not bodies:
            return
        begin, before, weight = self.now, len(self.events), self.weight
        self.depth += 1
        self._computation(bodies[0], above)
        if trips > 1:
            second, late = self.now, self._late()
            del self.events[before:], self.repeats[before:]
            self.weight = weight * (trips - 1)
            self._computation(bodies[0], above)
            passed, later = self.now - second, self._late()
            self._wait(passed * (trips - 2))
            for lane, seconds_late in later.items():  # what no pass waits for adds up over all
                self.free[lane] += max(0.0, seconds_late - late.get(lane, 0.0)) * (trips - 2)
            self.weight = weight
            self._stretch(before, second, passed, begin, trips)
        self.depth -= 1

    def _late(self) -> dict[str, float]:
        """How far each lane has yet to go."""
        return {lane: max(0.0, at - self.now) for lane, at in self.free.items()}

    def _wait(self, passed: float) -> None:
        self.now += passed
        self.busy += passed
        self.free = {lane: at + passed for lane, at in self.free.items()}

    def _stretch(self, before: int, second: float, passed: float, begin: float, trips: int) -> None:
        """Draw one pass over the time of all."""
        factor = (self.now - begin) / passed if passed else 0.0
        self._squeeze(before, second, begin, factor, factor)
        self.repeats[before:] = [each * trips for each in self.repeats[before:]]

    def _squeeze(self, before: int, second: float, begin: float, factor: float, length: float) -> None:
        """Draw events that were drawn from `second` on from `begin` on, at other distances and lengths."""
        self.events[before:] = [
            dataclasses.replace(event, start=begin + (event.start - second) * factor, seconds=event.seconds * length)
            for event in self.events[before:]
        ]

    def _branch(self, op: Op, above: tuple[str, ...]) -> None:
        shares = self.schedule.shares(op)
        if shares is None:
            self._longest(op, above)
            return
        # Ticks are drawn alike: each holds its part of what all of them do.
        some, own = shares
        begin, before, weight = self.now, len(self.events), self.weight
        self.weight = weight * own
        self._longest(op, above)
        self.weight = weight
        passed = self.now - begin
        self.waiting += passed * (some - own) * weight
        self._wait(-passed * (1 - some))
        self._squeeze(before, begin, begin, some, own)
        self.repeats[before:] = [each * own for each in self.repeats[before:]]

    def _longest(self, op: Op, above: tuple[str, ...]) -> None:
        branches = op.names("branch_computations") or (*op.names("true_computation"), *op.names("false_computation"))
        longest, name = 0.0, ""
        for branch in branches:
            probe = _Run(self.schedule, self.known, record=False)
            probe._computation(branch, above)
            if probe.now > longest or not name:
                longest, name = probe.now, branch
        if len(branches) > 1 and self.schedule.shares(op) is None:
            self.notes.append(f"{op.name}: of {len(branches)} branches the longest is taken")
        if name:
            self._computation(name, above)

    # Operations.

    def _plain(self, op: Op) -> None:
        place = (op.computation, op.name)
        opcode = op.opcode
        if opcode == "send-done":
            return  # the data has left the device: the result is waited for at `recv-done`
        if opcode.endswith("-done") or opcode in ("async-update", "copy-done"):
            self._finish(op)
        elif opcode == "recv":
            return
        elif opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"):
            self._issue(place, self.schedule.copy(op))
        elif opcode == "async-start":
            inner = next((each for each in self._inside(op) if self.schedule.load(each)), None)
            load = self.schedule.load(inner) if inner else None
            if load is None:
                self._compute(op)
            self._issue(place, load)
        elif opcode.removesuffix("-start") in _hlo.KINDS or opcode == "send":
            load = self.schedule.load(place)
            if opcode.endswith("-start") or opcode == "send":
                self._issue(_meeting(op) if opcode == "send" else place, load)
            elif load is not None:
                self._expose(load, self._start(load))
        else:
            self._compute(op)

    def _inside(self, op: Op) -> list[_Place]:
        return [
            (name, inner.name)
            for name in op.names("calls")
            if name in self.program.computations
            for inner in self.program.computations[name].ops.values()
        ]

    def _carrier(self, op: Op, collectives: list[tuple[str, _Place]]) -> None:
        """A fusion that holds collectives: it starts some, computes, and waits for those that end in it."""
        for phase, place in collectives:
            if phase == "start":
                self._issue(place, self.schedule.load(place))
        known = self.schedule.cost(op)
        if known is not None and (known.origin != "roofline" or known.flops):
            self._compute(op)
        for phase, place in collectives:
            if phase == "done":
                self._settle(place)
            elif phase == "whole" and (load := self.schedule.load(place)) is not None:
                self._expose(load, self._start(load))

    def _compute(self, op: Op) -> None:
        place = (op.computation, op.name)
        took = self.took.get(place)
        if took is None:
            known = self.schedule.cost(op)
            took = 0.0 if known is None else seconds(known, self.schedule.hardware, self.known)
            self.took[place] = took
        if took <= 0:
            return
        if self.record and (known := self.schedule.cost(op)) is not None:
            self.runs[place] = self.runs.get(place, 0.0) + self.weight
            self.ops[place] = OpTime(
                computation=op.computation,
                name=op.name,
                seconds=took,
                count=1,
                flops=known.flops,
                bytes=known.bytes,
                origin=known.origin,
            )
            self._event("compute", self.now, took, _word(op, known), op)
        self.now += took
        self.computing += took * self.weight

    # Transfers.

    def _start(self, load: _Load) -> float:
        """Put a transfer on its links as soon as they are free; when it ends."""
        if load.groups is None:
            chip = self.schedule.hardware
            inside = load.lane == "memory"
            rate = chip.hbm_bandwidth * self.known.memory if inside else chip.chip.pcie * self.known.host
            took, lanes = (load.bytes / rate if rate else 0.0), [load.lane]
        else:
            transfer = self.transfers.get(load.place)
            if transfer is None:
                transfer = self.schedule.fabric.transfer(load.kind, load.bytes, load.groups, self.known)
                self.transfers[load.place] = transfer
            took, lanes = transfer.seconds, sorted(transfer.lanes)
        begin = max([self.now, *(self.free.get(lane, 0.0) for lane in lanes)])
        end = begin + took
        for lane in lanes:
            self.free[lane], self.last[lane] = end, load
        if load.lane != "memory":
            self.communicating += max(0.0, end - max(begin, self.busy)) * self.weight
            self.busy = max(self.busy, end)
            if self.record:
                op = self.program.op(load.place)
                self._event(load.lane, begin, took, load.kind, op)
        return end

    def _issue(self, key: object, load: _Load | None) -> None:
        if load is not None:
            self.pending[key] = (self._start(load), load)

    def _finish(self, op: Op) -> None:
        """The second half of a pair: its operand, or that one's operand, started the transfer."""
        for name in op.operands:
            made = self.program.op((op.computation, name))
            if made is None:
                continue
            key: object = (op.computation, name)
            if made.opcode == "async-update" and key not in self.pending:
                self._move(made, key)
            if op.opcode == "async-update":
                return
            self._settle(_meeting(made) if made.opcode == "recv" else key)

    def _move(self, update: Op, key: object) -> None:
        for name in update.operands:
            held = self.pending.pop((update.computation, name), None)
            if held is not None:
                self.pending[key] = held

    def _settle(self, key: object) -> None:
        held = self.pending.pop(key, None)
        if held is not None:
            end, load = held
            self._expose(load, end)

    def _expose(self, load: _Load, end: float) -> None:
        """The device waits for `load` until `end`."""
        waited = max(0.0, end - self.now)
        if waited and load.lane == "memory":
            self.computing += waited * self.weight
        elif waited or load.kind != "copy":
            self.exposed[load.place] = self.exposed.get(load.place, 0.0) + waited * self.weight
        self.now = max(self.now, end)

    def _event(self, lane: str, start: float, took: float, name: str, op: Op | None) -> None:
        path = "" if op is None else self.schedule.path(op)
        self.repeats.append(1.0)
        self.events.append(Event(lane=lane, start=start, seconds=took, count=1, name=name, path=path, depth=self.depth))


def _meeting(op: Op) -> object:
    """What a `send` and the `recv` of its answer have in common."""
    named = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', op.attributes)
    return ("send", named.group(1) if named else op.attribute("channel_id"))


_HOST = 5
"""The memory space of the host, in layouts of XLA."""


def _word(op: Op, known: Cost) -> str:
    if known.kind.startswith("attention"):
        return "attention"
    if known.origin == "kernel":
        return "kernel"
    return "matmul" if known.flops else "copy" if op.opcode in ("copy", "transpose", "reshape") else "elementwise"


_MOST_EVENTS = 400


def _folded(events: list[Event], total: float) -> tuple[Event, ...]:
    """Neighbours of one kind and place as one, ever coarser until there are few enough."""
    shortest = 0.0
    while True:
        lanes: dict[str, list[Event]] = {}
        for event in sorted(events, key=lambda each: (each.lane, each.start)):
            row = lanes.setdefault(event.lane, [])
            if row and _one(row[-1], event, shortest):
                row[-1] = _joined(row[-1], event)
            else:
                row.append(event)
        found = [event for row in lanes.values() for event in row]
        if len(found) <= _MOST_EVENTS or shortest > total:
            return tuple(sorted(found, key=lambda each: (each.start, each.lane)))
        shortest = max(shortest * 2, total / 8192)


def _one(earlier: Event, later: Event, shortest: float) -> bool:
    if earlier.depth != later.depth or later.start - (earlier.start + earlier.seconds) > max(shortest, 1e-9):
        return False
    return (earlier.name, earlier.path) == (later.name, later.path) or later.seconds < shortest


def _joined(earlier: Event, later: Event) -> Event:
    longer = earlier if earlier.seconds >= later.seconds else later
    end = max(earlier.start + earlier.seconds, later.start + later.seconds)
    return dataclasses.replace(longer, start=earlier.start, seconds=end - earlier.start)
