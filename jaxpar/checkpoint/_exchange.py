"""Weights to and from other programs, as safetensors: `load_safetensors`, `save_safetensors`.

Which tensor a leaf is, is said by a layout: one `Tensor` a path, kept beside the model. Each process reads and writes
the pieces that its own devices hold, one at a time: nothing moves between devices or processes, and host memory holds
one piece, whatever the size of the model.
"""

import fnmatch
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import _processes
from .._errors import CheckpointError, listed
from .._hardware import Device
from .._types import PyTree
from . import _safetensors, _sums
from ._barrier import Barrier
from ._damage import share
from ._match import MOST_LINES
from ._parts import Parts, is_key, take_apart
from ._safetensors import Stored
from ._save import check_values, seal
from ._steps import root
from ._target import Target, check_placed
from ._tensor import Made, Slices, Tensor, made

T = TypeVar("T")


def load_safetensors(
    directory: str | os.PathLike[str],
    like: T,
    layout: Mapping[str, Tensor],
    *,
    ignore: Sequence[str] = (),
    cast: bool = False,
) -> T:
    """Read weights that another program wrote into the shape of `like`, straight onto the shardings of its leaves.

    Each process reads the pieces that its devices hold, one at a time; a piece that several devices hold is read once.
    Everything is compared before anything is read. If there is a `SHA256SUMS` (`save_safetensors` writes one), every
    file that it names is checked first.

    Args:
        directory: With `model.safetensors`, or with `model.safetensors.index.json` and its files; or one such file.
        like: A module, or a tree of arrays or of `jax.ShapeDtypeStruct`s with a sharding. nnx modules are changed in
            place, and let go of their arrays before new ones are read.
        layout: By path of each leaf of `like`, where it is found.
        ignore: Patterns of names of tensors that may be left unread: `"*.rotary_emb.inv_freq"`.
        cast: Round floating-point tensors to the dtypes of `like`, which otherwise must be the same.
    Returns:
        `like` with the values of the files.
    Raises:
        CheckpointError: The files are not whole, or are those of another model: every tensor that is missing, too many,
            or of another shape or dtype is named, at once.
        ModuleNotFoundError: The extra `hf` is not installed.

    Example:
        >>> import tempfile, os
        >>> directory = os.path.join(tempfile.mkdtemp(), "exported")
        >>> layout = {"kernel": Tensor("proj.weight", transpose=(1, 0))}
        >>> save_safetensors(directory, {"kernel": jnp.ones((8, 4))}, layout)
        >>> load_safetensors(directory, {"kernel": jnp.zeros((8, 4))}, layout)["kernel"].sum().item()
        32.0
    """
    home = root(directory)
    parts = take_apart(like)
    wanted = made(layout, _described(parts))
    there = _safetensors.found(home)
    _check(home, wanted, there, ignore, cast=cast)
    _check_sums(home)
    targets = {path: Target(leaf) for path, leaf in parts.arrays.items()}
    check_placed(targets)
    parts.build({path: targets[path].released for path in parts.arrays if path not in parts.loose})
    parts.arrays.clear()  # with this, nobody but the caller holds an array of `like`
    return parts.build({path: target.placed(_read(target, layout[path], there)) for path, target in targets.items()})


