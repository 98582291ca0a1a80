"""Where metrics go. Anything with `write` and `close` is a writer."""

import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ._lines import Lines

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_log = logging.getLogger("jaxpar.run")


@runtime_checkable
class Writer(Protocol):
    """Takes the metrics of one step after another, on process 0, as Python floats.

    Example:
        >>> class Worst:
        ...     loss = 0.0
        ...
        ...     def write(self, step, metrics):
        ...         self.loss = max(self.loss, metrics["loss"])
        ...
        ...     def close(self):
        ...         pass
        >>> isinstance(Worst(), Writer)
        True
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of `step`. Called once a step, soon after it; must not be slow."""
        ...

    def close(self) -> None:
        """Write out what is held back. A later `write` opens it again."""
        ...


class JSONLines:
    """One JSON object a line, in a file: `{"step": 12, "time": 1767225600.0, "loss": 2.5}`.

    Appends, so a step that a run repeats after a crash is there twice: the later line holds. `NaN` and `Infinity` are
    written so, as Python and pandas read them. On a full disk lines wait for room; metrics are no reason to end a run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._lines = Lines(self.path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        error = self._lines.add(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}))
        if error and self._lines.held == 1:
            _log.warning("%s: %s, so metrics from step %d on wait until there is room.", self.path, error, step)

    def close(self) -> None:
        """Try once more what the disk refused; else a line is on disk when `write` returns."""
        if error := self._lines.flush():
            _log.error("%s: %s, so %d lines of metrics are lost.", self.path, error, self._lines.held)


class Console:
    """One line on the terminal, at most every `seconds`: `step 100  loss 2.345`.

    The first step and the last are always shown.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._shown_at = -float("inf")
        self._held_back = ""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.show(" ".join([f"step {step}", *(f" {name} {value:.4g}" for name, value in metrics.items())]))

    def show(self, line: str) -> None:
        """Print `line` now if one is due, else hold it back until `close`."""
        self._held_back = line
        if time.monotonic() - self._shown_at >= self.seconds:
            self.close()

    def close(self) -> None:
        if self._held_back:
            sys.stdout.write(self._held_back + "\n")
            sys.stdout.flush()
            self._shown_at, self._held_back = time.monotonic(), ""


class TensorBoard:
    """Event files for TensorBoard, through `tensorboardX` (`pip install 'jaxpar[tensorboard]'`).

    Args:
        directory: Where the event files go.
    Raises:
        ModuleNotFoundError: `tensorboardX` is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self._opened: SummaryWriter | None = None
        try:
            import tensorboardX  # noqa: F401  # found missing now, rather than after the first step
        except ModuleNotFoundError:
            raise ModuleNotFoundError("TensorBoard needs tensorboardX: pip install 'jaxpar[tensorboard]'") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX import SummaryWriter

        if self._opened is None:
            self._opened = SummaryWriter(self.directory)
        for name, value in metrics.items():
            self._opened.add_scalar(name, value, step)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None
