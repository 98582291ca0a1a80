"""The meshes that a recipe may be put on, each with its estimate, or with the reason why it is none.

A mesh is a way to write the number of devices as a product over the axes that the recipe's strategies own; an axis of
size 1 is left out, and its strategy rests, so that the products are the mixes of strategies too. Where a step does not
fit a device's memory, its batch is split into more microbatches, as few as it takes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .. import _mesh, _tree
from .._birth import no_eager_sharding
from .._context import entered
from .._errors import MeshError, ShardingError, StepError
from .._hardware import Hardware
from .._mesh import AXES, factorisations
from .._plan_text import bytes_text
from .._planned import Traced
from .._recipe import Program, Recipe
from ..explain import Report
from ..explain._estimate import estimate, in_microbatches, memory_of
from ..explain._trace import Trace, key_of, trace
from ..parallel import PP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One mesh that a recipe may be trained on.

    Attributes:
        target: The hardware, as the user named it.
        axes: Sizes, outermost first.
        accumulate: Microbatches of a step.
        report: What is known of it: of the compiled program where there is one, else the estimate.
        estimate: By which it was ranked first.
    """

    target: str
    axes: dict[str, int]
    accumulate: int
    report: Report
    estimate: Report

    @property
    def is_compiled(self) -> bool:
        """Whether a compiler has seen it."""
        return self.report.origin == "compiled"

    @property
    def seconds(self) -> float:
        """Of a step."""
        assert self.report.timeline is not None, "only hardware whose speed is known is compared"
        return self.report.timeline.step_seconds

    @property
    def num_axes(self) -> int:
        """Axes that split something."""
        return len(self.axes)

    @property
    def name(self) -> str:
        """The axes in words, and the microbatches."""
        axes = " x ".join(f"{axis}={size}" for axis, size in self.axes.items())
        return axes + (f", {self.accumulate} microbatches" if self.accumulate > 1 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """A mesh that a recipe cannot be trained on.

    Attributes:
        target: The hardware, as the user named it.
        axes: Sizes, outermost first.
        reason: Why, in one line.
        detail: All of it.
    """

    target: str
    axes: dict[str, int]
    reason: str
    detail: str = ""


class Search:
    """The meshes of one recipe; what does not depend on the mesh is found out once."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.programs: dict[tuple[str, tuple[tuple[str, int], ...]], Program] = {}
        self.margin = 1.0  # how much more memory than estimated a step is expected to need
        self.plan: Any = None  # of any mesh: what is said of the model alone
        self._traces: dict[Any, Trace] = {}
        self._layouts: dict[Any, str | None] = {}

    def meshes(self, hardware: Hardware) -> list[dict[str, int]]:
        """Every product over the axes of the recipe's strategies, those of size 1 left out."""
        owned = {each.axis: each for each in self.recipe.strategies}
        strange = sorted(set(owned) - set(AXES))
        if strange:
            raise MeshError(
                f"compare: a strategy is on axis {strange[0]!r}, which jp.mesh does not make. Use one of "
                f"{', '.join(AXES)}."
            )
        axes = [axis for axis in AXES if axis in owned]
        # A strategy that was moved to another axis than its own needs that axis to be there, be it of size 1.
        moved = {axis for axis, each in owned.items() if type(each).__dataclass_fields__["axis"].default != axis}
        found = []
        for sizes in factorisations(hardware.num_devices, len(axes)):
            mesh = {axis: size for axis, size in zip(axes, sizes, strict=True) if size > 1 or axis in moved}
            found.append(mesh or {axes[0]: 1})
        return found

    def look(self, hardware: Hardware, axes: Mapping[str, int]) -> Candidate | Rejected:
        """The estimate of one mesh, with as few microbatches as fit; or why there is none."""
        target = hardware.name
        stages = next((each.axis for each in self.recipe.strategies if isinstance(each, PP)), "")
        if axes.get(stages, 1) > 1:
            return Rejected(
                target=target,
                axes=dict(axes),
                reason=f"{stages}={axes[stages]}: what a pipeline's stages wait and hold is not estimated; see "
                "jp.explain of the program on that mesh",
            )
        try:
            sizes: dict[str, Any] = dict(axes)
            mesh = _mesh.mesh(hardware, **sizes)
            crossing = _mesh.dcn_factors(mesh)
            if crossing.get("tensor", 1) > 1:
                between = "slices" if hardware.kind == "tpu" else "hosts"
                return Rejected(
                    target=target,
                    axes=dict(axes),
                    reason=f"tensor={axes['tensor']} would cross {between}: it waits for the network in every layer",
                )
            program = self.recipe.on(mesh)
        except (ShardingError, StepError, MeshError) as error:
            return refused(target, axes, str(error))
        self.plan = program.plan
        traced = self._traced(program)
        fault = self._layout_fault(program)
        if fault is not None:
            return refused(target, axes, fault)
        return self._fitted(hardware, axes, program, traced)

    def _fitted(
        self, hardware: Hardware, axes: Mapping[str, int], program: Program, traced: Trace
    ) -> Candidate | Rejected:
        fitted = program
        for fitted in in_microbatches(program):
            memory = memory_of(fitted, traced)
            kept = memory.argument + program.plan.totals().gradients
            if memory.peak * self.margin <= memory.limit or kept > memory.limit:
                break
        accumulate = fitted.recipe.accumulate
        report = estimate(fitted, traced)
        assert report.memory is not None, "an estimate has its memory"
        if report.memory.peak * self.margin > report.memory.limit:
            kept = report.memory.argument + program.plan.totals().gradients
            return _does_not_fit(hardware.name, axes, accumulate, report, kept, self.margin)
        self.programs[hardware.name, tuple(axes.items())] = fitted
        return Candidate(target=hardware.name, axes=dict(axes), accumulate=accumulate, report=report, estimate=report)

    def _traced(self, program: Program) -> Trace:
        key = key_of(program)
        if key not in self._traces:
            try:
                self._traces[key] = trace(program)
            except Exception as error:
                shapes = {path: tuple(leaf.shape) for path, leaf in _tree.leaves(self.recipe.batch).items()}
                raise StepError(
                    f"compare: the model refuses the batch {shapes}: {error} Ask for another batch or seq."
                ) from error
        return self._traces[key]

    def _layout_fault(self, program: Program) -> str | None:
        """What the model itself says against the mesh: activations that it names and an axis does not divide."""
        plan = program.plan
        key = tuple(
            (dim, tuple(plan.axes[axis] for axis in axes)) for dim, axes in plan.dims.items() if dim != "batch" and axes
        )
        if key and key not in self._layouts:  # whether rows divide, `recipe.on` has checked
            self._layouts[key] = _refusal(program)
        return self._layouts.get(key)


def refused(target: str, axes: Mapping[str, int], message: str) -> Rejected:
    """A mesh that an error speaks against."""
    return Rejected(target=target, axes=dict(axes), reason=_first_line(message), detail=message)


def _does_not_fit(
    target: str, axes: Mapping[str, int], accumulate: int, report: Report, kept: int, margin: float
) -> Rejected:
    """A mesh whose devices are too small: by how much, and what is largest; `kept` is held whatever the batch."""
    memory = report.memory
    assert memory is not None, "it says what does not fit"
    alone = kept > memory.limit  # then no batch is small enough
    held = [each for each in memory.held if not alone or each.kind in ("parameter", "optimizer", "model_state")]
    largest = sorted(held, key=lambda each: -each.bytes)[:2]
    named = " and ".join(
        f"{each.kind} {each.path or each.shape}".strip() + f" {bytes_text(each.bytes)}" for each in largest
    )
    micro = f" with {accumulate} microbatches" if accumulate > 1 else ""
    return Rejected(
        target=target,
        axes=dict(axes),
        reason=(
            f"does not fit: state and gradients alone {bytes_text(kept)} of {bytes_text(memory.limit)}"
            if alone
            else f"does not fit: {bytes_text(memory.peak * margin)} of {bytes_text(memory.limit)}{micro}"
        )
        + (f"; largest {named}" if named else ""),
    )


def _refusal(program: Program) -> str | None:
    plan, recipe = program.plan, program.recipe
    region = Traced(plan=plan)

    def loss(leaves: dict[str, Any], batch: Any) -> Any:
        with no_eager_sharding(), entered(region):
            return recipe.loss(plan.birth.build(leaves), batch)

    shapes = {path: jax.ShapeDtypeStruct(each.shape, each.compute_dtype) for path, each in plan.records.items()}
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), recipe.batch)
    try:
        jax.eval_shape(loss, shapes, batch)
    except (ShardingError, StepError) as error:
        return str(error)
    return None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = lines[1:] if len(lines) > 1 and lines[0].endswith(":") else lines
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0].partition(". ")[0].rstrip(".") + more if lines else text
