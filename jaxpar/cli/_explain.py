"""`jaxpar explain` and `jaxpar export`: from what was typed to a report, or to a file that another machine explains.

The report alone goes to standard output; how long it takes, and whatever a user's module prints, to standard error.
"""

import contextlib
import dataclasses
import lzma
import pathlib
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

from .. import _mesh
from .._errors import StepError
from .._options import compiler_options
from .._types import AnyMesh
from . import _load

if TYPE_CHECKING:
    from ..explain import Report
    from ._commands import Explain, Export


def run_explain(command: "Explain") -> int:
    """Print the report that `command` asks for, and write it where it says."""
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        report = _report(command)
        seconds = time.perf_counter() - start
        own = seconds - report.compile_seconds
        print(f"compiled in {report.compile_seconds:.1f} s, the rest took {own:.1f} s", file=sys.stderr)
        if command.html:
            command.html.write_text(report.to_html(), encoding="utf-8")
    print(report.to_json() if command.json else report)
    return 0


def run_export(command: "Export") -> int:
    """Write the file that `command` asks for."""
    from ..explain import export

    with contextlib.redirect_stdout(sys.stderr):
        step, args, on = _step(command.recipe, command.mesh)
        path = export(step, *args, to=command.output, on=on, compiler_options=_options(command.options, on))
    print(f"{path}: explain it on Linux, by the same version of JAX: jaxpar explain {path}")
    return 0


def _report(command: "Explain") -> "Report":
    from ..explain import explain, explain_file, explain_text

    given = [name for name in ("what", "hlo") if getattr(command, name)]
    if len(given) != 1:
        raise StepError(
            "name one thing to explain: MODULE:NAME with --mesh, a file that jaxpar export wrote, or --hlo FILE with "
            "--target."
        )
    if command.hlo:
        if command.target is None:
            raise StepError(f"--hlo {command.hlo}: say what it was compiled for: --target v5e:16x16, or a mesh.")
        text, fault = _text(command.hlo)
        report = explain_text(text, _target(command.target), name=command.hlo.name.partition(".")[0])
        return dataclasses.replace(report, unread=(*filter(None, [fault]), *report.unread))
    if command.target is not None:
        raise StepError(
            "--target is for --hlo; a recipe is explained on a --mesh, a file for what it was exported for."
        )
    assert command.what is not None
    if ":" not in command.what and pathlib.Path(command.what).exists():
        if command.mesh or command.options:
            raise StepError(f"{command.what} is a file that was exported for its mesh and options: leave these out.")
        return explain_file(command.what, cache=command.cache)
    step, args, on = _step(command.what, command.mesh)
    return explain(step, *args, on=on, compiler_options=_options(command.options, on), cache=command.cache)


def _step(name: str, said: str | None) -> tuple[Any, tuple[Any, ...], AnyMesh | None]:
    """The step or recipe that `name` names, its arguments, and the mesh to put it on."""
    on = _load.mesh(said) if said is not None else None  # before the module, which may start JAX
    found = _load.named(name)
    if isinstance(found, tuple):
        return found[0], found[1:], on
    return found, (), on if on is not None else _load.mesh(None)


def _target(said: str) -> AnyMesh | str:
    return _load.mesh(said) if "=" in said or said.endswith(".toml") else said


def _options(said: tuple[str, ...], on: AnyMesh | None) -> dict[str, Any] | None:
    """Names of sets, and `xla_name=value`; nothing if none was said."""
    if not said:
        return None
    pairs = [each.partition("=") for each in said]
    names = [name for name, equals, _ in pairs if not equals]
    if names and on is None:
        raise StepError(f"--options {names[0]} is a set of options for a kind of chip: say which by --mesh.")
    found = compiler_options(_mesh.hardware_of(on).chip.name, *names) if on is not None and names else {}
    return found | {name.removeprefix("--"): value for name, equals, value in pairs if equals}


def _text(path: pathlib.Path) -> tuple[str, str]:
    """What a file of HLO text holds, and what is wrong with the file; packed by xz or gzip it may end too early."""
    raw = path.read_bytes()
    if path.suffix not in (".xz", ".gz"):
        return raw.decode(errors="replace"), ""
    unpack = lzma.LZMADecompressor() if path.suffix == ".xz" else zlib.decompressobj(wbits=31)
    parts: list[bytes] = []
    try:
        for start in range(0, len(raw), 2**16):
            if unpack.eof:
                break
            parts.append(unpack.decompress(raw[start : start + 2**16]))
        fault = "" if unpack.eof else f"{path} ends too early"
    except (lzma.LZMAError, zlib.error) as error:
        fault = f"{path} is not whole: {error}"
    return b"".join(parts).decode(errors="replace"), fault
