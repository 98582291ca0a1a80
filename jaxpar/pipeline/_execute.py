"""A loss and its gradients through a pipeline: one program that runs any schedule of forwards and backwards.

A scan over ticks. In each of them

    embed the microbatch that enters            in global view: once, its table split as the caller likes
    ┌ take in what came, run one forward        manual over `pipe` and the replicas; under `lax.cond`, so that a bubble
    └                                           costs nothing
    the loss of the microbatch that leaves      in global view again: its matrix too may be split over all stages
    ┌ run one backward, add to the gradients,   each under its cond
    └ permute both results to the neighbours    outside of every branch, or devices would wait for ever
    embed's backward

The backward computes its stage's forward again from the saved input, so that a stage keeps one activation for each
microbatch in flight, in rings as large as the schedule needs them (`Buffers`). `jax.vjp` is called *inside* the branch:
differentiating through a branch that only some devices take gives wrong gradients without an error (jax#40823).
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

from .._errors import ShardingError, StepError
from .._types import Axes, PyTree
from ._schedule import Schedule
from ._tick import BY_STAGE, ticks_of

P = PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a pipeline sees it: equal blocks between two ends.

    Attributes:
        embed: `embed(ends, microbatch)`: the activation [rows, ...] that enters the first block.
        block: `block(layer, x, microbatch)`: one layer; returns what it takes.
        loss: `loss(ends, x, microbatch)`: the sum of the losses of a microbatch, and the sum of its weights.
    """

    embed: Callable[[PyTree, PyTree], jax.Array]
    block: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    loss: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, jax.Array]]


