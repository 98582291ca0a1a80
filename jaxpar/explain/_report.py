"""The report of `jp.explain`: plain data that prints, draws, goes to JSON and back, and compares."""

import dataclasses

from ._collectives import Row
from ._findings import Finding
from ._flops import Flops
from ._memory import Memory
from ._timeline import Timeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a step costs.

    Attributes:
        name: Of the step or recipe.
        hardware: In words, one line.
        target: The hardware's canonical name, `"v5p:4x4x4"`.
        axes: Size of each mesh axis, outermost first.
        num_devices: Of the mesh.
        compiler: Name and version; `""` for a report that no compiler has seen.
        options: Compiler options that are not the defaults.
        origin: `"compiled"`, `"refused"` (the program does not fit: memory and time are estimates) or `"estimate"`.
        strategies: As text; empty without a plan.
        num_tokens: Tokens (rows, without a sequence) of a step's global batch; 0 if not known.
        peak_flops: Of one device, per second, in the dtype that most FLOPs are in; 0 if not known.
        memory: `None` where nothing is known of it.
        flops: Likewise.
        timeline: Likewise: no speed is claimed for a CPU.
        collectives: In the order of the program.
        findings: Worst first.
        unread: What could not be read of the program.
        notes: What a reader should know.
        compile_seconds: 0 from the cache.
    """

    name: str
    hardware: str
    target: str
    axes: dict[str, int]
    num_devices: int
    compiler: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "compiled"
    strategies: tuple[str, ...] = ()
    num_tokens: int = 0
    peak_flops: float = 0.0
    memory: Memory | None = None
    flops: Flops | None = None
    timeline: Timeline | None = None
    collectives: tuple[Row, ...] = ()
    findings: tuple[Finding, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compile_seconds: float = 0.0
