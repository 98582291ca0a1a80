"""A call of a step taken apart, so that `jax.jit` sees arrays and nothing else; and its result put together.

Arguments may be nnx modules and optimisers (*nodes*: changed in place, as `nnx.jit` does it), any pytrees, an
`nnx.State` among them (its variables are a pytree's), and static values. All nodes of a call are split jointly, so that
a variable that two of them share stays shared. Splitting walks every module in Python, so `Glance` tells at a glance
whether the next call has the very same nodes.
"""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in order: positional ones, then keywords."""
    positional = {names[index] if index < len(names) else f"arg{index}": value for index, value in enumerate(args)}
    return positional | dict(sorted(kwargs.items()))


def take_apart(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Take a call of a function with positional parameters `names` apart.

    Raises:
        StepError: A static argument is not hashable.
    """
    named = list(by_name(names, args, kwargs).items())
    flat: list[tuple[str, Any]] = []
    treedefs = []
    slots: set[str] = set()
    for name, value in named:
        leaves, treedef = _flatten(value)
        flat += [(_join(name, path), leaf) for path, leaf in leaves]
        slots |= {_join(name, path) for path in optimizer_paths(value)}
        treedefs.append(treedef)
    node_at = [index for index, (_, leaf) in enumerate(flat) if is_node(leaf)]
    array_at = [index for index, (_, leaf) in enumerate(flat) if index not in set(node_at) and _is_traced(leaf)]
    static_at = [index for index in range(len(flat)) if index not in set(node_at) and index not in set(array_at)]
    nodes = tuple(flat[index][1] for index in node_at)
    graphdef, arrays, places, node_values = _split_nodes(
        nodes, [Place(flat[i][0], None, flat[i][0] in slots) for i in node_at]
    )
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
    for _, variable in bare_variables(result):
        unplan(variable)
    leaves, treedef = _flatten(result)
    slots = optimizer_paths(result)
    own: list[Any] = []
    own_places: list[Place] = []
    steps: list[tuple[str, Any]] = []
    arrays: list[Any] = []
    places: list[Place] = []
    for path, leaf in leaves:
        same = next((index for index, node in enumerate(nodes) if node is leaf), None)
        if same is not None:
            steps.append(("argument", same))
        elif is_node(leaf):
            steps.append(("node", len(own)))
            own.append(leaf)
            own_places.append(Place(path, None, path in slots))
        elif _is_traced(leaf):
            steps.append(("array", len(arrays)))
            arrays.append(leaf)
            places.append(Place(path, is_slot=path in slots))
        else:
            steps.append(("static", leaf))
    for node in own:
        _unplan_all(node)
    _, node_arrays, node_places, node_values = _split_nodes(tuple(own), own_places)

    def assemble(values: Sequence[Any], callers: tuple[Any, ...]) -> PyTree:
        made = node_values(values[: len(node_arrays)])
        plain = values[len(node_arrays) :]
        kinds = {"argument": callers, "node": made, "array": plain}
        return jax.tree.unflatten(treedef, [at if kind == "static" else kinds[kind][at] for kind, at in steps])

    return node_arrays + arrays, Result(node_places + places, assemble)


def node_arrays(nodes: tuple[Any, ...]) -> list[Any]:
    """The arrays of nnx `nodes`, in the order in which `take_apart` lists them."""
    return _split_nodes(nodes, [Place("")] * len(nodes))[1]


def graphdef_of(nodes: tuple[Any, ...]) -> Any:
    """The static structure of nnx `nodes`."""
    return _split_nodes(nodes, [Place("")] * len(nodes))[0]


def variables_of(nodes: tuple[Any, ...]) -> list[Any]:
    """For each array of `nodes`, in the same order, the variable that holds it; `None` for a bare array."""
    if not nodes:
        return []
    from flax import nnx

    at = {keys: node for keys, node in nnx.iter_graph(nodes) if isinstance(node, nnx.Variable)}
    return [at.get(keys) for keys, leaf in nnx.to_flat_state(nnx.state(nodes)) for _ in _arrays_of(leaf)]


