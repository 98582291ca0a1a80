"""What a report shows, as tables that text and HTML both take: the headline, then a part for each subject.

A part has a short form, the largest few with what is left out counted and summed, and a whole one. Equal layers are one
row: `blocks.[0-79].mlp.up`. Parts of a report that are not known are there and say so.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .._plan_text import fold
from ._collectives import Row
from ._findings import Finding
from ._timeline import Timeline
from ._traffic import Group, group, runs
from ._units import flops_text, number_text, seconds_text, share_text, size_text

if TYPE_CHECKING:
    from ._report import Report

KINDS = {
    "parameter": "parameters",
    "optimizer": "optimiser state",
    "model_state": "model state",
    "gradient": "gradients",
    "activation": "saved activations",
    "temporary": "temporaries",
    "batch": "batch",
    "code": "program",
    "unattributed": "unattributed",
}
"""What memory holds, in the order of a stack from the bottom."""

SHADES = dict(zip(KINDS, (0.62, 0.5, 0.44, 0.38, 0.28, 0.19, 0.14, 0.11, 0.07), strict=True))
"""How dark each of them is drawn."""

_FEW = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A cell that is a bar: its length out of 1, and the axes whose colours it has, or a shade of the ink."""

    fraction: float
    axes: tuple[str, ...] = ()
    shade: float = 0.35


Cell = str | Bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under titles.

    Attributes:
        titles: Of the columns.
        rows: Of cells.
        right: Columns of figures.
        paths: Columns that are cut short first where there is no room.
        rest: What is left out, counted and summed.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    paths: tuple[int, ...] = ()
    rest: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One subject of a report: a sentence, tables, and notes."""

    name: str
    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def title(report: "Report") -> str:
    """What was explained, and on what."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in report.axes.items())
    return (
        f"{report.name or 'a step'} on {report.hardware or report.target or 'unknown hardware'}: {sizes or 'no axes'}"
    )


def made(report: "Report") -> list[str]:
    """How the report was made: compiler, options, strategies."""
    took = f", in {report.compile_seconds:.0f} s" if report.compile_seconds else ""
    by = report.compiler or "an unknown compiler"
    origins = {
        "compiled": f"compiled by {by}{took}",
        "refused": f"refused by {by}: it does not fit, so memory and time are estimates",
        "estimate": "an estimate: no compiler has seen it",
    }
    lines = [origins.get(report.origin, report.origin)]
    if report.options:
        lines.append("compiler options " + ", ".join(f"{key}={value}" for key, value in report.options.items()))
    if report.strategies:
        lines.append("strategies " + ", ".join(report.strategies))
    return lines


def headline(report: "Report") -> list[tuple[str, str, str]]:
    """The figures that one looks at first: `(what, how much, and what more)`."""
    rows = [("step", "not claimed", why_no_time(report))]
    if report.timeline is not None:
        line = report.timeline
        span = f"between {seconds_text(line.low)} and {seconds_text(line.high)}" if line.high > line.low > 0 else ""
        rows = [("step", seconds_text(line.step_seconds), span)]
    if report.mfu is not None:
        again = f"with recomputation {100 * report.hfu:.1f} %" if report.hfu is not None else ""
        rows.append(("MFU", f"{100 * report.mfu:.1f} %", again))
    if report.tokens_per_second is not None:
        each = number_text(report.tokens_per_second_per_chip)
        rows.append(("tokens", f"{number_text(report.tokens_per_second)} a second", f"{each} a second and chip"))
    if report.memory is None:
        rows.append(("memory", "not known", ""))
    else:
        peak, limit = report.memory.peak, report.memory.limit
        aside = f"{share_text(peak, limit)} of the {size_text(limit)} of a device" if limit else "a device"
        rows.append(("memory", size_text(peak), aside))
    return rows


def why_no_time(report: "Report") -> str:
    """What a reader is told where there is no timeline."""
    return "nothing that runs could be read" if report.unread else "no speed is claimed for this hardware"


def parts(report: "Report", *, whole: bool = False) -> list[Part]:
    """All subjects, short or whole."""
    return [make(report, whole) for name, make in PARTS.items() if name != "pipeline" or report.pipeline is not None]


