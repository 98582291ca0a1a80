"""A compiled program and what is known of it, as plain data: all that an explanation starts from.

It comes from a compiler in a child process, from a `jax.stages.Compiled` of this process, or from a file of HLO text;
then most of it is not known, and says so by being empty.
"""

import dataclasses

from .._hardware import Hardware
from .._hlo import MeshAxes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """One array that a program takes.

    Attributes:
        path: Where it lives: a plan path (`blocks.each.up.kernel`), or the argument's own (`batch.tokens`).
        kind: `"parameter"`, `"frozen"`, `"optimizer"`, `"model_state"`, `"rng"`, `"batch"` or `"other"`.
        shape: Global.
        dtype: As numpy calls it.
        bytes: On one device, without padding.
        donated: Whether the program may reuse its memory.
        axes: The mesh axes that split it; `None` if not known.
        weak: Whether its dtype is weak, as a Python number's is: another call may bring a strong one.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    donated: bool = False
    axes: tuple[str, ...] | None = None
    weak: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """What XLA's own memory analysis says of one device, in bytes."""

    argument: int
    output: int
    temporary: int
    alias: int
    code: int
    peak: int
    host_argument: int = 0
    host_output: int = 0
    host_temporary: int = 0
    host_alias: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program.

    Attributes:
        name: Of the step.
        text: Scheduled, optimised HLO text; empty if the compiler refused.
        hardware: What it was compiled for.
        axes: The mesh.
        compiler: Name and version, `"XLA:TPU, jax 0.10.2, libtpu 0.0.42"`; `""` for text that something else compiled.
        options: Compiler options that are not the defaults.
        memory: XLA's own figures; `None` where it gave none.
        arguments: In the order of the program's parameters; empty if not known.
        num_tokens: Tokens, or rows if there is no sequence, of one step's global batch; 0 if not known.
        refusal: What the compiler said when it refused: that the program does not fit, and by how much.
        needed: Bytes a device would need, as the refusal says; 0 if it did not refuse.
        seconds: That compilation took; 0 from the cache.
        log: Lines that the compiler wrote while it ran.
    """

    name: str
    text: str
    hardware: Hardware
    axes: MeshAxes
    compiler: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    memory: MemoryStats | None = None
    arguments: tuple[Argument, ...] = ()
    num_tokens: int = 0
    refusal: str = ""
    needed: int = 0
    seconds: float = 0.0
    log: tuple[str, ...] = ()
