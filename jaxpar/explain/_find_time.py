"""Where a predicted step loses time: exposed communication, collectives too small to pay, windows too narrow."""

import math
from collections.abc import Iterator

import numpy as np

from .._hlo._text import Op
from ._coefficients import coefficients
from ._evidence import SLIGHT, Evidence, Transfer, counted, named, severity, walk
from ._finding import Finding
from ._units import seconds_text, size_text
from ._wire import fabric


def exposed(seen: Evidence) -> Iterator[Finding]:
    """Communication that nothing hides, by the axes it crosses."""
    timeline = seen.timeline
    if timeline is None or not timeline.step_seconds:
        return
    waits: dict[tuple[str, ...], list[tuple[float, Transfer]]] = {}
    for transfer in seen.transfers:
        seconds = (
            transfer.row.exposed_seconds
            if transfer.row is not None
            else timeline.exposed.get((transfer.op.computation, transfer.op.name), 0.0)
        )
        if seconds:
            waits.setdefault(transfer.first.axes, []).append((seconds, transfer))
    for axes, found in waits.items():
        seconds = sum(each for each, _ in found)
        share = seconds / timeline.step_seconds
        if share < _EXPOSED_NOTE:
            continue
        longest, worst = max(found, key=lambda each: each[0])
        yield Finding(
            kind="exposed-communication",
            severity="warning" if share >= _EXPOSED_WARNING else "note",
            reason=(
                f"For {seconds_text(seconds)} of a step of {seconds_text(timeline.step_seconds)}, {share:.0%}, devices "
                f"wait for {named(axes)}; {seconds_text(longest)} of that for the {worst.first.kind} that runs "
                f"{counted(worst.count, 'time')} with {size_text(worst.bytes)}."
            ),
            place=seen.place(worst),
            remedy=_hide(seen, axes, worst),
            seconds=seconds,
        )


def small_collectives(seen: Evidence) -> Iterator[Finding]:
    """Many collectives so small that each costs its start and little else."""
    step = seen.timeline.step_seconds if seen.timeline else 0.0
    groups: dict[tuple[str, tuple[str, ...], str], list[Transfer]] = {}
    for transfer in seen.transfers:
        if transfer.bytes <= _SMALL:
            key = (transfer.first.kind, transfer.first.axes, transfer.op.computation)
            groups.setdefault(key, []).append(transfer)
    for (kind, axes, _), found in groups.items():
        rounds, seconds = sum(each.count for each in found), sum(map(seen.seconds, found))
        if rounds < _MANY or not step or seconds / step < SLIGHT:
            continue  # without a prediction nothing says that they cost anything
        in_loop = found[0].first.depth > 0 and len(found) < _MANY
        yield Finding(
            kind="small-collectives",
            severity=severity(seconds / step),
            reason=(
                f"{counted(len(found), kind)} over {named(axes)} of "
                f"{size_text(sum(each.total_bytes for each in found) / rounds)} on average run {rounds} times a step: "
                f"{seconds_text(seconds)}, {seconds / step:.1%} of the step, nearly all of it the time to start one."
            ),
            place=seen.place(max(found, key=seen.seconds)),
            remedy=(
                "Do it once for all rounds of the loop, before or after it, or fewer rounds with more in each."
                if in_loop
                else "Combine them: move one concatenated array (jax.flatten_util.ravel_pytree(tree)); on GPU the "
                'compiler does, compiler_options={"xla_gpu_all_reduce_combine_threshold_bytes": "134217728"}.'
            ),
            seconds=seconds,
        )