def value_and_grad(
    model: Model, schedule: Schedule, mesh: Mesh, *, axis: str = "pipe", replicas: Axes = ()
) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, tuple[PyTree, PyTree]]]:
    """A function that gives the mean loss of a batch and its gradients, computed in a pipeline.

    `ends` are the parameters outside of the blocks, used by `embed` or `loss` or both (tied ones get the sum of both
    gradients). `blocks` are those of the layers, stacked on a leading dim. Moves, a tick: one activation to the next
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
    _check(schedule, mesh, axis, replicas)
    return _Run(model, schedule, mesh, axis, replicas)


@dataclasses.dataclass(frozen=True)
class _Run:
    model: Model
    schedule: Schedule
    mesh: Mesh
    axis: str
    replicas: Axes

    @property
    def count(self) -> int:
        """How many replicas."""
        return math.prod(self.mesh.shape[axis] for axis in self.replicas)

    @property
    def manual(self) -> Axes:
        """The axes of the regions."""
        return (*self.replicas, self.axis)

    def __call__(self, ends: PyTree, blocks: PyTree, batch: PyTree) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        parts = self._parts(blocks)
        micro = self._microbatches(batch)
        x = jax.eval_shape(self.model.embed, ends, jax.tree.map(lambda leaf: leaf[0, 0], micro))
        ticks = ticks_of(self.schedule)
        rings = self.schedule.buffers
        stage = P(self.replicas, self.axis)

        def zeros(shape: tuple[int, ...], spec: PartitionSpec, dtype: Any) -> jax.Array:
            free = [P.UNCONSTRAINED] * (len(shape) - len(spec))
            return lax.with_sharding_constraint(jnp.zeros(shape, dtype), NamedSharding(self.mesh, P(*spec, *free)))

        lead = (self.count, self.schedule.stages)
        carry = {
            "came": zeros((*lead, *x.shape), stage, x.dtype),
            "returned": zeros((*lead, *x.shape), stage, x.dtype),
            "inputs": zeros((*lead, rings.inputs.size, *x.shape), stage, x.dtype),
            "gradients": zeros((*lead, rings.gradients.size, *x.shape), stage, x.dtype),
            "blocks": jax.tree.map(
                lambda leaf: zeros((self.count, *leaf.shape), P(self.replicas, None, self.axis), _wide(leaf.dtype)),
                parts,
            ),
            "ends": jax.tree.map(
                lambda leaf: zeros((self.count, *leaf.shape), P(self.replicas), _wide(leaf.dtype)), ends
            ),
            "sums": zeros((self.count, 2), P(self.replicas), jnp.float32),
        }
        rows = {field.name: getattr(ticks, field.name) for field in dataclasses.fields(ticks)}
        tick = self._tick(ends, parts, micro, x)
        carry, _ = lax.scan(tick, carry, rows)
        # The one reduction over replicas.
        ends_sum, blocks_sum, sums = jax.tree.map(
            lambda leaf: leaf.sum(0), (carry["ends"], carry["blocks"], carry["sums"])
        )
        whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), blocks_sum)
        total, weight = sums
        return total / weight, jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), (ends_sum, whole))

    def _parts(self, blocks: PyTree) -> PyTree:
        """Layers as [v, p, n, ...]: part `c * p + i` is chunk c of stage i."""
        p, v = self.schedule.stages, self.schedule.chunks
        counts = {int(leaf.shape[0]) for leaf in jax.tree.leaves(blocks)}
        if len(counts) != 1:
            raise ShardingError(f"pipeline: the arrays of the blocks have {sorted(counts)} layers; stack equally many.")
        (layers,) = counts
        if layers % (p * v):
            below = layers // (p * v) * (p * v)
            raise ShardingError(
                f"pipeline: {layers} layers do not divide into {p} stages of {v} {'chunk' if v == 1 else 'chunks'}. "
                f"Use {f'{below} or ' if below else ''}{below + p * v} layers, or other stages or chunks."
            )
        return jax.tree.map(lambda leaf: leaf.reshape(v, p, layers // (p * v), *leaf.shape[1:]), blocks)

    def _microbatches(self, batch: PyTree) -> PyTree:
        """Rows as [m, R, b, ...]: each replica splits its own rows, and none of them moves."""
        m, count = self.schedule.microbatches, self.count
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

    def _tick(self, ends: PyTree, parts: PyTree, micro: PyTree, x: Any) -> Callable[[Any, Any], Any]:
        p, v = self.schedule.stages, self.schedule.chunks
        each = P(self.replicas)
        stage = P(self.replicas, self.axis)
        ring = [(i, (i + 1) % p) for i in range(p)][: p if v > 1 else p - 1]
        back = [(after, before) for before, after in ring]
        some = jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype)

        def region(body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
            return jax.shard_map(
                body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.manual)
            )

        def through(layers: PyTree, x: jax.Array, here: PyTree) -> jax.Array:
            return lax.scan(lambda x, layer: (self.model.block(layer, x, here), None), x, layers)[0]

        def forward(row: Any, shared: Any, parts: Any, micro: Any, came: Any, entered: Any, inputs: Any) -> Any:
            parts, micro, entered = self._vary((parts, micro, entered))
            row = {name: self._vary(value[0]) for name, value in row.items()}
            is_first = lax.axis_index(self.axis) == 0
            inputs = _write(inputs[0, 0], row["arrives"], came[0, 0])
            inputs = _write(inputs, jnp.where(is_first, shared["enters_slot"], -1), entered[0])
            x = _at(inputs, row["forward_slot"])
            here = _one(micro, row["forward"])

            def run(x: jax.Array, here: PyTree) -> jax.Array:
                return through(_chunk(parts, row["forward_chunk"]), x, here)

            y = lax.cond(row["forward"] >= 0, run, lambda x, here: self._vary(jnp.zeros_like(x)), x, here)
            is_last = lax.axis_index(self.axis) == p - 1
            left = lax.cond(shared["leaves"] >= 0, lambda y: self._only(y, is_last), self._nothing, y)
            return inputs[None, None], y[None, None], left[None]

        def backward(
            row: Any, shared: Any, parts: Any, micro: Any, y: Any, returned: Any, leaving: Any, inputs: Any,
            gradients: Any, sums: Any,
        ) -> Any:  # fmt: skip
            parts, micro, leaving = self._vary((parts, micro, leaving))
            row = {name: self._vary(value[0]) for name, value in row.items()}
            is_last = lax.axis_index(self.axis) == p - 1
            gradients = _write(gradients[0, 0], row["returns"], returned[0, 0])
            gradients = _write(gradients, jnp.where(is_last, shared["leaves_slot"], -1), leaving[0])
            x, gradient = _at(inputs[0, 0], row["backward_slot"]), _at(gradients, row["gradient_slot"])
            sums = jax.tree.map(lambda leaf: leaf[0, :, 0], sums)
            here = _one(micro, row["backward"])

            def run(x: jax.Array, gradient: jax.Array, sums: PyTree, here: PyTree) -> Any:
                chunk = row["backward_chunk"]
                _, pull = jax.vjp(lambda layers, x: through(layers, x, here), _chunk(parts, chunk), x)
                more, dx = pull(gradient)
                add = lambda total, part: lax.dynamic_update_index_in_dim(
                    total, _at(total, chunk) + part.astype(total.dtype), chunk, 0
                )
                return dx, jax.tree.map(add, sums, more)

            skip = lambda x, gradient, sums, here: (self._vary(jnp.zeros_like(x)), sums)
            dx, sums = lax.cond(row["backward"] >= 0, run, skip, x, gradient, sums, here)
            is_first = lax.axis_index(self.axis) == 0
            done = lax.cond(shared["done"] >= 0, lambda dx: self._only(dx, is_first), self._nothing, dx)
            came, returned = y, dx[None, None]
            if ring:
                came, returned = lax.ppermute(came, self.axis, ring), lax.ppermute(returned, self.axis, back)
            return (
                came,
                returned,
                gradients[None, None],
                jax.tree.map(lambda leaf: leaf[None, :, None], sums),
                done[None],
            )

        pieces = P(None, self.axis)
        here = P(None, self.replicas)
        total = P(self.replicas, None, self.axis)
        run_forward = region(forward, (P(self.axis), P(), pieces, here, stage, each, stage), (stage, stage, each))
        run_backward = region(
            backward,
            (P(self.axis), P(), pieces, here, stage, stage, each, stage, stage, total),
            (stage, stage, stage, total, each),
        )

        def one(index: jax.Array) -> PyTree:
            return jax.tree.map(lambda leaf: _at(leaf, index), micro)

        def tick(carry: Any, row: Any) -> tuple[Any, None]:
            by_stage = {name: row[name] for name in BY_STAGE}
            shared = {name: value for name, value in row.items() if name not in BY_STAGE}

            entering, scored, finished = one(row["enters"]), one(row["leaves"]), one(row["done"])
            embed, score, embed_back = map(self._mapped, (self.model.embed, self._loss, self._embed_back))

            entered = lax.cond(
                row["enters"] >= 0,
                lambda entering: embed(ends, entering),
                lambda entering: jnp.zeros(some.shape, some.dtype),
                entering,
            )
            inputs, y, left = run_forward(by_stage, shared, parts, micro, carry["came"], entered, carry["inputs"])

            def leave(left: jax.Array, ends_sum: PyTree, sums: jax.Array, scored: PyTree) -> Any:
                found, more, leaving = score(ends, scored, left)
                return leaving, _added(ends_sum, more), sums + found

            leaving, ends_sum, sums = lax.cond(
                row["leaves"] >= 0,
                leave,
                lambda left, ends_sum, sums, scored: (jnp.zeros_like(left), ends_sum, sums),
                *(left, carry["ends"], carry["sums"], scored),
            )
            came, returned, gradients, blocks, done = run_backward(
                *(by_stage, shared, parts, micro, y, carry["returned"], leaving, inputs),
                *(carry["gradients"], carry["blocks"]),
            )
            ends_sum = lax.cond(
                row["done"] >= 0,
                lambda done, ends_sum, finished: _added(ends_sum, embed_back(ends, finished, done)),
                lambda done, ends_sum, finished: ends_sum,
                *(done, ends_sum, finished),
            )
            return {
                "came": came, "returned": returned, "inputs": inputs, "gradients": gradients, "blocks": blocks,
                "ends": ends_sum, "sums": sums,
            }, None  # fmt: skip

        return tick

    def _loss(self, ends: PyTree, micro: PyTree, x: jax.Array) -> Any:
        def both(ends: PyTree, x: jax.Array) -> Any:
            total, weight = self.model.loss(ends, x, micro)
            return total, jnp.stack([jnp.asarray(each, jnp.float32) for each in (total, weight)])

        total, pull, found = jax.vjp(both, ends, x, has_aux=True)
        return found, *pull(jnp.ones_like(total))

    def _embed_back(self, ends: PyTree, micro: PyTree, gradient: jax.Array) -> PyTree:
        _, pull = jax.vjp(lambda ends: self.model.embed(ends, micro), ends)
        return pull(gradient)[0]

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(ends, ...)` for each replica apart."""

        def run(ends: PyTree, *rest: Any) -> Any:
            in_axes = (None, *[0] * len(rest))
            return jax.vmap(function, in_axes=in_axes, spmd_axis_name=self.replicas or None)(ends, *rest)

        return run

    def _vary(self, tree: PyTree) -> PyTree:
        """Declare that values differ between the devices of a region, before any branch that only some take."""

        def one(leaf: Any) -> jax.Array:
            missing = tuple(axis for axis in self.manual if axis not in jax.typeof(leaf).manual_axis_type.varying)
            return lax.pcast(leaf, missing, to="varying") if missing else leaf

        return jax.tree.map(one, tree)

    def _only(self, x: jax.Array, here: jax.Array) -> jax.Array:
        """One stage's `x` for all of them; in float32, for XLA on CPU aborts on a sum in bfloat16 here."""
        return lax.psum(jnp.where(here, x, 0).astype(_wide(x.dtype)), self.axis).astype(x.dtype)

    def _nothing(self, x: jax.Array) -> jax.Array:
        """What `_only` gives, in a tick without it: the same for all stages, not for all replicas."""
        zeros = jnp.zeros(x.shape, x.dtype)
        return lax.pcast(zeros, self.replicas, to="varying") if self.replicas else zeros


