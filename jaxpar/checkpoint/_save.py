"""Save a tree.

A checkpoint is a directory: arrays as Orbax stores them, under their paths, as global arrays, so that it knows nothing
of meshes and plans; `checkpoint.json` about them; `SHA256SUMS` over both. All of it is written under another name,
hashed, flushed to the disk, and appears by one rename:

    100.saving/    state/, ...      Orbax, every process its own shards
                   checkpoint.json  process 0
                   SHA256SUMS       every process hashes what it wrote, process 0 gathers the sums
    100/                            one rename; a process killed at any instant leaves either all of it or nothing
"""

import atexit
import dataclasses
import datetime as dt
import logging
import os
import pathlib
import shutil
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import _processes
from .._errors import CheckpointError, listed
from .._types import PyTree
from . import _about, _orbax, _sums
from ._about import About
from ._barrier import Barrier
from ._parts import Parts, is_key, plain_json, take_apart
from ._steps import is_unfinished, root, saving


class Saving:
    """A save that goes on in the background. `wait` for it, or ask whether it is `done`.

    Attributes:
        step: The step being saved.
        path: Where it appears, by one rename, when it is complete.
    """

    def __init__(self, step: int, path: pathlib.Path, finish: Callable[[], None]) -> None:
        self.step = step
        self.path = path
        self._finish = finish
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"save {path}")
        _under_way.add(self)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is complete on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        self._thread.join()
        _under_way.discard(self)
        if self._error is not None:
            why = str(self._error).rstrip(".")
            raise CheckpointError(
                f"Step {self.step} could not be saved at {self.path}: {why}. Earlier steps are as they were."
            ) from self._error

    def _work(self) -> None:
        try:
            self._finish()
        except Exception as error:  # whatever it is, `wait` raises it where somebody listens
            self._error = error
        else:
            _under_way.discard(self)


_log = logging.getLogger("jaxpar")
_under_way: set[Saving] = set()


