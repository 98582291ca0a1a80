"""What a mesh stands on: chips, how many, how they are joined, and what each can do.

A `Hardware` is pure data, parsed from a name; only `of_devices` looks at devices, and nothing ever needs a TPU or GPU
runtime. A *chip* is what one buys; a *device* is what JAX sees (a 7x chip is two); a *slice* is a group of
devices joined by fast links (a TPU slice by ICI, a GPU host by NVLink); slices are joined by the slower data-centre
network (DCN). Figures come from `_hardware.toml`, with their sources; 0 means that nobody has published one.

| name              | is                                                                                |
|-------------------|-----------------------------------------------------------------------------------|
| `v5p-128`         | a cloud name: 64 chips in 4x4x4, because v4, v5p and 7x names count TensorCores   |
| `v5e-256`         | a cloud name: 256 chips in 16x16, because v5e and v6e names count chips           |
| `v5p:4x4x12`      | a topology: that many chips along each side                                       |
| `2xv5e:16x16`     | two such slices, joined by the data-centre network; also `2xv5e-256`              |
| `h100:2x8`        | hosts x GPUs of each; `h100:8` is one host                                        |
| `cpu:8`           | eight simulated devices on this host                                              |
"""

import dataclasses
import functools as ft
import math
import os
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from ._errors import MeshError, nearest

Kind = Literal["tpu", "gpu", "cpu"]
Device = Any
"""A `jax.Device`, which type checkers take for a variable."""

