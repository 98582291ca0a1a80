"""What is wrong with a checkpoint: `gaps`, seen from names and sizes alone, and `damage`, from reading every byte.

Orbax does not notice a flipped bit in an array, and takes any directory with a number for a step. So a step counts if
it has no gaps, and is read only if it has no damage. Both are lists of lines, one a file, and empty if all is well.
"""

import logging
import os
import pathlib

import jax

from .. import _processes
from .._errors import listed
from . import _about, _sums

_log = logging.getLogger("jaxpar")


def gaps(path: pathlib.Path) -> list[str]:
    """What is missing, cut, or too much at `path`. Reads two small files and no array."""
    if not path.is_dir() or path.is_symlink():
        return ["not a directory of its own (a link?)"]
    if not any(path.iterdir()):
        return ["an empty directory"]
    sums = _sums.read(path)
    if sums is None:
        there = (path / _sums.NAME).exists()
        return [f"{_sums.NAME}: {'not a list of SHA-256 sums' if there else 'missing'}"]
    sizes, odd = _sums.files(path)
    lines = [f"{name}: neither a file nor a directory (a link?)" for name in odd]
    lines += [f"{name}: missing" for name in sums if name not in sizes and name not in odd]
    lines += [f"{name}: was not saved with it" for name in sizes if name not in sums]
    try:
        expected = _about.read(path).files
    except (OSError, ValueError) as error:
        return [*lines, f"{_about.NAME}: {error}"]
    lines += [
        f"{name}: {sizes[name]:,} bytes, and {size:,} were saved"
        for name, size in expected.items()
        if sizes.get(name, size) != size
    ]
    return lines


def damage(path: pathlib.Path, names: list[str] | None = None) -> list[str]:
    """As `gaps`, and if there is none: every file whose bytes are not those that were saved.

    Args:
        path: A checkpoint.
        names: The files to read; by default all.
    """
    lines = gaps(path)
    if lines:
        return lines
    saved = _sums.read(path) or {}
    try:
        found = _sums.of_files(path, saved if names is None else names)
    except OSError as error:
        return [f"{error.filename}: {os.strerror(error.errno or 0)}"]
    return [f"{name}: other bytes than were saved (SHA-256)" for name in sorted(found) if found[name] != saved[name]]


def damage_for_all(path: pathlib.Path) -> list[str]:
    """As `damage`, each process reading its share of the bytes. A collective of all processes.

    One that is told of damage which another has seen says so.
    """
    if jax.process_count() == 1:
        return damage(path)
    lines = damage(path, share(path))
    if lines and not _processes.is_first():  # which tells what it has seen itself
        _log.warning("%s, as process %d sees it:\n%s", path, jax.process_index(), listed(lines))
    if _processes.greatest(len(lines)) and not lines:
        return ["damage that another process saw; its log names the files"]
    return lines


def share(path: pathlib.Path) -> list[str]:
    """The files that this process reads, so that each reads about as much."""
    loads = [0] * jax.process_count()
    mine = []
    sizes = _sums.files(path)[0] if path.is_dir() else {}
    for name, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += size
        if lightest == jax.process_index():
            mine.append(name)
    return mine
