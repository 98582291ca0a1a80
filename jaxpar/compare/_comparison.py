"""What a comparison found: plain data that prints, renders in a notebook, draws and goes to JSON."""

import dataclasses
import json
from typing import Any

from .._drawing import Drawing
from .._errors import MeshError
from ._candidates import Candidate, Rejected
from ._rank import ranked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Meshes of one recipe, the best first within each target, and those that it cannot be trained on.

    Attributes:
        name: Of the model.
        targets: The hardware, as it was named.
        rows: Of the global batch.
        seq: Tokens of a sequence; `None` if the batch has none.
        num_tokens: Tokens (rows, without a sequence) of the global batch.
        num_parameters: Of the model.
        train_tokens: For how many `days` and `cost` are; 0 if nobody said.
        price: Of a chip for an hour, by target.
        candidates: The legal meshes, compiled ones first, the simplest of equally fast ones first.
        rejected: The others, each with its reason.
        notes: What a reader should know.
        interrupted: Whether there would have been more.
    """

    name: str
    targets: tuple[str, ...]
    rows: int
    seq: int | None
    num_tokens: int
    num_parameters: int
    train_tokens: int
    price: dict[str, float] = dataclasses.field(default_factory=dict)
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def best(self) -> Candidate:
        """The first of all, whatever its target.

        Raises:
            MeshError: No mesh fits; with the reasons.
        """
        if not self.candidates:
            reasons = "\n".join(f"  {each.target}: {_axes(each.axes)}: {each.reason}" for each in self.rejected[:8])
            raise MeshError(
                f"no mesh of {', '.join(self.targets)} fits this recipe:\n{reasons}\nName larger hardware, a smaller "
                "batch, or a recipe whose blocks are computed again in the backward pass."
            )
        return ranked(self.candidates)[0]

    def of(self, target: str) -> tuple[Candidate, ...]:
        """The candidates of one target, the best first."""
        return tuple(each for each in self.candidates if each.target == target)

    def days(self, candidate: Candidate) -> float:
        """To train on `train_tokens`, if nothing fails."""
        return candidate.seconds * self.train_tokens / self.num_tokens / 86_400

    def cost(self, candidate: Candidate) -> float | None:
        """Of that, in the currency of the price; `None` without one."""
        price = self.price.get(candidate.target)
        return (
            None
            if price is None or not self.train_tokens
            else price * candidate.report.num_chips * 24 * self.days(candidate)
        )

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A sentence or two for each target: why the first mesh comes before the second; and one across targets."""
        from ._verdicts import verdicts

        return verdicts(self)

    def __str__(self) -> str:
        from . import _comparison_text

        return _comparison_text.text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from . import _comparison_text

        return {"text/plain": str(self), "text/html": _comparison_text.html_page(self, alone=False)}

    def to_html(self) -> str:
        """One page that needs nothing else."""
        from . import _comparison_text

        return _comparison_text.html_page(self, alone=True)

    def draw(self) -> Drawing:
        """A bar for each of the best meshes: computation, then what each axis keeps waiting; memory and its limit."""
        from . import _comparison_draw

        return _comparison_draw.draw(self)

    def to_json(self) -> str:
        """The comparison as one JSON object."""
        fields = {
            "format": 1,
            "name": self.name,
            "targets": list(self.targets),
            "rows": self.rows,
            "seq": self.seq,
            "num_tokens": self.num_tokens,
            "num_parameters": self.num_parameters,
            "train_tokens": self.train_tokens,
            "price": self.price,
            "candidates": [self._as_data(each) for each in self.candidates],
            "rejected": [dataclasses.asdict(each) for each in self.rejected],
            "verdicts": list(self.verdicts),
            "notes": list(self.notes),
        }
        return json.dumps(fields, indent=1)

    def _as_data(self, candidate: Candidate) -> dict[str, Any]:
        report, timeline, memory = candidate.report, candidate.report.timeline, candidate.report.memory
        assert timeline is not None, "only hardware whose speed is known is compared"
        estimated = candidate.estimate.timeline
        return {
            "target": candidate.target,
            "axes": candidate.axes,
            "accumulate": candidate.accumulate,
            "origin": report.origin,
            "step_seconds": timeline.step_seconds,
            "low_seconds": timeline.low,
            "high_seconds": timeline.high,
            "compute_seconds": timeline.compute_seconds,
            "exposed_communication_seconds": timeline.exposed_communication_seconds,
            "estimated_step_seconds": estimated.step_seconds if estimated else None,
            "peak_bytes": memory.peak if memory else None,
            "memory_limit": memory.limit if memory else None,
            "mfu": report.mfu,
            "tokens_per_second": report.tokens_per_second,
            "days": self.days(candidate),
            "cost": self.cost(candidate),
        }


def _axes(axes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in axes.items())
