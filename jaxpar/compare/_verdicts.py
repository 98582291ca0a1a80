"""What a comparison concludes, in sentences."""

import itertools
from typing import TYPE_CHECKING

from .._plan_text import bytes_text
from ._candidates import Candidate
from ._rank import seconds_text, why

if TYPE_CHECKING:
    from ._comparison import Comparison


def verdicts(comparison: "Comparison") -> tuple[str, ...]:
    """For each target why its first mesh is first, where compiling changed the order, and how targets compare."""
    said = []
    several = len(comparison.targets) > 1
    for target in comparison.targets:
        here = list(comparison.of(target))
        prefix = f"{target}: " if several else ""
        if not here:
            said.append(f"{prefix}no mesh fits; see the reasons.")
            continue
        if len(here) > 1:
            said.append(prefix + why(here[0], here[1]))
        said += [prefix + each for each in (_simplicity(here[0]), _order(here)) if each]
    firsts = [each for target in comparison.targets for each in comparison.of(target)[:1]]
    if len(firsts) > 1:
        said.append(_across(comparison, firsts))
    return tuple(said)


def _simplicity(best: Candidate) -> str:
    """What a mesh of one axis says of the model."""
    memory = best.report.memory
    if list(best.axes) != ["data"] or memory is None:
        return ""
    return (
        f"Simpler is better: the whole model, with gradients and optimiser, is {bytes_text(memory.peak)} of a device's "
        f"{bytes_text(memory.limit)}, so nothing needs to be sharded."
    )


def _order(here: list[Candidate]) -> str:
    """Whether the compiled meshes are in the order of their estimates, and if not, why."""
    compiled = [each for each in here if each.is_compiled]
    for first, second in itertools.pairwise(compiled):
        mine, theirs = first.estimate.timeline, second.estimate.timeline
        if mine is None or theirs is None or mine.step_seconds <= theirs.step_seconds * 1.0001:
            continue
        parts = []
        for name, field in (
            ("computation", "compute_seconds"),
            ("exposed communication", "exposed_communication_seconds"),
        ):
            found = [getattr(each, field) for each in (first.report.timeline, mine, second.report.timeline, theirs)]
            parts.append(
                f"{name} {found[0]:.3g} s (estimated {found[1]:.3g}) against {found[2]:.3g} s ({found[3]:.3g})"
            )
        return (
            f"Compiled, {first.name} comes before {second.name}, which the estimate had the other way round: "
            f"{'; '.join(parts)}."
        )
    return ""


def _across(comparison: "Comparison", firsts: list[Candidate]) -> str:
    """How the best meshes of the targets compare: days, and what they cost."""
    told = []
    for each in sorted(firsts, key=lambda each: each.seconds):
        cost = comparison.cost(each)
        if not comparison.train_tokens:
            told.append(f"{each.target} ({each.name}) takes {seconds_text(each.seconds)} a step")
            continue
        told.append(
            f"{each.target} ({each.name}) takes {comparison.days(each):.3g} days"
            + (f" and costs {cost:,.0f}" if cost is not None else f" of {each.report.num_chips} chips")
        )
    return "; ".join(told) + "."
