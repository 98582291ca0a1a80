"""A plan as text: its table, with equal layers folded, and the life of one leaf."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ._context import axes_at
from ._sequence import meetings

if TYPE_CHECKING:
    from ._plan import Move, Plan, Record


def spec_text(spec: PartitionSpec, ndim: int) -> str:
    """A spec with one entry a dim: `[fsdp, -]`; `whole` if no dim is split."""
    entries = [axes_at(entry) for entry in spec] + [()] * (ndim - len(spec))
    if not any(entries):
        return "whole"
    return "[" + ", ".join("+".join(axes) or "-" for axes in entries) + "]"


def bytes_text(number: float) -> str:
    """A byte count for people: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError  # the loop returns


def fold(paths: Sequence[str], keys: Sequence[Any]) -> list[tuple[str, list[int]]]:
    """Paths that differ only in layer numbers and have equal keys, as one: `blocks.[0-3].q` with its members."""
    groups: dict[tuple[str, Any], list[int]] = {}
    for index, (path, key) in enumerate(zip(paths, keys, strict=True)):
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "#", path), key), []).append(index)
    folded = []
    for (pattern, _), members in groups.items():
        numbers = [[int(part) for part in paths[index].split(".") if part.isdigit()] for index in members]
        places = [sorted(set(place)) for place in zip(*numbers, strict=True)]
        if len(members) == 1 or len(members) < math.prod(map(len, places)):  # not all of a.[0-1].b.[0-1] are there
            folded += [(paths[index], [index]) for index in members]
            continue
        name = pattern
        for place in places:
            name = name.replace("#", _ranges(place), 1)
        folded.append((name, members))
    return folded


def table(plan: "Plan") -> str:
    """A row a leaf (equal layers folded): shape, spec, bytes per device, who decided and why, what moves a step."""
    return "\n".join(
        [*head_text(plan), "", columns(rows(plan)), "", *totals_text(plan), *(f"note: {note}" for note in plan.notes)]
    )


def head_text(plan: "Plan") -> list[str]:
    """What a plan is for: hardware, axes, strategies, the batch."""
    return [
        *([plan.hardware] if plan.hardware else []),
        "strategies " + (", ".join(plan.strategies) or "none"),
        *(f"inactive: {label}, {why}" for label, why in plan.inactive),
        f"batch over {'+'.join(plan.batch_axes) or 'no axis'}",
    ]


def rows(plan: "Plan") -> list[tuple[str, ...]]:
    """The table of a plan, its titles first."""
    records = list(plan.records.values())
    rows = [("path", "shape", "spec", "per device", "decided by", "moves a step")]
    keys = [dataclasses.replace(record, path="") for record in records]
    for name, members in fold([record.path for record in records], keys):
        record, count = records[members[0]], len(members)
        size = plan.local_bytes(record) * count
        rows.append(
            (
                name,
                f"{record.dtype} {'x'.join(map(str, record.shape)) or 'scalar'}",
                spec_text(record.storage, len(record.shape)),
                bytes_text(size),
                decided_by(record),
                "; ".join(_moves_text(plan.moves(record), count)) or "-",
            )
        )
    return rows


def decided_by(record: "Record") -> str:
    """Who decided on a leaf's spec, and why."""
    if record.slot not in ("parameter", "frozen", "optimizer"):
        return f"{record.slot}: the same on every device"
    text = "; ".join(f"{by}: {why}" for by, why in record.reasons)
    frozen = "frozen; " if record.slot == "frozen" else ""
    return frozen + (text or "whole: no strategy splits it")


def totals_text(plan: "Plan") -> list[str]:
    """The plan's totals per device, and the price of each way to accumulate."""
    totals = plan.totals()
    optimizer = "unknown (give jp.plan an optimizer)" if totals.optimizer is None else bytes_text(totals.optimizer)
    trained = f", {totals.num_trainable:,} trained" if totals.num_trainable != totals.num_parameters else ""
    shares = (
        f"per device: parameters {bytes_text(totals.parameters)}, gradients {bytes_text(totals.gradients)}, "
        f"optimiser {optimizer}, other {bytes_text(totals.other)}; together {bytes_text(totals.total)}"
    )
    lines = [f"{totals.num_parameters:,} parameters{trained}", shares]
    sharded = [
        axis
        for axis in plan.batch_axes
        if any(axis in _axes(record.gradient) and axis not in _axes(record.compute) for record in plan.parameters)
    ]
    if sharded:
        whole = sum(
            math.prod(plan.local_shape(record.shape, record.compute)) * record.dtype.itemsize
            for record in plan.parameters
            if record.slot == "parameter"
        )
        names = "+".join(sharded)
        chosen = "microbatch" if plan.shards else "step"
        lines.append(
            f'accumulation over {names}: reduce="microbatch" holds {bytes_text(totals.gradients)} of gradients and '
            f'reduces every microbatch; reduce="step" holds {bytes_text(whole)} and reduces once a step; '
            f'this plan: "{chosen}"'
        )
    return lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """One leaf's life in a step: `moves` as data, and the whole story as text."""

    path: str
    moves: tuple["Move", ...]
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from . import _plan_html

        return {"text/plain": self.text, "text/html": _plan_html.life(self)}


