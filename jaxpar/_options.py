"""Compiler options by name: data, each set with what it is for, why, and where that was read.

A set is a plain dict for `Recipe(compiler_options=...)`, `plan.jit(..., compiler_options=...)` and
`jp.explain(..., compiler_options=...)`; two sets are compared by explaining a step with each and `report.diff`.
No set is applied by itself: a default that changes in silence is worse than a slow one.
"""

import dataclasses
import functools as ft
import pathlib
import tomllib
from typing import Any

from . import _hardware, _mesh
from ._errors import StepError, nearest
from ._types import AnyMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionSet:
    """Options that belong together.

    Attributes:
        name: What `compiler_options` calls them.
        chips: The chips they are for.
        options: XLA's own names and values.
        reason: What they do, and when that helps.
        source: Where it was read or measured.
    """

    name: str
    chips: tuple[str, ...]
    options: dict[str, Any]
    reason: str
    source: str


def compiler_options(target: str | AnyMesh, *names: str) -> dict[str, Any]:
    """XLA options by name, for one kind of chip: for a recipe, `plan.jit`, `jp.explain`.

    `jaxpar._options.option_sets()` has all of them with their reasons; an error lists those of the chip.

    Args:
        target: A chip (`"v5e"`), hardware (`"v5e:16x16"`), or a mesh.
        names: Of sets; together they must not contradict one another.

    Raises:
        StepError: No such set for this chip (those that there are, with their reasons), or two that contradict.
        MeshError: No such hardware.

    Example:
        >>> jp.compiler_options("v5e", "no-windowed-einsum")
        {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1000000}
    """
    chip = _chip(target)
    known = {each.name: each for each in option_sets() if chip in each.chips}
    unknown = [name for name in names if name not in known]
    if unknown:
        lines = "\n".join(f"  {each.name}: {each.reason}" for each in known.values()) or "  none"
        raise StepError(
            f"compiler_options: {chip} has no set {unknown[0]!r}.{nearest(unknown[0], known)} It has\n{lines}"
        )
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in names:
        for option, value in known[name].options.items():
            if found.get(option, value) != value:
                raise StepError(
                    f"compiler_options: {origin[option]!r} sets {option}={found[option]}, and {name!r} sets it to "
                    f"{value}. Leave one of the two out."
                )
            found[option], origin[option] = value, name
    return found


@ft.cache
def option_sets() -> tuple[OptionSet, ...]:
    """Every set."""
    text = pathlib.Path(__file__).with_name("_options.toml").read_text(encoding="utf-8")
    return tuple(
        OptionSet(name=name, **{**facts, "chips": tuple(facts["chips"])}) for name, facts in tomllib.loads(text).items()
    )


def _chip(target: str | AnyMesh) -> str:
    return _hardware.chip_name(target) if isinstance(target, str) else _mesh.hardware_of(target).chip.name
