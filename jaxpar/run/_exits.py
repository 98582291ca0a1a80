"""Exit codes, for those who start processes: schedulers, shells and `jaxpar launch`.

0     done
75    stopped by SIGTERM or a preemption notice, saved: start it again and it goes on (EX_TEMPFAIL of sysexits.h)
130   stopped by Ctrl-C, saved
74    a step hung, and the process ended itself (EX_IOERR)
76    the run must go back to a checkpoint, and its loop cannot by itself: start it again
70    the launcher gave up: starting again will not help (EX_SOFTWARE)
else  it failed: 1 after an exception, 128 + n after signal n
"""

import signal

DONE = 0
GAVE_UP = 70
HUNG = 74
AGAIN = 75
BACK = 76
INTERRUPTED = 130

OF_STOP = {"SIGINT": INTERRUPTED, "SIGTERM": AGAIN, "preemption": AGAIN, "rollback": BACK}
"""By why a run stopped."""


def told(code: int) -> str:
    """A return code of `subprocess` in words.

    Example:
        >>> told(-9), told(1), told(137), told(74)
        ('SIGKILL', 'exit code 1', 'SIGKILL', 'exit code 74, a step hung')
    """
    why = {HUNG: ", a step hung", BACK: ", to go back to a checkpoint"}.get(code, "")
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name if number > 0 and code != INTERRUPTED else f"exit code {code}{why}"
    except ValueError:
        return f"exit code {code}{why}"
