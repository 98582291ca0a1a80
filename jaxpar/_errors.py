"""The errors a user can cause, and how they are worded.

Every one is a `ValueError`: it names the thing, gives the numbers, and ends with the way out. All failures of one
kind are gathered before one error is raised, so that a person mends them in one go.
"""

import difflib
from collections.abc import Iterable, Sequence


class ShardingError(ValueError):
    """A leaf, a spec, a strategy or a batch that cannot be laid out as asked."""


class MeshError(ValueError):
    """A mesh that cannot be made: an axis, a size, a device count or a hardware name is wrong."""


class StepError(ValueError):
    """A training step that cannot be partitioned, accumulated or compiled as asked."""


class DataError(ValueError):
    """A data file, tokeniser or batch that cannot be read or does not fit."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written here, or is not one of this program."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`" Did you mean 'tensor'?"` if one of `words` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(lines: Sequence[str], most: int = 20) -> str:
    """`lines` one under another, the tail counted rather than shown."""
    shown = list(lines[:most])
    if len(lines) > most:
        shown.append(f"... and {len(lines) - most} more")
    return "\n".join(shown)
