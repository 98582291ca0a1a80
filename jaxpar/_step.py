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

from . import _calls, _context, _planned
from ._birth import no_eager_sharding
from ._calls import Call, Place, Result
from ._context import Region
from ._errors import ShardingError, StepError, listed
from ._slots import Match

logger = logging.getLogger("jaxpar")


@dataclasses.dataclass
class _Compiled:
    """One compilation: the jitted function over arrays, where its arrays go in, and how its result is put together."""

    function: Any
    shardings: list[Any]
    donated: tuple[int, ...]
    result: Result
    notes: tuple[str, ...]

    def __call__(self, call: Call) -> Any:
        seen: set[int] = set()
        arrays = []
        for index, (array, sharding) in enumerate(zip(call.arrays, self.shardings, strict=True)):
            if getattr(array, "sharding", None) is not sharding and getattr(array, "sharding", None) != sharding:
                array = jax.device_put(array, sharding)
            if index in self.donated:
                if id(array) in seen:  # two leaves share one buffer, which can be given away only once
                    array = array.copy()
                seen.add(id(array))
            arrays.append(array)
        values = self.function(*arrays)
        _calls.update_nodes(call.nodes, values[: call.num_node_arrays])
        return self.result.assemble(values[call.num_node_arrays :], call.nodes)


