"""A step on its way to a compiler that is elsewhere: lowered for its mesh without devices, in one file.

The file is a zip of `step.json` (types, shardings, donation, mesh, hardware, what each argument is) and `step.mlirbc`,
the portable StableHLO that `jax.export` makes, with the source lines. JAX's own file format needs a package that JAX
does not require, and keeps neither donation nor the mesh's hardware; so the parts are written out.

Nothing here needs a device: JAX is left unstarted if it was.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .. import _devices, _mesh
from .._errors import StepError
from .._hardware import Chip, Hardware
from ._compiled import Argument
from ._subject import Subject

FORMAT = 1
"""Of the file; in its name for the cache, too."""

_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
"""Dtypes of JAX's own random keys, and the implementation behind each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A lowered step, with all that its compiler must know.

    Attributes:
        name: Of the step.
        module: StableHLO, as JAX serialises it.
        key: Of the module and the source lines in it, whoever asked for it; see `_key`.
        hardware: What to compile for.
        axes: The mesh.
        dcn: Axes that cross slices, and how often.
        inputs: Shape, dtype and spec of what goes in; what the step does not use has been left out.
        outputs: The same of what comes out.
        donated: Positions of inputs that are given away.
        arguments: What each input is.
        num_tokens: Of the global batch.
        options: XLA options.
        plan: As JSON; empty without one.
        flops: As counted in the step's jaxpr; empty if they were not.
        notes: What a reader of the report should know.
        version: Of the JAX that exported it.
    """

    name: str
    module: bytes
    key: str
    hardware: Hardware
    axes: dict[str, int]
    dcn: dict[str, int]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    donated: tuple[int, ...]
    arguments: tuple[Argument, ...]
    num_tokens: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan: str = ""
    flops: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    version: str = jax.__version__

    def digest(self) -> str:
        """Of all that its compiler sees; what the arguments mean, and are called, is not of it."""
        seen = ("key", "name", "hardware", "axes", "dcn", "inputs", "outputs", "donated", "options")
        return hashlib.sha256(json.dumps([FORMAT, self._data(seen)]).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file."""
        fields = self._data([field.name for field in dataclasses.fields(self) if field.name != "module"])
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in (
                ("step.json", json.dumps({"format": FORMAT, **fields}, indent=1)),
                ("step.mlirbc", self.module),
            ):
                file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # the epoch as its date
        return whole.getvalue()

    def _data(self, names: Sequence[str]) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in names}
        if "arguments" in fields:
            fields["arguments"] = [dataclasses.asdict(each) for each in self.arguments]
        return fields | {"hardware": dataclasses.asdict(self.hardware)}


def export(subject: Subject) -> Exported:
    """Lower `subject` for the hardware of its mesh.

    Raises:
        StepError: JAX cannot lower it without devices; with JAX's own words.
    """
    mesh = subject.mesh
    assert mesh is not None, "only a step on a mesh is compiled elsewhere"
    hardware = _mesh.hardware_of(mesh)
    from jax import export as jax_export

    with _devices.unstarted(), _absent_device(hardware):
        try:
            exported = jax_export.export(
                subject.function,
                platforms=[hardware.platform],
                # Not for keeping: Pallas kernels and cuDNN, which promise no stability, are compiled by this same JAX.
                disabled_checks=[jax_export.DisabledSafetyCheck.custom_call("ALL")],
            )(*subject.shapes)
        except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
            raise StepError(
                f"{subject.name} cannot be lowered for {hardware.name}, which is not attached: {error}\nA step that is "
                "compiled elsewhere may not call back into Python (jax.debug.print, io_callback), close over arrays on "
                "devices, or name a mesh of another size than the one it is explained on."
            ) from error
    kept = exported.module_kept_var_idx
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    ins = [exported.in_shardings_jax(abstract)[index] for index in kept]
    outs = exported.out_shardings_jax(abstract)
    plan = subject.plan
    return Exported(
        name=subject.name,
        module=bytes(exported.mlir_module_serialized),
        key=_key(exported.mlir_module()),
        hardware=hardware,
        axes=_mesh.axis_sizes(mesh),
        dcn=_mesh.dcn_factors(mesh),
        inputs=tuple(_to_data(exported.in_avals[at], sharding) for at, sharding in zip(kept, ins, strict=True)),
        outputs=tuple(_to_data(aval, sharding) for aval, sharding in zip(exported.out_avals, outs, strict=True)),
        donated=tuple(position for position, at in enumerate(kept) if at in subject.donated),
        arguments=tuple(subject.arguments[at] for at in kept),
        num_tokens=subject.num_tokens,
        options={name: _plain(value) for name, value in subject.options.items()},
        plan="" if plan is None else plan.to_json(),
        notes=subject.notes,
    )


