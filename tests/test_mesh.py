"""Meshes: axes over devices that are here, simulated, or elsewhere; how a script is overridden; what is refused."""

import json
import logging
import pathlib
import pickle
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from jaxpar import _devices, _mesh
from jaxpar._errors import MeshError
from jaxpar._hardware import parse
from jaxpar._mesh import axis_sizes, dcn_factors, describe, hardware_of, mesh, override
from tests._peers import peers
from tests.test_hardware import tpu_slice

ROOT = pathlib.Path(__file__).parent.parent
MESH_FILES = sorted((ROOT / "meshes").glob("*.toml"))
CLUSTER_VARIABLES = [
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "MEGASCALE_NUM_SLICES",
    "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES",
]  # fmt: skip
IN_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def outside_any_cluster(monkeypatch):
    for name in [*CLUSTER_VARIABLES, "JAXPAR_MESH"]:
        monkeypatch.delenv(name, raising=False)


def message(*args, **kwargs):
    with pytest.raises(MeshError) as caught:
        mesh(*args, **kwargs)
    return str(caught.value)


def run_python(code, env):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=env, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


# Attached devices


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"tensor": 2, "data": 2, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"fsdp": -1}, {"fsdp": 8}),
        ({"fsdp": 8, "tensor": -1}, {"fsdp": 8, "tensor": 1}),
        ({"context": 2, "expert": 2, "pipe": 2}, {"pipe": 2, "expert": 2, "context": 2}),
    ],
    ids=str,
)
def test_attached(axes, sizes):
    """JAX's own class, every device once, axes in one order whatever was written, and Auto."""
    made = mesh(**axes)

    assert type(made) is Mesh
    assert axis_sizes(made) == sizes
    assert made.axis_names == tuple(sizes)
    assert made.axis_types == (AxisType.Auto,) * len(sizes)
    assert list(made.devices.flat) == jax.devices()
    assert dcn_factors(made) == {}


def test_given_devices():
    chosen = jax.devices()[4:]
    assert list(mesh(devices=chosen, fsdp=2, tensor=2).devices.flat) == chosen


def test_fewer_devices_must_be_asked_for():
    assert message(fsdp=2, tensor=2) == (
        "fsdp=2 x tensor=2 makes 4 devices, and cpu:8 has 8. Nearest: fsdp=4, tensor=2. To leave devices idle say so: "
        "allow_unused=True."
    )
    assert mesh(fsdp=2, tensor=2, allow_unused=True).size == 4
    assert axis_sizes(mesh(fsdp=-1, tensor=3, allow_unused=True)) == {"fsdp": 2, "tensor": 3}


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (
            {"fsdp": 3, "tensor": 2},
            (
                "fsdp=3 x tensor=2 makes 6 devices, and cpu:8 has 8. Nearest: fsdp=4, tensor=2. To leave devices "
                "idle say "
                "so: allow_unused=True."
            ),
        ),
        (
            {"fsdp": 16, "tensor": 2},
            (
                "fsdp=16 x tensor=2 makes 32 devices, and cpu:8 has 8. Nearest: fsdp=4, tensor=2. Or simulate as many: "
                "jp.simulate(32)."
            ),
        ),
        (
            {"fsdp": -1, "tensor": 3},
            (
                "tensor=3 makes 3, which does not divide the 8 devices of cpu:8. Nearest: fsdp=2, tensor=4. To leave "
                "devices idle say so: allow_unused=True."
            ),
        ),
        (
            {"fspd": 4, "tensr": 2},
            (
                "jp.mesh has no axis 'fspd'. Did you mean 'fsdp'? jp.mesh has no axis 'tensr'. Did you mean "
                "'tensor'? Axes: "
                "data, pipe, fsdp, expert, context, tensor. For other names make a jax.sharding.Mesh: jaxpar takes "
                "it as it "
                "is."
            ),
        ),
        (
            {"fsdp": -1, "data": -1},
            "Only one axis may be -1, and fsdp and data are. Give the size of all but one.",
        ),
        (
            {"fsdp": 0, "tensor": -2},
            (
                "fsdp=0: a size is a whole number of at least 1, or -1 for what the others leave. tensor=-2: a size "
                "is a "
                "whole number of at least 1, or -1 for what the others leave."
            ),
        ),
        (
            {},
            "A mesh needs an axis: jp.mesh(fsdp=-1) shards over every device, jp.mesh(data=-1) replicates.",
        ),
    ],
    ids=str,
)
def test_wrong_axes(axes, text):
    assert message(**axes) == text


