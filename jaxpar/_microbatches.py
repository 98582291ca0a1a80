"""A batch as microbatches: which rows are in which, on every device its own, and what does not divide."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from . import _context, _tree
from ._context import Region, as_spec
from ._errors import StepError
from ._sequence import ContextSplit
from ._types import Axes, PyTree
from .parallel import PP


def contiguous(batch: PyTree, accumulate: int, region: Region | None) -> PyTree:
    """`[accumulate, rows, ...]`: microbatches as one device would take them, in order."""

    def one(leaf: jax.Array) -> jax.Array:
        if not jnp.ndim(leaf):
            return leaf
        split = leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:])
        if region is None or split.shape[1] % region.plan.num_batch_shards:
            return split
        spec = PartitionSpec(None, region.batch_axes or None, *_tokens_free(region.plan, leaf))
        return jax.lax.with_sharding_constraint(split, jax.sharding.NamedSharding(region.plan.mesh, spec))

    return jax.tree.map(one, batch)


def interleaved(batch: PyTree, accumulate: int, replicas: Axes, region: Region) -> PyTree:
    """`[accumulate, replicas, rows, ...]`, every device splitting its own rows; without replicas, less that dim.

    device        rows of the batch       microbatches, accumulate = 2
    data 0 fsdp 0   0 1 2 3               [0 1] [2 3]
    data 0 fsdp 1   4 5 6 7               [4 5] [6 7]
    data 1 fsdp 0   8 9 10 11             [8 9] [10 11]
    ...             so microbatch 0 of replica data 0 is rows 0 1 4 5; no row moves between devices.
    """
    plan = region.plan
    axes = plan.batch_axes
    sizes = [plan.axes[axis] for axis in axes]
    rows, parts = num_rows(batch), math.prod(sizes)
    if rows % (parts * accumulate):
        unit = parts * accumulate
        below = rows // unit * unit
        raise StepError(
            f"a batch of {rows} rows does not divide into {accumulate} microbatches over {parts} devices "
            f"({' x '.join(f'{axis} {plan.axes[axis]}' for axis in axes)}). Use a batch of "
            f"{f'{below} or ' if below else ''}{below + unit}, or another accumulate."
        )
    outer = [index for index, axis in enumerate(axes) if axis in replicas]
    inner = [index for index, axis in enumerate(axes) if axis not in replicas]
    count = math.prod(sizes[index] for index in outer)
    own = rows // parts // accumulate
    cut = plan.context if plan.context is not None and plan.context.axis in replicas else None

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if not jnp.ndim(leaf):
            return leaf
        split = leaf.reshape(*sizes, accumulate, own, *leaf.shape[1:])
        if cut is not None:
            split = _cut_tokens(split, len(sizes) + 2, cut if cut.splits(path, leaf.shape) else None, cut.size)
        tail = tuple(range(len(sizes) + 2, split.ndim - (cut is not None)))
        chunk = () if cut is None else (split.ndim - 1,)
        split = split.transpose((len(sizes), *outer, *chunk, *inner, len(sizes) + 1, *tail))
        shape = split.shape[split.ndim - len(tail) :]
        replicated = count * (1 if cut is None else cut.size)
        lead = (accumulate, replicated) if replicas else (accumulate,)
        split = split.reshape(*lead, rows // accumulate // count, *shape)
        outermost = (*(axes[index] for index in outer), *([] if cut is None else [cut.axis]))
        entries = [(), outermost] if replicas else [()]
        spec = as_spec([*entries, tuple(axes[index] for index in inner)])
        if plan.context is not None and cut is None and leaf.ndim > 1:
            padded = [*spec, *[None] * (split.ndim - leaf.ndim + 1 - len(spec))]
            spec = PartitionSpec(*padded, *_tokens_free(plan, leaf))
        return jax.lax.with_sharding_constraint(split, jax.sharding.NamedSharding(plan.mesh, spec))

    return jax.tree_util.tree_map_with_path(lambda keys, leaf: one(_tree.path_of(keys), leaf), batch)


def _cut_tokens(x: jax.Array, dim: int, split: ContextSplit | None, number: int) -> jax.Array:
    """`x` with a last dim of `number` parts of its sequence, which is `dim`; without one, it is in each part whole."""
    if split is None:
        return jnp.broadcast_to(x[..., None], (*x.shape, number))
    parts = x.reshape(*x.shape[:dim], number, x.shape[dim] // number, *x.shape[dim + 1 :])
    return jnp.moveaxis(parts, dim, -1)


def _tokens_free(plan: Any, leaf: jax.Array) -> list[Any]:
    """The second dim of a field of a batch is left as it is where a plan splits sequences, else whole."""
    return [PartitionSpec.UNCONSTRAINED] if plan.context is not None and leaf.ndim > 1 else []


def pick(batches: PyTree, index: Any) -> PyTree:
    """One microbatch."""
    return jax.tree.map(lambda leaf: leaf[index] if jnp.ndim(leaf) else leaf, batches)


def num_rows(batch: PyTree) -> int:
    return next((int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), 1)


def check_rows(batch: PyTree, accumulate: int) -> None:
    rows = {path: np.shape(leaf)[0] for path, leaf in _tree.leaves(batch).items() if np.ndim(leaf)}
    if accumulate > 1 and not rows:
        raise StepError("accumulate needs a batch of arrays with a leading dim to split; this one has none.")
    if accumulate > 1 and len(set(rows.values())) > 1:
        raise StepError(
            f"the arrays of a batch have different leading sizes: {rows}. Give each the batch as first dim."
        )
    wrong = {path: number for path, number in rows.items() if number % accumulate}
    if wrong:
        path, number = next(iter(wrong.items()))
        region = _context.current()
        unit = accumulate * (1 if region is None else region.plan.num_batch_shards)
        below = number // unit * unit
        raise StepError(
            f"{path or 'batch'}: {number} rows do not divide into accumulate={accumulate} microbatches. Use a batch of "
            f"{f'{below} or ' if below else ''}{below + unit}, or another accumulate."
        )


def in_microbatches(batch: PyTree, accumulate: int, replicas: Axes, region: Region) -> PyTree:
    """`[microbatches, replicas, rows, ...]`, one replica if there are none; scalars are the same everywhere."""
    count = math.prod(region.plan.axes[axis] for axis in replicas)

    def one(leaf: jax.Array, split: jax.Array) -> jax.Array:
        if not jnp.ndim(leaf):
            return jnp.broadcast_to(jnp.asarray(leaf), (accumulate, count))
        return split if replicas else split[:, None]

    return jax.tree.map(one, batch, interleaved(batch, accumulate, replicas, region))


def microbatch_of(batch: PyTree, accumulate: int) -> PyTree:
    """The shapes of one microbatch."""
    rows = num_rows(batch)

    def one(leaf: Any) -> Any:
        if not _tree.is_array(leaf):
            return leaf
        kind = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(
            (rows // accumulate, *kind.shape[1:]) if kind.shape else (), kind.dtype, weak_type=kind.weak_type
        )

    return jax.tree.map(one, batch)


def fits_microbatches(plan: Any, batch: PyTree) -> bool:
    """Whether the pipeline of `plan` can split `batch`."""
    return num_rows(batch) % (plan.num_batch_shards * plan.schedule.microbatches) == 0


def check_microbatches(plan: Any, rows: int, accumulate: int = 1) -> None:
    """Raise `StepError` unless the pipeline of `plan` can split a batch of `rows`."""
    pipeline, schedule = plan.strategy(PP), plan.schedule
    parts = plan.num_batch_shards
    unit = parts * schedule.microbatches
    if accumulate > 1:
        raise StepError(
            f"accumulate={accumulate} beside {pipeline.label}: a pipeline accumulates over its microbatches, "
            f"{schedule.microbatches} here. Leave accumulate out, or use PP(microbatches="
            f"{schedule.microbatches * accumulate})."
        )
    if rows % unit:
        below = rows // unit * unit
        fits = [m for m in range(1, rows // parts + 1) if rows % (parts * m) == 0]
        more = [m for m in fits if m > schedule.microbatches]
        near = [m for m in fits if m not in more][-1:] + more[:1]
        over = f" over {parts} devices that split it" if parts > 1 else ""
        instead = f", or {' or '.join(map(str, near))} microbatches" if near else ""
        raise StepError(
            f"a batch of {rows} rows does not divide into {schedule.microbatches} microbatches ({pipeline.label})"
            f"{over}. Use a batch of {f'{below} or ' if below else ''}{below + unit}{instead}."
        )
