"""The figures that a prediction takes from neither the program nor the chip; `_coefficients.toml` holds them."""

import dataclasses
import functools as ft
import pathlib
import tomllib
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """One value for each table of `_coefficients.toml`, which says what it is and where it comes from."""

    overlap: float
    matmul: float
    memory: float
    attention: float
    attention_backward: float
    link: float
    dcn: float
    hop: float
    dcn_hop: float
    launch: float
    host: float


def coefficients() -> Coefficients:
    """The values that a prediction uses."""
    return Coefficients(**{name: float(table["value"]) for name, table in _tables().items()})


def bounds() -> list[tuple[Coefficients, Coefficients]]:
    """For each coefficient, all others at their values: the pair that makes a step faster and slower."""
    middle = coefficients()
    found = []
    for name, table in _tables().items():
        ends = [dataclasses.replace(middle, **{name: float(table[end])}) for end in ("low", "high")]
        found.append((ends[0], ends[1]) if name in _SECONDS else (ends[1], ends[0]))
    return found


_SECONDS = ("hop", "dcn_hop", "launch")
"""Those that lengthen a step as they grow; the others are rates."""


@ft.cache
def _tables() -> dict[str, dict[str, Any]]:
    path = pathlib.Path(__file__).with_name("_coefficients.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))
