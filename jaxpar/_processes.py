"""What differs between the processes of a run, and what they must agree on (in one process, nothing)."""

import logging
from typing import Any

import jax
import numpy as np

_log = logging.getLogger("jaxpar")


def is_first() -> bool:
    """Whether this is process 0, the one that writes files and logs."""
    return jax.process_index() == 0


def say(level: int, text: str, *values: Any) -> None:
    """Log, on process 0 alone."""
    if is_first():
        _log.log(level, text, *values)


def of_first(number: int) -> int:
    """`number` as process 0 has it. A collective of all processes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def greatest(number: int) -> int:
    """The greatest `number` of any process. A collective of all processes, and it waits for them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())