def test_nearest_shape_of_a_large_mesh_is_found_at_once():
    assert "Nearest: data=4, fsdp=256, tensor=2." in message("v5p:8x16x16", data=4, fsdp=255, tensor=2)


# Hardware that is not here


def test_target():
    made = mesh("v5p-128", fsdp=-1, tensor=2)

    assert isinstance(made, AbstractMesh)
    assert axis_sizes(made) == {"fsdp": 32, "tensor": 2}
    assert made.axis_types == (AxisType.Auto, AxisType.Auto)
    assert hardware_of(made) == parse("v5p-128")
    assert made is mesh("v5p-128", fsdp=32, tensor=2)
    assert made is not mesh("v5p:2x4x8", fsdp=32, tensor=2)  # the same axes on another topology
    assert pickle.loads(pickle.dumps(made)) is made


def test_target_says_what_it_is():
    assert describe(mesh("v5p-128", fsdp=32, tensor=2)) == (
        "v5p-128: 64 TPU v5p chips (the name counts TensorCores, 2 a chip), topology 4x4x4, 16 hosts, 95.7 GiB a "
        "device; not attached: plan and compile only\n"
        "axes: fsdp=32 x tensor=2"
    )
    assert describe(mesh("h100:2x8", fsdp=16)).endswith("axes: fsdp=16; fsdp crosses hosts 2 ways")
    assert "; 32 of its 64 devices used; " in describe(mesh("v5p-128", fsdp=32, allow_unused=True))


@pytest.mark.parametrize("name", ["v5p-8", "h100:1x4"])
def test_target_is_traced_lowered_and_exported(name):
    """Everything that JAX does before it compiles, for a platform that is not here."""
    made = mesh(name, fsdp=2, tensor=2)
    sharding = NamedSharding(made, P("fsdp", "tensor"))

    def loss(w, x):
        h = jax.lax.with_sharding_constraint(x @ w, NamedSharding(made, P("fsdp", "tensor")))
        total = jax.shard_map(
            lambda v: jax.lax.psum(v.sum(), ("fsdp", "tensor")), mesh=made, in_specs=sharding.spec, out_specs=P()
        )
        return total(h**2)

    w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    step = jax.jit(jax.grad(loss), out_shardings=sharding)
    platform = hardware_of(made).platform

    text = step.trace(w, w).lower(lowering_platforms=(platform,)).as_text()
    assert "num_partitions = 4" in text
    assert "sdy.sharding_constraint" in text
    assert "sdy.manual_computation" in text
    exported = jax.export.export(step, platforms=[platform])(w, w)
    assert exported.nr_devices == 4


def test_target_leaves_jax_unstarted(child_env):
    """Planning first and choosing the number of CPU devices afterwards is fine."""
    (devices,), _ = run_python(
        """
        import json
        from jaxpar import _mesh
        _mesh.mesh("v5p-128", fsdp=64)
        print(json.dumps([len(_mesh.simulate(3))]))
        """,
        {key: value for key, value in child_env.items() if key != "JAX_NUM_CPU_DEVICES"},
    )
    assert devices == 3


def test_attached_hardware_is_used(monkeypatch):
    """A name of what is attached gives the devices; another topology, size or chip does not."""
    here = tpu_slice("TPU v5", (4, 4, 4))
    monkeypatch.setattr(jax, "devices", lambda: here)
    monkeypatch.setattr(_devices, "only_cpu", lambda: False)

    assert _devices.attached(parse("v5p-128"), allow_unused=False) is here
    assert _devices.attached(parse("v5p:4x4x4"), allow_unused=False) is here
    for elsewhere in ("v5p:2x4x8", "v5p-256", "v4-128", "h100:8x8"):
        assert _devices.attached(parse(elsewhere), allow_unused=False) is None


