"""Floating-point operations of a step, counted in its jaxpr with loops multiplied out.

Only what a matrix unit does counts: matrix products, convolutions, and the products inside of attention kernels. That
is the convention of published MFU figures, and elementwise work is bound by memory anyway.

*Model FLOPs* leave out what rematerialisation computes again (operations under JAX's scope `rematted_computation`), the
scores that a backward attention kernel computes again, and all but one of the devices that compute the same thing in a
manual region. *Causal* ones count half of attention's products where the scores are masked by an order of positions: a
square of (queries, keys) that a comparison `<`, `<=`, `>`, `>=` of two arrays selects from or is added to. A mask of
other making (a table from the batch, `==` of segments) is taken as none. Grouped products (`ragged_dot`) count every
row; of dropless experts those of tokens, in the mean over devices, and not the room in buffers.
A flash kernel written with `jax.numpy` and `custom_vjp` counts the scores it computes again as the model's.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._context import axes_at
from .._hlo import work_of
from .._hlo._flops import Work, attention, filled, num_taps
from .._hlo._module import Module, _walk
from .._hlo._text import Shape, quoted
from .._plan import Plan
from ._compiled import Compiled
from ._paths import Paths
from ._ticks import schedule_of, shares_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one step over all devices; a multiply and an add are two.

    Attributes:
        model: What the mathematics needs: recomputation and copies left out, causal attention in full.
        model_causal: The same with what a causal mask throws away left out.
        hardware: What the program computes, these included.
        by_path: `(where in the model, hardware FLOPs)`, largest first; sums to `hardware`.
        by_dtype: `(dtype of the operands, hardware FLOPs)`.
        origin: `"jaxpr"`, or `"hlo"` where only a compiled program is known; then only attention kernels are known to
            be causal, and what every device of a mesh axis computes alike counts on each.
        notes: What could not be counted.
    """

    model: float
    model_causal: float
    hardware: float
    by_path: tuple[tuple[str, float], ...]
    by_dtype: tuple[tuple[str, float], ...]
    origin: str = "jaxpr"
    notes: tuple[str, ...] = ()


def count(jaxpr: Any, *, plan: Plan | None = None) -> Flops:
    """The FLOPs of one run of a closed `jaxpr` of global shapes: `jax.make_jaxpr(step)(...)`.

    Args:
        jaxpr: What a region of `jax.shard_map` computes counts once for each device of its mesh.
        plan: That of the step, if it has one: modules are then spelt as there.

    Example:
        >>> layer = jax.make_jaxpr(lambda x, w: x @ w)(jnp.ones((8, 16)), jnp.ones((16, 32)))
        >>> count(layer).model == 2 * 8 * 16 * 32
        True
    """
    schedule = schedule_of(plan)
    shares = {} if schedule is None else shares_of(schedule)
    counter = _Counter(shares)
    counter.run(jaxpr.jaxpr, [_Value() for _ in jaxpr.jaxpr.invars], "jit()", 1.0)
    records = plan.records.values() if plan is not None else ()
    known = [record.path for record in records if record.slot in ("parameter", "frozen")]
    return _summed(counter.products, Paths(known), "jaxpr", counter.notes)


def from_hlo(module: Module, compiled: Compiled) -> Flops:
    """The FLOPs of one run of a compiled program on all its devices together."""
    program = module.program
    devices = compiled.axes.size
    products, notes = [], {}
    for visit in _walk(program):
        work = work_of(program, visit.op)
        if work is None:
            continue
        if visit.count is None:
            notes["a loop whose trip count is not known counts once"] = None
        if not work.known:
            notes[f"{visit.op.name}: a kernel of which nothing is known counts as none"] = None
        times = devices * (visit.count or 1)
        name = quoted("op_name", visit.op) or next(
            (found for caller in reversed(visit.callers) if (found := quoted("op_name", caller))), ""
        )
        products.append(
            _Product(
                name=name,
                dtype=DTYPES.get(work.dtype, work.dtype),
                flops=work.flops * times,
                full=work.full * times,
                causal=work.causal * times,
            )
        )
    paths = Paths(each.path for each in compiled.arguments if each.kind in ("parameter", "frozen"))
    return _summed(products, paths, "hlo", list(notes))


DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "s32": "int32",
    "s4": "int4", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
}  # fmt: skip
_SHORT = {long: short for short, long in DTYPES.items()}


@dataclasses.dataclass
class _Product:
    """FLOPs of one operation, all its runs together: run, needed without a mask, needed with it."""

    name: str
    dtype: str
    flops: float
    full: float
    causal: float


def _summed(products: list[_Product], paths: Paths, origin: str, notes: Iterable[str]) -> Flops:
    by_path: dict[str, float] = collections.defaultdict(float)
    by_dtype: dict[str, float] = collections.defaultdict(float)
    model = causal = 0.0
    for product in products:
        place = paths.of(product.name)
        by_path[place.path] += product.flops
        by_dtype[product.dtype] += product.flops
        if place.phase != "recomputed":
            model += product.full
            causal += product.causal
    return Flops(
        model=model,
        model_causal=causal,
        hardware=math.fsum(by_path.values()),
        by_path=_largest_first(by_path),
        by_dtype=_largest_first(by_dtype),
        origin=origin,
        notes=tuple(notes),
    )


def _largest_first(found: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(((key, flops) for key, flops in found.items() if flops), key=lambda pair: -pair[1]))


@dataclasses.dataclass
class _Value:
    """What is known of an array on its way through a jaxpr.

    Attributes:
        mask: It is truth values that compare positions.
        masked: Such a mask has been applied to it.
        products: The products that it is, elementwise.
    """

    mask: bool = False
    masked: bool = False
    products: tuple[_Product, ...] = ()


_ORDER = ("lt", "le", "gt", "ge")
_RESHAPING = frozenset({
    "bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "expand_dims",
    "gather", "optimization_barrier", "pbroadcast", "pcast", "reshape", "rev", "sharding_constraint", "slice",
    "squeeze", "transpose",
})  # fmt: skip
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "and", "clamp", "cos", "div", "exp", "exp2", "expm1", "integer_pow", "log", "log1p",
    "logistic", "max", "min", "mul", "neg", "not", "or", "pow", "rem", "select_n", "sign", "sin", "sqrt", "square",
    "stop_gradient", "sub", "tanh", "xor",
})  # fmt: skip


