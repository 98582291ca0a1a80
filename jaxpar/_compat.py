"""What differs between the versions of JAX that we support: each difference, and the version that lets us delete it."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp


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


@contextlib.contextmanager
def exact_erf() -> Iterator[None]:
    """Let `jax.lax.erf`, and with it the exact GELU, be traced in a manual region that knows over what values differ.

    JAX 0.12 writes it as a polynomial whose coefficients differ over no axis while its argument does, and refuses that:
    "Primitive polynomial requires varying manual axes to match". It goes when that does.
    """
    try:
        home: Any = importlib.import_module("jax._src.lax.erf")
    except ModuleNotFoundError:  # before 0.12 it is an operation of XLA's
        yield
        return
    original = home.polynomial

    def polynomial(x: Any, coefficients: Any, **settings: Any) -> Any:
        axes = tuple(jax.typeof(x).manual_axis_type.varying)
        if axes:
            numbers = (jnp.asarray(each, x.dtype) for each in coefficients)
            coefficients = [jax.lax.pcast(each, axes, to="varying") for each in numbers]
        return original(x, coefficients, **settings)

    home.polynomial = polynomial
    try:
        yield
    finally:
        home.polynomial = original