def test_cpu_hardware_is_here():
    assert mesh("cpu:8", fsdp=4, tensor=2) is mesh(fsdp=4, tensor=2)
    assert mesh("cpu:2", fsdp=2, allow_unused=True).size == 2
    assert message("cpu:4", fsdp=4) == (
        "cpu:4: JAX is already running on 8 CPU devices. Call jp.simulate(4) first. To leave the others idle say so: "
        "allow_unused=True."
    )
    assert message("cpu:16", fsdp=16) == (
        "cpu:16: JAX is already running on 8 CPU devices. Call jp.simulate(16) first."
    )


def test_hardware_value():
    """A `Hardware` serves where its name does, and another name for it too."""
    assert hardware_of(mesh(parse("v5p-128"), fsdp=64)) == parse("v5p-128")


# A user's own mesh


def test_own_mesh():
    own = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)

    assert axis_sizes(own) == {"batch": 4, "model": 2}
    assert hardware_of(own).name == "cpu:8"
    assert describe(own).endswith("axes: batch=4 x model=2")


def test_own_abstract_mesh():
    bare = AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    with pytest.raises(MeshError) as caught:
        hardware_of(bare)
    assert str(caught.value) == (
        "This abstract mesh, fsdp=4 x tensor=2, does not say what hardware it is for. Name it: "
        'jp.mesh("v5p-128", fsdp=4, tensor=2).'
    )
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    known = AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, abstract_device=device)
    assert (hardware_of(known).chip, hardware_of(known).num_devices) == (parse("v5e-8").chip, 8)
    assert dcn_factors(known) == {}


# Slices and hosts


@pytest.mark.parametrize(
    ("name", "axes", "dcn", "factors"),
    [
        ("2xv5e:16x16", {"data": 2, "fsdp": 256}, None, {"data": 2}),
        ("2xv5e:16x16", {"fsdp": 512}, None, {"fsdp": 2}),
        ("4xv5e:16x16", {"data": 2, "fsdp": 512}, None, {"data": 2, "fsdp": 2}),
        ("6xv5e:4x4", {"data": 4, "fsdp": 24}, None, {"data": 2, "fsdp": 3}),
        ("2xv5e:16x16", {"data": 2, "fsdp": 256}, {"fsdp": 2}, {"fsdp": 2}),
        ("2xv5e:16x16", {"data": 2, "fsdp": 256}, {"data": 2, "fsdp": 1}, {"data": 2}),
        ("h100:2x8", {"data": 2, "tensor": 8}, None, {"data": 2}),
        ("v5e:16x16", {"fsdp": 256}, None, {}),
    ],
)
def test_dcn(name, axes, dcn, factors):
    assert dcn_factors(mesh(name, dcn=dcn, **axes)) == factors


@pytest.mark.parametrize(
    ("dcn", "text"),
    [
        ({"dta": 2}, "dcn has the axis 'dta', and the mesh has not. Did you mean 'data'? Nearest: dcn={'data': 2}."),
        ({"data": 3}, "dcn data=3 does not divide data=4. Nearest: dcn={'data': 2}."),
        ({"data": 4}, "dcn data=4 makes 4 slices, and 2xv5e:16x16 has 2. Nearest: dcn={'data': 2}."),
    ],
    ids=str,
)
def test_wrong_dcn(dcn, text):
    assert message("2xv5e:16x16", data=4, fsdp=128, dcn=dcn) == text


def test_dcn_within_one_slice():
    assert message("v5e:16x16", data=4, fsdp=64, dcn={"data": 2}) == (
        "dcn data=2 makes 2 slices, and v5e:16x16 has 1. Within one slice, leave dcn out."
    )


def test_dcn_does_not_stop_a_script_on_a_laptop(caplog):
    with caplog.at_level(logging.INFO, "jaxpar"):
        made = mesh(data=2, fsdp=4, dcn={"data": 2})
    assert dcn_factors(made) == {}
    assert caplog.messages == ["dcn={'data': 2}: CPU devices have no slices, so it has no effect here."]


