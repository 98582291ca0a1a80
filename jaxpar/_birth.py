"""A model before it exists: its leaves by path as shapes, with what the model says of each, and how to make them.

The user's factory is traced, never run: a model of any size costs nothing here. The same traced function, compiled with
the plan's shardings, later makes the model in pieces.
"""

import contextlib
import dataclasses
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _tree
from ._errors import ShardingError, listed, nearest
from ._rules import LAYERS, fold_layers
from ._types import Factory, PyTree

Cut = Callable[[Any, str], None]
"""Lays a stack, at a path, out for the stages of a pipeline."""


CPU_OPTIONS = {"xla_backend_optimization_level": 1}
"""With what `Birth.make` is compiled for CPUs, so that a number does not depend on the piece that it lies in.

At XLA's own level LLVM writes a loop over few columns out as branches, in which products and sums are not fused as they
are in vectors: from JAX 0.12 on, whose `erf_inv` is such a chain, normal values in pieces of 3 to 5 columns differed
from those of the whole, by 3 ulp at most. Compiling takes half the time, running as long as before.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Birth:
    """What a factory would make.

    Attributes:
        shapes: Shape and dtype of each leaf, by path.
        slots: `"parameter"`, `"optimizer"`, `"model_state"` or `"rng"` for each.
        names: Logical dims of leaves whose model gives them, without that of stacked layers.
        owners: Type name of the object that holds each leaf as an attribute.
        aliases: What patterns see of paths that end in a Linen box's own `value`.
        layers: How many of the first dims stack equal blocks, by path, where any does.
        remat: Paths of stacked blocks that are computed again in the backward pass.
        make: Makes the leaves; to be traced.
        build: Puts leaves together into the user's own kind of object.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    slots: dict[str, str]
    names: dict[str, tuple[str | None, ...]]
    owners: dict[str, str]
    aliases: dict[str, str]
    layers: dict[str, int]
    remat: frozenset[str]
    make: Callable[[], dict[str, Any]]
    build: Callable[[Mapping[str, Any]], PyTree]


def conceive(
    factory: Factory, *, blocks: Mapping[str, str | None], param_dtype: str | None = None, cut: Cut | None = None
) -> Birth:
    """Trace `factory`, with the lists of blocks that match the patterns in `blocks` (to remat policies) stacked.

    `cut` is called with each stack and its path.

    Raises:
        ShardingError: The factory is not callable or makes no array; a pattern of blocks matches no list of blocks.
    """
    check_factory(factory)
    seen: dict[str, Any] = {}

    def make() -> dict[str, Any]:
        with no_eager_sharding():
            tree = factory()
            for pattern, policy in blocks.items():
                _stack_blocks(tree, pattern, policy)
            if cut is not None:
                _cut_stacks(tree, cut)
            flat = _tree.flatten(tree)
            seen.update(flat=flat, told=_told(tree, flat.leaves))
        slots = _slots(flat)
        if param_dtype is not None:
            return {
                path: leaf.astype(param_dtype)
                if slots[path] == "parameter" and jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
                for path, leaf in flat.leaves.items()
            }
        return dict(flat.leaves)

    try:
        shapes = jax.eval_shape(make)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":
            raise
        raise ShardingError(
            "the factory changes an nnx object that was made outside of it, such as its random-number streams. Make "
            "all it needs inside: jp.plan(lambda: Model(..., rngs=nnx.Rngs(0)), ...)."
        ) from error
    flat, told = seen["flat"], seen["told"]
    if not shapes:
        raise ShardingError("the factory makes no array. Give a function that returns the model or its parameters.")
    return Birth(
        shapes=shapes,
        slots=_slots(flat),
        names=told.names,
        owners=told.owners,
        aliases=told.aliases,
        layers=told.layers,
        remat=frozenset(told.remat),
        make=make,
        build=flat.build,
    )


def check_factory(factory: Any) -> None:
    """Raise `ShardingError` if a model was given in place of the function that makes it."""
    if not callable(factory) or any(map(_tree.is_array, jax.tree.leaves(factory))) or _tree.is_graph_node(factory):
        raise ShardingError(
            f"the model must come from a function that makes it, so that it is born sharded, but a "
            f"{type(factory).__name__} was given. Write jp.plan(lambda: Model(...), ...); for weights that exist "
            "already, plan.shard(model)."
        )


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


