"""A model before it exists: its leaves by path as shapes, with what the model says of each, and how to make them.

The user's factory is traced, never run: a model of any size costs nothing here. The same traced function, compiled with
the plan's shardings, later makes the model in pieces.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import _tree
from ._errors import ShardingError
from ._rules import matches
from ._types import Factory, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Birth:
    """What a factory would make.

    Attributes:
        shapes: Shape and dtype of each leaf, by path.
        slots: `"parameter"`, `"optimizer"`, `"model_state"` or `"rng"` for each.
        names: Logical dims of leaves whose model gives them.
        owners: Type name of the module that holds each leaf of an nnx model.
        layers: Paths whose first dim stacks equal blocks.
        remat: Paths of stacked blocks that are computed again in the backward pass.
        make: Makes the leaves; to be traced.
        build: Puts leaves together into the user's own kind of object.
        notes: What a reader of the plan should know.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    slots: dict[str, str]
    names: dict[str, tuple[str | None, ...]]
    owners: dict[str, str]
    layers: frozenset[str]
    remat: frozenset[str]
    make: Callable[[], dict[str, Any]]
    build: Callable[[Mapping[str, Any]], PyTree]


def conceive(factory: Factory, *, blocks: Mapping[str, str], param_dtype: str | None = None) -> Birth:
    """Trace `factory`, with the lists of blocks that match the patterns in `blocks` (to remat policies) stacked.

    Raises:
        ShardingError: The factory is not callable or makes no array; a pattern of blocks matches no list of blocks.
    """
    if not callable(factory) or any(map(_tree.is_array, jax.tree.leaves(factory))) or _tree.is_graph_node(factory):
        raise ShardingError(
            f"the model must come from a function that makes it, so that it is born sharded, but a "
            f"{type(factory).__name__} was given. Write jp.plan(lambda: Model(...), ...); for weights that exist "
            f"already, "
            "plan.shard(model)."
        )
    seen: dict[str, Any] = {}

    def make() -> dict[str, Any]:
        with no_eager_sharding():
            tree = factory()
            for pattern, policy in blocks.items():
                _stack_blocks(tree, pattern, policy)
            flat = _tree.flatten(tree)
            seen.update(flat=flat, told=_told(tree))
        slots = _slots(flat)
        if param_dtype is not None:
            return {
                path: leaf.astype(param_dtype)
                if slots[path] == "parameter" and jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
                for path, leaf in flat.leaves.items()
            }
        return dict(flat.leaves)

    shapes = jax.eval_shape(make)
    flat, told = seen["flat"], seen["told"]
    if not shapes:
        raise ShardingError("the factory makes no array. Give a function that returns the model or its parameters.")
    return Birth(shapes=shapes, slots=_slots(flat), make=make, build=flat.build, **told)


@contextlib.contextmanager
def no_eager_sharding() -> Iterator[None]:
    """Let annotated nnx variables be made without a mesh: their dims are names here, not axes."""
    if "flax" not in sys.modules:
        yield
        return
    from flax import nnx

    with nnx.use_eager_sharding(False):
        yield


def _slots(flat: _tree.Flat) -> dict[str, str]:
    if flat.kinds:
        from flax import nnx

        def slot(kind: type) -> str:
            if issubclass(kind, nnx.Param):
                return "parameter"
            if issubclass(kind, nnx.OptState):
                return "optimizer"
            return "rng" if issubclass(kind, nnx.RngState) else "model_state"

        return {path: slot(flat.kinds[path]) if path in flat.kinds else "model_state" for path in flat.leaves}
    has_params = any(path.startswith("params.") for path in flat.leaves)
    slots = {}
    for path, leaf in flat.leaves.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            slots[path] = "rng"
        elif has_params:
            group = path.partition(".")[0]
            slots[path] = "parameter" if group == "params" else "optimizer" if group == "opt_state" else "model_state"
        else:
            slots[path] = "parameter" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "model_state"
    return slots


