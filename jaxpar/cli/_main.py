"""How a command is started, and how an error reaches whoever typed it: one message, no traceback."""

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
    (`--traceback` adds where). 130 and 143: stopped by Ctrl-C or SIGTERM, saved.

    Example:
        >>> main(["plan", "models.mlp:mlp", "--mesh", "data=8", "--follow", "up.bias"])
        up.bias  float32 (256,), 1.0 KiB
        ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    if words == ["doctor"]:  # first, since whatever is imported next may be what is missing
        print(_doctor.report())
        return 0
    import tyro

    from ._commands import Command

    command: Any = tyro.cli(
        Command,
        args=words,
        prog="jaxpar",
        description=f"Partition a model, prove the numbers, train. {TRACEBACK}: show where an error comes from.",
        config=(tyro.conf.configure(tyro.conf.OmitArgPrefixes),),
    )
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
