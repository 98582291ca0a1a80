"""What is wrong with a step: `find` asks every detector, and puts the worst first.

Each `_find_*` file holds the detectors of one subject. A detector looks at the evidence and yields what it finds; it
says nothing of what is not worth a change, so that a good program gives no warning.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .._hlo import Module
from . import _find_branches, _find_copies, _find_gathers, _find_loops, _find_memory, _find_step, _find_time
from ._collectives import Row
from ._compiled import Compiled
from ._evidence import Evidence
from ._finding import Finding
from ._memory import Memory
from ._timeline import Timeline

_DETECTORS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    _find_branches.collectives_in_branches,
    _find_memory.over_limit,
    _find_loops.reductions_in_loops,
    _find_loops.reductions_added_up,
    _find_gathers.gathered_whole,
    _find_gathers.rematerialised,
    _find_gathers.activations_gathered,
    _find_gathers.resharded,
    _find_copies.unused_axes,
    _find_copies.replicated,
    _find_copies.repeated,
    _find_time.exposed,
    _find_time.small_collectives,
    _find_time.windowed_einsums,
    _find_memory.not_donated,
    _find_step.recompiled,
    _find_step.weakly_typed,
    _find_step.unmet,
)
_WORST = {"error": 0, "warning": 1, "note": 2}


def find(
    module: Module,
    compiled: Compiled,
    *,
    rows: Sequence[Row] = (),
    timeline: Timeline | None = None,
    memory: Memory | None = None,
    plan: Any = None,
    step: Any = None,
) -> tuple[Finding, ...]:
    """What is wrong with a compiled step, the worst first.

    The more is known, the more is found: without a timeline nothing is said of time, and weights are shares of the
    traffic; where neither the text nor `compiled.arguments` says how arguments are split, nothing is called a copy.

    Args:
        module: The program, read.
        compiled: The program and what it was compiled for.
        rows: Its collectives as the report has them.
        timeline: Its predicted step.
        memory: What a device holds.
        plan: The plan that it keeps to.
        step: What `plan.jit` made of the user's step.
    """
    seen = Evidence(
        module=module, compiled=compiled, rows=tuple(rows), timeline=timeline, memory=memory, plan=plan, step=step
    )
    found = [finding for detect in _DETECTORS for finding in detect(seen)]
    return tuple(sorted(found, key=lambda each: (_WORST[each.severity], -each.seconds, -each.bytes)))
