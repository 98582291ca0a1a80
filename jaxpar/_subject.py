"""What is differentiated: an nnx module or a plain pytree, taken apart into trained parameters and the rest."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _context, _tree
from ._calls import bare_variables
from ._context import Region
from ._errors import StepError
from ._planned import gather_others, plan_read, unplan
from ._types import PyTree


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is differentiated: its trained parameters by path, its other state, and how to put it together."""

    params: dict[str, jax.Array]
    state: list[Any]
    build: Callable[[dict[str, jax.Array], list[Any]], tuple[PyTree, Callable[[], list[Any]]]]
    update: Callable[[list[Any]], None]
    as_gradients: Callable[[dict[str, jax.Array]], PyTree]


def graph_subject(model: PyTree) -> Subject:
    from flax import nnx

    region = _context.current()
    wanted = nnx.Param if region is None else nnx.All(nnx.Param, _trained(region))
    graphdef, params, others = nnx.split(model, wanted, ...)
    param_keys = [keys for keys, _ in nnx.to_flat_state(params)]
    param_leaves = [leaf for _, leaf in nnx.to_flat_state(params)]
    other_leaves, other_tree = jax.tree.flatten(others)
    paths = [_tree.path_of(keys) for keys in param_keys]

    def as_state(values: dict[str, jax.Array]) -> Any:
        leaves = [leaf.replace(values[path]) for path, leaf in zip(paths, param_leaves, strict=True)]
        return nnx.from_flat_state(list(zip(param_keys, leaves, strict=True)))

    def build(values: dict[str, jax.Array], state: list[Any]) -> tuple[PyTree, Callable[[], list[Any]]]:
        merged = nnx.merge(graphdef, as_state(values), jax.tree.unflatten(other_tree, state))
        bare = [] if region is None else _bare_parameters(merged, region)
        for path, variable in bare:
            plan_read(path, variable)

        def after() -> list[Any]:
            for _, variable in bare:
                unplan(variable)
            new_graphdef, _, new_others = nnx.split(merged, wanted, ...)
            if new_graphdef != graphdef:
                raise StepError("the loss adds or removes variables of the model. Make them before the step.")
            return jax.tree.leaves(new_others)

        return merged, after

    return Subject(
        params={path: leaf.get_raw_value() for path, leaf in zip(paths, param_leaves, strict=True)},
        state=other_leaves,
        build=build,
        update=lambda state: nnx.update(model, jax.tree.unflatten(other_tree, state)) if state else None,
        as_gradients=as_state,
    )


def _bare_parameters(state: PyTree, region: Region) -> list[tuple[str, Any]]:
    """The variables of an `nnx.State` that are parameters of the plan, which only a module's read by themselves."""
    matches = [
        (region.plan.matcher.match(path, variable.get_raw_value().shape), variable)
        for path, variable in bare_variables(state)
        if hasattr(variable.get_raw_value(), "shape")
    ]
    return [(match.record.path, variable) for match, variable in matches if match is not None]


def _trained(region: Region) -> Callable[..., bool]:
    matcher = region.plan.matcher

    def trained(keys: Any, variable: Any) -> bool:
        match = matcher.match(_tree.path_of(tuple(keys)), variable.get_raw_value().shape)
        return match is None or match.record.slot != "frozen"

    return trained


def pytree_subject(params: PyTree, gathered: frozenset[str]) -> Subject:
    """Of a plain pytree, whose leaves at the paths in `gathered` the loss gathers itself."""
    region = _context.current()
    flat = _tree.flatten(params)

    def is_trained(path: str, leaf: Any) -> bool:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return False
        match = None if region is None else region.plan.matcher.match(path, leaf.shape)
        return match is None or match.record.slot != "frozen"

    trained = {path: leaf for path, leaf in flat.leaves.items() if is_trained(path, leaf)}
    everything = len(trained) == len(flat.leaves)

    def build(values: dict[str, jax.Array], _: list[Any]) -> tuple[PyTree, Callable[[], list[Any]]]:
        return gather_others(flat.build({**flat.leaves, **values}), gathered), list

    def as_gradients(gradients: dict[str, jax.Array]) -> PyTree:
        frozen = (
            {}
            if everything
            else {path: jnp.zeros_like(leaf) for path, leaf in flat.leaves.items() if path not in trained}
        )
        built = flat.build({**frozen, **gradients})
        return jax.tree.map(lambda leaf: leaf if _tree.is_array(leaf) else None, built)  # functions have no gradient

    return Subject(params=trained, state=[], build=build, update=lambda state: None, as_gradients=as_gradients)