def update_nodes(nodes: tuple[Any, ...], values: Mapping[int, Any]) -> None:
    """Put `values`, by their place in the order of `take_apart`, into the caller's own nnx `nodes`, in place."""
    if not values:
        return
    from flax import nnx

    at, changed = 0, []
    for keys, leaf in nnx.to_flat_state(nnx.state(nodes)):
        own = [array for _, array in _arrays_of(leaf)]
        if any(at + index in values for index in range(len(own))):
            changed.append((keys, _with(leaf, [values.get(at + index, array) for index, array in enumerate(own)])))
        at += len(own)
    nnx.update(nodes, nnx.from_flat_state(changed))


class Glance:
    """What the last call looked like: whether the next one is alike shows without splitting its nodes.

    It is, if it has the same nnx objects, the modules in them the same attributes, by identity, the variables the same
    metadata, and all else is equal; and if each array has the type it had and lies where it should. Keeps no array and
    no node alive.
    """

    @classmethod
    def of(cls, call: Call, shardings: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Glance | None":
        """Of a call that has just been made; `None` if its nodes hold what cannot be watched."""
        variables = variables_of(call.nodes)
        containers: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        watched = all(_watch(node, containers) for node in call.nodes)
        if not watched or not all(each is not None and _tree.is_array(each.get_raw_value()) for each in variables):
            return None
        return cls(call, shardings, args, kwargs, variables, containers)

    def __init__(
        self,
        call: Call,
        shardings: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        variables: list[Any],
        containers: list[tuple[dict[Any, Any], dict[Any, Any]]],
    ):
        leaves, self._treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
        self._inside: list[Any] = [(variables, [each.get_metadata() for each in variables], containers)]
        forget = self._inside.clear  # what is inside a node must not outlive it
        self._roots = [(at, weakref.ref(leaf, lambda _: forget())) for at, leaf in enumerate(leaves) if is_node(leaf)]
        self._arrays_at = [at for at, leaf in enumerate(leaves) if not is_node(leaf) and _is_traced(leaf)]
        rest = set(range(len(leaves))) - {at for at, _ in self._roots} - set(self._arrays_at)
        self._static = [(at, leaves[at]) for at in sorted(rest)]
        self._types = [(type_of(array), sharding) for array, sharding in zip(call.arrays, shardings, strict=True)]
        self._known: list[tuple[Any, Any]] = [(self, self)] * len(self._types)  # literal aval and sharding; none yet

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...]] | None:
        """The arrays of a call in the order of `take_apart`, and its nodes; `None` if it is not alike."""
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node if self._roots else None)
        if treedef != self._treedef or not self._inside:
            return None
        nodes = tuple(leaves[at] for at, _ in self._roots)
        variables, metadata, containers = self._inside[0]
        alike = (
            all(node is root() for node, (_, root) in zip(nodes, self._roots, strict=True))
            and all(type(leaves[at]) is type(value) and leaves[at] == value for at, value in self._static)
            and all(_unchanged(now, before) for now, before in containers)
            and all(each.get_metadata() == before for each, before in zip(variables, metadata, strict=True))
        )
        if not alike:
            return None
        arrays = [each.get_raw_value() for each in variables] + [leaves[at] for at in self._arrays_at]
        for index, (array, known) in enumerate(zip(arrays, self._known, strict=True)):
            if getattr(array, "aval", None) is not known[0] or array.sharding is not known[1]:
                arrays[index] = self._placed(index, array)
                if arrays[index] is None:
                    return None
        return arrays, nodes

    def update(self, values: Mapping[int, Any]) -> None:
        """As `update_nodes`."""
        variables = self._inside[0][0]
        for at, value in values.items():
            variables[at].set_raw_value(value)

    def _placed(self, index: int, array: Any) -> Any:
        """An array that is not literally as the last one: itself if it is equal to it, moved if it is a scalar."""
        kind, sharding = self._types[index]
        if not _is_traced(array) or isinstance(array, jax.ShapeDtypeStruct) or type_of(array) != kind:
            return None
        if isinstance(array, jax.Array) and getattr(array, "sharding", None) == sharding:
            self._known[index] = (array.aval, array.sharding)
            return array
        return None if kind[0] else jax.device_put(array, sharding)


def type_of(array: Any) -> tuple[tuple[int, ...], Any, bool]:
    """Shape, dtype, and whether the dtype is weak, as JAX sees them: a Python `0` is what `0 + 1` comes back as."""
    aval = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    return (aval.shape, aval.dtype, bool(aval.weak_type))


