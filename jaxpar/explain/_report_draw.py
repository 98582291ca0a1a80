"""A report in pictures: the step as lanes, what memory holds, what crosses each axis, the mesh.

    compute ▓▓▓▓▓▓▓▒▒▒▓▓▓▓▓▓▓     an axis keeps its colour everywhere; computation and memory are shades of the
    fsdp    ██████  ████ ██       ink, so that a picture suits a light page and a dark one
    tensor     █  █  █  █  █

Where the device waits for a link, the gap in its lane has a paler shade of the link's colour. Boxes too thin to see are
drawn together, so that a step of any length takes some hundreds of shapes.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import _draw_scene as scenes, _palette
from .._draw import draw_mesh
from .._draw_scene import INK, Label, Line, Scene, Shape, beside, box, words
from .._drawing import Drawing
from .._errors import ShardingError, nearest
from .._plan import Plan
from . import _report_tables as tables, _report_text as as_text
from ._memory import Memory
from ._report_tables import KINDS, SHADES
from ._timeline import Event, Timeline
from ._traffic import Group
from ._units import seconds_text, share_text, shortened, size_text

if TYPE_CHECKING:
    from ._report import Report

SMALL = 10
_WIDTH = 860.0
_LEFT, _RIGHT = 96.0, 92.0
_EMPTY = Scene(0, 0)
_BYTES_AT, _SECONDS_AT = 240.0, 510.0
_SHADES = (0.42, 0.3, 0.2, 0.12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One picture: a title, a sentence, the same in characters, and shapes; none where there is nothing to draw."""

    title: str
    lead: str
    text: Sequence[str] = ()
    scene: Scene = _EMPTY


def draw(report: "Report", picture: str | None) -> Drawing:
    """One picture, or all of them one under another."""
    if picture is not None and picture not in _PICTURES:
        raise ShardingError(
            f"report.draw: there is no picture {picture!r}.{nearest(picture, _PICTURES)} They are: "
            f"{', '.join(_PICTURES)}."
        )
    drawn = [make(report) for name, make in _PICTURES.items() if picture in (None, name)]
    text = "\n\n".join("\n".join([f"{each.title}: {each.lead}", *each.text]) for each in drawn)
    scene = scenes.above([scenes.above([_head(each.title, each.lead), each.scene], 8) for each in drawn], 26)
    if picture is None:
        figures = "    ".join(" ".join(each).strip() for each in tables.headline(report))
        text = f"{tables.title(report)}\n\n{text}"
        scene = scenes.above([_head(tables.title(report), figures), scene], 22)
    return Drawing(text, scenes.framed(scene, 14), report.name or "a step")


def scene_of(report: "Report", picture: str) -> Scene:
    """One picture without its title and its sentence."""
    return _PICTURES[picture](report).scene


def stack(report: "Report") -> Scene:
    """What memory holds, as a bar and a curve, without a legend."""
    memory = report.memory
    if memory is None:
        return _EMPTY
    parts = [_stack(memory, _sizes(memory)), *([_curve(memory)] if len(memory.curve) > 1 else [])]
    return scenes.above(parts, 8)


def _head(title: str, said: str) -> Scene:
    return scenes.above([words(shortened(title, 110), size=12, bold=True), *_lines(said)], 2)


def _lines(said: str) -> list[Scene]:
    """A caption in as many lines as it needs, cut between its figures."""
    lines = [""]
    for part in said.split("    "):
        longer = f"{lines[-1]}    {part}" if lines[-1] else part
        if scenes.text_width(longer, SMALL) > _WIDTH and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = longer
    return [words(line, size=SMALL, opacity=0.75) for line in lines]


# The step


