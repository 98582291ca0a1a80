"""A user's own training step, compiled once with every state leaf pinned to the plan."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _calls, _context, _planned, _scopes, _traits, _waits
from ._birth import no_eager_sharding
from ._branches import refuse_stuck
from ._calls import Call, Place, Result
from ._errors import ShardingError, StepError, listed
from ._plan import TABLE, Record, gradient_route
from ._plan_text import bytes_text
from ._planned import GATHERED, LAYER_GATHERED, Traced
from ._sequence import PLACED
from ._slots import Match
from .parallel import PP, TP

logger = logging.getLogger("jaxpar")


@dataclasses.dataclass
class _Compiled:
    """One compilation: the jitted function over arrays, where its arrays go in, and how its result is put together.

    Attributes:
        function: From arrays to the changed ones of nodes, then those of the result.
        shardings: Where each array goes in.
        changed: Which of the nodes' arrays the step changes: no other is given away or comes back.
        donated: Which arrays are given away.
        result: How the result is put together.
        notes: What the plan did.
        ends: Whether it is known that no device waits without end for another.
    """

    function: Any
    shardings: list[Any]
    changed: tuple[int, ...]
    donated: tuple[int, ...]
    result: Result
    notes: tuple[str, ...]
    ends: bool

    def __call__(self, call: Call) -> Any:
        arrays, moved = list(call.arrays), {}
        for index, (array, sharding) in enumerate(zip(call.arrays, self.shardings, strict=True)):
            if getattr(array, "sharding", None) != sharding:
                arrays[index] = jax.device_put(array, sharding)
                if index < call.num_node_arrays:
                    moved[index] = arrays[index]
        values, result = self.run(arrays, call.nodes)
        _calls.update_nodes(call.nodes, {**moved, **values})
        return result

    def run(self, arrays: list[Any], nodes: tuple[Any, ...]) -> tuple[dict[int, Any], Any]:
        """The changed arrays of nodes by their place, and the result, from placed arrays."""
        if len({id(arrays[index]) for index in self.donated}) < len(self.donated):
            arrays = _apart(arrays, self.donated)
        with _waits.inside():
            values = self.function(*arrays)
        num = len(self.changed)
        return dict(zip(self.changed, values[:num], strict=True)), self.result.assemble(values[num:], nodes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flat:
    """A step over arrays alone, for one set of arguments: what is compiled, and what each array is.

    Attributes:
        function: Jitted; its arguments are `shapes`.
        shapes: Of every array that goes in.
        places: Where in the arguments each is.
        records: What the plan says of each; `None` where nothing.
        shardings: Where each lies.
        donated: Which are given away.
        options: XLA options of the step.
        notes: What the plan did.
    """

    function: Any
    shapes: list[jax.ShapeDtypeStruct]
    places: list[Place]
    records: list[Any]
    shardings: list[Any]
    donated: tuple[int, ...]
    options: dict[str, Any]
    notes: tuple[str, ...]


class StepFunction:
    """What `plan.jit` returns: call it as the step it was made from.

    Attributes:
        plan: The plan it keeps to.
        function: What it was made from.
        num_compilations: How often it was compiled; 1 after the first call, if nothing changes.
        recompilations: For each compilation after the first, what had changed since the call before, a line each.
        notes: What the plan did in the step compiled last that a reader should know, such as the form of accumulation.
    """

    def __init__(
        self,
        plan: Any,
        function: Callable[..., Any],
        *,
        donate: bool,
        donate_argnums: tuple[int, ...],
        on_recompile: Literal["warn", "error", "allow"],
        compiler_options: dict[str, Any] | None,
        reads: bool = True,
    ):
        if on_recompile not in ("warn", "error", "allow"):
            raise StepError(f"plan.jit: on_recompile={on_recompile!r}. Use 'warn', 'error' or 'allow'.")
        self.plan = plan
        self.function = function
        self._names = _calls.argument_names(function)
        self._donate = donate
        self._donate_argnums = donate_argnums
        self._on_recompile = on_recompile
        self._options = compiler_options
        self._must_read = reads
        self._matches: dict[tuple[Place, tuple[int, ...], Any], Match | None] = {}
        self._compiled: dict[Any, _Compiled] = {}
        self._last: tuple[Any, list[Place]] | None = None
        self.recompilations: list[list[str]] = []
        self._glance: tuple[_calls.Glance, _Compiled] | None = None
        self.__name__ = getattr(function, "__name__", "step")
        self.__doc__ = function.__doc__

    @property
    def num_compilations(self) -> int:
        """How often the step was compiled."""
        return len(self._compiled)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan did in the step compiled last."""
        return tuple(self._compiled.values())[-1].notes if self._compiled else ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.plan.mesh, Mesh):
            raise StepError(
                f"{self.__name__}: this plan is for {self.plan.hardware or 'hardware'} that is not attached here, so "
                f"it can "
                "be looked at but not run. Make the mesh from attached devices, or from jp.simulate(n)."
            )
        if self._glance is not None:
            glance, compiled = self._glance
            alike = glance.look(args, kwargs)
            if alike is not None:
                values, result = compiled.run(*alike)
                glance.update(values)
                return result
        call = _calls.take_apart(self._names, args, kwargs)
        compiled = self._get(call)
        if not compiled.ends:
            # JAX keeps what it compiles here for the call, whose arrays have these types and places.
            placed = [
                jax.ShapeDtypeStruct(each.shape, each.dtype, weak_type=each.weak_type, sharding=sharding)
                for each, sharding in zip(_shapes(call), compiled.shardings, strict=True)
            ]
            program = compiled.function.lower(*placed).compile()
            refuse_stuck(self.__name__, program, self.plan.mesh)
            compiled.ends = True
        result = compiled(call)
        glance = _calls.Glance.of(call, compiled.shardings, args, kwargs)
        self._glance = None if glance is None else (glance, compiled)
        return result

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lower the step for these arguments, arrays or `jax.ShapeDtypeStruct`s, without running it."""
        flat = self.flat(*args, **kwargs)
        return flat.function.lower(*flat.shapes)

    def flat(self, *args: Any, **kwargs: Any) -> Flat:
        """The step for these arguments as a function of arrays alone, and what is known of each array."""
        call = _calls.take_apart(self._names, args, kwargs)
        compiled = self._get(call)
        return Flat(
            function=compiled.function,
            shapes=_shapes(call),
            places=call.places,
            records=[
                match and match.record
                for match in (self._match(place, array) for place, array in zip(call.places, call.arrays, strict=True))
            ],
            shardings=compiled.shardings,
            donated=compiled.donated,
            options=self._options or {},
            notes=compiled.notes,
        )

    def on(self, plan: Any) -> "StepFunction":
        """The same step under another plan of the same model; nothing of it is compiled yet."""
        return StepFunction(
            plan,
            self.function,
            donate=self._donate,
            donate_argnums=self._donate_argnums,
            on_recompile="allow",
            compiler_options=self._options,
            reads=self._must_read,
        )

    def _get(self, call: Call) -> _Compiled:
        shardings = [self._input_sharding(array, place) for array, place in zip(call.arrays, call.places, strict=True)]
        key = (call.static, tuple(map(_calls.type_of, call.arrays)), tuple(shardings[call.num_node_arrays :]))
        compiled = self._compiled.get(key)
        if compiled is None:
            self._guard(key, call.places)
            compiled = self._compiled[key] = self._build(call, shardings)
        self._last = (key, call.places)
        return compiled

    def _guard(self, key: Any, places: list[Place]) -> None:
        """Say what makes this call need another compilation than the last."""
        if self._last is None:
            return
        changes = _differences(self._last, (key, places))
        if self._on_recompile != "error":
            self.recompilations.append(changes)
        if self._on_recompile == "allow":
            return
        message = f"{self.__name__} is compiled again, now {len(self._compiled) + 1} times, because\n{listed(changes)}"
        if self._on_recompile == "error":
            raise StepError(
                f"{message}\nKeep shapes, dtypes and settings the same from call to call (jp.data.pad_batch for a last "
                "batch), or allow it: plan.jit(..., on_recompile='allow')."
            )
        logger.warning("%s", message)

    def _build(self, call: Call, shardings: list[NamedSharding]) -> _Compiled:
        plan = self.plan
        found = [self._match(place, array) for place, array in zip(call.places, call.arrays, strict=True)]
        _check_parameters(call, found)
        traced: dict[str, Any] = {}

        def trace(region: Traced) -> Any:
            def pure(*arrays: Any) -> list[Any]:
                args, kwargs, nodes = call.rebuild(arrays)
                before = _calls.graphdef_of(nodes)
                variables = _parameters_of(nodes, call, found)
                given = _calls.by_name(self._names, args, kwargs)
                bare = [(*pair, pair[1].get_raw_value()) for pair in _calls.bare_variables(given)]
                named = _scopes.named(nodes)
                with no_eager_sharding(), _planned.planned(variables), _context.entered(region), named:
                    out = self.function(*args, **kwargs)
                    out_arrays, traced["result"] = _calls.take_result_apart(out, nodes)
                _check_structure(self.__name__, before, _calls.graphdef_of(nodes))
                _check_bare(self.__name__, bare)
                return [*_calls.node_arrays(nodes), *out_arrays]

            jaxpr = jax.make_jaxpr(pure)(*call.arrays)
            region.values.clear()
            return jaxpr

        region = Traced(plan=plan)
        jaxpr = trace(region)
        tables = self._unforeseen_tables(found, call, jaxpr.jaxpr)
        if tables:
            region = Traced(plan=plan, tables=tables)
            jaxpr = trace(region)
            region.notes.append(
                f"looked up by index, which the plan did not foresee: {', '.join(sorted(tables))}; these gradients are "
                "summed whole, as a table's"
            )
        if self._must_read:
            self._check_reads(found, call, _traits.contracted(jaxpr.jaxpr))
            self._check_sequence(region, jaxpr.jaxpr)
            self._note_gathers(region, found, call, jaxpr.jaxpr)
        for warning in dict.fromkeys(region.warnings):
            logger.warning("%s", warning)
        result: Result = traced["result"]
        num = call.num_node_arrays
        before, after = jaxpr.jaxpr.invars[:num], jaxpr.jaxpr.outvars[:num]
        changed = tuple(index for index in range(num) if before[index] is not after[index])
        shapes = [np.shape(array) for array in call.arrays]
        by_row, by_token = (
            {
                shape[:ndim]
                for shape, each in zip(shapes, shardings, strict=True)
                if each == where and len(shape) >= ndim
            }
            for ndim, where in ((1, plan.batch_sharding), (2, plan.token_sharding))
        )
        rows = by_row | {shape[:1] for shape in by_token} | by_token
        out_shardings = [shardings[index] for index in changed] + [
            self._output_sharding(place, aval, rows)
            for place, aval in zip(result.places, jaxpr.out_avals[num:], strict=True)
        ]
        donated = self._donated(call, changed)
        function = jax.jit(
            _named(jax_core.jaxpr_as_fun(jaxpr), self.__name__, [*changed, *range(num, len(jaxpr.out_avals))]),
            in_shardings=shardings,
            out_shardings=out_shardings,
            donate_argnums=donated,
            compiler_options=self._options,
        )
        in_stages = plan.strategy(PP) is not None  # whose branches some devices take and others do not
        return _Compiled(function, shardings, changed, donated, result, tuple(region.notes), ends=not in_stages)

    def _match(self, place: Place, array: Any) -> Match | None:
        key = (place, np.shape(array), getattr(array, "dtype", None))
        if key not in self._matches:
            self._matches[key] = _match(self.plan, *key)
        return self._matches[key]

    def _input_sharding(self, array: Any, place: Place) -> NamedSharding:
        plan = self.plan
        match = self._match(place, array)
        if match is not None:
            return plan.sharding(match.slots if place.is_slot else match.storage)
        own = getattr(array, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh == plan.mesh and place.kind is None:
            return plan.sharding(own.spec)
        size = math.prod(plan.axes[axis] for axis in plan.batch_axes)
        shape = np.shape(array)
        has_rows = size > 1 and len(shape) > 0 and _looks_like_batch(array, size)
        has_tokens = plan.context is not None and len(shape) > 1 and shape[1] % plan.context.size == 0
        if place.kind is None and not place.is_slot and (has_rows or has_tokens):
            raise StepError(
                f"{place.path}: an array of shape {shape} that is not on the plan's mesh would be copied whole to all "
                f"{plan.num_devices} devices. Split the batch with plan.batch(...) before the step, or replicate on "
                "purpose with jax.device_put(x, plan.sharding(P()))."
            )
        return plan.sharding(PartitionSpec())

    def _output_sharding(self, place: Place, aval: Any, rows: set[tuple[int, ...]]) -> NamedSharding:
        """Where something that a step returns lies: with its parameter, with the batch, or whole if it is a scalar.

        `rows` are the numbers of rows of what was split by rows, and with their tokens of what was split by these too.
        """
        plan = self.plan
        match = self._match(place, aval)
        if match is not None:
            return plan.sharding(match.slots if place.is_slot else match.storage)
        if not aval.shape or place.kind is not None or place.is_slot:
            return plan.sharding(PartitionSpec())
        size = math.prod(plan.axes[axis] for axis in plan.batch_axes)
        if aval.shape[:2] in rows and aval.ndim > 1 and aval.shape[0] % size == 0:
            return plan.token_sharding
        if aval.shape[:1] in rows and aval.shape[0] % size == 0:
            return plan.batch_sharding
        return plan.sharding(PartitionSpec())

    def _donated(self, call: Call, changed: tuple[int, ...]) -> tuple[int, ...]:
        donated = list(changed) if self._donate else []
        names = {self._names[index] if index < len(self._names) else f"arg{index}" for index in self._donate_argnums}
        for index, place in enumerate(call.places[call.num_node_arrays :], call.num_node_arrays):
            if place.path.partition(".")[0] in names:
                donated.append(index)
        return tuple(donated)

    def _check_reads(self, found: list[Match | None], call: Call, contracted: set[int]) -> None:
        """Sharded parameters that are multiplied as they lie, rather than as the plan has them read."""
        sharded = {
            index: match.record.path
            for index, (place, match) in enumerate(zip(call.places, found, strict=True))
            if match is not None and not place.is_slot and match.record.compute != match.record.storage
        }
        unread = sorted(path for index, path in sharded.items() if index in contracted)
        if unread and len(unread) == len(sharded):
            raise StepError(
                f"{self.__name__}: none of the {len(sharded)} sharded parameters is read through the plan, so the "
                "compiler may gather activations instead of weights. Differentiate the loss with "
                "jp.value_and_grad(loss) in place of jax.value_and_grad(loss), or read parameters by jp.gather(params)."
            )
        if unread:
            logger.warning(
                "%s: %d of %d sharded parameters are used without being read through the plan: %s. Read them by "
                "jp.gather, or as variables of the model.",
                self.__name__,
                len(unread),
                len(sharded),
                ", ".join(unread[:5]),
            )

    def _unforeseen_tables(self, found: list[Match | None], call: Call, jaxpr: Any) -> frozenset[str]:
        """Parameters that the step looks up by index, and whose gradients would go another way if the plan knew."""
        crossed = self.plan.token_axes

        def differs(record: Record) -> bool:
            routes = (gradient_route(self.plan, record, crossed, table=table) for table in (False, True))
            return record.slot == "parameter" and record.role != TABLE and len(set(routes)) > 1

        maybe = {
            index: match.record.path
            for index, (place, match) in enumerate(zip(call.places, found, strict=True))
            if match is not None and not place.is_slot and differs(match.record)
        }
        return frozenset(maybe[index] for index in _traits.looked_up(jaxpr) & maybe.keys()) if maybe else frozenset()

    def _note_gathers(self, region: Traced, found: list[Match | None], call: Call, jaxpr: Any) -> None:
        """What a reader should know of how the parameters of plain pytrees are gathered."""
        moved = {
            index: match.record
            for index, (place, match) in enumerate(zip(call.places, found, strict=True))
            if match is not None and place.kind is None and not place.is_slot and _is_moved(match.record)
        }
        if not moved:
            return
        met = _traits.tags_met(jaxpr, (GATHERED, LAYER_GATHERED))
        ways = {index: met[index] for index in moved if index in met}
        twice = [moved[index].path for index, way in ways.items() if any(len(names) > 1 for names in way)]
        stacked = {index: way for index, way in ways.items() if moved[index].layers}
        whole = [moved[index] for index, way in stacked.items() if (GATHERED,) in way]
        apart = [moved[index].path for index, way in stacked.items() if way == {(LAYER_GATHERED,)}]
        if apart:
            region.notes.append(f"gathered one layer at a time, where the loss calls jp.gather: {_few(apart)}")
        if whole:
            size = sum(
                math.prod(self.plan.local_shape(each.shape, each.compute)) * each.dtype.itemsize for each in whole
            )
            region.notes.append(
                f"gathered whole, all layers at once, {bytes_text(size)} a device: "
                f"{_few([each.path for each in whole])}. To hold one layer at a time, call jp.gather(layer) in the "
                "body of the scan over them, and jp.remat it"
            )
        if twice:
            self._warn(region, f"gathered, and then gathered again: {_few(twice)}. Call jp.gather once for each use")
        if _traits.kept_by_scans(jaxpr, LAYER_GATHERED):
            self._warn(
                region,
                "layers gathered in a scan are all kept whole for its backward pass. Rematerialise its body: "
                'jax.lax.scan(jp.remat(body, "full"), ...)',
            )

    def _warn(self, region: Traced, note: str) -> None:
        region.notes.append(note)
        region.warnings.append(f"{self.__name__}: {note}.")

    def _check_sequence(self, region: Traced, jaxpr: Any) -> None:
        strategy, split = self.plan.strategy(TP), self.plan.context
        if split is not None and not region.attends and _traits.find(jaxpr, ("exp",)) and "seq" in region.dims:
            self._warn(
                region,
                f"sequences are split over {split.axis!r}, but nothing here calls jp.attention: if the model attends "
                "in another way, the compiler gathers what it needs",
            )
        if split is not None and split.zigzag and _traits.named_alone(jaxpr, PLACED):
            raise StepError(
                f"{self.__name__}: jp.attention is given positions that come from no argument of this step, such as "
                f"jnp.arange, but this plan brings batches in zigzag order over {split.axis!r}. Give it, and all else "
                'that goes by positions, those of the batch; or use CP(balance="none").'
            )
        if split is not None and "seq" not in region.dims and _traits.find(jaxpr, ("dot_general",)):
            raise StepError(
                f"{self.__name__}: CP splits sequences over {split.axis!r}, but nothing in this step says which dim of "
                'an activation that is. Say it in the model, jp.constrain(x, "batch", "seq", "embed"), and attend by '
                "jp.attention."
            )
        if strategy is None or not strategy.sequence or "seq" in region.dims:
            return
        if _traits.find(jaxpr, ("dot_general",)):  # it runs a model: not the step of an average, say
            raise StepError(
                f"{self.__name__}: {strategy.label} splits the sequence dim of activations (sequence=True), but "
                "nothing in this step says which dim that is. Say it in the model, "
                'jp.constrain(x, "batch", "seq", "embed"), or stack its blocks, FSDP(blocks="blocks.*") or jp.Stack; '
                "or leave sequence out."
            )


def _shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    types = map(_calls.type_of, call.arrays)
    return [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in types]


def _is_moved(record: Record) -> bool:
    return record.slot in ("parameter", "frozen") and record.compute != record.storage


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _apart(arrays: list[Any], donated: tuple[int, ...]) -> list[Any]:
    """`arrays` with a copy wherever two share one buffer, which can be given away only once."""
    seen: set[int] = set()
    arrays = list(arrays)
    for index in donated:
        if id(arrays[index]) in seen:
            arrays[index] = arrays[index].copy()
        seen.add(id(arrays[index]))
    return arrays


def _named(function: Callable[..., Any], name: str, kept: list[int]) -> Callable[..., Any]:
    """The outputs `kept` of `function`, under the user's own name, which profiles and compiler dumps then show."""

    def step(*arrays: Any) -> Any:
        out = function(*arrays)
        return [out[index] for index in kept]

    step.__name__ = step.__qualname__ = name
    return step


