"""`jp.plan`: from a factory, a mesh and strategies to a plan that makes the model and compiles its steps."""

import dataclasses
import functools as ft
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _birth, _mesh, _rules, _tree
from ._birth import Birth
from ._calls import optimizer_paths
from ._context import as_spec, axes_at
from ._errors import ShardingError, listed
from ._plan import TABLE, Plan, Record, as_dtype, axis_sizes
from ._precision import Precision
from ._slots import Matcher, slot_record, unmatched_note
from ._step import StepFunction
from ._strategy import Strategy, check_types, resolve
from ._types import AnyMesh, Axes, Factory, PyTree
from .parallel import FSDP, PP

logger = logging.getLogger("jaxpar")


def plan(
    factory: Factory,
    mesh: AnyMesh,
    strategies: Sequence[Strategy],
    *,
    optimizer: Any = None,
    trainable: Any = None,
    dims: Sequence[tuple[str, Sequence[Any]]] = (),
    precision: Precision | None = None,
) -> "BoundPlan":
    """Decide where every leaf of a model lives on `mesh`, and why.

    `factory` is traced, never run: planning allocates nothing and takes the time of one trace. The order of
    `strategies` does not matter.

    Args:
        factory: Makes the model when called: an nnx module, Linen variables, a `TrainState`, any pytree.
        mesh: From `jp.mesh`, or your own `jax.sharding.Mesh`; for hardware that is not here, a plan can be looked at
            only.
        strategies: What to do: `[jp.FSDP(), jp.TP(column=[...], row=[...])]`.
        optimizer: An Optax transformation; with it the plan lists and counts the optimiser's state.
        trainable: A pattern, several, or a function of a path: parameters to train. The others are frozen: no gradient,
            no optimiser state. By default all are trained.
        dims: `(path pattern, names of dims)` rules for models that carry no names: `("*.wq", ("embed", "heads"))`. A
            first name `"layers"` says that the leaf stacks equal blocks, `...` that no further dim has a name:
            `("blocks.*", ("layers", ...))`; see `jp.gather`.
        precision: The dtypes in which parameters are stored, read and summed.

    Raises:
        ShardingError: All that cannot be done, at once; nothing has been compiled by then.

    Example:
        >>> plan = jp.plan(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jp.mesh(fsdp=-1), [jp.FSDP()])
        >>> model = plan.init()
        >>> model.kernel.sharding.spec
        P('fsdp',)
    """
    precision = precision or Precision()
    strategies = check_types(strategies)
    sizes = axis_sizes(mesh)
    rules = _rules.as_rules(dims)
    blocks = {each.blocks: each.remat for each in strategies if isinstance(each, FSDP) and each.blocks is not None}
    pipeline = next((each for each in strategies if isinstance(each, PP) and sizes.get(each.axis, 1) > 1), None)
    cut = None if pipeline is None else ft.partial(_cut, pipeline, sizes)
    birth = _birth.conceive(factory, blocks=blocks, param_dtype=precision.param, cut=cut)
    is_trained = _rules.predicate(trainable)
    leaves = {path: _leaf(path, birth, is_trained) for path, slot in birth.slots.items() if slot == "parameter"}
    draft = _rules.Draft(sizes=sizes, leaves=leaves)
    draft.problems += [*_rules.name_dims(leaves, rules), *_rules.check_names(leaves)]
    draft.notes += _rules.unused_names(leaves)
    if trainable is not None and not callable(trainable):
        patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
        draft.problems += _rules.check_patterns(patterns, draft.paths(), "trainable")
    elif not any(leaf.trainable for leaf in leaves.values()):
        draft.problems.append(f"trainable chooses none of {len(leaves)} parameters. Leave it out to train all.")
    resolve(strategies, draft)
    records = {path: _record(path, birth, draft, precision) for path in birth.shapes}
    matcher = Matcher(records)
    own_slots = (path for path, slot in birth.slots.items() if slot == "optimizer")
    records |= {path: slot_record(path, birth.shapes[path], matcher) for path in own_slots}
    bound = BoundPlan(
        axes=sizes,
        records=records,
        dims={dim: _in_order(sizes, dim, axes, draft) for dim, axes in sorted(draft.dims.items())},
        replicas=_in_mesh_order(sizes, (axis for axis in draft.replicas if axis not in draft.shards)),
        shards=_in_mesh_order(sizes, draft.shards),
        context=draft.context,
        strategies=tuple(sorted(map(_describe, strategies))),
        inactive=tuple(sorted(draft.inactive)),
        notes=(*draft.notes, *_stacked_note(records, birth)),
        hardware=_mesh.describe(mesh),
        mesh=mesh,
        birth=birth,
        values=strategies,
        precision=precision,
        again=ft.partial(
            plan,
            factory,
            strategies=strategies,
            optimizer=optimizer,
            trainable=trainable,
            dims=dims,
            precision=precision,
        ),
    )
    slots = None if optimizer is None else bound.records_of(optimizer)
    notes = (*bound.notes, *unmatched_note(slots or {}))
    return dataclasses.replace(bound, optimizer_records=slots, notes=notes)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BoundPlan(Plan):
    """A plan with the mesh and the factory it was made for: what `jp.plan` returns.

    Attributes:
        mesh: The mesh.
        birth: The model before it exists.
        values: The strategies.
        precision: The mixed-precision policy.
        again: Plans the same for another mesh.
    """

    mesh: Any
    birth: Birth
    values: tuple[Strategy, ...]
    precision: Precision
    again: Callable[..., "BoundPlan"]
    matcher: Matcher = dataclasses.field(init=False)
    _shardings: dict[PartitionSpec, NamedSharding] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matcher", Matcher(self.records))

    def __repr__(self) -> str:
        return f"<jaxpar plan of {len(self.records)} leaves over {dict(self.axes)}: {', '.join(self.strategies)}>"

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """`spec` on this plan's mesh."""
        spec = as_spec([axes_at(entry) for entry in spec])
        if spec not in self._shardings:
            self._shardings[spec] = NamedSharding(self.mesh, spec)
        return self._shardings[spec]

    def on(self, mesh: AnyMesh) -> "BoundPlan":
        """The same model and strategies, planned for another mesh."""
        return self.again(mesh=mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Where batch arrays lie: their first dim split over the batch axes."""
        return self.sharding(PartitionSpec(self.batch_axes or None))

    def batch_placement(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the field of a batch at `path` lies: rows over the batch axes, its sequence, if any, over that axis."""
        rows = self.batch_sharding
        return rows if self.context is None else self.sharding(self.context.spec(rows.spec, path, shape))

    @property
    def token_sharding(self) -> NamedSharding:
        """Where arrays of a value for each token lie: split by rows, and within sequences where the plan does that."""
        return self.sharding(PartitionSpec(self.batch_axes or None, self.context.axis if self.context else None))

    @property
    def num_batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return int(np.prod([self.axes[axis] for axis in self.batch_axes], dtype=int))

    @property
    def trainable(self) -> Callable[..., bool]:
        """An nnx filter of the parameters that are trained: `nnx.Optimizer(model, tx, wrt=plan.trainable)`."""
        return _Trainable(frozenset(path for path, record in self.records.items() if record.slot == "parameter"))

    def init(self) -> PyTree:
        """Make the model, born sharded.

        No device ever holds more of a parameter than its piece and what the initialiser needs (a QR for `orthogonal`
        holds the matrix).

        The values do not depend on the mesh, nor on whether there is one: they are those of the factory under
        `jax.jit`. On CPUs, logarithms and exponentials of a factory's own (`jax.random.exponential`, a schedule of
        decays) may differ in the last bit from one mesh to another, for XLA rounds them by the shape of a piece; and
        with JAX 0.12 `jax.jit` by itself rounds normal values of 3 to 5 columns otherwise than those of more (3 ulp at
        most), which a plan, of one device too, does not.

        Returns:
            What the factory makes; nnx lists of blocks that `FSDP(blocks=...)` names are a `jp.Stack` in it.

        Raises:
            ShardingError: The plan's hardware is not attached.
        """
        self._check_attached("init")
        shardings = {path: self.sharding(record.storage) for path, record in self.records.items()}
        options = _birth.CPU_OPTIONS if self.mesh.devices.flat[0].platform == "cpu" else None
        return self.birth.build(jax.jit(self.birth.make, out_shardings=shardings, compiler_options=options)())

    def abstract(self) -> PyTree:
        """The model as shapes with shardings, for `.lower` of a step and for `jax.eval_shape`; allocates nothing."""
        return self.birth.build(
            {
                path: jax.ShapeDtypeStruct(record.shape, record.dtype, sharding=self.sharding(record.storage))
                for path, record in self.records.items()
            }
        )

    def shard(self, tree: PyTree) -> PyTree:
        """Place a model that exists already, or any state of it, as the plan says: each leaf is moved once.

        In a plain pytree, what lies in a NamedTuple (all of Optax's states) or is not floating may be unknown to the
        plan, and is then whole on every device.

        nnx modules are changed in place and returned. A list of blocks that the plan stacks must be stacked already:
        load weights into `plan.init()`'s model by `nnx.update`, or make the weights in the factory.

        Raises:
            ShardingError: A parameter the plan does not have, every one at once.
        """
        self._check_attached("shard")
        flat = _tree.flatten(tree)
        slots = optimizer_paths(tree)
        unknown = [
            f"{path} {tuple(np.shape(leaf))}{self._shape_here(path)}"
            for path, leaf in flat.leaves.items()
            if self._must_know(path, leaf, flat, slots) and not self._knows(path, np.shape(leaf))
        ]
        if unknown:
            raise ShardingError(
                f"the plan has no parameter for\n{listed(unknown)}\nPlan this model: jp.plan(lambda: Model(...), ...)."
            )
        placed = {
            path: jax.device_put(leaf, self._sharding_of(path, leaf, flat, slots)) for path, leaf in flat.leaves.items()
        }
        return _tree.replace(tree, placed)

    def shardings(self, tree: PyTree) -> PyTree:
        """A `NamedSharding` for each array and number of `tree`: a model, optimiser state, a `TrainState`, gradients.

        Returns:
            For a pytree the same structure; for nnx objects a dict by path.
        """
        flat = _tree.flatten(tree)
        slots = optimizer_paths(tree)
        found = {path: self._sharding_of(path, leaf, flat, slots) for path, leaf in flat.leaves.items()}
        if flat.kinds:
            return found
        whole = self.sharding(PartitionSpec())
        return jax.tree.map(lambda leaf: whole if isinstance(leaf, int | float) else leaf, flat.build(found))

    def jit(
        self,
        step: Callable[..., Any] | None = None,
        *,
        donate: bool = True,
        donate_argnums: int | Sequence[int] = (),
        on_recompile: Literal["warn", "error", "allow"] = "warn",
        compiler_options: dict[str, Any] | None = None,
    ) -> Any:
        """Compile a step over modules, optimisers, train states or any pytrees, every state leaf pinned to this plan.

        In place of `nnx.jit` or `jax.jit`, also as a decorator. nnx objects are updated in place. What goes in comes
        out alike, counters and random-number state too, so a loop compiles once. What the step returns beside its
        state lies with the parameter it belongs to (gradients), with the batch, or whole (scalars).

        Args:
            step: Any function of state and batch.
            donate: Whether the arrays of nnx arguments are given to the compiler, which updates them in place: arrays
                taken out of the model before the step are gone after it.
            donate_argnums: Positions of pytree arguments to give away too, as in `jax.jit`.
            on_recompile: What to do when a later call needs another compilation: `"warn"` names the cause in the log,
                `"error"` raises instead.
            compiler_options: XLA options of this step, as in `jax.jit`.

        Raises:
            StepError: From a call: see the messages of `jaxpar._step`.

        Example:
            >>> import optax
            >>> plan = jp.plan(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jp.mesh(fsdp=-1), [jp.FSDP()])
            >>> model = plan.init()
            >>> opt = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
            >>> @plan.jit
            ... def train_step(model, opt, x):
            ...     loss, grads = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
            ...     opt.update(model, grads)
            ...     return loss
            >>> first = train_step(model, opt, plan.batch(np.ones((8, 64), np.float32)))
            >>> bool(train_step(model, opt, plan.batch(np.ones((8, 64), np.float32))) < first)
            True
        """

        def make(step: Callable[..., Any]) -> StepFunction:
            numbers = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
            return StepFunction(
                self,
                step,
                donate=donate,
                donate_argnums=numbers,
                on_recompile=on_recompile,
                compiler_options=compiler_options,
            )

        return make if step is None else make(step)

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` once, its result placed by this plan: an optimiser's state, born sharded."""
        step = StepFunction(
            self, function, donate=False, donate_argnums=(), on_recompile="allow", compiler_options=None, reads=False
        )
        return step(*args)

    def batch(self, batch: PyTree) -> PyTree:
        """The global batch from this process's part of it, its first dim split over the batch axes.

        With one process that is the whole batch; processes that hold the same rows, because another axis runs across
        them, each give these. Moves each row once, from host to the device that needs it. Scalars
        are replicated. Where a plan splits sequences (`CP`), so is the second dim of each array, and its order may
        become another, the same for all: `unbatch` undoes it.

        Args:
            batch: Any pytree of arrays with one leading size, on host or device.

        Raises:
            ShardingError: Arrays of different leading sizes, or a size that the batch axes do not divide, with the
                nearest sizes that fit; sequences that do not divide, or a new order without `positions` to tell it.

        Example:
            >>> plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=-1), [jp.DP()])
            >>> plan.batch({"x": np.zeros((16, 3))})["x"].sharding.spec
            P('data',)
        """
        self._check_attached("batch")
        flat = _tree.flatten(batch)
        _check_batch(flat.leaves, self)
        leaves = flat.leaves if self.context is None else self.context.arrange(flat.leaves)
        parts = _row_parts(self)

        def place(path: str, leaf: Any) -> jax.Array:
            if np.ndim(leaf) == 0:
                return jax.device_put(leaf, self.sharding(PartitionSpec()))
            where = self.batch_placement(path, np.shape(leaf))
            if parts == 1:
                return jax.device_put(leaf, where)
            shape = (leaf.shape[0] * parts, *leaf.shape[1:])
            return jax.make_array_from_process_local_data(where, np.asarray(leaf), shape)

        return flat.build({path: place(path, leaf) for path, leaf in leaves.items()})

    def unbatch(self, outputs: PyTree) -> PyTree:
        """What a step returned for each token, `[batch, seq, ...]`, with its tokens in the order of the sequence.

        Undoes what `batch` does for `CP(balance="zigzag")`; without that nothing changes. Moves half of each device's
        part to another.

        Example:
            >>> plan = jp.plan(lambda: {"w": jnp.ones((4, 4))}, jp.mesh(context=-1), [jp.CP()])
            >>> batch = plan.batch({"positions": np.arange(16)[None]})
            >>> batch["positions"][0, :8].tolist(), plan.unbatch(batch["positions"])[0, :8].tolist()
            ([0, 15, 1, 14, 2, 13, 3, 12], [0, 1, 2, 3, 4, 5, 6, 7])
        """
        split = self.context
        return outputs if split is None else jax.tree.map(split.restore, outputs)

    def records_of(self, optimizer: Any) -> dict[str, Record]:
        """Records of the state that `optimizer` keeps for this plan's trained parameters."""
        model = self.birth.build(self.birth.shapes)
        if _tree.is_graph(model):
            from flax import nnx

            params = nnx.as_pure(nnx.state(model, self.trainable))
        else:
            is_state = hasattr(model, "params") or (isinstance(model, dict) and "params" in model)
            params = model["params"] if isinstance(model, dict) and is_state else getattr(model, "params", model)
            params = self.trained(params, prefix="params." if is_state else "")
        shapes = _tree.leaves(jax.eval_shape(optimizer.init, params))
        return {path: slot_record(path, shape, self.matcher) for path, shape in shapes.items()}

    def trained(self, params: PyTree, *, prefix: str = "") -> PyTree:
        """The trained parameters of a plain pytree, which keeps its structure: all else in it is `None`, as for Optax.

        What is not trained are frozen parameters, and what is no parameter: functions and integers, as in Equinox.
        """
        trained = {path for path, record in self.records.items() if record.slot == "parameter"}
        return _tree.only(params, {path for path in _tree.leaves(params) if prefix + path in trained})

    def draw(self, path: str | None = None) -> Any:
        """A picture of which device holds which tile: of one leaf, or of the largest ones."""
        from ._draw import draw

        return draw(self, path)

    def _sharding_of(self, path: str, leaf: Any, flat: _tree.Flat, slots: set[str]) -> NamedSharding:
        kind = flat.kinds.get(path)
        if kind is not None:
            if not (_is_parameter(kind) or _is_optimizer(kind)):
                return self.sharding(PartitionSpec())
            is_slot = _is_optimizer(kind)
        else:
            is_slot = path in slots
        match = self.matcher.match(path, leaf.shape)
        if match is None:
            return self.sharding(PartitionSpec())
        return self.sharding(match.slots if is_slot else match.storage)

    def _must_know(self, path: str, leaf: Any, flat: _tree.Flat, slots: set[str]) -> bool:
        """Whether a leaf that is to be placed can only be a parameter."""
        if path in flat.kinds:
            return _is_parameter(flat.kinds[path])
        known = self.records.get(path)
        if known is not None and known.slot not in ("parameter", "frozen"):
            return False
        return path not in slots and np.ndim(leaf) > 0 and jnp.issubdtype(leaf.dtype, jnp.inexact)

    def _knows(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether the plan has a parameter at `path`, or one that ends so, of this shape: part of a model may come."""
        match = self.matcher.match(path, shape)
        return match is not None and (match.is_parameter or f".{match.record.path}".endswith(f".{path}"))

    def _shape_here(self, path: str) -> str:
        return f": here it is {self.records[path].shape}" if path in self.records else ""

    def _check_attached(self, what: str) -> None:
        if not isinstance(self.mesh, Mesh):
            raise ShardingError(
                f"plan.{what}: this plan is for hardware that is not attached here ({self.hardware}). It can be "
                f"printed, "
                "drawn and compared; to run it, make the mesh from attached devices or from jp.simulate(n)."
            )

    @property
    def schedule(self) -> Any:
        """The schedule of the pipeline; only if there is one."""
        pipeline = self.strategy(PP)
        return pipeline.schedule_for(self.axes[pipeline.axis])

    def strategy(self, kind: type) -> Any:
        """The strategy of a type that is active here, or `None`."""
        inactive = {label for label, _ in self.inactive}
        return next((each for each in self.values if isinstance(each, kind) and each.label not in inactive), None)


@dataclasses.dataclass(frozen=True)
class _Trainable:
    """An nnx filter by path; hashable, as an optimiser's `wrt` must be."""

    paths: frozenset[str]

    def __call__(self, keys: Any, value: Any) -> bool:
        return _tree.path_of(tuple(keys)) in self.paths


def _is_parameter(kind: type) -> bool:
    from flax import nnx

    return issubclass(kind, nnx.Param)


def _is_optimizer(kind: type) -> bool:
    from flax import nnx

    return issubclass(kind, nnx.OptState)


def _cut(pipeline: PP, sizes: dict[str, int], stack: Any, path: str) -> None:
    """Lay a stack out for the stages of a pipeline."""
    pipeline.check_layers(stack.num, sizes[pipeline.axis], path)
    if pipeline.num_chunks > 1:
        stack.cut(pipeline.num_chunks)


def _leaf(path: str, birth: Birth, is_trained: _rules.Predicate) -> _rules.Leaf:
    shape = birth.shapes[path]
    alias = birth.aliases.get(path, path)
    return _rules.Leaf(
        path=path,
        shape=shape.shape,
        itemsize=shape.dtype.itemsize,
        alias=alias,
        layers=birth.layers.get(path, 0),
        names=birth.names.get(path),
        owner=birth.owners.get(path, ""),
        trainable=is_trained(alias),
    )


def _record(path: str, birth: Birth, draft: _rules.Draft, precision: Precision) -> Record:
    shape = birth.shapes[path]
    leaf = draft.leaves.get(path)
    if leaf is None:
        return Record(path=path, shape=shape.shape, dtype=as_dtype(shape.dtype), slot=birth.slots[path])
    floating = jnp.issubdtype(shape.dtype, jnp.floating)
    return Record(
        path=path,
        shape=shape.shape,
        dtype=as_dtype(shape.dtype),
        slot="parameter" if leaf.trainable else "frozen",
        storage=as_spec(leaf.storage),
        compute=as_spec(leaf.compute),
        gradient=as_spec(leaf.gradient),
        slots=as_spec(leaf.slots),
        compute_dtype=as_dtype(precision.compute or shape.dtype) if floating else as_dtype(shape.dtype),
        role=leaf.role or (TABLE if _rules.is_table(leaf) else ""),
        layers=leaf.layers,
        remat=path in birth.remat,
        reasons=tuple(leaf.reasons),
    )


def _stacked_note(records: dict[str, Record], birth: Birth) -> list[str]:
    """A note of leaves of a plain pytree that stack layers: when they are gathered is for the loss to say."""
    if _tree.is_graph(birth.build(birth.shapes)):
        return []
    stacked = [record for record in records.values() if record.layers and record.compute != record.storage]
    names = ", ".join(record.path for record in stacked[:3]) + (", ..." if len(stacked) > 3 else "")
    note = (
        f"stacked layers: {names} {'is' if len(stacked) == 1 else 'are'} gathered one layer at a time where the loss "
        "calls jp.gather(layer) in its scan over them (and once more where that is rematerialised), all at once where "
        "it does not."
    )
    return [note] if stacked else []


def _describe(strategy: Strategy) -> str:
    """A strategy with the settings that are not its defaults."""
    shown = []
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        if not field.kw_only:
            shown.append(repr(value))
        elif value != field.default:
            shown.append(f"{field.name}={value.__name__ if callable(value) else repr(value)}")
    return f"{type(strategy).__name__}({', '.join(shown)})"


def _in_mesh_order(sizes: dict[str, int], axes: Any) -> Axes:
    chosen = set(axes)
    return tuple(axis for axis in sizes if axis in chosen and sizes[axis] > 1)


def _in_order(sizes: dict[str, int], dim: str, axes: Any, draft: _rules.Draft) -> Axes:
    """Axes of a dim in the order of the mesh; of a sequence the parts that attention sees whole come first."""
    ordered = _in_mesh_order(sizes, axes)
    outer = draft.context.axis if dim == "seq" and draft.context is not None else None
    return tuple(sorted(ordered, key=lambda axis: axis != outer))


def _row_parts(plan: BoundPlan) -> int:
    """Into how many parts the processes split a batch's rows: fewer than processes where several hold the same rows."""
    if jax.process_count() == 1:
        return 1
    held: dict[int, set[Any]] = {}
    for device, (rows,) in plan.batch_sharding.devices_indices_map((plan.num_batch_shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.start)
    return len({frozenset(rows) for rows in held.values()})


def _check_batch(leaves: dict[str, Any], plan: BoundPlan) -> None:
    rows = {path: np.shape(leaf)[0] for path, leaf in leaves.items() if np.ndim(leaf)}
    if len(set(rows.values())) > 1:
        shown = listed([f"{path or 'the array'}: {number} rows" for path, number in rows.items()])
        raise ShardingError(
            f"the arrays of a batch have different leading sizes:\n{shown}\nGive each the batch as first dim."
        )
    number = next(iter(rows.values()), 0) * _row_parts(plan)
    parts = plan.num_batch_shards
    if number % parts:
        below = number // parts * parts
        fits = f"{below} or {below + parts}" if below else f"{parts}"
        axes = " x ".join(f"{axis} {plan.axes[axis]}" for axis in plan.batch_axes)
        raise ShardingError(
            f"a batch of {number} does not divide over {parts} devices ({axes}). Use a batch of {fits}, or fill it "
            f"up with "
            "rows of weight 0: jp.data.pad_batch(batch, to)."
        )