def _timeline(report: "Report") -> _Drawn:
    line = report.timeline
    if line is None or not line.step_seconds > 0 or not math.isfinite(line.step_seconds):
        return _Drawn(title="Timeline", lead=tables.why_no_time(report))
    lead = tables.PARTS["time"](report, False).lead
    hues = _lane_hues(report, line)
    scale = (_WIDTH - _LEFT - _RIGHT) / line.step_seconds
    lanes = as_text.lanes_of(line)
    shades = _shades(line)
    rows = [_loops(line, scale)]
    for lane in lanes:
        events = sorted((event for event in line.events if event.lane == lane), key=lambda event: event.start)
        busy = line.compute_seconds if lane == "compute" else sum(event.seconds for event in events)
        boxes = _merged(events, 1.5 / scale)
        shapes = _waits(line, boxes, hues, scale) if lane == "compute" else ()
        drawn = [shape for each in boxes for shape in _box(each, lane, hues, shades, scale)]
        label = Label(at=(0, 16), text=shortened(lane, 15), size=SMALL)
        total = f"{seconds_text(busy)}  {share_text(busy, line.step_seconds)}"
        told = Label(at=(_WIDTH, 16), text=total, size=SMALL, anchor="end", opacity=0.75)
        rows.append(Scene(_WIDTH, 24, (label, *shapes, *drawn, told)))
    scene = scenes.above([scenes.above([*rows, _ruler(line, scale)], 5), _shade_legend(shades)], 8)
    return _Drawn(title="Timeline", lead=lead, text=as_text.strip(line), scene=scene)


@dataclasses.dataclass(frozen=True)
class _Box:
    """Events of one name that are drawn as one."""

    start: float
    end: float
    name: str
    path: str


def _merged(events: Sequence[Event], gap: float) -> list[_Box]:
    """Events in order, those of one name together where a gap between them could not be seen."""
    found: list[_Box] = []
    for event in events:
        end = event.start + event.seconds
        last = found[-1] if found else None
        thin = last is not None and min(end - event.start, last.end - last.start) < 6 * gap
        if last is not None and event.name == last.name and event.start - last.end < gap and thin:
            same = last.path if last.path == event.path else ""
            found[-1] = _Box(last.start, max(last.end, end), last.name, same)
        else:
            found.append(_Box(event.start, end, event.name, event.path))
    return found


def _box(
    each: _Box, lane: str, hues: dict[str, tuple[str, ...]], shades: dict[str, float], scale: float
) -> list[Shape]:
    x, width = _LEFT + each.start * scale, max((each.end - each.start) * scale, 0.6)
    inner = width - 1 if width > 4 else width
    if lane == "compute":
        shapes: list[Shape] = [box(x, 0, inner, 24, opacity=shades.get(each.name, _SHADES[-1]))]
        ink = INK
    else:
        chosen = hues[lane]
        high = 24 / len(chosen)
        shapes = [box(x, place * high, inner, high, fill=hue) for place, hue in enumerate(chosen)]
        ink = _palette.on(chosen[0]) if len(chosen) == 1 else ""
    text = next((text for text in (f"{each.name} {each.path}", each.name) if _fits(text.strip(), inner)), "")
    if text and ink:
        shapes.append(Label(at=(x + inner / 2, 16), text=text.strip(), size=SMALL, anchor="middle", color=ink))
    return shapes


def _fits(text: str, width: float) -> bool:
    return scenes.text_width(text, SMALL) + 4 < width


def _waits(line: Timeline, boxes: Sequence[_Box], hues: dict[str, tuple[str, ...]], scale: float) -> list[Shape]:
    """The gaps in the lane of computation, in the pale colour of the link that is busy then."""
    moving = sorted((event for event in line.events if event.lane != "compute"), key=lambda event: event.start)
    starts = [event.start for event in moving]
    edges = [0.0, *(edge for each in boxes for edge in (each.start, each.end)), line.step_seconds]
    shapes: list[Shape] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if (end - start) * scale < 0.5:
            continue
        middle = (start + end) / 2
        first = bisect.bisect_right(starts, middle)
        busy = next((event for event in reversed(moving[:first]) if event.start + event.seconds >= middle), None)
        if busy is not None:
            shapes.append(
                box(_LEFT + start * scale, 8, (end - start) * scale, 8, fill=hues[busy.lane][0], opacity=0.45)
            )
    return shapes


