"""How to name hardware that is not here to its compiler: the arguments of JAX's `get_topology_desc`, as plain data.

TPU topologies are known to libtpu by name. The CUDA plugin is told what a GPU is, in the text form of XLA's
`GpuTargetConfigProto`: written here from the facts in `_hardware.toml`.
"""

import importlib.util
import math
import re
from typing import Any

from .. import _hardware
from .._errors import StepError
from .._hardware import Hardware

_LIBTPU_NAMES = {"7x": "tpu7x"}

# What every NVIDIA GPU since Ampere has in common, in XLA's words.
_EVERY_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
}


def topology(hardware: Hardware) -> dict[str, Any]:
    """The arguments of `jax.experimental.topologies.get_topology_desc` for `hardware`.

    Example:
        >>> topology(_hardware.parse("2xv5e:16x16"))
        {'platform': 'tpu', 'topology_name': 'v5e:16x16', 'chips_per_host_bounds': [2, 2, 1], 'num_slices': 2}
    """
    if hardware.kind == "gpu":
        (gpus,) = hardware.topology
        return {
            "platform": "cuda",
            "topology_name": "",
            "topology": f"{hardware.num_slices}x1x{gpus}",  # slices x hosts of one x GPUs of a host
            "target_config": gpu_config(hardware),
        }
    sides = hardware.topology
    # A host has 2x2 chips; libtpu wants to hear it where the slice is narrower.
    bounds = [math.gcd(2, side) for side in sides[:2]] + [1]
    name = f"{_LIBTPU_NAMES.get(hardware.chip.name, hardware.chip.name)}:{'x'.join(map(str, sides))}"
    found: dict[str, Any] = {"platform": "tpu", "topology_name": name, "chips_per_host_bounds": bounds}
    if hardware.num_slices > 1:
        found["num_slices"] = hardware.num_slices
    if hardware.chip.name == "v4":
        found["chip_config_name"] = "megacore"  # the two cores of a chip as one device, as JAX runs it
    return found


def gpu_config(hardware: Hardware) -> str:
    """XLA's target description of one GPU, in protobuf text form.

    Raises:
        StepError: Nothing is known of this GPU.
    """
    facts = _hardware.compiler_facts(hardware.chip.name)
    if not facts:
        raise StepError(
            f"{hardware.name}: XLA's description of this GPU is not known, so nothing can be compiled for it."
        )
    capability = dict(zip(("major", "minor"), facts["capability"], strict=True))
    extension = facts["extension"]
    numbers = {
        **_EVERY_GPU,
        "shared_memory_per_core": facts["shared_memory_core"],
        "shared_memory_per_block_optin": facts["shared_memory_block"],
        "core_count": hardware.chip.cores,
        "fpus_per_core": facts["fpus"],
        "memory_bandwidth": facts["bandwidth"],
        "l2_cache_size": facts["l2_cache"],
        "clock_rate_ghz": facts["clock_ghz"],
        "device_memory_size": facts["memory"],
    }
    lines = [f"  {name}: {value}" for name, value in numbers.items()]
    inner = [f"{name}: {value}" for name, value in capability.items() if value] + [f"feature_extension: {extension}"]
    lines.append(f"  cuda_compute_capability {{ {' '.join(inner)} }}")
    lines.append(f"  device_interconnect_info {{ active_links: {hardware.chip.links} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{facts["description"]}"',
            "",
        ]
    )


def missing(hardware: Hardware) -> str:
    """What must be installed to compile for `hardware` on this machine; `""` if nothing is missing."""
    if hardware.kind == "tpu":
        if importlib.util.find_spec("libtpu"):
            return ""
        return "the TPU compiler is not installed here: pip install 'jaxpar[tpu]' (it exists for Linux on x86)"
    if hardware.kind == "gpu":
        if importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin"):
            return ""
        return "the GPU compiler is not installed here: pip install 'jaxpar[cuda13]' (it exists for Linux)"
    return ""


def refused_bytes(message: str) -> int:
    """Bytes that a device would need, of a compiler's refusal; 0 if it is no such refusal.

    XLA:TPU says it in two ways, `Used 63.80G of 30.75G hbm` and `HLO temporaries (26.51G) exceeds available HBM`; both
    count arguments and results, too (a program of 10 GiB in and 10 GiB out, with 0.25 GiB of weights: 20.25G).

    Example:
        >>> refused_bytes("Ran out of memory in memory space hbm. Used 63.50G of 30.75G hbm.") / 2**30
        63.5
    """
    whole = re.search(rf"Used {_SIZE} of [\d.]+[KMGT]? ?hbm", message)
    found = whole or re.search(rf"HLO temporaries \({_SIZE}\) exceeds available HBM", message)
    return 0 if found is None else size_in_bytes(found[1])


_SIZE = r"([\d.]+[KMGT]?)"


def size_in_bytes(text: str) -> int:
    """Bytes of a size as XLA prints it, `"20.80G"`."""
    unit = text[-1] if text[-1] in "KMGT" else " "
    return round(float(text.rstrip("KMGT")) * 2 ** (10 * " KMGT".index(unit)))