def _memory(report: "Report", whole: bool) -> Part:
    memory = report.memory
    if memory is None:
        return Part(name="memory", title="Memory", lead="not known")
    lead = f"{_of_limit(memory.peak, memory.limit)} on each device"
    if memory.origin != "compiler":
        lead += ", estimated"
    own = [("arguments", memory.argument), ("results", memory.output), ("shared", memory.alias)]
    own += [("temporaries", memory.temporary), ("program", memory.code), ("in host memory", memory.host)]
    said = ", ".join(f"{name} {size_text(size)}" for name, size in own if size)
    notes = (f"the compiler's own account: {said}",) if said and memory.origin == "compiler" else ()
    by_kind: dict[str, list[int]] = {}
    for index, held in enumerate(memory.held):
        by_kind.setdefault(held.kind, []).append(index)
    sizes = {kind: sum(memory.held[index].bytes for index in members) for kind, members in by_kind.items()}
    order = {kind: place for place, kind in enumerate(KINDS)}
    rows = []
    for kind in sorted(by_kind, key=lambda kind: (-sizes[kind], order.get(kind, 99))):
        size = sizes[kind]
        told = _largest([memory.held[index] for index in by_kind[kind]])
        share = share_text(size, memory.peak)
        bar = Bar(fraction=size / max(memory.peak, 1), shade=SHADES.get(kind, 0.07))
        rows.append((KINDS.get(kind, kind), size_text(size), share, bar, told))
    kinds = Table(titles=("", "bytes", "share", "", "largest of it"), rows=tuple(rows), right=(1, 2), paths=(4,))
    tables = [kinds] if rows else []
    if whole and rows:
        tables.append(_everything_held(memory.held, memory.peak))
    return Part(name="memory", title="Memory", lead=lead, tables=tuple(tables), notes=notes)


def _largest(held: Sequence[Any]) -> str:
    """The largest things of one kind, by name; where nothing has one, arrays by their shape."""
    names = [each.path for each in held] if any(each.path for each in held) else [each.shape for each in held]
    folded = _folded_sums(names, [each.bytes for each in held])
    named = [(name, size) for name, size, _ in folded if name]
    if not named:
        return ""
    shapes = {each.path: each.shape for each in held}
    first = " ".join(filter(None, (named[0][0], shapes.get(named[0][0], ""), size_text(named[0][1]))))
    return f"{first}, and {len(named) - 1} more" if len(named) > 1 else first


def _everything_held(held: Sequence[Any], peak: int) -> Table:
    rows = []
    for name, members in fold([each.path for each in held], [(each.kind, each.shape, each.source) for each in held]):
        first = held[members[0]]
        size = sum(held[index].bytes for index in members)
        cells = (size_text(size), share_text(size, peak), KINDS.get(first.kind, first.kind))
        rows.append((size, (*cells, name, first.shape, first.source)))
    rows.sort(key=lambda row: -row[0])
    return Table(
        titles=("bytes", "share", "what", "where", "largest array", "source"),
        rows=tuple(row for _, row in rows),
        right=(0, 1),
        paths=(3, 5),
    )


def _collectives(report: "Report", whole: bool) -> Part:
    rows, found = report.collectives, report.traffic
    if not rows:
        is_whole = report.origin == "compiled" and report.compiler and not report.unread
        lead = "none: nothing moves between devices" if is_whole else "none known"
        return Part(name="collectives", title="Collectives", lead=lead)
    moved = sum(each.bytes for each in found)
    seconds = sum(each.seconds for each in found)
    lead = f"{size_text(moved)} a device and step; {len(rows)} in the program, run {_ran(rows)} times"
    if seconds:
        waited = sum(each.exposed_seconds for each in found)
        lead += f"; {seconds_text(seconds)} of transfers, {seconds_text(waited)} exposed"
    unexpected = [row for row in rows if row.expected == ""]
    notes = []
    if unexpected:
        notes.append(f"not in the plan: {len(unexpected)} of {len(rows)}, {_unexpected(unexpected)}")
    if any(row.count is None for row in rows):
        notes.append("≥: a loop does not say how often it runs, and is taken once")
    return Part(
        name="collectives",
        title="Collectives",
        lead=lead,
        tables=(_by_group(found), _every_row(rows) if whole else _by_row(rows)),
        notes=tuple(notes),
    )