def _loops(line: Timeline, scale: float) -> Scene:
    """A bracket over events that stand for many iterations."""
    shapes: list[Shape] = []
    events = sorted((event for event in line.events if event.lane == "compute"), key=lambda event: event.start)
    spans: list[tuple[float, float, int]] = []
    previous = 1
    for event in events:
        end = event.start + event.seconds
        if event.depth and event.count > 1:
            if spans and previous == event.count and spans[-1][2] == event.count:
                spans[-1] = (spans[-1][0], end, event.count)
            else:
                spans.append((event.start, end, event.count))
        previous = event.count if event.depth else 1
    for start, end, count in spans:
        a, b = _LEFT + start * scale, _LEFT + end * scale
        text = f"a loop, × {count}" if _fits(f"a loop, × {count}", b - a) else f"× {count}"
        if not _fits(text, b - a):
            continue
        middle, half = (a + b) / 2, scenes.text_width(text, SMALL) / 2
        shapes += [Line(points=((a + 0.5, 14), (a + 0.5, 8), (middle - half, 8)), opacity=0.5)]
        shapes += [Line(points=((middle + half, 8), (b - 0.5, 8), (b - 0.5, 14)), opacity=0.5)]
        shapes.append(Label(at=(middle, 11), text=text, size=SMALL, anchor="middle", opacity=0.75))
    return Scene(_WIDTH, 14 if shapes else 0, tuple(shapes))


def _ruler(line: Timeline, scale: float) -> Scene:
    """Round times under the lanes."""
    rough = line.step_seconds / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    right = _LEFT + line.step_seconds * scale
    shapes: list[Shape] = [Line(points=((_LEFT, 2), (right, 2)), opacity=0.5)]
    for place in range(int(line.step_seconds / step) + 1):
        x = _LEFT + place * step * scale
        shapes.append(Line(points=((x, 2), (x, 6)), opacity=0.5))
        text = seconds_text(place * step).replace(".0 ", " ").replace(".00 ", " ")
        shapes.append(Label(at=(x, 17), text=text, size=SMALL, anchor="middle", opacity=0.75))
    return Scene(_WIDTH, 20, tuple(shapes))


def _shades(line: Timeline) -> dict[str, float]:
    """The shade of each kind of computation: those that take longest are the darkest, and a rest shares the palest."""
    seconds: dict[str, float] = {}
    for event in line.events:
        if event.lane == "compute":
            seconds[event.name] = seconds.get(event.name, 0.0) + event.seconds
    ordered = sorted(seconds, key=lambda name: -seconds[name])
    return {name: _SHADES[min(place, len(_SHADES) - 1)] for place, name in enumerate(ordered)}


def _shade_legend(shades: dict[str, float]) -> Scene:
    named = [name for name, shade in shades.items() if shade > _SHADES[-1]]
    rest = [name for name in shades if name not in named]
    if rest:
        named.append(rest[0] if len(rest) == 1 else f"{rest[0]} and {len(rest) - 1} other kinds")
    marks = [
        beside([_swatch(INK, shade), words(name, size=SMALL)], 5) for name, shade in zip(named, _SHADES, strict=False)
    ]
    wait = Scene(10, 14, (box(0, 5, 10, 5, fill=_palette.hues(["fsdp"])["fsdp"], opacity=0.45),))
    return beside([Scene(_LEFT - 16, 14), *marks, beside([wait, words("waits for a link", size=SMALL)], 5)], 16)


def _lane_hues(report: "Report", line: Timeline) -> dict[str, tuple[str, ...]]:
    """The colours of each lane of links: one for each of its axes."""
    hues = _palette.hues([axis for axis in report.axes if axis != "?"] or ["fsdp"])
    return {
        event.lane: tuple(hues.get(axis.partition("[")[0], "#7f7f7f") for axis in event.lane.split(","))
        for event in line.events
        if event.lane != "compute"
    }