def _check(schedule: Schedule, mesh: Mesh, axis: str, replicas: Axes) -> None:
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
    if schedule.splits_backward:
        raise ShardingError(
            f"pipeline: {schedule.name!r} computes gradients of weights apart (W). Here the backward computes its "
            "stage again from the input, and would do so twice: slower than '1f1b'. Use that, or 'gpipe'."
        )


def _write(ring: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """`value` into a slot, none if it is -1. What does not change is one slot, not the ring."""
    at = jnp.maximum(slot, 0)
    return lax.dynamic_update_index_in_dim(ring, jnp.where(slot >= 0, value, _at(ring, at)), at, 0)


def _at(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(leaf, jnp.maximum(index, 0), 0, keepdims=False)


def _chunk(parts: PyTree, chunk: jax.Array) -> PyTree:
    """This stage's layers of a chunk, from [v, 1, n, ...]."""
    return jax.tree.map(lambda leaf: _at(leaf, chunk)[0], parts)


def _one(micro: PyTree, index: jax.Array) -> PyTree:
    """A replica's part of a microbatch, from [m, 1, b, ...]. Outside of a branch, which would be given all of them."""
    return jax.tree.map(lambda leaf: _at(leaf, index)[0], micro)


def _added(total: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _wide(dtype: Any) -> Any:
    """The dtype of an accumulator: at least float32."""
    return dtype if np.dtype(dtype).itemsize >= 4 else jnp.float32
