"""A jitted function as an explanation starts from it: compiled for simulated devices, its arguments told."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpar import _hardware, _hlo
from jaxpar._context import axes_at
from jaxpar.explain._compiled import Argument, Compiled
from jaxpar.explain._findings import find
from jaxpar.explain._timeline import Timeline

KINDS = {"params": "parameter", "opt": "optimizer", "batch": "batch"}


def mesh(**axes):
    """A mesh of the first devices."""
    devices = jax.devices()[: int(np.prod([*axes.values()]))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def array(mesh, shape, *spec, dtype=np.float32):
    """The shape of an array with its sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def placed(on, tree, *spec):
    """The shapes of a tree of arrays with their shardings."""
    return jax.tree.map(lambda leaf: array(on, leaf.shape, *spec, dtype=leaf.dtype), tree)


def compiled(function, mesh, /, **arguments):
    """`function(**arguments)` compiled; the name of an argument says what it is, see `KINDS`. `params` is donated."""
    donated = [name for name in ("params", "opt") if name in arguments and getattr(function, "donates", True)]
    program = jax.jit(function, donate_argnames=donated).lower(**arguments).compile()
    leaves = jax.tree_util.tree_leaves_with_path(arguments)  # sorted by name, as the program's parameters are
    return Compiled(
        name=function.__name__,
        text=program.as_text(),
        hardware=_hardware.parse(f"cpu:{mesh.size}"),
        axes=_hlo.mesh_axes(mesh),
        arguments=tuple(_argument(path, leaf, donated) for path, leaf in leaves),
    )


def findings(function, mesh, /, *, rows=(), timeline=None, memory=None, **arguments):
    """What is found in `function(**arguments)`."""
    program = compiled(function, mesh, **arguments)
    return find(_hlo.read(program.text), program, rows=rows, timeline=timeline, memory=memory)


def kinds(found, *, above="note"):
    """The kinds of findings, notes left out unless asked for."""
    return {each.kind for each in found if above == "none" or each.severity != above}


def timeline_of(program, seconds, *, exposed=0.0, step=1.0):
    """A step of a second in which each collective takes `seconds` each time."""
    module = _hlo.read(program.text)
    places = [
        (op.computation, op.name)
        for computation in module.program.computations.values()
        for op in computation.ops.values()
        if op.opcode.startswith(("all-", "collective-"))
    ]
    return Timeline(
        step_seconds=step, compute_seconds=step, communication_seconds=0.0, exposed_communication_seconds=exposed,
        bubble_seconds=0.0, low=step, high=step, events=(),
        transfers=dict.fromkeys(places, (seconds, 0, "ring")),
        exposed=dict.fromkeys(places, exposed / len(places)),
    )  # fmt: skip


def _argument(path, leaf, donated):
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    local = leaf.sharding.shard_shape(leaf.shape)
    return Argument(
        path=".".join(names[1:]) or names[0],
        kind=KINDS.get(names[0], "other"),
        shape=leaf.shape,
        dtype=str(leaf.dtype),
        bytes=int(np.prod(local)) * np.dtype(leaf.dtype).itemsize,
        donated=names[0] in donated,
        axes=tuple(axis for entry in leaf.sharding.spec for axis in axes_at(entry)),
    )
