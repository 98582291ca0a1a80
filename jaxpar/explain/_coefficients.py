"""The figures that a prediction takes from neither the program nor the chip; `_coefficients.toml` holds them."""

import dataclasses
import functools as ft
import pathlib
import tomllib
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """One value for each table of `_coefficients.toml`, which says what it is and where it comes from."""

    mxu: float
    estimate: float
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
    """Pairs that make a step faster and slower, one for each group of coefficients that are wrong together."""
    middle, tables = coefficients(), _tables()
    found = []
    for group in _TOGETHER:
        ends = {end: {name: float(tables[name][end]) for name in group} for end in ("low", "high")}
        fast = {name: ends["low" if name in _LENGTHENS else "high"][name] for name in group}
        slow = {name: ends["high" if name in _LENGTHENS else "low"][name] for name in group}
        found.append((dataclasses.replace(middle, **fast), dataclasses.replace(middle, **slow)))
    return found


_LENGTHENS = ("estimate", "hop", "dcn_hop", "launch")
"""Those that lengthen a step as they grow; the others are rates."""

_TOGETHER = (
    ("mxu", "matmul", "memory", "launch"),
    ("estimate",),
    ("attention", "attention_backward"),
    ("link", "hop"),
    ("dcn", "dcn_hop", "host"),
)


@ft.cache
def _tables() -> dict[str, dict[str, Any]]:
    path = pathlib.Path(__file__).with_name("_coefficients.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))
