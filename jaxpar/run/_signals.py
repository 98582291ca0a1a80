"""Ctrl-C and SIGTERM as a request that the loop reads at the end of a step."""

import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from .. import _processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("jaxpar.run")


@dataclasses.dataclass
class Request:
    """Which signal asked to stop, if one did.

    Attributes:
        number: The signal's number, or 0.
        is_told: Whether the run has noted it.
        hurried: Ctrl-C came a second time: nothing is waited for.
    """

    number: int = 0
    hurried: bool = False
    is_told: bool = False

    @property
    def name(self) -> str:
        """`"SIGINT"` or `"SIGTERM"`."""
        return signal.Signals(self.number).name


@contextlib.contextmanager
def caught() -> Iterator[Request]:
    """Within, the first Ctrl-C or SIGTERM is noted and not acted on; a second Ctrl-C interrupts at once.

    Python runs signal handlers in the main thread only, and lets no other install them: elsewhere this does nothing and
    says so. Handlers that were there before are put back on leaving; a signal that was ignored stays ignored.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        _processes.say(logging.WARNING, "This loop is not in the main thread: Ctrl-C and SIGTERM will not save first.")
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.number and number == signal.SIGINT:
            request.hurried = True
            put_back()
            raise KeyboardInterrupt
        request.number = request.number or number
        hint = "Ctrl-C again leaves at once, without saving." if number == signal.SIGINT else ""
        # On whichever process it came to: a scheduler may signal one alone.
        _log.warning("%s: finishing this step, then saving. %s", signal.Signals(number).name, hint)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        put_back()
