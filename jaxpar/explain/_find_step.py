"""What is wrong with how a step is called and what its model says: recompilation, names that mean nothing."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from .._hlo._text import short_file
from ._evidence import Evidence, at
from ._finding import Finding


def recompiled(seen: Evidence) -> Iterator[Finding]:
    """A step that was compiled more than once."""
    times = getattr(seen.step, "num_compilations", 0)
    if times < 2:
        return
    why = "; ".join(line for change in seen.step.recompilations[-1:] for line in change[:3])
    yield Finding(
        kind="recompiled",
        severity="warning",
        reason=f"The step was compiled {times} times{f', last because {why}' if why else ''}.",
        place=at(seen.step.__name__, _line_of(seen.step.function)),
        remedy=(
            "Keep shapes, dtypes and settings the same from call to call: jp.data.pad_batch for a last batch, "
            'jnp.float32(x) for a Python number that changes its type; plan.jit(on_recompile="error") says where.'
        ),
    )


def weakly_typed(seen: Evidence) -> Iterator[Finding]:
    """State of a weak dtype: what a step returns for it may be strong, and the next call is then another program."""
    weak = [each for each in seen.arguments.values() if each.weak and each.kind not in ("batch", "other")]
    if not weak:
        return
    names = ", ".join(each.path for each in weak[:3]) + (", ..." if len(weak) > 3 else "")
    yield Finding(
        kind="weak-type",
        severity="note",
        reason=(
            f"State that is weakly typed, as Python numbers are: {names}. A step that returns a strong type there is "
            "compiled twice."
        ),
        place=weak[0].path,
        remedy="Give the initial value a dtype: jnp.asarray(x, jnp.float32), jnp.zeros((), jnp.float32).",
    )


def unmet(seen: Evidence) -> Iterator[Finding]:
    """Names that a model gives its dims and that no strategy of the plan reads."""
    for note in getattr(seen.plan, "notes", ()):
        if note.startswith("dims named "):
            yield Finding(
                kind="unmet-constraint",
                severity="warning",
                reason=f"The model declares a sharding that the plan never meets: {note}",
                place="",
                remedy=(
                    "Give these dims one of the names that strategies read, in nnx.with_partitioning or "
                    "nn.with_logical_partitioning; or take the annotation out."
                ),
            )


def _line_of(function: Callable[..., Any]) -> str:
    """Where a function is defined; nothing of one that is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{short_file(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""