def test_part_of_several_slices():
    assert message("2xv5e:16x16", fsdp=300, allow_unused=True) == (
        "2xv5e:16x16: 300 devices are not whole slices of 256. Nearest: 256 devices."
    )
    assert dcn_factors(mesh("2xv5e:16x16", fsdp=128, allow_unused=True)) == {}
    assert dcn_factors(mesh("3xv5e:16x16", fsdp=512, allow_unused=True)) == {"fsdp": 2}


def test_order_across_slices():
    """`data` alone crosses slices; within one, `tensor` and `fsdp` lie along the sides of the topology."""
    devices = [device for index in (1, 0) for device in tpu_slice("TPU v5 lite", (4, 4, 1), slice_index=index)]
    sizes = {"data": 2, "fsdp": 4, "tensor": 4}
    order = _mesh.ordered(devices, sizes, {"data": 2})

    assert order.shape == (2, 4, 4)
    assert [{device.slice_index for device in block.flat} for block in order] == [{0}, {1}]
    assert len(set(order.flat)) == 32
    for row in order.reshape(-1, 4):
        assert sum(len({device.coords[side] for device in row}) > 1 for side in range(3)) == 1


def test_order_when_an_axis_shares_a_side(caplog):
    with caplog.at_level(logging.INFO, "jaxpar"):
        order = _mesh.ordered(tpu_slice("TPU v6 lite", (4, 4, 1)), {"fsdp": 8, "tensor": 2}, {})
    assert order.shape == (8, 2)
    assert caplog.messages == ["fsdp=8 x tensor=2: an axis shares a side of the TPU topology with another."]


def test_order_of_devices_that_fill_no_box():
    with pytest.raises(MeshError, match=r"^fsdp=7 cannot be laid on v5p:7: .* Choose sizes that are products"):
        _mesh.ordered(tpu_slice("TPU v5", (2, 2, 2))[:7], {"fsdp": 7}, {})


# Files, --mesh and JAXPAR_MESH


@pytest.mark.parametrize("file", MESH_FILES, ids=lambda file: file.stem)
def test_mesh_file(file):
    """Every example makes its mesh, here or not, and opens with one line that says what it is for."""
    made = mesh(file)

    assert made.size <= hardware_of(made).num_devices
    assert isinstance(made, Mesh) == file.stem.startswith("cpu")
    lines = file.read_text().splitlines()
    assert [line.startswith("#") for line in lines[:2]] == [True, False]


def test_mesh_files_are_the_promised_ones():
    found = {file.stem: hardware_of(mesh(file)).num_chips for file in MESH_FILES}
    assert found == {
        "cpu_1": 1, "cpu_8": 8, "h100_2x8": 16, "v5e_16x16": 256, "v5e_2slices": 512, "v5p_8x16x16": 2048,
    }  # fmt: skip
    assert dcn_factors(mesh(ROOT / "meshes" / "v5e_2slices.toml")) == {"data": 2}


def test_axes_of_a_call_replace_those_of_a_file():
    assert axis_sizes(mesh(str(ROOT / "meshes" / "cpu_8.toml"), fsdp=-1)) == {"fsdp": 8}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hardware = ", "not a TOML file: Invalid value (at end of document). See meshes/ for examples."),
        (
            'hardwear = "cpu:8"\n',
            (
                "'hardwear' is not a key of a mesh file. Did you mean 'hardware'? A mesh file has: hardware, axes, "
                "dcn, "
                "allow_unused."
            ),
        ),
        (
            "hardware = 8\naxes = 2\n",
            (
                "'hardware' is 8, and must be a str. 'axes' is 2, and must be a dict. A mesh file has: hardware, "
                "axes, dcn, "
                "allow_unused."
            ),
        ),
    ],
)
def test_wrong_mesh_file(tmp_path, content, text):
    path = tmp_path / "mesh.toml"
    path.write_text(content)
    assert message(path) == f"{path}: {text}"


def test_missing_mesh_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message("cpu_8.toml") == "There is no mesh file 'cpu_8.toml'. Give the path of a mesh file."
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "cpu_8.toml").touch()
    assert message("meshes/cpu8.toml") == (
        "There is no mesh file 'meshes/cpu8.toml'. Did you mean 'meshes/cpu_8.toml'? There are meshes/cpu_8.toml."
    )


