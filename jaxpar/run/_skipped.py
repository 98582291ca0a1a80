"""Which batches a run leaves out, in `skipped.json`: written before the run goes back, and read when it is resumed.

A step that is listed draws its batch anew: the one that it would have had is passed over, and all later steps have the
batch after their own. A step may be listed more than once.
"""

import collections
import json
import pathlib
from collections.abc import Iterable

from .. import _processes
from .._errors import CheckpointError

NAME = "skipped.json"


class Skipped:
    """The list of one run.

    Args:
        directory: Where the run lives.
    Raises:
        CheckpointError: The file is not such a list.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._path = directory / NAME
        try:
            found = json.loads(self._path.read_text())["steps"] if self._path.exists() else []
            self._steps = collections.Counter(map(int, found))
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"{self._path} is no list of steps. Mend it, or delete it to skip nothing.") from None

    def times(self, step: int) -> int:
        """How many batches are passed over before `step` has its own."""
        return self._steps[step]

    def add(self, steps: Iterable[int]) -> None:
        """List `steps`, on disk too. Every process calls it with the same."""
        self._steps.update(steps)
        if _processes.is_first():
            written = self._path.with_suffix(".tmp")
            written.write_text(json.dumps({"steps": sorted(self._steps.elements())}) + "\n")
            written.rename(self._path)
