"""What a program moves, kept in a file: a baseline for the tests of whoever trains a model.

The file says per kind, axes and number of loops around it how many bytes a device moves in a step. That is what one
pays for, and what a new compiler leaves alone: names, fusions, the order, and whether eight gradients cross in one
collective or in eight, are no part of it. How often they run and where in the model stands beside it, for whoever reads
a failure, and is not compared; nor are sums of a few numbers, such as a loss or a norm.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxpar._errors import ShardingError
from jaxpar._plan_text import bytes_text

FORMAT = 1
UPDATE = "JAXPAR_UPDATE_TRAFFIC"
"""The environment variable that `--update-traffic` sets: write files rather than compare with them."""

SMALL = 1024
"""A collective of fewer bytes is a loss, a norm or a count."""

_MOST_PATHS = 8


class Key(NamedTuple):
    """What is compared apart."""

    kind: str
    axes: tuple[str, ...]
    depth: int

    def __str__(self) -> str:
        loops = {0: "outside of loops", 1: "in a loop"}.get(self.depth, f"in {self.depth} loops")
        return f"{self.kind} over {'+'.join(self.axes)}, {loops}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The collectives of one key: bytes of all their runs in a step, and what is only shown."""

    bytes: int
    count: int
    is_known: bool
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a file holds.

    Attributes:
        axes: Size of each mesh axis; empty if not known.
        compiler: That compiled it; shown, not compared.
        entries: By key.
    """

    axes: dict[str, int]
    compiler: str
    entries: dict[Key, Entry]

    @staticmethod
    def of(collectives: Iterable[Any], *, axes: Mapping[str, int], compiler: str) -> "Baseline":
        """Of the rows of a report, or of collectives."""
        together: dict[Key, list[Any]] = {}
        for each in collectives:
            if each.bytes >= SMALL:
                together.setdefault(Key(each.kind, tuple(each.axes), each.depth), []).append(each)
        entries = {
            key: Entry(
                bytes=sum(each.bytes * (1 if each.count is None else each.count) for each in members),
                count=sum(1 if each.count is None else each.count for each in members),
                is_known=all(each.count is not None for each in members),
                paths=tuple(sorted({_pattern(getattr(each, "path", "")) for each in members} - {""})),
            )
            for key, members in sorted(together.items())
        }
        return Baseline(axes=dict(axes), compiler=compiler, entries=entries)

    def to_json(self) -> str:
        """The file: an entry a line, so that a change of it reads well."""
        head = {"format": FORMAT, "axes": self.axes, "compiler": self.compiler}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        rows = [
            json.dumps({**key._asdict(), **dataclasses.asdict(entry)}, ensure_ascii=False)
            for key, entry in self.entries.items()
        ]
        listed = ",\n ".join(rows)
        return "{" + ",\n".join([*lines, f'"collectives": [\n {listed}\n]' if rows else '"collectives": []']) + "}\n"

    @staticmethod
    def from_json(text: str, path: pathlib.Path) -> "Baseline":
        """What `to_json` wrote."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise ShardingError(
                    f"{path} has format {fields['format']}, and this version of jaxpar reads {FORMAT}. {_accept(path)}"
                )
            entries = {}
            for row in fields["collectives"]:
                key = Key(row["kind"], tuple(row["axes"]), row["depth"])
                known, paths = row["is_known"], tuple(row["paths"])
                entries[key] = Entry(bytes=row["bytes"], count=row["count"], is_known=known, paths=paths)
            return Baseline(axes=dict(fields["axes"]), compiler=fields["compiler"], entries=entries)
        except ShardingError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardingError(f"{path} is no baseline of traffic ({error!r}). {_accept(path)}") from error


def compare(found: Baseline, path: str | os.PathLike[str]) -> None:
    """Assert that `found` is what the file at `path` says; or write it there, if that is asked for.

    Raises:
        AssertionError: They differ, or there is no such file.
        ShardingError: The file is none of these, or is of another mesh.
    """
    path = pathlib.Path(path)
    if os.environ.get(UPDATE, "") not in ("", "0"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_json(), encoding="utf-8")
        return
    if not path.is_file():
        raise AssertionError(f"{path} is not there, so there is nothing to compare with. {_accept(path)}")
    wanted = Baseline.from_json(path.read_text(encoding="utf-8"), path)
    if wanted.axes and found.axes and _larger(wanted.axes) != _larger(found.axes):
        raise ShardingError(
            f"{path} is of the mesh {wanted.axes}, and the program is of {found.axes}. Keep a file for each mesh."
        )
    lines = _differences(wanted, found)
    if lines:
        other = wanted.compiler and wanted.compiler != found.compiler
        by = f" It was compiled by {wanted.compiler}, now by {found.compiler}." if other else ""
        raise AssertionError(
            "\n".join([f"What moves between devices is not what {path} says.{by}", *lines, _accept(path)])
        )


def _differences(wanted: Baseline, found: Baseline) -> list[str]:
    lines = []
    for key in sorted({*wanted.entries, *found.entries}):
        a, b = wanted.entries.get(key), found.entries.get(key)
        if (a and (a.bytes, a.is_known)) == (b and (b.bytes, b.is_known)):
            continue
        lines.append(f"  {key}: {_said(a)} in the file, {_said(b)} now{_change(a, b)}")
        for sign, paths in (("+", _more(b, a)), ("-", _more(a, b))):
            lines += [f"    {sign} {path}" for path in paths[:_MOST_PATHS]]
            lines += [f"    {sign} and {len(paths) - _MOST_PATHS} more"] if len(paths) > _MOST_PATHS else []
    if lines:
        lines += _moved(wanted, found)
    return lines


def _said(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    times = f"{entry.count} times" if entry.is_known else "an unknown number of times"
    return f"{entry.bytes:,} bytes ({bytes_text(entry.bytes)}, {times})"


def _change(a: Entry | None, b: Entry | None) -> str:
    if a is None or b is None or not a.bytes or a.bytes == b.bytes:
        return ""
    return f": {100 * (b.bytes / a.bytes - 1):+.1f} %"


def _more(a: Entry | None, b: Entry | None) -> list[str]:
    """Places of `a` that are none of `b`."""
    return [path for path in (a.paths if a else ()) if path not in (b.paths if b else ())]


def _moved(wanted: Baseline, found: Baseline) -> list[str]:
    """The same bytes in other loops: said, because a compiler may peel or unroll one."""

    def totals(baseline: Baseline) -> dict[tuple[str, tuple[str, ...]], int]:
        sums: dict[tuple[str, tuple[str, ...]], int] = {}
        for key, entry in baseline.entries.items():
            sums[key[:2]] = sums.get(key[:2], 0) + entry.bytes
        return sums

    if totals(wanted) == totals(found):
        return ["Over all loops together the bytes are the same: they only run at another place."]
    return []


def _accept(path: pathlib.Path) -> str:
    how = f"pytest --update-traffic, or {UPDATE}=1 in the environment, writes {path.name}"
    return f"To accept what the program does now: {how}."


def _pattern(path: str) -> str:
    """A path with its layer numbers left out: `blocks.*.up.kernel`."""
    return re.sub(r"(?<![^.])(\d+|\[[\d,-]+\])(?![^.])", "*", path)


def _larger(axes: Mapping[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in axes.items() if size > 1}