def _swatch(hue: str, opacity: float = 1.0) -> Scene:
    return Scene(10, 14, (box(0, 2, 10, 10, fill=hue, opacity=opacity),))


# Memory


def _memory(report: "Report") -> _Drawn:
    memory = report.memory
    if memory is None:
        return _Drawn(title="Memory", lead="not known")
    part = tables.PARTS["memory"](report, False)
    sizes = _sizes(memory)
    parts = [_stack(memory, sizes), _stack_legend(memory, sizes)]
    if len(memory.curve) > 1:
        parts.append(_curve(memory))
    return _Drawn(title="Memory", lead=part.lead, text=as_text.tables_text(part.tables), scene=scenes.above(parts, 8))


def _sizes(memory: Memory) -> dict[str, int]:
    return {kind: sum(held.bytes for held in memory.held if held.kind == kind) for kind in KINDS}


def _stack(memory: Memory, sizes: dict[str, int]) -> Scene:
    """One bar: what the peak is made of, and how much room is left."""
    shown = {kind: size for kind, size in sizes.items() if size > 0}
    whole = max(memory.limit, sum(shown.values()), memory.peak, 1)
    shapes: list[Shape] = []
    x = 0.0
    for kind, size in shown.items():
        width = size / whole * _WIDTH
        shapes.append(box(x, 4, width - 1 if width > 3 else width, 28, opacity=SHADES[kind]))
        if _fits(KINDS[kind], width):
            shapes.append(Label(at=(x + width / 2, 22), text=KINDS[kind], size=SMALL, anchor="middle"))
        x += width
    if memory.limit:
        at = memory.limit / whole * _WIDTH
        shapes.append(Line(points=((at - 0.75, 0), (at - 0.75, 36)), width=1.5))
        left = memory.limit - memory.peak
        room = f"{size_text(left)} left" if left >= 0 else f"{size_text(-left)} too much"
        if left > 0 and _fits(room, at - x):
            shapes.append(Label(at=((x + at) / 2, 22), text=room, size=SMALL, anchor="middle", opacity=0.75))
        edge = ((x, 4), (at, 4), (at, 32), (x, 32))
        if left > 0:
            shapes.append(Line(points=edge, opacity=0.3))
        limit = Label(
            at=(min(at, _WIDTH), 46), text=f"limit {size_text(memory.limit)}", size=SMALL, anchor="end", opacity=0.75
        )
        shapes.append(limit)
    return Scene(_WIDTH, 50 if memory.limit else 36, tuple(shapes))


def _stack_legend(memory: Memory, sizes: dict[str, int]) -> Scene:
    """Each kind with its bytes, in columns of three."""
    rows = []
    for kind, size in sizes.items():
        if size:
            share = share_text(size, memory.peak)
            cells = (
                Label(at=(16, 11), text=KINDS[kind], size=SMALL),
                Label(at=(190, 11), text=size_text(size), size=SMALL, anchor="end"),
                Label(at=(238, 11), text=share, size=SMALL, anchor="end", opacity=0.75),
            )
            rows.append(Scene(244, 15, (*_swatch(INK, SHADES[kind]).shapes, *cells)))
    return beside([scenes.above(rows[start : start + 3], 2) for start in range(0, len(rows), 3)], 40)


def _curve(memory: Memory) -> Scene:
    """Our own account of memory through the schedule."""
    high, above = 84.0, 16.0
    last = max(place for place, _ in memory.curve) or 1
    top = max(1, *(size for _, size in memory.curve))
    points = [(place / last * _WIDTH, high - size / top * (high - above)) for place, size in memory.curve]
    area = scenes.Area(points=((points[0][0], high), *points, (points[-1][0], high)), opacity=0.14)
    line = Line(points=tuple(points), opacity=0.6, width=1.2)
    base = Line(points=((0, high), (_WIDTH, high)), opacity=0.5)
    at = min(points, key=lambda point: point[1])[0]
    anchor = "start" if at < 60 else "end" if at > _WIDTH - 60 else "middle"
    text = Label(at=(at, above - 5), text=size_text(top), size=SMALL, anchor=anchor, opacity=0.75)
    said = words("through the schedule of the step, from its first operation to its last", size=SMALL, opacity=0.75)
    return scenes.above([Scene(_WIDTH, high + 2, (area, line, base, text)), said], 3)


