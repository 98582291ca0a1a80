"""`manual`: a kernel that sees one device's part of each array, called in global view or by a stage of a pipeline.

A stage is a manual region already, over the pipe and the replicas, so that a kernel in it lies inside of another one.
JAX cannot differentiate that: what a `shard_map` keeps for its backward pass is declared to differ over *all* axes of
the mesh, and XLA refuses the outer ones ("already bound by a parent sdy.manual_computation", jax 0.10.2 and 0.12.0;
jax#26588). So in a stage the backward pass is a kernel of its own, which computes the forward again from its arguments:
differentiation is inside of the kernel, never across its edge. A stage rematerialises anyway, so that nothing is
computed more often for it.

What a kernel moves there is in a branch that one stage takes and another does not. Sums, gathers and all-to-alls run in
groups, and a group along an inner axis lies within one stage: all of it takes the branch. Permutes join every device of
the mesh, and have no place in a stage (`_branches`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._context import Region
from ._types import Axes, PyTree


def manual(
    region: Region, body: Callable[..., PyTree], *, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable[..., PyTree]:
    """`body` on each device's part, over every axis that is not manual already.

    Args:
        region: Where it is called.
        body: What a device computes. In a stage it is differentiated once, in reverse.
        in_specs: As for `jax.shard_map`: one for each argument.
        out_specs: As for `jax.shard_map`.
        check_vma: As for `jax.shard_map`; in a stage it is checked in any case, for the types of what comes out say
            over which axes it differs.
    """
    if not region.manual:
        return jax.shard_map(body, mesh=region.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    axes = set(region.plan.axes) - set(region.replicas)
    if not axes:
        return body

    def mapped(body: Callable[..., PyTree], **specs: Any) -> Callable[..., PyTree]:
        # Remat, which keeps nothing: a scan takes what it repeats apart, by what is known before the loop, and of a
        # `shard_map` even the constants in it would be kept.
        return jax.checkpoint(jax.shard_map(body, mesh=region.mesh, axis_names=axes, **specs), prevent_cse=False)

    forward = mapped(body, in_specs=in_specs, out_specs=out_specs)

    @jax.custom_vjp
    def kernel(*args: PyTree) -> PyTree:
        return forward(*args)

    def backward(args: tuple[PyTree, ...], cotangents: PyTree) -> tuple[PyTree, ...]:
        leaves, treedef = jax.tree.flatten(args)
        specs = jax.tree.leaves(
            jax.tree.broadcast(in_specs, args, is_leaf=lambda spec: isinstance(spec, PartitionSpec)),
            is_leaf=lambda spec: isinstance(spec, PartitionSpec),
        )
        wanted = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def pulled(leaves: list[Any], cotangents: PyTree) -> list[Any]:
            def of(floats: list[Any]) -> PyTree:
                values = dict(zip(wanted, floats, strict=True))
                made = body(*treedef.unflatten([values.get(index, leaf) for index, leaf in enumerate(leaves)]))
                return jax.tree.map(varying_like, made, cotangents)  # what is 0 for all differs for none

            _, pull = jax.vjp(of, [leaves[index] for index in wanted])
            return pull(cotangents)[0]

        kernel = mapped(pulled, in_specs=(specs, out_specs), out_specs=[specs[index] for index in wanted])
        found = dict(zip(wanted, kernel(leaves, cotangents), strict=True))
        return treedef.unflatten([found.get(index) for index in range(len(leaves))])

    # By `kernel`, not by what is in it: remat would take a `shard_map` apart, and what it keeps is refused as above.
    kernel.defvjp(lambda *args: (kernel(*args), args), backward)
    return kernel


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` as one that differs between devices where `like` does: loops, branches and cotangents want one type."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return varying(x, tuple(missing))


def varying(x: jax.Array, axes: Axes) -> jax.Array:
    """`x` as one that differs over `axes` too."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x