def _told(tree: PyTree) -> dict[str, Any]:
    """What a model says of its leaves beside their values."""
    if not _tree.is_graph(tree):
        return {"names": _boxed_names(tree), "owners": {}, "layers": frozenset(), "remat": frozenset()}
    from flax import nnx

    from ._stack import Stacked

    names: dict[str, tuple[str | None, ...]] = {}
    owners: dict[str, str] = {}
    layers: set[str] = set()
    remat: set[str] = set()
    modules: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for keys, node in nnx.iter_graph(tree):
        (variables if isinstance(node, nnx.Variable) else modules)[_tree.path_of(keys)] = node
    stacks = {path: module for path, module in modules.items() if isinstance(module, Stacked)}
    for path, variable in variables.items():
        owner = path.rpartition(".")[0]
        if owner in modules:
            owners[path] = type(modules[owner]).__name__
        given = variable.get_metadata("out_sharding", None) or variable.get_metadata("sharding_names", None)
        given = tuple(given) if given else ()
        for at, stack in stacks.items():
            prefix = f"{at}.each." if at else "each."
            shared = {prefix + _tree.path_of(keys) for keys in stack.shared}
            if path.startswith(prefix) and path not in shared:
                layers.add(path)
                if stack.remat != "none":
                    remat.add(path)
        if given and given[0] in ("layers", "layer"):
            layers.add(path)
            given = given[1:]
        if any(given):
            names[path] = given
    return {"names": names, "owners": owners, "layers": frozenset(layers), "remat": frozenset(remat)}


def _boxed_names(tree: PyTree) -> dict[str, tuple[str | None, ...]]:
    """Names of Linen's `Partitioned` boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`)."""

    def is_box(node: Any) -> bool:
        return hasattr(node, "names") and hasattr(node, "unbox")

    found = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]:
        if is_box(node):
            inner = jax.tree_util.tree_flatten_with_path(node)[0][0][0]
            found[_tree.path_of((*keys, *inner))] = tuple(node.names)
    return found


def _stack_blocks(tree: PyTree, pattern: str, policy: str) -> None:
    """Put a `Stack` where `tree` holds a list of blocks that `pattern` names: `blocks.*`."""
    from flax import nnx

    from ._stack import Stacked

    at = pattern.removesuffix(".*")
    lists = []
    if _tree.is_graph(tree):
        for keys, node in nnx.iter_graph(tree):
            path = _tree.path_of(keys)
            if isinstance(node, nnx.List) and path and matches(at, path):
                lists.append((keys, path, node))
            elif isinstance(node, Stacked) and matches(at, path):
                return  # the model stacks its blocks itself
    if not lists:
        here = [
            f"{_tree.path_of(keys)}.*"
            for keys, node in (nnx.iter_graph(tree) if _tree.is_graph(tree) else ())
            if isinstance(node, nnx.List)
        ]
        known = f"Lists of modules here: {', '.join(here)}." if here else "This model has no nnx.List of modules."
        raise ShardingError(
            f"blocks={pattern!r} matches no list of blocks. {known} Name one of them, as in FSDP(blocks='blocks.*'), "
            f"or "
            "leave blocks out."
        )
    everything = [(keys, node) for keys, node in nnx.iter_graph(tree) if isinstance(node, nnx.Variable)]
    for keys, path, blocks in lists:
        inside = {id(node) for block in blocks for _, node in nnx.iter_graph(block)}
        outside = frozenset(id(node) for each, node in everything if each[: len(keys)] != keys and id(node) in inside)
        parent = tree
        for key in keys[:-1]:
            parent = parent[key] if isinstance(key, int) else _child(parent, key)
        stack = Stacked.of(list(blocks), path=path, remat=policy, outside=outside)
        if isinstance(parent, nnx.Pytree) and not isinstance(parent, nnx.List | nnx.Dict):
            setattr(parent, keys[-1], stack)
        else:
            parent[keys[-1]] = stack


def _child(parent: Any, key: str) -> Any:
    return parent[key] if isinstance(parent, dict) or hasattr(parent, "keys") else getattr(parent, key)
