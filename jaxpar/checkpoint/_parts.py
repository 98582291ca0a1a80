"""A training state taken apart: arrays, Python numbers, and objects that keep a state of their own.

`_tree` sees arrays alone. A run also holds counters that are Python numbers, and a data loader whose position is a
small dict (`get_state`, `set_state`). The latter two go into JSON; a loader is one leaf, at the path where it stands.
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _tree
from .._errors import CheckpointError, listed
from .._types import PyTree

# Paths are keys inside Orbax's store and not files; still, none may look like a way out of a directory.
LEGAL_PATH = re.compile(r"[\w~@][\w.~@:+#/ -]*")

WHAT_IS_JSON = "A state is JSON: dicts with string keys, lists (no tuples), text, numbers."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What there is to save of a tree, by path.

    Attributes:
        arrays: Arrays, typed PRNG keys, or shapes and dtypes.
        values: Python ints, floats and bools.
        holders: Objects with `get_state` and `set_state`.
        loose: Paths of arrays and values that no module or optimiser holds, so that a step returns new ones.
        build: Makes the tree again from arrays and values by path. nnx objects are changed in place; `holders` are not
            touched.
    """

    arrays: dict[str, Any]
    values: dict[str, int | float | bool]
    holders: dict[str, Any]
    loose: frozenset[str]
    build: Callable[[Mapping[str, Any]], PyTree]

    def states(self) -> dict[str, Any]:
        """What the holders say now."""
        return {path: plain_json(holder.get_state(), path) for path, holder in self.holders.items()}


def take_apart(tree: PyTree) -> Parts:
    """Take `tree` apart.

    Raises:
        CheckpointError: Naming all leaves that share a path, whose path is illegal, or that cannot be saved.
    """
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_whole)
    is_root = bool(with_keys) and not with_keys[0][0]
    paths = ["value" if is_root else _tree.path_of(keys) for keys, _ in with_keys]
    given = [leaf for _, leaf in with_keys]
    graph_at = [index for index, leaf in enumerate(given) if _is_graph_node(leaf)]
    # One walk over all nnx objects, so that a variable which two of them share is one leaf.
    graph = given[0] if is_root else {paths[index]: given[index] for index in graph_at}
    inside = _tree.leaves(graph) if graph_at else {}
    outside = [(path, index) for index, path in enumerate(paths) if index not in graph_at]
    holders = {path: given[index] for path, index in outside if _is_holder(given[index])}
    loose = {path: given[index] for path, index in outside if _is_saved(given[index])}

    _check(paths=[*inside, *holders, *(path for path, index in outside if _is_saved(given[index]))])
    found = {**{path: leaf for path, leaf in inside.items() if _is_saved(leaf)}, **loose}
    everything = {**inside, **{path: given[index] for path, index in outside}}
    _check_rest({path: leaf for path, leaf in everything.items() if path not in found and path not in holders})
    in_graph = frozenset(inside)  # the paths alone: `build` outlives the arrays of nnx objects

    def build(new: Mapping[str, Any]) -> PyTree:
        if in_graph:
            _tree.replace(graph, {path: value for path, value in new.items() if path in in_graph})
        leaves = list(given)
        for path, index in outside:
            if path in new:
                leaves[index] = new[path]
        return jax.tree.unflatten(treedef, leaves)

    return Parts(
        arrays={path: leaf for path, leaf in found.items() if _tree.is_array(leaf)},
        values={path: leaf for path, leaf in found.items() if not _tree.is_array(leaf)},
        holders=holders,
        loose=frozenset(loose) | {paths[index] for index in graph_at if not isinstance(given[index], _nnx().Pytree)},
        build=build,
    )


def plain_json(value: Any, what: str) -> Any:
    """`value` as it comes back from JSON, which must be as it went in.

    Raises:
        CheckpointError: It does not come back: bytes, tuples, keys that are not strings, objects.
    """
    try:
        back = json.loads(json.dumps(value, default=_plain_number))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}. {WHAT_IS_JSON}") from None
    if repr(back) != repr(_numbers_plain(value)):
        raise CheckpointError(f"{what}: {value!r} comes back from JSON as {back!r}. {WHAT_IS_JSON}")
    return back


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is a typed PRNG key, or the shape and dtype of one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_whole(leaf: Any) -> bool:
    return _is_graph_node(leaf) or _is_holder(leaf) or isinstance(leaf, Iterator)


def _nnx() -> Any:
    """`flax.nnx` if it was imported: otherwise nobody has made an nnx object yet."""
    return sys.modules.get("flax.nnx")


def _is_graph_node(leaf: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(leaf, nnx.Pytree | nnx.Variable)


def _is_holder(leaf: Any) -> bool:
    return all(callable(getattr(leaf, name, None)) for name in ("get_state", "set_state")) and not _is_graph_node(leaf)


def _is_saved(leaf: Any) -> bool:
    return _tree.is_array(leaf) or isinstance(leaf, int | float)


def _check(*, paths: list[str]) -> None:
    repeated = [path for path, times in collections.Counter(paths).items() if times > 1]
    lines = [f"{path}: two leaves have this path" for path in repeated]
    lines += [
        f"{path!r}: not a legal path" for path in dict.fromkeys(paths) if not LEGAL_PATH.fullmatch(path) or ".." in path
    ]
    if lines:
        raise CheckpointError(
            f"{listed(lines)}\nA key with a dot collides with a nested one; a path is letters, digits and "
            ". _ - ~ @ : + # /, never '..'. Rename these keys."
        )


def _check_rest(rest: Mapping[str, Any]) -> None:
    """A loader without a state would start again from its first batch after a restart, and nobody would know."""
    lines = [
        f"{path}: a {type(leaf).__name__} has no get_state and set_state, so what it holds cannot be saved"
        for path, leaf in rest.items()
        if isinstance(leaf, Iterable) and not isinstance(leaf, str | bytes | type)
    ]
    if lines:
        raise CheckpointError(f"{listed(lines)}\nGive it both methods (their state is JSON), or leave it out.")


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _numbers_plain(value: Any) -> Any:
    """`value` with NumPy's numbers as Python's, as `json` writes them."""
    if isinstance(value, dict):
        return {key: _numbers_plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
