"""Memory: a step that does not fit or nearly does not, and results that might have reused an argument's memory."""

from collections.abc import Iterator

from ._evidence import Evidence, are, at, counted
from ._finding import Finding
from ._memory import Held
from ._remedies import axis_to_split, fsdp, zero
from ._units import size_text


def over_limit(seen: Evidence) -> Iterator[Finding]:
    """A peak over the device's limit, or so near it that a longer sequence is over it."""
    memory = seen.memory
    limit = memory.limit if memory and memory.limit else seen.compiled.hardware.memory
    peak = max(memory.peak if memory else 0, seen.compiled.needed)
    if not limit or seen.compiled.hardware.kind == "cpu" or peak < _NEAR * limit:
        return
    held = sorted(memory.held if memory else (), key=lambda each: each.bytes, reverse=True)
    largest = next((each for each in held if each.kind not in ("code", "unattributed")), None)
    over = peak - limit
    said = f"{size_text(over)} more than the" if over > 0 else f"{peak / limit:.0%} of the"
    what = f" The largest thing is {_named(largest)}, {size_text(largest.bytes)}." if largest else ""
    yield Finding(
        kind="memory",
        severity="error" if over > 0 else "warning",
        reason=f"A device holds {size_text(peak)} at its fullest, {said} {size_text(limit)} that it has.{what}",
        place=at(largest.path, largest.source) if largest else "",
        remedy=_change_that_fits(seen, held, peak - int(_NEAR * limit)),
        bytes=max(over, 0),
    )


def not_donated(seen: Evidence) -> Iterator[Finding]:
    """State whose next value does not reuse its memory, so that both are held."""
    aliased = set(seen.aliases.values())
    updated = [seen.arguments[argument] for argument in seen.updated.values() if argument not in aliased]
    both = [each for each in updated if each.kind in _STATE or (each.kind == "other" and not seen.compiled.arguments)]
    wasted = sum(each.bytes for each in both)
    total = sum(each.bytes for each in seen.arguments.values())
    if not both or wasted < _WASTED * total:
        return
    largest = max(both, key=lambda each: each.bytes)
    limit = seen.compiled.hardware.memory
    yield Finding(
        kind="not-donated",
        severity="warning" if not limit or wasted >= _WASTED * limit else "note",
        reason=(
            f"{counted(len(both), 'argument')} of {size_text(wasted)} on each device {are(len(both))} updated and not "
            f"donated, so the old value and the new are held at once. The largest is {largest.path}, "
            f"{size_text(largest.bytes)}."
        ),
        place=largest.path,
        remedy=(
            "Donate the arguments that hold them, by position: jax.jit(step, donate_argnums=(0, 1)), or "
            "plan.jit(donate_argnums=(0, 1)), which donates modules by itself. The old arrays cannot be used after the "
            "call."
        ),
        bytes=wasted,
    )


_NEAR = 0.94  # of the limit: what XLA's own fragmentation has been seen to take
_WASTED = 0.05
_STATE = ("parameter", "optimizer", "model_state", "rng")


def _named(held: Held) -> str:
    kind = {"optimizer": "optimiser state", "activation": "what is saved for the backward pass"}.get(
        held.kind, held.kind
    )
    where = f" {held.path}" if held.path else ""
    return f"{kind}{where}{f' {held.shape}' if held.shape else ''}"


def _change_that_fits(seen: Evidence, held: list[Held], excess: int) -> str:
    """The smallest change that saves `excess` bytes, by what is held; the largest saving, where none does."""
    if seen.fits:
        return seen.fits
    by_kind: dict[str, int] = {}
    for each in held:
        by_kind[each.kind] = by_kind.get(each.kind, 0) + each.bytes
    choices = [each for each in _changes(seen, by_kind) if each[0] >= _WASTED * excess]
    fitting = next((each for each in choices if each[0] >= excess), None)
    if fitting is not None:
        return f"{fitting[1]} saves about {size_text(fitting[0])} and fits."
    if not choices:
        return "Use more devices, or split the batch: jp.value_and_grad(loss, accumulate=2)."
    best = {what: (size, text) for size, text, what in sorted(choices)}  # of each kind one: they save the same bytes
    together = " ".join(f"{text} saves about {size_text(size)}." for size, text in best.values())
    if sum(size for size, _ in best.values()) < excess:
        return f"{together} Such savings do not fit: use more devices as well."
    return f"{together} Together they fit."


def _changes(seen: Evidence, by_kind: dict[str, int]) -> Iterator[tuple[int, str, str]]:
    """What would save memory, how much of it, and of which kind; the least intrusive first."""
    whole = {kind: axis_to_split(seen, kind) for kind in ("optimizer", "parameter")}
    activations = by_kind.get("activation", 0)
    if axis := whole["optimizer"]:
        yield _less(by_kind.get("optimizer", 0), seen.sizes[axis]), zero(axis), "state"
    if activations:
        yield _less(activations, 2), "jp.value_and_grad(loss, accumulate=2)", "activation"
        yield _less(activations, 4), "jp.value_and_grad(loss, accumulate=4)", "activation"
        if seen.plan is None or not any(record.remat for record in seen.plan.parameters):
            remat = 'jp.FSDP(blocks="blocks.*", remat="full"), which recomputes each block,'
            yield _less(activations, 5), remat, "activation"
        yield _less(activations, 8), "jp.value_and_grad(loss, accumulate=8)", "activation"
    if axis := whole["parameter"]:
        state = sum(by_kind.get(kind, 0) for kind in ("parameter", "optimizer", "gradient"))
        yield _less(state, seen.sizes[axis]), fsdp(seen, axis), "state"


def _less(size: int, parts: int) -> int:
    return int(size * (1 - 1 / parts))
