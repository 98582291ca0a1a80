"""Save a tree, restore a tree.

A checkpoint holds arrays under their paths, as global arrays: it knows nothing of meshes and plans, and is read onto
whatever sharding the reader has. Beside them, in one JSON file that is written before the commit: what each leaf is,
Python numbers, the states of loaders, versions, and what the caller adds. That file is compared with the reader's
leaves before any array is read.
"""

import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from .._errors import CheckpointError, listed
from .._types import PyTree
from . import _orbax
from ._parts import Parts, is_key, plain_json, take_apart
from ._steps import latest, numbered, root, steps

T = TypeVar("T")

FORMAT = 1
MOST_LINES = 100  # of a mismatch; a deep model that is not the saved one differs in thousands of leaves


class Saving:
    """A save that goes on in the background. `wait` for it, or ask whether it is `done`.

    Attributes:
        step: The step being saved.
        path: Where it appears, by one rename, when it is complete.
    """

    def __init__(self, step: int, path: pathlib.Path, finish: Callable[[float | None], None]) -> None:
        self.step = step
        self.path = path
        self._finish = finish

    @property
    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        try:
            self._finish(0)
        except TimeoutError:
            return False
        except Exception:  # it failed: `wait` says how
            return True
        return True

    def wait(self) -> None:
        """Return when the checkpoint is complete on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        try:
            self._finish(None)
        except Exception as error:
            raise CheckpointError(
                f"Step {self.step} could not be saved at {self.path}: {error}\nEarlier steps are as they were."
            ) from error


def save(
    directory: str | os.PathLike[str], step: int, tree: PyTree, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `tree` as checkpoint `step` of `directory`, and return when it is complete.

    Every process calls it; each writes its own shards, and nothing moves between devices. The checkpoint appears by one
    rename: a process killed at any instant leaves either all of it or nothing.

    Args:
        directory: Made if it does not exist.
        step: 0 or more; becomes the name of a subdirectory.
        tree: An nnx module or optimiser, any pytree, or a tuple, list or dict of these. Python numbers are saved, and
            an object with `get_state` and `set_state` (a data loader) by its state, which must be JSON. Other leaves
            (functions, text) are static and not saved.
        metadata: A JSON object to keep beside it; `jp.checkpoint.metadata` reads it.
    Raises:
        CheckpointError: The step exists already, or leaves cannot be saved: all of them named.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 100, {"w": jnp.ones((8, 4)), "epoch": 3})
        >>> jp.checkpoint.steps(directory)
        [100]
    """
    save_async(directory, step, tree, metadata=metadata).wait()


def save_async(
    directory: str | os.PathLike[str], step: int, tree: PyTree, *, metadata: Mapping[str, Any] | None = None
) -> Saving:
    """As `save`, but return once every array has been copied to host memory; writing goes on in the background.

    Costs host memory for this process's shards until it is written. The arrays may be donated at once.

    Raises:
        CheckpointError: As `save`; a failure to write is raised by `wait`.

    Example:
        >>> import tempfile
        >>> saving = jp.checkpoint.save_async(tempfile.mkdtemp(), 100, {"w": jnp.ones((8, 4))})
        >>> saving.wait()
    """
    home = root(directory)
    _check_place(home, step)
    parts = take_apart(tree)
    _check_values(parts)
    about = {
        "jaxpar": FORMAT,
        "leaves": _described(parts),
        "values": parts.values,
        "states": parts.states(),
        "versions": versions(),
        "metadata": plain_json(dict(metadata or {}), "metadata"),
    }
    home.mkdir(parents=True, exist_ok=True)
    arrays = {path: _stored(leaf) for path, leaf in parts.arrays.items() if leaf.size}
    return Saving(step, home / str(step), _orbax.write(home / str(step), arrays, about))


