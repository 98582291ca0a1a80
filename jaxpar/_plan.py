"""A plan: where every leaf of a program lives on a mesh, why, and what moves each step. Pure data.

It holds no array, no device and no function, costs no memory for a model of any size, prints as a table, goes to JSON
and back, and says how it differs from another.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from . import _plan_text
from ._context import as_spec, axes_at, drop_axes
from ._errors import ShardingError, nearest
from ._sequence import ContextSplit
from ._types import AnyMesh, Axes

FORMAT = 1

TABLE = "table"
"""The role of a parameter whose rows are looked up by index: an embedding."""

EXPERT_ROLES = ("expert column", "expert row")
"""The roles of matrices that stack experts: tokens travel to them, and their gradients leave a kernel summed whole."""

SHARED = "shared"
"""The role of a matrix whose outputs, few heads of keys or values, every device of tensor parallelism makes whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """One kind of transfer that a leaf causes in a step.

    Attributes:
        what: `"weight"`, `"gradient"`, `"update"` or `"activation"`.
        kind: `"all-gather"`, `"reduce-scatter"`, `"all-reduce"` or `"all-to-all"`.
        axes: The mesh axes it crosses.
        bytes: What one device holds of it when whole: the result of a gather, the operand of a reduction. For an
            activation, per token; of an all-to-all to experts, per choice of a token; of attention, per token of a
            device and feature of one of its keys, or of its queries.
        times: How often a step (a microbatch's step, with accumulation in the loop) does it.
        when: In words.
    """

    what: str
    kind: str
    axes: Axes
    bytes: int
    times: int
    when: str

    @property
    def per_token(self) -> bool:
        """Whether `bytes` are per token, as for activations."""
        return self.what == "activation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a plan says of one leaf.

    Attributes:
        path: Where it lives.
        shape: Global shape.
        dtype: As stored: a numpy dtype, or a JAX one for random-number keys.
        slot: `"parameter"`, `"frozen"`, `"optimizer"`, `"model_state"` or `"rng"`.
        storage: Its spec between steps.
        compute: Its spec where the model reads it.
        gradient: The spec of its gradient where it is accumulated.
        slots: The spec of its optimiser state, and so of its update and of the gradient that goes into it.
        compute_dtype: The dtype in which the model reads it.
        role: `"column"` or `"row"` if tensor parallelism splits its outputs or its inputs, `"shared"` if its
            outputs are heads too few to split, `"table"` if its rows are looked up by index, `"expert column"` or
            `"expert row"` if it stacks matrices of experts, else `""`.
        layers: How many of its first dims stack equal blocks that a scan runs one by one: 1, in a pipeline of several
            chunks 2, or 0.
        remat: Whether those blocks are computed again in the backward pass.
        memory_kind: Where its pieces lie: `"device"`.
        reasons: `(strategy, what it did and why)`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    slot: str = "parameter"
    storage: PartitionSpec = PartitionSpec()
    compute: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()
    slots: PartitionSpec = PartitionSpec()
    compute_dtype: Any = None
    role: str = ""
    layers: int = 0
    remat: bool = False
    memory_kind: str = "device"
    reasons: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.compute_dtype is None:
            object.__setattr__(self, "compute_dtype", self.dtype)

    @property
    def num_elements(self) -> int:
        """Elements of the whole leaf."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole leaf as stored."""
        return self.num_elements * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Bytes per device: the largest share any device holds."""

    parameters: int
    gradients: int
    optimizer: int | None
    other: int
    num_parameters: int
    num_trainable: int

    @property
    def total(self) -> int:
        """All of them; without an optimiser's state if the plan was given none."""
        return self.parameters + self.gradients + (self.optimizer or 0) + self.other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The specs of a whole program, with the moves they imply.

    Made by `jp.plan`, which returns one that can also `init`, `jit` and `batch`. Compared by what it says.

    Attributes:
        axes: Size of each mesh axis, outermost first.
        records: What it says of each leaf, by path.
        optimizer_records: The same for each leaf of the optimiser's state, if an optimiser was given.
        dims: The mesh axes of each logical dim of activations; and `"stages"`, those of a pipeline.
        replicas: Axes over which gradients are summed once a step.
        shards: Axes over which gradients are reduce-scattered, once a microbatch.
        context: How sequences are split over devices, if they are.
        strategies: What was asked for, as text.
        inactive: Strategies with nothing to do on this mesh, and why.
        notes: What a reader should know.
        hardware: The hardware, in words.

    Example:
        >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> plan.totals().parameters  # bytes per device, of 16,384
        2048
        >>> jp.Plan.from_json(plan.to_json()).diff(plan)
        []
    """

    axes: dict[str, int]
    records: dict[str, Record]
    optimizer_records: dict[str, Record] | None = None
    dims: dict[str, Axes] = dataclasses.field(default_factory=dict)
    replicas: Axes = ()
    shards: Axes = ()
    context: ContextSplit | None = None
    strategies: tuple[str, ...] = ()
    inactive: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    hardware: str = ""

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.axes.values())

    @property
    def batch_axes(self) -> Axes:
        """The axes that split the batch."""
        return self.dims.get("batch", ())

    @property
    def stage_axis(self) -> str | None:
        """The axis whose devices are the stages of a pipeline, if there is one."""
        return next(iter(self.dims.get("stages", ())), None)

    @property
    def token_axes(self) -> Axes:
        """The axes of more than one device that split tokens, by rows or within a sequence: gradients cross them."""
        split = {*self.batch_axes, *([self.context.axis] if self.context else [])}
        return tuple(axis for axis, size in self.axes.items() if axis in split and size > 1)

    @property
    def parameters(self) -> Iterator[Record]:
        """Records of parameters, frozen ones too."""
        return (record for record in self.records.values() if record.slot in ("parameter", "frozen"))

    def local_shape(self, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
        """The shape of one device's piece."""
        counts = [math.prod(self.axes[axis] for axis in axes_at(entry)) for entry in spec]
        return tuple(
            -(-size // count) for size, count in zip(shape, counts + [1] * (len(shape) - len(counts)), strict=True)
        )

    def local_bytes(self, record: Record) -> int:
        """Bytes of one device's piece as stored."""
        return math.prod(self.local_shape(record.shape, record.storage)) * record.dtype.itemsize

    def totals(self) -> Totals:
        """Bytes per device for parameters, gradients and optimiser state."""
        parameters = list(self.parameters)
        trained = [record for record in parameters if record.slot == "parameter"]
        gradients = sum(
            math.prod(self.local_shape(record.shape, record.gradient)) * record.dtype.itemsize for record in trained
        )
        own = [record for record in self.records.values() if record.slot == "optimizer"]
        slots = [*own, *(self.optimizer_records or {}).values()]
        rest = (record for record in self.records.values() if record.slot not in ("parameter", "frozen", "optimizer"))
        return Totals(
            parameters=sum(map(self.local_bytes, parameters)),
            gradients=gradients,
            optimizer=sum(map(self.local_bytes, slots)) if own or self.optimizer_records is not None else None,
            other=sum(map(self.local_bytes, rest)),
            num_parameters=sum(record.num_elements for record in parameters),
            num_trainable=sum(record.num_elements for record in trained),
        )

    def moves(self, record: Record) -> tuple[Move, ...]:
        """What the leaf of `record` moves in one step without accumulation."""
        return tuple(_moves(self, record))

    def find(self, path: str) -> Record:
        """The record of `path`.

        Raises:
            ShardingError: There is none; names the nearest.
        """
        if path not in self.records:
            raise ShardingError(
                f"{path}: the plan has no such leaf.{nearest(path, self.records)} See plan.records for its "
                f"{len(self.records)} paths."
            )
        return self.records[path]

    def follow(self, path: str) -> "_plan_text.Life":
        """One leaf's life in a step: stored, gathered, used, reduced, updated, with bytes and times.

        Args:
            path: Of a leaf; or `"attention"`: how the parts of split sequences meet in each `jp.attention`. Which
                kernel computes it, and how many bytes these are for its shapes, is in the notes of a step.

        Raises:
            ShardingError: The plan has no such leaf.

        Example:
            >>> plan = jp.plan(lambda: {"w": jnp.ones((4, 4))}, jp.mesh(context=-1), [jp.CP(method="ring")])
            >>> print(plan.follow("attention"))
            attention  ring over context=8, in zigzag order
              sent      collective-permute K and V to the next device over context, 8 B a token and feature x7, forward
              sent      collective-permute K and V once more over context, 8 B a token and feature x7, backward
              sent      collective-permute their gradients over context, 8 B a token and feature x8, backward
        """
        if path == "attention" and path not in self.records:
            return _plan_text.follow_attention(self)
        return _plan_text.follow(self, self.find(path))

    def table(self) -> str:
        """The plan as text: a row a leaf, equal layers folded, and totals."""
        return _plan_text.table(self)

    def __str__(self) -> str:
        return self.table()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from . import _plan_html

        return {"text/plain": self.table(), "text/html": _plan_html.table(self)}

    def diff(self, other: "Plan") -> list[str]:
        """What `other` says otherwise, a line each; `[]` if nothing."""
        lines = []
        for field in ("axes", "dims", "replicas", "shards", "context", "strategies"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                lines.append(f"{field}: {mine} | {theirs}")
        lines += _diff_records(self.records, other.records)
        lines += _diff_records(self.optimizer_records or {}, other.optimizer_records or {})
        return lines

    def to_json(self) -> str:
        """The plan as JSON, for `Plan.from_json`."""
        fields: dict[str, Any] = {"format": FORMAT}
        for field in dataclasses.fields(Plan):
            value = getattr(self, field.name)
            if field.name in ("records", "optimizer_records"):
                value = None if value is None else [_record_to_json(record) for record in value.values()]
            elif field.name == "context":
                value = value and dataclasses.asdict(value)
            fields[field.name] = value
        return json.dumps(fields, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            ShardingError: The text is not such a plan.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise ShardingError(
                    f"this plan has format {version}, and this version of jaxpar reads {FORMAT}. Plan again."
                )
            if not all(isinstance(size, int) for size in fields["axes"].values()):
                raise TypeError("axes")
            for name in ("records", "optimizer_records"):
                if name == "records" or fields[name] is not None:
                    records = [_record_from_json(record) for record in fields[name]]
                    fields[name] = {record.path: record for record in records}
            fields["dims"] = {dim: tuple(axes) for dim, axes in fields["dims"].items()}
            for name in ("replicas", "shards", "strategies", "notes"):
                fields[name] = tuple(fields[name])
            if fields.get("context"):
                context = fields["context"]
                fields["context"] = ContextSplit(**{**context, "whole": tuple(context["whole"])})
            fields["inactive"] = tuple(tuple(pair) for pair in fields["inactive"])
            return Plan(**fields)
        except ShardingError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardingError(f"this is not the JSON of a plan ({error!r}). Write it with plan.to_json().") from error


def axis_sizes(mesh: AnyMesh) -> dict[str, int]:
    """Size of each axis of `mesh`, outermost first."""
    return {str(axis): int(size) for axis, size in mesh.shape.items()}


def _spec_axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in axes_at(entry)}


def _moves(plan: Plan, record: Record) -> Iterator[Move]:
    if record.slot not in ("parameter", "frozen"):
        return
    counted = record.layers and plan.local_shape(record.shape, record.storage)[: record.layers]
    times = math.prod(counted) if counted else 1
    where = " of each layer" if record.layers else ""
    gathered = _in_order(plan, _spec_axes(record.storage) - _spec_axes(record.compute))
    if gathered:
        passes = [f"forward pass{where}"]
        if record.remat and record.slot == "parameter":
            passes.append(f"backward pass{where}, which computes the block again")
        size = _bytes_of_one(plan, record, record.compute, record.compute_dtype)
        for when in passes:
            yield Move(what="weight", kind="all-gather", axes=gathered, bytes=size, times=times, when=when)
    yield from _activation_moves(plan, record, times, where)
    if record.slot == "frozen":
        return
    yield from _gradient_moves(plan, record, times, where)
    collected = _in_order(plan, _spec_axes(record.slots) - _spec_axes(record.storage))
    if collected:
        size = plan.local_bytes(record)
        yield Move(what="update", kind="all-gather", axes=collected, bytes=size, times=1, when="after the update")


def gradient_route(plan: Plan, record: Record, crossed: Axes, *, table: bool) -> tuple[PartitionSpec, PartitionSpec]:
    """Two specs that a gradient passes: where it is summed over the batch axes `crossed`, and where it is used.

    [Note: a gradient over several axes] One that is cut over `fsdp` and summed over `data` should be reduce-scattered
    over the one and then, in pieces, all-reduced over the other. XLA does that for a matrix product whose result is
    constrained straight to the cut spec. Constrained to the compute spec first, it is all-reduced whole over both and
    then cut: on data 2 x fsdp 4, 1.75 times its bytes on the wire rather than 1.0. (Between slices XLA:TPU makes the
    good form of either; over one axis all compilers do.) But straight does not do everywhere:

    - A table's gradient is a scatter-add of what was looked up. Straight to a cut spec the partitioner splits that by
      rows or columns of the table, and gathers activations for it (at 64 tokens).
    - With an idle axis, one that splits neither the batch nor the matrix, XLA sums whole as before, or uses it in the
      place of an `fsdp` of the same size and permutes. Giving it a dim to split makes the sum good, but is propagated
      to the activations, which are then gathered.
    - A dim split over two axes (`tensor+fsdp`) is summed whole as before.

    - Gradients of experts leave the kernel of `jp.experts` summed over all of these axes.

    So these pass the compute spec, and are summed whole. Over an axis of the compute spec, as that of experts, there is
    nothing to sum: all that uses a piece of the parameter is where the piece is.

    Args:
        plan: The plan.
        record: The record of the parameter.
        crossed: The axes of more than one device that split tokens where it is read.
        table: Whether it is looked up by index.
    """
    crossed = tuple(axis for axis in crossed if axis not in _spec_axes(record.compute))
    stored = _spec_axes(record.storage) & set(crossed)
    cut = drop_axes(record.slots, tuple(set(crossed) - stored))  # one axis at a time: ZeRO's comes after
    idle = {axis for axis, size in plan.axes.items() if size > 1} - {*crossed, *_spec_axes(cut)}
    twice = any(len(axes_at(entry)) > 1 for entry in cut)
    straight = stored and len(crossed) > 1 and not (table or idle or twice or record.role in EXPERT_ROLES)
    return (cut if straight else record.compute, record.slots)


def _gradient_moves(plan: Plan, record: Record, times: int, where: str) -> Iterator[Move]:
    """How the gradient is summed over the batch axes: scattered over those that cut it, in pieces over others."""
    own = _spec_axes(record.compute)
    crossed = tuple(axis for axis in plan.token_axes if axis not in own)
    first, last = gradient_route(plan, record, crossed, table=record.role == TABLE)
    early = set(crossed) & _spec_axes(first)
    late = set(crossed) - early
    size = _bytes_of_one(plan, record, drop_axes(first, crossed), record.dtype)
    backward, after = f"backward pass{where}", "after the backward pass"
    if record.role == TABLE:
        after += ", for each use of it"  # a tied one has two
    update = "before the update, of which each device does its part"
    parts = late <= _spec_axes(last)
    for kind, over, when in (
        ("reduce-scatter", early, backward),
        ("reduce-scatter", late if parts else (), backward if late <= _spec_axes(record.gradient) else update),
        ("all-reduce", () if parts else late, after),
    ):
        if over:
            axes = _in_order(plan, set(over))
            yield Move(what="gradient", kind=kind, axes=axes, bytes=size, times=times, when=when)
            size //= math.prod(plan.axes[axis] for axis in axes)


def _activation_moves(plan: Plan, record: Record, times: int, where: str) -> Iterator[Move]:
    """What tensor parallelism moves: rows sum their outputs, columns the gradient of their inputs."""
    if record.role == SHARED:
        axes, when = plan.dims.get("kv", ()), f"backward pass{where}, of heads that devices share"
        size = math.prod(record.shape[record.layers + 1 :]) * np.dtype(record.compute_dtype).itemsize
        yield Move(what="activation", kind="all-reduce", axes=axes, bytes=size, times=times, when=when)
        return
    if record.role in EXPERT_ROLES:
        yield from _expert_moves(record, times, where)
        return
    split = [dim for dim, entry in enumerate(record.compute) if dim >= record.layers and axes_at(entry)]
    if record.role not in ("column", "row") or not split:
        return
    axes = _in_order(plan, _spec_axes(PartitionSpec(*tuple(record.compute)[record.layers :])))
    first, last = record.shape[record.layers], record.shape[-1]
    size = (last if split[0] == record.layers else first) * np.dtype(record.compute_dtype).itemsize
    forward, backward = f"forward pass{where}", f"backward pass{where}"
    shared = ", once for all matrices that read the same activation"
    whens = (forward, backward) if record.role == "row" else (backward + shared, forward + shared)
    if set(plan.dims.get("seq", ())) & set(axes):
        kinds = ("reduce-scatter", "all-gather")
    else:
        kinds = ("all-reduce",)
    for kind, when in zip(kinds, whens, strict=False):
        yield Move(what="activation", kind=kind, axes=axes, bytes=size, times=times, when=when)


def _expert_moves(record: Record, times: int, where: str) -> Iterator[Move]:
    """What experts move: tokens to them and back, and the sums over their hidden features."""
    expert, *rest = [axes_at(entry) for entry in tuple(record.compute)[record.layers :]] or [()]
    is_column = record.role == EXPERT_ROLES[0]
    width = record.shape[record.layers + 1] if is_column else record.shape[-1]
    size = width * np.dtype(record.compute_dtype).itemsize
    shared = ", once for all matrices that read the same activation" if is_column else ""
    way, back = ("to their experts", "from their experts") if is_column else ("from their experts", "to their experts")
    if expert:
        for when in (f"forward pass{where}, chosen tokens {way}", f"backward pass{where}, their gradients {back}"):
            yield Move(what="activation", kind="all-to-all", axes=expert, bytes=size, times=times, when=when + shared)
    hidden = sum(rest, ())
    if hidden:
        when = f"{'backward' if is_column else 'forward'} pass{where}{shared}"
        yield Move(what="activation", kind="all-reduce", axes=hidden, bytes=size, times=times, when=when)


def _bytes_of_one(plan: Plan, record: Record, spec: PartitionSpec, dtype: Any) -> int:
    """Bytes of one device's piece of the leaf, of one layer of it if it stacks layers, in `spec`."""
    spec = PartitionSpec(*tuple(spec)[record.layers :])
    return math.prod(plan.local_shape(record.shape[record.layers :], spec)) * np.dtype(dtype).itemsize


def _in_order(plan: Plan, axes: set[str]) -> Axes:
    return tuple(axis for axis in plan.axes if axis in axes)


def _diff_records(mine: Mapping[str, Record], theirs: Mapping[str, Record]) -> list[str]:
    lines = []
    for path in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(path), theirs.get(path)
        if a is None or b is None:
            lines.append(f"{path}: {'not here' if a is None else 'here'} | {'not there' if b is None else 'there'}")
            continue
        for field in dataclasses.fields(Record):
            if getattr(a, field.name) != getattr(b, field.name):
                lines.append(f"{path}.{field.name}: {getattr(a, field.name)} | {getattr(b, field.name)}")
    return lines


_SPECS = ("storage", "compute", "gradient", "slots")


def _record_to_json(record: Record) -> dict[str, Any]:
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(Record)}
    for name in _SPECS:
        fields[name] = [list(axes_at(entry)) for entry in fields[name]]
    for name in ("dtype", "compute_dtype"):
        fields[name] = str(fields[name])
    return fields


def _record_from_json(fields: dict[str, Any]) -> Record:
    for name in _SPECS:
        fields[name] = as_spec([tuple(axes) for axes in fields[name]])
    fields["shape"] = tuple(fields["shape"])
    fields["reasons"] = tuple((by, why) for by, why in fields["reasons"])
    for name in ("dtype", "compute_dtype"):
        fields[name] = as_dtype(fields[name])
    return Record(**fields)


def as_dtype(dtype: Any) -> Any:
    """A dtype by name or type: a numpy one, or a JAX key dtype as it is."""
    if isinstance(dtype, str) and dtype.startswith("key<"):
        impl = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}[dtype[4:-1]]
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    return dtype if str(dtype).startswith("key<") else jnp.dtype(dtype)