@dataclasses.dataclass
class _Told:
    """What a model says of its leaves beside their values: the fields of `Birth` of these names."""

    names: dict[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    owners: dict[str, str] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    remat: set[str] = dataclasses.field(default_factory=set)


def _told(tree: PyTree, leaves: Mapping[str, Any]) -> _Told:
    told = _Told()
    if _tree.is_graph(tree):
        _ask_graph(tree, told)
    else:
        _ask_pytree(tree, told)
    stacked: dict[str, int] = {}
    for path, names in told.names.items():
        if names[0] in LAYERS:
            told.layers.setdefault(path, 1)
            told.names[path] = names[1:]
            stacked[_module(path, told)] = leaves[path].shape[0]
    for path, leaf in leaves.items():  # a module is stacked as a whole: a bias without names is too
        if leaf.shape and stacked.get(_module(path, told)) == leaf.shape[0]:
            told.layers.setdefault(path, 1)
    return told


def _module(path: str, told: _Told) -> str:
    return told.aliases.get(path, path).rpartition(".")[0]


def _ask_graph(tree: PyTree, told: _Told) -> None:
    from flax import nnx

    from ._stack import Stacked

    variables: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    for keys, node in nnx.iter_graph(tree):
        (variables if isinstance(node, nnx.Variable) else modules)[_tree.path_of(keys)] = node
    stacks = {f"{path}.each" if path else "each": node for path, node in modules.items() if isinstance(node, Stacked)}
    shared = {f"{at}.{_tree.path_of(keys)}" for at, stack in stacks.items() for keys in stack.shared}
    for path, variable in variables.items():
        owner = path.rpartition(".")[0]
        if owner in modules:
            told.owners[path] = type(modules[owner]).__name__
        names = variable.get_metadata("out_sharding", None)
        if names and any(names):
            told.names[path] = tuple(name if isinstance(name, str) else None for name in names)
        stack = next((stacks[at] for at in _holders(path) if at in stacks), None)
        if stack is not None and path not in shared:
            told.layers[path] = stack.layer_dims
            if stack.remat != "none":
                told.remat.add(path)


def _holders(path: str) -> Iterator[str]:
    """All that `path` lies in, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _ask_pytree(tree: PyTree, told: _Told) -> None:
    """Names of Linen's boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`); Equinox modules."""
    equinox = sys.modules.get("equinox")
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        path = _tree.path_of(keys)
        if _is_box(node):
            inner = jax.tree_util.tree_flatten_with_path(node)[0][0][0]
            boxed = _tree.path_of((*keys, *inner))
            told.aliases[boxed] = path
            if any(node.names):
                told.names[boxed] = tuple(node.names)
        elif equinox is not None and keys and isinstance(keys[-1], jax.tree_util.GetAttrKey):
            holder = _item(tree, keys[:-1])
            if isinstance(holder, equinox.Module):
                told.owners[path] = type(holder).__name__


def _is_box(node: Any) -> bool:
    return hasattr(node, "names") and hasattr(node, "unbox")


def _item(tree: PyTree, keys: tuple[Any, ...]) -> Any:
    """What lies at `keys`, as far as they can be followed."""
    for key in keys:
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            tree = tree[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            tree = tree[key.idx]
        else:
            return None
    return tree


def _cut_stacks(tree: PyTree, cut: Cut) -> None:
    if not _tree.is_graph(tree):
        return
    from flax import nnx

    from ._stack import Stacked

    for keys, node in list(nnx.iter_graph(tree)):
        if isinstance(node, Stacked):
            cut(node, _tree.path_of(keys))


def _stack_blocks(tree: PyTree, pattern: str, policy: str | None) -> None:
    """Put a `Stack` where `tree` holds a list of blocks that `pattern` names: `blocks.*`."""
    if not _tree.is_graph(tree):
        raise ShardingError(
            f"blocks={pattern!r}: only nnx modules can be stacked, and the factory makes a {type(tree).__name__}. "
            "Stack equal blocks yourself, name their first dim, dims=[('blocks.*', ('layers', ...))], and scan over "
            "it, with jp.gather(layer) in the body."
        )
    from flax import nnx

    from ._stack import Stacked

    everything = dict(nnx.iter_graph(tree))
    outer = block_lists(tree, pattern)
    others, ready = [], False
    for keys, node in everything.items():
        path = _tree.path_of(keys)
        if isinstance(node, Stacked) and _names(pattern, path):
            _check_own_stack(node, path, policy)
            ready = True
        elif isinstance(node, nnx.List | Stacked) and path and not _names(pattern, path):
            others.append(path)
    if not outer and not ready:
        shown = [f"{path}.*" for path in dict.fromkeys(fold_layers(others))]
        known = f"Lists of modules here: {', '.join(shown)}." if shown else "This model has no nnx.List of modules."
        raise ShardingError(
            f"blocks={pattern!r} matches no list of blocks.{nearest(pattern, shown)} {known} Name one of them, as in "
            "FSDP(blocks='blocks.*'), or leave blocks out."
        )
    for keys, blocks in outer.items():
        path = _tree.path_of(keys)
        _check_blocks(list(blocks), path, pattern)
        outside = _held_outside(blocks, everything.values())
        _check_sharing(list(blocks), outside, path)
        stack = Stacked.of(list(blocks), path=path, remat=policy or "full", outside=outside)
        parent = everything[keys[:-1]]
        if isinstance(parent, nnx.List | nnx.Dict):
            parent[keys[-1]] = stack
        else:
            setattr(parent, keys[-1], stack)


def block_lists(tree: PyTree, pattern: str) -> dict[tuple[Any, ...], Any]:
    """The nnx lists of blocks that `pattern` names (`blocks.*`), by key path, less those inside another one."""
    from flax import nnx

    named = {
        keys: node
        for keys, node in nnx.iter_graph(tree)
        if isinstance(node, nnx.List) and keys and _names(pattern, _tree.path_of(keys))
    }
    return {keys: node for keys, node in named.items() if not any(keys[:end] in named for end in range(len(keys)))}


def _names(pattern: str, path: str) -> bool:
    """Whether `blocks.*` names the list or stack at `path`."""
    return any(fnmatch.fnmatchcase(each, pattern.removesuffix(".*")) for each in (path, f".{path}"))


def _check_own_stack(stack: Any, path: str, policy: str | None) -> None:
    if policy not in (None, stack.remat):
        raise ShardingError(
            f"{path}: the model's own jp.Stack has remat={stack.remat!r}, FSDP asks for {policy!r}. Set it in the "
            "model, and leave it out of FSDP."
        )


def _check_blocks(blocks: Sequence[Any], path: str, pattern: str) -> None:
    from flax import nnx

    others = {at: type(block).__name__ for at, block in enumerate(blocks) if not isinstance(block, nnx.Module)}
    wrong = [f"{path}.{at} is a {name}" for at, name in others.items()]
    if wrong or not blocks:
        raise ShardingError(
            f"blocks={pattern!r}: {wrong[0] if wrong else path + ' is empty'}, and only modules can be stacked. Name a "
            "list of modules, or leave blocks out."
        )


def _held_outside(blocks: Any, nodes: Iterable[Any]) -> frozenset[int]:
    """The `id`s of the variables in `blocks` that other `nodes` of the model hold too."""
    from flax import nnx

    inside = {id(node) for block in blocks for _, node in nnx.iter_graph(block) if _tree.is_graph_node(node)}
    found: set[int] = set()
    for node in nodes:
        if id(node) in inside or node is blocks or isinstance(node, nnx.Variable):
            continue
        held = list(vars(node).values()) if isinstance(node, nnx.Pytree) else node
        for child in jax.tree.leaves(held, is_leaf=_tree.is_graph_node):
            if id(child) in inside:
                found |= {id(each) for _, each in nnx.iter_graph(child) if isinstance(each, nnx.Variable)}
    return frozenset(found)


def _check_sharing(blocks: Sequence[Any], outside: frozenset[int], path: str) -> None:
    """A variable that blocks share with one another or with the rest must be the same one in all: a scan has one."""
    from flax import nnx

    held: dict[int, list[tuple[int, str]]] = {}
    for index, block in enumerate(blocks):
        for keys, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Variable):
                held.setdefault(id(node), []).append((index, _tree.path_of(keys)))
    problems = []
    for variable, places in held.items():
        is_shared = len(places) > 1 or variable in outside
        if is_shared and (len(places) < len(blocks) or len({name for _, name in places}) > 1):
            shown = " and ".join(f"{path}.{index}.{name}" for index, name in places[:3])
            elsewhere = " and the rest of the model" if variable in outside else ""
            problems.append(f"{shown}{elsewhere} share a variable, which the other blocks do not")
    if problems:
        raise ShardingError(
            f"{path}.*: these blocks are not equal, so they cannot be stacked:\n{listed(problems)}\n"
            "Share a variable among all blocks or none, or leave these out of FSDP(blocks=...)."
        )
