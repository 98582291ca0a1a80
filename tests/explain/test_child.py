"""Compiling for a TPU in another process: the same program as in this one, kept, interruptible, refused in words."""

import _thread
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hlo, _mesh
from jaxpar.explain import _child, _compiler, _export
from jaxpar.explain._memory import by_kind, memory
from jaxpar.explain._subject import subject
from models import gpt

libtpu = pytest.mark.libtpu


def exported(function, mesh, *shapes, **options):
    """`function` of arrays whose first dim is split over the mesh's first axis."""
    sharding = NamedSharding(mesh, P(mesh.axis_names[0]))
    args = tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes)
    made = subject(function, args, {}, None)
    return _export.export(dataclasses.replace(made, options=options))


AXES = {"data": 2, "fsdp": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the tiny GPT for v5e 2x2 is kept."""
    return tmp_path_factory.mktemp("cache")


def tiny_there(cache):
    """The tiny GPT, as it is compiled in another process for v5e 2x2, or comes from the cache."""
    exported = _export.export(subject(gpt.tiny(), (), {}, jp.mesh("v5e:2x2", **AXES)))
    return _child.compile_elsewhere(exported, cache)


@libtpu
def test_memory_by_cause_is_all_of_what_the_compiler_says(cache):
    """XLA:TPU tells totals alone; causes come of the schedule, and leave less than 1% of the peak, at either side."""
    found = tiny_there(cache)
    held = by_kind(memory(_hlo.read(found.text), found))
    assert sum(held.values()) == found.memory.peak
    assert abs(held.pop("unattributed", 0)) < 0.01 * found.memory.peak
    assert min(held.values()) > 0
    assert {"parameter", "optimizer", "batch"} <= set(held)
    told = {each.kind: 0 for each in found.arguments}
    for each in found.arguments:
        told[each.kind] += each.bytes
    assert held["optimizer"] >= told["optimizer"]  # as told, and padded


@libtpu
def test_the_child_compiles_what_this_process_would(cache):
    """The same memory to the byte, the same collectives from the same lines, through export and file and process."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    mesh = Mesh(_mesh.ordered(devices, AXES, {}), tuple(AXES), axis_types=(AxisType.Auto,) * 2)
    here = subject(gpt.tiny(), (), {}, mesh)
    found = tiny_there(cache)
    direct = here.function.lower(*here.shapes).compile()
    assert found.memory == _compiler.memory_stats(direct.memory_analysis())
    assert found.memory.alias > 0  # donation came through

    def rows(text):
        moved = _hlo.read(text).collectives(_hlo.mesh_axes(mesh))
        lines = ["" if "test_child" in c.source else c.source for c in moved]  # where this test asked for it
        return sorted(
            (c.kind, c.axes, c.shape, c.count, c.depth, c.op_name.rstrip("/"), line)
            for c, line in zip(moved, lines, strict=True)
        )

    assert rows(found.text) == rows(direct.as_text())
    assert any("models/gpt/model.py" in row[-1] for row in rows(found.text))
    assert found.axes == _hlo.mesh_axes(mesh)
    assert found.compiler.startswith(f"XLA:TPU, jax {jax.__version__}, libtpu ")

    assert tiny_there(cache) == dataclasses.replace(found, seconds=0.0)
    assert [entry.name.startswith(".") for entry in cache.iterdir()] == [False]


@libtpu
def test_slices_and_device_order_are_those_of_the_mesh(tmp_path):
    mesh = jp.mesh("2xv5e:2x2", data=2, fsdp=4)
    found = _child.compile_elsewhere(exported(lambda x: x.sum(0), mesh, (64, 64)), tmp_path)
    assert found.axes.slices == (0, 0, 0, 0, 1, 1, 1, 1)
    moved = _hlo.read(found.text).collectives(found.axes)
    assert {each.axes for each in moved} == {("data",)}


@libtpu
def test_a_program_that_does_not_fit_is_refused_in_words_and_that_is_kept(tmp_path):
    mesh = jp.mesh("v5e:2x2", data=4)
    large = exported(lambda x: x + 1, mesh, (4 * 2**13, 2**18))  # 8 GiB in and 8 GiB out on each device
    found = _child.compile_elsewhere(large, tmp_path)
    assert found.text == ""
    assert "RESOURCE_EXHAUSTED" in found.refusal
    assert found.needed >= 16 * 2**30
    assert _child.compile_elsewhere(large, tmp_path).needed == found.needed

    small = exported(lambda x: x + 1, mesh, (4 * 2**12, 2**10))
    assert _child.compile_elsewhere(small, tmp_path).refusal == ""


@libtpu
def test_an_option_that_the_compiler_lacks_is_named_and_nothing_is_kept(tmp_path):
    wrong = exported(jnp.sum, jp.mesh("v5e:2x2", data=4), (8, 8), xla_no_such_option=True)
    with pytest.raises(jp.StepError, match=r"xla_no_such_option[\s\S]*jp\.compiler_options"):
        _child.compile_elsewhere(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


@libtpu
def test_an_interrupt_ends_the_child_within_a_second(tmp_path, monkeypatch):
    """The moment that the child has loaded libtpu, which cannot be interrupted in place."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
    )
    step = _export.export(subject(gpt.tiny(), (), {}, jp.mesh("v5e:4x4", fsdp=16)))
    interrupted = []

    def interrupt():
        while not started or "libtpu" not in pathlib.Path(f"/proc/{started[0].pid}/maps").read_text():
            time.sleep(0.02)
        interrupted.append(time.monotonic())
        _thread.interrupt_main()

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        _child.compile_elsewhere(step, tmp_path)
    assert time.monotonic() - interrupted[0] < 1
    watcher.join()
    assert started[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)
    assert list(tmp_path.iterdir()) == []


@libtpu
def test_explain_leaves_environment_and_jax_as_they_were(child_env, tmp_path):
    code = f"""
        import json, os, sys
        import jax, jax.numpy as jnp
        import jaxpar as jp
        from jax.sharding import NamedSharding, PartitionSpec

        environment, flags = dict(os.environ), dict(jax.config.values)
        mesh = jp.mesh("v5e:2x2", data=4)
        x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
        report = jp.explain(lambda x: x.sum(0), x, cache={str(tmp_path)!r})
        changed = [name for name in flags if jax.config.values[name] != flags[name]]
        same = dict(os.environ) == environment
        jax.config.update("jax_num_cpu_devices", 3)  # JAX refuses this option once it has started
        print(json.dumps([report.origin, changed, same, jax.device_count(), "libtpu" in sys.modules]))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, env=child_env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["compiled", [], True, 3, False]
    assert done.stderr == ""


def test_without_a_compiler_the_remedy_is_said(monkeypatch, tmp_path):
    """Nothing has it for GPUs here; the check for TPUs is the same."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in {"v5e:2x2": "tpu", "h100:8": "cuda13"}.items():
        mesh = jp.mesh(name, data=-1)
        with pytest.raises(jp.StepError, match=rf"pip install 'jaxpar\[{extra}\]'"):
            _child.compile_elsewhere(exported(jnp.sum, mesh, (8, 8)), tmp_path)
        x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        with pytest.raises(jp.StepError, match="jaxpar export MODULE:NAME"):
            jp.explain(jnp.sum, x, on=mesh)


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    """An entry in the making is another process's, unless it is older than any compilation."""
    for name, hours in {".part-killed": 25, ".part-running": 23, "made": 1000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    _child._prune(pathlib.Path(tmp_path), tmp_path / "made")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".part-running", "made"]


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.hlo.gz").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    monkeypatch.setattr(_child, "MOST", 250)
    _child._prune(pathlib.Path(tmp_path), tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["middle", "new"]
