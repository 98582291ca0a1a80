"""What differs between the versions of JAX that we support: each difference, and the version that lets us delete it."""

from collections.abc import Mapping
from typing import Any


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are constants of its body, and how many are carried; what is left is scanned.

    JAX 0.12 has trees in place of the two numbers. With 0.12 the oldest, the first case goes.
    """
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def coordination_client() -> Any:
    """The client of the service by which the processes of a run know one another, or `None`.

    JAX has no public name for it, only for what is built on it. It goes when there is one.
    """
    from jax._src import distributed

    return distributed.global_state.client
