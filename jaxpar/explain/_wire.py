"""How long a collective takes: where its devices lie, which links join them, and what each link must carry.

A TPU slice is a box of chips with a link to each neighbour; a side is a ring where the ends are joined too (all of 16
on v5e and v6e, sides that are multiples of 4 on v4, v5p and 7x), else a line. Which device of the mesh lies where is
not in HLO text: it is taken to be where JAX's `mesh_utils` puts it, axes that talk most (the last ones) on whole sides
first. GPUs of a host all reach each other; hosts and slices are joined by the data-centre network.

For V bytes gathered over n devices, W bytes/s a link and direction (the book: jax-ml.github.io/scaling-book/sharding):

| all-gather, reduce-scatter | over a ring  | V (n-1)/n / 2W: half goes each way round                        |
|                            | over a line  | V (n-1)/n / W: the ends have one link                           |
|                            | over k sides | the sides work at once, each on its part: their rates add       |
| all-reduce                 |              | a reduce-scatter and an all-gather: twice that                  |
| all-to-all                 | over a ring  | V n / 8W, V what one device sends; over a line twice that       |
| permute                    | by d places  | V d / W: every message on the way crosses the same links        |
| any                        |              | and a delay for each hop on the longest way                     |
"""

import dataclasses
import functools as ft
import itertools
import math
from typing import Any

import numpy as np

from .._hardware import Hardware
from .._hlo import MeshAxes
from ._coefficients import Coefficients

_WAYS = ("up", "down")
"""The two directions of a side: each has links of its own."""

