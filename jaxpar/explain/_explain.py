"""`jp.explain`: compile a step, here or for hardware that is elsewhere, and put together what is known of it.

Each part of a report is made by itself: where one cannot be made, the report says so under `unread`, and has the rest.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from .. import _hardware, _hlo, _mesh
from .._errors import StepError
from .._hlo import MeshAxes
from .._plan import Plan
from .._types import AnyMesh
from . import _export, _target
from ._axes import mesh_axes
from ._child import compile_elsewhere
from ._collectives import rows
from ._compiled import Compiled
from ._compiler import compiler, memory_stats
from ._estimate import estimate, what_fits
from ._findings import find
from ._flops import Flops, count, from_hlo
from ._memory import Held, Memory, from_arguments, memory
from ._report import Report
from ._stages import pipeline
from ._subject import Subject, subject
from ._ticks import schedule_of
from ._timeline import UNNAMED, mesh_of, predict
from ._trace import trace

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
    notes = exported.notes
    if exported.version != jax.__version__:
        notes = (f"Exported by jax {exported.version}, compiled by jax {jax.__version__}.", *notes)
    plan = Plan.from_json(exported.plan) if exported.plan else None
    return assemble(compiled, flops=flops, plan=plan, notes=notes)


def explain_text(text: str, mesh: AnyMesh | str, *, name: str = "") -> Report:
    """Explain scheduled HLO text that something else compiled (`compiled.as_text()`, or an XLA dump).

    Args:
        text: The text. What cannot be read of it is listed in the report.
        mesh: The mesh it was compiled for; or the name of the hardware alone (`"v5e:16x16"`): its axes are then those
            that the collectives run over, as far as these tell.
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
        axes = MeshAxes(names=(UNNAMED,), sizes=(hardware.num_devices,), slices=slices)
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
    program: Any = None,
    notes: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
) -> Report:
    """The report of a compiled program; of each part that cannot be made, why.

    Args:
        compiled: The program.
        flops: Counted in its jaxpr; else they are counted in the HLO.
        plan: That of the step.
        step: What `plan.jit` made of it.
        program: The program that it is the step of: of one that does not fit, it gives the account.
        notes: What a reader should know.
        unread: What could not be made before.
    """
    faults = [*unread]

    def part(what: str, make: Callable[[], T]) -> T | None:
        made, said = _part(what, make)
        faults.extend(said)
        return made

    if compiled.refusal:
        module, notes = _hlo.read(""), (_refusal(compiled), *notes)
    else:
        module = part("HLO text", lambda: _hlo.read(compiled.text)) or _hlo.read("")
        faults.extend(module.unread)
        if not module.program.entry:
            faults.append("there is no computation in the text that can be read: is it optimised HLO, whole?")
    compiled = dataclasses.replace(compiled, axes=part("mesh", lambda: mesh_of(module, compiled)) or compiled.axes)
    if flops is None and not compiled.refusal:
        flops = part("FLOPs", lambda: from_hlo(module, compiled))
    timeline = part("timeline", lambda: predict(module, compiled, schedule_of(plan)))
    held = part("memory", lambda: from_arguments(compiled) if compiled.refusal else memory(module, compiled))
    table = part("collectives", lambda: rows(module, compiled, timeline, plan)) or ()
    stages = None if compiled.refusal else part("pipeline", lambda: pipeline(plan, module, table))
    fits, needed = "", compiled.needed
    if not compiled.refusal and held is not None and held.limit and held.peak > held.limit:  # XLA:GPU does not refuse
        needed = held.peak
    if program is not None and (compiled.refusal or needed):
        traced = part("trace", lambda: trace(program))
        if traced is not None:
            fits = part("what fits", lambda: what_fits(program, traced, needed=needed)) or ""
        account = part("estimate", lambda: estimate(program, traced)) if compiled.refusal else None
        if account is not None:
            held, timeline, table = _reconciled(account.memory, held), account.timeline, account.collectives
            notes = (*notes, "Time, collectives and what memory is made of are estimates from the plan.")
    findings = part(
        "findings",
        lambda: find(module, compiled, rows=table, timeline=timeline, memory=held, plan=plan, step=step, fits=fits),
    )
    hardware = compiled.hardware
    return Report(
        name=compiled.name,
        hardware=hardware.describe(),
        target=hardware.spec,
        axes=dict(zip(compiled.axes.names, compiled.axes.sizes, strict=True)),
        num_devices=compiled.axes.size,
        compiler=compiled.compiler,
        options=compiled.options,
        origin="refused" if compiled.refusal else "compiled",
        strategies=() if plan is None else plan.strategies,
        num_tokens=compiled.num_tokens,
        peak_flops=_peak_flops(compiled, flops),
        memory=held,
        flops=flops,
        timeline=timeline,
        collectives=table,
        pipeline=stages,
        findings=findings or (),
        unread=tuple(dict.fromkeys(faults)),
        notes=notes,
        compile_seconds=compiled.seconds,
    )


def _with_options(made: Subject, options: Mapping[str, Any] | None) -> Subject:
    return made if options is None else dataclasses.replace(made, options=dict(options))


def _count(made: Subject) -> Flops:
    return count(made.function.trace(*made.shapes).jaxpr, plan=made.plan)


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
    return assemble(
        compiled,
        flops=flops,
        plan=made.plan,
        step=made.step,
        program=made.program,
        notes=made.notes,
        unread=faults,
    )


def _refusal(compiled: Compiled) -> str:
    needed, limit = compiled.needed / 2**30, compiled.hardware.memory / 2**30
    return (
        f"It does not fit: {compiled.compiler} makes no program of this step for {compiled.hardware.name}, of which a "
        f"device would need {needed:.2f} GiB and has {limit:.2f} GiB."
    )


def _reconciled(account: Memory | None, said: Memory | None) -> Memory | None:
    """The account of a plan, brought to the one figure that the compiler gave."""
    if account is None or said is None:
        return said or account
    rest = said.peak - sum(each.bytes for each in account.held)
    held = (*account.held, Held(kind="unattributed", path="", bytes=rest)) if rest else account.held
    return dataclasses.replace(account, peak=said.peak, held=held)


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
    traced = trace(made.program)
    found = estimate(made.program, traced)
    memory = found.memory
    fits = what_fits(made.program, traced) if memory is not None and memory.peak > memory.limit else ""
    unseen = Compiled(
        name=made.name,
        text="",
        hardware=_mesh.hardware_of(made.mesh),
        axes=mesh_axes(made.mesh),
        arguments=made.arguments,
        num_tokens=made.num_tokens,
    )
    findings = find(_hlo.read(""), unseen, memory=memory, plan=made.plan, fits=fits)
    return dataclasses.replace(found, findings=findings, notes=(said, *found.notes[1:]))


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
