"""The report of `jp.explain`: plain data that prints, draws, goes to JSON and back, and compares."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from .. import _hardware
from .._drawing import Drawing
from .._errors import MeshError, ShardingError
from . import _json
from ._collectives import Row
from ._findings import Finding
from ._flops import Flops
from ._memory import Memory
from ._report_diff import Difference, difference
from ._stages import Pipeline
from ._timeline import Timeline
from ._traffic import Group, groups

FORMAT = 1

DERIVED = (
    "step_seconds",
    "compute_seconds",
    "exposed_communication_seconds",
    "peak_bytes",
    "mfu",
    "hfu",
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "traffic",
)
"""Figures that JSON has beside the fields, for those who read it without jaxpar."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a step costs.

    Attributes:
        name: Of the step or recipe.
        hardware: In words, one line.
        target: The hardware's canonical name, `"v5p:4x4x4"`.
        axes: Size of each mesh axis, outermost first.
        num_devices: Of the mesh.
        compiler: Name and version; `""` for a report that no compiler has seen.
        options: Compiler options that are not the defaults.
        origin: `"compiled"`, `"refused"` (the program does not fit: memory and time are estimates) or `"estimate"`.
        strategies: As text; empty without a plan.
        num_tokens: Tokens (rows, without a sequence) of a step's global batch; 0 if not known.
        peak_flops: Of one device, per second, in the dtype that most FLOPs are in; 0 if not known.
        memory: `None` where nothing is known of it.
        flops: Likewise.
        timeline: Likewise: no speed is claimed for a CPU.
        collectives: In the order of the program.
        pipeline: What its stages hold, send and wait for; `None` without stages.
        findings: Worst first.
        unread: What could not be read of the program.
        notes: What a reader should know.
        compile_seconds: 0 from the cache.
    """

    name: str
    hardware: str
    target: str
    axes: dict[str, int]
    num_devices: int
    compiler: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "compiled"
    strategies: tuple[str, ...] = ()
    num_tokens: int = 0
    peak_flops: float = 0.0
    memory: Memory | None = None
    flops: Flops | None = None
    timeline: Timeline | None = None
    collectives: tuple[Row, ...] = ()
    pipeline: Pipeline | None = None
    findings: tuple[Finding, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compile_seconds: float = 0.0

    @property
    def step_seconds(self) -> float | None:
        """The predicted step; `None` where no time is claimed, as for all figures below."""
        return _finite(self.timeline and self.timeline.step_seconds)

    @property
    def compute_seconds(self) -> float | None:
        """How much of the step the device computes."""
        return _finite(self.timeline and self.timeline.compute_seconds)

    @property
    def exposed_communication_seconds(self) -> float | None:
        """How much of the step the device waits for a link."""
        return _finite(self.timeline and self.timeline.exposed_communication_seconds)

    @property
    def peak_bytes(self) -> int | None:
        """Memory of one device at its fullest."""
        return None if self.memory is None else self.memory.peak

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what all devices could do in a step, causal attention counted in full."""
        return self._utilisation(self.flops and self.flops.model)

    @property
    def hfu(self) -> float | None:
        """The same with hardware FLOPs: recomputation counts."""
        return self._utilisation(self.flops and self.flops.hardware)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens (rows, without a sequence) of all devices together."""
        return self.num_tokens / self.step_seconds if self.num_tokens and self.step_seconds else None

    @property
    def tokens_per_second_per_chip(self) -> float | None:
        """Of one chip, which may be two devices."""
        return None if self.tokens_per_second is None else self.tokens_per_second / self.num_chips

    @property
    def num_chips(self) -> int:
        """Chips of the mesh; as many as devices where the hardware is not known."""
        try:
            return max(self.num_devices // _hardware.parse(self.target).devices_per_chip, 1)
        except MeshError:
            return self.num_devices

    @property
    def traffic(self) -> tuple[Group, ...]:
        """The collectives together by kind and axes, the longest first."""
        return groups(self.collectives)

    def table(self, section: str | None = None) -> str:
        """The report as text of at most 118 columns, or all of one section, where the report shows the largest few.

        Args:
            section: `"time"`, `"memory"`, `"collectives"`, `"flops"` or `"findings"`.

        Raises:
            ShardingError: There is no such section.
        """
        from . import _report_text

        return _report_text.text(self) if section is None else _report_text.whole(self, section)

    def __str__(self) -> str:
        return self.table()

    def draw(self, picture: str | None = None) -> Drawing:
        """The report in pictures, or one of them: the timeline, the memory, the collectives, the mesh.

        Args:
            picture: `"timeline"`, `"memory"`, `"collectives"` or `"mesh"`.

        Raises:
            ShardingError: There is no such picture.
        """
        from . import _report_draw

        return _report_draw.draw(self, picture)

    def to_html(self) -> str:
        """The report as one HTML page: no script, no other file, for light and dark."""
        from . import _report_html

        return _report_html.page(self)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        from . import _report_html

        picture, size = self.draw()._repr_mimebundle_()  # a PNG where matplotlib is
        return {**picture, "text/plain": self.table(), "text/html": _report_html.body(self)}, size

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path`, as its ending says: `.html`, `.json`, `.txt`; `.svg` or `.png` its pictures.

        Raises:
            ShardingError: Another ending.
            ModuleNotFoundError: A PNG, and matplotlib is not installed.
        """
        path = pathlib.Path(path)
        writers = {".html": self.to_html, ".json": self.to_json, ".txt": lambda: self.table() + "\n"}
        if path.suffix in writers:
            path.write_text(writers[path.suffix](), encoding="utf-8")
        elif path.suffix in (".png", ".svg"):
            self.draw().save(path)
        else:
            raise ShardingError(
                f"{path}: a report is written as .html, .json, .txt, .svg or .png, not {path.suffix or 'without'!r}."
            )

    def diff(self, other: "Report") -> Difference:
        """What `other` says otherwise: empty, and false, if nothing."""
        return difference(self, other)

    def to_json(self) -> str:
        """The report as one JSON object, for `Report.from_json`, with its derived figures beside its fields.

        A number that is not finite is written as `null`, as is a figure that is not known.
        """
        fields = {"format": FORMAT, **_json.encode({name: getattr(self, name) for name in DERIVED})}
        return _json.dumps({**fields, **_json.encode(self)})

    @staticmethod
    def from_json(text: str) -> "Report":
        """The report that `to_json` wrote; derived figures are derived again.

        Raises:
            ShardingError: The text is not such a report, or a newer version of jaxpar wrote it.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ShardingError(
                f"this is not the JSON of a report ({error}). Write it with report.to_json()."
            ) from error
        if not isinstance(fields, dict) or "format" not in fields:
            raise ShardingError("this is not the JSON of a report: it has no 'format'. Write it with report.to_json().")
        if fields["format"] != FORMAT:
            raise ShardingError(
                f"this report has format {fields['format']}, and this version of jaxpar reads {FORMAT}. Explain again."
            )
        known = {name: value for name, value in fields.items() if name not in ("format", *DERIVED)}
        return _json.decode(Report, known, "report")

    def _utilisation(self, flops: float | None) -> float | None:
        if not flops or not self.step_seconds or not self.peak_flops:
            return None
        return _finite(flops / (self.num_devices * self.peak_flops * self.step_seconds))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
