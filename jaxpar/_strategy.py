"""What a strategy is, and how a list of them is resolved.

A strategy is a frozen dataclass that declares which axis it owns and, when its turn comes, what it does to the draft of
a plan: which dims of which leaves it splits, in storage, in use, in gradients and in optimiser state. The turn is its
phase, not its place in the list, so every order of listing gives the same plan.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from ._errors import ShardingError, nearest
from ._rules import Draft

DEFAULT_AXES = ("data", "fsdp", "tensor", "context", "expert", "pipe")
"""The axes that strategies own by default. A mesh that lacks one has it at size 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of all strategies: subclasses give a phase, a default axis and `apply`.

    Attributes:
        phase: When it is applied; lower is earlier.
        beside: Names of the strategies that may be on the same axis.
        axis: The mesh axis it works on.
    """

    phase: ClassVar[int]
    beside: ClassVar[tuple[str, ...]] = ()

    axis: str

    @property
    def label(self) -> str:
        """How tables and messages call it: `FSDP`, or `FSDP(axis='shard')` if renamed."""
        name = type(self).__name__
        default = type(self).__dataclass_fields__["axis"].default
        return name if self.axis == default else f"{name}(axis={self.axis!r})"

    def apply(self, draft: Draft) -> None:
        """Split what this strategy splits, and say why; put what cannot be done in `draft.problems`."""
        raise NotImplementedError


def resolve(strategies: Sequence[Strategy], draft: Draft) -> None:
    """Apply `strategies` to `draft`, each in its phase.

    Raises:
        ShardingError: Every problem at once: an axis the mesh lacks, two strategies on one axis, an axis that no
            strategy uses, an indivisible dim, a pattern that matches nothing, a strategy that changes nothing.
    """
    active = _check_axes(strategies, draft)
    draft.raise_problems()
    for strategy in sorted(active, key=lambda each: (each.phase, each.label)):
        strategy.apply(draft)
    draft.raise_problems()


def check_types(strategies: Any) -> tuple[Strategy, ...]:
    """`strategies` as a tuple.

    Raises:
        ShardingError: It is no sequence of strategies.
    """
    if isinstance(strategies, Strategy) or not isinstance(strategies, Sequence):
        raise ShardingError(
            f"strategies: {_shown(strategies)} is not a list of strategies. Give one, as in [jp.FSDP(), jp.TP(...)]."
        )
    wrong = [each for each in strategies if not isinstance(each, Strategy)]
    if wrong:
        raise ShardingError(
            f"strategies: {_shown(wrong[0])} is not a strategy. Give instances, as in [jp.FSDP(), jp.TP(...)]."
        )
    return tuple(strategies)


def _shown(value: Any) -> str:
    return f"{value.__name__} (the class: call it)" if isinstance(value, type) else repr(value)


def _check_axes(strategies: Sequence[Strategy], draft: Draft) -> list[Strategy]:
    active = []
    for strategy in strategies:
        default = type(strategy).__dataclass_fields__["axis"].default
        if strategy.axis not in draft.sizes and strategy.axis != default:
            draft.problems.append(
                f"{strategy.label}: the mesh has no axis {strategy.axis!r}; it has {dict(draft.sizes)}."
                f"{nearest(strategy.axis, draft.sizes)} Name one of these, or add the axis to the mesh."
            )
        elif draft.sizes.get(strategy.axis, 1) == 1:
            draft.inactive.append((strategy.label, f"axis {strategy.axis!r} has size 1"))
        else:
            active.append(strategy)
    for axis in dict.fromkeys(strategy.axis for strategy in strategies):
        here = sorted((strategy for strategy in strategies if strategy.axis == axis), key=lambda each: each.label)
        clash = [
            (one.label, other.label) for one, other in itertools.combinations(here, 2) if not _may_share(one, other)
        ]
        if clash:
            draft.problems.append(
                f"{clash[0][0]} and {clash[0][1]} are both on axis {axis!r}. Give one of them another axis, or keep "
                "one."
            )
    used = {strategy.axis for strategy in strategies}
    misspelt = used - {*draft.sizes, *DEFAULT_AXES}
    for axis, size in draft.sizes.items():
        if size > 1 and axis not in used and not misspelt:
            draft.problems.append(
                f"axis {axis!r} has size {size}, but no strategy uses it, so {size} devices would do the same work."
                f"{nearest(axis, DEFAULT_AXES) if axis not in DEFAULT_AXES else ''} {_user_of(axis)}, or leave the "
                "axis out of the mesh."
            )
    return active


def _may_share(one: Strategy, other: Strategy) -> bool:
    return type(other).__name__ in one.beside or type(one).__name__ in other.beside


def _user_of(axis: str) -> str:
    """What could use an axis that nobody uses."""
    usual = {
        "data": "DP()",
        "fsdp": "FSDP()",
        "tensor": "TP(column=[...], row=[...])",
        "context": "CP()",
        "expert": "EP()",
        "pipe": "PP(microbatches=...)",
    }.get(axis)
    return f"Add {usual} to the strategies" if usual else f"Name it in a strategy, as in FSDP(axis={axis!r})"