def follow(plan: "Plan", record: "Record") -> Life:
    """The life of the leaf of `record`: stored, gathered, used, reduced, updated."""
    moves = plan.moves(record)
    ndim = len(record.shape)
    stored = f"{spec_text(record.storage, ndim)}: {bytes_text(plan.local_bytes(record))} a device"
    lines = [
        f"{record.path}  {record.dtype} {record.shape}, {bytes_text(record.num_bytes)}",
        f"  stored    {stored} ({decided_by(record)})",
    ]
    lines += [f"  gathered  {move_text(move, 1)}, {move.when}" for move in moves if move.what == "weight"]
    if record.slot in ("parameter", "frozen"):
        layer = ", one layer at a time" if record.layers else ""
        lines.append(f"  used      {spec_text(record.compute, ndim)} as {record.compute_dtype}{layer}")
    lines += [
        f"  {'sent  ' if move.kind == 'all-to-all' else 'summed'}    {move_text(move, 1)}, {move.when}"
        for move in moves
        if move.what == "activation"
    ]
    if record.slot == "parameter":
        reduced = [move for move in moves if move.what == "gradient"]
        lines += [f"  reduced   {move_text(move, 1)}, {move.when}" for move in reduced]
        if not reduced:
            lines.append("  reduced   not: every device has the whole gradient of its piece")
        lines.append(f"  updated   {spec_text(record.slots, ndim)}, with its optimiser state")
        lines += [f"  collected {move_text(move, 1)}, {move.when}" for move in moves if move.what == "update"]
    return Life(path=record.path, moves=moves, text="\n".join(lines))


def follow_attention(plan: "Plan") -> Life:
    """How the parts of split sequences meet, forward and backward; a block that is computed again does it again."""
    from ._plan import Move

    split = plan.context
    if split is None:
        return Life(path="attention", moves=(), text="attention  of whole sequences: nothing moves")
    read = [record.compute_dtype for record in plan.parameters if jnp.issubdtype(record.compute_dtype, jnp.inexact)]
    size = min((dtype.itemsize for dtype in map(np.dtype, read)), default=4)
    order = "in zigzag order" if split.zigzag else "in its own order"
    lines, moves = [f"attention  {split.method} over {split.axis}={split.size}, {order}"], []
    for meeting in meetings(split):
        when = "backward" if meeting.backward else "forward"
        move = Move(
            what="activation",
            kind=meeting.kind,
            axes=(split.axis,),
            bytes=meeting.bytes_of(size),
            times=meeting.times,
            when=f"{when} pass, {meeting.what}",
        )
        moves.append(move)
        lines.append(
            f"  sent      {move.kind} {meeting.what} over {split.axis}, {bytes_text(move.bytes)} a token and feature "
            f"x{move.times}, {when}"
        )
    return Life(path="attention", moves=tuple(moves), text="\n".join(lines))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in aligned columns, a rule under the first."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def move_text(move: "Move", count: int) -> str:
    """A move in words, for `count` equal leaves: `all-gather weight over fsdp 8.0 KiB x4`."""
    times = move.times * count
    per = " a choice of a token" if move.kind == "all-to-all" else " a token" if move.per_token else ""
    size = bytes_text(move.bytes) + per
    return f"{move.kind} {move.what} over {'+'.join(move.axes)} {size}" + (f" x{times}" if times > 1 else "")


def _moves_text(moves: Sequence["Move"], count: int) -> list[str]:
    """Moves in words, equal ones together: a gather for the forward pass and one for the backward pass are two."""
    together: dict[Any, list[Move]] = {}
    for move in moves:
        together.setdefault((move.kind, move.what, move.axes, move.bytes), []).append(move)
    return [move_text(same[0], count * sum(move.times for move in same) // same[0].times) for same in together.values()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"[{numbers[0]}-{numbers[-1]}]"
    return "[" + ",".join(map(str, numbers)) + "]"


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in axes_at(entry)}
