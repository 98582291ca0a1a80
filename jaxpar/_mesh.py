"""Meshes: named axes over devices that are here, simulated, or not here at all.

`mesh` returns JAX's own classes: a `jax.sharding.Mesh` for devices that are here, and for hardware that is not here a
`jax.sharding.AbstractMesh` whose `abstract_device` carries the `Hardware`. (Abstract meshes are interned and cannot be
subclassed: `AbstractMesh.__new__` returns the base class. Their `abstract_device` is a public field, part of their
identity, and survives pickling and manual regions.) Axis types are always given, and always Auto. A mesh that the user
made is taken as it is by everything: `hardware_of` reads what it stands on from its devices.

Axes, outermost first, so that whoever speaks most often gets the fastest links:

| axis      | what crosses it, and how often                                    |
|-----------|-------------------------------------------------------------------|
| `data`    | gradients, once a step                                            |
| `pipe`    | one microbatch's activations, to one neighbour, once a tick       |
| `fsdp`    | a block's weights and gradients, once a block and microbatch      |
| `expert`  | the tokens of a mixture layer, twice a layer                      |
| `context` | keys and values, every attention layer                            |
| `tensor`  | activations, several times a block                                |

The order of arguments does not matter. Slices and hosts divide the outermost axes unless `dcn=` says otherwise.
"""

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from . import _devices, _hardware, _mesh_spec
from ._devices import simulate
from ._errors import MeshError, nearest
from ._hardware import Device, Hardware
from ._mesh_spec import MeshSpec, override
from ._types import AnyMesh

__all__ = [
    "AXES",
    "TargetDevice",
    "axis_sizes",
    "dcn_factors",
    "describe",
    "hardware_of",
    "mesh",
    "override",
    "simulate",
]

AXES = ("data", "pipe", "fsdp", "expert", "context", "tensor")
"""The axes that `mesh` makes, outermost first."""

_logger = logging.getLogger("jaxpar")


@dataclasses.dataclass(frozen=True, repr=False)
class TargetDevice(AbstractDevice):
    """The device of a mesh whose hardware is not here: what JAX asks of an abstract device, and what jaxpar knows.

    Attributes:
        hardware: All of it.
        dcn: Each axis that crosses slices, and how often.
    """

    hardware: Hardware
    dcn: tuple[tuple[str, int], ...]


