"""How hardware that is not here is named to its compiler."""

import types

import pytest

from jaxpar import _hardware
from jaxpar.explain import _compiler
from jaxpar.explain._target import gpu_config, refused_bytes, topology


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:16x16", {"topology_name": "v5e:16x16", "chips_per_host_bounds": [2, 2, 1]}),
        ("v5e:1x1", {"topology_name": "v5e:1x1", "chips_per_host_bounds": [1, 1, 1]}),
        ("2xv5p:4x4x4", {"topology_name": "v5p:4x4x4", "chips_per_host_bounds": [2, 2, 1], "num_slices": 2}),
        ("tpu7x:2x2x1", {"topology_name": "tpu7x:2x2x1", "chips_per_host_bounds": [2, 2, 1]}),
        ("v4-8", {"topology_name": "v4:2x2x1", "chips_per_host_bounds": [2, 2, 1], "chip_config_name": "megacore"}),
    ],
)
def test_tpus_by_topology(name, expected):
    assert topology(_hardware.parse(name)) == {"platform": "tpu", **expected}


@pytest.mark.parametrize("chip", ["a100", "h100", "h200", "b200"])
def test_gpus_by_a_description(chip):
    hardware = _hardware.parse(f"{chip}:2x8")
    found = topology(hardware)
    assert (found["platform"], found["topology"]) == ("cuda", "2x1x8")
    text = gpu_config(hardware)
    assert text == found["target_config"]
    assert f"core_count: {hardware.chip.cores}\n" in text
    assert text.count("{") == text.count("}") == 4
    said = int(text.partition("memory_bandwidth: ")[2].split()[0])
    assert said == pytest.approx(hardware.chip.hbm, rel=1e-3)
    assert int(text.partition("device_memory_size: ")[2].split()[0]) == pytest.approx(hardware.memory, rel=1e-2)


def test_gpus_are_ordered_by_host_where_an_axis_crosses_hosts():
    """Axis by axis, hosts outermost: as `jp.mesh` lays a mesh on attached GPUs."""
    gpus = [types.SimpleNamespace(id=at, process_index=at // 4) for at in range(8)]
    order = _compiler._ordered_gpus(gpus[::-1], {"data": 2, "fsdp": 4}, {"data": 2})
    assert [[gpu.id for gpu in row] for row in order] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    order = _compiler._ordered_gpus(gpus, {"data": 2, "fsdp": 4}, {"fsdp": 2})
    assert [[gpu.id for gpu in row] for row in order] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 63.50G of 30.75G hbm. Exceeded", 63.5),
        ("the total memory required for HLO temporaries (26.50G) exceeds available HBM (15.75G).", 26.5),
        ("Used 512.00M of 15.75G hbm", 0.5),
        ("INVALID_ARGUMENT: No such compile option: 'xla_no'", 0),
        ("Used 20.00M of 16.00M vmem", 0),
    ],
)
def test_what_a_refusal_says(message, gib):
    assert refused_bytes(message) == gib * 2**30
