"""Collectives in branches that not every device takes."""

from collections.abc import Iterator

from ._evidence import Evidence, a, named, shape_of, walk
from ._finding import Finding
from ._varying import bits_of


def collectives_in_branches(seen: Evidence) -> Iterator[Finding]:
    """Collectives that some devices may never reach: the others then wait for ever."""
    branches = _branch_bits(seen)
    done: set[tuple[str, str]] = set()
    for transfer in seen.transfers:
        first = transfer.first
        if not first.conditional:
            continue
        bits = branches.get(transfer.op.computation, 0)
        is_permute = first.kind == "collective-permute"
        blocking = bits if is_permute else bits & bits_of(seen.mesh, [axis.partition("[")[0] for axis in first.axes])
        kind = "permute-in-branch" if is_permute else "collective-in-branch"
        if not blocking or (kind, first.source or first.name) in done:
            continue
        done.add((kind, first.source or first.name))
        differs = named(seen.varying.axes(blocking))
        why = (
            "A permute joins every device of the mesh, also where it moves nothing"
            if is_permute
            else f"Its groups run along {named(first.axes)}"
        )
        yield Finding(
            kind=kind,
            severity="error",
            reason=(
                f"{a(first.kind).capitalize()} over {named(first.axes)} ({shape_of(transfer)}) is in a branch that "
                f"some devices along {differs} take and others do not. {why}, so the ones that do not are waited for "
                "without end."
            ),
            place=seen.place(transfer),
            remedy=(
                "Take it out of the branch: compute under jax.lax.cond and call jax.lax.ppermute after it, on every "
                "device. If the partitioner made it (a reshard, or a windowed einsum on TPU), give both branches the "
                'same shardings, or set compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}.'
                if is_permute
                else "Take it out of the branch: compute under jax.lax.cond, and reduce or gather after it, on every "
                "device; or make the condition the same on all of them, jax.lax.pmax(condition, axis)."
            ),
        )


def _branch_bits(seen: Evidence) -> dict[str, int]:
    """By computation, the bits of all conditions that decide whether it runs."""
    found: dict[str, int] = {}
    for visit in walk(seen.module.program):
        bits = 0
        for caller in visit.callers:
            if caller.opcode == "conditional":
                bits |= seen.varying.operand_bits(caller, 0)
        found[visit.op.computation] = found.get(visit.op.computation, 0) | bits
    return found