class StepFunction:
    """What `plan.jit` returns: call it as the step it was made from.

    Attributes:
        plan: The plan it keeps to.
        function: What it was made from.
        num_compilations: How often it was compiled; 1 after the first call, if nothing changes.
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
        self._matches: dict[tuple[Place, tuple[int, ...]], Match | None] = {}
        self._compiled: dict[Any, _Compiled] = {}
        self._last: tuple[Any, Call] | None = None
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
        call = _calls.take_apart(self._names, args, kwargs)
        return self._get(call)(call)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lower the step for these arguments, arrays or `jax.ShapeDtypeStruct`s, without running it."""
        call = _calls.take_apart(self._names, args, kwargs)
        compiled = self._get(call)
        types = map(_type_of, call.arrays)
        shapes = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in types]
        return compiled.function.lower(*shapes)

    def _get(self, call: Call) -> _Compiled:
        shardings = [self._input_sharding(array, place) for array, place in zip(call.arrays, call.places, strict=True)]
        key = (call.static, tuple(map(_type_of, call.arrays)), tuple(shardings[call.num_node_arrays :]))
        compiled = self._compiled.get(key)
        if compiled is None:
            self._guard(key, call)
            compiled = self._compiled[key] = self._build(call, shardings)
        self._last = (key, call)
        return compiled

    def _guard(self, key: Any, call: Call) -> None:
        """Say what makes this call need another compilation than the last."""
        if self._last is None or self._on_recompile == "allow":
            return
        changes = _differences(self._last, (key, call))
        message = (
            f"{self.__name__} is compiled again, for the {len(self._compiled) + 1}. time, because\n{listed(changes)}"
        )
        if self._on_recompile == "error":
            raise StepError(
                f"{message}\nKeep shapes, dtypes and settings the same from call to call (jp.data.pad_batch for a last "
                "batch), or allow it: plan.jit(..., on_recompile='allow')."
            )
        logger.warning("%s", message)

    def _build(self, call: Call, shardings: list[NamedSharding]) -> _Compiled:
        plan = self.plan
        found = [self._match(place, np.shape(array)) for place, array in zip(call.places, call.arrays, strict=True)]
        _check_parameters(call, found)
        traced: dict[str, Any] = {}
        plan.reads.clear()
        plan.read_values.clear()
        plan.trace_notes.clear()

        def pure(*arrays: Any) -> list[Any]:
            args, kwargs, nodes = call.rebuild(arrays)
            before = _calls.graphdef_of(nodes)
            variables = _parameters_of(nodes, call, found)
            with no_eager_sharding(), _planned.planned(variables), _context.entered(Region(plan=plan)):
                out = self.function(*args, **kwargs)
                out_arrays, traced["result"] = _calls.take_result_apart(out, nodes)
            _check_structure(self.__name__, before, _calls.graphdef_of(nodes))
            return [*_calls.node_arrays(nodes), *out_arrays]

        jaxpr = jax.make_jaxpr(pure)(*call.arrays)
        plan.read_values.clear()
        if self._must_read:
            self._check_reads(call, found)
        result: Result = traced["result"]
        out_shardings = shardings[: call.num_node_arrays] + [
            self._output_sharding(place, aval, call)
            for place, aval in zip(result.places, jaxpr.out_avals[call.num_node_arrays :], strict=True)
        ]
        donated = self._donated(call)
        function = jax.jit(
            _named(jax_core.jaxpr_as_fun(jaxpr), self.__name__),
            in_shardings=shardings,
            out_shardings=out_shardings,
            donate_argnums=donated,
            compiler_options=self._options,
        )
        return _Compiled(function, shardings, donated, result, tuple(plan.trace_notes))

    def _match(self, place: Place, shape: tuple[int, ...]) -> Match | None:
        key = (place, shape)
        if key not in self._matches:
            self._matches[key] = _match(self.plan, place, shape)
        return self._matches[key]

    def _input_sharding(self, array: Any, place: Place) -> NamedSharding:
        plan = self.plan
        match = self._match(place, np.shape(array))
        if match is not None:
            return plan.sharding(match.slots if place.is_slot else match.storage)
        own = getattr(array, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh == plan.mesh and place.kind is None:
            return plan.sharding(own.spec)
        size = math.prod(plan.axes[axis] for axis in plan.batch_axes)
        shape = np.shape(array)
        if place.kind is None and not place.is_slot and size > 1 and len(shape) > 0 and _looks_like_batch(array, size):
            raise StepError(
                f"{place.path}: an array of shape {shape} that is not on the plan's mesh would be copied whole to all "
                f"{plan.num_devices} devices. Split the batch with plan.batch(...) before the step, or replicate on "
                "purpose with jax.device_put(x, plan.sharding(P()))."
            )
        return plan.sharding(PartitionSpec())

    def _output_sharding(self, place: Place, aval: Any, call: Call) -> NamedSharding | None:
        """Where something that a step returns lies: with its parameter, with the batch, or whole if it is a scalar."""
        plan = self.plan
        match = self._match(place, aval.shape)
        if match is not None:
            return plan.sharding(match.slots if place.is_slot else match.storage)
        if not aval.shape or place.kind is not None or place.is_slot:
            return plan.sharding(PartitionSpec())
        size = math.prod(plan.axes[axis] for axis in plan.batch_axes)
        rows = {np.shape(array)[0] for array in call.arrays[call.num_node_arrays :] if np.ndim(array)}
        if aval.shape[0] in rows and aval.shape[0] % size == 0:
            return plan.batch_sharding
        return plan.sharding(PartitionSpec())

    def _donated(self, call: Call) -> tuple[int, ...]:
        donated = list(range(call.num_node_arrays)) if self._donate else []
        names = {self._names[index] if index < len(self._names) else f"arg{index}" for index in self._donate_argnums}
        for index, place in enumerate(call.places[call.num_node_arrays :], call.num_node_arrays):
            if place.path.partition(".")[0] in names:
                donated.append(index)
        return tuple(donated)

    def _check_reads(self, call: Call, found: list[Match | None]) -> None:
        """Sharded parameters that the step has but never read through the plan."""
        plan = self.plan
        given = {
            match.record.path
            for place, match in zip(call.places, found, strict=True)
            if match is not None and not place.is_slot and match.record.compute != match.record.storage
        }
        unread = sorted(given - plan.reads)
        if given and len(unread) == len(given):
            kind = "model" if call.nodes else "loss"
            raise StepError(
                f"{self.__name__}: none of the {len(given)} sharded parameters was read through the plan, so the "
                f"compiler "
                f"may gather activations instead of weights. Differentiate the {kind} with jp.value_and_grad(loss) in "
                "place of jax.value_and_grad(loss), or read parameters by jp.gather(params)."
            )
        if unread:
            logger.warning(
                "%s: %d parameters were not read through the plan: %s. An attribute of a variable, such as `w.T`, "
                "bypasses "
                "it: write `w[...].T`.",
                self.__name__,
                len(unread),
                ", ".join(unread[:5]),
            )


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` under the user's own name, which profiles and compiler dumps then show."""

    def step(*arrays: Any) -> Any:
        return function(*arrays)

    step.__name__ = step.__qualname__ = name
    return step


def _match(plan: Any, place: Place, shape: tuple[int, ...]) -> Match | None:
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
        for variable, place in zip(_variables_in_order(nodes), call.places[: call.num_node_arrays], strict=True)
        if place.path in by_path and variable is not None
    ]


def _variables_in_order(nodes: tuple[Any, ...]) -> list[Any]:
    """The variables of `nodes` themselves, in the order in which a split lists them."""
    from flax import nnx

    order = [keys for keys, _ in nnx.to_flat_state(nnx.state(nodes))]
    at = {keys: node for keys, node in nnx.iter_graph(nodes) if isinstance(node, nnx.Variable)}
    return [at.get(keys) for keys in order]


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


def _looks_like_batch(array: Any, size: int) -> bool:
    dtype = getattr(array, "dtype", None)
    is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    raw_key = dtype == np.uint32 and np.shape(array) in ((2,), (4,))
    return not is_key and not raw_key and np.shape(array)[0] % size == 0 and np.shape(array)[0] > 0


def _type_of(array: Any) -> tuple[tuple[int, ...], Any, bool]:
    """Shape, dtype, and whether the dtype is weak, as JAX sees them: a Python `0` is what `0 + 1` comes back as."""
    aval = array if isinstance(array, jax.Array | jax.ShapeDtypeStruct) else jax.typeof(array)
    return (aval.shape, aval.dtype, bool(aval.weak_type))


def _differences(last: tuple[Any, Call], now: tuple[Any, Call]) -> list[str]:
    """What differs between two calls, a line each."""
    (last_key, last_call), (key, call) = last, now
    before = {
        place.path: (kind, getattr(array, "sharding", None))
        for place, kind, array in zip(last_call.places, last_key[1], last_call.arrays, strict=True)
    }
    lines = []
    for place, kind, array in zip(call.places, key[1], call.arrays, strict=True):
        old = before.pop(place.path, None)
        if old is None:
            lines.append(f"{place.path}: new, {kind[1]}{list(kind[0])}")
        elif old[0] != kind:
            lines.append(f"{place.path}: {old[0][1]}{list(old[0][0])} before, {kind[1]}{list(kind[0])} now")
        elif place.kind is None and old[1] != getattr(array, "sharding", None):
            lines.append(f"{place.path}: placed as {old[1]} before, as {getattr(array, 'sharding', None)} now")
    lines += [f"{path}: no longer there" for path in before]
    if last_key[0][-1] != key[0][-1]:
        lines.append(f"static arguments: {last_key[0][-1]} before, {key[0][-1]} now")
    elif last_key[0] != key[0]:
        lines.append("the structure of an argument changed: a module's settings, or a container's keys")
    return lines or ["something that is not an array changed"]
