"""What XLA:TPU says when a program does not fit: how much it needs, and where it says so the largest allocations.

Two forms. A line, `the total memory required for HLO temporaries (20.80G) exceeds available HBM (15.75G)`; or a table,
`Used 41.74G of 16.00G hbm`, then numbered allocations with their operator, shape and padding.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One allocation that a refusal lists.

    Attributes:
        bytes: With padding, as rounded as the refusal prints it.
        shape: `"s32[8388608,8,4]"`.
        op_name: Of the operation that makes it, `""` if not said.
        is_argument: Whether it is an argument of the program.
    """

    bytes: int
    shape: str
    op_name: str
    is_argument: bool


def allocations(refusal: str) -> tuple[Allocation, ...]:
    """The allocations that a refusal lists, largest first as it does; none for the short form."""
    found = []
    for entry in _ENTRY.split(refusal)[1:]:
        size = _SIZE.match(entry)
        if size is None:
            continue
        shape = re.search(r"^\s*Shape: (\w+\[[\d,]*\])", entry, re.MULTILINE)
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', entry)
        kind = re.search(r"^\s*Allocation type: (.*)$", entry, re.MULTILINE)
        found.append(
            Allocation(
                bytes=_bytes(size.group(1)),
                shape=shape.group(1) if shape else "",
                op_name=name.group(1) if name else "",
                is_argument=kind is not None and "temp" not in kind.group(1).lower(),
            )
        )
    return tuple(found)


def temporaries_needed(refusal: str) -> int:
    """Bytes that a refusal says temporaries alone need; 0 if it does not say that."""
    found = re.search(r"HLO temporaries \(([\d.]+[KMGT]?)i?B?\)", refusal)
    return _bytes(found.group(1)) if found else 0


_ENTRY = re.compile(r"^\s*\d+\\?\. (?=Size: )", re.MULTILINE)
_SIZE = re.compile(r"Size: ([\d.]+[KMGT]?)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(written: str) -> int:
    unit = _UNITS.get(written[-1:], 1)
    try:
        return round(float(written.rstrip("KMGT")) * unit)
    except ValueError:
        return 0
