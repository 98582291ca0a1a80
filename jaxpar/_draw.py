"""`plan.draw()`: which device holds which tile of a leaf, between steps and where it is used, and what moves between.

    ┌──────┬──────┐
    │ 0, 4 │ 1, 5 │   rows cut by fsdp, columns by tensor,
    ├──────┼──────┤   and a copy for each part of data
    │ 2, 6 │ 3, 7 │
    └──────┴──────┘

Colours mark axes and are the same in every picture. The tile of the first device is filled, so that the eye can follow
one device from form to form. A picture is text, SVG and HTML by itself, and PNG where matplotlib is.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from . import _draw_grid as grids, _draw_scene as scenes, _palette
from ._context import axes_at
from ._draw_grid import Cut, Grid, Side
from ._draw_scene import INK, Area, Label, Line, Scene, Shape, beside, box, words
from ._draw_sheet import SMALL, sheet
from ._drawing import Drawing
from ._plan import Move, Plan, Record
from ._plan_text import bytes_text, fold, move_text, spec_text

_MOST_LEAVES = 4
_MOST_ROWS, _MOST_COLUMNS = 16, 10

_FORMS = (("storage", "stored"), ("compute", "used"), ("gradient", "gradient"), ("slots", "optimiser state"))


def draw(plan: Plan, path: str | None = None) -> Drawing:
    r"""A picture of one leaf of `plan`, or of its mesh and its largest leaves.

    Args:
        plan: Any plan; of a model and a mesh of any size.
        path: The leaf; equal leaves of other layers lie the same way.

    Raises:
        ShardingError: The plan has no such leaf.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=2, fsdp=4), [jp.DP(), jp.FSDP()])
        >>> print("\n".join(str(plan.draw("w")).splitlines()[8:]))
        w  float32 64×64, 16.0 KiB
          stored, gradient, optimiser state: [fsdp, -]  4.0 KiB a device
            rows 64 = fsdp 4 × 16, columns 64
            ┌──────┐
            │ 0, 4 │
            ├──────┤
            │ 1, 5 │
            ├──────┤
            │ 2, 6 │
            ├──────┤
            │ 3, 7 │
            └──────┘
            2 copies: data 2
          used: whole  16.0 KiB a device
            rows 64, columns 64
            ┌─────┐
            │ 0–7 │
            └─────┘
            8 copies: data 2 × fsdp 4
          all-gather weight over fsdp 16.0 KiB, forward pass
          reduce-scatter gradient over fsdp 16.0 KiB, backward pass
          all-reduce gradient over data 4.0 KiB, after the backward pass
    """
    leaves = [_Leaf(path, plan.find(path), 1)] if path is not None else _largest(plan)
    hardware = plan.hardware.partition(",")[0] or f"{plan.num_devices} devices"
    mesh = draw_mesh(plan)
    lines, pictures = [f"mesh  {hardware}", *_indented(mesh.text.splitlines())], []
    for leaf in leaves:
        lines += ["", *_leaf_text(plan, leaf)]
        pictures.append(_leaf_scene(plan, leaf, with_moves=path is not None))
    rest = _rest(plan, leaves) if path is None else ""
    if rest:
        lines += ["", rest]
        pictures.append(words(rest, size=SMALL, opacity=0.75))
    title = [words("mesh", size=12, bold=True), words(hardware, size=SMALL, opacity=0.75)]
    overview = scenes.above([scenes.above([scenes.above(title, 1), mesh.scene], 8), _held(plan)], 2)
    scene = beside([overview, scenes.above(pictures, 22)], 44)
    return Drawing("\n".join(lines), scenes.framed(scene, 14))


def draw_mesh(plan: Plan) -> Drawing:
    """The devices of a plan's mesh as a matrix, and which colour is which axis."""
    mesh, hues = _mesh_grid(plan), _palette.hues(plan.axes)
    lines = [_sides_text(mesh), *grids.as_text(mesh)]
    return Drawing("\n".join(lines), scenes.above([sheet(mesh, hues), _legend(plan, hues)], 8))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Leaves that lie alike: their name, the record of one, and how many they are."""

    name: str
    record: Record
    count: int


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One form of a leaf: which of its four specs have it, and its tiles."""

    fields: tuple[str, ...]
    title: str
    note: str
    grid: Grid


