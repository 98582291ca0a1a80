"""A directory of checkpoints: one subdirectory a step, named by its number.

A step is listed once it is complete: all files are there, with their sizes. It is read once it is valid: all files have
the bytes that were saved. The latest step is the newest valid one, and a damaged one before it is said aloud.
"""

import dataclasses
import logging
import os
import pathlib
import shutil
from collections.abc import Callable

import jax

from .. import _processes
from .._errors import CheckpointError, listed
from . import _about, _orbax
from ._damage import damage, damage_for_all, gaps
from ._keep import Keep

MOST_LINES = 5  # of what is wrong with one step; a checkpoint copied in part lacks hundreds of files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newest:
    """The newest valid step of a directory, or `None`, and what is wrong with the steps after it."""

    step: int | None
    damaged: dict[int, list[str]]


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in `directory`, rising; none if it does not exist.

    Complete means that every file is there with its size. Reads two small files a step and no array, so a flipped bit
    is not seen: `verify` and `restore` see it.

    Example:
        >>> jp.checkpoint.steps("runs/nothing_here_yet")
        []
    """
    home = root(directory)
    return [step for step in numbered(home) if not gaps(home / str(step))]


def latest(directory: str | os.PathLike[str]) -> int | None:
    """The newest valid step in `directory`, or `None`: what `restore` reads if it is given no step.

    Reads every byte of the newest step, and of older ones while the newer are damaged, which it logs as a warning.
    `steps(directory)[-1]` is quick, and trusts the names and sizes of files.

    Example:
        >>> jp.checkpoint.latest("runs/nothing_here_yet") is None
        True
    """
    home = root(directory)
    found = _newest(home, iter([*reversed(numbered(home)), -1]).__next__, damage)
    _warn(home, found)
    return found.step


def verify(directory: str | os.PathLike[str], step: int | None = None) -> list[int]:
    """Read every byte of a checkpoint, or of all in `directory`, and compare it with what was saved.

    Returns:
        The steps that were read, all of them valid.
    Raises:
        CheckpointError: Naming every file that is missing, cut, changed or too much.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 100, {"w": jnp.ones((8, 4))})
        >>> jp.checkpoint.verify(directory)
        [100]
    """
    home = root(directory)
    wanted = numbered(home) if step is None else [step]
    damaged = {each: lines for each in wanted if (lines := damage(home / str(each)))}
    if damaged:
        raise CheckpointError(
            f"{home}: {_of_steps(damaged)} damaged.\n{_told(damaged)}\n"
            "Copy it again from where it is whole, or delete it; restore without a step passes over it."
        )
    return wanted


def prune(directory: str | os.PathLike[str], keep: int | Keep) -> list[int]:
    """Delete the complete checkpoints that need not stay; returns the steps that went.

    Process 0 deletes; on the others this does nothing. What is not a complete checkpoint is left alone, and the newest
    valid one stays, whatever `keep` says: every byte is read of the newest, and of older ones while the newer are
    damaged. (A `Run` reads nothing: it prunes after a save.)

    Args:
        directory: What `save` was given.
        keep: How many of the last stay, or a `Keep`.
    Raises:
        CheckpointError: `keep` is less than 1; or something would go, and nothing that stays or goes is valid.

    Example:
        >>> jp.checkpoint.prune("runs/nothing_here_yet", keep=3)
        []
    """
    if isinstance(keep, int):
        if keep < 1:
            raise CheckpointError(f"keep={keep} would delete every checkpoint. Keep 1 or more.")
        keep = Keep(last=keep)
    return prune_known(root(directory), keep, valid=None)


def prune_known(home: pathlib.Path, keep: Keep, *, valid: int | None) -> list[int]:
    """As `prune`, when the step `valid` is known to be so, as it was saved just now."""
    if jax.process_index() != 0:
        return []
    metrics = {step: _about.read(home / str(step)).metrics for step in steps(home)}
    gone = sorted(metrics.keys() - keep.of(metrics))
    if gone and keep.metric and not any(keep.metric in each for each in metrics.values()):
        known = ", ".join(sorted({name for each in metrics.values() for name in each})) or "none"
        _processes.say(
            logging.WARNING,
            "%s: no checkpoint has the metric %r (they have: %s), so none is kept as the best. Log it in the step that "
            "is saved.",
            home, keep.metric, known,
        )  # fmt: skip
    if gone and (valid is None or valid not in metrics.keys() - set(gone)):
        found = _newest(home, iter([*sorted(metrics, reverse=True), -1]).__next__, damage)
        if found.step is None:
            raise none_valid(home, found.damaged)
        _warn(home, found)
        gone = [step for step in gone if step != found.step]
    for step in gone:
        _delete(home, step)
    return gone


def drop_after(home: pathlib.Path, step: int) -> None:
    """Delete every step after `step`, the last first; called by process 0, while nobody saves."""
    for each in reversed(numbered(home)):
        if each > step:
            _delete(home, each)


def _delete(home: pathlib.Path, step: int) -> None:
    # Renamed first: a step that is deleted in part is never seen under its number.
    shutil.rmtree((home / str(step)).rename(home / f"{step}.deleted"))


def newest(home: pathlib.Path) -> Newest:
    """The newest valid step of `home`, the same for all processes. A collective of them; each hashes its share."""
    # As process 0 sees the directory: others may see a step a moment later.
    mine = iter([*reversed(numbered(home)), -1])
    found = _newest(home, lambda: _processes.of_first(next(mine, -1)), damage_for_all)
    _warn(home, found)
    return found


def check(home: pathlib.Path, step: int) -> None:
    """Raise unless `step` of `home` is a valid checkpoint. A collective of all processes.

    Raises:
        CheckpointError: It is not there, incomplete, damaged, or something that jaxpar did not write.
    """
    path = home / str(step)
    if step not in numbered(home):
        raise _nothing(home, step)
    if (path / _about.NAME).is_file() or not _orbax.is_checkpoint(path):
        lines = damage_for_all(path)
    else:
        raise CheckpointError(
            f"{path} was not written by this version of jaxpar.checkpoint: it has no {_about.NAME}. "
            "Load it with what wrote it, and save it again."
        )
    if lines:
        raise CheckpointError(
            f"{path} is damaged.\n{listed(lines, MOST_LINES)}\n"
            f"Complete: {_joined(steps(home))}. Copy it again from where it is whole, or restore without a step, which "
            "takes the newest that is valid."
        )


def complete(home: pathlib.Path, step: int | None) -> int:
    """`step`, or the last complete one if it is `None`.

    Raises:
        CheckpointError: It is not complete.
    """
    there = steps(home)
    wanted = step if step is not None or not there else there[-1]
    if wanted is None or wanted not in there:
        raise _nothing(home, step)
    return wanted


def _nothing(home: pathlib.Path, step: int | None = None) -> CheckpointError:
    """The error of a directory that has no such checkpoint."""
    complete = steps(home)
    incomplete = sorted(set(numbered(home)) - set(complete))
    what = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
    others = f" Complete: {_joined(complete)}."
    if incomplete:
        others += f" Incomplete, copied or deleted in part: {_joined(incomplete)}."
    way_out = "Choose a complete step." if complete else "Check the path, or save first."
    return CheckpointError(f"{home} holds {what}.{others} {way_out}")


def none_valid(home: pathlib.Path, damaged: dict[int, list[str]]) -> CheckpointError:
    """The error of a directory whose steps are all damaged."""
    if not damaged:
        return _nothing(home)
    return CheckpointError(
        f"{home} holds no valid checkpoint: {_of_steps(damaged)} damaged.\n{_told(damaged)}\n"
        "Copy one again from where it is whole, or start in another directory."
    )


def tidy(directory: str | os.PathLike[str]) -> list[int]:
    """Clear what killed processes left, and set incomplete steps aside as `STEP.incomplete`; returns those steps.

    Only for a directory in which nobody is saving; called by process 0.
    """
    home = root(directory)
    if not home.is_dir():
        return []
    for entry in home.iterdir():
        if is_unfinished(entry.name):
            shutil.rmtree(entry)
    incomplete = sorted(set(numbered(home)) - set(steps(home)))
    for step in incomplete:
        set_aside(home, step, "incomplete")
    return incomplete


def set_aside(home: pathlib.Path, step: int, why: str) -> None:
    """Rename a step to `STEP.why`, where nothing is listed, so that its number is free."""
    aside = home / f"{step}.{why}"
    if aside.exists():
        shutil.rmtree(aside)
    (home / str(step)).rename(aside)


def saving(home: pathlib.Path, step: int) -> pathlib.Path:
    """Where a step is while it is being saved."""
    return home / f"{step}.saving"


def is_unfinished(name: str) -> bool:
    """Whether a directory called `name` is what a save or a deletion leaves behind when its process is killed."""
    return _orbax.is_unfinished(name) or name.endswith((".saving", ".deleted"))


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


def _newest(home: pathlib.Path, candidate: Callable[[], int], look: Callable[[pathlib.Path], list[str]]) -> Newest:
    damaged: dict[int, list[str]] = {}
    while (step := candidate()) >= 0:
        lines = look(home / str(step))
        if not lines:
            return Newest(step=step, damaged=damaged)
        damaged[step] = lines
    return Newest(step=None, damaged=damaged)


def _warn(home: pathlib.Path, found: Newest) -> None:
    if found.damaged and found.step is not None:
        _processes.say(
            logging.WARNING,
            "%s: %s DAMAGED, so the latest valid step is %d.\n%s",
            home, _of_steps(found.damaged), found.step, _told(found.damaged),
        )  # fmt: skip


def _of_steps(found: dict[int, list[str]]) -> str:
    return f"step {next(iter(found))} is" if len(found) == 1 else f"steps {_joined(sorted(found))} are"


def _told(damaged: dict[int, list[str]]) -> str:
    return "\n".join(f"{step}: {line}" for step in damaged for line in listed(damaged[step], MOST_LINES).split("\n"))


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