def restore(directory: str | os.PathLike[str], like: T, step: int | None = None, *, donate: bool = False) -> T:
    """Read a checkpoint into the shape of `like`, straight onto the shardings that its leaves have.

    Each process reads its own shards alone. The mesh may be another one than that of the save. Leaves are compared
    with the checkpoint before any array is read.

    Args:
        directory: What `save` was given.
        like: A tree like the saved one. Its leaves are arrays, or `jax.ShapeDtypeStruct`s with a sharding. nnx
            modules and optimisers in it are changed in place, and let go of their arrays before new ones are read, so
            that device memory holds them once. Objects with `set_state` are set.
        step: The latest complete one if `None`.
        donate: Delete the arrays of `like` before new ones are read, as memory may not hold both. Nothing else may
            use them then.
    Returns:
        `like` with the values of the checkpoint.
    Raises:
        CheckpointError: There is no such checkpoint, or it is one of another program: every leaf that is missing, too
            many, or of another shape or dtype is named.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 100, {"w": jnp.full((8, 4), 2.0), "epoch": 3})
        >>> state = jp.checkpoint.restore(directory, {"w": jnp.zeros((8, 4)), "epoch": 0})
        >>> float(state["w"].sum()), state["epoch"]
        (64.0, 3)
    """
    path, about = _opened(root(directory), step)
    parts = take_apart(like)
    _check_same(path, about["leaves"], _described(parts))
    targets = {name: _Target(leaf) for name, leaf in parts.arrays.items()}
    _check_placed(targets)
    for leaf in parts.arrays.values() if donate else ():
        if isinstance(leaf, jax.Array):
            leaf.delete()
    parts.build({name: targets[name].released for name in parts.arrays if name not in parts.loose})
    parts.arrays.clear()  # with this, nobody but the caller holds an array of `like`

    read = _orbax.read(path, {name: target.asked for name, target in targets.items() if target.is_stored})
    values = {name: target.placed(read.pop(name, None)) for name, target in targets.items()}
    for name, state in about["states"].items():
        parts.holders[name].set_state(state)
    return parts.build({**values, **about["values"]})


