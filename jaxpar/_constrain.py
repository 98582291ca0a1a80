"""`constrain`: where an activation lies, said in logical dims.

A model says what its dims *are*; the plan in force says which axes split them. Without a plan nothing happens, so that
the model runs alone on one device. `layout` is the one place where logical dims of an activation become axes; the
vocabulary-parallel functions use it as well.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from . import _context
from ._errors import ShardingError, nearest
from ._planned import Traced
from ._types import Axes

DIMS = ("batch", "seq", "embed", "mlp", "heads", "kv", "vocab", "expert")
"""Logical dims of activations that every plan knows, whether it splits them or not."""


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Say which logical dim each dim of `x` is; inside `plan.jit`, `x` is laid out as the plan maps these dims.

    Moves data only where the compiler would have laid `x` out otherwise. A dim that the plan does not split is kept
    whole on every device, and so are fewer `"kv"` heads than devices would share. Two dims of one array never share an
    axis; when `"seq"` and another dim both have it, the other dim gets it (sequence-parallel norms: `"seq"` is split
    over `tensor` where no feature dim is).

    Args:
        x: Global shape; inside `vmap` over replicas, the shape of one replica's part.
        dims: One for each dim of `x`: a logical dim (`"batch"`, `"seq"`, `"embed"`, `"mlp"`, `"heads"`, `"kv"`,
            `"vocab"`, `"expert"`, or one that the plan adds), or `None` to leave this dim to the compiler.

    Returns:
        `x`, unchanged in value.

    Raises:
        ShardingError: A dim has no such name, `dims` are too few or too many, or a size is not divided by its axes.

    Example:
        >>> jp.constrain(jnp.ones((8, 16, 32)), "batch", "seq", "embed").shape
        (8, 16, 32)
    """
    if len(dims) != x.ndim:
        raise ShardingError(
            f"constrain: {len(dims)} dims {dims} for an array with {x.ndim} dims {x.shape}. "
            "Name each dim once; None leaves one to the compiler."
        )
    region = _context.current()
    if region is None:
        return x
    axes = layout(region, "constrain", dims, x.shape)
    entries = [PartitionSpec.UNCONSTRAINED if dim is None else at or None for dim, at in zip(dims, axes, strict=True)]
    return region.constrain(x, PartitionSpec(*entries))


def layout(region: _context.Region, caller: str, dims: Sequence[str | None], shape: Sequence[int]) -> tuple[Axes, ...]:
    """The axes of each dim of an activation, checked: names, one axis once, and sizes.

    Args:
        region: The plan as seen from here.
        caller: The public function, for messages.
        dims: A logical dim or `None` for each entry of `shape`.
        shape: Sizes as the model sees them, here.
    """
    _check_names(region, caller, dims)
    if isinstance(region, Traced):
        region.dims.update(dim for dim in dims if dim is not None)
    features = {axis for dim in dims if dim not in (None, "seq") for axis in region.axes_of(str(dim))}
    axes = tuple(
        () if dim is None else tuple(a for a in region.axes_of(dim) if dim != "seq" or a not in features)
        for dim in dims
    )
    axes = tuple(
        () if dim == "kv" and size < math.prod(region.mesh.shape[axis] for axis in at) else at
        for dim, size, at in zip(dims, shape, axes, strict=True)
    )
    _check_disjoint(caller, dims, axes)
    _check_sizes(region, caller, dims, shape, axes)
    return axes


def _check_names(region: _context.Region, caller: str, dims: Sequence[str | None]) -> None:
    known = list(dict.fromkeys((*DIMS, *region.plan.dims)))
    unknown = [dim for dim in dims if dim is not None and dim not in known]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ShardingError(
            f"{caller}: no logical dim {names}.{nearest(unknown[0], known)} This plan knows {', '.join(known)}; "
            "None leaves a dim to the compiler."
        )


def _check_disjoint(caller: str, dims: Sequence[str | None], axes: Sequence[Axes]) -> None:
    owner: dict[str, str] = {}
    for dim, at in zip(dims, axes, strict=True):
        for axis in at:
            if axis in owner:
                raise ShardingError(
                    f"{caller}: dims {owner[axis]!r} and {dim!r} of one array both lie on axis {axis!r}, and an axis "
                    "splits at most one dim. Use None for one of the two."
                )
            owner[axis] = str(dim)


def _check_sizes(
    region: _context.Region,
    caller: str,
    dims: Sequence[str | None],
    shape: Sequence[int],
    axes: Sequence[Axes],
) -> None:
    failures = []
    for index, (dim, size, at) in enumerate(zip(dims, shape, axes, strict=True)):
        parts = math.prod(region.mesh.shape[axis] for axis in at)
        if size % parts:
            split = " × ".join(f"{axis}={region.mesh.shape[axis]}" for axis in at)
            failures.append(
                f"{caller}: dim {index} ({dim!r}) has size {size}, which {split} ({parts} parts) does not divide. "
                f"The next multiple is {-(-size // parts) * parts}."
            )
    if failures:
        raise ShardingError("\n".join(failures) + "\nUse a size that divides, or a mesh with a smaller axis.")