def _by_group(found: Sequence[Group]) -> Table:
    most = 8
    longest = max((each.seconds for each in found), default=0) or 0
    heaviest = max((each.bytes for each in found), default=0) or 1
    rows = []
    for each in found[:most]:
        fraction = each.seconds / longest if longest else each.bytes / heaviest
        rows.append(
            (
                each.kind,
                "+".join(each.axes),
                _times(each.count, each.num_rows),
                size_text(each.bytes),
                size_text(each.wire_bytes),
                seconds_text(each.seconds) if longest else "",
                seconds_text(each.exposed_seconds) if longest else "",
                Bar(fraction=fraction, axes=each.axes),
                _expected_text(each),
            )
        )
    left = found[most:]
    rest = f"and {len(left)} more kinds: {size_text(sum(each.bytes for each in left))}" if left else ""
    titles = ("", "over", "times", "bytes a step", "on the wire", "time", "exposed", "", "in the plan")
    return Table(titles=titles, rows=tuple(rows), right=(2, 3, 4, 5, 6), rest=rest)


def _by_row(rows: Sequence[Row]) -> Table:
    """The costliest collectives in short: those of one size and purpose together, whatever leaf and pass they serve."""
    together: dict[Any, list[Row]] = {}
    for row in rows:
        key = (row.kind, row.axes, row.bytes, row.conditional, _purpose(row).partition(",")[0])
        together.setdefault(key, []).append(row)
    ordered = sorted(((group(each), each) for each in together.values()), key=lambda item: _cost(item[0]))
    cells = []
    for sums, members in ordered[:_FEW]:
        first = members[0]
        sources = list(dict.fromkeys(row.source.rpartition("/")[2] for row in members if row.source))
        source = sources[0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else "") if sources else ""
        cells.append(
            (
                *_timed(sums),
                _times(sums.count, len(members)),
                size_text(first.bytes),
                first.kind,
                "+".join(first.axes),
                _places([row.path for row in members]),
                source,
                _purpose(first).partition(",")[0],
            )
        )
    left = [sums for sums, _ in ordered[_FEW:]]
    rest = ""
    if left:
        number = sum(sums.num_rows for sums in left)
        times = seconds_text(sum(sums.seconds for sums in left))
        timed = f", {times}" if times != "0" else ""
        rest = f"and {number} more: {size_text(sum(sums.bytes for sums in left))}{timed}"
    titles = ("time", "exposed", "times", "bytes each", "", "over", "where", "source", "why")
    return Table(titles=titles, rows=tuple(cells), right=(0, 1, 2, 3), paths=(6, 7, 8), rest=rest)


def _every_row(rows: Sequence[Row]) -> Table:
    """All collectives, those of equal layers together, the costliest first."""
    keys = [(row.kind, row.axes, row.bytes, row.depth, row.expected, row.source, row.conditional) for row in rows]
    folded = fold([row.path for row in rows], keys)
    together = [(name, [rows[index] for index in members]) for name, members in folded]
    ordered = sorted(((group(each), name, each) for name, each in together), key=lambda item: _cost(item[0]))
    cells = []
    for sums, name, members in ordered:
        first = members[0]
        cells.append(
            (
                *_timed(sums),
                _times(sums.count, len(members)),
                size_text(first.bytes),
                first.kind + ("" if first.spelling == first.kind else f" ({first.spelling})"),
                "+".join(first.axes),
                name or first.name,
                first.source,
                _purpose(first),
                first.algorithm,
                str(first.depth) + (", in a branch" if first.conditional else ""),
            )
        )
    titles = ("time", "exposed", "times", "bytes each", "", "over", "where", "source", "why", "algorithm", "loops")
    return Table(titles=titles, rows=tuple(cells), right=(0, 1, 2, 3))


def _timed(sums: Group) -> tuple[str, str]:
    return (seconds_text(sums.seconds), seconds_text(sums.exposed_seconds)) if sums.seconds else ("", "")


def _purpose(row: Row) -> str:
    return "" if row.expected is None else row.expected or "not in the plan"


