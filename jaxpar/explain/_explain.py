"""`jp.explain`: compile a step, here or for hardware that is elsewhere, and put together what is known of it.

Each part of a report is made by itself: where one cannot be made, the report says so under `unread`, and has the rest.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from .. import _hardware, _hlo, _mesh
from .._errors import StepError
from .._hlo import MeshAxes
from .._types import AnyMesh
from . import _collectives, _export, _findings, _flops, _memory, _target, _timeline
from ._child import compile_elsewhere
from ._compiled import Compiled
from ._compiler import compiler, memory_stats
from ._flops import Flops
from ._memory import Held, Memory
from ._report import Report
from ._subject import Subject, subject

T = TypeVar("T")


def explain(
    step: Any,
    *args: Any,
    on: AnyMesh | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Report:
    """What a step costs: memory, every collective with its source line, FLOPs, a timeline; and what is wrong with it.

    Compiles the step and runs nothing. For hardware that is not here, the real compiler runs in another process, which
    an interrupt ends at once; its programs are kept, so that the same step is compiled once.

    Args:
        step: Any function, jitted or not, with its arguments; a step of `plan.jit`; a program; or a recipe.
        args: The arguments: arrays, modules, `jax.ShapeDtypeStruct`s, or a mixture. None for a recipe or program.
        on: The mesh to explain it on, of hardware that is here or not: `jp.mesh("v5p-128", fsdp=32, tensor=2)`. A plan
            is made again for it; other arrays keep the axes in their specs. By default the mesh that the step has.
        compiler_options: XLA options to compile with, in place of the step's own; see `jp.compiler_options`.
        cache: Where compiled programs are kept; by default in the user's cache directory.
        kwargs: Arguments by keyword.

    Raises:
        StepError: The step does not compile; or its compiler is not installed here and there is no recipe to estimate
            from. One that does not fit into memory is a report.
        MeshError: A recipe without a mesh.

    Example:
        >>> mesh = jp.mesh(data=-1)
        >>> x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P("data")))
        >>> report = jp.explain(lambda x: (x @ x.T).sum(), x)
        >>> report.axes, [row.kind for row in report.collectives]
        ({'data': 8}, ['all-gather', 'all-reduce'])
    """
    made = _with_options(subject(step, args, kwargs, on), compiler_options)
    flops, faults = _part("FLOPs", lambda: _count(made))
    if made.mesh is None or isinstance(made.mesh, Mesh):
        return _assembled(_compiled_here(made), made, flops, faults)
    lacking = _target.missing(_mesh.hardware_of(made.mesh))
    if lacking:
        return _estimated(made, lacking)
    return _assembled(compile_elsewhere(_export.export(made), cache), made, flops, faults)


def export(
    step: Any,
    *args: Any,
    to: str | os.PathLike[str],
    on: AnyMesh | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> pathlib.Path:
    """Write a step, lowered for the hardware of its mesh, to a file that `jaxpar explain FILE` compiles elsewhere.

    For machines that have no compiler for TPUs or GPUs: the file is explained on Linux, by the same version of JAX.

    Args:
        step: As for `explain`.
        args: Likewise.
        to: The file.
        on: As for `explain`.
        compiler_options: Likewise.
        kwargs: Likewise.

    Returns:
        The path.

    Raises:
        StepError: The step cannot be lowered without devices, or has no mesh.
    """
    made = _with_options(subject(step, args, kwargs, on), compiler_options)
    if made.mesh is None:
        raise StepError(f'export: {made.name} has no mesh. Say which: on=jp.mesh("v5e-256", fsdp=-1).')
    flops, _ = _part("FLOPs", lambda: _count(made))
    exported = _export.export(made)
    _export.write(dataclasses.replace(exported, flops={} if flops is None else dataclasses.asdict(flops)), to)
    return pathlib.Path(to)


def explain_file(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Report:
    """Explain a step that `export` wrote.

    Args:
        path: The file.
        cache: As for `explain`.

    Raises:
        StepError: It is no such file, or the compiler for its hardware is not installed here.
    """
    exported = _export.read(path)
    compiled = compile_elsewhere(exported, cache)
    said = exported.flops
    pairs = {name: tuple(map(tuple, said[name])) for name in ("by_path", "by_dtype") if name in said}
    flops = Flops(**{**said, **pairs, "notes": tuple(said.get("notes", ()))}) if said else None
    return assemble(compiled, flops=flops, strategies=exported.strategies, notes=exported.notes)


def explain_text(text: str, mesh: AnyMesh | str, *, name: str = "") -> Report:
    """Explain scheduled HLO text that something else compiled (`compiled.as_text()`, or an XLA dump).

    Args:
        text: The text. What cannot be read of it is listed in the report.
        mesh: The mesh it was compiled for; or the name of the hardware alone (`"v5e:16x16"`): then its axes are those
            that the text names, or that its collectives run over (`slice`, `x`, `y`, ...).
        name: What to call it; by default what the text calls it.

    Raises:
        MeshError: The hardware is not known.

    Example:
        >>> report = explain_text("HloModule empty", "v5e:2x2")
        >>> report.num_devices, report.collectives
        (4, ())
    """
    if isinstance(mesh, str):
        hardware = _hardware.parse(mesh)
        each = hardware.num_devices // hardware.num_slices
        slices = tuple(index // each for index in range(hardware.num_devices)) if hardware.num_slices > 1 else ()
        axes = MeshAxes(names=(_timeline.UNNAMED,), sizes=(hardware.num_devices,), slices=slices)
    else:
        hardware, axes = _mesh.hardware_of(mesh), mesh_axes(mesh)
    said = text.partition("HloModule ")[2][:200].partition(",")[0].split()
    found = name or (said[0] if said else "program")
    return assemble(Compiled(name=found, text=text, hardware=hardware, axes=axes))


def assemble(
    compiled: Compiled,
    *,
    flops: Flops | None = None,
    plan: Any = None,
    step: Any = None,
    strategies: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
) -> Report:
    """The report of a compiled program; of each part that cannot be made, why.

    Args:
        compiled: The program.
        flops: Counted in its jaxpr; else they are counted in the HLO.
        plan: That of the step.
        step: What `plan.jit` made, if that is what is explained.
        strategies: Of the plan, as text.
        notes: What a reader should know.
        unread: What could not be made before.
    """
    faults = [*unread]

    def part(what: str, make: Callable[[], T]) -> T | None:
        made, said = _part(what, make)
        faults.extend(said)
        return made

    read = part("HLO text", lambda: _hlo.read(compiled.text))
    module = _hlo.read("") if read is None else read
    faults.extend(() if read is None else read.unread)
    if not module.program.computations and not compiled.refusal:
        faults.append("the text holds no computation that can be read: is it optimised HLO, whole?")
    compiled = dataclasses.replace(compiled, axes=_timeline.mesh_of(module, compiled))
    if flops is None:
        flops = part("FLOPs", lambda: _flops.from_hlo(module, compiled))
    timeline = part("timeline", lambda: _timeline.predict(module, compiled))
    held = part("memory", lambda: _memory.memory(module, compiled))
    table = part("collectives", lambda: _collectives.rows(module, compiled, timeline, plan)) or ()

    def find() -> tuple[_findings.Finding, ...]:
        return _findings.find(module, compiled, rows=table, timeline=timeline, memory=held, plan=plan, step=step)

    findings = part("findings", find) or ()
    hardware = compiled.hardware
    return Report(
        name=compiled.name,
        hardware=hardware.describe(),
        target=hardware.spec,
        axes=dict(zip(compiled.axes.names, compiled.axes.sizes, strict=True)),
        num_devices=compiled.axes.size,
        compiler=compiled.compiler,
        options=compiled.options,
        origin="compiled",
        strategies=strategies,
        num_tokens=compiled.num_tokens,
        peak_flops=_peak_flops(compiled, flops),
        memory=held,
        flops=flops,
        timeline=timeline,
        collectives=table,
        findings=findings,
        unread=tuple(dict.fromkeys(faults)),
        notes=notes,
        compile_seconds=compiled.seconds,
    )


def mesh_axes(mesh: AnyMesh) -> MeshAxes:
    """The axes of a mesh as HLO text needs them; of one whose hardware is elsewhere, too."""
    found = _hlo.mesh_axes(mesh)
    factors = _mesh.dcn_factors(mesh) if isinstance(mesh, AbstractMesh) else {}
    if not factors:
        return found
    import numpy as np

    slices = np.zeros((), int)  # slices are the outer part of each axis that crosses them
    for axis, size in zip(found.names, found.sizes, strict=True):
        factor = factors.get(axis, 1)
        slices = slices[..., None] * factor + np.arange(size) // (size // factor)
    return dataclasses.replace(found, slices=tuple(int(each) for each in slices.ravel()))


def _with_options(made: Subject, options: Mapping[str, Any] | None) -> Subject:
    return made if options is None else dataclasses.replace(made, options=dict(options))


def _count(made: Subject) -> Flops:
    return _flops.count(made.function.trace(*made.shapes).jaxpr, plan=made.plan)


def _compiled_here(made: Subject) -> Compiled:
    """Compile for devices that this process has."""
    import time

    start = time.perf_counter()
    lowered = made.function.lower(*(_bare(shape) for shape in made.shapes))
    compiled = lowered.compile(compiler_options=made.options or None)
    if made.mesh is None:
        hardware = _hardware.of_devices(jax.devices()[:1])
        axes = MeshAxes(names=(), sizes=())
    else:
        hardware, axes = _mesh.hardware_of(made.mesh), mesh_axes(made.mesh)
    kept = _kept(compiled, len(made.shapes))
    return Compiled(
        name=made.name,
        text=compiled.as_text() or "",
        hardware=hardware,
        axes=axes,
        compiler=compiler(hardware.platform),
        options={name: str(value) for name, value in made.options.items()},
        memory=memory_stats(compiled.memory_analysis()),
        arguments=tuple(made.arguments[index] for index in kept),
        num_tokens=made.num_tokens,
        seconds=time.perf_counter() - start,
    )


def _bare(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Without its sharding: the function has it."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, weak_type=shape.weak_type)


def _kept(compiled: Any, number: int) -> list[int]:
    """Which arguments the program takes: JAX drops those that it does not use, and tells in no public place."""
    kept = getattr(getattr(compiled, "_executable", None), "_kept_var_idx", None)
    return list(range(number)) if kept is None else sorted(kept)


def _assembled(compiled: Compiled, made: Subject, flops: Flops | None, faults: tuple[str, ...]) -> Report:
    strategies = () if made.plan is None else made.plan.strategies
    report = assemble(
        compiled, flops=flops, plan=made.plan, step=made.step, strategies=strategies, notes=made.notes, unread=faults
    )
    return _refused(report, compiled, made.program) if compiled.refusal else report


def _refused(report: Report, compiled: Compiled, program: Any) -> Report:
    """The program does not fit: what the compiler said of it, and the account of the plan in place of its own."""
    gib = compiled.needed / 2**30
    said = (
        f"{compiled.compiler} makes no program of this step for {compiled.hardware.name}: a device would need "
        f"{gib:.2f} GiB, and has {compiled.hardware.memory / 2**30:.2f} GiB."
    )
    report = dataclasses.replace(report, origin="refused", notes=(said, *report.notes))
    if program is None:
        return report
    found, faults = _part("estimate", lambda: _estimate(program))
    if found is None:
        return dataclasses.replace(report, unread=(*report.unread, *faults))
    memory = _reconciled(found.memory, compiled.needed)
    findings = _findings.find(_hlo.read(""), compiled, memory=memory, plan=program.plan)
    return dataclasses.replace(
        report, memory=memory, timeline=found.timeline, findings=findings, unread=(*report.unread, *faults)
    )


def _reconciled(memory: Memory | None, needed: int) -> Memory | None:
    """The account of a plan, brought to the one figure that the compiler gave."""
    if memory is None:
        return None
    rest = needed - sum(each.bytes for each in memory.held)
    held = (*memory.held, Held(kind="unattributed", path="", bytes=rest)) if rest else memory.held
    return dataclasses.replace(memory, peak=needed, held=held)


def _estimated(made: Subject, lacking: str) -> Report:
    """The analytic estimate, where there is no compiler."""
    assert made.mesh is not None, "only hardware that is not here can lack its compiler"
    name = _mesh.hardware_of(made.mesh).name
    if made.program is None:
        raise StepError(
            f"{made.name} on {name}: {lacking}. Or write it here, jaxpar export MODULE:NAME --mesh ... -o FILE, and "
            "explain the file where that compiler is; or give a jp.Recipe, which can be estimated without one."
        )
    said = f"An estimate from the plan, no compiler has seen the step: {lacking}."
    found = _estimate(made.program)
    return dataclasses.replace(found, notes=(said, *found.notes))


def _estimate(program: Any) -> Report:
    from ._estimate import estimate

    return estimate(program)


def _peak_flops(compiled: Compiled, flops: Flops | None) -> float:
    """Of one device, in the dtype of most of the work."""
    dtype = flops.by_dtype and max(flops.by_dtype, key=lambda pair: pair[1])[0] if flops is not None else ""
    return compiled.hardware.peak_flops(dtype or "bfloat16")


def _part(what: str, make: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """A part of a report; or why there is none."""
    try:
        return make(), ()
    except Exception as error:  # a program that one reader cannot take must not cost the others
        return None, (f"{what}: {type(error).__name__}: {error}".partition("\n")[0],)
