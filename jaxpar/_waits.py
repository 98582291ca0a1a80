"""How long this process was inside compiled steps: there it may wait for other processes, which is no time of its own.

Where dispatch is asynchronous that is next to nothing. The CPU runs a step that spans processes in place.
"""

import contextlib
import time
from collections.abc import Iterator

_seconds = 0.0


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """Within, time counts as waiting."""
    global _seconds
    began = time.monotonic()
    try:
        yield
    finally:
        _seconds += time.monotonic() - began


def seconds() -> float:
    """In all, since the process began."""
    return _seconds