@pytest.mark.parametrize(
    ("spec", "sizes", "hardware"),
    [
        ("fsdp=2,tensor=4", {"fsdp": 2, "tensor": 4}, "cpu:8"),
        ("v5p-128", {"fsdp": 32, "tensor": 2}, "v5p-128"),  # the script's axes
        ("v5p-128:data=2,fsdp=32", {"data": 2, "fsdp": 32}, "v5p-128"),
        ("v5p:4x4x4:fsdp=64", {"fsdp": 64}, "v5p:4x4x4"),
        ("2xv5e:16x16:data=4,fsdp=128,dcn.data=2", {"data": 4, "fsdp": 128}, "2xv5e:16x16"),
        ("h100:2x8: data=2, fsdp=-1", {"data": 2, "fsdp": 8}, "h100:2x8"),
        ("fsdp=2,allow_unused", {"fsdp": 2}, "cpu:2"),
        (str(ROOT / "meshes" / "v5p_8x16x16.toml"), {"data": 4, "fsdp": 256, "tensor": 2}, "v5p:8x16x16"),
    ],
)
@pytest.mark.parametrize("through", ["--mesh", "JAXPAR_MESH"])
def test_override(spec, sizes, hardware, through, monkeypatch, caplog):
    """The same script, another mesh, and the log says so."""

    def script():
        return mesh(fsdp=-1, tensor=2)

    if through == "--mesh":
        monkeypatch.setenv("JAXPAR_MESH", "data=8")  # the nearer of the two counts
        with override(spec):
            made = script()
    else:
        monkeypatch.setenv("JAXPAR_MESH", spec)
        made = script()

    assert axis_sizes(made) == sizes
    assert hardware_of(made).name == hardware
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{through} {spec}: jp.mesh makes ")
    assert caplog.messages[0].endswith("where the script asks for fsdp=-1,tensor=2.")


def test_override_of_a_target():
    """A script that names hardware runs on this machine when told to."""
    with override("cpu:8:fsdp=8"):
        assert mesh("v5p-128", fsdp=64) is mesh(fsdp=8)
    with override(None):
        assert hardware_of(mesh("v5p-128", fsdp=64)).name == "v5p-128"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "fsdp=4;tensor=2",
            (
                "'fsdp=4;tensor=2': cannot read 'fsdp=4;tensor=2'. Write axis=size, dcn.axis=factor for slices, "
                "allow_unused "
                "to leave devices idle: v5p-128:fsdp=32,tensor=2 or 2xv5e:16x16:data=2,fsdp=256,dcn.data=2."
            ),
        ),
        ("v5p-128:fsdp", "'v5p-128:fsdp' does not name hardware."),
        ("v5q-128:fsdp=2", "'v5q-128': no chip is called 'v5q'. Did you mean 'v5p'?"),
    ],
)
def test_wrong_override(spec, text):
    """Refused where it is given, before any script runs."""
    with pytest.raises(MeshError) as caught, override(spec):
        pass
    assert str(caught.value).startswith(text)


def test_override_and_devices():
    with override("v5p-128"):
        assert message(devices=jax.devices(), fsdp=8) == (
            "jp.mesh was given devices= and also the hardware v5p-128 (by the script, --mesh or JAXPAR_MESH). "
            "Leave one "
            "of them out."
        )
    with override("fsdp=2,tensor=4"):
        assert axis_sizes(mesh(devices=jax.devices(), fsdp=8)) == {"fsdp": 2, "tensor": 4}


# Several processes


