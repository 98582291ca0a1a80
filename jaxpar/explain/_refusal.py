"""What XLA:TPU says when a program does not fit: the largest allocations, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One allocation that a refusal lists."""

    bytes: int
    shape: str
    op_name: str
    is_argument: bool


def allocations(refusal: str) -> tuple[Allocation, ...]:
    return ()
