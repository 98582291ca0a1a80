"""What a process logs, kept under the run's directory: `logs/process_3.log`.

Under `jaxpar launch` the launcher keeps all that a process writes, its log and what the runtime says included; then
nothing is written here.
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

from . import _launched


def place(directory: pathlib.Path, process: int | str) -> pathlib.Path:
    """The log of one process."""
    return directory / "logs" / f"process_{process}.log"


@contextlib.contextmanager
def kept_log(directory: pathlib.Path, process: int) -> Iterator[None]:
    """Within, what goes to Python's root logger goes to the run's log too. Levels stay as they are set."""
    if _launched.is_launched():
        yield
        return
    path = place(directory, process)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