def save_safetensors(
    directory: str | os.PathLike[str],
    tree: PyTree,
    layout: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    file_bytes: int = 5_000_000_000,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write the arrays of `tree` for another program, and return when `directory` is complete.

    Every process calls it, and writes the pieces that its own devices hold (of copies, the first) into the same files,
    one piece at a time. The directory appears by one rename, with a `SHA256SUMS` that `sha256sum -c` reads.

    Args:
        directory: Must not exist; on a file system that every process sees.
        tree: A module, or any tree of arrays.
        layout: By path of each leaf of `tree`, where it goes.
        dtype: Of all floating-point tensors: `"bfloat16"`; as they are if `None`.
        file_bytes: The most that one file holds; there are several and an index if one does not do.
        beside: JSON files to write beside them, by name: `{"config.json": {...}}`.
    Raises:
        CheckpointError: The directory exists, or leaves cannot be written: all of them named.
    """
    home = root(directory)
    parts = take_apart(tree)
    check_values(parts)
    described = _described(parts)
    if dtype is not None:
        described = {path: (shape, _rounded(kind, dtype)) for path, (shape, kind) in described.items()}
    tensors = made(layout, described)
    _check_writable(home, tensors, file_bytes)
    for name in beside or {}:
        if not name.endswith(".json") or name in (_safetensors.INDEX,) or pathlib.PurePath(name).name != name:
            raise CheckpointError(f"beside: {name!r} is not a name for a JSON file of yours. Give 'config.json'.")

    barrier = Barrier()
    place = home.with_name(f"{home.name}.saving")
    placed = _safetensors.lay_out(place, tensors, file_bytes)
    try:
        if _processes.is_first():
            shutil.rmtree(place, ignore_errors=True)  # what a killed process left
            place.mkdir(parents=True)
            _safetensors.create(place, tensors, placed)
            for name, value in (beside or {}).items():
                (place / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        barrier("made")
        for path, leaf in parts.arrays.items():
            _write(leaf, layout[path], placed)
        barrier("written")
        seal(place, home, share(place), barrier)
    except BaseException as error:
        barrier.fail(error)
        if _processes.is_first():
            shutil.rmtree(place, ignore_errors=True)  # on a full disk its space is needed
        raise


def tensors(directory: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in the safetensors files of `directory`, by name. Reads no values.

    Raises:
        CheckpointError: There are none, or they are not whole.

    Example:
        >>> import tempfile, os
        >>> directory = os.path.join(tempfile.mkdtemp(), "exported")
        >>> save_safetensors(directory, {"kernel": jnp.ones((8, 4))}, {"kernel": Tensor("proj.weight")})
        >>> tensors(directory)
        {'proj.weight': ((8, 4), 'float32')}
    """
    return {name: (stored.shape, stored.kind) for name, stored in _safetensors.found(root(directory)).items()}


def _described(parts: Parts) -> dict[str, tuple[tuple[int, ...], str]]:
    lines = [f"{path}: a PRNG key" for path, leaf in parts.arrays.items() if is_key(leaf)]
    lines += [f"{path}: a Python {type(value).__name__}" for path, value in parts.values.items()]
    lines += [f"{path}: an object with a state" for path in parts.holders]
    if lines:
        raise CheckpointError(
            f"{listed(lines)}\nsafetensors holds arrays alone. Give the parameters: nnx.state(model, nnx.Param)."
        )
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in parts.arrays.items()}


def _check(
    home: pathlib.Path, wanted: Mapping[str, Made], there: Mapping[str, Stored], ignore: Sequence[str], *, cast: bool
) -> None:
    """Raise unless the tensors are those that are wanted."""

    def fits(name: str, *, cast: bool) -> bool:
        kinds = {there[name].kind, *wanted[name].kinds}
        same = len(kinds) == 1 or (cast and all(jnp.issubdtype(jnp.dtype(kind), jnp.floating) for kind in kinds))
        return there[name].shape == wanted[name].shape and same

    def told(name: str) -> str:
        tensor = wanted[name]
        return (
            f"{name}: {there.get(name, 'missing')} in the files, {tensor.shape} {tensor.kinds[0]} here ({tensor.leaf})"
        )

    lines = [told(name) for name in wanted if name not in there or not fits(name, cast=cast)]
    surplus = [
        name
        for name in there
        if name not in wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]
    lines += [f"{name}: {there[name]} in the files, nothing here" for name in surplus]
    if not lines:
        return
    way_out = "Build the model as it was when they were written, or name what may be left unread: ignore=[...]."
    if not surplus and not cast and all(name in there and fits(name, cast=True) for name in wanted):
        way_out = "Only floating-point dtypes differ: cast=True rounds what is read to the dtypes here."
    differ = "1 tensor differs" if len(lines) == 1 else f"{len(lines)} tensors differ"
    raise CheckpointError(
        f"{home} holds the weights of another model: {differ} ({len(there)} in the files, {len(wanted)} here).\n"
        f"{listed(lines, MOST_LINES)}\n{way_out}"
    )