def mesh(
    hardware: str | os.PathLike[str] | Hardware | None = None,
    /,
    *,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[Device] | None = None,
    allow_unused: bool = False,
    **axes: int,
) -> AnyMesh:
    """A mesh of named axes: over the attached devices, or for hardware that is not here.

    Moves nothing and allocates nothing. Devices are ordered by the network's topology, with `tensor` on the nearest
    neighbours; axes always come in the order of `AXES`, whatever the order of the arguments.

    `JAXPAR_MESH`, or `--mesh` on the command line, replaces hardware, axes or both, and is logged: `fsdp=4,tensor=2`,
    `v5p-128`, `v5p-128:fsdp=32,tensor=2`, `2xv5e:16x16:data=2,fsdp=256,dcn.data=2`, or the path of a TOML file.

    Args:
        hardware: A cloud name (`"v5p-128"`), topology (`"v5p:4x4x4"`, `"2xv5e:16x16"`), GPUs (`"h100:2x8"`), `"cpu:8"`,
            or the path of a TOML file with `hardware`, `axes`, `dcn`, `allow_unused`, each optional. If the attached
            devices are that hardware, they are used; if not, the mesh is abstract: to plan and compile, not to run.
        dcn: How many ways each axis crosses slices or hosts, `{"data": 2}`; the rest of the axis is within one. By
            default slices divide the outermost axes.
        devices: The devices to use, instead of all that are attached.
        allow_unused: Whether the mesh may use fewer devices than there are.
        **axes: The size of each axis; one may be -1 and takes what the others leave.

    Raises:
        MeshError: An axis, a size, a count or a name is wrong (with the nearest legal shape), or this process is one
            of several and `jp.initialize()` has not been called.

    Example:
        >>> dict(jp.mesh(fsdp=-1, tensor=2).shape)
        {'fsdp': 4, 'tensor': 2}
        >>> dict(jp.mesh("v5p-128", fsdp=32, tensor=-1).shape)
        {'fsdp': 32, 'tensor': 2}
    """
    spec = _mesh_spec.overridden(_asked(hardware, axes, dcn, allow_unused))
    _check_axes(spec.axes)
    stated = hardware if isinstance(hardware, Hardware) and spec.hardware == hardware.name else None
    if stated is None and spec.hardware:
        stated = _hardware.parse(spec.hardware)
    if devices is None:
        devices = _devices.attached(stated, allow_unused=spec.allow_unused)
    elif stated is not None:
        raise MeshError(
            f"jp.mesh was given devices= and also the hardware {stated.name} (by the script, --mesh or "
            f"{_mesh_spec.VARIABLE}). Leave one of them out."
        )
    here = _hardware.of_devices(devices) if devices is not None else stated
    assert here is not None, "no hardware was named, and no devices were looked up"
    sizes = _sizes(spec.axes, here, allow_unused=spec.allow_unused)
    num_slices = _slices_used(math.prod(sizes.values()), here)
    factors = _dcn_factors(spec.dcn, sizes, num_slices, here)
    auto = (AxisType.Auto,) * len(sizes)
    if devices is None:
        device = TargetDevice(here.chip.device_kind, here.chip.cores, here.kind, here, tuple(factors.items()))
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), auto, abstract_device=device)
    return Mesh(ordered(devices, sizes, factors), tuple(sizes), auto)


def hardware_of(mesh: AnyMesh) -> Hardware:
    """What `mesh` stands on, whoever made it.

    Raises:
        MeshError: An abstract mesh that says nothing about its device.

    Example:
        >>> hardware_of(jp.mesh("v5p-128", fsdp=64)).num_chips
        64
    """
    if isinstance(mesh, Mesh):
        return _hardware.of_devices(list(mesh.devices.flat))
    device = mesh.abstract_device
    if isinstance(device, TargetDevice):
        return device.hardware
    if device is None:
        raise MeshError(
            f"This abstract mesh, {_shape(mesh.shape)}, does not say what hardware it is for. Name it: "
            f'jp.mesh("v5p-128", {_arguments(mesh.shape)}).'
        )
    return _hardware.of_kind(device.device_kind, device.platform, mesh.size)


def axis_sizes(mesh: AnyMesh) -> dict[str, int]:
    """The size of each axis, outermost first.

    Example:
        >>> axis_sizes(jp.mesh(tensor=2, data=4))
        {'data': 4, 'tensor': 2}
    """
    return {str(axis): size for axis, size in mesh.shape.items()}


def dcn_factors(mesh: AnyMesh) -> dict[str, int]:
    """The axes that cross slices or hosts, and how many ways each does; empty within one slice.

    Example:
        >>> dcn_factors(jp.mesh("2xv5e:16x16", data=2, fsdp=256))
        {'data': 2}
    """
    if isinstance(mesh, AbstractMesh):
        return dict(mesh.abstract_device.dcn) if isinstance(mesh.abstract_device, TargetDevice) else {}
    slices = np.vectorize(_hardware.slice_of, otypes=[int])(mesh.devices)
    lines = {
        str(axis): max(len(set(line)) for line in np.moveaxis(slices, dim, -1).reshape(-1, slices.shape[dim]))
        for dim, axis in enumerate(mesh.axis_names)
    }
    return {axis: factor for axis, factor in lines.items() if factor > 1}


