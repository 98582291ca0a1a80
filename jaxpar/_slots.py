"""Which leaf of a plan a leaf of any state belongs to: by path suffix and shape.

Optimiser state repeats the paths of the parameters under its own names (`opt_state.0.mu.blocks.0.q.kernel`), whatever
the optimiser: adamw, muon, a partition of several, accumulators. So a leaf belongs to the parameter whose path shares
its longest suffix and has its shape; a factored slot (Adafactor's rows and columns) has the shape less one dim. What
belongs to nothing, such as a step count, is whole on every device.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec

from ._context import as_spec, axes_at
from ._errors import ShardingError
from ._plan import Record, as_dtype
from ._rules import fold_layers


@dataclasses.dataclass(frozen=True)
class Match:
    """A leaf's record in the plan, and the specs it gives the leaf: as a parameter, and as a slot of it."""

    record: Record
    storage: PartitionSpec
    slots: PartitionSpec
    is_parameter: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Part:
    """What a model reads: a parameter, or one layer of one that stacks layers.

    Attributes:
        record: Of the parameter.
        layers: Leading dims of the record that the part lacks: 1 if it is a layer.
    """

    record: Record
    layers: int

    @property
    def read(self) -> tuple[object, ...]:
        """All that reading it depends on."""
        specs = (self.record.storage, self.record.compute, self.record.gradient)
        here = [as_spec([axes_at(entry) for entry in tuple(spec)[self.layers :]]) for spec in specs]
        return (*here, self.record.compute_dtype)


class Matcher:
    """Looks up leaves of any state in the records of a plan."""

    def __init__(self, records: Mapping[str, Record]):
        self._by_suffix: dict[tuple[str, ...], list[Record]] = {}
        for record in records.values():
            if record.slot not in ("parameter", "frozen"):
                continue
            tokens = tuple(record.path.split("."))
            for start in range(len(tokens)):
                self._by_suffix.setdefault(tokens[start:], []).append(record)

    def match(self, path: str, shape: tuple[int, ...]) -> Match | None:
        """The match of the leaf at `path`, or `None`.

        Raises:
            ShardingError: Two parameters match it equally well and lie differently.
        """
        tokens = tuple(path.split("."))
        for start in range(len(tokens)):
            found = self._by_suffix.get(tokens[start:], [])
            same = [record for record in found if record.shape == shape]
            exact = [
                record for record in same if record.path == path or len(record.path.split(".")) == len(tokens) - start
            ]
            for candidates in (exact, same):
                if candidates:
                    return self._only(path, candidates, whole_path=candidates[0].path == ".".join(tokens[start:]))
            for record in found:
                dim = _less_one(record.shape, shape)
                if dim is not None:
                    spec = _without(record.slots, dim, len(record.shape))
                    return Match(record, spec, spec, False, f"slot of {record.path} without its dim {dim}")
            if any(record.path == ".".join(tokens[start:]) for record in found):
                return None  # it is this parameter's, and has a shape of its own: not that of a namesake elsewhere
        return None

    def part(self, path: str, shape: tuple[int, ...], *, within: str | None) -> Part | None:
        """The parameter that a leaf is, or of which it is one layer; `None` if it is neither.

        Args:
            path: Where the leaf is in what was given.
            shape: Its shape.
            within: Where that lives in the model, if its owner says so: then nothing elsewhere is meant.

        Raises:
            ShardingError: It may be a part of several parameters, which are read otherwise.
        """
        full = ".".join(filter(None, (within, path)))
        tokens = tuple(full.split("."))
        for start in range(len(tokens) if within is None else 1):
            parts = [
                Part(record, layers)
                for record in self._by_suffix.get(tokens[start:], [])
                for layers in range(record.layers + 1)
                if record.shape[layers:] == shape
            ]
            meant = [part for part in parts if within is not None and part.record.path == full] or parts
            if meant:
                return _alike(path, meant)
        return None

    def _only(self, path: str, candidates: list[Record], *, whole_path: bool) -> Match:
        first = candidates[0]
        for other in candidates[1:]:
            if (other.storage, other.slots) != (first.storage, first.slots):
                raise ShardingError(
                    f"{path}: belongs to {first.path} or to {other.path}, which lie differently ({first.storage} and "
                    f"{other.storage}). Pass both models to the step in one container, under the names the plan has."
                )
        return Match(first, first.storage, first.slots, whole_path, f"as {first.path}")


NO_PARAMETER = (("optimizer", "belongs to no parameter: whole"),)


def slot_record(path: str, shape: jax.ShapeDtypeStruct, matcher: Matcher) -> Record:
    """The record of a leaf of an optimiser's state."""
    match = matcher.match(path, shape.shape)
    return Record(
        path=path,
        shape=shape.shape,
        dtype=as_dtype(shape.dtype),
        slot="optimizer",
        storage=match.slots if match else PartitionSpec(),
        reasons=(("optimizer", match.why),) if match else NO_PARAMETER,
    )


def unmatched_note(records: Mapping[str, Record]) -> list[str]:
    """A note of optimiser state that belongs to no parameter and is more than a number."""
    whole = [record for record in records.values() if record.reasons == NO_PARAMETER and record.num_elements > 1]
    paths = list(dict.fromkeys(fold_layers(record.path for record in whole)))
    total = sum(record.num_bytes for record in whole)
    shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    return [f"optimiser state that belongs to no parameter is whole: {total:,} bytes ({shown})"] if whole else []


def _alike(path: str, parts: list[Part]) -> Part:
    """The first of `parts`, if all of them are read alike."""
    first = parts[0]
    for other in parts[1:]:
        if other.read != first.read:
            one, two = (f"{'one layer of ' * part.layers}{part.record.path}" for part in (first, other))
            raise ShardingError(
                f"jp.gather: {path or 'the array'} may be {one} or {two}, which lie differently. Say where it lives in "
                f'the model: jp.gather(params, "{first.record.path.removesuffix(path).rstrip(".")}"), or another path.'
            )
    return first


def _without(spec: PartitionSpec, dim: int, ndim: int) -> PartitionSpec:
    entries = tuple(spec) + (None,) * (ndim - len(spec))
    return as_spec([axes_at(entry) for at, entry in enumerate(entries) if at != dim])


def _less_one(whole: tuple[int, ...], part: tuple[int, ...]) -> int | None:
    """The one dim without which `whole` is `part`; `None` if there is none, or no way to tell."""
    if len(part) != len(whole) - 1:
        return None
    found = [dim for dim in range(len(whole)) if whole[:dim] + whole[dim + 1 :] == part]
    return found[0] if len(found) == 1 else None
