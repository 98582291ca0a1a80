"""A call of a step taken apart, so that `jax.jit` sees arrays and nothing else; and its result put together.

Arguments may be nnx graph nodes (changed in place, as `nnx.jit` does it), any pytrees, and static values. All nodes of
a call are split jointly, so that a variable that two of them share stays shared.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import _tree
from ._errors import StepError
from ._planned import unplan
from ._types import PyTree


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of a call comes from: its path, whether it is optimiser state, and its nnx kind."""

    path: str
    kind: type | None = None
    is_slot: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """A call taken apart.

    Attributes:
        arrays: Every array, those of nnx nodes first.
        places: Where each comes from.
        num_node_arrays: How many belong to nnx nodes.
        nodes: The caller's own nnx objects.
        static: All else, hashable: calls that are equal in it and in their arrays' types share a compilation.
        rebuild: From arrays to `(args, kwargs, nodes)` as the step wants them.
    """

    arrays: list[Any]
    places: list[Place]
    num_node_arrays: int
    nodes: tuple[Any, ...]
    static: Any
    rebuild: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]]


def argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters of `function`, as far as it tells."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def take_apart(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Take a call of a function with positional parameters `names` apart.

    Raises:
        StepError: A static argument is not hashable.
    """
    named = [(names[index] if index < len(names) else f"arg{index}", value) for index, value in enumerate(args)]
    named += sorted(kwargs.items())
    flat: list[tuple[str, Any]] = []
    treedefs = []
    slots: set[str] = set()
    for name, value in named:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_node)
        flat += [(_join(name, _tree.path_of(keys)), leaf) for keys, leaf in leaves]
        slots |= {_join(name, path) for path in optimizer_paths(value)}
        treedefs.append(treedef)
    node_at = [index for index, (_, leaf) in enumerate(flat) if is_node(leaf)]
    array_at = [index for index, (_, leaf) in enumerate(flat) if index not in set(node_at) and _is_traced(leaf)]
    static_at = [index for index in range(len(flat)) if index not in set(node_at) and index not in set(array_at)]
    nodes = tuple(flat[index][1] for index in node_at)
    graphdef, arrays, places, node_values = _split_nodes(nodes, [flat[index][0] for index in node_at])
    num_node_arrays = len(arrays)
    arrays += [flat[index][1] for index in array_at]
    places += [Place(flat[index][0], is_slot=flat[index][0] in slots) for index in array_at]
    static_values = tuple(flat[index][1] for index in static_at)
    static = (graphdef, tuple(treedefs), tuple(array_at), tuple(name for name, _ in named), static_values)
    try:
        hash(static)
    except TypeError:
        wrong = next(flat[index] for index in static_at if not _hashable(flat[index][1]))
        raise StepError(
            f"{wrong[0]}: a {type(wrong[1]).__name__} is neither an array nor hashable, so a step cannot take it. "
            "Pass arrays, nnx modules, pytrees of them, or hashable settings."
        ) from None
    num_args = len(args)

    def rebuild(values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        merged = node_values(values[:num_node_arrays])
        leaves: list[Any] = [None] * len(flat)
        for index, value in [
            *zip(node_at, merged, strict=True),
            *zip(array_at, values[num_node_arrays:], strict=True),
            *zip(static_at, static_values, strict=True),
        ]:
            leaves[index] = value
        start, built = 0, []
        for treedef in treedefs:
            built.append(jax.tree.unflatten(treedef, leaves[start : start + treedef.num_leaves]))
            start += treedef.num_leaves
        keywords = {name: value for (name, _), value in zip(named[num_args:], built[num_args:], strict=True)}
        return tuple(built[:num_args]), keywords, merged

    return Call(arrays, places, num_node_arrays, nodes, static, rebuild)


@dataclasses.dataclass(frozen=True)
class Result:
    """How the result of a step is put together again: made while tracing, used after every call.

    Attributes:
        places: Where each array of the result goes, after those of the nodes that came in.
        assemble: From the arrays and the caller's nodes to what the step returned.
    """

    places: list[Place]
    assemble: Callable[[Sequence[Any], tuple[Any, ...]], PyTree]


def take_result_apart(result: PyTree, nodes: tuple[Any, ...]) -> tuple[list[Any], Result]:
    """The arrays of what a step returned, and how to put them together; `nodes` are its own arguments, traced."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(result, is_leaf=is_node)
    slots = optimizer_paths(result)
    own: list[Any] = []
    own_paths: list[str] = []
    steps: list[tuple[str, Any]] = []
    arrays: list[Any] = []
    places: list[Place] = []
    for keys, leaf in leaves:
        path = _tree.path_of(keys)
        same = next((index for index, node in enumerate(nodes) if node is leaf), None)
        if same is not None:
            steps.append(("argument", same))
        elif is_node(leaf):
            steps.append(("node", len(own)))
            own.append(leaf)
            own_paths.append(path)
        elif _is_traced(leaf):
            steps.append(("array", len(arrays)))
            arrays.append(leaf)
            places.append(Place(path, is_slot=path in slots))
        else:
            steps.append(("static", leaf))
    for node in own:
        _unplan_all(node)
    _, node_arrays, node_places, node_values = _split_nodes(tuple(own), own_paths)

    def assemble(values: Sequence[Any], callers: tuple[Any, ...]) -> PyTree:
        made = node_values(values[: len(node_arrays)])
        plain = values[len(node_arrays) :]
        kinds = {"argument": callers, "node": made, "array": plain}
        return jax.tree.unflatten(treedef, [at if kind == "static" else kinds[kind][at] for kind, at in steps])

    return node_arrays + arrays, Result(node_places + places, assemble)