def _largest(plan: Plan) -> list[_Leaf]:
    """The leaves that weigh most, those of one layout together; vectors only where there are no matrices."""
    records = list(plan.parameters) or list(plan.records.values())
    keys = [_layout(record) for record in records]
    together: dict[Any, list[tuple[str, list[int]]]] = {}
    for name, members in fold([record.path for record in records], keys):
        together.setdefault(keys[members[0]], []).append((name, members))
    leaves = []
    for groups in together.values():
        names, members = [name for name, _ in groups], [index for _, each in groups for index in each]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        leaves.append(_Leaf(", ".join(names[:2]) + more, records[members[0]], len(members)))
    matrices = [leaf for leaf in leaves if len(leaf.record.shape) - leaf.record.layers > 1]
    return sorted(matrices or leaves, key=lambda leaf: -leaf.record.num_bytes * leaf.count)[:_MOST_LEAVES]


def _layout(record: Record) -> Any:
    """What leaves that lie alike have in common."""
    forms = (record.storage, record.compute, record.gradient, record.slots)
    return record.shape, str(record.dtype), record.slot, forms, str(record.compute_dtype), record.layers, record.remat


def _rest(plan: Plan, leaves: Sequence[_Leaf]) -> str:
    """How much of the model is not drawn."""
    everything = list(plan.parameters) or list(plan.records.values())
    number = len(everything) - sum(leaf.count for leaf in leaves)
    if not number:
        return ""
    total = sum(record.num_bytes for record in everything)
    drawn = sum(leaf.record.num_bytes * leaf.count for leaf in leaves)
    share = f"{100 * (total - drawn) / max(total, 1):.1f}% of the bytes"
    return f"and {number} smaller leaves, {share}: plan.draw(path) draws any"


