"""`estimate`: what a program costs in memory, traffic and time, reckoned from its plan without compiling anything.

It takes one trace of the loss, which serves every mesh, and milliseconds for each. Less exact than a compiled program,
and made for ranking meshes. Seen against compilers, as estimate / truth:

- XLA:TPU, memory: 0.97 to 0.99 for 34B on 64 v5p (five meshes and microbatches), 0.99 for 7B on 256 v5e, 1.06 and 1.19
  for small decoders of 4 layers on v5e, 1.07 and 1.10 for one of 4 MiB.
- XLA:TPU, computation: 0.98 to 1.00 for 34B, 0.94 for 7B; 0.85 to 0.99 for those decoders, one of which attends by
  XLA's own products, by which the rates of v5e were chosen. By splash attention XLA copies queries and keys once more,
  in float32, which is not seen here. Of a step below a millisecond it is half or less: what each operation costs to
  start is not counted.
- XLA:CPU, memory: 0.74 to 1.07; a decoder is low, as that compiler runs whatever is ready and holds its result.
- XLA:GPU: nothing was compared.

- *Traffic* is `Plan.moves` of every parameter, and what a split vocabulary moves.
- *Memory* is what the plan stores, the batch, stacks of layers in the dtype that they are read in, and the fullest
  moment of the gradient's own arrays, each cut as `_spread` finds: saved activations and the work of one layer, with
  the weights that are gathered for it. Gradients outside of loops stay whole until the end of the pass.
- *Time*: each operation takes as long as its FLOPs or its bytes need, whichever is longer. Gathered weights (on
  GPUs reduced gradients too) hide behind the computation of their pass, as far as it reaches; activations, on which
  the next matrix waits, hide behind nothing.
"""

import collections
import dataclasses
import functools as ft
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import _mesh
from .._compat import scan_counts
from .._context import axes_at
from .._plan import Move, Record
from .._recipe import Program, Recipe
from .._types import Axes
from . import _trace
from ._axes import mesh_axes
from ._coefficients import Coefficients, bounds, coefficients
from ._collectives import Row
from ._flops import DTYPES, kernel_work
from ._memory import ON_CHIP as ON_CHIP_PATH, Held, Memory
from ._report import Report
from ._spread import Split, Spread
from ._timeline import Event, Timeline
from ._trace import HEAVY, PASSED_ON, PRODUCTS, Block, Op, Trace, Value, product_flops
from ._units import size_text
from ._wire import Transfer, fabric

# Beside the predictor's coefficients: the first figure is the estimate, the others bound the step from below and above.
# By chip where XLA's own cycles have been read, else by kind.
MATMUL = {"v5p": (0.95, 1.0, 0.85), "tpu": (0.97, 1.0, 0.85), "gpu": (0.75, 0.85, 0.60), "cpu": (1.0, 1.0, 1.0)}
"""Of the peak FLOP/s, reached by matrix products that fill whole tiles: on TPUs what XLA's own cycles say of them."""
MEMORY = {"v5p": (0.80, 0.94, 0.60), "tpu": (0.94, 1.0, 0.70), "gpu": (0.80, 0.92, 0.65), "cpu": (1.0, 1.0, 1.0)}
"""Of the memory's bandwidth: likewise, of the softmax of plain attention."""
ON_CHIP = 2.4
"""How much faster than memory the vector units of a TPU work through arrays that are on the chip: likewise."""
HIDING = {"tpu": ("weight",), "gpu": ("weight", "gradient"), "cpu": ()}
"""What runs behind computation. XLA:TPU makes a reduced gradient of one synchronous fusion, XLA:GPU an asynchronous."""
HIDDEN = (0.80, 1.0, 0.0)
"""How much of that does, where its pass computes for long enough: the first of a loop has nothing before it."""
TILE = {"tpu": (8, 128, 128), "gpu": (16, 16, 16), "cpu": (1, 1, 1)}
"""Rows, inputs and outputs that a matrix unit takes at once: smaller ones leave it partly idle."""

_MICRO = "microbatch"
"""The axis of microbatches: rows are cut by it too, in time rather than in space."""


