"""A loss and its gradients through a pipeline: one program that runs any schedule of forwards and backwards.

A scan over ticks. In each of them

    embed the microbatch that enters            in global view: each stage a part of its rows, where they divide
    ┌ take in what came, run one forward        manual over `pipe` and the replicas; under `lax.cond`, so that a bubble
    └                                           costs nothing
    the loss of the microbatch that leaves      in global view again, and again each stage a part of the rows
    ┌ run one backward, add to the gradients,   each under its cond
    └ permute both results to the neighbours    outside of every branch, or devices would wait for ever
    embed's backward

The backward computes its stage's forward again from the saved input, so that a stage keeps one activation for each
microbatch in flight, in rings as large as the schedule needs them (`Schedule.room`, `Buffers`), written in place.
`jax.vjp` is called *inside* the branch: differentiating through a branch that only some devices take gives wrong
gradients without an error (jax#40823).
Gradients add up on each replica apart and are summed over replicas once, after the scan.

Shapes: m microbatches, R replicas, p stages, v chunks, n layers of a chunk, b rows of a microbatch on a replica.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._compat import exact_erf
from .._errors import ShardingError, StepError
from .._manual import varying
from .._types import AnyMesh, Axes, PyTree
from ._schedule import Schedule
from ._stream import Form, independent
from ._tick import BY_STAGE, WORK, ticks_of

P = PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a pipeline sees it: equal blocks between two ends.

    A *stream* is what blocks hand on: an array or any pytree of them, integers and random-number keys too.

    Attributes:
        embed: `embed(ends, microbatch)`: the stream that enters the first block.
        block: `block(layer, stream, given)`: one layer; returns what it takes.
        loss: `loss(ends, stream, microbatch)`: the sum of the losses of a microbatch, and the sum of its weights, or
            any pytree of scalars to be added up.
        given: `given(fixed, microbatch)`: what every block gets beside its stream; the microbatch if not said.
            Computed by each stage for itself.
    """

    embed: Callable[[PyTree, PyTree], PyTree]
    block: Callable[[PyTree, PyTree, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]
    given: Callable[[PyTree, PyTree], PyTree] = lambda fixed, microbatch: microbatch


def value_and_grad(
    model: Model, schedule: Schedule, mesh: Mesh, *, axis: str = "pipe", replicas: Axes = ()
) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, tuple[PyTree, PyTree]]]:
    """A function that gives the mean loss of a batch and its gradients, computed in a pipeline.

    `ends` are the parameters outside of the blocks, used by `embed` or `loss` or both (tied ones get the sum of both
    gradients). `blocks` are those of the layers, stacked on a leading dim. Moves, a tick: one stream to the next
    stage and one gradient to the one before; what enters and leaves goes to all stages, so that the ends may be split
    over them. Gradients cross the axes of replicas once a call. Other axes of the mesh are the compiler's.

    Args:
        model: What it computes.
        schedule: Its stages are the devices along `axis`, its microbatches divide the batch.
        mesh: The mesh; with a plain `jax.jit` around the function.
        axis: The axis of the stages.
        replicas: Axes that split the batch and replicate the parameters.

    Returns:
        A function `(ends, blocks, batch) -> (mean, (gradients of ends, gradients of blocks))`. Gradients are float32 at
        least. Every array of `batch` has the rows first.

    Raises:
        ShardingError: The mesh lacks an axis, or has another number of stages than the schedule; the schedule splits
            its backwards; layers or rows do not divide.

    Example:
        >>> model = jaxpar.pipeline.Model(
        ...     embed=lambda ends, batch: batch @ ends,
        ...     block=lambda w, x, batch: x + jnp.tanh(x @ w),
        ...     loss=lambda ends, x, batch: (jnp.sum((x @ ends.T) ** 2), 1.0 * len(batch)),
        ... )
        >>> schedule, mesh = jp.schedule("1f1b", stages=2, microbatches=3), jp.mesh(data=4, pipe=2)
        >>> run = jaxpar.pipeline.value_and_grad(model, schedule, mesh, replicas=("data",))
        >>> value, (ends, blocks) = jax.jit(run)(jnp.ones((4, 8)), jnp.ones((6, 8, 8)), jnp.ones((12, 4)))
        >>> ends.shape, blocks.shape
        ((4, 8), (6, 8, 8))
    """
    run = Run(model=model, schedule=schedule, mesh=mesh, axis=axis, replicas=replicas)

    def call(ends: PyTree, blocks: PyTree, batch: PyTree) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        found = run.gradients(ends, blocks, _microbatches(batch, schedule.microbatches, run.count))
        # The one reduction over replicas.
        total, weight, *gradients = jax.tree.map(lambda leaf: leaf.sum(0), (*found.sums, found.ends, found.blocks))
        return total / weight, tuple(
            jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), each) for each in gradients
        )

    return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a pipeline adds up over microbatches, each replica apart: every array has a leading dim of replicas.

    Attributes:
        sums: `(sum of the losses, what else the loss returns)`.
        ends: Gradients of the sum.
        blocks: The same, of the blocks.
        is_whole: Whether every stage computed the ends whole: no part of the rows, and none of the vocabulary.
    """

    sums: tuple[jax.Array, PyTree]
    ends: PyTree
    blocks: PyTree
    is_whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A model, a schedule and a mesh, to be called within one program.

    Attributes:
        model: What is computed.
        schedule: In which order.
        mesh: Where.
        axis: The axis of the stages.
        replicas: Axes over which gradients are kept apart.
        mapped: Of these, the last ones, over which parameters are cut: the regions are not manual over them but mapped,
            so that the compiler gathers a layer where the block reads it.
        layer_dims: Leading dims of the blocks that count layers: 1, or 2 for `[chunks, layers of a chunk]`, of which
            the second may be split over `axis` without anything to move.
        specs: Where the gradients lie while they add up, `(ends, blocks)`: for each leaf a spec without replicas, the
            layers' dims of the blocks left out. By default as the compiler likes.
        parts: Into how many parts axes beside these split the rows of a replica.

    Raises:
        ShardingError: As `value_and_grad`.
    """

    model: Model
    schedule: Schedule
    mesh: AnyMesh
    axis: str = "pipe"
    replicas: Axes = ()
    mapped: Axes = ()
    layer_dims: int = 1
    specs: tuple[PyTree, PyTree] | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        _check(self.schedule, self.mesh, self.axis, self.replicas)

    @property
    def count(self) -> int:
        """How many replicas."""
        return math.prod(self.mesh.shape[axis] for axis in self.replicas)

    @property
    def manual(self) -> Axes:
        """The axes of the regions."""
        return (*self._apart_by, self.axis)

    @property
    def _apart_by(self) -> Axes:
        """The replicas' axes of the regions: in them, the dim of replicas has what is mapped."""
        return self.replicas[: len(self.replicas) - len(self.mapped)]

    @property
    def _splits_vocabulary(self) -> bool:
        """Whether ends lie in pieces on the stages."""
        placed = [] if self.specs is None else jax.tree.leaves(self.specs[0], is_leaf=lambda spec: isinstance(spec, P))
        return any(self.axis in jax.tree.leaves(tuple(spec)) for spec in placed)

    def gradients(
        self, ends: PyTree, blocks: PyTree, micro: PyTree, *, held: PyTree = None, fixed: PyTree = None
    ) -> Found:
        """Sums and gradients of all microbatches.

        Args:
            ends: Parameters outside of the blocks.
            blocks: Those of the layers, stacked.
            micro: The batch as `[microbatches, replicas, rows, ...]`.
            held: More of the layers, stacked alike, that has no gradient; a block then gets the pair of both.
            fixed: For `model.given`: arrays that are the same for all microbatches.
        """
        parts, held = self._parts(blocks), self._parts(held)
        form = self._form(ends, micro)
        rings = self.schedule.buffers
        stage = P(self.replicas, self.axis)
        lead = (self.count, self.schedule.stages)
        carry = {
            **self._streams(form, self.schedule.room),
            "returned": [self._zeros((*lead, *x.shape), stage, x.dtype) for x in form.both[0]],
            "gradients": [self._zeros((*lead, rings.gradients.size, *x.shape), stage, x.dtype) for x in form.both[0]],
            "blocks": self._pin_blocks(
                jax.tree.map(lambda leaf: jnp.zeros((self.count, *leaf.shape), _wide(leaf.dtype)), parts)
            ),
            "ends": self._pin_ends(
                jax.tree.map(lambda leaf: jnp.zeros((*form.lead, *leaf.shape), _wide(leaf.dtype)), ends), form
            ),
            "sums": self._sums(ends, form, micro),
        }
        ticks = ticks_of(self.schedule)
        rows = {field.name: getattr(ticks, field.name) for field in dataclasses.fields(ticks)}
        carry, _ = lax.scan(self._tick(ends, parts, held, fixed, micro, form), carry, rows)
        # Where rows are split over the stages, so are these sums: one reduction over them, after the scan.
        sums, ends_sum = jax.tree.map(
            lambda leaf: leaf.sum(1) if form.is_split else leaf, (carry["sums"], carry["ends"])
        )
        is_whole = self.schedule.stages > 1 and not form.is_split and not self._splits_vocabulary
        return Found(sums=sums, ends=ends_sum, blocks=self._whole(carry["blocks"], blocks), is_whole=is_whole)

    def forward(
        self, ends: PyTree, blocks: PyTree, micro: PyTree, *, held: PyTree = None, fixed: PyTree = None
    ) -> tuple[jax.Array, PyTree]:
        """The sums alone, by the forwards of the schedule."""
        parts, held = self._parts(blocks), self._parts(held)
        form = self._form(ends, micro)
        carry = {**self._streams(form, self.schedule.room), "sums": self._sums(ends, form, micro)}
        ticks = ticks_of(self.schedule)
        last = 1 + int(np.flatnonzero((ticks.forward >= 0).any(axis=1))[-1])
        rows = {field.name: getattr(ticks, field.name)[:last] for field in dataclasses.fields(ticks)}
        carry, _ = lax.scan(self._forward_tick(ends, parts, held, fixed, micro, form), carry, rows)
        return jax.tree.map(lambda leaf: leaf.sum(1) if form.is_split else leaf, carry["sums"])

    def _zeros(self, shape: tuple[int, ...], spec: PartitionSpec, dtype: Any) -> jax.Array:
        return self._constrained(jnp.zeros(shape, dtype), spec)

    def _constrained(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`leaf` with its first dims as `spec` says, the others as the compiler likes."""
        free = [P.UNCONSTRAINED] * (leaf.ndim - len(spec))
        return lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*spec, *free)))

    def _streams(self, form: Form, size: int) -> dict[str, Any]:
        """What came, and the ring of inputs, both empty."""
        lead, stage = (self.count, self.schedule.stages), P(self.replicas, self.axis)
        return {
            "came": jax.tree.map(lambda x: self._zeros((*lead, *x.shape), stage, x.dtype), form.both),
            "inputs": jax.tree.map(lambda x: self._zeros((*lead, size, *x.shape), stage, x.dtype), form.both),
        }

    def _form(self, ends: PyTree, micro: PyTree) -> Form:
        """The form of the stream; rows are split over stages where all that has a gradient, or is added up, has enough.

        A key of random numbers may have none, if it is the same for all rows.
        """
        p = self.schedule.stages
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), micro)
        whole = Form.of(jax.eval_shape(self.model.embed, ends, shapes))
        whole = dataclasses.replace(whole, lead=(self.count,))
        sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(shapes)}
        enough = all(each and each[0] % (p * self.parts) == 0 for each in sizes)
        if p == 1 or len(sizes) > 1 or self._splits_vocabulary or not enough:
            return whole
        fewer = lambda x: jax.ShapeDtypeStruct((x.shape[0] // p, *x.shape[1:]), x.dtype)
        parts = jax.tree.map(fewer, shapes)
        part = Form.of(jax.eval_shape(self.model.embed, ends, parts)).both
        has_rows = jax.tree.map(lambda one, all_: bool(all_.shape) and fewer(all_) == one, part, whole.both)
        free = jax.tree.unflatten(jax.tree.structure(whole.both), independent(self._apart(whole), ends, parts))
        may = jax.tree.map(lambda rows, key, is_free: rows or (key and is_free), has_rows, whole.is_key, free)
        return (
            dataclasses.replace(whole, lead=(self.count, p), has_rows=has_rows) if all(jax.tree.leaves(may)) else whole
        )

    def _apart(self, form: Form) -> Callable[[PyTree, PyTree], Any]:
        return lambda ends, micro: form.apart(self.model.embed(ends, micro))

    def _split(self, tree: PyTree, form: Form, before: int = 0, has_rows: PyTree = True) -> PyTree:
        """Arrays [R, b, ...] as [R, p, b / p, ...], rows dealt out to the stages in turn; nothing moves.

        In turn, for the rows may be split over other axes already: of each of their pieces every stage takes a part.

        Args:
            tree: Arrays.
            form: Says whether rows are split.
            before: Dims before that of replicas.
            has_rows: Which arrays have any; the others go to all stages.
        """
        if not form.is_split:
            return tree
        at, p = before + 1, self.schedule.stages

        def one(leaf: jax.Array, has_rows: bool) -> jax.Array:
            if has_rows:
                rows = leaf.reshape(*leaf.shape[:at], leaf.shape[at] // p, p, *leaf.shape[at + 1 :])
                leaf = jnp.moveaxis(rows, at + 1, at)
            else:
                leaf = jnp.repeat(jnp.expand_dims(leaf, at), p, at)
            return self._constrained(leaf, P(*[None] * before, self.replicas, self.axis))

        each = jax.tree.map(lambda _: True, tree) if has_rows is True else has_rows
        return jax.tree.map(one, tree, each)

    def _joined(self, tree: PyTree, form: Form, has_rows: PyTree = True) -> PyTree:
        """The inverse of `_split`."""

        def one(leaf: jax.Array, has_rows: bool) -> jax.Array:
            if not has_rows:
                return leaf[:, 0]
            rows = jnp.moveaxis(leaf, 1, 2)
            return rows.reshape(rows.shape[0], -1, *rows.shape[3:])

        each = jax.tree.map(lambda _: True, tree) if has_rows is True else has_rows
        return jax.tree.map(one, tree, each) if form.is_split else tree

    def _sums(self, ends: PyTree, form: Form, micro: PyTree) -> Any:
        """Zeros for the sum of the losses and what comes with it."""

        def one(ends: PyTree, both: Any, micro: PyTree) -> Any:
            return self.model.loss(ends, form.together(*both), micro)

        shapes = jax.eval_shape(one, ends, form.both, jax.tree.map(lambda leaf: leaf[0, 0], micro))
        spec = P(*self._lead(form))
        return jax.tree.map(lambda x: self._zeros((*form.lead, *x.shape), spec, _wide(x.dtype)), tuple(shapes))

    def _lead(self, form: Form) -> tuple[Any, ...]:
        """The axes of the leading dims of what the ends add up."""
        return (self.replicas, self.axis) if form.is_split else (self.replicas,)

    def _parts(self, blocks: PyTree) -> PyTree:
        """Layers as [v, p, n, ...]: part `c * p + i` is chunk c of stage i."""
        p, v, dims = self.schedule.stages, self.schedule.chunks, self.layer_dims
        counts = {math.prod(leaf.shape[:dims]) for leaf in jax.tree.leaves(blocks)}
        if len(counts) > 1:
            raise ShardingError(f"pipeline: the arrays of the blocks have {sorted(counts)} layers; stack equally many.")
        for layers in counts:
            check_layers(layers, p, v, "pipeline")
        return jax.tree.map(lambda leaf: leaf.reshape(v, p, -1, *leaf.shape[dims:]), blocks)

    def _whole(self, parts: PyTree, blocks: PyTree) -> PyTree:
        """Sums [R, v, p, n, ...] in the shapes of `blocks`, after the dim of replicas."""
        return jax.tree.map(lambda part, leaf: part.reshape(self.count, *leaf.shape), parts, blocks)

    def _pin_ends(self, sums: PyTree, form: Form) -> PyTree:
        lead = self._lead(form)
        if self.specs is None:
            return jax.tree.map(lambda leaf: self._constrained(leaf, P(*lead)), sums)
        place = lambda leaf, spec: lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*lead, *spec)))
        return jax.tree.map(place, sums, self.specs[0])

    def _pin_blocks(self, sums: PyTree) -> PyTree:
        lead = (self.replicas, None, self.axis)
        if self.specs is None:
            return jax.tree.map(lambda leaf: self._constrained(leaf, P(*lead)), sums)
        place = lambda leaf, spec: lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*lead, None, *spec)))
        return jax.tree.map(place, sums, self.specs[1])

    def _region(self, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            with exact_erf():
                return body(*args)

        axes = set(self.manual)
        return jax.shard_map(traced, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)

    @property
    def _ring(self) -> list[tuple[int, int]]:
        p = self.schedule.stages
        return [(i, (i + 1) % p) for i in range(p)][: p if self.schedule.chunks > 1 else p - 1]

    def _given(self, fixed: PyTree, micro: PyTree, index: jax.Array) -> PyTree:
        """What the blocks of the replicas here get for a microbatch."""
        # Taken outside of a branch, which would be given all microbatches.
        return self._each(lambda micro: self.model.given(fixed, micro))(_of(micro, index))

    def _each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` for each replica of a region, of arrays [replicas, ...]: for one if none are mapped."""
        if self.mapped:
            # `spmd_axis_name` would be for axes that are manual here.
            return lambda *given: jax.vmap(function)(*self._cut(given))

        def run(*given: Any) -> Any:
            found = function(*jax.tree.map(lambda leaf: leaf[0], given))
            return jax.tree.map(lambda leaf: leaf[None], found)

        return run

    def _cut(self, tree: PyTree) -> PyTree:
        """Arrays [replicas, ...] of a region, the first dim over the mapped axes; of a branch's result, after it."""
        if not self.mapped:
            return tree
        place = lambda leaf: lax.with_sharding_constraint(leaf, P(self.mapped, *[P.UNCONSTRAINED] * (leaf.ndim - 1)))
        return jax.tree.map(place, tree)

    def _through(self, form: Form, layers: PyTree, both: Any, given: PyTree) -> Any:
        """A stream, taken apart, through the layers of one chunk."""

        def step(both: Any, layer: PyTree) -> tuple[Any, None]:
            layer = layer[0] if layer[1] is None else layer
            return self._vary(form.apart(self.model.block(layer, form.together(*both), given))), None

        return lax.scan(step, both, layers)[0]

    def _run_forward(self, form: Form) -> Callable[..., Any]:
        """The region that takes in what came and runs one forward."""
        p = self.schedule.stages

        def forward(
            row: Any, shared: Any, parts: Any, fixed: Any, micro: Any, came: Any, entered: Any, inputs: Any
        ) -> Any:
            parts, fixed, micro, entered = self._vary((parts, fixed, micro, entered))
            row = {name: self._vary(value[0]) for name, value in row.items()}
            is_first = lax.axis_index(self.axis) == 0
            enters_slot = jnp.where(is_first, shared["enters_slot"], -1)

            def take_in(ring: jax.Array, came: jax.Array, entered: jax.Array) -> jax.Array:
                return _write(_write(ring, row["arrives"], came), enters_slot, entered[:, None])

            inputs = jax.tree.map(take_in, inputs, came, entered)
            x = jax.tree.map(lambda ring: _read(ring, row["forward_slot"]), inputs)
            given = self._vary(self._given(fixed, micro, row["forward"]))

            def run(x: Any, given: PyTree) -> Any:
                layers = _chunk(parts, row["forward_chunk"])
                return self._each(lambda x, given: self._through(form, layers, x, given))(x, given)

            def skip(x: Any, *_: Any) -> Any:
                return self._vary(jax.tree.map(jnp.zeros_like, x))

            with jax.named_scope(WORK["forward"]):
                y = self._cut(lax.cond(row["forward"] >= 0, run, skip, x, given))
            is_last = lax.axis_index(self.axis) == p - 1
            with jax.named_scope(WORK["leaves"]):
                left = lax.cond(shared["leaves"] >= 0, lambda y: self._only(y, is_last), self._nothing, y)
            return inputs, jax.tree.map(lambda leaf: leaf[:, None], y), left

        stage, each = P(self._apart_by, self.axis), P(self._apart_by)
        pieces, here = P(None, self.axis), P(None, self._apart_by)
        return self._region(forward, (P(self.axis), P(), pieces, P(), here, stage, each, stage), (stage, stage, each))

    def _run_backward(self, form: Form) -> Callable[..., Any]:
        """The region that runs one backward and hands both results to the neighbours."""
        p, ring = self.schedule.stages, self._ring
        back = [(after, before) for before, after in ring]

        def backward(
            row: Any, shared: Any, parts: Any, fixed: Any, micro: Any, y: Any, returned: Any, leaving: Any,
            inputs: Any, gradients: Any, sums: Any,
        ) -> Any:  # fmt: skip
            parts, fixed, micro, leaving = self._vary((parts, fixed, micro, leaving))
            row = {name: self._vary(value[0]) for name, value in row.items()}
            is_last = lax.axis_index(self.axis) == p - 1
            leaves_slot = jnp.where(is_last, shared["leaves_slot"], -1)

            def take_in(ring: jax.Array, returned: jax.Array, leaving: jax.Array) -> jax.Array:
                return _write(_write(ring, row["returns"], returned), leaves_slot, leaving[:, None])

            gradients = jax.tree.map(take_in, gradients, returned, leaving)
            floats, others = jax.tree.map(lambda ring: _read(ring, row["backward_slot"]), inputs)
            gradient = jax.tree.map(lambda ring: _read(ring, row["gradient_slot"]), gradients)
            sums = jax.tree.map(lambda leaf: leaf[:, :, 0], sums)
            given = self._vary(self._given(fixed, micro, row["backward"]))

            def run(floats: Any, others: Any, gradient: Any, sums: PyTree, given: PyTree) -> Any:
                chunk = row["backward_chunk"]
                layers, held = _chunk(parts, chunk)

                def one(floats: Any, others: Any, gradient: Any, given: PyTree) -> tuple[PyTree, Any]:
                    def stage(layers: PyTree, floats: Any) -> Any:
                        return self._through(form, (layers, held), (floats, others), given)[0]

                    _, pull = jax.vjp(stage, layers, floats)
                    return pull(gradient)

                more, dx = self._each(one)(floats, others, gradient, given)
                add = lambda total, part: lax.dynamic_update_index_in_dim(
                    total, _at(total, chunk, 1) + part.astype(total.dtype), chunk, 1
                )
                return self._vary(dx), jax.tree.map(add, sums, more)

            def skip(floats: Any, others: Any, gradient: Any, sums: PyTree, *_: Any) -> Any:  # noqa: ARG001
                return self._vary(jax.tree.map(jnp.zeros_like, floats)), sums

            with jax.named_scope(WORK["backward"]):
                dx, sums = self._cut(lax.cond(row["backward"] >= 0, run, skip, floats, others, gradient, sums, given))
            is_first = lax.axis_index(self.axis) == 0
            with jax.named_scope(WORK["done"]):
                done = lax.cond(shared["done"] >= 0, lambda dx: self._only(dx, is_first), self._nothing, dx)
            came, returned = y, jax.tree.map(lambda leaf: leaf[:, None], dx)
            if ring:
                came = jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis, ring), came)
                returned = jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis, back), returned)
            return came, returned, gradients, jax.tree.map(lambda leaf: leaf[:, :, None], sums), done

        stage, each = P(self._apart_by, self.axis), P(self._apart_by)
        pieces, here, total = P(None, self.axis), P(None, self._apart_by), P(self._apart_by, None, self.axis)
        return self._region(
            backward,
            (P(self.axis), P(), pieces, P(), here, stage, stage, each, stage, stage, total),
            (stage, stage, stage, total, each),
        )

    def _enter(self, ends: PyTree, form: Form, micro: PyTree, row: Any) -> Any:
        """The stream that enters in this tick, zeros if none does; `micro` split."""
        embed = self._mapped(self._apart(form), form)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros((self.count, *x.shape), x.dtype), form.both)

        with jax.named_scope(WORK["enters"]):
            return lax.cond(
                row["enters"] >= 0,
                lambda entering: self._joined(embed(ends, entering), form, form.has_rows),
                nothing,
                _of(micro, row["enters"]),
            )

    def _forward_tick(
        self, ends: PyTree, parts: PyTree, held: PyTree, fixed: PyTree, micro: PyTree, form: Form
    ) -> Callable[[Any, Any], Any]:
        run_forward, ring = self._run_forward(form), self._ring
        stage = P(self.replicas, self.axis)

        def hand_on(y: Any) -> Any:
            return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis, ring), y)

        loss = lambda ends, micro, both: tuple(self.model.loss(ends, form.together(*both), micro))
        score, split = self._mapped(loss, form), self._split(micro, form, 1)

        def tick(carry: Any, row: Any) -> tuple[Any, None]:
            by_stage, shared = _by_stage(row)
            entered = self._enter(ends, form, split, row)
            inputs, y, left = run_forward(
                by_stage, shared, (parts, held), fixed, micro, carry["came"], entered, carry["inputs"]
            )
            sums = lax.cond(
                row["leaves"] >= 0,
                lambda left, sums, scored: _added(
                    sums, score(ends, scored, self._split(left, form, has_rows=form.has_rows))
                ),
                lambda left, sums, scored: sums,
                *(left, carry["sums"], _of(split, row["leaves"])),
            )
            came = self._region(hand_on, (stage,), stage)(y) if ring else y
            return {"came": came, "inputs": inputs, "sums": sums}, None

        return tick

    def _tick(
        self, ends: PyTree, parts: PyTree, held: PyTree, fixed: PyTree, micro: PyTree, form: Form
    ) -> Callable[[Any, Any], Any]:
        run_forward, run_backward = self._run_forward(form), self._run_backward(form)
        score, embed_back = self._mapped(self._loss_of(form), form), self._mapped(self._embed_back_of(form), form)
        split = self._split(micro, form, 1)

        def tick(carry: Any, row: Any) -> tuple[Any, None]:
            by_stage, shared = _by_stage(row)
            entered = self._enter(ends, form, split, row)
            inputs, y, left = run_forward(
                by_stage, shared, (parts, held), fixed, micro, carry["came"], entered, carry["inputs"]
            )

            def leave(left: Any, ends_sum: PyTree, sums: Any, scored: PyTree) -> Any:
                found, more, leaving = score(ends, scored, self._split(left, form, has_rows=form.has_rows))
                return self._joined(leaving, form), self._pin_ends(_added(ends_sum, more), form), _added(sums, found)

            with jax.named_scope(WORK["leaves"]):
                leaving, ends_sum, sums = lax.cond(
                    row["leaves"] >= 0,
                    leave,
                    lambda left, ends_sum, sums, scored: (jax.tree.map(jnp.zeros_like, left[0]), ends_sum, sums),
                    *(left, carry["ends"], carry["sums"], _of(split, row["leaves"])),
                )
            came, returned, gradients, blocks, done = run_backward(
                *(by_stage, shared, (parts, held), fixed, micro, y, carry["returned"], leaving, inputs),
                *(carry["gradients"], carry["blocks"]),
            )

            def finish(done: Any, ends_sum: PyTree, finished: PyTree) -> PyTree:
                more = embed_back(ends, finished, self._split(done, form))
                return self._pin_ends(_added(ends_sum, more), form)

            with jax.named_scope(WORK["done"]):
                ends_sum = lax.cond(
                    row["done"] >= 0,
                    finish,
                    lambda done, ends_sum, finished: ends_sum,
                    *(done, ends_sum, _of(split, row["done"])),
                )
            return {
                "came": came, "returned": returned, "inputs": inputs, "gradients": gradients,
                "blocks": self._pin_blocks(blocks), "ends": self._pin_ends(ends_sum, form), "sums": sums,
            }, None  # fmt: skip

        return tick

    def _loss_of(self, form: Form) -> Callable[..., Any]:
        def score(ends: PyTree, micro: PyTree, both: Any) -> Any:
            floats, others = both

            def total_of(ends: PyTree, floats: Any) -> Any:
                total, rest = self.model.loss(ends, form.together(floats, others), micro)
                return total, (total, rest)

            total, pull, found = jax.vjp(total_of, ends, floats, has_aux=True)
            return found, *pull(jnp.ones_like(total))

        return score

    def _embed_back_of(self, form: Form) -> Callable[..., Any]:
        def back(ends: PyTree, micro: PyTree, gradient: Any) -> PyTree:
            _, pull = jax.vjp(lambda ends: form.apart(self.model.embed(ends, micro))[0], ends)
            return pull(gradient)[0]

        return back

    def _mapped(self, function: Callable[..., Any], form: Form) -> Callable[..., Any]:
        """`function(ends, ...)` for each replica apart, and for each part of its rows."""
        axes = (*self.replicas, self.axis) if form.is_split else self.replicas

        def together(leaf: jax.Array) -> jax.Array:
            return self._constrained(leaf.reshape(-1, *leaf.shape[2:]), P(axes))

        def run(ends: PyTree, *rest: Any) -> Any:
            # One `vmap` over both dims: within two of them the kernels of the ends fail on an operand that has the
            # inner dim and one that has none ("pvary is a invariant->variant collective"; jax 0.12.0).
            rest = jax.tree.map(together, rest) if form.is_split else rest
            found = jax.vmap(function, in_axes=(None, *[0] * len(rest)), spmd_axis_name=axes or None)(ends, *rest)
            return jax.tree.map(lambda leaf: leaf.reshape(*form.lead, *leaf.shape[1:]), found)

        return run

    def _vary(self, tree: PyTree) -> PyTree:
        """Declare that values differ between the devices of a region, before any branch that only some take."""

        def one(leaf: Any) -> jax.Array:
            missing = tuple(axis for axis in self.manual if axis not in jax.typeof(leaf).manual_axis_type.varying)
            return varying(leaf, missing)

        return jax.tree.map(one, tree)

    def _only(self, x: PyTree, here: jax.Array) -> PyTree:
        """One stage's `x` for all of them; in float32, for XLA on CPU aborts on a sum in bfloat16 here."""
        one = lambda x: lax.psum(jnp.where(here, x, 0).astype(_wide(x.dtype)), self.axis).astype(x.dtype)
        return jax.tree.map(one, x)

    def _nothing(self, x: PyTree) -> PyTree:
        """What `_only` gives, in a tick without it: the same for all stages, not for all replicas."""

        def one(x: jax.Array) -> jax.Array:
            zeros = jnp.zeros(x.shape, x.dtype)
            return lax.pcast(zeros, self._apart_by, to="varying") if self._apart_by else zeros

        return jax.tree.map(one, x)