def _match(plan: Any, place: Place, shape: tuple[int, ...], dtype: Any) -> Match | None:
    if place.kind is None and not place.is_slot and dtype in _INDICES:
        return None  # tokens or positions of a batch, which may well have the name and the shape of a parameter
    if place.kind is None or place.is_slot:
        return plan.matcher.match(place.path, shape)
    if not _is_parameter(place.kind):
        return None
    match = plan.matcher.match(place.path, shape)
    if match is None:
        return None
    inside_argument = place.path.partition(".")[2]
    whole = f".{place.path}".endswith(f".{match.record.path}")
    return match if whole or f".{match.record.path}".endswith(f".{inside_argument}") else None


_INDICES = (np.dtype(np.int32), np.dtype(np.int64))  # narrower integers may be quantised state of an optimiser


def _is_parameter(kind: type) -> bool:
    from flax import nnx

    return issubclass(kind, nnx.Param)


def _parameters_of(nodes: tuple[Any, ...], call: Call, found: list[Match | None]) -> list[tuple[str, Any]]:
    """The nnx variables of `nodes` that are parameters of the plan, with the plan's path."""
    if not nodes:
        return []
    by_path = {
        place.path: match.record.path
        for place, match in zip(call.places[: call.num_node_arrays], found, strict=False)
        if match is not None and place.kind is not None and _is_parameter(place.kind)
    }
    return [
        (by_path[place.path], variable)
        for variable, place in zip(_calls.variables_of(nodes), call.places[: call.num_node_arrays], strict=True)
        if place.path in by_path and variable is not None
    ]