def describe(mesh: AnyMesh) -> str:
    """Two lines: the hardware (chips, topology, hosts, memory), and the axes.

    Example:
        >>> print(describe(jp.mesh("v5p-128", fsdp=32, tensor=2)))
        v5p-128: 64 TPU v5p chips (the name counts TensorCores, 2 a chip), topology 4x4x4, 16 hosts,
            95.7 GiB a device; not attached: plan and compile only
        axes: fsdp=32 x tensor=2
    """
    hardware, crossing = hardware_of(mesh), dcn_factors(mesh)
    first = hardware.describe()
    if mesh.size < hardware.num_devices:
        first += f"; {mesh.size} of its {hardware.num_devices} devices used"
    if isinstance(mesh, AbstractMesh):
        first += "; not attached: plan and compile only"
    over = "slices" if hardware.kind == "tpu" else "hosts"
    ways = [f"{axis} crosses {over} {factor} ways" for axis, factor in crossing.items()]
    return f"{first}\naxes: {_shape(mesh.shape)}" + (f"; {', '.join(ways)}" if ways else "")


def _asked(
    hardware: str | os.PathLike[str] | Hardware | None,
    axes: Mapping[str, int],
    dcn: Mapping[str, int] | None,
    allow_unused: bool,
) -> MeshSpec:
    """The arguments of a call; axes named in it replace those of a file."""
    name = hardware.name if isinstance(hardware, Hardware) else os.fspath(hardware) if hardware is not None else None
    spec = _mesh_spec.read(pathlib.Path(name)) if name and name.endswith(".toml") else MeshSpec(hardware=name)
    if axes:
        spec = dataclasses.replace(spec, axes=axes, dcn={})
    return dataclasses.replace(
        spec, dcn=spec.dcn if dcn is None else dcn, allow_unused=spec.allow_unused or allow_unused
    )


def _check_axes(axes: Mapping[str, Any]) -> None:
    faults = [
        f"jp.mesh has no axis {axis!r}.{nearest(axis, [*AXES, 'devices', 'dcn', 'allow_unused'])}"
        for axis in axes
        if axis not in AXES
    ]
    if faults:
        raise MeshError(
            f"{' '.join(faults)} Axes: {', '.join(AXES)}. For other names make a jax.sharding.Mesh: jaxpar takes it "
            "as it is."
        )
    faults = [
        f"{axis}={size!r}: a size is a whole number of at least 1, or -1 for what the others leave."
        for axis, size in axes.items()
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1)
    ]
    open_axes = [axis for axis, size in axes.items() if size == -1]
    if len(open_axes) > 1:
        faults.append(f"Only one axis may be -1, and {' and '.join(open_axes)} are. Give the size of all but one.")
    if not axes:
        faults.append("A mesh needs an axis: jp.mesh(fsdp=-1) shards over every device, jp.mesh(data=-1) replicates.")
    if faults:
        raise MeshError(" ".join(faults))


def _sizes(axes: Mapping[str, int], hardware: Hardware, *, allow_unused: bool) -> dict[str, int]:
    """Every axis with its size, in canonical order."""
    sizes = {axis: axes[axis] for axis in AXES if axis in axes}
    have = hardware.num_devices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if open_axis and have // fixed and (have % fixed == 0 or allow_unused):
        return {axis: have // fixed if axis == open_axis else size for axis, size in sizes.items()}
    if not open_axis and (fixed == have or (allow_unused and fixed < have)):
        return sizes
    shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != -1)
    remedies = [f"Nearest: {_arguments(_nearest_shape(sizes, have))}."]
    if open_axis:
        problem = f"{shape} makes {fixed}, which does not divide the {have} devices of {hardware.name}"
    else:
        problem = f"{shape} makes {fixed} devices, and {hardware.name} has {have}"
    if fixed < have:
        remedies.append("To leave devices idle say so: allow_unused=True.")
    elif hardware.kind == "cpu":
        remedies.append(f"Or simulate as many: jp.simulate({fixed}).")
    raise MeshError(f"{problem}. {' '.join(remedies)}")