def estimate(program: Program, traced: Trace | None = None) -> Report:
    """What `program` costs, by reckoning. Compiles nothing, allocates nothing.

    Args:
        program: A recipe on a mesh.
        traced: From `trace(program)` of the same recipe on any mesh, to save tracing the loss again.

    Example:
        >>> from models.mlp import mlp
        >>> report = estimate(mlp().on(jp.mesh("v5e:4x2", data=8)))
        >>> report.origin, [(row.kind, row.axes, row.bytes) for row in report.collectives][:1]
        ('estimate', [('all-reduce', ('data',), 64)])
    """
    return _Estimate(program, _trace.trace(program) if traced is None else traced).report()


def memory_of(program: Program, traced: Trace) -> Memory:
    """The memory of `estimate(program, traced)`, alone."""
    return _Estimate(program, traced).memory()


def in_microbatches(program: Program) -> Iterator[Program]:
    """`program` as it is, then in twice as many microbatches, as long as each device has a row."""
    accumulate = program.recipe.accumulate
    while program.recipe.batch_size % (accumulate * program.plan.num_batch_shards) == 0:
        yield Program(recipe=dataclasses.replace(program.recipe, accumulate=accumulate), plan=program.plan)
        accumulate *= 2


def what_fits(program: Program, traced: Trace, *, needed: int = 0) -> str:
    """The fewest microbatches in which `program` fits, in a sentence; `""` where none are enough.

    Args:
        program: As it does not fit.
        traced: From `trace(program)`.
        needed: What a compiler says that it needs: others are expected to need as much more than estimated.
    """
    if program.plan.stage_axis is not None:
        return ""  # a pipeline's own microbatches are no accumulation, and what stages hold is not estimated
    first = memory_of(program, traced)
    margin = max(1.0, needed / first.peak)
    for each in in_microbatches(program):
        memory = memory_of(each, traced)
        if each.recipe.accumulate > program.recipe.accumulate and memory.peak * margin <= memory.limit:
            return (
                f"Recipe(accumulate={each.recipe.accumulate}) fits: as many microbatches, one after another, need "
                f"about {size_text(int(memory.peak * margin))}."
            )
    return ""


