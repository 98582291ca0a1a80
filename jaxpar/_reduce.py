"""The one gradient reduction of a step: a manual region over the whole mesh, without autodiff in it.

XLA does not hoist collectives out of loops: left to it, gradients cross the mesh once a microbatch. Here they arrive
summed on each device, with a leading replica dim that the replica axes split, and cross each axis once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._context import as_spec, axes_at, drop_axes
from ._types import Axes


def reduce_once(
    gradients: dict[str, jax.Array],
    targets: dict[str, PartitionSpec],
    totals: Any,
    *,
    replicas: Axes,
    plan: Any,
    hook: Any,
    dtype: Any,
) -> tuple[dict[str, jax.Array], Any]:
    """Sum `gradients` (and the scalars in `totals`) over their leading replica dim.

    Args:
        gradients: By path, global shape `[replicas, *shape]`, the first dim split over `replicas`, the others as the
            gradient's spec says less those axes.
        targets: The spec of each gradient when done: where it names a replica axis, the sum is scattered over it.
        totals: A pytree of arrays `[replicas]`, summed alike.
        replicas: The axes to cross.
        plan: For its mesh.
        hook: A user's reduction, `hook(gradients, axes)`, in place of the sum; see `jp.DP`.
        dtype: In which gradients cross the axes, or `None`.

    Returns:
        The sums: gradients in their targets' specs, totals as scalars on every device.
    """
    inner = {path: drop_axes(spec, replicas) for path, spec in targets.items()}
    names = {path: gradients[path].dtype for path in gradients}

    def body(gradients: dict[str, jax.Array], totals: Any) -> tuple[dict[str, jax.Array], Any]:
        own = {path: gradient[0] for path, gradient in gradients.items()}
        if dtype is not None:
            own = {path: gradient.astype(dtype) for path, gradient in own.items()}
        if hook is not None:
            summed = hook(own, replicas)
            done = {path: _slice(gradient, _scattered(targets[path], replicas)) for path, gradient in summed.items()}
        else:
            done = {
                path: _sum(gradient, _scattered(targets[path], replicas), replicas) for path, gradient in own.items()
            }
        done = {path: gradient.astype(names[path]) for path, gradient in done.items()}
        return done, jax.tree.map(lambda total: jax.lax.psum(jnp.sum(total, axis=0), replicas), totals)

    leading = {path: as_spec([replicas, *map(axes_at, spec)]) for path, spec in inner.items()}
    reached = {path: _reached(spec, replicas) for path, spec in targets.items()}
    reduced, sums = jax.shard_map(
        body,
        mesh=plan.mesh,
        in_specs=(leading, jax.tree.map(lambda _: PartitionSpec(replicas), totals)),
        out_specs=(reached, jax.tree.map(lambda _: PartitionSpec(), totals)),
    )(gradients, totals)
    for path, spec in targets.items():
        if spec != reached[path]:
            reduced[path] = jax.lax.with_sharding_constraint(reduced[path], plan.sharding(spec))
    return reduced, sums


def _reached(spec: PartitionSpec, replicas: Axes) -> PartitionSpec:
    """Where a sum lies once it is scattered: a piece is cut within what a device has, so that replica axes come last.

    A dim of 8 rows, split over fsdp 2 (a replica axis) and then data 2 (not one), is to lie

        fsdp 0 data 0: 0 1    fsdp 0 data 1: 2 3    fsdp 1 data 0: 4 5    fsdp 1 data 1: 6 7

    but data 0 has summed rows 0 to 3 and data 1 rows 4 to 7, so that fsdp 0 data 1 is given 4 5, and fsdp 1 data 0 is
    given 2 3: these two exchange theirs.
    """
    entries = map(axes_at, spec)
    return as_spec([tuple(sorted(axes, key=lambda axis: axis in replicas)) for axes in entries])


def _scattered(spec: PartitionSpec, replicas: Axes) -> list[tuple[int, str]]:
    """`(dim, axis)` for each replica axis that `spec` names, outermost first."""
    return [(dim, axis) for dim, entry in enumerate(spec) for axis in axes_at(entry) if axis in replicas]


def _sum(gradient: jax.Array, scattered: list[tuple[int, str]], replicas: Axes) -> jax.Array:
    for dim, axis in scattered:
        gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
    rest = tuple(axis for axis in replicas if axis not in {axis for _, axis in scattered})
    return jax.lax.psum(gradient, rest) if rest else gradient


def _slice(gradient: jax.Array, scattered: list[tuple[int, str]]) -> jax.Array:
    for dim, axis in scattered:
        size = gradient.shape[dim] // jax.lax.axis_size(axis)
        gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(axis) * size, size, dim)
    return gradient
