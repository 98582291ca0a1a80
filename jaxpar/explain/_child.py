"""Compiling for hardware that is not here, in a process of its own, once for each program.

libtpu cannot be interrupted, lets no second process in, and makes JAX noisy: so the user's process never loads it. The
child has a session of its own and is killed with all that it started when the wait for it ends in any other way.

The cache is a directory with an entry for each (step, compiler, options, flags): what came of it, and the HLO text. An
entry appears whole or not at all. The oldest go when there is more than `MOST` in it.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jaxpar

from .._errors import StepError
from .._hlo import MeshAxes
from ._compiled import Compiled, MemoryStats
from ._compiler import compiler
from ._export import Exported, without_call
from ._target import missing

MOST = 2 * 2**30
"""Bytes that the cache may hold."""

_PART = ".part-"  # how the name of an entry in the making starts
_STALE = 24 * 3600  # seconds after which nobody is making it

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64")
"""Variables that change what the compiler makes."""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}
"""For the child: no accelerator is looked for or taken, no cloud is asked, several may compile at once, and libtpu's
warnings come to us rather than to its own file."""

_logger = logging.getLogger("jaxpar")


def compile_elsewhere(exported: Exported, cache: str | os.PathLike[str] | None = None) -> Compiled:
    """Compile `exported` for its hardware in a child process, or find it in the cache.

    Args:
        exported: The step.
        cache: The directory of the cache; by default `jaxpar/explain` in the user's own cache directory.

    Raises:
        StepError: The compiler is not installed here, or fails with an error that is not for want of memory.
    """
    if lacking := missing(exported.hardware):
        raise StepError(f"{exported.hardware.name}: {lacking}.")
    root = pathlib.Path(cache) if cache is not None else _user_cache()
    root.mkdir(parents=True, exist_ok=True)
    entry = root / _key(exported)
    if not (entry / "result.json").exists():
        _make(exported, entry)
        _prune(root, entry)
        return _read(entry, exported)
    with contextlib.suppress(OSError):
        os.utime(entry)
    return dataclasses.replace(_read(entry, exported), seconds=0.0)


def _key(exported: Exported) -> str:
    said = [compiler(exported.hardware.platform), *(f"{name}={os.environ.get(name, '')}" for name in _FLAGS)]
    return hashlib.sha256("\n".join([exported.digest(), *said]).encode()).hexdigest()[:32]


def _user_cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxpar" / "explain"


def _make(exported: Exported, entry: pathlib.Path) -> None:
    """Compile into `entry`; a failure leaves nothing there."""
    part = pathlib.Path(tempfile.mkdtemp(prefix=_PART, dir=entry.parent))
    try:
        step = part / "step.zip"
        step.write_bytes(exported.to_bytes())
        with (part / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxpar.explain._compiler", str(step), str(part)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(process, f"{exported.name} for {exported.hardware.spec}")
        _check(exported, part, process.returncode)
        step.unlink()
        with contextlib.suppress(OSError):  # another process was quicker
            part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _environment() -> dict[str, str]:
    """The child imports this very jaxpar, and none of the parent's choices of devices reach it."""
    dropped = ("JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "JAXPAR_MESH")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    here = str(pathlib.Path(jaxpar.__file__).parents[1])
    paths = [here, *filter(None, [env.get("PYTHONPATH")])]
    return env | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}


def _wait(process: subprocess.Popen[bytes], what: str) -> None:
    """Wait, and say how long; whatever ends the wait otherwise kills the child."""
    try:
        with _elapsed(what) as tick:
            while True:
                try:
                    process.wait(timeout=0.2)
                    return
                except subprocess.TimeoutExpired:
                    tick()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@contextlib.contextmanager
def _elapsed(what: str) -> Iterator[Any]:
    """Shows on standard error how long something takes: in place where it can, else a line every 15 s."""
    start = time.monotonic()
    in_place = sys.stderr.isatty() or "ipykernel" in sys.modules
    said = {"next": 0.0}

    def tick() -> None:
        seconds = time.monotonic() - start
        if seconds < said["next"]:
            return
        line = f"compiling {what}: {seconds:.0f} s"
        if in_place:
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
        elif seconds > 1:
            _logger.info("%s", line)
        said["next"] = seconds + (1.0 if in_place else 15.0)

    yield tick
    if in_place:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def _check(exported: Exported, part: pathlib.Path, code: int) -> None:
    """That the child did its work, and that the compiler compiled or refused for want of memory."""
    target = exported.hardware.name
    if code or not (part / "result.json").exists():
        log = (part / "log").read_text(errors="replace").strip().splitlines()
        told = "\n".join(log[-15:]) or "it said nothing"
        raise StepError(
            f"{exported.name}: the compiler for {target} ended with exit code {code}. Its last words:\n{told}\n"
            "Fewer layers or another mesh may tell which part it cannot take."
        )
    result = json.loads((part / "result.json").read_text())
    if "error" in result:
        raise StepError(
            f"{exported.name} does not compile for {target} with {result['compiler']}: {result['error'][:4000]}\n"
            "If it names a compiler option, see jp.compiler_options; else the step itself is what it cannot take."
        )


def _read(entry: pathlib.Path, exported: Exported) -> Compiled:
    """What a child left."""
    result = json.loads((entry / "result.json").read_text())
    program = entry / "program.hlo.gz"
    memory = result.get("memory")
    slices = tuple(result.get("slices", ()))
    return Compiled(
        name=exported.name,
        text=gzip.decompress(program.read_bytes()).decode() if program.exists() else "",
        hardware=exported.hardware,
        axes=MeshAxes(names=tuple(exported.axes), sizes=tuple(exported.axes.values()), slices=slices),
        compiler=result["compiler"],
        options={name: str(value) for name, value in exported.options.items()},
        memory=None if memory is None else MemoryStats(**memory),
        arguments=exported.arguments,
        num_tokens=exported.num_tokens,
        refusal=result.get("refusal", ""),
        needed=result.get("needed", 0),
        log=tuple(without_call((entry / "log").read_text(errors="replace"), exported.name).splitlines()),
        seconds=result["seconds"],
    )


def _prune(root: pathlib.Path, kept: pathlib.Path) -> None:
    """Remove the entries that were used longest ago, until what is left fits; and what killed processes left behind."""
    sizes = {}
    for entry in root.iterdir():
        with contextlib.suppress(OSError):
            if entry.name.startswith(_PART):
                if entry.stat().st_mtime < time.time() - _STALE:
                    shutil.rmtree(entry, ignore_errors=True)
            elif not entry.name.startswith("."):
                sizes[entry] = (entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()))
    total = sum(size for _, size in sizes.values())
    for entry, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= MOST:
            return
        if entry != kept:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