def write(exported: Exported, path: str | os.PathLike[str]) -> None:
    """Write the file, at once or not at all."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(exported.to_bytes())
    part.replace(path)


def read(path: str | os.PathLike[str]) -> Exported:
    """Read a file that `write` wrote.

    Raises:
        StepError: It is no such file, or of another version of jaxpar.
    """
    try:
        with zipfile.ZipFile(path) as file:
            fields = json.loads(file.read("step.json"))
            module = file.read("step.mlirbc")
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise StepError(
            f"{path} is not an exported step: {error}. Write one: jaxpar export MODULE:NAME -o FILE."
        ) from error
    if fields.pop("format") != FORMAT:
        raise StepError(f"{path} was written by another version of jaxpar. Export the step again: jaxpar export.")
    fields["arguments"] = tuple(map(_argument, fields["arguments"]))
    hardware = fields.pop("hardware")
    chip = Chip(**hardware.pop("chip"))
    topology = tuple(hardware.pop("topology"))
    tuples = ("inputs", "outputs", "donated", "notes")
    fields |= {name: tuple(fields[name]) for name in tuples}
    return Exported(**fields, module=module, hardware=Hardware(**hardware, chip=chip, topology=topology))


def call(exported: Exported, mesh: Mesh) -> Any:
    """`exported` as a jitted function over the devices of `mesh`; and its arguments as shapes.

    It has the shardings and the donation with which it was exported.

    `jax.export` makes a function of the module it is given; so a module of the same types is exported here, and the
    real one put in its place: JAX has no public constructor, and `deserialize` needs flatbuffers.
    """
    import jax.numpy as jnp
    from jax import export as jax_export

    abstract = mesh.abstract_mesh
    ins = [_shape(each, abstract) for each in exported.inputs]
    outs = [_shape(each, abstract) for each in exported.outputs]

    def stand_in(*_: Any) -> list[Any]:
        return [_zeros(each) if _is_key(each) else jnp.zeros(each.shape, each.dtype) for each in outs]

    made = jax_export.export(
        jax.jit(
            stand_in,
            in_shardings=[each.sharding for each in ins],
            out_shardings=[each.sharding for each in outs],
            keep_unused=True,
        ),
        platforms=[exported.hardware.platform],
    )(*ins)
    real = dataclasses.replace(made, mlir_module_serialized=exported.module, fun_name=exported.name)

    def step(*arrays: Any) -> Any:
        return real.call(*arrays)

    step.__name__ = step.__qualname__ = exported.name
    function = jax.jit(
        step,
        in_shardings=[_on(each.sharding, mesh) for each in ins],
        out_shardings=[_on(each.sharding, mesh) for each in outs],
        donate_argnums=exported.donated,
    )
    return function, [jax.ShapeDtypeStruct(each.shape, each.dtype, weak_type=each.weak_type) for each in ins]


def without_call(text: str, name: str) -> str:
    """HLO text of `call`'s function, with the names of the step's own compilation: the call itself is left out."""
    return text.replace(f"jit({name})/call_exported/", "")


def _key(text: str) -> str:
    """A hash of a module's operations and of the places in the source that they come from.

    JAX keeps the whole stack of an operation, up to the line that called `jp.explain`. These outermost places do not
    count: the same step, asked for from another cell of a notebook, is the same program. Places within the step do: a
    report shows them, and a program from the cache must not show those of an older version.
    """
    callers = {(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)}
    lines, places, outer = [], set(), set()
    for line in text.splitlines():
        if not line.startswith("#loc"):
            lines.append(re.sub(r" loc\(#loc\d*\)", "", line))
            continue
        alias, _, said = line.partition(" = ")
        place = re.match(r'loc\("(.*?)":(\d+):', said)
        inside = re.match(r'loc\(".*"\((#loc\d*)\)\)', said)  # the name of a function, at a place
        is_outer = place is not None and (place[1].startswith(_OURS) or (place[1], int(place[2])) in callers)
        if is_outer or (inside is not None and inside[1] in outer):
            outer.add(alias)
        else:
            places.add(re.sub(r"#loc\d*", "", said))
    return hashlib.sha256("\n".join([*lines, *sorted(places)]).encode()).hexdigest()


_OURS = tuple(str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("explain", "cli", "compare"))


def _argument(data: dict[str, Any]) -> Argument:
    axes = data["axes"]
    return Argument(**{**data, "shape": tuple(data["shape"]), "axes": None if axes is None else tuple(axes)})


@contextlib.contextmanager
def _absent_device(hardware: Hardware) -> Iterator[None]:
    """Within, JAX takes a device of `hardware` for its default one, as it would be there.

    While it lowers it asks for the kind of its default device, and for the platform of that one's client. Any object
    whose type is called a device will do, and is remarked upon in the log. With a real device JAX would start, and some
    operations would be lowered for the CPU's sake.
    """

    class Client:
        platform = {"tpu": "tpu", "gpu": "gpu", "cpu": "cpu"}[hardware.kind]
        # What Pallas asks, to see whether it is older than some date: the one that this JAX wants is not.
        platform_version = runtime_type = ""

    class AbsentDevice:
        device_kind = hardware.chip.device_kind
        num_cores = hardware.chip.cores
        platform = Client.platform
        client = Client()

    remark = logging.getLogger("jax._src.config")
    level = remark.level
    remark.setLevel(logging.WARNING)
    try:
        with jax.default_device(AbsentDevice()):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        remark.setLevel(level)


def _to_data(aval: Any, sharding: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"shape": list(aval.shape), "dtype": str(aval.dtype), "weak": bool(aval.weak_type)}
    if sharding is not None:
        data["spec"] = [list(entry) if isinstance(entry, tuple) else entry for entry in sharding.spec]
        if sharding.memory_kind not in (None, "device"):
            data["memory"] = sharding.memory_kind
    return data


def _shape(data: dict[str, Any], mesh: AbstractMesh) -> jax.ShapeDtypeStruct:
    sharding = None
    if "spec" in data:
        spec = PartitionSpec(*(tuple(entry) if isinstance(entry, list) else entry for entry in data["spec"]))
        sharding = NamedSharding(mesh, spec, memory_kind=data.get("memory"))
    dtype: Any = data["dtype"]
    if dtype in _KEYS:
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=_KEYS[dtype])).dtype
    return jax.ShapeDtypeStruct(tuple(data["shape"]), dtype, weak_type=data["weak"], sharding=sharding)


def _on(sharding: Any, mesh: Mesh) -> Any:
    return sharding and NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _is_key(shape: jax.ShapeDtypeStruct) -> bool:
    return jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key)


def _zeros(shape: jax.ShapeDtypeStruct) -> Any:
    """An array of random keys."""
    impl = _KEYS[str(shape.dtype)]
    data = jax.eval_shape(jax.random.key_data, shape)
    return jax.random.wrap_key_data(jax.numpy.zeros(data.shape, data.dtype), impl=impl)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
