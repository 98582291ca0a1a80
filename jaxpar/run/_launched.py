"""What a launcher and a run tell each other: by environment variables, and by one small directory.

JAXPAR_LAUNCH    the directory; in it `run`, the path of the run that the processes work on
JAXPAR_ATTEMPT   which start of the group this is, from 1
JAXPAR_SLOT      which place on the machine this process has: the same after a restart with fewer processes
"""

import contextlib
import os
import pathlib
from collections.abc import Mapping

DIRECTORY, ATTEMPT, SLOT = "JAXPAR_LAUNCH", "JAXPAR_ATTEMPT", "JAXPAR_SLOT"


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether `jaxpar launch` started this process."""
    return bool(env.get(DIRECTORY))


def attempt(env: Mapping[str, str] = os.environ) -> int:
    """Which start of the group this is, from 1."""
    return int(env.get(ATTEMPT) or 1)


def is_restart(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher or SLURM has started this group again: it goes on with its run, and nobody has to say so."""
    return attempt(env) > 1 or int(env.get("SLURM_RESTART_COUNT") or 0) > 0


def tell_run(directory: pathlib.Path, env: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher, if there is one, on which run its processes work."""
    if is_launched(env):
        place = pathlib.Path(env[DIRECTORY])
        with contextlib.suppress(OSError):
            written = place / f"run.{os.getpid()}"
            written.write_text(str(directory))
            written.rename(place / "run")


def told_run(place: pathlib.Path) -> pathlib.Path | None:
    """The run that was told, if one was."""
    try:
        told = (place / "run").read_text()
    except OSError:
        return None
    return pathlib.Path(told) if told else None
