"""The collectives of a step as the rows of a report: what each moves, how long that takes, and who asked for it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One collective of the program; tensors that the compiler combined are one row.

    Attributes:
        kind: In the textbook's word: `"reduce-scatter"`.
        spelling: The compiler's: `"fusion all-reduce-scatter"`.
        axes: The mesh axes it crosses.
        bytes: Payload on one device each time, as `Collective.bytes` counts it.
        wire_bytes: What one device sends each time, by `algorithm`.
        algorithm: How it is taken to run: `"ring over 2 links"`, `"tree"`, `"all pairs"`.
        count: Times it runs a step; `None` if a loop does not say.
        depth: Loops around it.
        conditional: Whether it is in a branch.
        path: Where in the model: `blocks.mlp.up`, from the names that the program carries.
        source: `file:line` of the author's code.
        expected: The move of the plan that it is, in words; `""` if the plan expects none; `None` without a plan.
        seconds: Predicted, each time.
        exposed_seconds: Of all its runs together: how long the device waits for it with nothing to compute.
        name: The instruction.
    """

    kind: str
    spelling: str
    axes: tuple[str, ...]
    bytes: int
    wire_bytes: int
    algorithm: str
    count: int | None
    depth: int
    conditional: bool
    path: str
    source: str
    expected: str | None
    seconds: float
    exposed_seconds: float
    name: str
