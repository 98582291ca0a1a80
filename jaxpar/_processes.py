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
    return agreed(number)[0]


def agreed(*numbers: int) -> list[int]:
    """Of each of `numbers` the greatest of any process. One collective of all processes, and it waits for them."""
    return [max(column) for column in zip(*gathered(*numbers), strict=True)]


def gathered(*numbers: int) -> list[list[int]]:
    """The `numbers` of each process, `[process][number]`. One collective of all processes, and it waits for them."""
    if jax.process_count() == 1:
        return [list(numbers)]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(numbers, np.int32)).tolist()


def preempted(step: int) -> bool:
    """Whether JAX's preemption service has all processes stop after this step. It asks nobody until a notice has come.

    All processes call it with the same steps, and hear the same. The service takes SIGTERM too, from
    `jax.distributed.initialize` until the loop begins.
    """
    if jax.process_count() == 1 or not jax.distributed.is_initialized():
        return False
    from jax.experimental import multihost_utils

    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # the service was switched off: jax_enable_preemption_service
        return False