def metadata(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """What was given to `save` as `metadata`; `{}` if nothing was.

    Args:
        directory: What `save` was given.
        step: The latest complete one if `None`.
    Raises:
        CheckpointError: There is no such checkpoint.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> jp.checkpoint.save(directory, 1, {"w": jnp.ones(3)}, metadata={"note": "before the spike"})
        >>> jp.checkpoint.metadata(directory)
        {'note': 'before the spike'}
    """
    return _opened(root(directory), step)[1]["metadata"]


def versions() -> dict[str, str]:
    """The versions that decide what a checkpoint looks like and which bits a step computes."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}


class _Target:
    """Where one array goes: what Orbax is asked for, and how that becomes a leaf like the one given."""

    def __init__(self, leaf: Any) -> None:
        self.is_stored = leaf.size > 0  # Orbax refuses arrays without elements
        self.sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.ShapeDtypeStruct) and self.sharding is None and jax.device_count() == 1:
            self.sharding = SingleDeviceSharding(jax.devices()[0])
        self.is_placed = self.sharding is not None or isinstance(leaf, np.ndarray | np.generic)
        # An array that was never placed must not become one that is tied to device 0: a step whose other arguments
        # live on a mesh takes the former and refuses the latter.
        self.is_free = isinstance(leaf, jax.Array) and not leaf.committed
        self.is_scalar = isinstance(leaf, np.generic)
        self.released = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding)
        self.key_impl = _key_impl(leaf) if is_key(leaf) else None
        stored = jax.eval_shape(jax.random.key_data, leaf) if self.key_impl else leaf
        on_host = self.is_free or self.sharding is None
        self.asked: jax.ShapeDtypeStruct | np.ndarray = (
            np.empty(stored.shape, stored.dtype)
            if on_host
            else jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=self.sharding)
        )

    def placed(self, value: Any) -> Any:
        """The leaf, from what Orbax read."""
        if not self.is_stored:
            value = self.asked if isinstance(self.asked, np.ndarray) else jnp.zeros(self.asked.shape, self.asked.dtype)
        if self.is_free:
            value = jnp.asarray(value)
        if self.key_impl:
            value = jax.random.wrap_key_data(value, impl=self.key_impl)
        if self.sharding is not None and not self.is_free and value.sharding != self.sharding:
            value = jax.device_put(value, self.sharding)
        return value[()] if self.is_scalar else value


def _key_impl(key: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _stored(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _described(parts: Parts) -> dict[str, str]:
    """One line a leaf; two trees fit each other if these are equal."""
    return {
        **{path: f"{leaf.shape} {leaf.dtype}" for path, leaf in parts.arrays.items()},
        **{path: f"a Python {type(value).__name__}" for path, value in parts.values.items()},
        **dict.fromkeys(parts.holders, "the state of an object"),
    }


def _opened(home: pathlib.Path, step: int | None) -> tuple[pathlib.Path, dict[str, Any]]:
    """The path of a checkpoint and what is written about it."""
    wanted = latest(home) if step is None else step
    about = None if wanted is None else _orbax.about(home / str(wanted))
    if about is None:
        complete = steps(home)
        incomplete = sorted(set(numbered(home)) - set(complete))
        what = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        others = f" Complete: {', '.join(map(str, complete)) or 'none'}."
        if incomplete:
            others += f" Incomplete, copied or deleted in part: {', '.join(map(str, incomplete))}."
        way_out = "Choose a complete step." if complete else "Check the path, or save first."
        raise CheckpointError(f"{home} holds {what}.{others} {way_out}")
    if about.get("jaxpar") != FORMAT:
        raise CheckpointError(
            f"{home / str(wanted)} was not written by this version of jaxpar.checkpoint "
            f"(format {about.get('jaxpar')}, this one reads {FORMAT}). Load it with what wrote it, and save it again."
        )
    return home / str(wanted), about


def _check_place(home: pathlib.Path, step: int) -> None:
    if step < 0:
        raise CheckpointError(f"step={step}: a step is 0 or more.")
    if (home / str(step)).exists():
        raise CheckpointError(
            f"{home / str(step)} exists, and a save overwrites nothing. Give another step or directory, or delete it."
        )
    # Asked for now: Orbax fails on it in a background thread, and then holds up the exit of the process.
    there = next(place for place in (home, *home.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a directory" if not there.is_dir() else "cannot be written by this user"
        raise CheckpointError(f"{home}: {there} {why}. Give a directory that every process can write.")


def _check_values(parts: Parts) -> None:
    lines = [
        f"{path}: a shape and dtype, without values"
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else f"{path}: deleted, as it was donated to a step; save what the step returned"
        for path, leaf in parts.arrays.items()
        if isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.is_deleted())
    ]
    if lines:
        raise CheckpointError(f"{listed(lines)}\nOnly arrays that hold values can be saved.")
    if not any(leaf.size for leaf in parts.arrays.values()):
        raise CheckpointError("The tree holds no array, so there is nothing to save. Give the model or its parameters.")


def _check_same(path: pathlib.Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    lines = [
        f"{name}: {saved.get(name, 'missing')} in the checkpoint, {here.get(name, 'nothing')} here"
        for name in [*here, *(name for name in saved if name not in here)]
        if saved.get(name) != here.get(name)
    ]
    if lines:
        differ = "1 leaf differs" if len(lines) == 1 else f"{len(lines)} leaves differ"
        raise CheckpointError(
            f"{path} is a checkpoint of another program: {differ} ({len(saved)} in the checkpoint, {len(here)} "
            f"here).\n{listed(lines, MOST_LINES)}\n"
            "Build the model, optimiser and containers as they were when it was saved, or choose another directory."
        )


def _check_placed(targets: Mapping[str, _Target]) -> None:
    lines = [f"{path}: no sharding" for path, target in targets.items() if not target.is_placed]
    if lines:
        raise CheckpointError(
            f"{listed(lines)}\nOn {jax.device_count()} devices a jax.ShapeDtypeStruct must say where it goes. "
            "Give it one: jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
