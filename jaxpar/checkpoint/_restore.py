"""Restore a tree: onto whatever sharding the reader has, from a checkpoint that was checked first.

In this order, so that nothing is touched by what turns out not to fit: every byte is hashed, `checkpoint.json` is
compared with the reader's leaves, then the reader lets go of its arrays, then arrays are read.
"""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from .. import _processes
from . import _about, _orbax
from ._about import Leaf
from ._barrier import Barrier
from ._layers import read_sliced, read_stacked
from ._match import Match, layer_dims, matched
from ._parts import take_apart
from ._steps import check, complete, newest, none_valid, root
from ._target import Asked, Target, as_asked, check_placed, regrouped

T = TypeVar("T")


def restore(
    directory: str | os.PathLike[str],
    like: T,
    step: int | None = None,
    *,
    part: str | None = None,
    cast: bool = False,
    donate: bool = False,
) -> T:
    """Read a checkpoint into the shape of `like`, straight onto the shardings that its leaves have.

    Each process hashes its share of the bytes, then reads its own shards alone; beside them it holds 64 MiB in host
    memory at most, and its piece of one array while that goes to a device. The mesh may be another one than that of the
    save, and a stack of layers may be scanned here and not there, or the other way round. Leaves are compared with the
    checkpoint before any array is read.

    Args:
        directory: What `save` was given.
        like: A tree like the saved one. Its leaves are arrays, or `jax.ShapeDtypeStruct`s with a sharding. nnx
            modules and optimisers in it are changed in place, and let go of their arrays before new ones are read, so
            that device memory holds them once. Objects with `set_state` are set.
        step: The newest valid one if `None`; damaged ones before it are logged as a warning.
        part: `like` is what was saved at this path: the parameters alone of `(model, optimiser)` are part `"0"`. What
            else the checkpoint holds, there and elsewhere, is not read. `""` is the whole, of which `like` may lack
            leaves.
        cast: Round floating-point arrays to the dtypes of `like`, which otherwise must be those of the checkpoint.
        donate: Delete the arrays of `like` before new ones are read, as memory may not hold both. Nothing else may
            use them then.
    Returns:
        `like` with the values of the checkpoint.
    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged, or one of another program: every leaf that is
            missing, too many, or of another shape or dtype is named.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 100, {"w": jnp.full((8, 4), 2.0), "epoch": 3})
        >>> state = jp.checkpoint.restore(directory, {"w": jnp.zeros((8, 4)), "epoch": 0})
        >>> float(state["w"].sum()), state["epoch"]
        (64.0, 3)
        >>> jp.checkpoint.restore(directory, jnp.zeros((8, 4), jnp.bfloat16), part="w", cast=True).dtype
        dtype(bfloat16)
    """
    home = root(directory)
    if step is None:
        found = newest(home)
        if found.step is None:
            raise none_valid(home, found.damaged)
        step = found.step
    else:
        check(home, step)
    return restore_valid(home / str(step), like, part=part, cast=cast, donate=donate)


def restore_valid(path: pathlib.Path, like: T, *, part: str | None = None, cast: bool = False, donate: bool) -> T:
    """As `restore`, of the checkpoint at `path`, which has been checked."""
    about = _about.read(path)
    parts = take_apart(like)
    match = matched(str(path), about.leaves, _about.described(parts), part=part, cast=cast)
    targets = {name: Target(leaf) for name, leaf in parts.arrays.items()}
    check_placed(targets)
    if match.stacked or match.sliced:
        text = "%s: %d stacks of layers are joined of single layers, %d are cut into them."
        _processes.say(logging.INFO, text, path, len(match.stacked), len(match.sliced))
    for leaf in parts.arrays.values() if donate else ():
        if isinstance(leaf, jax.Array):
            leaf.delete()
    parts.build({name: targets[name].released for name in parts.arrays if name not in parts.loose})
    parts.arrays.clear()  # with this, nobody but the caller holds an array of `like`

    barrier = Barrier()
    try:
        values = _read(path, match, targets, about.leaves)
    except BaseException as error:
        barrier.fail(error)
        raise
    barrier("read")  # who has read little waits here, and not in a collective, which may know a shorter time
    for name in parts.holders:
        parts.holders[name].set_state(about.states[match.same[name]])
    return parts.build({**values, **{name: about.values[match.same[name]] for name in parts.values}})


def metadata(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """What was given to `save` as `metadata`; `{}` if nothing was.

    Args:
        directory: What `save` was given.
        step: The last complete one if `None`.
    Raises:
        CheckpointError: There is no such checkpoint, or its `checkpoint.json` is damaged.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 1, {"w": jnp.ones(3)}, metadata={"note": "before the spike"})
        >>> jp.checkpoint.metadata(directory)
        {'note': 'before the spike'}
    """
    home = root(directory)
    return dict(_about.checked(home / str(complete(home, step))).metadata)


def _read(path: pathlib.Path, match: Match, targets: dict[str, Target], saved: Mapping[str, Leaf]) -> dict[str, Any]:
    """The values of all targets."""
    stored = {name: target for name, target in targets.items() if target.is_stored}
    asked = {name: target.asked for name, target in stored.items()}
    direct = {name: match.same[name] for name in stored if name in match.same}
    values: dict[str, Any] = {}
    others = {mine: _grouped(mine, asked[mine], saved[theirs]) for mine, theirs in direct.items()}
    read = _orbax.read(path, {theirs: others[mine] for mine, theirs in direct.items()})
    for mine, theirs in direct.items():
        value = read.pop(theirs)
        values[mine] = targets[mine].placed(value if others[mine] is asked[mine] else as_asked(value, asked[mine]))
    stacked = {name: layers for name, layers in match.stacked.items() if name in stored}
    rows = {name: _in_a_row(asked[name], len(layers)) for name, layers in stacked.items()}
    stacks = read_stacked(path, stacked, rows)
    for name in list(stacks):
        value = stacks.pop(name)
        values[name] = targets[name].placed(value if rows[name] is asked[name] else as_asked(value, asked[name]))
    sliced = {stack: layers for stack, layers in match.sliced.items() if layers[0] in stored}
    for name, value in read_sliced(path, sliced, asked, {stack: saved[stack].shape or () for stack in sliced}):
        values[name] = targets[name].placed(value)
    for name in targets.keys() - stored.keys():
        values[name] = targets[name].placed(None)
    return values


def _grouped(name: str, asked: Asked, saved: Leaf) -> Asked:
    """What to ask for in place of `asked`: itself, unless the layers of this stack are counted otherwise there."""
    shape = saved.stored[0] if saved.stored else saved.shape or ()
    dims = layer_dims(name, asked.shape, shape)
    return asked if dims is None else regrouped(asked, dims[0], shape[: dims[1]])


def _in_a_row(asked: Asked, layers: int) -> Asked:
    """A stack of so many layers with these on one dim."""
    return asked if asked.shape[0] == layers else regrouped(asked, 2, (layers,))