def check_layers(layers: int, stages: int, chunks: int, who: str) -> None:
    """Raise `ShardingError` unless stages and chunks divide the layers."""
    unit = stages * chunks
    if layers % unit:
        below = layers // unit * unit
        raise ShardingError(
            f"{who}: {layers} layers do not divide into {stages} stages of {chunks} "
            f"{'chunk' if chunks == 1 else 'chunks'}. Use {f'{below} or ' if below else ''}{below + unit} layers, or "
            "other stages or chunks."
        )


def check_backward(schedule: Schedule, who: str) -> None:
    """Raise `ShardingError` if the schedule computes gradients of weights apart."""
    if schedule.splits_backward:
        raise ShardingError(
            f"{who}: {schedule.name!r} computes gradients of weights apart (W). Here the backward computes its stage "
            "again from the input (full remat), and would do so twice: with 4 stages and 8 microbatches a step takes "
            "60 times a forward, with '1f1b' 44. Use that, or 'gpipe'."
        )


def _microbatches(batch: PyTree, m: int, count: int) -> PyTree:
    """Rows as [m, R, b, ...]: each replica splits its own rows, and none of them moves."""
    rows = {int(leaf.shape[0]) for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1:
        raise StepError(f"pipeline: the arrays of the batch have {sorted(rows)} rows; give each the same number.")
    (number,) = rows
    if number % (m * count):
        below = number // (m * count) * (m * count)
        over = f" over {count} replicas" if count > 1 else ""
        raise StepError(
            f"pipeline: a batch of {number} rows does not divide into {m} microbatches{over}. Use "
            f"{f'{below} or ' if below else ''}{below + m * count} rows, or another number of microbatches."
        )

    def one(leaf: jax.Array) -> jax.Array:
        split = leaf.reshape(count, m, number // m // count, *leaf.shape[1:])
        return jnp.swapaxes(split, 0, 1)

    return jax.tree.map(one, batch)


def _by_stage(row: Any) -> tuple[Any, Any]:
    """The numbers of a tick that differ between stages, and the others."""
    by_stage = {name: row[name] for name in BY_STAGE}
    return by_stage, {name: value for name, value in row.items() if name not in BY_STAGE}


def _check(schedule: Schedule, mesh: AnyMesh, axis: str, replicas: Axes) -> None:
    for name in (axis, *replicas):
        if name not in mesh.shape:
            raise ShardingError(
                f"pipeline: the mesh has no axis {name!r}; it has {dict(mesh.shape)}. Name one of these."
            )
    if mesh.shape[axis] != schedule.stages:
        raise ShardingError(
            f"pipeline: the schedule has {schedule.stages} stages, but axis {axis!r} has size {mesh.shape[axis]}. Use "
            f"stages={mesh.shape[axis]}, or another mesh."
        )
    check_backward(schedule, "pipeline")


def _write(ring: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """`value` into a slot of a ring [r, 1, slots, ...], none if it is -1. What does not change is one slot.

    In the shape in which the ring goes around the loop: of a ring that is given another shape in between XLA makes a
    second one, and copies all of it in each tick.
    """
    at = jnp.maximum(slot, 0)
    value = jnp.where(slot >= 0, value[:, :, None], lax.dynamic_slice_in_dim(ring, at, 1, axis=2))
    return lax.dynamic_update_slice_in_dim(ring, value, at, axis=2)


def _read(ring: jax.Array, slot: jax.Array) -> jax.Array:
    """What is in a slot of a ring [r, 1, slots, ...]."""
    return lax.dynamic_slice_in_dim(ring, jnp.maximum(slot, 0), 1, axis=2)[:, 0, 0]


def _at(leaf: jax.Array, index: jax.Array, dim: int = 0) -> jax.Array:
    return lax.dynamic_index_in_dim(leaf, jnp.maximum(index, 0), dim, keepdims=False)


def _of(micro: PyTree, index: jax.Array) -> PyTree:
    """A microbatch, of [m, R, b, ...]."""
    return jax.tree.map(lambda leaf: _at(leaf, index), micro)


def _chunk(parts: PyTree, chunk: jax.Array) -> PyTree:
    """This stage's layers of a chunk, from [v, 1, n, ...]."""
    return jax.tree.map(lambda leaf: _at(leaf, chunk)[0], parts)


def _added(total: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _wide(dtype: Any) -> Any:
    """The dtype of an accumulator: at least float32."""
    return dtype if np.dtype(dtype).itemsize >= 4 else jnp.float32