def _watch(value: Any, containers: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> bool:
    """Add the dicts in which `value` keeps modules and variables, and copies of them; `False` if it may keep others."""
    from flax import nnx

    if isinstance(value, nnx.Variable) or jax.tree_util.all_leaves([value]) or value is None:
        return True
    if isinstance(value, tuple):
        return all(_watch(each, containers) for each in value)
    if isinstance(value, nnx.Pytree | nnx.State):
        items = vars(value)
    elif isinstance(value, dict):
        items = value
    else:
        return False
    containers.append((items, dict(items)))
    return all(_watch(each, containers) for key, each in items.items() if not str(key).startswith("_pytree__"))


def _unchanged(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return len(now) == len(before) and all(now.get(key) is value for key, value in before.items())


def bare_variables(tree: PyTree) -> list[tuple[str, Any]]:
    """The nnx variables of `tree` that are in no module, such as those of an `nnx.State`, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_tree.is_graph_node)[0]
    return [(_tree.path_of(keys), leaf) for keys, leaf in leaves if _tree.is_graph_node(leaf) and not is_node(leaf)]


def is_node(leaf: Any) -> bool:
    """Whether `leaf` is an nnx module, optimiser or the like, which is changed in place."""
    if not _tree.is_graph_node(leaf):
        return False
    from flax import nnx

    return not isinstance(leaf, nnx.Variable)


def optimizer_paths(tree: PyTree) -> set[str]:
    """Paths of the arrays in `tree` that lie in a NamedTuple, as all states of Optax do."""

    def is_state(node: Any) -> bool:
        return (isinstance(node, tuple) and hasattr(node, "_fields")) or is_node(node)

    found = set()
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0]:
        if isinstance(node, tuple):
            found |= {_join(_tree.path_of(keys), path) for path, _ in _flatten(node)[0]}
    return found


def _flatten(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of `tree` by path, nodes being leaves, and its structure. A variable has the path of its value."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    paths: list[str] = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_tree.is_graph_node)[0]:
        is_variable = _tree.is_graph_node(leaf) and not is_node(leaf)
        inside = [path for path, _ in _values_of(leaf)] if is_variable else [""]
        paths += [_join(_tree.path_of(keys), path) for path in inside]
    return list(zip(paths, leaves, strict=True)), treedef


def _split_nodes(nodes: tuple[Any, ...], at: Sequence[Place]) -> tuple[Any, list[Any], list[Place], Callable[..., Any]]:
    if not nodes:
        return None, [], [], lambda values: ()
    from flax import nnx

    graphdef, state = nnx.split(nodes)
    flat: list[tuple[tuple[Any, ...], Any]] = list(nnx.to_flat_state(state))
    arrays, places = [], []
    for keys, leaf in flat:
        kind = type(leaf) if isinstance(leaf, nnx.Variable) else None
        node = at[int(keys[0])]
        is_slot = node.is_slot or (kind is not None and issubclass(kind, nnx.OptState))
        for path, array in _arrays_of(leaf):
            arrays.append(array)
            places.append(Place(_join(node.path, _join(_tree.path_of(keys[1:]), path)), kind, is_slot))

    def values_to_nodes(values: Sequence[Any]) -> tuple[Any, ...]:
        left = iter(values)
        filled = [(keys, _with(leaf, [next(left) for _ in _arrays_of(leaf)])) for keys, leaf in flat]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    return graphdef, arrays, places, values_to_nodes


def _arrays_of(leaf: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of a variable or bare array, by path in it: one, those of a pytree, or none (`optax.MaskedNode`)."""
    return ((path, value) for path, value in _values_of(leaf) if _tree.is_array(value))


def _values_of(leaf: Any) -> list[tuple[str, Any]]:
    value = leaf.get_raw_value() if _tree.is_graph_node(leaf) else leaf
    return [(_tree.path_of(keys), each) for keys, each in jax.tree_util.tree_flatten_with_path(value)[0]]


def _with(leaf: Any, values: list[Any]) -> Any:
    """A copy of the variable `leaf` that holds `values`; or the one value, where `leaf` is a bare array."""
    if not _tree.is_graph_node(leaf):
        return values[0]
    old, treedef = jax.tree.flatten(leaf.get_raw_value())
    left = iter(values)
    return leaf.replace(jax.tree.unflatten(treedef, [next(left) if _tree.is_array(each) else each for each in old]))


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
