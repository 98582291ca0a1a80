"""Pipeline parallelism: each device along an axis holds some of the layers, and microbatches pass through them.

GPipe (Huang et al., 2019, arXiv:1811.06965), 1F1B and interleaved 1F1B (Narayanan et al., 2021, arXiv:2104.04473), or
any schedule of one's own: see `jp.schedule`.
"""

import dataclasses
import functools as ft
import os
from collections.abc import Sequence
from typing import ClassVar

from .._errors import ShardingError
from .._rules import Draft, Leaf, as_patterns, check_patterns, matches, vocab_dim_of, way_out
from .._strategy import Strategy
from ..pipeline import Schedule, check_backward, check_layers, schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class PP(Strategy):
    """Split the layers of a model's stack (`jp.Stack`, or `FSDP(blocks=...)`) over an axis, whose devices are stages.

    `jp.value_and_grad` and `Recipe` then run the schedule; the model stays as it is. What comes before and after the
    stack is computed in global view. Moves, a tick: the activations of one microbatch to the next stage, their
    gradients to the one before, and what enters or leaves to all stages. Weights never move. Memory: the parameters of
    the stack, their gradients and optimiser state divide by the axis size; a stage keeps one activation for each
    microbatch in flight. On a mesh without the axis the stack is a scan over its layers, as without `PP`.

    What comes before and after the stack is no stage's: each stage computes it for its part of a microbatch's rows, or,
    with `vocab`, for its part of the vocabulary. Where rows are too few (one on each replica, as of long sequences) and
    no vocabulary is split, every stage computes all of it, and the step's notes say so.

    Beside it every other strategy may stand, except rings of keys (`CP(method="ring")`): what a stage moves is in a
    branch that other stages do not take, where sums, gathers and all-to-alls are good within a stage, and permutes are
    not. Axes of replicas are crossed once a step; `fsdp`, `expert` and `context` once a microbatch.

    Args:
        axis: The axis of the stages.
        schedule: A name (`"gpipe"`, `"1f1b"`), a CSV file, or a `jp.Schedule`.
        microbatches: Into how many parts each replica's rows are split. Of a schedule of one's own, it is what it says.
        chunks: Parts of the stack on each stage; with more than one, bubbles are as many times shorter.
        vocab: Patterns of embeddings and heads whose vocabulary is split over the stages, outside of what `TP` splits
            it over: their parameters, gradients and optimiser state divide by the axis size as well. See `jp.embed` and
            `jp.cross_entropy`, which then sum over the stages.

    Raises:
        ShardingError: The schedule cannot be run, or its numbers are said twice and differ; when planning: the model
            has no stack, or several; stages and chunks do not divide the layers; a pattern matches nothing, or a
            vocabulary does not divide.

    Example:
        >>> plan = jp.plan(
        ...     lambda: jp.Stack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 8, rngs=nnx.Rngs(0)),
        ...     jp.mesh(data=2, pipe=4),
        ...     [jp.DP(), jp.PP(microbatches=4)],
        ... )
        >>> plan.records["each.kernel"].storage
        P('pipe',)
        >>> step = plan.jit(jp.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2)))
        >>> value, gradients = step(plan.init(), plan.batch(np.ones((16, 8), np.float32)))
        >>> gradients["each"]["kernel"].sharding.spec
        P('pipe',)
    """

    phase: ClassVar[int] = 4

    axis: str = "pipe"
    schedule: str | os.PathLike[str] | Schedule = "1f1b"
    microbatches: int | None = None
    chunks: int | None = None
    vocab: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", as_patterns(self.vocab, "PP: vocab"))
        given = self.schedule
        if not isinstance(given, Schedule) and os.fspath(given).endswith(".csv"):
            given = Schedule.load(given)
            object.__setattr__(self, "schedule", given)
        if isinstance(given, Schedule):
            for name in ("microbatches", "chunks"):
                said, is_so = getattr(self, name), getattr(given, name)
                if said not in (None, is_so):
                    raise ShardingError(
                        f"PP: {name}={said}, but the schedule {given.name!r} has {is_so}. Leave it out."
                    )
        elif self.microbatches is None:
            raise ShardingError(
                f"PP: say into how many microbatches a batch is split: PP(schedule={given!r}, microbatches=8)."
            )
        self.schedule_for(given.stages if isinstance(given, Schedule) else 2)

    @property
    def num_chunks(self) -> int:
        """Parts of the stack on each stage."""
        return self.schedule.chunks if isinstance(self.schedule, Schedule) else self.chunks or 1

    def schedule_for(self, stages: int) -> Schedule:
        """The schedule on an axis of this size.

        Raises:
            ShardingError: It is for another number of stages, or cannot be run.
        """
        if isinstance(self.schedule, Schedule):
            found = self.schedule
            if found.stages != stages:
                raise ShardingError(
                    f"{self.label}: the schedule {found.name!r} has {found.stages} stages, but axis {self.axis!r} has "
                    f"size {stages}. Use a mesh with {self.axis}={found.stages}, or another schedule."
                )
        else:
            found = _named(str(self.schedule), stages, self.microbatches or 1, self.chunks or 1)
        check_backward(found, self.label)
        return found

    def check_layers(self, layers: int, stages: int, path: str) -> None:
        """Raise `ShardingError` unless stages and chunks divide the layers of the stack at `path`."""
        check_layers(layers, stages, self.num_chunks, f"{self.label}: {path}" if path else self.label)

    def apply(self, draft: Draft) -> None:
        draft.split_dim("stages", self.axis)
        stages = draft.sizes[self.axis]
        found = self.schedule_for(stages)
        stacks: dict[str, list[Leaf]] = {}
        for leaf in draft.leaves.values():
            if leaf.layers:
                stacks.setdefault(f".{leaf.path}".partition(".each.")[0], []).append(leaf)
        if len(stacks) != 1 or not all(".each." in f".{leaf.path}" for leaf in next(iter(stacks.values()))):
            draft.problems.append(self._what_is_needed(stacks))
            return
        if draft.context is not None and draft.context.method in ("ring", "hybrid"):
            draft.problems.append(
                f"{self.label} beside CP(method={draft.context.method!r}): its keys go round by permutes, which join "
                "every device of the mesh, and the stages of a pipeline are not all at it at once. Use "
                "CP(method='allgather') or 'ulysses', whose groups lie within a stage."
            )
        if draft.context is not None and draft.context.reduce == "step":
            draft.problems.append(
                f"{self.label} beside CP(reduce='step'): a stage sums the gradients of its weights over "
                f"{draft.context.axis!r} in each microbatch. Use CP(reduce='microbatch')."
            )
        leaves = next(iter(stacks.values()))
        each = leaves[0].shape[leaves[0].layers - 1] // stages
        of = f"each of {self.num_chunks} chunks" if self.num_chunks > 1 else "the layers"
        why = f"{each} of {each * stages} on a stage, of {of}"
        for leaf in leaves:
            leaf.split(-1, self.axis, by=self.label, why=why)
        self._split_vocabulary(draft)
        draft.notes += self._notes(found, each, draft)

    def _split_vocabulary(self, draft: Draft) -> None:
        ends = {leaf.path: leaf for leaf in draft.leaves.values() if not leaf.layers}
        draft.problems += check_patterns(self.vocab, [leaf.alias for leaf in ends.values()], f"{self.label}: vocab")
        for leaf in ends.values():
            pattern = next((pattern for pattern in self.vocab if matches(pattern, leaf.alias)), None)
            dim = None if pattern is None else vocab_dim_of(leaf)
            if dim is None:
                continue
            stages, free = draft.sizes[self.axis], draft.free_size(leaf, dim)
            if free % stages:
                draft.problems.append(
                    f"{leaf.path}: dim {dim} has size {leaf.shape[dim]}, {free} on a device, but axis {self.axis!r} "
                    f"has size {stages}, and {stages} does not divide {free}. "
                    f"{way_out(leaf.shape[dim], self.axis, leaf.shape[dim] // free * stages)}, or leave this leaf out "
                    "of PP's vocab."
                )
                continue
            leaf.split(dim, self.axis, by=self.label, why=f"vocab {pattern!r}", outermost=True)
        if self.vocab:
            draft.dims["vocab"] = (self.axis, *draft.dims.get("vocab", ()))

    def _what_is_needed(self, stacks: dict[str, list[Leaf]]) -> str:
        if len(stacks) > 1:
            names = ", ".join(name.lstrip(".") or "the model" for name in stacks)
            return (
                f"{self.label}: the model has {len(stacks)} stacks ({names}), and a pipeline has one. Put equal blocks "
                "into one jp.Stack, or leave PP out."
            )
        return (
            f"{self.label}: no stack in this model. A pipeline needs an nnx model with one stack of equal blocks "
            'between its first and last parts: jp.Stack(make_block, num, rngs=rngs), or FSDP(blocks="blocks.*") for a '
            "list of equal blocks. Unlike blocks (heterogeneous models) have to be made alike first."
        )

    def _notes(self, found: Schedule, each: int, draft: Draft) -> list[str]:
        stages, chunks = found.stages, found.chunks
        simulated = found.simulate()
        held = [
            f"stage {stage}: layers "
            + ", ".join(_range((chunk * stages + stage) * each, each) for chunk in range(chunks))
            for stage in range(stages)
        ]
        ends = [
            leaf.path
            for leaf in draft.leaves.values()
            if not leaf.layers and not any(self.axis in axes for axes in leaf.storage)
        ]
        where = f" On every stage: {', '.join(ends[:4])}{', ...' if len(ends) > 4 else ''}." if ends else ""
        return [
            (
                f"pipeline over {self.axis}: {found.title}; bubble {simulated.bubble:.1%} of the time, at most "
                f"{found.buffers.inputs.size} activations on a stage; {'; '.join(held)}.{where}"
            ),
            (
                "what calls the stack without jp.value_and_grad sends each layer from its stage to all stages, which "
                "all run all layers."
            ),
        ]


@ft.lru_cache(maxsize=64)
def _named(name: str, stages: int, microbatches: int, chunks: int) -> Schedule:
    return schedule(name, stages=stages, microbatches=microbatches, chunks=chunks)


def _range(first: int, number: int) -> str:
    return str(first) if number == 1 else f"{first}-{first + number - 1}"