def node_arrays(nodes: tuple[Any, ...]) -> list[Any]:
    """The arrays of nnx `nodes`, in the order in which `take_apart` lists them."""
    return _split_nodes(nodes, [""] * len(nodes))[1]


def graphdef_of(nodes: tuple[Any, ...]) -> Any:
    """The static structure of nnx `nodes`."""
    return _split_nodes(nodes, [""] * len(nodes))[0]


def update_nodes(nodes: tuple[Any, ...], values: Sequence[Any]) -> None:
    """Put `values`, in the order of `take_apart`, into the caller's own nnx `nodes`, in place."""
    if not nodes:
        return
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(nodes))
    nnx.update(
        nodes,
        nnx.from_flat_state([(keys, _with(leaf, value)) for (keys, leaf), value in zip(flat, values, strict=True)]),
    )


def is_node(leaf: Any) -> bool:
    """Whether `leaf` is an nnx graph node or variable."""
    return _tree.is_graph_node(leaf)


def optimizer_paths(tree: PyTree) -> set[str]:
    """Paths of the arrays in `tree` that lie in a NamedTuple, as all states of Optax do."""

    def is_state(node: Any) -> bool:
        return (isinstance(node, tuple) and hasattr(node, "_fields")) or is_node(node)

    found = set()
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0]:
        if isinstance(node, tuple):
            inner = jax.tree_util.tree_flatten_with_path(node)[0]
            found |= {_tree.path_of((*keys, *rest)) for rest, _ in inner}
    return found


def _split_nodes(
    nodes: tuple[Any, ...], prefixes: Sequence[str]
) -> tuple[Any, list[Any], list[Place], Callable[..., Any]]:
    if not nodes:
        return None, [], [], lambda values: ()
    from flax import nnx

    graphdef, state = nnx.split(nodes)
    flat: list[tuple[tuple[Any, ...], Any]] = list(nnx.to_flat_state(state))
    arrays, places = [], []
    for keys, leaf in flat:
        is_variable = isinstance(leaf, nnx.Variable)
        kind = type(leaf) if is_variable else None
        arrays.append(leaf.get_raw_value() if is_variable else leaf)
        prefix = prefixes[int(keys[0])]
        path = _join(prefix, _tree.path_of(keys[1:]))
        places.append(Place(path, kind, is_slot=kind is not None and issubclass(kind, nnx.OptState)))

    def values_to_nodes(values: Sequence[Any]) -> tuple[Any, ...]:
        with_values = [(keys, _with(leaf, value)) for (keys, leaf), value in zip(flat, values, strict=True)]
        return nnx.merge(graphdef, nnx.from_flat_state(with_values))

    return graphdef, arrays, places, values_to_nodes


def _with(leaf: Any, value: Any) -> Any:
    """`value` in a copy of the variable `leaf`, or alone where `leaf` is a bare array."""
    return leaf.replace(value) if hasattr(leaf, "get_raw_value") else value


def _unplan_all(node: Any) -> None:
    from flax import nnx

    for _, leaf in nnx.iter_graph(node):
        if isinstance(leaf, nnx.Variable):
            unplan(leaf)


def _is_traced(leaf: Any) -> bool:
    return _tree.is_array(leaf) or (isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _join(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)
