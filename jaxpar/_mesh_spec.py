"""What a file, the command line or the environment says about a mesh.

A script calls `jp.mesh(fsdp=-1)` and does not change; `--mesh`, or else `JAXPAR_MESH`, replaces what it asks for:

| says                                       | replaces                                   |
|--------------------------------------------|--------------------------------------------|
| `fsdp=4,tensor=2`                          | the axes (and `dcn`), on the same hardware |
| `v5p-128`                                  | the hardware, with the same axes           |
| `v5p-128:fsdp=32,tensor=2`                 | both                                       |
| `2xv5e:16x16:data=2,fsdp=256,dcn.data=2`   | both, and how axes cross slices            |
| `fsdp=2,allow_unused`                      | the axes, and leaves devices idle          |
| `meshes/v5e_2slices.toml`                  | what the file says                         |
"""

import contextlib
import contextvars
import dataclasses
import logging
import os
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping

from . import _devices, _hardware
from ._errors import MeshError, nearest

VARIABLE = "JAXPAR_MESH"
"""Overrides every `mesh` call; read when `mesh` is called."""

_logger = logging.getLogger("jaxpar")
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("jaxpar_mesh", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Hardware and axes, each optional: what is left out stays as the script has it."""

    hardware: str | None = None
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dcn: Mapping[str, int] = dataclasses.field(default_factory=dict)
    allow_unused: bool = False

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.axes.items()]
        parts += [f"dcn.{axis}={factor}" for axis, factor in self.dcn.items()]
        parts += ["allow_unused"] if self.allow_unused else []
        return ":".join(filter(None, [self.hardware, ",".join(parts)]))


@contextlib.contextmanager
def override(spec: str | None) -> Iterator[None]:
    """Within, `spec` replaces what `mesh` is asked for, and `JAXPAR_MESH` too; `None` changes nothing.

    Raises:
        MeshError: `spec` cannot be read; see `parse_spec`.

    Example:
        >>> with override("fsdp=2,tensor=4"):
        ...     dict(jp.mesh(fsdp=-1).shape)
        {'fsdp': 2, 'tensor': 4}
    """
    if spec is None:
        yield
        return
    parse_spec(spec)
    token = _override.set(spec)
    try:
        yield
    finally:
        _override.reset(token)


def overridden(asked: MeshSpec) -> MeshSpec:
    """What is asked for, after `override` or else `JAXPAR_MESH`; logged if that is something else."""
    text, source = _override.get(), "--mesh"
    if text is None:
        text, source = os.environ.get(VARIABLE, "").strip(), VARIABLE
    if not text:
        return asked
    forced = parse_spec(text)
    made = dataclasses.replace(
        forced if forced.axes else asked,
        hardware=forced.hardware or asked.hardware,
        dcn=forced.dcn if forced.axes else forced.dcn or asked.dcn,
        allow_unused=asked.allow_unused or forced.allow_unused,
    )
    if made != asked and _devices.speaks():
        _logger.warning("%s %s: jp.mesh makes %s, where the script asks for %s.", source, text, made, asked)
    return made


def parse_spec(text: str) -> MeshSpec:
    """What `--mesh` and `JAXPAR_MESH` may say: hardware, axes, both as `hardware:axes`, or the path of a TOML file.

    Raises:
        MeshError: Naming the part that cannot be read.

    Example:
        >>> parse_spec("2xv5e:16x16:data=2,fsdp=256,dcn.data=2").dcn
        {'data': 2}
    """
    text = text.strip()
    if text.endswith(".toml"):
        return read(pathlib.Path(text))
    hardware, _, pairs = text.rpartition(":") if "=" in text else (text, "", "")
    given = [pair.strip() for pair in pairs.split(",") if pair.strip()]
    axes: dict[str, int] = {}
    dcn: dict[str, int] = {}
    for pair in given:
        if pair == "allow_unused":
            continue
        match = re.fullmatch(r"(dcn\.)?(\w+)\s*=\s*(-?\d+)", pair)
        if match is None:
            raise MeshError(
                f"{text!r}: cannot read {pair!r}. Write axis=size, dcn.axis=factor for slices, allow_unused to leave "
                "devices idle: v5p-128:fsdp=32,tensor=2 or 2xv5e:16x16:data=2,fsdp=256,dcn.data=2."
            )
        (dcn if match[1] else axes)[match[2]] = int(match[3])
    if hardware:
        _hardware.parse(hardware)
    return MeshSpec(hardware=hardware or None, axes=axes, dcn=dcn, allow_unused="allow_unused" in given)


def read(path: pathlib.Path) -> MeshSpec:
    """The mesh file at `path`: TOML with `hardware`, `[axes]`, `[dcn]` and `allow_unused`, each optional.

    Raises:
        MeshError: There is no such file (the nearest is named), it is not TOML, or a key or value is not one of these.
    """
    if not path.is_file():
        files = sorted(str(file) for file in {*path.parent.glob("*.toml"), *pathlib.Path("meshes").glob("*.toml")})
        there = f" There are {', '.join(files)}." if files else " Give the path of a mesh file."
        raise MeshError(f"There is no mesh file {str(path)!r}.{nearest(str(path), files)}{there}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MeshError(f"{path}: not a TOML file: {error}. See meshes/ for examples.") from error
    kinds = {"hardware": str, "axes": dict, "dcn": dict, "allow_unused": bool}
    faults = [f"{key!r} is not a key of a mesh file.{nearest(key, kinds)}" for key in content if key not in kinds]
    faults += [
        f"{key!r} is {content[key]!r}, and must be a {kind.__name__}."
        for key, kind in kinds.items()
        if key in content and not isinstance(content[key], kind)
    ]
    if faults:
        raise MeshError(f"{path}: {' '.join(faults)} A mesh file has: {', '.join(kinds)}.")
    return MeshSpec(**content)