def _check_parameters(call: Call, found: list[Match | None]) -> None:
    unknown = [
        f"{place.path} {np.shape(array)}"
        for place, array, match in zip(call.places, call.arrays, found, strict=True)
        if match is None and place.kind is not None and not place.is_slot and _is_parameter(place.kind)
    ]
    if unknown:
        raise ShardingError(
            f"the plan has no parameter for\n{listed(unknown)}\nPlan all models of a step together, "
            "jp.plan(lambda: (Model(...), Other(...)), ...), and make them by plan.init() or place them by "
            "plan.shard(...)."
        )


def _check_structure(name: str, before: Any, after: Any) -> None:
    if before != after:
        raise StepError(
            f"{name}: the step adds, removes or renames variables, or changes a static attribute, of a module it was "
            "given. Make them before the step; call model.train() or model.eval() outside of it."
        )


def _check_bare(name: str, bare: list[tuple[str, Any, Any]]) -> None:
    changed = [path for path, variable, value in bare if variable.get_raw_value() is not value]
    if changed:
        raise StepError(
            f"{name}: the step changes variables in place that are in no module: {', '.join(changed[:3])}. Only "
            "modules are updated in place: return the new state, or give the module itself."
        )


def _looks_like_batch(array: Any, size: int) -> bool:
    dtype = getattr(array, "dtype", None)
    is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    raw_key = dtype == np.uint32 and np.shape(array) in ((2,), (4,))
    return not is_key and not raw_key and np.shape(array)[0] % size == 0 and np.shape(array)[0] > 0