class _Counter:
    """Walks jaxprs in order, with what is known of every value."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.shares = shares  # of a pipeline's ticks, by the scope of what each stage does in them
        self.needed = 1.0  # the part that is no copy of another device's
        self.products: list[_Product] = []
        self.notes: list[str] = []

    def run(self, jaxpr: Any, given: list[_Value], name: str, times: float) -> list[_Value]:
        """Count `jaxpr`, whose inputs are `given` and which runs `times`; what its outputs are."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, given, strict=False))

        def of(var: Any) -> _Value:
            return known.get(var, _UNKNOWN) if not hasattr(var, "val") else _UNKNOWN

        for eqn in jaxpr.eqns:
            here = "/".join(part for part in (name, str(eqn.source_info.name_stack)) if part)
            found = self._eqn(eqn, [of(var) for var in eqn.invars], here, times)
            known.update(zip(eqn.outvars, found, strict=False))
        return [of(var) for var in jaxpr.outvars]

    def _eqn(self, eqn: Any, given: list[_Value], name: str, times: float) -> list[_Value]:
        primitive = eqn.primitive.name
        if primitive in _PRODUCTS:
            product = _PRODUCTS[primitive](eqn) * filled(name)
            return self._product(eqn, product * times, given, f"{name}/{primitive}")
        if primitive == "scan":
            return self._scan(eqn, given, name, times)
        if primitive == "while":
            self._note("a while loop counts its body once: how often it runs is not known before it does")
            split = eqn.params["cond_nconsts"]
            return self.run(eqn.params["body_jaxpr"].jaxpr, given[split:], name, times)
        if primitive == "cond":
            return self._cond(eqn, given, name, times)
        if primitive == "pallas_call":
            self._kernel(eqn, name, times)
            return []
        if primitive == "shard_map":
            return self._region(eqn, given, name, times)
        inner = [each for each in _inner(eqn) if len(each.invars) <= len(given)]
        if inner:
            return self.run(inner[0], given[len(given) - len(inner[0].invars) :], f"{name}/{_scope_of(eqn)}", times)
        return self._elementwise(eqn, given)

    def _region(self, eqn: Any, given: list[_Value], name: str, times: float) -> list[_Value]:
        """Each device counts; of those that are given the same, along an axis that splits no argument, one is needed.

        Axes that are manual already are counted by the region around this one, others are in the shapes inside.
        """
        sizes = {axis: eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]}
        split = {axis for spec in eqn.params["in_specs"] for entry in spec for axis in axes_at(entry)}
        before, body = self.needed, getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
        self.needed /= math.prod(size for axis, size in sizes.items() if axis not in split)
        out = self.run(body, given, f"{name}/{_scope_of(eqn)}", times * math.prod(sizes.values()))
        self.needed = before
        return out

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _product(self, eqn: Any, flops: float, given: list[_Value], name: str) -> list[_Value]:
        full = flops * self.needed
        made = _Product(name=name, dtype=str(eqn.invars[0].aval.dtype), flops=flops, full=full, causal=full)
        self.products.append(made)
        if any(value.masked for value in given):
            made.causal = full / 2
        scores = eqn.primitive.name == "dot_general" and _may_be_scores(eqn)
        return [_Value(products=(made,) if scores else ())]

    def _scan(self, eqn: Any, given: list[_Value], name: str, times: float) -> list[_Value]:
        """What the carry and the stacked inputs are at first counts as what they are throughout."""
        body = eqn.params["jaxpr"].jaxpr
        return self.run(body, given, f"{name}/while/body", times * eqn.params["length"])

    def _cond(self, eqn: Any, given: list[_Value], name: str, times: float) -> list[_Value]:
        """The branch with the most counts: which one runs is not known before it does, but for a pipeline's ticks."""
        scopes = str(eqn.source_info.name_stack).split("/")
        times *= next((self.shares[scope] for scope in scopes if scope in self.shares), 1.0)
        before, counted = self.products, []
        for branch in eqn.params["branches"]:
            self.products = []
            out = self.run(branch.jaxpr, given[1:], name, times)
            counted.append((sum(each.flops for each in self.products), self.products, out))
        _, most, out = max(counted, key=lambda each: each[0])
        self.products = before + most
        return out

    def _kernel(self, eqn: Any, name: str, times: float) -> None:
        """A Pallas kernel: attention by its shapes, else its author's estimate, else its grid times its body."""
        shapes, results = ([var.aval for var in variables] for variables in (eqn.invars, eqn.outvars))
        work = kernel_work(eqn.params, shapes, results, name)
        dtype = next((str(var.aval.dtype) for var in eqn.invars if "float" in str(var.aval.dtype)), "")
        name = f"{name}/pallas_call"
        if work is not None:
            flops, full, causal = work.flops, work.full, work.causal
        elif (estimate := eqn.params.get("cost_estimate")) is not None:
            flops = full = causal = float(estimate.flops)
        else:
            grid = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
            inside = _Counter(self.shares)
            inside.run(eqn.params["jaxpr"], [], name, float(grid))
            flops = full = causal = math.fsum(each.flops for each in inside.products)
        self.products.append(
            _Product(
                name=name,
                dtype=dtype,
                flops=flops * times,
                full=full * times * self.needed,
                causal=causal * times * self.needed,
            )
        )

    def _elementwise(self, eqn: Any, given: list[_Value]) -> list[_Value]:
        primitive = eqn.primitive.name
        shape = eqn.outvars[0].aval.shape if eqn.outvars and hasattr(eqn.outvars[0].aval, "shape") else ()
        if primitive in _ORDER:
            both = not any(hasattr(var, "val") or not var.aval.shape for var in eqn.invars)
            return [_Value(mask=both and len(shape) >= 2)]
        if primitive in _RESHAPING:
            return [given[0]] * len(eqn.outvars) if given else []
        if primitive not in _ELEMENTWISE or len(shape) < 2:
            return [_UNKNOWN] * len(eqn.outvars)
        if str(eqn.outvars[0].aval.dtype) == "bool":
            return [_Value(mask=any(value.mask for value in given))]
        like = [value for var, value in zip(eqn.invars, given, strict=True) if len(var.aval.shape) == len(shape)]
        masked = any(value.masked for value in like) or (primitive == "select_n" and given[0].mask)
        products = tuple({id(each): each for value in like for each in value.products}.values())
        if masked:
            for each in products:  # scores that this masks, or the gradient of masked ones
                each.causal = each.full / 2
            products = ()
        return [_Value(masked=masked, products=products)]


