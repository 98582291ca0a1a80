"""A process that ends by an exception tells whoever asked, and does not wait for the others of its group.

Python ends a process by joining threads and running exit handlers. In a group of processes both may wait for the
others, which wait for this one in a collective: Orbax for 20 minutes, JAX's own shutdown for 5. So here the process
leaves at once, after its last words, and the others see its connection closed.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

Listener = Callable[[BaseException], None]

_listeners: list[Listener] = []
_before: Any = None


def on_crash(listener: Listener) -> Callable[[], None]:
    """Have `listener` called with the exception that ends this process; returns a function that takes it back."""
    install()
    _listeners.append(listener)

    def take_back() -> None:
        with contextlib.suppress(ValueError):
            _listeners.remove(listener)

    return take_back


def install() -> None:
    """Be asked when an exception ends this process, before what was asked until now."""
    global _before
    if sys.excepthook is not _hook:
        _before, sys.excepthook = sys.excepthook, _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for listener in reversed(_listeners):
        with contextlib.suppress(Exception):  # the exception itself is what must be seen
            listener(error)
    _before(kind, error, trace)
    if _is_one_of_several():
        logging.shutdown()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(130 if kind is KeyboardInterrupt else 1)


def _is_one_of_several() -> bool:
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