class _Estimate:
    """One program on one mesh."""

    def __init__(self, program: Program, traced: Trace):
        self.program, self.plan, self.recipe = program, program.plan, program.recipe
        self.trace = traced
        self.hardware = _mesh.hardware_of(program.plan.mesh)
        self.spread = Spread({**self.plan.axes, _MICRO: self.recipe.accumulate})
        self.spread.run(traced.block, list(self._input_splits()))
        self.axes = mesh_axes(self.plan.mesh)
        self.fabric = fabric(self.hardware, self.axes)
        self.transfers: dict[Any, Transfer] = {}
        self.tokens = num_tokens(self.recipe) / self.plan.num_batch_shards / self.recipe.accumulate

    def report(self) -> Report:
        timeline, rows = self._timed()
        flops = self.trace.flops
        notes = [
            "an estimate: nothing was compiled",
            *self.trace.notes,
            *(["the stages of a pipeline are not in it: as if all ran all layers"] if self.plan.stage_axis else []),
            *(["the loss is not separable: gradients are reduced once a microbatch"] if self._reduces_each() else []),
        ]
        return Report(
            name="train_step",
            hardware=self.hardware.describe(),
            target=self.hardware.spec,
            axes=dict(self.plan.axes),
            num_devices=self.plan.num_devices,
            options={key: str(value) for key, value in (self.recipe.compiler_options or {}).items()},
            origin="estimate",
            strategies=self.plan.strategies,
            num_tokens=num_tokens(self.recipe),
            peak_flops=self.hardware.peak_flops(flops.by_dtype[0][0] if flops.by_dtype else "float32"),
            memory=self.memory(),
            flops=flops,
            timeline=timeline,
            collectives=rows,
            notes=tuple(notes),
        )

    def _input_splits(self) -> Iterator[Split]:
        for path, value in zip(self.trace.paths, self.trace.block.inputs, strict=False):
            yield _as_split(self.plan.records[path].compute, len(value.shape))
        for value in self.trace.block.inputs[len(self.trace.paths) :]:
            rows = (*self.plan.batch_axes, *([_MICRO] if self.recipe.accumulate > 1 else []))
            yield (rows, *((),) * (len(value.shape) - 1)) if value.shape else ()

    # Memory.

    def memory(self) -> Memory:
        totals = self.plan.totals()
        slots: dict[str, int] = {}
        for record in (*self.plan.records.values(), *(self.plan.optimizer_records or {}).values()):
            kind = {"frozen": "parameter", "rng": "model_state"}.get(record.slot, record.slot)
            slots[kind] = slots.get(kind, 0) + self.plan.local_bytes(record)
        batch = sum(self.spread.num_bytes(value) for value in self.trace.block.inputs[len(self.trace.paths) :])
        batch *= self.recipe.accumulate
        held = [Held(kind=kind, path="", bytes=size) for kind, size in slots.items()]
        held.append(Held(kind="batch", path="", bytes=math.ceil(batch)))
        if self.recipe.accumulate > 1:
            held.append(Held(kind="gradient", path="the accumulator", bytes=self._accumulator()))
        if cast := self._cast():
            held.append(Held(kind="temporary", path="layers in the dtype that they are read in", bytes=cast))
        peak = max(self._fullest(self.trace.block), self._summed_together(), key=_in_memory)
        held += peak.held()
        if (more := min(peak.room, peak.most) - peak.in_memory()) > 0:  # XLA counts the fuller of the two
            held.append(Held(kind="temporary", path=ON_CHIP_PATH, bytes=math.ceil(more)))
        total = sum(each.bytes for each in held)
        argument = sum(slots.values()) + math.ceil(batch)
        return Memory(
            peak=total,
            limit=self.hardware.memory,
            argument=argument,
            output=totals.parameters + (totals.optimizer or 0) + totals.other,
            temporary=total - argument,
            alias=totals.parameters + (totals.optimizer or 0),
            code=0,
            host=0,
            held=tuple(sorted(held, key=lambda each: -each.bytes)),
            origin="estimate",
        )

    def _accumulator(self) -> int:
        """Gradients that add up over microbatches, in float32: whole where they are reduced once a step."""
        trained = [record for record in self.plan.parameters if record.slot == "parameter"]
        return sum(
            math.prod(self.plan.local_shape(record.shape, record.gradient)) * max(4, record.dtype.itemsize)
            for record in trained
        )

    def _cast(self) -> int:
        """Stacks of layers are cast whole, before the loop over them that gathers them one by one."""
        return sum(
            self.plan.local_bytes(record) * record.compute_dtype.itemsize // record.dtype.itemsize
            for record in self.plan.parameters
            if record.layers and record.compute_dtype != record.dtype
        )

    def _held(self, value: Value) -> float:
        """Bytes of an array that is written down."""
        if value.kind == "gradient":
            record = self.plan.records[value.path]
            return math.prod(self.plan.local_shape(record.shape, record.gradient)) * record.dtype.itemsize
        return self.spread.num_bytes(value)

    def _read_bytes(self, value: Value) -> float:
        """Bytes of a parameter as it is read, where that is not as it is stored: gathered, or cast."""
        record = self.plan.records[value.path]
        if record.compute == record.storage and record.compute_dtype == record.dtype:
            return 0.0
        if record.layers and not value.layer:
            return 0.0  # a loop takes its layers one by one, and reads them there
        return self.spread.num_bytes(value)

    def _fullest(self, block: Block, loop: Op | None = None) -> "_Moment":
        """The moment when the arrays that `block`, the body of `loop` or the whole, makes hold the most."""
        now = _Moment(room=self.hardware.chip.on_chip)
        fullest = _Moment(room=now.room)
        most = 0.0
        ends: dict[int, list[Value]] = {}
        born: set[int] = set()
        waiting: set[str] = set()
        sliced = set() if loop is None else {id(value) for value in _scanned(loop, block)}
        late = {} if loop is None or self.hardware.kind == "cpu" else _read_late(loop, block)

        def begin(value: Value, size: float, kind: str, at: int) -> None:
            last = max(late.get(id(value), -1), value.last)
            if id(value) not in born and size and last >= at:
                born.add(id(value))
                now.add(value, size, kind)
                ends.setdefault(last, []).append(value)

        for at, op in enumerate(block.ops):
            for value in op.inputs:
                for source in () if value is None else value.sources:
                    if source.kind == "parameter":
                        begin(source, self._read_bytes(source), "temporary", at)
                    elif id(source) in sliced:
                        begin(source, self.spread.num_bytes(source), "temporary", at)
            room = self._given_up(op, at, block)
            if op.name not in HEAVY:  # it may write where its operands are
                for value in ends.pop(at, ()):
                    now.drop(value)
            for value in op.outputs:
                if value.kind == "gradient" and not self.plan.records[value.path].layers:
                    # It waits for the end of the pass, whole and in the dtype in which it was made, to be cut.
                    if value.path not in waiting and not value.virtual:
                        waiting.add(value.path)
                        late[id(value)] = len(block.ops)
                        begin(value, self.spread.num_bytes(value), "gradient", at)
                elif not value.virtual and not value.fused:
                    saved = (
                        loop is None
                        and not op.backward
                        and value.last >= 0
                        and block.ops[min(value.last, len(block.ops) - 1)].backward
                    )
                    kind = "gradient" if value.kind == "gradient" else "activation" if saved else "temporary"
                    begin(value, max(0.0, self._held(value) - room), kind, at)
            inner = max((self._fullest(each, op) for each in op.blocks), key=_in_memory, default=_Moment())
            most = max(most, now.small + inner.most)
            if now.in_memory(beside=inner) > fullest.in_memory():
                fullest = now.copy()
                fullest.join(inner)
            for value in ends.pop(at, ()):
                now.drop(value)
        fullest.most = most
        return fullest

    def _summed_together(self) -> "_Moment":
        """XLA:CPU's sum of gradients over devices, which waits for all that cross the same axes, and copies them."""
        moment = _Moment()
        if self.hardware.kind != "cpu":
            return moment
        whole: collections.Counter[Axes] = collections.Counter()
        summed: dict[Axes, list[Value]] = {}
        for value in self.trace.block.outputs[1:]:
            assert value is not None, "a gradient is an array"
            record = self.plan.records[value.path]
            moment.add(value, self._held(value), "gradient")
            over = [move for move in self.plan.moves(record) if move.what == "gradient" and not record.layers]
            if over:  # a loop sums its own, a layer at a time
                whole[over[0].axes] += over[0].bytes
                summed.setdefault(over[0].axes, []).append(value)
        axes = max(whole, key=lambda each: whole[each], default=())
        for value in summed.get(axes, ()):
            moment.drop(value)
        moment.add_extra(2 * whole[axes])
        return moment

    def _given_up(self, op: Op, at: int, block: Block) -> float:
        """Bytes that an elementwise operation writes where a loop's carried array was, which nobody reads later."""
        if op.name in HEAVY:
            return 0.0
        carried = {id(value) for value in block.inputs}
        return max(
            (
                self.spread.num_bytes(source)
                for value in op.inputs
                for source in (() if value is None else value.sources)
                if source.last == at and id(source) in carried and source.kind != "parameter"
            ),
            default=0.0,
        )

    # Time.

    def _timed(self) -> tuple[Timeline | None, tuple[Row, ...]]:
        moves = list(self._moves())
        if not self.hardware.peak_flops():
            return None, tuple(self._row(at, *each, 0.0) for at, each in enumerate(moves))
        forward, backward, events = self._compute()
        update = self._update_seconds()
        exposed = [self._exposed(at, moves, forward[at], backward[at]) for at in range(3)]
        steps = [forward[at] + backward[at] + update[at] + math.fsum(exposed[at]) for at in range(3)]
        compute = forward[0] + backward[0] + update[0]
        middle = _coefficients()[0]
        timeline = Timeline(
            step_seconds=steps[0],
            compute_seconds=compute,
            communication_seconds=math.fsum(self._transfer(move, middle).seconds * count for _, move, count in moves),
            exposed_communication_seconds=steps[0] - compute,
            bubble_seconds=0.0,
            low=steps[1],
            high=steps[2],
            events=(*events, *self._lanes(moves, forward[0])),
            notes=(self._assumed(),),
        )
        return timeline, tuple(self._row(at, *each, exposed[0][at]) for at, each in enumerate(moves))

    def _assumed(self) -> str:
        return (
            f"matrix products reach {self._of(MATMUL)[0]:.0%} of the peak, memory "
            f"{self._of(MEMORY)[0]:.0%} of its bandwidth; {HIDDEN[0]:.0%} of what moves "
            f"{' and '.join(f'{each}s' for each in HIDING[self.hardware.kind])} hides behind computation, nothing else"
        )

    def _exposed(self, at: int, moves: list[tuple[Record, Move, int]], forward: float, backward: float) -> list[float]:
        """Of each move, all its runs together, how long the device waits for it."""
        known = _coefficients()[at]
        found = [self._transfer(move, known).seconds * count for _, move, count in moves]
        for is_backward, compute in ((False, forward), (True, backward)):
            hiding = [
                index
                for index, (_, move, _) in enumerate(moves)
                if move.what in HIDING[self.hardware.kind] and _is_backward(move) == is_backward
            ]
            total = math.fsum(found[index] for index in hiding)
            share = max(1 - HIDDEN[at], 1 - compute / total) if total else 0.0
            for index in hiding:
                found[index] *= share
        return found

    def _compute(self) -> tuple[list[float], list[float], tuple[Event, ...]]:
        """Seconds of the forward and of the backward pass, as estimated and at best and worst; and what to draw."""
        passes = [[0.0] * 3, [0.0] * 3]
        events: list[Event] = []
        start = 0.0
        for op in self.trace.block.ops:
            seconds = [each * self.recipe.accumulate for each in self._seconds(op)]
            for at in range(3):
                passes[op.backward][at] += seconds[at]
            if seconds[0] > 0 and (op.blocks or op.name == "dot_general"):
                name = "layers" if op.blocks else "matmul"
                events.append(
                    Event(
                        lane="compute",
                        start=start,
                        seconds=seconds[0],
                        count=max(1, round(self.spread.trips(op))),
                        name=f"{name}, {'backward' if op.backward else 'forward'}",
                        path="",
                        depth=int(bool(op.blocks)),
                    )
                )
            start += seconds[0]
        return passes[0], passes[1], tuple(sorted(events, key=lambda each: -each.seconds)[:100])

    def _seconds(self, op: Op) -> tuple[float, float, float]:
        """How long one device takes for `op`, as estimated, at best and at worst; nothing where no speed is known."""
        if op.blocks:
            hoisted = _invariant(op)
            bodies = [[self._seconds(each) for each in block.ops if id(each) not in hoisted] for block in op.blocks]
            sums = [tuple(math.fsum(each[at] for each in body) for at in range(3)) for body in bodies]
            longest = max(sums, default=(0.0, 0.0, 0.0))
            trips = self.spread.trips(op)
            return longest[0] * trips, longest[1] * trips, longest[2] * trips
        if op.free or all(value.virtual for value in op.outputs):
            return 0.0, 0.0, 0.0
        flops, dtype, reached = self._op_flops(op)
        read = {id(source): source for value in op.inputs if value is not None for source in value.sources}
        moved = math.fsum(self._moved(value) for value in (*read.values(), *op.outputs) if not value.fused)
        peak, bandwidth = self.hardware.peak_flops(dtype or "bfloat16"), self.hardware.hbm_bandwidth
        if not peak or not bandwidth:
            return 0.0, 0.0, 0.0
        each = [max(flops / peak / reached[at], moved / bandwidth / self._of(MEMORY)[at]) for at in range(3)]
        return each[0], each[1], each[2]

    def _of(self, rates: Mapping[str, tuple[float, float, float]]) -> tuple[float, float, float]:
        return rates.get(self.hardware.chip.name, rates[self.hardware.kind])

    def _moved(self, value: Value) -> float:
        """Bytes of an array that is read or written, as the time that it takes counts them."""
        size = self.spread.num_bytes(value)
        return size / ON_CHIP if size <= self.hardware.chip.on_chip / 2 and value.kind != "parameter" else size

    def _op_flops(self, op: Op) -> tuple[float, str, Sequence[float]]:
        """FLOPs of one device, its tiles filled up; the dtype of the operands; and the parts of the peak reached."""
        rates = self._of(MATMUL)
        if op.name == "pallas_call":
            operands, results = (
                [jax.ShapeDtypeStruct(self.spread.shape(value), value.dtype) for value in side if value is not None]
                for side in (op.inputs, op.outputs)
            )
            work = kernel_work(op.params, operands, results, "")
            if work is None:
                return 0.0, "", rates
            reached = [known.attention_backward if op.backward else known.attention for known in _coefficients()]
            return work.flops, DTYPES.get(work.dtype, work.dtype), reached
        left, right = (op.inputs[at] if len(op.inputs) > at else None for at in (0, 1))
        if left is None or right is None or op.name not in PRODUCTS:
            return 0.0, "", rates
        one, two = self.spread.shape(left), self.spread.shape(right)
        if op.name == "conv_general_dilated":
            return product_flops(op, one, two, self.spread.shape(op.outputs[0])), left.dtype, rates
        (contract, other), (batch, batch_right) = op.params["dimension_numbers"]
        inner = math.prod(min(one[i], two[j]) for i, j in zip(contract, other, strict=True))
        batches = math.prod(min(one[i], two[j]) for i, j in zip(batch, batch_right, strict=True))
        rows = math.prod(size for dim, size in enumerate(one) if dim not in (*contract, *batch))
        columns = math.prod(size for dim, size in enumerate(two) if dim not in (*other, *batch_right))
        small, deep, wide = TILE[self.hardware.kind]
        filled = _up(rows, small) * _up(inner, deep) * _up(columns, wide)
        return 2.0 * batches * filled, left.dtype, rates

    def _update_seconds(self) -> tuple[float, float, float]:
        """The optimiser reads and writes parameters and state, and reads gradients."""
        totals = self.plan.totals()
        moved = 2 * (totals.parameters + (totals.optimizer or 0)) + totals.gradients
        bandwidth = self.hardware.hbm_bandwidth
        each = [moved / bandwidth / self._of(MEMORY)[at] if bandwidth else 0.0 for at in range(3)]
        return each[0], each[1], each[2]

    # Traffic.

    def _reduces_each(self) -> bool:
        return self.recipe.accumulate > 1 and not self.recipe.separable

    def _moves(self) -> Iterator[tuple[Record, Move, int]]:
        """Every move of the plan with the times a step that it happens."""
        shared: set[Any] = set()
        for record in self.plan.parameters:
            for move in self.plan.moves(record):
                if move.per_token and record.role == "column":
                    key = (record.path.split(".")[:-2], move.kind, move.axes, move.bytes, move.when)
                    if str(key) in shared:
                        continue  # the matrices of one module that read one activation
                    shared.add(str(key))
                yield record, move, move.times * self._repeats(move)
                if (
                    record.role == "row"
                    and move.per_token
                    and self._sums.get(record.path, 1) > 1
                    and "forward" in move.when
                ):
                    again = dataclasses.replace(
                        move, when="backward pass of each layer, which computes the block again"
                    )
                    yield record, again, move.times * self._repeats(move)
            for move in self._vocabulary_moves(record):
                yield record, move, move.times * self._repeats(move)

    @ft.cached_property
    def _sums(self) -> collections.Counter[str]:
        """How many products of each parameter are sums of parts, computed again in the backward pass too."""
        found: collections.Counter[str] = collections.Counter()

        def look(block: Block) -> None:
            for op in block.ops:
                for each in op.blocks:
                    look(each)
                if op.name != "dot_general" or None in op.inputs:
                    continue
                (contract, _), _ = op.params["dimension_numbers"]
                left = self.spread.given(op)[0]
                over = {axis for dim in contract for axis in left[dim]} - {*self.plan.batch_axes, _MICRO}
                if over:
                    sources = [source for value in op.inputs if value is not None for source in value.sources]
                    found.update({source.path for source in sources if source.kind == "parameter"})

        look(self.trace.block)
        return found

    def _repeats(self, move: Move) -> int:
        once = move.what == "update" or (
            move.what == "gradient" and not set(move.axes) & set(self.plan.shards) and not self._reduces_each()
        )
        return 1 if once else self.recipe.accumulate

    def _vocabulary_moves(self, record: Record) -> Iterator[Move]:
        """What `jp.embed` and `jp.cross_entropy` move over a vocabulary that is split."""
        over = self.plan.dims.get("vocab", ())
        split = [dim for dim, entry in enumerate(record.compute) if set(axes_at(entry)) & set(over)]
        if record.role in ("column", "row") or record.layers or len(record.shape) != 2 or not split or not over:
            return
        width = record.shape[1 - split[0]] * np.dtype(record.compute_dtype).itemsize
        is_table = split[0] == 0
        has_head = any(
            len(other.shape) == 2
            and other.path != record.path
            and not other.layers
            and other.shape == record.shape[::-1]
            for other in self.plan.parameters
        )
        whens = ["the lookup, forward pass"] if is_table else []
        whens += [] if is_table and has_head else ["the gradient of the hidden states, backward pass"]
        for when in whens:
            yield Move(what="activation", kind="all-reduce", axes=tuple(over), bytes=width, times=1, when=when)

    def _bytes(self, move: Move) -> int:
        """Of a move, each time, on one device."""
        return math.ceil(move.bytes * self.tokens) if move.per_token else move.bytes

    def _transfer(self, move: Move, known: Coefficients) -> Transfer:
        """One run of a move, by the predictor's model of the links."""
        key = (move.kind, move.axes, self._bytes(move), known)
        if key not in self.transfers:
            self.transfers[key] = self.fabric.transfer(move.kind, self._bytes(move), self._groups(move.axes), known)
        return self.transfers[key]

    def _groups(self, axes: Axes) -> np.ndarray:
        """Positions of the mesh that differ in `axes` alone, a row each."""
        positions = np.arange(self.axes.size).reshape(self.axes.sizes)
        at = [self.axes.names.index(axis) for axis in axes]
        count = math.prod(self.axes.sizes[each] for each in at)
        return np.moveaxis(positions, at, range(positions.ndim - len(at), positions.ndim)).reshape(-1, count)

    def _row(self, number: int, record: Record, move: Move, count: int, exposed: float) -> Row:
        transfer = self._transfer(move, _coefficients()[0])
        return Row(
            kind=move.kind,
            spelling="",
            axes=move.axes,
            bytes=self._bytes(move),
            wire_bytes=transfer.wire_bytes,
            algorithm=transfer.algorithm,
            count=count,
            depth=int(bool(record.layers)),
            conditional=False,
            path=record.path,
            source="",
            expected=f"{move.what}, {move.when}",
            seconds=transfer.seconds if self.hardware.peak_flops() else 0.0,
            exposed_seconds=exposed,
            name=f"{move.what}.{number}",
        )

    def _lanes(self, moves: list[tuple[Record, Move, int]], forward: float) -> Iterator[Event]:
        """Each pass's moves of a kind over the same axes as one event, one after another."""
        together: dict[tuple[str, bool, str], tuple[float, int]] = {}
        for _, move, count in moves:
            key = (",".join(move.axes), _is_backward(move), f"{move.kind} {move.what}")
            seconds, runs = together.get(key, (0.0, 0))
            together[key] = (seconds + self._transfer(move, _coefficients()[0]).seconds * count, runs + count)
        ends: dict[tuple[str, bool], float] = {}
        for (lane, is_backward, name), (total, count) in together.items():
            start = ends.get((lane, is_backward), forward if is_backward else 0.0)
            yield Event(lane=lane, start=start, seconds=total, count=count, name=name, path="", depth=0)
            ends[lane, is_backward] = start + total