@atexit.register  # by then the threads have ended
def _tell() -> None:
    """Say what was lost of saves that nobody waited for."""
    for each in list(_under_way):
        try:
            each.wait()
        except CheckpointError as error:
            _log.error("%s", error)


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: PyTree,
    *,
    metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `tree` as checkpoint `step` of `directory`, and return when it is complete.

    Every process calls it; each writes and hashes its own shards, and nothing moves between devices. The checkpoint
    appears by one rename: a process killed at any instant leaves either all of it or nothing.

    Args:
        directory: Made if it does not exist.
        step: 0 or more; becomes the name of a subdirectory.
        tree: An nnx module or optimiser, any pytree, or a tuple, list or dict of these. Python numbers are saved, and
            an object with `get_state` and `set_state` (a data loader) by its state, which must be JSON. Other leaves
            (functions, text) are static and not saved.
        metrics: Numbers by which `Keep(best=...)` chooses.
        metadata: A JSON object to keep beside it; `jp.checkpoint.metadata` reads it.
    Raises:
        CheckpointError: The step exists already, or leaves cannot be saved: all of them named.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 100, {"w": jnp.ones((8, 4)), "epoch": 3})
        >>> jp.checkpoint.steps(directory)
        [100]
    """
    save_async(directory, step, tree, metrics=metrics, metadata=metadata).wait()


def save_async(
    directory: str | os.PathLike[str],
    step: int,
    tree: PyTree,
    *,
    metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Saving:
    """As `save`, but return once every array has been copied to host memory; writing goes on in the background.

    Costs host memory for this process's shards until it is written. The arrays may be donated at once. Wait for it
    before the script ends: once the main thread has ended, Orbax can start no thread, and may hold up the exit for five
    minutes. What is then still under way is lost, and an error says so.

    Raises:
        CheckpointError: As `save`; a failure to write is raised by `wait`.

    Example:
        >>> import tempfile
        >>> saving = jp.checkpoint.save_async(tempfile.mkdtemp(), 100, {"w": jnp.ones((8, 4))})
        >>> saving.wait()
    """
    home = root(directory)
    check_place(home, step)
    parts = take_apart(tree)
    check_values(parts)
    about = About(
        leaves=_about.described(parts),
        values=parts.values,
        states=parts.states(),
        versions=_about.versions(),
        metrics=_about.numbers(metrics),
        metadata=plain_json(dict(metadata or {}), "metadata"),
        saved=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    path, barrier = begin(home, step)
    arrays = {name: _stored(leaf) for name, leaf in parts.arrays.items() if leaf.size}
    try:
        written = _orbax.write(path, arrays)
    except BaseException as error:
        barrier.fail(error)
        raise

    def finish() -> None:
        try:
            ahead = _sums.Ahead(lambda: _orbax.whole(path, jax.process_index()))
            try:
                barrier.until(written)
            finally:
                known = ahead.end()
            commit(home, step, about, barrier, known)
        except BaseException as error:
            barrier.fail(error)
            _clear(home, step)  # on a full disk its space is needed
            raise

    return Saving(step, home / str(step), finish)


def begin(home: pathlib.Path, step: int) -> tuple[pathlib.Path, Barrier]:
    """Where `step` is to be written until `commit`, clear of what a killed process left; and a barrier for that.

    The place must have been checked: `check_place`.
    """
    barrier = Barrier()
    if _processes.is_first():
        home.mkdir(parents=True, exist_ok=True)
    _clear(home, step)
    barrier("clear")
    return saving(home, step), barrier


def commit(
    home: pathlib.Path,
    step: int,
    about: About,
    barrier: Barrier,
    known: Mapping[tuple[int, ...], str] = types.MappingProxyType({}),
) -> None:
    """Hash what every process has written where `begin` said, and make it step `step` of `home`.

    What is `known` was hashed already.
    """
    path = saving(home, step)
    barrier("written")
    sizes = {name: size for name, size in _sums.files(path)[0].items() if not name.startswith(_sums.NAME)}
    own = [name for name in sizes if _orbax.writer(name) == jax.process_index()]
    if _processes.is_first():
        dataclasses.replace(about, files=sizes).write(path)
        own.append(_about.NAME)
    seal(path, home / str(step), own, barrier, known)


def seal(
    path: pathlib.Path,
    target: pathlib.Path,
    own: Sequence[str],
    barrier: Barrier,
    known: Mapping[tuple[int, ...], str] = types.MappingProxyType({}),
) -> None:
    """Hash and flush what lies at `path`, and make it appear at `target`.

    Args:
        path: Complete, and not written any more.
        target: Beside it, and not there.
        own: The files that this process hashes.
        barrier: As `begin` gives it.
        known: Sums of files that were hashed before, by `_sums.Ahead`.
    """
    sums = _sums.of_files(path, own, known=known)
    flushed = {path / name for name in own}
    if not _processes.is_first():
        _sums.flush(flushed | {_sums.write(path, sums, part=jax.process_index())})
    barrier("hashed")
    if _processes.is_first():
        for index in range(1, jax.process_count()):
            sums |= _sums.take(path, part=index)
        flushed |= {_sums.write(path, sums), path, *((path / name).parent for name in sums)}
        _sums.flush(flushed)
        path.rename(target)
        _sums.flush([target.parent])
    barrier("committed")


def _clear(home: pathlib.Path, step: int) -> None:
    """Delete what a save of this step left half-written."""
    if _processes.is_first():
        for entry in home.glob(f"{saving(home, step).name}*"):
            if is_unfinished(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def _stored(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def check_place(home: pathlib.Path, step: int) -> None:
    """Raise unless `step` can be saved in `home`."""
    if step < 0:
        raise CheckpointError(f"step={step}: a step is 0 or more.")
    if (home / str(step)).exists():
        raise CheckpointError(
            f"{home / str(step)} exists, and a save overwrites nothing. Give another step or directory, or delete it."
        )
    # Asked for now: Orbax fails on it in a background thread, and then holds up the exit of the process.
    there = next(place for place in (home, *home.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a directory" if not there.is_dir() else "cannot be written by this user"
        raise CheckpointError(f"{home}: {there} {why}. Give a directory that every process can write.")


def check_values(parts: Parts) -> None:
    """Raise for leaves that hold no values, and for a tree without arrays."""
    lines = [
        f"{path}: a shape and dtype, without values"
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else f"{path}: deleted, as it was donated to a step; save what the step returned"
        for path, leaf in parts.arrays.items()
        if isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.is_deleted())
    ]
    if lines:
        raise CheckpointError(f"{listed(lines)}\nOnly arrays that hold values can be saved.")
    if not any(leaf.size for leaf in parts.arrays.values()):
        raise CheckpointError("The tree holds no array, so there is nothing to save. Give the model or its parameters.")
