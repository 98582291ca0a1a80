"""Batches by their step: `loader.batch(step)` is a pure function of (source, batch size, seed, step).

Therefore the state of a loader is its step, the same on every process and for any number of processes; a resume, a
second epoch and a change of the number of processes need nothing else.
"""

import functools as ft
import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .. import _processes
from .._errors import DataError, listed
from ._order import order
from ._pack import Packed
from ._prefetch import Prefetched
from ._tokens import TokenFile

Batch = dict[str, np.ndarray]
"""Fields by name, each `[batch, ...]`."""

_SAMPLES = 2**31  # ids are int32


@runtime_checkable
class Source(Protocol):
    """Samples by their number: a list, a grain `MapDataset`, anything with these two. Read from a background thread.

    A sample is a dict of arrays, with the same names, shapes and dtypes in each. If there is an attribute
    `fingerprint` (a str), a checkpoint refuses to go on with a source that has another.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Loader:
    """Batches of a source, by step or one after another, on the host.

    Endless by default: each epoch is another permutation of all samples, and a batch may hold the end of one and the
    start of the next. With `epochs`, it ends: the last batch is padded with samples of weight 0 (see `pad_batch`), so
    that it compiles nothing new and a weighted mean is the true one; a later `for` starts over.

    Each process makes its own rows of a batch alone. Fields of a batch are those of the samples, stacked, and
    `sample`: int32 `[batch]`, the place of each sample in the line of all epochs (modulo 2^31), different for each
    sample in a batch: dropout keys fold it in. A `TokenFile` gives `tokens`, `labels`, `positions`, `segments` (int32)
    and `weights` (float32), each `[batch, seq_len]`; see `Packed`.

    Where processes, or the axes of a plan, do not divide `batch_size`, rows of weight 0 fill it up, if samples
    have a field `weights` or there are `epochs`. So a run that began over four processes goes on over three, with the
    same samples in each step.

    Args:
        source: A `TokenFile`, or any random-access source of dicts of arrays.
        batch_size: Samples in the global batch, over all processes.
        seq_len: Tokens in a row; for a `TokenFile`, and only for one.
        seed: Of the shuffle; `None` keeps the order of the source.
        epochs: Times that each sample is given; `None` is without end.
        process_index: Which part of each batch to make, from 0; JAX's process index if not given. Processes that
            share rows, as when a tensor axis spans two, have the same one; `to` finds it from a plan.
        process_count: In how many parts batches are made; JAX's process count if not given.

    Raises:
        DataError: A number is out of range, the source is empty or not of dicts of arrays, `seq_len` is missing or
            not meant, or a batch does not divide into its parts.

    Example:
        >>> loader = Loader([{"x": np.array(i)} for i in range(5)], batch_size=2, seed=None)
        >>> loader.batch(2)["x"].tolist()
        [4, 0]
        >>> next(loader)["x"].tolist(), next(loader)["sample"].tolist(), loader.get_state()["step"]
        ([0, 1], [2, 3], 2)
    """

    def __init__(
        self,
        source: TokenFile | Source,
        *,
        batch_size: SupportsIndex,
        seq_len: int | None = None,
        seed: SupportsIndex | None = 0,
        epochs: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        self.source: Source = _rows(source, seq_len)
        self.batch_size = operator.index(batch_size)  # the state is JSON, which holds no numpy integers
        self.seed = None if seed is None else operator.index(seed)
        self.epochs = epochs
        self.process_index = process_index
        self.process_count = process_count
        self.step = 0
        self._size = len(self.source)
        self._check()

    @property
    def num_steps(self) -> int | None:
        """Batches until the end; `None` if there is none."""
        return None if self.epochs is None else -(-self._size * self.epochs // self.batch_size)

    def batch(self, step: int) -> Batch:
        """This process's part of batch `step`, `[batch_size / process_count, ...]` rounded up, whatever came before.

        Raises:
            DataError: The step is negative or beyond the end, or samples do not have one shape.
        """
        index, count = self._part()
        return self._made(step, index, count, self._filled_for(count))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.step == self.num_steps:
            self.step = 0
            raise StopIteration
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The next step and what makes the order, as JSON can hold it; the same on every process."""
        return {"step": self.step, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: The state is of another source, batch size or seed; naming each, with both values.
        """
        here = self._identity()
        wrong = [
            f"{name}: {state.get(name)!r} in the checkpoint, {value!r} here"
            for name, value in here.items()
            if state.get(name) != value
        ]
        step = state.get("step")
        if type(step) is not int or step < 0 or (self.num_steps is not None and step > self.num_steps):
            end = "on" if self.num_steps is None else f"to {self.num_steps}"
            wrong.append(f"step: {step!r} in the checkpoint, from 0 {end} here")
        if wrong:
            raise DataError(
                f"The data position in the checkpoint is not one of this loader:\n{listed(wrong)}\n"
                "Resume with the data and settings of the run, or start a new run in another directory."
            )
        self.step = int(state["step"])

    def to(self, plan: Any, depth: int = 2) -> Prefetched:
        """Global, sharded batches, made and placed in a background thread; see `prefetch`.

        Each process makes the rows that its own devices hold by `plan`, once, though several devices or processes
        hold them; a row goes from host to each device that holds it.

        Args:
            plan: What `jp.plan` returns; only its mesh, `batch_axes` and `context` are read.
            depth: Batches that wait on the devices at most, beside the one in use.

        Raises:
            DataError: The batch axes do not divide the batch and its samples have no `weights`, the devices of this
                process hold rows that are not one part of it, or `process_index` was given and is another part.
        """
        if isinstance(plan.mesh, AbstractMesh):
            raise DataError(
                "The plan is for hardware that is not attached, so nothing can be loaded onto it. "
                "Iterate over the loader itself, or make the plan on jp.mesh(...) of this machine."
            )
        axes = tuple(plan.batch_axes)
        parts = math.prod(plan.mesh.shape[axis] for axis in axes)
        size = self._filled(parts, f"mesh axes {', '.join(axes)} split it in {parts}, which do not divide it")
        if size > self.batch_size:
            text = "Batches of %d are filled up to %d by rows of weight 0, as mesh axes %s split them in %d."
            _processes.say(logging.INFO, text, self.batch_size, size, ", ".join(axes), parts)
        sharding = NamedSharding(plan.mesh, PartitionSpec(axes) if axes else PartitionSpec())
        held = sharding.addressable_devices_indices_map((size,)).values()
        rows = [index[0].indices(size)[:2] for index in held if index is not None]
        index, count = _part_of(rows, size)
        if self.process_count is not None and (self.process_index, self.process_count) != (index, count):
            raise DataError(
                f"process_index={self.process_index} of process_count={self.process_count} was given, but the devices "
                f"of this process hold part {index} of {count}. Leave out both: `to` finds them."
            )

        split = plan.context

        def place(name: str, field: np.ndarray) -> jax.Array:
            spec = sharding.spec if split is None else split.spec(sharding.spec, name, field.shape)
            where = NamedSharding(plan.mesh, spec)
            return jax.make_array_from_process_local_data(where, field, (size, *field.shape[1:]))

        def make(step: int) -> dict[str, jax.Array]:
            made = self._made(step, index, count, size)
            arranged = made if split is None else split.arrange(made)
            return {name: place(name, field) for name, field in arranged.items()}

        return Prefetched(self, make, depth)

    def __repr__(self) -> str:
        return (
            f"Loader({self._size:,} samples, batch_size={self.batch_size}, seed={self.seed}, epochs={self.epochs}, "
            f"step={self.step})"
        )

    def _identity(self) -> dict[str, Any]:
        made = getattr(self.source, "fingerprint", None) or f"{type(self.source).__name__} of {self._size}"
        return {"version": 1, "source": made, "batch_size": self.batch_size, "seed": self.seed}

    def _filled(self, parts: int, why: str) -> int:
        """Rows of a batch that is filled up so that `parts` divide it."""
        size = -(-self.batch_size // parts) * parts
        if size > self.batch_size and self.epochs is None and not self._is_weighted:
            raise DataError(
                f"batch_size={self.batch_size}: {why}. Use {_multiples(self.batch_size, parts)}; or give samples a "
                "field 'weights', by which the loss counts them: rows of weight 0 then fill up each batch."
            )
        return size

    @ft.cached_property
    def _is_weighted(self) -> bool:
        return "weights" in self.source[0]

    def _filled_for(self, count: int) -> int:
        return self._filled(count, f"it is over all processes, and {count} do not divide it")

    def _made(self, step: int, index: int, count: int, size: int) -> Batch:
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            end = "on" if self.num_steps is None else f"to {self.num_steps - 1}, the end of {self.epochs} epochs"
            raise DataError(f"There is no batch {step}: steps go from 0 {end}.")
        local = size // count
        rows = np.arange(index * local, min((index + 1) * local, self.batch_size))
        places = step * self.batch_size + rows
        if self.epochs is not None:
            places = places[places < self._size * self.epochs]
        wanted = places if places.size else np.array([0])  # a part that is all padding has the shape of any sample
        samples = [self.source[int(sample)] for sample in order(wanted, self._size, self.seed)]
        batch = {**_stack(samples), "sample": (wanted % _SAMPLES).astype(np.int32)}
        if self.epochs is None and size == self.batch_size:
            return batch
        return pad_batch({name: field[: places.size] for name, field in batch.items()}, local)

    def _part(self) -> tuple[int, int]:
        index = jax.process_index() if self.process_index is None else self.process_index
        count = jax.process_count() if self.process_count is None else self.process_count
        if not 0 <= index < count:
            raise DataError(
                f"process_index={index} of process_count={count}: indices go from 0 to {count - 1}. "
                "Give both, or neither to take JAX's own."
            )
        self._filled_for(count)
        return index, count

    def _check(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size}: a batch has at least 1 sample")
        if self.epochs is not None and self.epochs < 1:
            problems.append(f"epochs={self.epochs}: at least 1, or None for no end")
        if (self.process_index is None) != (self.process_count is None):
            problems.append("process_index and process_count: give both, or neither to take JAX's own")
        if problems:
            raise DataError(f"A loader cannot be made:\n{listed(problems)}")
        if self.process_count is not None:
            self._part()


def pad_batch(batch: Mapping[str, Any], to: int) -> Batch:
    """`batch` with rows of zeros up to `to` rows, of weight 0, so that a mean weighted by `weights` is unchanged.

    A batch without the field `weights` gets it: float32 `[to]`, 1 for its own rows.

    Args:
        batch: Arrays by name, each `[rows, ...]`, on the host.
        to: Rows afterwards.

    Raises:
        DataError: Fields of different numbers of rows, or more rows than `to`.

    Example:
        >>> pad_batch({"x": np.array([3, 4])}, 3)
        {'x': array([3, 4, 0]), 'weights': array([1., 1., 0.], dtype=float32)}
    """
    fields = {name: np.asarray(field) for name, field in batch.items()}
    sizes = {name: field.shape[0] if field.ndim else 0 for name, field in fields.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"A batch has one number of rows, and these fields differ: {_each(sizes)}. Mend the source.")
    (rows,) = set(sizes.values())
    if rows > to:
        raise DataError(f"A batch of {rows} rows cannot be padded to {to}. Pad to {rows} or more, or split it.")
    fields.setdefault("weights", np.ones(rows, np.float32))
    return {name: np.pad(field, [(0, to - rows)] + [(0, 0)] * (field.ndim - 1)) for name, field in fields.items()}


def _rows(source: Any, seq_len: int | None) -> Source:
    if isinstance(source, TokenFile):
        if seq_len is None:
            raise DataError(
                f"Loader of {source!r}: seq_len is missing. Give the tokens of a row, which a model reads at once."
            )
        return Packed(source, seq_len)
    if seq_len is not None:
        raise DataError(
            f"seq_len={seq_len} packs a TokenFile, and the source is a {type(source).__name__}. Leave it out."
        )
    if not len(source):
        raise DataError(f"The source, a {type(source).__name__}, has no samples. Check the path that it was made from.")
    sample = source[0]
    if not isinstance(sample, Mapping) or not sample or "sample" in sample:
        found = f"with the fields {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else ""
        raise DataError(
            f"Sample 0 of the source is a {type(sample).__name__} {found}. A sample is a dict of arrays by name, as "
            '{"image": ..., "label": ...}; the name \'sample\' is the loader\'s own.'
        )
    return source


def _stack(samples: Sequence[Mapping[str, Any]]) -> Batch:
    names = list(samples[0])
    if any(list(sample) != names for sample in samples):
        fields = sorted({", ".join(sample) for sample in samples})
        raise DataError(f"Samples of one batch have different fields: {' | '.join(fields)}. Give all of them the same.")
    columns = {name: [np.asarray(sample[name]) for sample in samples] for name in names}
    shapes = {name: sorted({(column.shape, str(column.dtype)) for column in columns[name]}) for name in names}
    uneven = [
        f"{name}: {' and '.join(f'{dtype}{list(shape)}' for shape, dtype in found)}"
        for name, found in shapes.items()
        if len(found) > 1
    ]
    if uneven:
        raise DataError(
            f"Samples of one batch have different shapes or dtypes:\n{listed(uneven)}\nPad or crop them in the source."
        )
    return {name: np.stack(column) for name, column in columns.items()}


def _part_of(held: Sequence[tuple[int, int]], batch_size: int) -> tuple[int, int]:
    """Index and count of the equal parts of a batch of which one is the rows from start to stop that are `held`."""
    first, last = min(start for start, _ in held), max(stop for _, stop in held)
    local = last - first
    if sum(stop - start for start, stop in set(held)) != local or batch_size % local or first % local:
        spans = ", ".join(f"{start} to {stop}" for start, stop in sorted(set(held)))
        raise DataError(
            f"The devices of this process hold rows {spans} of {batch_size}, which are not one of several equal parts. "
            "Order the mesh so that the devices of a process are neighbours along the batch axes (jp.mesh does)."
        )
    return first // local, batch_size // local


def _multiples(size: int, divisor: int) -> str:
    below = size // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _each(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