_CORES = 6.0
"""Rate between the two devices of a 7x chip, in links: docs.cloud.google.com/tpu/docs/tpu7x, "six times"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One run of a collective.

    Attributes:
        seconds: Alone on its links.
        wire_bytes: What one device sends.
        algorithm: In words.
        lanes: The sides and directions of the slice, or networks, whose links it fills; of two transfers that share
            one, one waits.
    """

    seconds: float
    wire_bytes: int
    algorithm: str
    lanes: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One direction in which devices of a slice are joined."""

    size: int
    ring: bool
    links: float  # between neighbours; several for the two devices of a chip


@dataclasses.dataclass(frozen=True, eq=False)
class Fabric:
    """The devices of a mesh and the links between them.

    Attributes:
        hardware: What they are.
        sides: Of one slice.
        places: For each position of the mesh `(slice, place on each side)`.
        found: How far groups reach, once looked up.
    """

    hardware: Hardware
    sides: tuple[Side, ...]
    places: np.ndarray
    found: dict[object, Any] = dataclasses.field(default_factory=dict)

    def transfer(self, kind: str, num_bytes: float, groups: np.ndarray, known: Coefficients) -> Transfer:
        """A collective of `kind` (one of `_hlo.KINDS`) among `groups` of mesh positions, rows of a permute as pairs.

        `num_bytes` is the payload as `Collective.bytes` counts it.
        """
        if kind == "collective-permute":
            return self._permute(num_bytes, groups, known)
        around = self._spread(groups)
        members = groups.shape[1]
        wire = num_bytes * (members - 1) / members * (2 if kind == "all-reduce" else 1)
        local = [(side, each) for side, each in zip(self.sides, around.sides, strict=True) if each.count > 1]
        seconds, words, lanes = 0.0, [], set()
        if local:
            seconds, said = self._within(kind, num_bytes, local, around.slices, known)
            words.append(said)
            lanes |= {f"side {at} {way}" for at, each in enumerate(around.sides) if each.count > 1 for way in _WAYS}
        if around.slices > 1:
            inside = members // around.slices
            seconds += self._between(kind, num_bytes, around.slices, inside, known)
            what = "slices" if self.hardware.kind == "tpu" else "hosts"
            words.append(f"ring between {around.slices} {what}")
            lanes.add("dcn")
        return Transfer(
            seconds=seconds, wire_bytes=round(wire), algorithm=", ".join(words) or "none", lanes=frozenset(lanes)
        )

    def _spread(self, groups: np.ndarray) -> "_Spread":
        """How far the widest of the groups reaches."""
        key = (groups.shape, groups.tobytes())
        if key not in self.found:
            self.found[key] = self._reaches(groups)
        return self.found[key]

    def _reaches(self, groups: np.ndarray) -> "_Spread":
        sample = groups[: min(len(groups), 64)]
        places = self.places[np.minimum(sample, len(self.places) - 1)]  # (groups, members, 1 + sides)
        slices = max(len(np.unique(group[:, 0])) for group in places)
        sides = []
        for at in range(len(self.sides)):
            columns = [np.unique(group[:, 1 + at]) for group in places]
            widest = max(columns, key=len)
            gap = int(np.diff(widest).min()) if len(widest) > 1 else 1
            sides.append(_Reach(count=len(widest), gap=gap))
        return _Spread(slices=slices, sides=tuple(sides))

    def _within(
        self, kind: str, num_bytes: float, local: list[tuple[Side, "_Reach"]], slices: int, known: Coefficients
    ) -> tuple[float, str]:
        """Seconds inside a slice; of what is joined across slices, each slice first does its part."""
        link = self._link(known)
        if self.hardware.kind == "gpu":
            members = local[0][1].count
            rate = self.hardware.chip.links * link
            share = (members - 1) / members
            if kind == "all-to-all":
                return num_bytes * share / rate + known.hop, "all pairs"
            twice = 2 if kind == "all-reduce" else 1
            return twice * (num_bytes * share / rate + known.hop * math.log2(members)), "ring over NVLink"
        rings = [side.ring and each.count * each.gap == side.size for side, each in local]
        rates = [
            link * side.links * (2 if ring else 1) / each.gap for (side, each), ring in zip(local, rings, strict=True)
        ]
        hops = sum(
            (each.count // 2 if ring else each.count - 1) * each.gap
            for (_, each), ring in zip(local, rings, strict=True)
        )
        members = math.prod(each.count for _, each in local)
        if kind in ("all-to-all", "ragged-all-to-all"):
            load = max(
                num_bytes * each.count / (8 if ring else 4) / (link * side.links / each.gap)
                for (side, each), ring in zip(local, rings, strict=True)
            )
            return load + hops * known.hop, f"all pairs over {_links(rings)}"
        twice = 2 if kind == "all-reduce" else 1
        once = num_bytes * (members - 1) / members / sum(rates) + hops * known.hop
        return twice * once, f"{'ring' if all(rings) else 'line' if not any(rings) else 'rings'} over {_links(rings)}"

    def _between(self, kind: str, num_bytes: float, slices: int, inside: int, known: Coefficients) -> float:
        """Seconds between slices: each device carries its own part of what its slice holds."""
        rate = self._dcn(known)
        twice = 2 if kind == "all-reduce" else 1
        part = num_bytes if kind in ("all-to-all", "ragged-all-to-all") else num_bytes / inside
        return twice * (part * (slices - 1) / slices / rate + known.dcn_hop)

    def _permute(self, num_bytes: float, pairs: np.ndarray, known: Coefficients) -> Transfer:
        key = ("pairs", pairs.tobytes())
        if key not in self.found:
            self.found[key] = self._moves(pairs)
        across, moves = self.found[key]
        lanes, seconds, words = set(), 0.0, []
        if across:
            seconds = num_bytes / self._dcn(known) + known.dcn_hop
            lanes.add("dcn")
            words.append("between slices")
        link = self._link(known)
        for at, (side, (steps, ways)) in enumerate(zip(self.sides, moves, strict=True)):
            if steps == 0:
                continue
            lanes |= {f"side {at} {way}" for way in ways}
            if self.hardware.kind == "gpu":
                seconds = max(seconds, num_bytes / (self.hardware.chip.links * link) + known.hop)
                words.append("NVLink")
            else:
                seconds = max(seconds, steps * (num_bytes / (link * side.links) + known.hop))
                words.append(f"{steps} hop{'s' if steps > 1 else ''}")
        return Transfer(
            seconds=seconds, wire_bytes=round(num_bytes), algorithm=", ".join(words) or "none", lanes=frozenset(lanes)
        )

    def _moves(self, pairs: np.ndarray) -> tuple[bool, list[tuple[int, tuple[str, ...]]]]:
        """Whether any pair lies in two slices, and on each side the most places that one moves, and which way."""
        here, there = self.places[pairs[:, 0]], self.places[pairs[:, 1]]
        moves = []
        for at, side in enumerate(self.sides):
            apart = there[:, 1 + at] - here[:, 1 + at]
            if side.ring:  # the short way round
                apart = (apart + side.size // 2) % side.size - side.size // 2
            ways = tuple(way for way, some in zip(_WAYS, (apart > 0, apart < 0), strict=True) if some.any())
            moves.append((int(np.abs(apart).max(initial=0)), ways))
        return bool((here[:, 0] != there[:, 0]).any()), moves

    def _link(self, known: Coefficients) -> float:
        return max(self.hardware.chip.link * known.link, 1.0)

    def _dcn(self, known: Coefficients) -> float:
        return max(self.hardware.chip.dcn / self.hardware.devices_per_chip * known.dcn, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reach:
    count: int
    gap: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spread:
    slices: int
    sides: tuple[_Reach, ...]


def _links(rings: list[bool]) -> str:
    number = sum(2 if ring else 1 for ring in rings)
    return f"{number} link{'s' if number > 1 else ''}"


def fabric(hardware: Hardware, axes: MeshAxes) -> Fabric:
    """Where each position of the mesh lies in `hardware`."""
    sides = _sides(hardware)
    size = axes.size or 1
    slices = np.asarray(axes.slices) if len(axes.slices) == size else np.arange(size) // _per_slice(hardware, size)
    places = np.zeros((size, 1 + len(sides)), dtype=np.int64)
    places[:, 0] = slices
    first = np.flatnonzero(slices == slices[0])
    coordinates = np.stack(np.unravel_index(first, axes.sizes or (1,)))
    local = [len(np.unique(row)) for row in coordinates]
    inside = _assign(tuple(local), tuple(side.size for side in sides))
    for each in np.unique(slices):
        members = np.flatnonzero(slices == each)
        places[members[: len(inside)], 1:] = inside[: len(members)]
    return Fabric(hardware, sides, places)


def _per_slice(hardware: Hardware, size: int) -> int:
    per = math.prod(hardware.topology) * hardware.devices_per_chip
    return per if size > per else size


def _sides(hardware: Hardware) -> tuple[Side, ...]:
    topology = hardware.topology
    if hardware.kind != "tpu":
        return tuple(Side(size=size, ring=False, links=1.0) for size in topology)
    if len(topology) == 2:
        rings = [size == 16 for size in topology]
    else:
        cubes = all(size % 4 == 0 for size in topology)  # joined by optical switches, which come with whole cubes of 4
        rings = [cubes] * len(topology)
    sides = [Side(size=size, ring=ring, links=1.0) for size, ring in zip(topology, rings, strict=True)]
    if hardware.devices_per_chip > 1:
        sides.append(Side(size=hardware.devices_per_chip, ring=False, links=_CORES))
    return tuple(sides)


@ft.lru_cache(maxsize=64)
def _assign(sizes: tuple[int, ...], sides: tuple[int, ...]) -> np.ndarray:
    """The place on each side of every position of a mesh of `sizes`, row-major.

    As `jax.experimental.mesh_utils` does: from the last axis on, each takes the most whole sides whose product it is.
    An axis that is no such product takes factors of what is left, the last side first.
    """
    left = dict(enumerate(sides))
    stride = dict.fromkeys(range(len(sides)), 1)
    taken: dict[int, list[tuple[int, int, int]]] = {}  # axis -> (side, stride on it, size), innermost last
    for axis in reversed(range(len(sizes))):
        chosen = _whole(sizes[axis], left, stride, sides)
        taken[axis] = []
        if chosen is not None:
            for side in chosen:
                taken[axis].append((side, 1, sides[side]))
                left[side] = 1
            continue
        rest = sizes[axis]
        for side in reversed(range(len(sides))):
            share = math.gcd(rest, left[side])
            if share > 1:
                taken[axis].insert(0, (side, stride[side], share))
                left[side] //= share
                stride[side] *= share
                rest //= share
    total = math.prod(sizes)
    places = np.zeros((total, len(sides)), dtype=np.int64)
    coordinates = np.unravel_index(np.arange(total), sizes) if sizes else ()
    for axis, parts in taken.items():
        shape = [size for _, _, size in parts]
        if not parts or math.prod(shape) != sizes[axis]:
            continue
        for (side, step, _), digit in zip(parts, np.unravel_index(coordinates[axis], shape), strict=True):
            places[:, side] += digit * step
    return places


def _whole(size: int, left: dict[int, int], stride: dict[int, int], sides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The most untouched sides of which `size` is the product."""
    free = [side for side in range(len(sides)) if left[side] == sides[side] > 1 and stride[side] == 1]
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(free, count):
            if math.prod(sides[side] for side in chosen) == size:
                return chosen
    return None if size > 1 else ()
