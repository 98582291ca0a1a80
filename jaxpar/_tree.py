"""One traversal of any state: an nnx graph node, or any pytree, to paths and leaves.

A *path* is where a leaf lives, with one spelling everywhere: `blocks.0.attn.q.kernel`. An nnx graph (a module, an
optimiser, or a tuple, list or dict that holds one) is walked by reference, so that a shared `Variable` is one leaf; any
other pytree is walked by `jax.tree`. Leaves that are not arrays (functions, strings) are static: never listed, never
changed.
"""

import dataclasses
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ._errors import ShardingError
from ._types import PyTree


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is an array, a tracer, or the shape and dtype of one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_graph_node(leaf: Any) -> bool:
    """Whether `leaf` is an nnx module, optimiser or variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(leaf, nnx.Pytree | nnx.Variable)  # not imported: nobody has made one


def is_graph(tree: PyTree) -> bool:
    """Whether `tree` is an nnx module, optimiser or variable, or a container that holds one."""
    return any(map(is_graph_node, jax.tree.leaves(tree, is_leaf=is_graph_node)))


def path_of(keys: tuple[Any, ...]) -> str:
    """The dotted path of a key path of `jax.tree_util`, or of a tuple of names and indices."""
    return ".".join(_key_name(key) for key in keys)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree taken apart: its array leaves by path, and what is needed to put it together again.

    `kinds` holds the nnx `Variable` type of each leaf, and nothing for leaves of plain pytrees.
    """

    leaves: dict[str, Any]
    kinds: dict[str, type]
    build: Callable[[Mapping[str, Any]], PyTree]


def flatten(tree: PyTree) -> Flat:
    """Take `tree` apart into array leaves by path.

    Raises:
        ShardingError: Two leaves have the same path (`{"a.b": x, "a": {"b": y}}`).
    """
    return _flatten_graph(tree) if is_graph(tree) else _flatten_pytree(tree)


def leaves(tree: PyTree) -> dict[str, Any]:
    """The array leaves of `tree` by path.

    Example:
        >>> list(leaves({"mlp": {"up": np.ones(3), "down": np.ones(3)}}))
        ['mlp.down', 'mlp.up']
    """
    return flatten(tree).leaves


def replace(tree: PyTree, values: Mapping[str, Any]) -> PyTree:
    """`tree` with the leaves in `values` exchanged.

    nnx graph nodes are changed in place and returned; any other pytree is rebuilt.
    """
    if not is_graph(tree):
        flat = flatten(tree)
        return flat.build({**flat.leaves, **values})
    from flax import nnx

    exchanged = [(keys, _with_values(leaf, path_of(keys), values)) for keys, leaf in nnx.to_flat_state(nnx.state(tree))]
    nnx.update(tree, nnx.from_flat_state(exchanged))
    return tree


def only(tree: PyTree, paths: Container[str]) -> PyTree:
    """A plain pytree with `None` for every leaf that is not an array at one of `paths`; its structure stays."""
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(
        treedef, [leaf if is_array(leaf) and path_of(keys) in paths else None for keys, leaf in with_keys]
    )


def _flatten_pytree(tree: PyTree) -> Flat:
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_of(keys) for keys, _ in with_keys]
    static = [leaf for _, leaf in with_keys]
    array_at = [index for index, leaf in enumerate(static) if is_array(leaf)]
    _check_distinct([paths[index] for index in array_at])

    def build(values: Mapping[str, Any]) -> PyTree:
        new = list(static)
        for index in array_at:
            new[index] = values[paths[index]]
        return jax.tree.unflatten(treedef, new)

    return Flat({paths[index]: static[index] for index in array_at}, {}, build)


def _flatten_graph(tree: PyTree) -> Flat:
    from flax import nnx

    graphdef, state = nnx.split(tree)
    flat_state = nnx.to_flat_state(state)
    found: list[tuple[str, Any]] = []
    kinds: dict[str, type] = {}
    for keys, leaf in flat_state:
        own = list(_arrays_of(leaf, path_of(keys)))
        found += own
        if isinstance(leaf, nnx.Variable):
            kinds |= dict.fromkeys((path for path, _ in own), type(leaf))
    _check_distinct([path for path, _ in found])

    def build(values: Mapping[str, Any]) -> PyTree:
        rebuilt = [(keys, _with_values(leaf, path_of(keys), values)) for keys, leaf in flat_state]
        return nnx.merge(graphdef, nnx.from_flat_state(rebuilt))

    return Flat(dict(found), kinds, build)


def _arrays_of(leaf: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The arrays of an nnx variable or of a bare array, by path: one, those of a pytree, or none (`MaskedNode`)."""
    value = leaf.get_raw_value() if is_graph_node(leaf) else leaf
    for keys, array in jax.tree_util.tree_flatten_with_path(value)[0]:
        if is_array(array):
            yield ".".join(part for part in (path, path_of(keys)) if part), array


def _with_values(leaf: Any, path: str, values: Mapping[str, Any]) -> Any:
    """`leaf`, an nnx variable or a bare array at `path`, with those of its arrays exchanged that are in `values`."""
    own = dict(_arrays_of(leaf, path))
    if own.keys().isdisjoint(values):
        return leaf
    if not is_graph_node(leaf):
        return values[path]
    new = [values.get(each, array) for each, array in own.items()]
    old, treedef = jax.tree.flatten(leaf.get_raw_value())
    remaining = iter(new)
    return leaf.replace(jax.tree.unflatten(treedef, [next(remaining) if is_array(each) else each for each in old]))


def _check_distinct(paths: list[str]) -> None:
    repeated = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise ShardingError(
            f"Two leaves have the path {repeated[0]!r}: a key with a dot in it collides with a nested one. "
            "Rename one of the two."
        )
