"""What a strategy is, and how a list of them is resolved.

A strategy is a frozen dataclass that declares which axis it owns and, when its turn comes, what it does to the draft
of a
plan: which dims of which leaves it splits, in storage, in use, in gradients and in optimiser state. The turn is its
phase, not its place in the list, so every order of listing gives the same plan.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from ._errors import ShardingError, nearest
from ._rules import Draft

DEFAULT_AXES = ("data", "fsdp", "tensor", "context", "expert", "pipe")
"""The axes that strategies own by default. A mesh that lacks one has it at size 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of all strategies: subclasses give a phase, a default axis and `apply`.

    Attributes:
        phase: When it is applied; lower is earlier.
        owns: Whether no other strategy may be on its axis.
        axis: The mesh axis it works on.
    """

    phase: ClassVar[int]
    owns: ClassVar[bool] = True

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
    _check_types(strategies)
    active = _check_axes(strategies, draft)
    draft.raise_problems()
    for strategy in sorted(active, key=lambda each: (each.phase, each.label)):
        strategy.apply(draft)
    draft.raise_problems()


def _check_types(strategies: Sequence[Strategy]) -> None:
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            shown = f"{strategy.__name__} (the class: call it)" if isinstance(strategy, type) else repr(strategy)
            raise ShardingError(
                f"strategies: {shown} is not a strategy. Give instances, as in [jp.FSDP(), jp.TP(...)]."
            )


def _check_axes(strategies: Sequence[Strategy], draft: Draft) -> list[Strategy]:
    active = []
    for strategy in strategies:
        others = [
            other
            for other in strategies
            if other is not strategy and other.axis == strategy.axis and (other.owns == strategy.owns)
        ]
        if others and not any(strategy.label in problem for problem in draft.problems):
            draft.problems.append(
                f"{strategy.label} and {others[0].label} are both on axis {strategy.axis!r}. Give one of them another "
                "axis, or keep one."
            )
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
    used = {strategy.axis for strategy in strategies}
    for axis, size in draft.sizes.items():
        if size > 1 and axis not in used:
            usual = {"data": "DP()", "fsdp": "FSDP()", "tensor": "TP(column=[...], row=[...])"}.get(axis)
            add = f"Add {usual} to the strategies" if usual else "Name it in a strategy, axis=" + repr(axis)
            draft.problems.append(
                f"axis {axis!r} has size {size}, but no strategy uses it, so {size} devices would do the same work."
                f"{nearest(axis, DEFAULT_AXES) if axis not in DEFAULT_AXES else ''} {add}, or leave the axis out of "
                f"the mesh."
            )
    return active
