"""The child process that compiles for hardware that is not here: `python -m jaxpar.explain._compiler STEP DIRECTORY`.

It alone sees libtpu's environment. It leaves `result.json` and, if the compiler made a program, `program.hlo.gz` in the
directory. It dies with its parent, and says nothing on standard output.
"""

import dataclasses
import gzip
import importlib.metadata
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from .. import _hlo, _mesh
from ._compiled import MemoryStats
from ._export import Exported, call, read, without_call
from ._target import refused_bytes, topology


def main(step: str, directory: str) -> None:
    """Compile the exported step and write what came of it."""
    _die_with_parent()
    target = pathlib.Path(directory)
    result, text = compile_step(read(step))
    if text:
        (target / "program.hlo.gz").write_bytes(gzip.compress(text.encode(), 1, mtime=0))
    (target / "result.json").write_text(json.dumps(result))


def compile_step(exported: Exported) -> tuple[dict[str, Any], str]:
    """What the compiler says of `exported`, and its HLO text: empty if it refused or failed."""
    start = time.perf_counter()
    result: dict[str, Any] = {"compiler": compiler(exported.hardware.platform)}
    try:
        mesh = _devices(exported)
        result["slices"] = _slices(mesh)
        function, shapes = call(exported, mesh)
        compiled = function.lower(*shapes).compile(compiler_options=exported.options or None)
        result["memory"] = _memory(compiled.memory_analysis())
        text = without_call(compiled.as_text() or "", exported.name)
    except Exception as error:  # whatever a compiler says is for the parent to tell
        needed = refused_bytes(str(error))
        result |= {"refusal": str(error), "needed": needed} if needed else {"error": f"{type(error).__name__}: {error}"}
        text = ""
    result["seconds"] = time.perf_counter() - start
    return result, text


def compiler(platform: str) -> str:
    """Name and version of what compiles for `platform` here: `"XLA:TPU, jax 0.10.2, libtpu 0.0.42"`."""
    packages = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "cpu": ("jaxlib",)}[platform]
    name = {"tpu": "XLA:TPU", "cuda": "XLA:GPU", "cpu": "XLA:CPU"}[platform]
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([name, f"jax {jax.__version__}", *found])


def _devices(exported: Exported) -> Mesh:
    """The mesh over devices that are described and not there, in the order in which `jp.mesh` would have them."""
    from jax.experimental import topologies

    arguments = topology(exported.hardware)
    described = topologies.get_topology_desc(arguments.pop("topology_name"), arguments.pop("platform"), **arguments)
    order = _ordered_gpus if exported.hardware.kind == "gpu" else _mesh.ordered
    devices = order(described.devices, exported.axes, exported.dcn)
    return Mesh(devices, tuple(exported.axes), axis_types=(AxisType.Auto,) * len(exported.axes))


def _ordered_gpus(devices: Sequence[Any], sizes: Mapping[str, int], dcn: Mapping[str, int]) -> np.ndarray:
    """GPUs as `_mesh.ordered` has them. Of those that are only described, the process alone tells the host."""
    outer = [dcn.get(axis, 1) for axis in sizes]
    inner = [size // factor for size, factor in zip(sizes.values(), outer, strict=True)]
    flat = np.empty(len(devices), dtype=object)
    flat[:] = sorted(devices, key=lambda device: (device.process_index, device.id))
    halves = np.arange(2 * len(outer)).reshape(2, -1)
    return (
        flat[: math.prod(sizes.values())].reshape(*outer, *inner).transpose(halves.T.ravel()).reshape(*sizes.values())
    )


def _slices(mesh: Mesh) -> list[int]:
    """The slice, or host of GPUs, of each position of the mesh; empty if there is one."""
    if mesh.devices.flat[0].platform == "tpu":
        return list(_hlo.mesh_axes(mesh).slices)
    hosts = [device.process_index for device in mesh.devices.flat]
    return hosts if len(set(hosts)) > 1 else []


def _memory(found: Any) -> dict[str, int] | None:
    stats = memory_stats(found)
    return None if stats is None else dataclasses.asdict(stats)


def memory_stats(found: Any) -> MemoryStats | None:
    """XLA's memory analysis, in our words; `None` where a compiler gives none."""
    if found is None:
        return None
    return MemoryStats(
        argument=found.argument_size_in_bytes,
        output=found.output_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        alias=found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=getattr(found, "peak_memory_in_bytes", 0),
        host_argument=found.host_argument_size_in_bytes,
        host_output=found.host_output_size_in_bytes,
        host_temporary=found.host_temp_size_in_bytes,
        host_alias=found.host_alias_size_in_bytes,
    )


def _die_with_parent() -> None:
    """Linux ends this process when its parent goes, even if that was killed."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(*sys.argv[1:])
