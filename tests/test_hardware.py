"""Hardware: every name it may have, what it is, and what a wrong name is told."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxpar import _hardware
from jaxpar._errors import MeshError
from jaxpar._hardware import Hardware, parse

TPUS = ["v4", "v5e", "v5p", "v6e", "7x"]
GPUS = ["a100", "h100", "h200", "b200"]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What `of_devices` reads of a TPU or GPU, none of which is here."""

    platform: str
    device_kind: str
    process_index: int = 0
    slice_index: int | None = None
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def tpu_slice(kind, sides, *, slice_index=None, cores=1, chips_per_host=4):
    boxes = itertools.product(*(range(side) for side in sides))
    return [
        StandIn("tpu", kind, (slice_index or 0) * 100 + number // chips_per_host, slice_index, coords, core)
        for number, coords in enumerate(boxes)
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    ("name", "spec", "chips", "devices", "hosts", "slices"),
    [
        ("v5p-128", "v5p:4x4x4", 64, 64, 16, 1),  # the name counts TensorCores
        ("v4-8", "v4:2x2x1", 4, 4, 1, 1),
        ("v5e-256", "v5e:16x16", 256, 256, 64, 1),  # the name counts chips
        ("v5litepod-8", "v5e:2x4", 8, 8, 1, 1),
        ("v6e-16", "v6e:4x4", 16, 16, 4, 1),
        ("tpu7x-128", "7x:4x4x4", 64, 128, 16, 1),  # TensorCores, and each is a device
        ("v5p:8x16x16", "v5p:8x16x16", 2048, 2048, 512, 1),
        ("2xv5e:16x16", "2xv5e:16x16", 512, 512, 128, 2),
        ("2xv5p-128", "2xv5p:4x4x4", 128, 128, 32, 2),
        ("h100:2x8", "h100:2x8", 16, 16, 2, 2),
        ("h100:8", "h100:1x8", 8, 8, 1, 1),
        ("H100:2x8", "h100:2x8", 16, 16, 2, 2),
        ("cpu:8", "cpu:8", 8, 8, 1, 1),
    ],
)
def test_names(name, spec, chips, devices, hosts, slices):
    hardware = parse(name)

    assert hardware.spec == spec
    assert parse(spec).spec == spec
    assert (hardware.num_chips, hardware.num_devices) == (chips, devices)
    assert (hardware.num_hosts, hardware.num_slices) == (hosts, slices)
    assert hardware.num_devices == hardware.num_chips * hardware.devices_per_chip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v5p-100",
            (
                "'v5p-100': no v5p slice has this name; the number counts TensorCores, 2 a chip, and may be 8, 16, "
                "32, 64, "
                "128, 256, 512, 1024, 2048, 4096, 8192, 12288. Nearest: v5p-128 (4x4x4). Other shapes are written as a "
                "topology, such as v5p:4x4x4."
            ),
        ),
        (
            "v5e:32x32",
            (
                "'v5e:32x32': a v5e slice has 2 sides of at least 1, 16x16 chips at most. Nearest: v5e:16x16. More "
                "chips are "
                "several slices, such as 2xv5e:16x16."
            ),
        ),
        (
            "v5p:4x4",
            (
                "'v5p:4x4': a v5p slice has 3 sides of at least 1, 16x20x28 chips at most. Nearest: v5p:2x2x4. More "
                "chips "
                "are several slices, such as 2xv5p:2x2x4."
            ),
        ),
        ("h100-16", "'h100-16': write hosts x GPUs after a colon, such as h100:2x8."),
        (
            "h100:16",
            "'h100:16': GPUs are written hosts x GPUs, with 1 to 8 GPUs a host. Nearest: h100:2x8.",
        ),
        ("cpu:2x4", "'cpu:2x4': CPU devices have no topology. Write cpu:8."),
        ("v5p-4x4x4", "'v5p-4x4x4': a topology follows a colon. Write v5p:4x4x4."),
        (
            "h1000:8",
            (
                "'h1000:8': no chip is called 'h1000'. Did you mean 'h100'? Known chips: v4, v5e, v5p, v6e, 7x, "
                "a100, h100, "
                "h200, b200, cpu."
            ),
        ),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(MeshError) as caught:
        parse(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name", ["", "cpu", "laptop", "v5p-", "cpu:0", "0xv5e:4x4", "v5p:0x4x4", "h100:0x8", "h100:2x2x8"]
)
def test_nonsense_is_told_the_forms(name):
    with pytest.raises(MeshError, match=r"Write|Nearest"):
        parse(name)


