"""`SHA256SUMS`: one line for every other file of a checkpoint.

In the format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a checkpoint where there is no jaxpar. The names
in it are only ever compared with the files that are there; none is opened because it is written here.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

NAME = "SHA256SUMS"
POLL_SECONDS = 0.05
MAX_THREADS = 8  # one hashes about 1.5 GB/s; hashlib lets go of the interpreter's lock
MAX_FLUSHES = 16  # at once: what is flushed one after another has the file system write its journal each time


def write(path: pathlib.Path, sums: Mapping[str, str], *, part: int = 0) -> pathlib.Path:
    """Write the file into the checkpoint at `path`, or `part`, the share of that process; returns where it is."""
    file = path / _name(part)
    file.write_text("".join(_line(name, sums[name]) for name in sorted(sums)), encoding="utf-8")
    return file


def take(path: pathlib.Path, *, part: int) -> dict[str, str]:
    """The part that process `part` wrote, which is deleted."""
    found = read(path, part=part)
    (path / _name(part)).unlink()
    return found or {}


def read(path: pathlib.Path, *, part: int = 0) -> dict[str, str] | None:
    """The sums of the checkpoint at `path` by file name; `None` if there is no such file, or it is not one."""
    try:
        lines = (path / _name(part)).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return None
    found = {line[66:-1]: line[:64] for line in lines}
    exact = len(found) == len(lines) and all(
        line == _line(*pair) and re.fullmatch("[0-9a-f]{64}", pair[1])
        for line, pair in zip(lines, found.items(), strict=True)
    )
    return found if found and exact else None


class Ahead:
    """Hashes files while others are still written, so that little is left to do at the end.

    A digest counts for a file only if that is the same one, of the same size and time of change, when it is asked for.

    Args:
        find: The files that are whole by now, wherever they lie at the moment; asked again and again.
    """

    def __init__(self, find: Callable[[], Iterable[pathlib.Path]]) -> None:
        self._find = find
        self._known: dict[tuple[int, ...], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="jaxpar hash")
        self._thread.start()

    def end(self) -> dict[tuple[int, ...], str]:
        """Hash no more files; what is known, by `_identity`."""
        self._ended.set()
        self._thread.join()
        return self._known

    def _work(self) -> None:
        while not self._ended.is_set():
            num = len(self._known)
            with contextlib.suppress(OSError):  # what was found is renamed or deleted by now
                _for_each([file for file in self._find() if _identity(file) not in self._known], self._hash, _threads())
            if len(self._known) == num:
                self._ended.wait(POLL_SECONDS)

    def _hash(self, file: pathlib.Path) -> None:
        if not self._ended.is_set():
            identity = _identity(file)
            digest = _of_file(file)
            if _identity(file) == identity:
                self._known[identity] = digest


def of_files(
    path: pathlib.Path,
    names: Iterable[str],
    *,
    known: Mapping[tuple[int, ...], str] = types.MappingProxyType({}),
) -> dict[str, str]:
    """The SHA-256 of each file in `path` called one of `names`, several at a time.

    Args:
        path: A checkpoint.
        names: As `files` gives them.
        known: Of files that were hashed before, by `Ahead`.
    Raises:
        OSError: A file cannot be read.
    """
    sums: dict[str, str] = {}

    def work(name: str) -> None:
        digest = known.get(_identity(path / name)) if known else None
        sums[name] = digest or _of_file(path / name)

    _for_each(names, work, _threads())
    return sums


def flush(places: Iterable[pathlib.Path]) -> None:
    """Have files, and the names in directories, written down to the disk, several at a time.

    Raises:
        OSError: One cannot be.
    """
    _for_each(places, _flush, MAX_FLUSHES)


def files(path: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """The sizes of all files below `path` but this one, by name; and what is there that is neither file nor directory.

    Symbolic links are never followed.
    """
    sizes: dict[str, int] = {}
    odd: list[str] = []
    below = [""]
    while below:
        prefix = below.pop()
        for entry in os.scandir(path / prefix):
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                below.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                sizes[name] = entry.stat(follow_symlinks=False).st_size
            else:
                odd.append(name)
    sizes.pop(NAME, None)
    return dict(sorted(sizes.items())), sorted(odd)


def _name(part: int) -> str:
    return f"{NAME}.{part}" if part else NAME


def _line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"


def _identity(file: pathlib.Path) -> tuple[int, ...]:
    found = file.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _of_file(file: pathlib.Path) -> str:
    # A link put in the place of a file after `files` looked is not followed either.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(place: pathlib.Path) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


def _for_each(items: Iterable[T], act: Callable[[T], None], num_threads: int) -> None:
    """Act on each of `items`, so many at a time. After an error no more are begun, and the first is raised."""
    waiting, errors = list(items), []

    def work() -> None:
        while not errors:
            try:
                item = waiting.pop()
            except IndexError:
                return
            try:
                act(item)
            except Exception as error:  # whatever it is, it is raised below
                errors.append(error)

    # Plain threads: those of an executor cannot be started while the interpreter waits for a save before it exits.
    threads = [threading.Thread(target=work) for _ in range(min(num_threads, len(waiting)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
