"""Is every leaf placed as it should be?"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxpar import _tree
from jaxpar._errors import ShardingError, listed
from jaxpar._types import PyTree


def assert_sharding(tree: PyTree, mesh: Any, specs: PyTree = None) -> None:
    """Assert that every array of `tree` is placed as said; all that are not are listed at once.

    Placements are equal when every device holds the same part: `P("data")` and `P("data", None)` are one, and so are
    all specs on axes of size 1. Moves no data.

    Args:
        tree: An nnx module or any pytree of placed arrays.
        mesh: A mesh; or a plan, which says where each leaf belongs, without `specs`.
        specs: One spec for all leaves; or a pytree of specs, or a dict by path, each for a leaf or for all below it.

    Raises:
        AssertionError: Naming every leaf that is placed otherwise, or for which no spec is given.
        ShardingError: `tree` holds no arrays, or a spec fits no leaf.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x = jax.device_put(jnp.ones(16), jax.sharding.NamedSharding(mesh, P("data")))
        >>> jp.testing.assert_sharding({"x": x}, mesh, {"x": P("data")})
    """
    leaves = _tree.leaves(tree)
    if not leaves:
        raise ShardingError("assert_sharding: there are no arrays in the tree, so nothing would be asserted.")
    wanted = _expected(tree, leaves, mesh, specs)
    wrong = [line for path, leaf in leaves.items() if (line := _difference(path, leaf, wanted.get(path)))]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(leaves)} leaves are not placed as expected:\n{listed(wrong)}")


def _expected(tree: PyTree, leaves: Mapping[str, Any], mesh: Any, specs: PyTree) -> dict[str, Sharding]:
    if hasattr(mesh, "shardings"):
        if specs is not None:
            raise ShardingError("assert_sharding(tree, plan): the plan says the specs; give a mesh to give specs.")
        return _by_path(mesh.shardings(tree), Sharding)
    if specs is None:
        raise ShardingError("assert_sharding(tree, mesh, specs): specs are missing; only a plan knows them by itself.")
    if isinstance(specs, PartitionSpec):
        return dict.fromkeys(leaves, NamedSharding(mesh, specs))
    given = _by_path(specs, PartitionSpec)
    above = {path: max((key for key in given if _holds(key, path)), key=len, default=None) for path in leaves}
    unused = sorted(set(given) - set(above.values()))
    if unused:
        raise ShardingError(
            f"assert_sharding: no leaf at {', '.join(unused)}. The leaves are:\n{listed(sorted(leaves))}"
        )
    return {path: NamedSharding(mesh, given[key]) for path, key in above.items() if key is not None}


def _by_path(tree: PyTree, kind: type) -> dict[str, Any]:
    """The specs or shardings in a pytree by path, `nnx` variables looked through."""
    with_keys, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, kind))
    found = {}
    for keys, leaf in with_keys:
        named = [key for key in keys if not (isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value")]
        found[_tree.path_of(tuple(named))] = leaf
    return found


def _holds(key: str, path: str) -> bool:
    return key in ("", path) or path.startswith(f"{key}.")


def _difference(path: str, leaf: Any, wanted: Sharding | None) -> str:
    """What is wrong with a leaf, in a line; nothing if nothing is."""
    found = getattr(leaf, "sharding", None)
    name = path or "(the array)"
    if wanted is None:
        return f"{name}: no spec is given for it"
    if found is None:
        return f"{name}: is on no device ({type(leaf).__name__}), expected {_said(wanted)}"
    if found.is_equivalent_to(wanted, len(leaf.shape)):
        return ""
    return f"{name}: is {_said(found)}, expected {_said(wanted)}  {list(leaf.shape)}"


def _said(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        sizes = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
        return f"{sharding.spec} on ({sizes})"
    return f"on {len(sharding.device_set)} device(s), {type(sharding).__name__}"
