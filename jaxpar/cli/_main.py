"""How a command is started, and how an error reaches whoever typed it: one message, no traceback."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

from .._errors import CheckpointError, DataError, MeshError, ShardingError, StepError
from . import _doctor

OURS = (CheckpointError, DataError, MeshError, ShardingError, StepError)
TRACEBACK = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process) and return its exit code.

    0: done. 1: `verify` found a difference. 2: the command cannot be carried out, and one message says why
    (`--traceback` adds where). 75: stopped by SIGTERM or a preemption notice, saved: start it again. 130: stopped by
    Ctrl-C, saved. 70: `launch` gave up.

    Example:
        >>> main(["plan", "models.mlp:mlp", "--mesh", "data=8", "--follow", "up.bias"])
        up.bias  float32 (256,), 1.0 KiB
        ...
        0
    """
    words, after = split(list(sys.argv[1:] if argv is None else argv))
    show = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    if words == ["doctor"]:  # first, since whatever is imported next may be what is missing
        print(_doctor.report())
        return 0
    import tyro

    from ._commands import Command
    from ._launch import Launch

    command: Any = tyro.cli(
        Command,
        args=words,
        prog="jaxpar",
        description=f"Partition a model, prove the numbers, train. {TRACEBACK}: show where an error comes from.",
        config=(tyro.conf.configure(tyro.conf.OmitArgPrefixes),),
    )
    if isinstance(command, Launch):
        command = dataclasses.replace(command, command=tuple(after))
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        return command.run()
    except (ValueError, ImportError, OSError) as error:
        if show:
            raise
        where = "" if isinstance(error, OURS) else f"\n({type(error).__name__}; {TRACEBACK} shows where it comes from.)"
        print(f"jaxpar: {error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of the loop, which stops in good order by itself
        if show:
            raise
        return 130


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before `--`, and after it the command that `jaxpar launch` starts: its options are its own.

    Example:
        >>> split(["launch", "-n", "4", "--", "python", "train.py", "-n", "2"])
        (['launch', '-n', '4'], ['python', 'train.py', '-n', '2'])
    """
    at = words.index("--") if words[:1] == ["launch"] and "--" in words else len(words)
    return words[:at], words[at + 1 :]