@pytest.mark.parametrize(
    ("variables", "evidence"),
    [
        ({**IN_STEP, "SLURM_NTASKS": "16"}, "SLURM_NTASKS=16"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, "JAX_COORDINATOR_ADDRESS=host:1234"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES=2"),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX=3"),
    ],
)
def test_mesh_before_the_cluster(variables, evidence, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert message(fsdp=-1) == (
        f"This process is one of several ({evidence}), and would see only its own devices. Call "
        "jp.initialize() before anything touches a device. A process that is meant to work alone says so: "
        "jp.mesh(devices=jax.local_devices(), ...)."
    )
    with pytest.raises(MeshError, match=r"^simulate\(8\): this process belongs to a cluster"):
        _mesh.simulate(8)
    assert mesh(devices=jax.local_devices(), fsdp=8).size == 8
    assert mesh("v5p-128", fsdp=64).size == 64  # JAX_PLATFORMS=cpu: it cannot be here
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert mesh(fsdp=-1).size == 8


@pytest.mark.multiprocess
def test_mesh_over_two_processes(child_env):
    """Refused before `initialize`, whole after it; the override is announced by one process, not by each."""
    code = """
        import json, sys
        import jax
        from jaxpar import _mesh
        rank, port = sys.argv[1:]
        refused = ""
        try:
            _mesh.mesh(fsdp=-1)
        except _mesh.MeshError as error:
            refused = str(error)
        jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
        mesh = _mesh.mesh(data=4)
        assert mesh is _mesh.mesh("cpu:4", data=-1)
        print(json.dumps([refused.split(",")[0], dict(mesh.shape), [d.process_index for d in mesh.devices.flat]]))
    """
    env = {**child_env, "JAX_NUM_PROCESSES": "2", "JAXPAR_MESH": "data=2,fsdp=2"}
    ended = peers(code, 2, env=env, devices=2)
    assert [peer.code for peer in ended] == [0, 0], ended
    found = [json.loads(peer.last) for peer in ended]
    assert found == [["This process is one of several (JAX_NUM_PROCESSES=2)", {"data": 2, "fsdp": 2}, [0, 0, 1, 1]]] * 2
    assert [peer.err.count("where the script asks for data=4.") for peer in ended] == [1, 0]


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # the batch script itself, no step
        {**IN_STEP, "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "1"},
        {"JOB_COMPLETION_INDEX": "0"},
        {"TPU_WORKER_HOSTNAMES": "t1,t2"},  # a TPU host, but JAX_PLATFORMS=cpu
    ],
    ids=str,
)
def test_one_process(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mesh(fsdp=-1).size == 8


@pytest.mark.parametrize(
    ("variables", "evidence"),
    [
        ({"TPU_WORKER_HOSTNAMES": "t1,10.0.0.2"}, "TPU_WORKER_HOSTNAMES lists 2"),
        ({"TPU_PROCESS_ADDRESSES": "[::1]:8476,t2:8476"}, "TPU_PROCESS_ADDRESSES lists 2"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine them, please set it"}, ""),  # as libtpu leaves it
    ],
)
def test_tpu_pod(variables, evidence, monkeypatch):
    monkeypatch.setattr(_devices, "only_cpu", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _devices.cluster() == evidence


# Simulated devices


def test_simulate_what_is_there(caplog):
    before = jnp.arange(4)
    assert _mesh.simulate(8) == jax.devices()
    assert before.sum() == 6
    assert caplog.messages == []
    with pytest.raises(MeshError, match=r"^simulate\(0\): give the number of CPU devices"):
        _mesh.simulate(0)


def test_simulate_in_a_live_process(child_env):
    """From one device to eight and on to four; what was left behind is said; old and new functions run."""
    env = {key: value for key, value in child_env.items() if key != "JAX_NUM_CPU_DEVICES"}
    counts, log = run_python(
        """
        import json
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jaxpar import _mesh
        double = jax.jit(lambda x: x * 2)
        old = double(jnp.ones(1 << 18))
        counts = [len(jax.devices())]
        for number in (8, 8, 4):
            _mesh.simulate(number)
            mesh = _mesh.mesh(fsdp=-1)
            x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("fsdp")))
            assert double(x).sharding.num_devices == number and double(x).sum() == 56
            counts.append(len(jax.devices()))
        assert old.sum() == 1 << 19
        print(json.dumps(counts))
        """,
        env,
    )

    assert counts == [1, 8, 8, 4]
    first, second = [line for line in log.splitlines() if line.startswith("jp.simulate")]
    assert first.startswith(
        "jp.simulate(8): JAX was running on 1 CPU device and has started again on 8 CPU devices. Left behind: 1 array "
        "(1.0 MiB) and every compiled function."
    )
    assert second.startswith("jp.simulate(4): JAX was running on 8 CPU devices and has started again on 4 CPU devices.")


@pytest.mark.parametrize(("said", "expected"), [({}, 64), ({"PJRT_NPROC": "9"}, 9)], ids=["unsaid", "said"])
def test_simulated_devices_have_threads_to_wait_in(said, expected, child_env):
    """With a thread for each device alone, two collectives at once may keep all of them, and wait for ever."""
    ours = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC")
    threads, _ = run_python(
        """
        import json, os, pathlib
        from jaxpar import _mesh
        before = dict(os.environ)
        _mesh.simulate(8)
        assert dict(os.environ) == before
        print(json.dumps([path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]))
        """,
        {key: value for key, value in child_env.items() if key not in ours} | said,
    )
    assert threads.count("tf_XLAEigen") == expected


def test_simulate_by_flag_or_by_name(child_env):
    """The plain XLA flag gives a mesh by itself; hardware `cpu:N` simulates before JAX has started."""
    env = {key: value for key, value in child_env.items() if key != "JAX_NUM_CPU_DEVICES"}
    flags = env.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    by_flag = """
        import json
        from jaxpar import _mesh
        sizes = _mesh.axis_sizes(_mesh.mesh(fsdp=-1, tensor=2))
        print(json.dumps([sizes, len(_mesh.simulate(8)), len(_mesh.simulate(2))]))
    """
    by_name = """
        import json
        from jaxpar import _mesh
        print(json.dumps(_mesh.axis_sizes(_mesh.mesh("meshes/cpu_8.toml"))))
    """
    assert run_python(by_flag, env | {"XLA_FLAGS": flags.strip()})[0] == [{"fsdp": 4, "tensor": 2}, 8, 2]
    assert run_python(by_name, env)[0] == {"data": 2, "fsdp": 2, "tensor": 2}


# TPU devices as the compiler sees them


@pytest.mark.libtpu
def test_devices_of_the_tpu_compiler(child_env):
    """Real coordinates: two slices, 3-D slices, two devices a chip. Names of what is attached give a real mesh."""
    found, _ = run_python(
        """
        import json
        import jax
        from jax.experimental import topologies
        from jaxpar import _devices, _mesh
        _devices.only_cpu = lambda: False
        found = []
        for name, slices, dcn, axes in [
            ("v5e:4x4", 2, None, {"data": 2, "fsdp": 8, "tensor": 2}),
            ("v5e:4x4", 2, {"fsdp": 2}, {"data": 2, "fsdp": 16}),
            ("v5p:4x4x4", 1, None, {"fsdp": 16, "tensor": 4}),
            ("7x:2x2x2", 1, None, {"fsdp": 8, "tensor": 2}),
        ]:
            chip, sides = name.split(":")
            topology_name = f"tpu{name}" if chip == "7x" else name
            topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name, num_slices=slices)
            jax.devices = lambda: topology.devices
            spec = name if slices == 1 else f"{slices}x{name}"
            mesh = _mesh.mesh(spec, dcn=dcn, **axes)
            inner = mesh.devices.reshape(-1, mesh.devices.shape[-1])[0]
            steps = [sum(abs(a - b) for a, b in zip(x.coords, y.coords)) for x, y in zip(inner, inner[1:])]
            found.append([type(mesh).__name__, _mesh.hardware_of(mesh).spec, _mesh.dcn_factors(mesh), max(steps)])
        print(json.dumps(found))
        """,
        child_env,
    )
    assert [entry[:3] for entry in found] == [
        ["Mesh", "2xv5e:4x4", {"data": 2}],
        ["Mesh", "2xv5e:4x4", {"fsdp": 2}],
        ["Mesh", "v5p:4x4x4", {}],
        ["Mesh", "7x:2x2x2", {}],
    ]
    assert [found[0][3], found[2][3], found[3][3]] == [1, 1, 0]  # `tensor`: neighbours; on 7x the two halves of a chip


def test_ordered_array_holds_devices():
    assert _mesh._as_array(jax.devices()).dtype == np.dtype(object)
