"""What one device's memory holds at the moment it is fullest, by cause."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are held at the peak for one reason.

    Attributes:
        kind: `"parameter"`, `"gradient"`, `"optimizer"`, `"model_state"`, `"batch"`, `"activation"` (saved for the
            backward pass), `"temporary"`, `"code"` or `"unattributed"`.
        path: The leaf, or where in the model; `""` where nothing is known.
        bytes: On one device, as the compiler pads them.
        shape: Of the largest array among them, `"bf16[8,2048,4096]"`; `""` for several kinds.
        source: `file:line`, where known.
    """

    kind: str
    path: str
    bytes: int
    shape: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
        peak: The compiler's own figure where it gives one.
        limit: What a program may use; 0 if not known.
        argument: XLA's own figures, from here on; 0 where it gave none.
        output: Results, those that reuse an argument's memory included.
        temporary: Everything between.
        alias: Results that reuse an argument's memory.
        code: The program itself.
        host: Bytes in host memory.
        held: What the peak is made of: sums to `peak`, with a row `"unattributed"` for the difference, which may be
            negative.
        curve: `(position in the schedule, bytes)` of our own account, for a picture.
        origin: `"compiler"`, or `"estimate"` where it refused or was not asked.
    """

    peak: int
    limit: int
    argument: int
    output: int
    temporary: int
    alias: int
    code: int
    host: int
    held: tuple[Held, ...]
    curve: tuple[tuple[int, int], ...] = ()
    origin: str = "compiler"
