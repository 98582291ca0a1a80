"""Schedules as CSV: a row for each tick, a column for each stage, a cell for what runs there.

tick,stage 0,stage 1
0,F0,
1,F1,F0 B0
2,B0,F1 B1
3,B1,
"""

import csv
import io
import re

from .._errors import ShardingError, listed
from ._table import KINDS, Cell, Op, Table

_LETTERS = "".join(KINDS)
_OP = re.compile(rf"([{_LETTERS}])(\d+)(?:\.(\d+))?")


def to_csv(table: Table) -> str:
    """The text of a table."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["tick", *(f"stage {stage}" for stage in range(table.stages))])
    for tick, row in enumerate(table.cells):
        writer.writerow([tick, *(" ".join(map(str, cell)) for cell in row)])
    return file.getvalue()


def from_csv(text: str, name: str) -> Table:
    """The table of a text; that it can be run is for `check` to say.

    Args:
        text: As `to_csv` writes it. Blank lines are skipped.
        name: Where it came from, for messages.

    Raises:
        ShardingError: Every line that is not of this form.
    """
    rows = [(line, row) for line, row in enumerate(csv.reader(io.StringIO(text)), 1) if any(map(str.strip, row))]
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    wanted = ["tick", *(f"stage {stage}" for stage in range(max(len(header) - 1, 1)))]
    if header != wanted:
        raise ShardingError(
            f"{name}: the first line is {','.join(header)!r}. It names the columns, one for each stage: "
            f"{','.join(wanted)!r}."
        )
    problems: list[str] = []
    cells = []
    for tick, (line, row) in enumerate(rows[1:]):
        if row[0].strip() != str(tick):
            problems.append(f"line {line}: tick {row[0].strip()!r} where tick {tick} is next. Ticks count from 0.")
        if len(row) != len(header):
            problems.append(f"line {line}: {len(row)} columns, but the first line has {len(header)}.")
        cells.append(tuple(_cell(cell, f"line {line}, stage {stage}", problems) for stage, cell in enumerate(row[1:])))
    if problems:
        raise ShardingError("\n".join([f"{name}: this is not a schedule.", listed(problems)]))
    return Table(tuple(cells))


def ops_of(text: str, place: str) -> list[Op]:
    """The ops of one line of words.

    Raises:
        ShardingError: A word is no op.
    """
    problems: list[str] = []
    found = _cell(text, place, problems)
    if problems:
        raise ShardingError(listed(problems))
    return list(found)


def _cell(text: str, place: str, problems: list[str]) -> Cell:
    ops = []
    for word in text.split():
        match = _OP.fullmatch(word)
        if match is None:
            problems.append(
                f"{place}: {word!r} is no op. Write F, B or W and a microbatch, as F3; with chunks F3.1 for chunk 1."
            )
            continue
        kind, microbatch, chunk = match.groups()
        ops.append(Op(KINDS[_LETTERS.index(kind)], int(microbatch), int(chunk or 0)))
    return tuple(ops)
