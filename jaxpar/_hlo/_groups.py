"""Which devices a collective joins, and which axes of a mesh that is.

Replica groups come in three notations, none of which names the mesh's own axes reliably: `{{0,1},{2,3}}`,
`[4,2]<=[2,4]T(1,0)`, and `mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}`. All three number devices
by their position in the mesh, row-major; from that the axes follow.
"""

import dataclasses
import functools as ft
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The axes of a mesh, outermost first, as the text needs them.

    Replica groups name devices by their position in the mesh, row-major, not by device id; so no ids are needed.

    Attributes:
        names: Axis names.
        sizes: Their sizes.
        slices: The slice of each position, where there are several: XLA:TPU then writes one program a slice.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    slices: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of devices."""
        return int(np.prod(self.sizes, dtype=np.int64))


def mesh_axes(mesh: Any) -> MeshAxes:
    """The `MeshAxes` of a `jax.sharding.Mesh`, or of anything with `axis_names` and `axis_sizes`."""
    try:
        devices = getattr(mesh, "devices", None)
    except ValueError:  # what an abstract mesh has to say of its devices
        devices = None
    flat = [] if devices is None else list(np.asarray(devices).flat)
    slices = tuple(getattr(device, "slice_index", None) or 0 for device in flat)
    several = len(set(slices)) > 1
    return MeshAxes(names=tuple(mesh.axis_names), sizes=tuple(mesh.axis_sizes), slices=slices if several else ())


def groups_of(attributes: str, num_devices: int) -> np.ndarray | None:
    """The replica groups written in an operation's attributes, `(groups, members)`; `None` if they cannot be read.

    Three notations: `{{0,1},{2,3}}`; `[4,2]<=[2,4]T(1,0)`; and `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`
    with named (or anonymous) axes, of which `'b':(2)2` is a part. `{}` is every device.
    """
    if "replica_groups=" not in attributes:
        return np.arange(num_devices)[None]
    start = attributes.index("replica_groups=")
    return _groups(attributes[start:].partition(", metadata=")[0], num_devices)


def pairs_of(attributes: str) -> np.ndarray:
    """The `(source, target)` pairs of a permute, `(pairs, 2)`."""
    start = attributes.find("source_target_pairs={")
    if start < 0:
        return np.zeros((0, 2), dtype=np.int64)
    end = attributes.find("}}", start)
    return np.asarray(_PAIR.findall(attributes[start : end + 2]), dtype=np.int64).reshape(-1, 2)


def axes_of(groups: np.ndarray, mesh: MeshAxes) -> tuple[str, ...]:
    """The axes whose product each group is, in mesh order; `()` for groups of one, `("?",)` for no such product."""
    if groups.shape[1] == 1:
        return ()
    if groups.max() >= mesh.size:
        return ("?",)
    found, members = [], 1
    for name, size, coordinates in zip(mesh.names, mesh.sizes, np.unravel_index(groups, mesh.sizes), strict=True):
        rows = np.sort(coordinates, axis=1)
        distinct = 1 + (rows[:, 1:] != rows[:, :-1]).sum(axis=1)
        if (distinct != distinct[0]).any():
            return ("?",)
        if distinct[0] > 1:
            members *= int(distinct[0])
            found.append(name if distinct[0] == size else f"{name}[{distinct[0]}/{size}]")
    return tuple(found) if members == groups.shape[1] else ("?",)


def axes_written(attributes: str, flat: MeshAxes) -> MeshAxes | None:
    """The mesh that replica groups spell with names that people gave, `mesh['fsdp'=16,'tensor'=16]`.

    Axes of 1 are left out. Of a program for one slice of several the slices are a first axis, `slice`.
    """
    start = attributes.find("mesh[")
    if start < 0:
        return None
    named = re.findall(r"['\"]([\w.\-]+)['\"]\s*=\s*(\d+)", attributes[start : attributes.find("]", start)])
    kept = [(name, int(size)) for name, size in named if int(size) > 1]
    if not kept or any(re.fullmatch(r"_?axis_\d+", name) for name, _ in kept):
        return None
    total = int(np.prod([size for _, size in kept], dtype=np.int64))
    num_slices = len(set(flat.slices)) or 1
    if total * num_slices == flat.size and num_slices > 1:
        kept.insert(0, ("slice", num_slices))
    elif total != flat.size:
        return None
    return MeshAxes(names=tuple(name for name, _ in kept), sizes=tuple(size for _, size in kept), slices=flat.slices)


def axes_behind(groups: Sequence[np.ndarray], flat: MeshAxes) -> MeshAxes:
    """The coarsest mesh of as many devices of whose axes every one of `groups` is a product.

    Groups that step through devices at distance `a` and end at distance `b` need cuts at `a` and `b` in the row-major
    numbering. Groups that are no such product are left out.
    """
    num_devices = flat.size
    num_slices = len(set(flat.slices)) or 1
    cuts = {1, num_devices}
    if num_slices > 1 and num_devices % num_slices == 0:
        cuts.add(num_devices // num_slices)
    for each in {(found.shape, found.tobytes()): found for found in groups}.values():
        cuts |= _cuts(np.sort(each[np.argmin(each.min(axis=1))]))
    bounds = [cut for cut in sorted(cuts) if num_devices % cut == 0]
    chain = [bounds[0]]
    for cut in bounds[1:]:
        if cut % chain[-1] == 0:
            chain.append(cut)
    chain = chain if chain[-1] == num_devices else [*chain, num_devices]
    sizes = [high // low for low, high in itertools.pairwise(chain)][::-1] or [1]
    names = ["slice"] if num_slices > 1 and sizes[0] == num_slices else []
    names += [_LETTERS[at] if at < len(_LETTERS) else f"x{at}" for at in range(len(sizes) - len(names))]
    return MeshAxes(names=tuple(names), sizes=tuple(sizes), slices=flat.slices)


_LETTERS = "xyzuvw"


def _cuts(group: np.ndarray) -> set[int]:
    """Where the numbering of devices must be cut so that `group`, sorted and starting at the origin, is a product."""
    found: set[int] = set()
    rest = group - group[0]
    while len(rest) > 1:
        step = int(rest[1])
        run = 1
        while run < len(rest) and rest[run] == run * step:
            run += 1
        if len(rest) % run:
            return set()
        found |= {step, step * run}
        rest = rest[::run]
        if len(rest) > 1 and int(rest[1]) < step * run:
            return set()
    return found


_EXPLICIT = re.compile(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_PAIR = re.compile(r"\{(\d+),\s*(\d+)\}")


@ft.lru_cache(maxsize=4096)
def _groups(written: str, num_devices: int) -> np.ndarray | None:
    try:
        if found := _IOTA.match(written):
            shape, source, order = (_ints(part) for part in found.groups())
            devices = np.arange(np.prod(source)).reshape(source)
            return (devices.transpose(order) if order else devices).reshape(shape[0], -1)
        if found := _MESH.match(written):
            return _mesh_groups(*found.groups())
        if found := _EXPLICIT.match(written):
            rows = [_ints(row) for row in re.findall(r"\{([\d,\s]*)\}", found.group(1))]
            return np.asarray(rows, dtype=np.int64) if rows else np.arange(num_devices)[None]
    except (ValueError, IndexError, TypeError):  # sizes that do not fit together, ragged groups
        return None
    return None


def _mesh_groups(axes: str, source: str | None, order: str | None, chosen: str) -> np.ndarray:
    named = re.findall(r"['\"]?([\w.\-]+)['\"]?\s*=\s*(\d+)", axes)
    sizes = {name: int(size) for name, size in named}
    devices = np.arange(np.prod([*sizes.values()], dtype=np.int64))
    if source:
        devices = devices.reshape(_ints(source))
        devices = devices.transpose(_ints(order)) if order else devices
    dims: list[tuple[str, int, int]] = [(name, 0, size) for name, size in sizes.items()]
    wanted: list[tuple[str, int]] = []
    for name, before, size in re.findall(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?", chosen):
        if name not in sizes:
            raise ValueError(name)
        if size:  # the part of an axis that follows `before` and has `size` devices
            after = sizes[name] // (int(before) * int(size))
            at = dims.index((name, 0, sizes[name]))
            dims[at : at + 1] = [(name, 0, int(before)), (name, int(before), int(size)), (name, -1, after)]
        wanted.append((name, int(before) if size else 0))
    devices = devices.reshape([size for _, _, size in dims])
    inside = [next(at for at, dim in enumerate(dims) if dim[:2] == want) for want in wanted]
    outside = [at for at in range(len(dims)) if at not in inside]
    members = int(np.prod([dims[at][2] for at in inside], dtype=np.int64))
    return devices.transpose(outside + inside).reshape(-1, members)


def _ints(written: str | None) -> list[int]:
    return [int(part) for part in (written or "").split(",") if part.strip()]