@dataclasses.dataclass(eq=False)
class _Moment:
    """What is held at one moment: arrays; `extra` bytes where no array says so; `small`, of those that fit on the chip.

    A TPU has `room` there, and XLA keeps what it can in it: temporaries of up to half of it, as far as they go. `most`
    is what these are at another moment, when they are most.
    """

    values: dict[int, tuple[Value, float, str]] = dataclasses.field(default_factory=dict)
    total: float = 0.0
    extra: float = 0.0
    small: float = 0.0
    room: int = 0
    most: float = 0.0

    def in_memory(self, beside: "_Moment | None" = None) -> float:
        """Bytes that are not on the chip; with those of a loop's body, if one runs."""
        total = self.total + (beside.total if beside else 0.0)
        return total - self.on_chip(beside)

    def on_chip(self, beside: "_Moment | None" = None) -> float:
        return min(self.room, self.small + (beside.small if beside else 0.0))

    def add_extra(self, size: float) -> None:
        self.extra += size
        self.total += size

    def add(self, value: Value, size: float, kind: str) -> None:
        self.values[id(value)] = (value, size, kind)
        self.total += size
        self.small += size if self.fits(size, kind) else 0.0

    def drop(self, value: Value) -> None:
        _, size, kind = self.values.pop(id(value))
        self.total -= size
        self.small -= size if self.fits(size, kind) else 0.0

    def fits(self, size: float, kind: str) -> bool:
        return kind == "temporary" and size <= self.room / 2

    def copy(self) -> "_Moment":
        return _Moment(dict(self.values), self.total, self.extra, self.small, self.room)

    def join(self, other: "_Moment") -> None:
        self.values |= other.values
        self.total += other.total
        self.extra += other.extra
        self.small += other.small

    def held(self) -> list[Held]:
        """Rows of a memory table: gradients by parameter, activations by shape, temporaries by what they are."""
        rows: dict[tuple[str, str, str], float] = {}
        room = self.on_chip()
        for value, size, kind in sorted(self.values.values(), key=lambda each: -each[1]):
            away = min(room, size) if self.fits(size, kind) else 0.0
            room -= away
            path = value.path if kind == "gradient" or value.kind == "parameter" else ""
            shape = "" if kind == "gradient" else value.text
            rows[kind, path, shape] = rows.get((kind, path, shape), 0.0) + size - away
        if self.extra:
            rows["temporary", "gradients before they are cut", ""] = self.extra
        return [
            Held(kind=kind, path=path, bytes=math.ceil(size), shape=shape)
            for (kind, path, shape), size in rows.items()
            if size
        ]