def _check_sums(home: pathlib.Path) -> None:
    """Raise for files that are not what the `SHA256SUMS` beside them says, if there is one."""
    sums = _sums.read(home) if home.is_dir() else None
    if sums is None:
        return
    mine = [name for name in share(home) if name in sums]
    found = _sums.of_files(home, mine)
    lines = [f"{name}: other bytes than were written (SHA-256)" for name in sorted(mine) if found[name] != sums[name]]
    if _processes.greatest(len(lines)):
        raise CheckpointError(
            f"{home} is damaged.\n{listed(lines) or 'Another process saw it; its log names the files.'}\n"
            "Copy it again from where it is whole."
        )


def _read(target: Target, tensor: Tensor, there: Mapping[str, Stored]) -> Any:
    """The array of one leaf, piece after piece."""
    asked = target.asked
    shape = tuple(asked.shape)
    if isinstance(asked, np.ndarray):
        return _piece(tensor, shape, tuple(slice(0, size) for size in shape), asked.dtype, there)
    holders: dict[tuple[tuple[int, int], ...], list[Device]] = {}
    for device, index in asked.sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(each.indices(size)[:2] for each, size in zip(index or (), shape, strict=True))
        holders.setdefault(spans, []).append(device)
    held = {}
    for spans, devices in holders.items():
        piece = _piece(tensor, shape, tuple(slice(*span) for span in spans), asked.dtype, there)
        for device in devices:
            held[device] = jax.device_put(piece, device)
    return jax.make_array_from_single_device_arrays(shape, asked.sharding, list(held.values()), dtype=asked.dtype)


def _piece(
    tensor: Tensor, shape: tuple[int, ...], piece: Slices, dtype: Any, there: Mapping[str, Stored]
) -> np.ndarray:
    values = np.empty([span.stop - span.start for span in piece], dtype)
    if values.size:
        for region in tensor.regions(shape, piece):
            stored = there[region.name]
            block = stored.read(tensor.full_view(shape, stored.shape), region.block)
            values[region.where] = tensor.in_leaf(block)
    return values


def _write(leaf: Any, tensor: Tensor, placed: Mapping[str, Stored]) -> None:
    """Write the pieces of a leaf that this process answers for."""
    shape = tuple(leaf.shape)
    if isinstance(leaf, jax.Array):
        pieces = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        pieces = [(tuple(slice(0, size) for size in shape), leaf)] if _processes.is_first() else []
    for index, data in pieces:
        values = np.asarray(data)
        for region in tensor.regions(shape, index) if values.size else ():
            stored = placed[region.name]
            block = tensor.in_tensor(values[(*region.where, ...)])
            stored.write(tensor.full_view(shape, stored.shape), region.block, block)


def _rounded(kind: str, dtype: str) -> str:
    if dtype not in ("float32", "float16", "bfloat16", "float64"):
        raise CheckpointError(f"dtype={dtype!r}: give float32, bfloat16, float16 or float64.")
    return dtype if jnp.issubdtype(jnp.dtype(kind), jnp.floating) else kind


def _check_writable(home: pathlib.Path, tensors: Mapping[str, Made], file_bytes: int) -> None:
    if home.exists():
        raise CheckpointError(f"{home} exists, and nothing is overwritten. Give another directory, or delete it.")
    if file_bytes < 1:
        raise CheckpointError(f"file_bytes={file_bytes}: a file holds at least one tensor. Give bytes, 5_000_000_000.")
    lines = [
        f"{name}: {' and '.join(tensor.kinds)}"
        for name, tensor in tensors.items()
        if len(tensor.kinds) > 1 or not _safetensors.CODES.keys() & set(tensor.kinds)
    ]
    if lines:
        raise CheckpointError(f"{listed(lines)}\nsafetensors has no such dtype, or a tensor is of two. Give dtype=.")
