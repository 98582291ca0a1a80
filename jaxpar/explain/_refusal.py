"""The largest allocations of a program that does not fit, where XLA:TPU's refusal lists them.

It does when it gives up after buffer assignment: `Used 41.74G of 16.00G hbm`, then numbered allocations with operator,
shape and padding. When it gives up earlier it says one line, with a figure and no list.
"""

import dataclasses
import re

from ._target import size_in_bytes


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
    """The allocations that a refusal lists, largest first as it does."""
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
                bytes=size_in_bytes(size.group(1)),
                shape=shape.group(1) if shape else "",
                op_name=name.group(1) if name else "",
                is_argument=kind is not None and "temp" not in kind.group(1).lower(),
            )
        )
    return tuple(found)


_ENTRY = re.compile(r"^\s*\d+\\?\. (?=Size: )", re.MULTILINE)
_SIZE = re.compile(r"Size: (\d+(?:\.\d+)?[KMGT]?)")