def _differences(last: tuple[Any, list[Place]], now: tuple[Any, list[Place]]) -> list[str]:
    """What differs between two calls, a line each."""
    (last_key, last_places), (key, places) = last, now

    def said(key: Any, places: list[Place]) -> dict[str, tuple[str, Any]]:
        nodes = len(places) - len(key[2])
        lies = [None] * nodes + [sharding.spec for sharding in key[2]]
        return {
            place.path: (f"{dtype}{list(shape)}{' (weakly typed)' if weak else ''}", spec)
            for place, (shape, dtype, weak), spec in zip(places, key[1], lies, strict=True)
        }

    before, lines = said(last_key, last_places), []
    for path, (kind, spec) in said(key, places).items():
        old_kind, old_spec = before.pop(path, (None, None))
        if old_kind is None:
            lines.append(f"{path}: new, {kind}")
        elif old_kind != kind:
            lines.append(f"{path}: {old_kind} before, {kind} now")
        elif old_spec != spec:
            lines.append(f"{path}: placed as {old_spec} before, as {spec} now")
    lines += [f"{path}: no longer there" for path in before]
    if last_key[0][-1] != key[0][-1]:
        lines.append(f"static arguments: {last_key[0][-1]} before, {key[0][-1]} now")
    elif last_key[0] != key[0]:
        lines.append("the structure of an argument changed: a module's settings, or a container's keys")
    return lines or ["something that is not an array changed"]