def _in_memory(moment: _Moment) -> float:
    return moment.in_memory()


def _as_split(spec: Any, ndim: int) -> Split:
    entries = [axes_at(entry) for entry in spec]
    return (*entries, *((),) * (ndim - len(entries)))


def _invariant(op: Op) -> set[int]:
    """Operations of a loop's body that read nothing but the loop's constants: done once, before it."""
    if op.name != "scan":
        return set()
    (block,) = op.blocks
    same = {id(value) for value in block.inputs[: scan_counts(op.params)[0]]}
    found: set[int] = set()
    for each in block.ops:
        if not each.blocks and all(value is None or id(value) in same for value in each.inputs):
            same |= {id(value) for value in each.outputs}
            found.add(id(each))
    return found


def _scanned(loop: Op, block: Block) -> Sequence[Value]:
    """What a loop cuts out of larger arrays each time: an array of its own, for whoever reads it in the body."""
    return block.inputs[sum(scan_counts(loop.params)) :] if loop.name == "scan" else ()


def _read_late(loop: Op, block: Block) -> dict[int, int]:
    """What a layer's gradients of parameters are made of, and until when it is held, where the layer has a loop itself.

    Nothing in the layer waits for such a gradient, while the loop leads to all the others: XLA:TPU runs it first.
    """
    last_loop = max((at for at, op in enumerate(block.ops) if op.blocks), default=-1)
    made = {id(out): at for at, op in enumerate(block.ops) for out in op.outputs}
    queue = [
        inner
        for outer, inner in zip(loop.outputs, block.outputs, strict=False)
        if outer.kind == "gradient" and inner is not None
    ]
    found: dict[int, int] = {}
    while queue:
        at = made.get(id(queue.pop()), last_loop)
        op = block.ops[at]
        if at >= last_loop:
            continue
        if op.name in PRODUCTS:
            found |= {id(source): last_loop for each in op.inputs if each is not None for source in each.sources}
        elif op.name in PASSED_ON:
            queue += [each for each in op.inputs if each is not None]
    return found


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _is_backward(move: Move) -> bool:
    return move.what == "gradient" or "backward" in move.when


def num_tokens(recipe: Recipe) -> int:
    """Tokens of a step's global batch, by its first array of integers [batch, sequence]; its rows if there is none."""
    for leaf in jax.tree.leaves(recipe.batch):
        if np.ndim(leaf) > 1 and np.issubdtype(leaf.dtype, np.integer):
            return int(np.shape(leaf)[0] * np.shape(leaf)[1])
    return recipe.batch_size


@ft.cache
def _coefficients() -> tuple[Coefficients, Coefficients, Coefficients]:
    """As estimated, all at their fastest, all at their slowest."""
    middle = coefficients()
    ends: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for pair in bounds():
        for found, each in zip(ends, pair, strict=True):
            found |= {k: v for k, v in dataclasses.asdict(each).items() if v != getattr(middle, k)}
    return middle, dataclasses.replace(middle, **ends[0]), dataclasses.replace(middle, **ends[1])
