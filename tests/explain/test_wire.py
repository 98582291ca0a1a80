"""Seconds of collectives by hand: rings, lines, several sides, strides, slices and hosts."""

import math

import numpy as np
import pytest

from jaxpar import _hardware
from jaxpar._hlo import MeshAxes
from jaxpar.explain import _wire
from jaxpar.explain._coefficients import bounds, coefficients

KNOWN = coefficients()
HOP = KNOWN.hop
V = 2**30


def fabric(name, slices=(), **axes):
    hardware = _hardware.parse(name)
    return _wire.fabric(hardware, MeshAxes(names=tuple(axes), sizes=tuple(axes.values()), slices=slices))


def groups(found, *axes, names):
    """The groups over `axes` of a mesh with `names` and their sizes."""
    positions = np.arange(math.prod(names.values())).reshape([*names.values()])
    inside = [list(names).index(axis) for axis in axes]
    outside = [at for at in range(len(names)) if at not in inside]
    return positions.transpose(outside + inside).reshape(-1, math.prod(names[axis] for axis in axes))


def run(kind, name, axes, *over, num_bytes=V):
    found = fabric(name, **axes)
    return found.transfer(kind, num_bytes, groups(found, *over, names=axes), KNOWN)


def test_a_whole_slice_gathers_over_rings_on_both_sides():
    """v5e 16x16: two rings of 16, two links each."""
    got = run("all-gather", "v5e:16x16", {"fsdp": 256}, "fsdp")
    link = 50e9 * KNOWN.link

    assert got.seconds == pytest.approx(V * 255 / 256 / (4 * link) + 16 * HOP)
    assert got.wire_bytes == round(V * 255 / 256)
    assert got.algorithm == "ring over 4 links"
    assert got.lanes == {"side 0 up", "side 0 down", "side 1 up", "side 1 down"}


def test_an_axis_on_one_side_has_its_two_links():
    axes = {"fsdp": 16, "tensor": 16}
    fsdp, tensor = (run("all-gather", "v5e:16x16", axes, over) for over in axes)

    assert fsdp.seconds == tensor.seconds == pytest.approx(V * 15 / 16 / (2 * 50e9 * KNOWN.link) + 8 * HOP)
    assert not fsdp.lanes & tensor.lanes  # they do not slow each other


@pytest.mark.parametrize(("side", "links", "hops"), [(8, 1, 7), (16, 2, 8)])
def test_v5e_wraps_only_at_sixteen(side, links, hops):
    got = run("all-gather", f"v5e:{side}x1", {"fsdp": side}, "fsdp")

    assert got.seconds == pytest.approx(V * (side - 1) / side / (links * 50e9 * KNOWN.link) + hops * HOP)
    assert got.algorithm == ("ring over 2 links" if links == 2 else "line over 1 link")


@pytest.mark.parametrize(("topology", "ring"), [("4x4x4", True), ("4x4x8", True), ("2x2x4", False)])
def test_v5p_wraps_in_cubes_of_four(topology, ring):
    sides = [int(side) for side in topology.split("x")]
    axes = {"fsdp": sides[0] * sides[1], "tensor": sides[2]}
    got = run("all-gather", f"v5p:{topology}", axes, "tensor")

    assert ("ring" in got.algorithm) is ring


def test_reductions_cost_once_and_twice():
    once = run("reduce-scatter", "v5e:16x16", {"fsdp": 256}, "fsdp")
    twice = run("all-reduce", "v5e:16x16", {"fsdp": 256}, "fsdp")

    assert once == run("all-gather", "v5e:16x16", {"fsdp": 256}, "fsdp")
    assert twice.seconds == 2 * once.seconds
    assert twice.wire_bytes == 2 * once.wire_bytes


def test_all_to_all_crosses_a_quarter_of_a_ring_on_average():
    got = run("all-to-all", "v5e:16x16", {"data": 16, "expert": 16}, "expert")

    assert got.seconds == pytest.approx(V * 16 / (8 * 50e9 * KNOWN.link) + 8 * HOP)


@pytest.mark.parametrize(("shift", "steps"), [(1, 1), (3, 3), (15, 1)])
def test_a_permute_costs_its_hops(shift, steps):
    """Fifteen places one way round a ring of 16 are one the other way."""
    axes = {"data": 16, "context": 16}
    found = fabric("v5e:16x16", **axes)
    here = np.arange(256)
    there = here // 16 * 16 + (here + shift) % 16
    way = "up" if shift < 8 else "down"
    got = found.transfer("collective-permute", V, np.stack([here, there], axis=1), KNOWN)

    assert got.seconds == pytest.approx(steps * (V / (50e9 * KNOWN.link) + HOP))
    assert got.lanes == {f"side 0 {way}"}  # the last axis is on the first side


def test_small_messages_cost_their_hops():
    got = run("all-reduce", "v5e:16x16", {"fsdp": 256}, "fsdp", num_bytes=4)

    assert got.seconds == pytest.approx(2 * 16 * HOP, rel=1e-3)


def test_axes_take_whole_sides_from_the_last_on():
    """v5p 4x8x8: tensor 8 is one side, fsdp 32 the other two."""
    axes = {"fsdp": 32, "tensor": 8}
    fsdp, tensor = (run("all-gather", "v5p:4x8x8", axes, over) for over in axes)

    assert tensor.algorithm == "ring over 2 links"
    assert fsdp.algorithm == "ring over 4 links"
    assert not fsdp.lanes & tensor.lanes


def test_an_axis_that_is_no_whole_side_shares_one():
    """Of v5e 4x4, tensor 2 is half of a side; the other half belongs to fsdp, which then reaches over two links."""
    axes = {"fsdp": 8, "tensor": 2}
    fsdp, tensor = (run("all-gather", "v5e:4x4", axes, over) for over in axes)

    assert tensor.seconds == pytest.approx(V / 2 / (50e9 * KNOWN.link) + HOP)
    assert fsdp.lanes & tensor.lanes
    assert fsdp.seconds == pytest.approx(V * 7 / 8 / (1.5 * 50e9 * KNOWN.link) + (3 + 2) * HOP)


def test_slices_are_joined_by_the_data_centre_network():
    """Each device reduces its slice's sixteenth with its fellow in the other slice."""
    axes = {"data": 2, "fsdp": 16}
    got = run("all-reduce", "2xv5e:4x4", axes, "data")
    chip = _hardware.parse("v5e:4x4").chip

    assert got.seconds == pytest.approx(2 * (V / 2 / (chip.dcn * KNOWN.dcn) + KNOWN.dcn_hop))
    assert got.algorithm == "ring between 2 slices"
    assert got.lanes == {"dcn"}


def test_a_host_of_gpus_is_all_to_all_and_hosts_share_the_network():
    axes = {"data": 2, "fsdp": 8}
    inside, across = (run("all-gather", "h100:2x8", axes, over) for over in ("fsdp", "data"))

    assert inside.seconds == pytest.approx(V * 7 / 8 / (450e9 * KNOWN.link) + 3 * HOP)
    assert across.algorithm == "ring between 2 hosts"


def test_groups_outside_of_the_mesh_do_no_harm():
    found = fabric("v5e:4x4", fsdp=16)

    assert found.transfer("all-gather", V, np.array([[0, 99]]), KNOWN).seconds > 0


def test_every_coefficient_has_bounds_around_its_value():
    varied = set()
    for ends in bounds():
        for name, value in vars(KNOWN).items():
            fast, slow = (getattr(end, name) for end in ends)
            if fast != slow:
                varied.add(name)
                assert min(fast, slow) < value <= max(fast, slow)
    assert varied == set(vars(KNOWN))
