"""How long one operation computes: by the compiler's estimate, by its own FLOPs, or by a roofline.

XLA:TPU writes what it expects of an operation in cycles. A kernel that the compiler does not see into (Pallas, cuDNN)
and everything on a GPU are reckoned: FLOPs over the part of the peak that such kernels reach, bytes over the part of
the memory bandwidth, the longer of the two.
"""

import dataclasses

from .. import _hlo
from .._hardware import Hardware
from .._hlo import Module, Op
from ._coefficients import Coefficients

_DTYPES = {"bf16": "bfloat16", "f16": "bfloat16", "f32": "float32", "s8": "int8", "u8": "int8", "f64": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What is known of one operation, whatever the coefficients.

    Attributes:
        origin: `"cycles"`, `"kernel"` or `"roofline"`, as `OpTime.origin`.
        cycles: The compiler's; 0 without any.
        flops: One run.
        bytes: One run, through main memory.
        peak: FLOP/s for the dtype of its products; 0 if not known.
        kind: Of a kernel: `"attention"`, `"attention backward"` or another; `""` of anything else.
    """

    origin: str
    cycles: int
    flops: float
    bytes: float
    peak: float
    kind: str = ""


def cost(module: Module, op: Op, hardware: Hardware) -> Cost | None:
    """The cost of `op`; `None` if it takes no time."""
    if _hlo.is_free(op):
        return None
    work = _hlo.work_of(module.program, op)
    flops = _hlo.flops_of(module.program, op)
    dtype = work.dtype if work is not None else _dtype(module, op)
    cycles = _hlo.cycles(op)
    kind, origin = "", "roofline"
    if cycles is not None and hardware.chip.clock:
        origin = "cycles"
    elif work is not None and work.kind in ("attention", "kernel"):
        origin = "kernel"
        backward = "dkv" in op.name or "dq" in op.name or "ackward" in op.attributes
        kind = f"{work.kind} backward" if backward else work.kind
    return Cost(
        origin=origin,
        cycles=cycles or 0,
        flops=flops,
        bytes=_hlo.traffic(module.program, op),
        peak=hardware.peak_flops(_DTYPES.get(dtype, "float8" if dtype.startswith("f8") else "bfloat16")),
        kind=kind,
    )


def seconds(cost: Cost, hardware: Hardware, known: Coefficients) -> float:
    """One run."""
    if cost.origin == "cycles":
        estimate = cost.cycles / hardware.chip.clock
        products = cost.flops / (cost.peak * known.mxu) if cost.peak else 0.0
        return max(products, min(_streamed(cost, hardware, known), estimate), estimate * known.estimate)
    reached = {"attention": known.attention, "attention backward": known.attention_backward}.get(
        cost.kind, known.matmul
    )
    computed = cost.flops / (cost.peak * reached) if cost.peak else 0.0
    launched = known.launch if hardware.kind == "gpu" else 0.0
    return max(computed, _streamed(cost, hardware, known)) + launched


def _streamed(cost: Cost, hardware: Hardware, known: Coefficients) -> float:
    return cost.bytes / (hardware.hbm_bandwidth * known.memory) if hardware.hbm_bandwidth else 0.0


def _dtype(module: Module, op: Op) -> str:
    """Of the operands of the largest product inside."""
    best = (0.0, "bf16")
    for name in (*op.names("calls"), *op.names("to_apply")):
        computation = module.program.computations.get(name)
        for inner in computation.ops.values() if computation is not None else ():
            work = _hlo.work_of(module.program, inner)
            if work is not None:
                best = max(best, (work.flops, work.dtype))
    return best[1]
