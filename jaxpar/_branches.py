"""Collectives in branches that only some devices take: those devices wait without end for the others.

A sum or a gather runs in groups, and is stuck only if a group is of two minds; a permute joins every device of the
mesh, also where it moves nothing. Nobody need have written it: a reshard in a branch becomes a permute, and XLA:TPU
makes permutes of a product whose matrix it gathers, from some size on (a windowed einsum). So it is the compiled
program that is asked.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from . import _hlo
from ._errors import StepError, listed
from ._hlo import Collective, MeshAxes, Module
from ._hlo._module import _walk as walk
from ._hlo._varying import Varying, argument_bits, bits_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stuck:
    """A collective that some devices never reach.

    Attributes:
        collective: What; of tensors that the compiler combined, the largest.
        axes: Along which some devices take its branch and others do not.
    """

    collective: Collective
    axes: tuple[str, ...]

    @property
    def is_permute(self) -> bool:
        """Whether it joins all devices."""
        return self.collective.kind == "collective-permute"

    @property
    def reason(self) -> str:
        """What is wrong."""
        each = self.collective
        article = "An" if each.kind[0] in "aeiou" else "A"
        shape = f"{each.dtype}[{','.join(map(str, each.shape))}]"
        why = (
            "A permute joins every device of the mesh, also where it moves nothing"
            if self.is_permute
            else f"Its groups run along {_named(each.axes)}"
        )
        return (
            f"{article} {each.kind} over {_named(each.axes)} ({shape}) is in a branch that some devices along "
            f"{_named(self.axes)} take and others do not. {why}, so the ones that do not are waited for without end."
        )

    @property
    def remedy(self) -> str:
        """The way out."""
        if self.is_permute:
            return (
                "Take it out of the branch: compute under jax.lax.cond and call jax.lax.ppermute after it, on every "
                "device. If the compiler made it, of a reshard, or on TPU of a gathered product (a windowed einsum) or "
                "a reduce-scatter, give both branches the same shardings, set "
                'compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}, or leave the rows of '
                "activations whole there, TP(sequence=False)."
            )
        return (
            "Take it out of the branch: compute under jax.lax.cond, and reduce or gather after it, on every device; "
            "or make the condition the same on all of them, jax.lax.pmax(condition, axis)."
        )


def stuck(module: Module, mesh: MeshAxes, varying: Varying | None = None) -> Iterator[Stuck]:
    """Every collective of a program that some devices may never reach, in its order; one for each line that made some.

    Args:
        module: The program, read.
        mesh: Its axes.
        varying: Over which axes its values differ; by what its own text says of its arguments, if not given.
    """
    found: dict[tuple[str, str], list[Collective]] = {}
    for each in module.collectives(mesh):
        found.setdefault((each.computation, each.name), []).append(each)
    if not any(tensors[0].conditional for tensors in found.values()):
        return
    if varying is None:
        varying = _varying(module, mesh, {name: tensors[0].axes for (_, name), tensors in found.items()})
    branches = _branch_bits(module, varying)
    done: set[tuple[bool, str]] = set()
    for (computation, name), tensors in found.items():
        first = max(tensors, key=lambda each: each.bytes)
        bits = branches.get(computation, 0) if first.conditional else 0
        is_permute = first.kind == "collective-permute"
        along = [axis.partition("[")[0] for axis in first.axes]
        blocking = bits if is_permute else bits & bits_of(mesh, along)
        if blocking and (is_permute, first.source or name) not in done:
            done.add((is_permute, first.source or name))
            yield Stuck(collective=first, axes=varying.axes(blocking))


def refuse_stuck(name: str, compiled: Any, mesh: Any) -> None:
    """Refuse a compiled program in which devices would wait for one another for ever.

    Args:
        name: What it is, for the message.
        compiled: What `jax.jit(...).lower(...).compile()` gave.
        mesh: That it was compiled for.

    Raises:
        StepError: All such collectives, with the line that made each, and the way out.
    """
    found = list(stuck(_hlo.read(compiled.as_text() or ""), _hlo.mesh_axes(mesh)))
    if not found:
        return
    lines = [f"{each.collective.source or each.collective.op_name}: {each.reason}" for each in found]
    remedies = dict.fromkeys(each.remedy for each in found)
    raise StepError("\n".join([f"{name}: it would never end.", listed(lines), *remedies]))


def _varying(module: Module, mesh: MeshAxes, crossed: dict[str, tuple[str, ...]]) -> Varying:
    program = module.program
    entry = program.computations[program.entry].ops.values() if program.entry in program.computations else ()
    arguments = {
        int(op.inside): bits
        for op in entry
        if op.opcode == "parameter" and op.inside.strip().isdigit()
        if (bits := argument_bits(op, mesh)) is not None
    }
    return Varying(program, mesh, arguments, crossed)


def _branch_bits(module: Module, varying: Varying) -> dict[str, int]:
    """By computation, the bits of all conditions that decide whether it runs."""
    found: dict[str, int] = {}
    for visit in walk(module.program):
        bits = 0
        for caller in visit.callers:
            if caller.opcode == "conditional":
                bits |= varying.operand_bits(caller, 0)
        found[visit.op.computation] = found.get(visit.op.computation, 0) | bits
    return found


def _named(axes: tuple[str, ...]) -> str:
    return " and ".join(f"'{axis}'" for axis in axes)