_UNKNOWN = _Value()


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an operation calls; the forward one of a custom derivative first."""
    found = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "eqns") and hasattr(each, "invars"):
                found.append(getattr(each, "jaxpr", each))
    return found


def _scope_of(eqn: Any) -> str:
    primitive = eqn.primitive.name
    if primitive in ("jit", "pjit"):
        return f"jit({eqn.params.get('name', '')})"
    return "checkpoint" if primitive in ("remat2", "checkpoint", "remat") else "closed_call"


def _shape(array: Any) -> Shape:
    """In HLO's spelling, as far as kernels are told by it."""
    dtype = str(getattr(array, "dtype", ""))
    return Shape(dtype=_SHORT.get(dtype, dtype), dims=tuple(getattr(array, "shape", ())))


def kernel_work(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any], name: str) -> Work | None:
    """Of a Pallas kernel by the parameters of its call and its arrays, if it is one of attention.

    Args:
        params: Of the primitive.
        operands: Arrays, anything with a shape and a dtype, whole or one device's.
        results: Likewise.
        name: Of the place of the call.
    """
    called = params.get("name") or params.get("name_and_src_info") or ""
    return attention(f"{name}/{called}", [_shape(each) for each in operands], [_shape(each) for each in results])


def _may_be_scores(eqn: Any) -> bool:
    """Whether a product is batched, over heads or rows, with a square of (queries, keys) as its result."""
    (_, _), (batch, _) = eqn.params["dimension_numbers"]
    free = eqn.outvars[0].aval.shape[len(batch) :]
    sizes = [size for size in free if size > 1]
    return len(batch) > 0 and len(sizes) >= 2 and sizes[-1] in sizes[:-1]


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[dim] for dim in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Each row of the left side meets one group's matrix."""
    left, right = (var.aval.shape for var in eqn.invars[:2])
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return 2.0 * math.prod(left) * right[-1]
    (_, right_contracted), (_, right_batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    inside = {*right_contracted, *right_batch, *groups}
    columns = math.prod(size for dim, size in enumerate(right) if dim not in inside)
    return 2.0 * math.prod(left) * columns


def _convolution(eqn: Any) -> float:
    """Products with padding, and with the holes of a dilated input, left out: nobody computes these."""
    numbers = eqn.params["dimension_numbers"]
    left, right, out = (var.aval.shape for var in (*eqn.invars[:2], eqn.outvars[0]))
    taps = 1.0
    for at, (low, _) in enumerate(eqn.params["padding"]):
        taps *= num_taps(
            num_out=out[numbers.out_spec[2 + at]],
            num_in=left[numbers.lhs_spec[2 + at]],
            size=right[numbers.rhs_spec[2 + at]],
            stride=eqn.params["window_strides"][at],
            low=low,
            dilate=eqn.params["lhs_dilation"][at],
            rhs_dilate=eqn.params["rhs_dilation"][at],
        )
    rows = left[numbers.lhs_spec[0]] / eqn.params["batch_group_count"]
    return 2.0 * rows * right[numbers.rhs_spec[0]] * right[numbers.rhs_spec[1]] * taps


_PRODUCTS = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
