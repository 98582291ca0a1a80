"""Text files: which ones, and whether they are text.

Every check gathers all bad files before it raises, so that a person mends them in one go.
"""

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._errors import DataError, listed

_GLOB = frozenset("*?[")
_KINDS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"%PDF": "PDF",
    b"PAR1": "Parquet",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NOT_THE_LIBRARY = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def stdlib_sources() -> list[Path]:
    """The sources of this Python's standard library: real text that is on every machine.

    About 11 MB in 570 files on Python 3.11, 9.5 MB in 450 on 3.12; in the order of their paths. Tests, installed
    packages, IDLE, lib2to3, ensurepip, demos, and files that `configure` wrote are left out.

    Raises:
        DataError: This Python came without its sources.

    Example:
        >>> [path.name for path in stdlib_sources()[:2]]
        ['__future__.py', '__hello__.py']
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        path
        for path in root.rglob("*.py")
        if not _NOT_THE_LIBRARY.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and path.stat().st_size
    ]
    if not found:
        raise DataError(
            f"{root}: no Python sources here, though the standard library should be. "
            "Name your own text files, as text_files(['notes/']) or --data notes/."
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def text_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The text files that `paths` name, one or many: files, directories and patterns (`notes/**/*.txt`).

    A directory gives all files below it, in the order of their paths, without hidden ones and without empty ones.
    Of each file the first 64 KiB are read; `tokenise` reads the rest. A file named twice is taken once.

    Raises:
        DataError: Naming every path that does not exist, cannot be read, is empty, or is not UTF-8 text, with what
            was found there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "b.txt").write_text("to be"), (folder / "a.txt").write_text("or not")
        >>> [path.name for path in text_files([folder])]
        ['a.txt', 'b.txt']
    """
    named = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not named:
        raise DataError("No data: the list of paths is empty. Name at least one file or directory.")
    files: dict[Path, None] = {}
    problems = []
    for path in named:
        try:
            found = _expand(path)
        except OSError as error:  # a directory that is closed to us, a text where a path should be
            problems.append(f"{error.filename or path}: {_unreadable(error)}")
            continue
        if not found:
            problems.append(f"{path}: {_absent(path)}")
        for file in found:
            problem = _problem_at_head(file)
            if problem:
                problems.append(f"{file}: {problem}")
            files[file] = None
    raise_for(problems, len(files))
    return list(files)


def read_text(path: Path) -> bytes | str:
    """The bytes of the UTF-8 text file `path`; or, as a `str`, why it is not one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return _unreadable(error)
    return _problem_in(data, whole=True) or data


def raise_for(problems: Sequence[str], num_files: int) -> None:
    """Raise one error for all `problems`, if there are any."""
    if problems:
        raise DataError(
            f"{len(problems)} of {max(num_files, len(problems))} data files cannot be used:\n{listed(problems)}\n"
            "Mend or leave out these; a pattern takes only the files it matches: 'notes/**/*.txt'."
        )


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _texts_below(path)
    if path.exists() or not _GLOB.intersection(str(path)):
        return [path]
    anchor = Path(path.anchor)  # "" for a relative pattern
    return sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())


def _texts_below(directory: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(directory, onerror=_raise):  # `rglob` passes over what it may not read
        folders[:] = [name for name in folders if _is_open(name)]
        files = [Path(folder, name) for name in names if _is_open(name)]
        found += [file for file in files if file.is_file() and file.stat().st_size]
    return sorted(found)


def _is_open(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _raise(error: OSError) -> None:
    raise error


def _absent(path: Path) -> str:
    return "a directory without a file that holds text" if path.is_dir() else "no file matches this pattern"


def _problem_at_head(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return "is neither a file nor a directory"
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            return _problem_in(head, whole=not file.read(1))
    except OSError as error:
        return _unreadable(error)


def _problem_in(data: bytes, *, whole: bool) -> str:
    if not data:
        return "is empty"
    for magic, kind in _KINDS.items():
        if data.startswith(magic):
            return f"is {kind}, not text; unpack or convert it first"
    if b"\0" in data:
        return f"is binary, not text (a zero byte at offset {data.index(0)})"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        cut = not whole and error.start >= len(data) - 3  # a character that goes on past what was read
        return (
            ""
            if cut
            else (
                f"is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
                "convert it, as `iconv -f latin1 -t utf-8` does"
            )
        )
    return ""


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}); mind its permissions"