def _places(paths: Sequence[str]) -> str:
    """Paths as one: layers folded, and what differs in braces: `blocks.[0-79].attn.{q,k}.kernel`."""
    folded = [name for name, _ in fold(paths, [None] * len(paths)) if name]
    if len(folded) < 2:
        return "".join(folded)
    parts = [name.split(".") for name in folded]
    start = _common(parts)
    end = _common([list(reversed(part[start:])) for part in parts])
    names = [".".join(part[start : len(part) - end]) for part in parts]
    if not start and not end:
        return f"{folded[0]}, and {len(folded) - 1} more"
    middle = "{" + ",".join(names) + "}" if all(names) else "*"
    return ".".join([*parts[0][:start], middle, *parts[0][len(parts[0]) - end :]])


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many first words all have in common."""
    for place, words in enumerate(zip(*parts, strict=False)):
        if len(set(words)) > 1:
            return place
    return min(map(len, parts))


def _unexpected(rows: Sequence[Row]) -> str:
    sums = sorted(_groups_of(rows), key=_cost)
    told = [f"{each.kind} over {'+'.join(each.axes)} {size_text(each.bytes)}" for each in sums[:2]]
    more = [f"{len(sums) - 2} more kinds"] if len(sums) > 2 else []
    return ", ".join([*told, *more])


def _groups_of(rows: Iterable[Row]) -> list[Group]:
    together: dict[Any, list[Row]] = {}
    for row in rows:
        together.setdefault((row.kind, row.axes), []).append(row)
    return [group(each) for each in together.values()]


def _cost(each: Group) -> tuple[float, float, int]:
    """What costs most first: waiting, then transfers, then bytes."""
    waited, seconds = (number if math.isfinite(number) else 0.0 for number in (each.exposed_seconds, each.seconds))
    return -waited, -seconds, -each.bytes


def _flops(report: "Report", whole: bool) -> Part:
    flops = report.flops
    if flops is None:
        return Part(name="flops", title="FLOPs", lead="not counted")
    again = flops.hardware - flops.model
    lead = f"{flops_text(flops.hardware)} a step over all devices"
    if again > 0:
        lead += f", of which {flops_text(again)} ({share_text(again, flops.hardware)}) is recomputation"
    notes = [f"model FLOPs {flops_text(flops.model)}, causal attention in full"]
    if flops.model_causal != flops.model:
        notes[0] += f"; {flops_text(flops.model_causal)} without what the mask throws away"
    if flops.by_dtype:
        shares = (f"{dtype} {share_text(number, flops.hardware)}" for dtype, number in flops.by_dtype)
        notes.append(f"operands {', '.join(shares)}")
    if flops.origin != "jaxpr":
        notes.append("counted in the compiled program, where not all recomputation can be told apart")
    folded = _folded_sums([path for path, _ in flops.by_path], [number for _, number in flops.by_path])
    most = len(folded) if whole else _FEW
    rows = tuple(
        (
            name or "not named",
            flops_text(number),
            share_text(number, flops.hardware),
            Bar(fraction=number / flops.hardware),
        )
        for name, number, _ in folded[:most]
    )
    left = folded[most:]
    total = sum(number for _, number, _ in left)
    rest = f"and {len(left)} more: {flops_text(total)}, {share_text(total, flops.hardware)}" if left else ""
    table = Table(titles=("where", "FLOPs", "share", ""), rows=rows, right=(1, 2), paths=(0,), rest=rest)
    return Part(name="flops", title="FLOPs", lead=lead, tables=(table,) if rows else (), notes=tuple(notes))


def _time(report: "Report", whole: bool) -> Part:
    line = report.timeline
    if line is None:
        return Part(name="time", title="Time", lead=why_no_time(report))
    parts = [("compute", line.compute_seconds), ("exposed communication", line.exposed_communication_seconds)]
    parts += [("bubble", line.bubble_seconds)] if line.bubble_seconds else []
    told = ", ".join(f"{name} {seconds_text(each)} ({share_text(each, line.step_seconds)})" for name, each in parts)
    lead = f"{seconds_text(line.step_seconds)} a step: {told}"
    tables = []
    busiest = _busiest(line)
    if busiest:
        most = len(busiest) if whole else _FEW
        longest = busiest[0][1]
        rows = tuple(
            (seconds_text(each), share_text(each, line.step_seconds), Bar(fraction=each / longest), count, name, path)
            for (name, path), each, count in busiest[:most]
        )
        left = sum(each for _, each, _ in busiest[most:])
        rest = f"and {len(busiest) - most} more: {seconds_text(left)}" if len(busiest) > most else ""
        titles = ("computing", "share", "", "times", "what", "where")
        tables.append(Table(titles=titles, rows=rows, right=(0, 1, 3), paths=(5,), rest=rest))
    notes = [*([_reckoning(line)] if line.ops else []), *line.notes]
    return Part(name="time", title="Time", lead=lead, tables=tuple(tables), notes=tuple(notes))


def _pipeline(report: "Report", whole: bool) -> Part:
    del whole  # it is short
    found = report.pipeline
    if found is None:
        return Part(name="pipeline", title="Pipeline", lead="no stages")
    ring = found.slots * found.slot_bytes
    lead = (
        f"{found.schedule}, over {found.axis}: bubble {share_text(found.bubble, 1)} of the ticks; a stage sends "
        f"{size_text(found.sent_bytes)} a step and sets {size_text(ring)} aside for inputs"
    )
    rows = tuple(
        (
            f"stage {stage}",
            number_text(used),
            size_text(used * found.slot_bytes),
            Bar(fraction=used / max(found.slots, 1)),
        )
        for stage, used in enumerate(found.held)
    )
    table = Table(titles=("", "inputs held at once", "bytes", f"of {found.slots}"), rows=rows, right=(1, 2))
    return Part(name="pipeline", title="Pipeline", lead=lead, tables=(table,))


def _busiest(line: Timeline) -> list[tuple[tuple[str, str], float, str]]:
    """Where the device computes longest: `((what, where), seconds, times)`, equal layers together."""
    events = [event for event in line.events if event.lane == "compute"]
    found = []
    for name, members in fold([event.path for event in events], [event.name for event in events]):
        chosen = [events[index] for index in members]
        count = number_text(sum(event.count for event in chosen))
        found.append(((chosen[0].name, name), sum(event.seconds for event in chosen), count))
    return sorted(found, key=lambda item: -item[1])


def _reckoning(line: Timeline) -> str:
    """By which reckoning the seconds of computation come."""
    words = {"cycles": "the compiler's cycles", "roofline": "a roofline", "kernel": "the FLOPs of custom kernels"}
    seconds: collections.Counter[str] = collections.Counter()
    for op in line.ops:
        if op.origin in words and op.seconds == op.seconds:
            seconds[op.origin] += op.seconds * op.count  # pyright: ignore[reportArgumentType]  # typeshed: int values
    whole = sum(seconds.values())
    told = ", ".join(f"{words[origin]} {share_text(each, whole)}" for origin, each in seconds.most_common())
    return f"times of computation by {told}" if told else "no operation takes time"


def _findings(report: "Report", whole: bool) -> Part:
    found = report.findings
    if not found:
        return Part(name="findings", title="Findings", lead="none")
    counts = collections.Counter(each.severity for each in found)
    names = {"error": "errors", "warning": "warnings", "note": "notes"}
    lead = ", ".join(f"{counts[each]} {each if counts[each] == 1 else names[each]}" for each in names if counts[each])
    together: dict[Any, list[Finding]] = {}
    for each in found:
        together.setdefault((each.severity, each.kind, "" if not whole else each), []).append(each)
    chosen = list(together.values())
    most = len(chosen) if whole else _FEW
    rows = []
    for same in chosen[:most]:
        first = same[0]
        seconds, size = sum(each.seconds for each in same), sum(each.bytes for each in same)
        cost = [seconds_text(seconds)] if seconds else []
        cost += [size_text(size)] if size else []
        place = first.place + (f" and {len(same) - 1} more places" if len(same) > 1 else "")
        rows.append((first.severity, first.kind, ", ".join(cost), place, first.reason, first.remedy))
    number = sum(map(len, chosen[most:]))
    titles = ("severity", "finding", "costs", "place", "reason", "remedy")
    table = Table(titles=titles, rows=tuple(rows), rest=f"and {number} more" if number else "")
    return Part(name="findings", title="Findings", lead=lead, tables=(table,))


PARTS: dict[str, Callable[["Report", bool], Part]] = {
    "time": _time,
    "pipeline": _pipeline,
    "memory": _memory,
    "collectives": _collectives,
    "flops": _flops,
    "findings": _findings,
}


def _folded_sums(paths: Sequence[str], numbers: Sequence[Any]) -> list[tuple[str, Any, int]]:
    """Sums of `numbers` by path, those of all layers together, the largest first: `(name, sum, how many)`."""
    folded = [
        (name, sum(numbers[index] for index in members), len(members))
        for name, members in fold(paths, [None] * len(paths))
    ]
    return sorted(folded, key=lambda item: -item[1])


def _of_limit(peak: int, limit: int) -> str:
    if not limit:
        return size_text(peak)
    over = f", {size_text(peak - limit)} too much" if peak > limit else ""
    return f"{size_text(peak)} of {size_text(limit)} ({share_text(peak, limit)}{over})"


def _expected_text(each: Group) -> str:
    if each.num_unexpected is None:
        return ""
    if not each.num_unexpected:
        return "yes"
    return "no" if each.num_unexpected == each.num_rows else f"all but {each.num_unexpected} of {each.num_rows}"


def _ran(rows: Sequence[Row]) -> str:
    known = all(row.count is not None for row in rows)
    return f"{'' if known else '≥ '}{sum(map(runs, rows)):,}"


def _times(count: int | None, at_least: int) -> str:
    return f"≥ {at_least:,}" if count is None else f"{count:,}"
