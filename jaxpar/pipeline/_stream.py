"""What a pipeline's stages hand on: any pytree, taken apart into arrays with a gradient and arrays without.

Random-number keys travel as numbers, for a permute and a ring know no keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from .._types import PyTree

Both = tuple[list[Any], list[Any]]
"""The arrays of a stream that have a gradient, and the others."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a stream is taken apart: into arrays that have a gradient and ones that have none, keys as numbers.

    Attributes:
        treedef: Its structure.
        implementations: Of each leaf that is a random-number key; `None` for others.
        is_float: Whether each leaf has a gradient.
        both: The shapes of the two lists.
        lead: Leading dims of what the ends add up: the replicas; the stages too, where the ends' rows are split.
        has_rows: Which arrays of the two lists have rows; said where these are split.
    """

    treedef: Any
    implementations: tuple[Any, ...]
    is_float: tuple[bool, ...]
    both: Both
    lead: tuple[int, ...] = ()
    has_rows: Any = True

    @property
    def is_key(self) -> tuple[list[bool], list[bool]]:
        """Which arrays of the two lists were random-number keys."""
        keys = [
            each is not None for each, is_float in zip(self.implementations, self.is_float, strict=True) if not is_float
        ]
        return [False] * sum(self.is_float), keys

    @property
    def is_split(self) -> bool:
        """Whether each stage computes the ends for its part of the rows of a microbatch."""
        return len(self.lead) > 1

    @classmethod
    def of(cls, stream: PyTree) -> "Form":
        """The form of a stream of these shapes."""
        leaves, treedef = jax.tree.flatten(stream)
        is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
        implementations: list[Any] = []

        def ask(leaves: list[Any]) -> None:  # in a trace: a shape does not tell
            implementations.extend(
                jax.random.key_impl(leaf) if key else None for leaf, key in zip(leaves, is_key, strict=True)
            )

        jax.eval_shape(ask, leaves)
        is_float = tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)
        bare = cls(treedef, tuple(implementations), is_float, ([], []))
        return dataclasses.replace(bare, both=jax.eval_shape(bare.apart, stream))

    def apart(self, stream: PyTree) -> Both:
        """Arrays with a gradient, and others."""
        floats: list[Any] = []
        others: list[Any] = []
        for leaf, key, is_float in zip(jax.tree.leaves(stream), self.implementations, self.is_float, strict=True):
            (floats if is_float else others).append(leaf if key is None else jax.random.key_data(leaf))
        return floats, others

    def together(self, floats: list[Any], others: list[Any]) -> PyTree:
        """The stream of these."""
        rest_floats, rest_others = iter(floats), iter(others)
        leaves = []
        for key, is_float in zip(self.implementations, self.is_float, strict=True):
            leaf = next(rest_floats if is_float else rest_others)
            leaves.append(leaf if key is None else jax.random.wrap_key_data(leaf, impl=key))
        return jax.tree.unflatten(self.treedef, leaves)


def independent(function: Callable[..., Any], fixed: PyTree, given: PyTree) -> list[bool]:
    """Which results of `function(fixed, given)` depend on nothing of `given`."""
    jaxpr = jax.make_jaxpr(function)(fixed, given).jaxpr
    reached = set(jaxpr.invars[len(jax.tree.leaves(fixed)) :])
    for eqn in jaxpr.eqns:
        if any(not isinstance(var, jax_core.Literal) and var in reached for var in eqn.invars):
            reached |= set(eqn.outvars)
    return [isinstance(var, jax_core.Literal) or var not in reached for var in jaxpr.outvars]