def _nearest_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The sizes that multiply to `num_devices` with the fewest axes changed, by the least, the outermost first."""

    def cost(shape: tuple[int, ...]) -> tuple[int, float, list[float]]:
        pairs = zip(shape, sizes.values(), strict=True)
        changes = [0.0 if old == -1 else round(abs(math.log(new / old)), 6) for new, old in pairs]
        return sum(change > 0 for change in changes), round(sum(changes), 6), changes[::-1]

    return dict(zip(sizes, min(factorisations(num_devices, len(sizes)), key=cost), strict=True))


def factorisations(number: int, length: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of `length` whole numbers with the product `number`."""
    if length == 1:
        yield (number,)
        return
    for first in (divisor for divisor in range(1, number + 1) if number % divisor == 0):
        for rest in factorisations(number // first, length - 1):
            yield (first, *rest)


def _slices_used(size: int, hardware: Hardware) -> int:
    """How many slices a mesh of `size` devices covers: part of one, or all of several."""
    a_slice = hardware.num_devices // hardware.num_slices
    if size <= a_slice:
        return 1
    if size % a_slice:
        raise MeshError(
            f"{hardware.name}: {size} devices are not whole slices of {a_slice}. "
            f"Nearest: {size - size % a_slice} devices."
        )
    return size // a_slice


def _dcn_factors(
    asked: Mapping[str, int], sizes: Mapping[str, int], num_slices: int, hardware: Hardware
) -> dict[str, int]:
    """How often each axis crosses slices: as asked, else as the outermost axes can."""
    if not asked:
        factors, left = {}, num_slices
        for axis, size in sizes.items():
            factors[axis] = math.gcd(size, left)
            left //= factors[axis]
        return {axis: factor for axis, factor in factors.items() if factor > 1}
    faults = [
        f"dcn has the axis {axis!r}, and the mesh has not.{nearest(axis, sizes)}" for axis in asked if axis not in sizes
    ]
    faults += [
        f"dcn {axis}={factor} does not divide {axis}={sizes[axis]}."
        for axis, factor in asked.items()
        if axis in sizes and (isinstance(factor, bool) or factor < 1 or sizes[axis] % factor)
    ]
    product = math.prod(asked.values())
    if not faults and hardware.kind == "cpu":
        _logger.info("dcn=%s: CPU devices have no slices, so it has no effect here.", dict(asked))
        return {}
    if not faults and product != num_slices:
        faults.append(f"dcn {_shape(asked)} makes {product} slices, and {hardware.name} has {num_slices}.")
    if faults:
        right = _dcn_factors({}, sizes, num_slices, hardware)
        remedy = f"Nearest: dcn={right}." if right else "Within one slice, leave dcn out."
        raise MeshError(f"{' '.join(faults)} {remedy}")
    return {axis: factor for axis, factor in asked.items() if factor > 1}


def ordered(devices: Sequence[Any], sizes: Mapping[str, int], dcn: Mapping[str, int]) -> np.ndarray:
    """`devices` in the shape of the mesh, so that inner axes lie on the nearest neighbours."""
    shape = tuple(sizes.values())
    devices = sorted(devices, key=_hardware.slice_of)[: math.prod(shape)]
    if devices[0].platform == "cpu":
        return _as_array(devices).reshape(shape)
    from jax.experimental import mesh_utils

    outer = tuple(dcn.get(axis, 1) for axis in sizes)
    inner = tuple(size // factor for size, factor in zip(shape, outer, strict=True))
    try:
        for split in (False, True):
            try:
                if math.prod(outer) > 1:
                    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=split)
                return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
            except NotImplementedError:
                if split:
                    raise
                _logger.info("%s: an axis shares a side of the TPU topology with another.", _shape(sizes))
    except (NotImplementedError, AssertionError, ValueError) as error:
        raise MeshError(
            f"{_shape(sizes)} cannot be laid on {_hardware.of_devices(devices).spec}: {error} Choose sizes that are "
            "products of the topology's sides, or order the devices yourself and use a jax.sharding.Mesh."
        ) from error
    raise AssertionError("unreachable")


def _as_array(devices: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    return array


def _shape(sizes: Mapping[Any, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def _arguments(sizes: Mapping[Any, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