_GIB = 2**30
_CPU_MEMORY = 8 * _GIB  # where the system does not say how much it has
_DTYPES = {"bfloat16": "bf16", "float16": "bf16", "float32": "f32", "int8": "int8", "float8": "f8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip is and can do. Rates per chip, memory per device; 0 where nothing is published.

    Attributes:
        name: As in hardware names, `v5p`.
        device_kind: As JAX says it, `TPU v5`.
        cores: TensorCores or streaming multiprocessors.
        devices: JAX devices in the chip.
        counts_cores: Whether cloud names count TensorCores rather than chips.
        memory: Bytes that a program may use of one device.
        on_chip: Bytes of one device's vector memory, where a compiler keeps what fits.
        bf16: Dense FLOP/s of the chip in bfloat16; `f32` is that of a float32 matmul at JAX's default precision.
        hbm: Memory bandwidth, bytes/s.
        links: Links to neighbours in the slice.
        link: Bytes/s of one link in one direction.
        dcn: Bytes/s of the chip's share of the network between slices, in one direction.
        pcie: Bytes/s between the chip and its host, in one direction.
        clock: Cycles/s of a TensorCore, as XLA:TPU counts them.
    """

    name: str
    kind: Kind
    device_kind: str
    cores: int = 1
    devices: int = 1
    counts_cores: bool = False
    memory: int = 0
    on_chip: int = 0
    bf16: float = 0.0
    f32: float = 0.0
    int8: float = 0.0
    f8: float = 0.0
    hbm: float = 0.0
    links: int = 0
    link: float = 0.0
    dcn: float = 0.0
    pcie: float = 0.0
    clock: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """A number of chips and how they are joined. `parse` makes one from a name.

    Attributes:
        name: As the user wrote it.
        chip: What each chip is.
        topology: Chips along each side of one slice; `(num_gpus,)` of one host.
        num_slices: Groups of devices joined by fast links.
        num_hosts: Machines, over all slices.
    """

    name: str
    chip: Chip
    topology: tuple[int, ...]
    num_slices: int = 1
    num_hosts: int = 1

    def __post_init__(self) -> None:
        if not self.topology or min(*self.topology, self.num_slices, self.num_hosts) < 1:
            raise MeshError(
                f"{self.name!r}: topology {_times(self.topology)}, {self.num_slices} slices and {self.num_hosts} hosts "
                "must each be at least 1. Write a name such as v5p-128, v5p:4x4x4, 2xv5e:16x16, h100:2x8 or cpu:8."
            )

    @property
    def kind(self) -> Kind:
        """`"tpu"`, `"gpu"` or `"cpu"`."""
        return self.chip.kind

    @property
    def platform(self) -> str:
        """What `jax.export` and `lowering_platforms` call it: `"tpu"`, `"cuda"` or `"cpu"`."""
        return {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}[self.kind]

    @property
    def num_chips(self) -> int:
        """Chips, over all slices."""
        return math.prod(self.topology) * self.num_slices

    @property
    def devices_per_chip(self) -> int:
        """JAX devices in a chip: 2 for 7x, otherwise 1."""
        return self.chip.devices

    @property
    def num_devices(self) -> int:
        """JAX devices, over all slices: what the axes of a mesh multiply to."""
        return self.num_chips * self.chip.devices

    @property
    def memory(self) -> int:
        """Bytes that a program may use of one device."""
        return self.chip.memory

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s between one device and its memory; 0 if not known."""
        return self.chip.hbm / self.chip.devices

    @property
    def spec(self) -> str:
        """The one canonical name: `v5p:4x4x4` for `v5p-128`."""
        if self.kind == "gpu":
            return f"{self.chip.name}:{self.num_slices}x{_times(self.topology)}"
        slices = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return f"{slices}{self.chip.name}:{_times(self.topology)}"

    def peak_flops(self, dtype: Any = "bfloat16") -> float:
        """Dense peak FLOP/s of one device for matmuls of `dtype`; 0 if not known.

        float32 is at JAX's default precision: one bfloat16 pass on TPU, TF32 on GPU.

        Example:
            >>> parse("v5p-128").peak_flops("bfloat16") / 1e12
            459.0
        """
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        key = _DTYPES.get("float8" if name.startswith("float8") else name)
        return getattr(self.chip, key) / self.chip.devices if key else 0.0

    def describe(self) -> str:
        """One line: name, chips, topology, memory.

        Example:
            >>> print(parse("v5p-128").describe())
            v5p-128: 64 TPU v5p chips (the name counts TensorCores, 2 a chip), topology 4x4x4, 16 hosts,
                95.7 GiB a device
        """
        if self.kind == "cpu":
            simulated = "simulated " if self.num_devices > 1 else ""
            shared = f"{self.memory * self.num_devices / _GIB:.1f} GiB of this host's memory"
            return f"{self.name}: {counted(self.num_devices, f'{simulated}CPU device')}, {shared}"
        noun = f"TPU {self.chip.name} chip" if self.kind == "tpu" else f"{self.chip.name.upper()} GPU"
        chips = counted(self.num_chips, noun)
        notes = []
        if self.chip.counts_cores and re.fullmatch(r"(\d+x)?[a-z0-9]+-\d+", self.name):
            notes.append(f"the name counts TensorCores, {self.chip.cores} a chip")
        if self.chip.devices > 1:
            notes.append(f"{self.num_devices} devices, {self.chip.devices} a chip")
        if notes:
            chips += f" ({'; '.join(notes)})"
        shape = f"{self.num_hosts}x{_times(self.topology)}" if self.kind == "gpu" else _times(self.topology)
        if self.kind == "tpu" and self.num_slices > 1:
            shape = f"{self.num_slices} slices of {shape}"
        memory = f"{self.memory / _GIB:.1f} GiB a device" if self.memory else "memory not known"
        return f"{self.name}: {chips}, topology {shape}, {counted(self.num_hosts, 'host')}, {memory}"


def parse(name: str) -> Hardware:
    """The hardware that `name` names; see the table at the head of this file.

    Raises:
        MeshError: The chip is not known, or a count or topology is not one of the chip's; names the nearest that is.

    Example:
        >>> parse("v5p-128").num_chips, parse("2xv5e:16x16").num_devices, parse("h100:2x8").num_hosts
        (64, 512, 2)
    """
    text = name.strip().lower()
    match = re.fullmatch(
        r"(?:(?P<slices>\d+)x)?(?P<chip>[a-z0-9]*[a-z][a-z0-9]*?)(?P<mark>[-:])(?P<size>\d+(?:x\d+)*)", text
    )
    if match is None:
        hint = nearest(text, [f"{chip}:" for chip in _names()])
        raise MeshError(
            f"{name!r} does not name hardware.{hint} Write a cloud name (v5p-128), a topology "
            f"(v5p:4x4x4, 2xv5e:16x16), GPUs (h100:2x8), cpu:8, or the path of a .toml file. {_known()}"
        )
    chip_name = _names().get(match["chip"])
    if chip_name is None:
        raise MeshError(f"{name!r}: no chip is called {match['chip']!r}.{nearest(match['chip'], _names())} {_known()}")
    facts = _data()[chip_name]
    slices = int(match["slices"] or 1)
    size = _split(match["size"])
    if facts["kind"] == "tpu":
        topology = _cloud(name, chip_name, size) if match["mark"] == "-" else _topology(name, chip_name, size)
        return Hardware(
            name=name,
            chip=_chip(chip_name),
            topology=topology,
            num_slices=slices,
            num_hosts=slices * _tpu_hosts(facts, math.prod(topology)),
        )
    if match["mark"] == "-" or match["slices"]:
        raise MeshError(f"{name!r}: write {_other_form(facts['kind'], chip_name, slices, size)}.")
    if facts["kind"] == "cpu":
        if len(size) > 1:
            raise MeshError(f"{name!r}: CPU devices have no topology. Write cpu:{math.prod(size)}.")
        return Hardware(name=name, chip=_cpu_chip(math.prod(size)), topology=size)
    hosts, gpus = (1, *size) if len(size) == 1 else size if len(size) == 2 else (0, 0)
    if not 1 <= gpus <= facts["single_host"] or hosts < 1:
        total = max(math.prod(size), 1)
        most = facts["single_host"]
        raise MeshError(
            f"{name!r}: GPUs are written hosts x GPUs, with 1 to {most} GPUs a host. Nearest: "
            f"{chip_name}:{math.ceil(total / most)}x{min(total, most)}."
        )
    return Hardware(name=name, chip=_chip(chip_name), topology=(gpus,), num_slices=hosts, num_hosts=hosts)


def of_devices(devices: Sequence[Device]) -> Hardware:
    """The hardware that `devices` are: read from their kind, coordinates, slices and processes.

    Devices of a kind that `_hardware.toml` does not know have their memory and no other figure.
    """
    first = devices[0]
    chip = _chip_of_kind(first.device_kind, first.platform)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    num_processes = len({device.process_index for device in devices})
    if chip.kind == "cpu":  # processes may share a host or not: count the memory of one
        return parse(f"cpu:{len(devices)}")
    limit = (first.memory_stats() or {}).get("bytes_limit") if first in jax.local_devices() else None
    chip = dataclasses.replace(chip, memory=limit) if limit else chip
    members = next(iter(slices.values()))
    topology = _sides(members) if chip.kind == "tpu" else (len(members),)
    hardware = Hardware(
        name="attached",
        chip=chip,
        topology=topology,
        num_slices=len(slices),
        num_hosts=num_processes if chip.kind == "tpu" else len(slices),
    )
    return dataclasses.replace(hardware, name=hardware.spec)


def of_kind(device_kind: str, platform: str, num_devices: int) -> Hardware:
    """`num_devices` devices of a kind, where nothing else is known: one slice, topology flat."""
    chip = _chip_of_kind(device_kind, platform)
    num_chips = max(1, num_devices // chip.devices)
    return Hardware(name=f"{chip.name}:{num_chips}", chip=chip, topology=(num_chips,))


def slice_of(device: Any) -> int:
    """Which group of fast links `device` belongs to; CPU devices, and a lone TPU slice, do not say."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0


def chip_name(name: str) -> str:
    """The one name of the chip that `name` names, alone or as part of hardware.

    Raises:
        MeshError: It names neither.

    Example:
        >>> chip_name("tpu7x"), chip_name("v5p-128")
        ('7x', 'v5p')
    """
    return _names().get(name.strip().lower()) or parse(name).chip.name


def compiler_facts(chip: str) -> dict[str, Any]:
    """What XLA's description of a GPU needs beside the figures of `Chip`; empty where it is not known."""
    return _data().get(chip, {}).get("xla", {})


def counted(number: int, noun: str) -> str:
    """`"1 host"`, `"2 hosts"`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


@ft.cache
def _data() -> dict[str, dict[str, Any]]:
    return tomllib.loads(pathlib.Path(__file__).with_name("_hardware.toml").read_text(encoding="utf-8"))


@ft.cache
def _names() -> dict[str, str]:
    """Every spelling of a chip to its one name."""
    return {spelling: chip for chip, facts in _data().items() for spelling in [chip, *facts.get("names", [])]}


def _known() -> str:
    return f"Known chips: {', '.join(_data())}."


@ft.cache
def _chip(name: str) -> Chip:
    facts = _data()[name]
    return Chip(
        name=name,
        kind=facts["kind"],
        device_kind=facts["device_kinds"][0],
        cores=facts["cores"],
        devices=facts["devices"],
        counts_cores=facts.get("counts_cores", False),
        memory=round(facts.get("memory_gib", 0) * _GIB),
        on_chip=facts.get("on_chip_mib", 0) * 2**20,
        hbm=facts.get("hbm_gb_s", 0) * 1e9,
        links=facts.get("links", 0),
        link=facts.get("link_gb_s", 0) * 1e9,
        dcn=facts.get("dcn_gb_s", 0) * 1e9,
        pcie=facts.get("pcie_gb_s", 0) * 1e9,
        clock=facts.get("clock_ghz", 0) * 1e9,
        **{dtype: tflops * 1e12 for dtype, tflops in facts.get("tflops", {}).items()},
    )


def _cpu_chip(num_devices: int) -> Chip:
    return dataclasses.replace(_chip("cpu"), memory=_host_memory() // max(num_devices, 1))


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return _CPU_MEMORY


def _chip_of_kind(device_kind: str, platform: str) -> Chip:
    if platform == "cpu":
        return _chip("cpu")
    for name, facts in _data().items():
        exact = device_kind in facts["device_kinds"]
        if exact or (facts["kind"] == "gpu" and device_kind.startswith(tuple(facts["device_kinds"]))):
            return _chip(name)
    name = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")
    return Chip(name=name, kind="tpu" if platform == "tpu" else "gpu", device_kind=device_kind)


def _cloud(name: str, chip: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """The topology behind a cloud name."""
    facts = _data()[chip]
    if len(size) > 1:
        raise MeshError(f"{name!r}: a topology follows a colon. Write {chip}:{_times(size)}.")
    unit = facts["cores"] if facts["counts_cores"] else 1
    shapes = {math.prod(sides) * unit: sides for sides in map(_split, facts["topologies"])}
    number = math.prod(size)
    if number in shapes:
        return shapes[number]
    closest = min(shapes, key=lambda count: abs(math.log(count / max(number, 1))))
    what = f"TensorCores, {unit} a chip" if facts["counts_cores"] else "chips"
    raise MeshError(
        f"{name!r}: no {chip} slice has this name; the number counts {what}, and may be "
        f"{', '.join(map(str, shapes))}. Nearest: {chip}-{closest} ({_times(shapes[closest])}). Other shapes are "
        f"written as a topology, such as {chip}:{_times(shapes[closest])}."
    )


def _topology(name: str, chip: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """A topology, checked against the chip's largest slice. Whether the cloud offers it is for the cloud to say."""
    pod = _data()[chip]["pod"]
    fits = (
        len(size) == len(pod) and min(size) >= 1 and all(a <= b for a, b in zip(sorted(size), sorted(pod), strict=True))
    )
    if fits:
        return size
    shapes = [_split(text) for text in _data()[chip]["topologies"]]
    total = max(math.prod(size), 1)
    closest = min(shapes, key=lambda sides: abs(math.log(math.prod(sides) / total)))
    raise MeshError(
        f"{name!r}: a {chip} slice has {len(pod)} sides of at least 1, {_times(pod)} chips at most. Nearest: "
        f"{chip}:{_times(closest)}. More chips are several slices, such as 2x{chip}:{_times(closest)}."
    )


def _tpu_hosts(facts: dict[str, Any], num_chips: int) -> int:
    return 1 if num_chips <= facts["single_host"] else math.ceil(num_chips / facts["chips_per_host"])


def _other_form(kind: str, chip: str, slices: int, size: tuple[int, ...]) -> str:
    total = slices * math.prod(size)
    if kind == "cpu":
        return f"cpu:{total}"
    return f"hosts x GPUs after a colon, such as {chip}:{max(1, total // 8)}x{min(total, 8)}"


def _sides(devices: Sequence[Any]) -> tuple[int, ...]:
    """Chips along each side of the box that holds `devices`; flat if they do not fill it."""
    chips = {tuple(device.coords) for device in devices}
    axes = zip(*chips, strict=True)
    sides = tuple(max(axis) - min(axis) + 1 for axis in axes)
    if math.prod(sides) != len(chips):
        return (len(chips),)
    dims = len(_data().get(_chip_of_kind(devices[0].device_kind, "tpu").name, {}).get("pod", sides))
    return sides[:dims] if math.prod(sides[dims:]) == 1 else sides


def _split(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split("x"))


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
