"""A directory of checkpoints: one subdirectory a step, named by its number.

A step counts once it is complete. A save that was killed leaves a temporary directory, which is never listed; a step
that was copied in part, or is empty, is not listed either.
"""

import os
import pathlib
import shutil

import jax

from .._errors import CheckpointError
from . import _orbax


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in `directory`, rising; none if it does not exist.

    Reads one small file a step.

    Example:
        >>> jp.checkpoint.steps("runs/nothing_here_yet")
        []
    """
    return [step for step in numbered(root(directory)) if _orbax.about(root(directory) / str(step)) is not None]


def latest(directory: str | os.PathLike[str]) -> int | None:
    """The last complete step in `directory`, or `None`.

    Example:
        >>> jp.checkpoint.latest("runs/nothing_here_yet") is None
        True
    """
    home = root(directory)
    complete = (step for step in reversed(numbered(home)) if _orbax.about(home / str(step)) is not None)
    return next(complete, None)


def prune(directory: str | os.PathLike[str], keep: int) -> list[int]:
    """Delete all but the last `keep` complete checkpoints; returns the steps that went.

    Process 0 deletes; on the others this does nothing. What is not a complete checkpoint is left alone.

    Raises:
        CheckpointError: `keep` is less than 1.

    Example:
        >>> jp.checkpoint.prune("runs/nothing_here_yet", keep=3)
        []
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep} would delete every checkpoint. Keep 1 or more.")
    if jax.process_index() != 0:
        return []
    home, gone = root(directory), steps(directory)[:-keep]
    for step in gone:
        # Renamed first: a step that is deleted in part is never seen under its number.
        doomed = (home / str(step)).rename(home / f"{step}.deleted")
        shutil.rmtree(doomed)
    return gone


def tidy(directory: str | os.PathLike[str]) -> list[int]:
    """Clear what killed processes left, and set incomplete steps aside as `STEP.incomplete`; returns those steps.

    Only for a directory in which nobody is saving; called by process 0.
    """
    home = root(directory)
    if not home.is_dir():
        return []
    for entry in home.iterdir():
        if _orbax.is_unfinished(entry.name) or entry.name.endswith(".deleted"):
            shutil.rmtree(entry)
    incomplete = sorted(set(numbered(home)) - set(steps(home)))
    for step in incomplete:
        aside = home / f"{step}.incomplete"
        if aside.exists():
            shutil.rmtree(aside)
        (home / str(step)).rename(aside)
    return incomplete


def root(directory: str | os.PathLike[str]) -> pathlib.Path:
    """`directory` as an absolute path of this machine's file system."""
    if "://" in str(directory):
        raise CheckpointError(f"{directory} is not a path of a file system. Mount the bucket, and give its path there.")
    return pathlib.Path(directory).absolute()


def numbered(home: pathlib.Path) -> list[int]:
    """The numbers that name a subdirectory of `home`, complete or not, rising."""
    if not home.is_dir():
        return []
    names = [entry.name for entry in home.iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)
