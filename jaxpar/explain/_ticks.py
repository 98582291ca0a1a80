"""How often a step with stages takes the branches of its ticks: its schedule says so, its program does not."""

from typing import Any

from ..parallel import PP
from ..pipeline import Schedule
from ..pipeline._tick import WORK, times_of


def schedule_of(plan: Any) -> Schedule | None:
    """The schedule of a plan with stages. An exported plan keeps no strategies, and so no schedule."""
    strategy = getattr(plan, "strategy", None)
    return None if strategy is None or strategy(PP) is None else plan.schedule


def shares_of(schedule: Schedule) -> dict[str, float]:
    """By the scope of a piece of work, the share of ticks in which each stage does it."""
    return {WORK[name]: own / schedule.num_ticks for name, (_, own) in times_of(schedule).items()}
