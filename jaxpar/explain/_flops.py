"""Floating-point operations of a step, counted in its jaxpr with loops multiplied out."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one step over all devices; a multiply and an add are two.

    Attributes:
        model: What the mathematics needs: recomputation left out, causal attention in full.
        model_causal: The same with what a causal mask throws away left out.
        hardware: What the program computes, recomputation included.
        by_path: `(where in the model, hardware FLOPs)`, largest first; sums to `hardware`.
        by_dtype: `(dtype of the operands, hardware FLOPs)`.
        origin: `"jaxpr"`, or `"hlo"` where only a compiled program is known; then recomputation cannot be told apart
            and `model` is `hardware` less what is named as rematerialised.
    """

    model: float
    model_causal: float
    hardware: float
    by_path: tuple[tuple[str, float], ...]
    by_dtype: tuple[tuple[str, float], ...]
    origin: str = "jaxpr"