# Collectives


def _collectives(report: "Report") -> _Drawn:
    part = tables.PARTS["collectives"](report, False)
    found = report.traffic
    if not found:
        return _Drawn(title="Collectives", lead=part.lead)
    hues = _palette.hues(report.axes)
    by_axes: dict[tuple[str, ...], list[Group]] = {}
    for each in found:
        by_axes.setdefault(each.axes, []).append(each)
    heaviest = max(each.bytes for each in found) or 1
    longest = max(each.seconds for each in found)
    titles = (("bytes a step", _BYTES_AT), *((("seconds a step, exposed first", _SECONDS_AT),) if longest else ()))
    head = Scene(_WIDTH, 13, tuple(Label(at=(x, 10), text=text, size=SMALL, opacity=0.75) for text, x in titles))
    rows = [head]
    for axes, groups in list(by_axes.items())[:8]:
        colours = tuple(hues.get(axis.partition("[")[0], "#7f7f7f") for axis in axes)
        for place, each in enumerate(groups):
            rows.append(_bars(each, "+".join(axes) if place == 0 else "", colours, heaviest, longest))
    left = list(by_axes.values())[8:]
    if left:
        size = sum(each.bytes for groups in left for each in groups)
        rows.append(words(f"and over {len(left)} more sets of axes: {size_text(size)}", size=SMALL, opacity=0.75))
    text = as_text.tables_text(part.tables[:1])
    return _Drawn(title="Collectives", lead=part.lead, text=text, scene=scenes.above(rows, 3))


def _bars(each: Group, over: str, colours: Sequence[str], heaviest: int, longest: float) -> Scene:
    room = 170.0
    shapes: list[Shape] = [
        Label(at=(0, 12), text=shortened(over, 16), size=SMALL, bold=True),
        Label(at=(108, 12), text=shortened(each.kind, 20), size=SMALL),
    ]
    shapes += _striped(_BYTES_AT, each.bytes / heaviest * room, colours, 1.0)
    shapes.append(Label(at=(_BYTES_AT + 6 + each.bytes / heaviest * room, 12), text=size_text(each.bytes), size=SMALL))
    if longest:
        shown = min(each.exposed_seconds, each.seconds) / longest * room
        hidden = each.seconds / longest * room - shown
        shapes += _striped(_SECONDS_AT, shown, colours, 1.0) + _striped(_SECONDS_AT + shown, hidden, colours, 0.4)
        told = seconds_text(each.seconds)
        if each.exposed_seconds:
            told += f", {seconds_text(each.exposed_seconds)} exposed"
        shapes.append(Label(at=(_SECONDS_AT + 6 + shown + hidden, 12), text=told, size=SMALL))
    return Scene(_WIDTH, 16, tuple(shapes))


def _striped(x: float, width: float, colours: Sequence[str], opacity: float) -> list[Shape]:
    high = 12 / len(colours)
    shown = max(width, 1.0) if width > 0 else 0.0
    return [
        box(x, 2 + place * high, shown, high, fill=hue, opacity=opacity) for place, hue in enumerate(colours) if shown
    ]


# The mesh


def _mesh(report: "Report") -> _Drawn:
    if not report.axes:
        return _Drawn(title="Mesh", lead="no axes")
    mesh = draw_mesh(Plan(axes=report.axes, records={}))
    said = report.hardware or f"{report.num_devices} devices"
    return _Drawn(title="Mesh", lead=said, text=mesh.text.splitlines(), scene=mesh.scene)


_PICTURES = {"timeline": _timeline, "memory": _memory, "collectives": _collectives, "mesh": _mesh}