def _mesh_grid(plan: Plan) -> Grid:
    """The mesh as a matrix of devices: outer axes from top to bottom, inner ones from left to right."""
    cuts = [(axis, size) for axis, size in plan.axes.items() if size > 1]
    rows, columns = cuts[: len(cuts) // 2 + len(cuts) % 2], cuts[len(cuts) // 2 + len(cuts) % 2 :]
    if len(cuts) == 1:
        rows, columns = [], cuts

    def side(cuts: Sequence[Cut], most: int) -> Side:
        plain = Side(caption=" × ".join(f"{axis} {size}" for axis, size in cuts), cuts=tuple(cuts), most=most)
        return dataclasses.replace(plain, length=len(plain.parts()))

    return Grid(
        rows=side(rows, _MOST_ROWS),
        columns=side(columns, _MOST_COLUMNS),
        copies=(),
        ids=_ids(plan),
        axes=tuple(plan.axes),
    )


def _panels(plan: Plan, record: Record) -> list[_Panel]:
    """The forms of a leaf, equal ones together."""
    wanted = {"parameter": _FORMS, "frozen": _FORMS[:2]}.get(record.slot, _FORMS[:1])
    together: dict[PartitionSpec, list[str]] = {}
    for field, _ in wanted:
        together.setdefault(getattr(record, field), []).append(field)
    panels = []
    for spec, fields in together.items():
        title = ", ".join(name for field, name in wanted if field in fields)
        panels.append(
            _Panel(tuple(fields), title, _panel_note(plan, record, spec, fields), _leaf_grid(plan, record, spec))
        )
    return panels


def _panel_note(plan: Plan, record: Record, spec: PartitionSpec, fields: Sequence[str]) -> str:
    """A form's spec, and what it takes of a device."""
    text = spec_text(spec, len(record.shape))
    local = math.prod(plan.local_shape(record.shape, spec))
    if "storage" in fields or "gradient" in fields:
        return f"{text}  {bytes_text(local * record.dtype.itemsize)} a device"
    if "compute" in fields:
        layers = math.prod(plan.local_shape(record.shape, spec)[: record.layers])
        each = bytes_text(local // max(layers, 1) * np.dtype(record.compute_dtype).itemsize)
        return f"{text}  {each} a device" + (", a layer at a time" if record.layers else "")
    return text


def _leaf_grid(plan: Plan, record: Record, spec: PartitionSpec) -> Grid:
    """The tiles of a leaf."""
    shape, cuts, chosen = record.shape[record.layers :], _cuts(plan, record, spec), _drawn_dims(plan, record)
    rows, columns = (chosen[:-1], chosen[-1:]) if len(chosen) > 1 else ([], chosen)
    stages = tuple(axis for entry in tuple(spec)[: record.layers] for axis in axes_at(entry))
    used = {*(axis for each in cuts for axis, _ in each), *stages}
    copies = tuple((axis, size) for axis, size in plan.axes.items() if axis not in used and size > 1)

    def side(dims: Sequence[int], most: int) -> Side:
        captions = [_caption(shape[dim], cuts[dim]) for dim in dims]
        length = math.prod(shape[dim] for dim in dims)
        return Side(caption=" · ".join(captions), cuts=sum((cuts[dim] for dim in dims), ()), most=most, length=length)

    return Grid(
        rows=side(rows, _MOST_ROWS),
        columns=side(columns, _MOST_COLUMNS),
        copies=copies,
        first=stages,
        ids=_ids(plan),
        axes=tuple(plan.axes),
    )


def _cuts(plan: Plan, record: Record, spec: PartitionSpec) -> list[tuple[Cut, ...]]:
    """What cuts each dim of one layer."""
    entries = [axes_at(entry) for entry in spec] + [()] * (len(record.shape) - len(spec))
    return [
        tuple((axis, plan.axes[axis]) for axis in entry if plan.axes[axis] > 1) for entry in entries[record.layers :]
    ]


def _drawn_dims(plan: Plan, record: Record) -> list[int]:
    """The dims that are drawn, the last one from left to right: two, those that are cut first, then the longest."""
    specs = [_cuts(plan, record, getattr(record, field)) for field, _ in _FORMS]
    is_cut = [any(cuts) for cuts in zip(*specs, strict=True)]
    shape = record.shape[record.layers :]
    by_need = sorted(range(len(shape)), key=lambda dim: (not is_cut[dim], -shape[dim]))
    return sorted(by_need[: max(2, sum(is_cut))])


def _caption(size: int, cuts: Sequence[Cut]) -> str:
    if not cuts:
        return str(size)
    left = size // math.prod(number for _, number in cuts)
    return f"{size} = {' × '.join(f'{axis} {number}' for axis, number in cuts)} × {left}"


def _ids(plan: Plan) -> np.ndarray:
    """The number of each device, in the shape of the mesh; counted where the devices are not here."""
    mesh = getattr(plan, "mesh", None)
    if isinstance(mesh, Mesh):
        return np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
    return np.arange(plan.num_devices).reshape(tuple(plan.axes.values()))


def _title_note(plan: Plan, leaf: _Leaf) -> str:
    """What a leaf is: dtype, shape, size; which of its dims are drawn; how many there are."""
    record = leaf.record
    shape = record.shape[record.layers :]
    notes = [f"{record.dtype} {'×'.join(map(str, shape)) or 'scalar'}"]
    if record.layers:
        number = math.prod(record.shape[: record.layers])
        stages = [axis for entry in tuple(record.storage)[: record.layers] for axis in axes_at(entry)]
        notes.append(f"{number} layers stacked, one is drawn" + (f", on the first of {stages[0]}" if stages else ""))
    if leaf.count > 1:
        notes.append(f"{leaf.count} of these, {bytes_text(record.num_bytes)} each")
    else:
        notes.append(bytes_text(record.num_bytes))
    drawn = _drawn_dims(plan, record)
    if len(drawn) < len(shape):
        notes.append(f"drawn: dims {' and '.join(str(record.layers + dim) for dim in drawn)}")
    return ", ".join(notes)


def _leaf_text(plan: Plan, leaf: _Leaf) -> list[str]:
    lines = [f"{leaf.name}  {_title_note(plan, leaf)}"]
    for panel in _panels(plan, leaf.record):
        grid = panel.grid
        lines.append(f"  {panel.title}: {panel.note}")
        lines += _indented([_sides_text(grid), *grids.as_text(grid)])
        lines += _indented([grid.copies_text()] if grid.copies else [])
    return [*lines, *(f"  {text}" for text in _moves_text(plan, leaf))]


def _sides_text(grid: Grid) -> str:
    if not grid.rows.caption:
        return grid.columns.caption or "one element"
    return f"rows {grid.rows.caption}, columns {grid.columns.caption}"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _moves_text(plan: Plan, leaf: _Leaf) -> list[str]:
    return [f"{move_text(move, 1)}, {move.when}" for move in plan.moves(leaf.record)]


def _leaf_scene(plan: Plan, leaf: _Leaf, *, with_moves: bool) -> Scene:
    """A leaf's forms from left to right, what moves between neighbours as arrows between them."""
    hues = _palette.hues(plan.axes)
    panels, moves = _panels(plan, leaf.record), plan.moves(leaf.record)
    drawn = [_panel_scene(panel, hues) for panel in panels]
    middle = max(scene.height for scene in drawn)
    pieces = drawn[:1]
    for (left, right), scene in zip(itertools.pairwise(panels), drawn[1:], strict=True):
        arrows = _arrows(left, right, moves, hues)
        pieces += [Scene(arrows.width, middle, arrows.at(0, max(middle - arrows.height, 0) / 2 + 10)), scene]
    lines = [words(leaf.name, size=12, bold=True), words(_title_note(plan, leaf), size=SMALL, opacity=0.75)]
    body = [scenes.above(lines, 1), beside(pieces, 14)]
    if with_moves and moves:
        told = [words(f"{move_text(move, 1)}, {move.when}", size=SMALL) for move in moves]
        marks = [beside([_swatches(move.axes, hues), line], 6) for move, line in zip(moves, told, strict=True)]
        body.append(scenes.above([words("In a step:", size=SMALL, bold=True), *marks], 2))
    return scenes.above(body, 8)


def _panel_scene(panel: _Panel, hues: dict[str, str]) -> Scene:
    head = [words(panel.title, bold=True), words(panel.note, size=SMALL, opacity=0.75)]
    return scenes.above([scenes.above(head, 1), sheet(panel.grid, hues)], 5)


def _arrows(left: _Panel, right: _Panel, moves: Sequence[Move], hues: dict[str, str]) -> Scene:
    """The moves between two forms: from left to right, or back."""
    chosen: list[tuple[Move, bool]] = []
    seen = set()
    for move in moves:
        key = (move.what, move.kind, move.axes)
        way = next((back for back in (False, True) if _leads(move, *((right, left) if back else (left, right)))), None)
        if way is not None and key not in seen:
            seen.add(key)
            chosen.append((move, way))
    width = max((_arrow_width(move) for move, _ in chosen), default=16)
    return scenes.above([_arrow(move, hues, width, back=back) for move, back in chosen], 10)


def _leads(move: Move, start: _Panel, end: _Panel) -> bool:
    """Whether `move` makes the form `end` of the form `start`."""
    pairs = {
        "weight": [("storage", "compute")],
        "gradient": [("compute", "gradient")],
        "update": [("slots", "storage")],
    }
    if move.kind == "reduce-scatter":  # cut by its axes after it: in gradients, or only where the update is made
        cuts = {axis for side in (end.grid.rows, end.grid.columns) for axis, _ in side.cuts}
        pairs["gradient"] = [("compute", "gradient"), ("gradient", "slots")] if cuts.issuperset(move.axes) else []
    return any(a in start.fields and b in end.fields for a, b in pairs.get(move.what, []))


def _arrow_texts(move: Move) -> tuple[str, str]:
    return f"{move.kind} {move.what}", f"over {', '.join(move.axes)}: {bytes_text(move.bytes)}"


def _arrow_width(move: Move) -> float:
    return max(scenes.text_width(text, SMALL) for text in _arrow_texts(move)) + 8


def _arrow(move: Move, hues: dict[str, str], width: float, *, back: bool) -> Scene:
    over, under = _arrow_texts(move)
    start, end, tip = (10.0, width, 0.0) if back else (0.0, width - 10, width)
    step = (end - start) / len(move.axes)
    shapes: list[Shape] = [Label(at=(width / 2, 10), text=over, size=SMALL, anchor="middle")]
    for place, axis in enumerate(move.axes):
        x = start + place * step
        shapes.append(Line(points=((x, 20), (x + step, 20)), color=hues[axis], width=3))
    base, hue = (start, hues[move.axes[0]]) if back else (end, hues[move.axes[-1]])
    shapes.append(Area(points=((base, 14), (tip, 20), (base, 26)), fill=hue))
    shapes.append(Label(at=(width / 2, 37), text=under, size=SMALL, anchor="middle"))
    return Scene(width, 40, tuple(shapes))


def _swatches(axes: Sequence[str], hues: dict[str, str]) -> Scene:
    return beside([Scene(10, 14, (box(0, 2, 10, 10, fill=hues[axis]),)) for axis in axes], 2)


def _legend(plan: Plan, hues: dict[str, str]) -> Scene:
    """Which colour is which axis."""
    lines = [
        beside([_swatches([axis], hues), words(f"{axis} {size}", size=SMALL)], 6)
        for axis, size in plan.axes.items()
        if size > 1
    ]
    return scenes.above(lines, 2)


def _held(plan: Plan) -> Scene:
    """What is filled."""
    filled = Scene(10, 14, (box(0, 2, 10, 10, fill=INK, opacity=0.3),))
    first = int(np.ravel(_ids(plan))[0])
    return beside([filled, words(f"held by device {first}", size=SMALL)], 6)