def windowed_einsums(seen: Evidence) -> Iterator[Finding]:
    """Collective matmuls (XLA:TPU) that take longer in windows than the plain product after a plain gather would.

    The comparison is kind to the windows: the plain form hides nothing of its gather, and its product is no better than
    the worst of large ones.
    """
    timeline, peak = seen.timeline, seen.compiled.hardware.peak_flops()
    loops = _windowed(seen)
    if timeline is None or not peak or not loops:
        return
    spent = plain = longest = 0.0
    worst: Transfer | None = None
    for ops in loops.values():
        inside = {(op.computation, op.name) for op in ops}
        computed = [each for each in timeline.ops if (each.computation, each.name) in inside and each.origin != "link"]
        own, flops = (sum(getattr(each, what) * each.count for each in computed) for what in ("seconds", "flops"))
        moved = [each for each in seen.transfers if (each.op.computation, each.op.name) in inside]
        if not moved or not flops:
            continue
        waited = sum(timeline.exposed.get((each.op.computation, each.op.name), 0.0) for each in moved)
        spent += own + waited
        plain += flops / peak / _PLAIN + _gather_seconds(seen, moved)
        if own + waited > longest:
            longest, worst = own + waited, moved[0]
    if worst is None or spent <= plain:
        return
    share = (spent - plain) / timeline.step_seconds if timeline.step_seconds else 1.0
    yield Finding(
        kind="windowed-einsum",
        severity=severity(share),
        reason=(
            f"The compiler cut {counted(len(loops), 'matmul')} into windows, to overlap them with permutes over "
            f"{named(worst.first.axes)}. With what they wait for they take {seconds_text(spent)} a step, "
            f"{spent / plain:.1f} times as long as in one piece after a gather that nothing hides "
            f"({seconds_text(plain)}): at this shape the windows are too narrow."
        ),
        place=seen.place(worst),
        remedy=_no_windows(seen),
        seconds=spent - plain,
    )


_EXPOSED_NOTE, _EXPOSED_WARNING = 0.1, 0.25
_SMALL = 64 * 2**10  # below it a collective's time is that of its start, on every interconnect that we know
_MANY = 16
_NARROW = ("bf16", "f16")
_BFLOAT16 = 'jp.plan(..., precision=jp.Precision(compute="bfloat16"))'
_PLAIN = 0.75  # of the peak: what XLA:TPU's own cycles say of large matmuls is 0.75 to 0.95


def _hide(seen: Evidence, axes: tuple[str, ...], worst: Transfer) -> str:
    """What to change, by what it is that is exposed."""
    size = math.prod(seen.sizes.get(axis.partition("[")[0], 1) for axis in axes)
    first = worst.first
    fewer = f"a smaller axis than {named(axes)} = {size}"
    if "windowed_dot_general" in worst.op.computation:
        return _no_windows(seen)
    if "pipe" in axes:
        return (
            "Use more microbatches, jp.PP(microbatches=...), so that a permute hides behind the computation of others."
        )
    if first.kind == "all-reduce" and first.depth == 0:
        return (
            'Reduce in bfloat16, jp.DP(reduce_dtype="bfloat16"), or less often, jp.value_and_grad(loss, accumulate=k) '
            f"with k times the batch; or {fewer}."
        )
    if (
        first.kind in ("all-gather", "reduce-scatter") and worst.op.name in seen.pieces
    ) or first.kind == "reduce-scatter":
        narrower = "" if first.dtype in _NARROW else "; or move weights and gradients in bfloat16, " + _BFLOAT16
        return (
            "More tokens a device, so that a layer computes longer than its weights travel (a larger batch, or fewer "
            f"devices on {named(axes)} and the rest on another axis){narrower}."
        )
    if first.kind == "all-reduce":
        return (
            f"Use {fewer}, with the devices on an axis that moves less; jp.TP(sequence=True) halves what an all-reduce "
            "of activations exposes."
        )
    return f"Look for another finding at this place that tells how to avoid it; else use {fewer}."


def _no_windows(seen: Evidence) -> str:
    return (
        "Have matmuls in one piece: plan.jit(compiler_options=jp.compiler_options("
        f'"{seen.compiled.hardware.chip.name}", "no-windowed-einsum")), the same in a Recipe; in plain JAX '
        'jax.jit(compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}).'
    )


def _gather_seconds(seen: Evidence, moved: list[Transfer]) -> float:
    """How long one all-gather would take of what these permutes bring round, nothing else on its links."""
    mesh, hardware = seen.mesh, seen.compiled.hardware
    along = [place for place, name in enumerate(mesh.names) if name in moved[0].first.axes]
    positions = np.moveaxis(np.arange(mesh.size).reshape(mesh.sizes), along, range(-len(along), 0))
    groups = positions.reshape(-1, math.prod(mesh.sizes[place] for place in along))
    total = sum(each.total_bytes for each in moved)
    return fabric(hardware, mesh).transfer("all-gather", total, groups, coefficients()).seconds


def _windowed(seen: Evidence) -> dict[str, list[Op]]:
    """The operations of each loop that is a matmul in windows."""
    found: dict[str, dict[str, Op]] = {}
    for visit in walk(seen.module.program):
        for caller in visit.callers:
            if caller.opcode == "while" and any("windowed_dot_general" in name for name in caller.names("body")):
                found.setdefault(caller.name, {})[visit.op.name] = visit.op
    return {name: list(ops.values()) for name, ops in found.items()}
