"""The collectives of a step as the rows of a report: what each moves, how long that takes, and who asked for it."""

import dataclasses

from .._hlo import Collective, Module
from .._plan import Plan
from ._compiled import Compiled
from ._expected import Match, expected
from ._paths import Paths
from ._timeline import Timeline, mesh_of


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


def rows(module: Module, compiled: Compiled, timeline: Timeline | None, plan: Plan | None = None) -> tuple[Row, ...]:
    """The collectives of `compiled`, read as `module`, in the order of the program.

    With its `plan` each says whether the plan expects it. Without a timeline there are no seconds, and what each device
    sends is not known: both are 0.
    """
    found: dict[tuple[str, str], list[Collective]] = {}
    collectives = module.collectives(mesh_of(module, compiled))
    for collective in collectives:
        found.setdefault((collective.computation, collective.name), []).append(collective)
    known = [each.path for each in compiled.arguments if each.kind in ("parameter", "frozen")]
    paths = Paths(known)
    moves = {} if plan is None else expected(collectives, plan, num_tokens=compiled.num_tokens)
    return tuple(_row(place, tensors, timeline, paths, moves.get(place)) for place, tensors in found.items())


def _row(
    place: tuple[str, str], tensors: list[Collective], timeline: Timeline | None, paths: Paths, move: Match | None
) -> Row:
    leading = max(tensors, key=lambda each: each.bytes)
    path = paths.of(leading.op_name).path
    if not path and move is not None and len(move.paths) == 1:
        path = move.paths[0]  # the one leaf of that size, where the name tells of none
    seconds, wire_bytes, algorithm = (0.0, 0, "") if timeline is None else timeline.transfers.get(place, (0.0, 0, ""))
    return Row(
        kind=leading.kind,
        spelling=leading.spelling,
        axes=leading.axes,
        bytes=sum(each.bytes for each in tensors),
        wire_bytes=wire_bytes,
        algorithm=algorithm,
        count=leading.count,
        depth=leading.depth,
        conditional=leading.conditional,
        path=path,
        source=leading.source,
        expected=None if move is None else move.words,
        seconds=seconds,
        exposed_seconds=0.0 if timeline is None else timeline.exposed.get(place, 0.0),
        name=leading.name,
    )
