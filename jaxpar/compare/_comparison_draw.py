"""The picture of a comparison: a bar for each mesh, of the time of a step and of the memory of a device."""

from typing import TYPE_CHECKING

from .. import _draw_scene as scenes, _palette
from .._draw_scene import INK, Line, Scene, Shape, beside, box, words
from .._drawing import Drawing
from .._plan_text import bytes_text
from ._candidates import Candidate
from ._rank import seconds_text

if TYPE_CHECKING:
    from ._comparison import Comparison

_MOST = 10
_WIDTH, _MEMORY, _HEIGHT = 360.0, 150.0, 16.0
_SMALL = 10


def draw(comparison: "Comparison") -> Drawing:
    """Bars of the best meshes of each target, on one scale."""
    shown = [each for target in comparison.targets for each in comparison.of(target)[:_MOST]]
    longest = max((each.seconds for each in shown), default=1.0)
    axes = sorted({axis for each in shown for axis in each.axes})
    hues = _palette.hues(axes)
    room = max((scenes.text_width(each.name, _SMALL) for each in shown), default=0)
    parts, lines = [_legend(hues)], []
    for target in comparison.targets:
        here = [each for each in shown if each.target == target]
        parts.append(words(target, size=12, bold=True))
        lines.append(target)
        for each in here:
            parts.append(_bars(each, longest, hues, room))
            lines.append(_bar_text(each, longest))
    return Drawing("\n".join(lines), scenes.framed(scenes.above(parts, 5), 12))


def _bars(candidate: Candidate, longest: float, hues: dict[str, str], room: float) -> Scene:
    timeline, memory = candidate.report.timeline, candidate.report.memory
    assert timeline is not None, "only hardware whose speed is known is compared"
    scale = _WIDTH / longest
    shapes: list[Shape] = [box(0, 0, timeline.compute_seconds * scale, _HEIGHT, opacity=0.35)]
    x = timeline.compute_seconds * scale
    for axes, seconds in _exposed(candidate).items():
        part = seconds * scale / len(axes)
        for axis in axes:
            shapes.append(box(x, 0, part, _HEIGHT, fill=hues.get(axis, INK)))
            x += part
    step = Scene(_WIDTH + 70, _HEIGHT, (*shapes, *words(seconds_text(candidate.seconds), size=_SMALL).at(x + 5, 2)))
    used = min(memory.peak / memory.limit, 1.0) if memory and memory.limit else 0.0
    outline = Line(points=((0, 0), (_MEMORY, 0), (_MEMORY, _HEIGHT), (0, _HEIGHT), (0, 0)), opacity=0.5)
    label = words(bytes_text(memory.peak) if memory else "?", size=_SMALL).at(4, 2)
    held = Scene(_MEMORY, _HEIGHT, (box(0, 0, used * _MEMORY, _HEIGHT, opacity=0.2), outline, *label))
    title = Scene(room, _HEIGHT, words(candidate.name, size=_SMALL).at(0, 2))
    return beside([title, step, held], 10)


def _exposed(candidate: Candidate) -> dict[tuple[str, ...], float]:
    """Exposed seconds by axes, scaled to the whole that the timeline says."""
    timeline = candidate.report.timeline
    total = timeline.exposed_communication_seconds if timeline else 0.0
    found: dict[tuple[str, ...], float] = {}
    for row in candidate.report.collectives:
        axes = tuple(axis.partition("[")[0] for axis in row.axes)
        found[axes] = found.get(axes, 0.0) + row.exposed_seconds
    known = sum(found.values())
    return {axes: seconds * total / known for axes, seconds in found.items() if seconds > 0} if known else {}


def _legend(hues: dict[str, str]) -> Scene:
    def mark(name: str, fill: str, opacity: float) -> Scene:
        return beside([Scene(10, 14, (box(0, 2, 10, 10, fill=fill, opacity=opacity),)), words(name, size=_SMALL)], 5)

    marks = [mark("computes", INK, 0.35), *(mark(f"waits for {axis}", hue, 1.0) for axis, hue in hues.items())]
    return beside([*marks, mark("memory of a device, and its limit", INK, 0.2)], 16)


def _bar_text(candidate: Candidate, longest: float) -> str:
    timeline = candidate.report.timeline
    assert timeline is not None, "only hardware whose speed is known is compared"
    scale = 40 / longest
    compute = round(timeline.compute_seconds * scale)
    waits = round(candidate.seconds * scale) - compute
    return f"  {candidate.name:<32} {'█' * compute}{'░' * waits} {seconds_text(candidate.seconds)}"