@pytest.mark.parametrize("chip", [*TPUS, *GPUS])
def test_every_chip_has_its_figures(chip):
    """Per device, in bytes and FLOP/s, and of a size that catches a slipped unit."""
    name = f"{chip}:2x8" if chip in GPUS else f"{chip}:2x2" if chip in {"v5e", "v6e"} else f"{chip}:2x2x1"
    hardware = parse(name)

    assert 2**33 < hardware.memory < 2**38
    assert 1e14 < hardware.peak_flops("bfloat16") < 1e16
    assert 5e11 < hardware.hbm_bandwidth < 1e13
    assert 5e9 < hardware.chip.link < 2e11
    assert 1e9 < hardware.chip.dcn < 1e11
    assert hardware.chip.links >= 4
    assert hardware.peak_flops("float32") <= hardware.peak_flops("bfloat16")


def test_a_chip_of_two_devices_is_halved():
    """The data are of a chip, the figures of a device; memory is stated a device."""
    hardware = parse("7x:2x2x1")

    assert hardware.peak_flops(jnp.bfloat16) == 2307e12 / 2
    assert hardware.hbm_bandwidth == 7380e9 / 2
    assert hardware.memory == round(94.75 * 2**30)


def test_peak_of_a_dtype():
    hardware = parse("h100:8")

    assert hardware.peak_flops(jnp.bfloat16) == hardware.peak_flops("float16") == 989.4e12
    assert hardware.peak_flops(jnp.float8_e4m3fn) == 1978.9e12
    assert hardware.peak_flops("float64") == 0.0  # not known, rather than guessed
    assert parse("cpu:8").peak_flops() == 0.0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "v5p-128",
            (
                "v5p-128: 64 TPU v5p chips (the name counts TensorCores, 2 a chip), topology 4x4x4, 16 hosts, 95.7 "
                "GiB a "
                "device"
            ),
        ),
        ("v5p:4x4x4", "v5p:4x4x4: 64 TPU v5p chips, topology 4x4x4, 16 hosts, 95.7 GiB a device"),
        (
            "tpu7x-128",
            (
                "tpu7x-128: 64 TPU 7x chips (the name counts TensorCores, 2 a chip; 128 devices, 2 a chip), topology "
                "4x4x4, "
                "16 hosts, 94.8 GiB a device"
            ),
        ),
        ("2xv5e:16x16", "2xv5e:16x16: 512 TPU v5e chips, topology 2 slices of 16x16, 128 hosts, 15.8 GiB a device"),
        ("h100:2x8", "h100:2x8: 16 H100 GPUs, topology 2x8, 2 hosts, 79.1 GiB a device"),
    ],
)
def test_describe(name, text):
    assert parse(name).describe() == text


def test_describe_cpu():
    assert parse("cpu:8").describe().startswith("cpu:8: 8 simulated CPU devices, ")
    assert parse("cpu:1").describe().startswith("cpu:1: 1 CPU device, ")


def test_hardware_is_a_value():
    assert parse("v5p-128") == parse("v5p-128")
    assert hash(parse("v5p-128")) == hash(parse("v5p-128"))
    assert parse("v5p:4x4x4") != parse("v5p:2x4x8")
    with pytest.raises(MeshError, match="must each be at least 1"):
        Hardware(name="none", chip=parse("v5p-8").chip, topology=())


@pytest.mark.parametrize(
    ("devices", "spec", "hosts"),
    [
        (tpu_slice("TPU v5", (4, 4, 4)), "v5p:4x4x4", 16),
        (tpu_slice("TPU v5 lite", (2, 4, 1)), "v5e:2x4", 2),
        (tpu_slice("TPU v6e", (4, 4, 1)), "v6e:4x4", 4),
        (tpu_slice("TPU7x", (2, 2, 1), cores=2), "7x:2x2x1", 1),
        (
            [device for index in (0, 1) for device in tpu_slice("TPU v5 lite", (4, 4, 1), slice_index=index)],
            "2xv5e:4x4",
            8,
        ),
        ([StandIn("gpu", "NVIDIA H100 80GB HBM3", host, host) for host in (0, 1) for _ in range(8)], "h100:2x8", 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_of_devices(devices, spec, hosts):
    found = _hardware.of_devices(devices)

    assert found.spec == found.name == spec
    assert (found.num_devices, found.num_hosts) == (len(devices), hosts)
    assert found.chip == parse(spec).chip


def test_of_part_of_a_slice():
    """Devices that do not fill a box have no topology to speak of."""
    assert _hardware.of_devices(tpu_slice("TPU v5", (2, 2, 2))[:7]).topology == (7,)


def test_of_attached_devices():
    found = _hardware.of_devices(jax.devices())

    assert (found.name, found.kind, found.platform, found.num_hosts) == ("cpu:8", "cpu", "cpu", 1)
    assert found.memory > 0


def test_a_chip_that_is_not_in_the_data():
    """It can be used; its figures read as not known."""
    found = _hardware.of_devices([StandIn("gpu", "NVIDIA L4", 0, 0)] * 4)

    assert (found.spec, found.num_devices, found.peak_flops(), found.memory) == ("nvidia_l4:1x4", 4, 0.0, 0)
    assert found.describe() == "nvidia_l4:1x4: 4 NVIDIA_L4 GPUs, topology 1x4, 1 host, memory not known"
