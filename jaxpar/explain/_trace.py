"""The gradient of a recipe's loss as a flat list of operations on whole arrays: what an estimate starts from.

Traced once, on shapes alone, without a mesh: the loss and the model are the same on every mesh, and how each array is
split there follows from its inputs (`_spread`). Calls are inlined; a loop keeps its body as a block of its own.

What a compiler would not write to memory is not there either: elementwise operations are *virtual*, made anew by
whoever reads them, as XLA fuses them. A virtual array is written down only where several read it and it has several
sources, or where a loop takes or leaves it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from .. import _kernels, _mesh
from .._birth import no_eager_sharding
from .._compat import scan_counts
from .._recipe import Program
from ._flops import Flops, count, kernel_work

HEAVY = frozenset(
    (
        "dot_general",
        "conv_general_dilated",
        "ragged_dot",
        "ragged_dot_general",
        "scan",
        "while",
        "cond",
        "sort",
        "top_k",
        "gather",
        "scatter",
        "scatter-add",
        "scatter_add",
        "scatter-mul",
        "scatter_mul",
        "scatter-min",
        "scatter_min",
        "scatter-max",
        "scatter_max",
        "dynamic_update_slice",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
        "argmax",
        "argmin",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "reduce",
        "reduce_window",
        "select_and_scatter_add",
        "pallas_call",
        "custom_call",
        "ffi_call",
        "fft",
        "cholesky",
        "eigh",
        "svd",
        "qr",
        "triangular_solve",
        "all_to_all",
        "all_gather",
        "psum",
        "ppermute",
        "shard_map",
    )
)
"""Operations that read and write memory; what is not among them is fused into its readers."""


PRODUCTS = ("dot_general", "conv_general_dilated")
KERNELS = ("pallas_call", "custom_call", "ffi_call")
"""What a compiler does not see into: nothing is fused with it, operands and results are written."""
BINARY = frozenset(("add", "add_any", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "and", "or", "xor"))
"""Elementwise operations that repeat an operand along dims in which it is 1."""
PASSED_ON = frozenset(
    ("convert_element_type", "transpose", "mul", "div", "neg", "copy", "reshape", "squeeze", "add_any", "add")
)
"""What a gradient goes through between the product that makes it and its place."""


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """One array.

    Attributes:
        shape: Whole.
        itemsize: Bytes of an element.
        virtual: Whether nobody writes it down.
        fused: Whether it is written only as what its one reader makes of it: a product that is added to something.
        sources: The written arrays that a virtual one is made of; itself otherwise.
        last: The last operation of its block that reads it, through virtual ones too; -1 if none does.
        kind: `"parameter"`, `"gradient"` or `""`.
        path: Of the parameter that it is, or whose gradient it is.
        layer: Whether it is one layer of a stacked parameter.
        sunk: Whether a loop takes it and makes it itself, being virtual outside.
    """

    shape: tuple[int, ...]
    itemsize: float
    dtype: str
    virtual: bool = False
    fused: bool = False
    sources: tuple["Value", ...] = ()
    last: int = -1
    kind: str = ""
    path: str = ""
    layer: bool = False
    sunk: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def text(self) -> str:
        """As HLO writes it."""
        short = self.dtype
        for name, letter in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s"), ("bool", "pred")):
            short = short.replace(name, letter)
        return f"{short}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """One operation.

    Attributes:
        name: Of the primitive.
        inputs: What it reads; `None` for literals.
        outputs: What it makes.
        params: Of the primitive.
        backward: Whether it belongs to the backward pass, what is computed again there included.
        free: Whether it costs no traffic: a reduction of what a matrix product reads or writes anyway.
        blocks: Bodies of a loop, branches of a conditional.
        trips: Of a loop; 1 otherwise.
    """

    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    backward: bool = False
    free: bool = False
    blocks: tuple["Block", ...] = ()
    trips: int = 1


@dataclasses.dataclass(eq=False, slots=True)
class Block:
    """Operations in order, of the whole or of a loop's body."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value | None, ...]
    ops: list[Op]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced gradient.

    Attributes:
        block: Its operations; inputs are the leaves of `paths`, then those of the batch.
        flops: Of one step.
        paths: Of the model's leaves, in the order of the inputs.
        num_batch: Inputs after those.
        notes: What could not be looked into.
    """

    block: Block
    flops: Flops
    paths: tuple[str, ...]
    num_batch: int
    notes: tuple[str, ...]


def key_of(program: Program) -> Any:
    """What a trace depends on: programs with the same key, of one recipe, have the same trace."""
    leaves = ((record.path, record.slot, str(record.compute_dtype)) for record in program.plan.records.values())
    return _mesh.hardware_of(program.plan.mesh).kind, *leaves


def trace(program: Program) -> Trace:
    """Trace the gradient of the loss of `program` over its whole batch. Allocates nothing."""
    recipe, plan = program.recipe, program.plan
    hardware = _mesh.hardware_of(plan.mesh)
    shapes = {path: jax.ShapeDtypeStruct(record.shape, record.compute_dtype) for path, record in plan.records.items()}
    trained = {path for path, record in plan.records.items() if record.slot == "parameter"}
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), recipe.batch)

    def mean(params: dict[str, Any], rest: dict[str, Any], batch: Any) -> Any:
        with no_eager_sharding(), _kernels.traced_for(hardware.kind):
            out = recipe.loss(plan.birth.build({**rest, **params}), batch)
        out = out[0] if recipe.has_aux else out
        return out[0] / jnp.maximum(out[1], 1).astype(out[0].dtype) if isinstance(out, tuple) else out

    params = {path: shape for path, shape in shapes.items() if path in trained}
    rest = {path: shape for path, shape in shapes.items() if path not in trained}
    closed = jax.make_jaxpr(jax.value_and_grad(mean))(params, rest, batch)
    paths = (*sorted(params), *sorted(rest))
    maker = _Maker()
    inputs = [_value(var) for var in closed.jaxpr.invars]
    for value, path in zip(inputs, paths, strict=False):
        if plan.records[path].slot in ("parameter", "frozen"):
            value.kind, value.path = "parameter", path
    block = maker.block(closed.jaxpr, inputs, [_value(var) for var in closed.jaxpr.constvars])
    _decide(block, hardware.kind)
    for value, path in zip(block.outputs[1:], sorted(params), strict=True):
        _mark_gradient(block, value, path)
    return Trace(
        block=block,
        flops=count(closed, plan=plan),
        paths=paths,
        num_batch=len(inputs) - len(paths),
        notes=tuple(dict.fromkeys(maker.notes)),
    )


def _value(var: Any) -> Value:
    dtype = getattr(var.aval, "dtype", None)
    return Value(shape=tuple(getattr(var.aval, "shape", ())), itemsize=getattr(dtype, "itemsize", 0), dtype=str(dtype))


_CALLS = {"scan", "while", "cond", "pallas_call", "shard_map"}


class _Maker:
    """Makes blocks of jaxprs."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def block(
        self,
        jaxpr: Any,
        inputs: Sequence[Value],
        constants: Sequence[Value],
        *,
        backward: bool = False,
    ) -> Block:
        ops: list[Op] = []
        env = dict(zip(jaxpr.invars, inputs, strict=True)) | dict(zip(jaxpr.constvars, constants, strict=True))
        self._inline(jaxpr, env, ops, backward=backward)
        outputs = tuple(None if isinstance(var, jax_core.Literal) else env.get(var) for var in jaxpr.outvars)
        block = Block(inputs=tuple(inputs), outputs=outputs, ops=ops)
        _drop_dead(block)
        return block

    def _inline(self, jaxpr: Any, env: dict[Any, Value], ops: list[Op], *, backward: bool) -> None:
        def of(var: Any) -> Value | None:
            return None if isinstance(var, jax_core.Literal) else env.get(var)

        repeats: dict[tuple[int, tuple[int, ...]], Value] = {}

        def repeated(value: Value | None, shape: tuple[int, ...]) -> Value | None:
            """`value` along the dims of `shape` in which it is 1, as the operation that it becomes in HLO."""
            if value is None or len(value.shape) != len(shape) or value.shape == shape:
                return value
            key = id(value), shape
            if key not in repeats:
                repeats[key] = Value(shape=shape, itemsize=value.itemsize, dtype=value.dtype)
                dims = {"broadcast_dimensions": tuple(range(len(shape)))}
                ops.append(Op("broadcast_in_dim", (value,), (repeats[key],), dims, backward))
            return repeats[key]

        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            later = backward or "transpose(" in str(eqn.source_info.name_stack)
            inputs = tuple(map(of, eqn.invars))
            inner = None if name in _CALLS else _called(eqn)
            if inner is not None and len(inner.invars) == len(inputs):
                given = {
                    var: _value(var) if value is None else value
                    for var, value in zip(inner.invars, inputs, strict=True)
                }
                given |= {var: _value(var) for var in inner.constvars}
                self._inline(inner, given, ops, backward=later)
                for var, out in zip(eqn.outvars, inner.outvars, strict=True):
                    found = None if isinstance(out, jax_core.Literal) else given.get(out)
                    env[var] = _value(var) if found is None else found
                continue
            outputs = tuple(map(_value, eqn.outvars))
            if name in BINARY:
                inputs = tuple(repeated(value, outputs[0].shape) for value in inputs)
            env.update(zip(eqn.outvars, outputs, strict=True))
            blocks, trips = self._blocks(eqn, inputs, backward=later)
            ops.append(Op(name, inputs, outputs, eqn.params, later, blocks=blocks, trips=trips))

    def _blocks(self, eqn: Any, inputs: Sequence[Value | None], *, backward: bool) -> tuple[tuple[Block, ...], int]:
        name, params = eqn.primitive.name, eqn.params

        def closed(inner: Any, values: Sequence[Value] | None = None) -> Block:
            values = [_value(var) for var in inner.jaxpr.invars] if values is None else values
            constants = [_value(var) for var in inner.jaxpr.constvars]
            return self.block(inner.jaxpr, values, constants, backward=backward)

        if name == "scan":
            num_consts, num_carry = scan_counts(params)
            inner = params["jaxpr"]
            values = [_value(var) for var in inner.jaxpr.invars]
            for at, (value, outer) in enumerate(zip(values, inputs, strict=True)):
                if outer is not None and outer.kind == "parameter" and not num_consts <= at < num_consts + num_carry:
                    value.kind, value.path, value.layer = "parameter", outer.path, at >= num_consts + num_carry
            return (closed(inner, values),), params["length"]
        if name == "while":
            self.notes.append("a while loop, whose trips nobody knows, is counted once")
            return (closed(params["body_jaxpr"]),), 1
        if name == "cond":
            return tuple(closed(branch) for branch in params["branches"]), 1
        known = name == "pallas_call" and kernel_work(params, _arrays(eqn.invars), _arrays(eqn.outvars), "")
        if name in KERNELS and not known:
            self.notes.append(f"{name}: a kernel of its own, counted by the arrays that it reads and writes alone")
        if name == "shard_map":
            self.notes.append("a shard_map of the model's own is counted by the arrays that it reads and writes alone")
        return (), 1


def _arrays(variables: Any) -> list[Any]:
    return [var.aval for var in variables]


def _called(eqn: Any) -> Any:
    """The jaxpr of a call: what `jit`, `checkpoint` and custom derivatives hold."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if isinstance(inner, jax_core.ClosedJaxpr):
            return inner.jaxpr
        if isinstance(inner, jax_core.Jaxpr):
            return inner
    return None


def _drop_dead(block: Block) -> None:
    """Leave out operations whose results nobody reads."""
    wanted = {id(value) for value in block.outputs if value is not None}
    kept = []
    for op in reversed(block.ops):
        if any(id(value) in wanted for value in op.outputs):
            kept.append(op)
            wanted |= {id(value) for value in op.inputs if value is not None}
    block.ops = kept[::-1]


_SMALL = 1024
"""Elements: such arrays are not worth an account."""


def _decide(block: Block, compiler: str) -> None:
    """Which arrays are written down, of what the others are made, and who reads each last; then the same in loops."""
    readers: dict[int, int] = {}
    made = {id(value) for op in block.ops for value in op.outputs}
    for op in block.ops:
        for value in {id(value): value for value in op.inputs if value is not None}.values():
            readers[id(value)] = readers.get(id(value), 0) + 1
            if id(value) not in made:
                value.sources = () if value.sunk else (value,)
    kept = {id(value) for value in block.outputs if value is not None}
    looped = {id(value) for op in block.ops if op.blocks for value in op.inputs if value is not None}
    handed = _handed_over(block, readers) if compiler == "cpu" else set()
    handed |= _around_kernels(block)
    for at, op in enumerate(block.ops):
        read = {id(source): source for value in op.inputs if value is not None for source in value.sources}
        for source in read.values():
            source.last = at
        held = sum(source.size * source.itemsize for source in read.values() if source.size > _SMALL)
        for value in op.outputs:
            own = value.size * value.itemsize
            shared = readers.get(id(value), 0) > 1 and held > 1.25 * own
            # A mask that is broadcast before a loop is broadcast in the loop: compilers sink it.
            taken = id(value) in looped and held >= own / 4
            cut = op.name == "slice" and held >= 4 * own  # kept for its readers, and the whole is not
            value.virtual = not (op.name in HEAVY or shared or taken or cut or id(value) in kept or id(value) in handed)
            value.sources = tuple(read.values()) if value.virtual else (value,)
    for value in block.outputs:
        for source in () if value is None else value.sources:
            source.last = len(block.ops)
    _fuse(block, readers)
    for op in block.ops:
        for each in op.blocks:
            for outer, inner in zip(op.inputs[len(op.inputs) - len(each.inputs) :], each.inputs, strict=True):
                inner.sunk = outer is not None and (outer.virtual or outer.sunk)
            _decide(each, compiler)


def _around_kernels(block: Block) -> set[int]:
    """What is written down because a kernel takes it or makes it; turned for that, it is written in either order."""
    kernels = [op for op in block.ops if op.name in KERNELS]
    taken = {id(value) for op in kernels for value in op.inputs if value is not None}
    given = {id(value) for op in kernels for value in op.outputs}
    found = set(taken)
    for op in block.ops:
        if op.name == "transpose":
            before, after = id(op.inputs[0]), id(op.outputs[0])
            if after in taken:
                found.add(before)
            if before in given:
                found.add(after)
    return found


_VIEWS = {"reshape", "squeeze", "transpose", "copy", "expand_dims"}


def _handed_over(block: Block, readers: dict[int, int]) -> set[int]:
    """What XLA:CPU writes down beside what others do: it calls a library for products and for reductions.

    A product reads its operands from memory. A reduction computes itself what nobody else reads, but for arrays that
    are repeated along a dim, of which the library knows nothing.
    """
    made = {id(out): op for op in block.ops for out in op.outputs}
    found: set[int] = set()

    def operand(value: Value | None) -> None:
        while value is not None and (op := made.get(id(value))) is not None and op.name in _VIEWS:
            value = op.inputs[0]
        if value is not None and value.size > _SMALL:
            found.add(id(value))

    def reduced(value: Value | None) -> None:
        op = None if value is None else made.get(id(value))
        if value is None or op is None or op.name in HEAVY or value.size <= _SMALL:
            return
        source = op.inputs[0]
        if op.name == "broadcast_in_dim" and source is not None and source.size < value.size:
            found.update({id(value)} if source.size > 1 else ())
        elif readers[id(value)] > 1 and op.name not in _VIEWS:
            found.add(id(value))
        else:
            for each in op.inputs:
                reduced(each)

    for op in block.ops:
        if op.name in PRODUCTS:
            for value in op.inputs[:2]:
                operand(value)
        elif op.name.startswith("reduce_"):
            for value in op.inputs:
                reduced(value)
    return found


def _fuse(block: Block, readers: dict[int, int]) -> None:
    """What XLA makes part of a matrix product: what is added to its result, and reductions beside it."""
    reader = {id(value): op for op in block.ops for value in op.inputs if value is not None}
    at_hand: set[int] = set()
    for op in block.ops:
        if op.name not in PRODUCTS:
            continue
        (value,) = op.outputs
        then = reader.get(id(value))
        if then is not None and readers[id(value)] == 1 and then.name not in HEAVY and not then.outputs[0].virtual:
            value.fused = True
        at_hand |= {id(source) for each in op.inputs if each is not None for source in each.sources} | {id(value)}
    for op in block.ops:
        if op.name.startswith("reduce_"):
            large = [
                source for each in op.inputs if each is not None for source in each.sources if source.size > _SMALL
            ]
            op.free = all(id(source) in at_hand for source in large)


def _mark_gradient(block: Block, value: Value | None, path: str) -> None:
    """Mark the arrays that are the gradient of the parameter `path` on their way out."""
    size = value.size if value is not None else 0
    made = {id(out): op for op in block.ops for out in op.outputs}
    queue = [value]
    while queue:
        value = queue.pop()
        if value is None or value.size != size or value.kind:
            continue
        value.kind, value.path = "gradient", path
        op = made.get(id(value))
        if op is not None and op.name in PASSED_ON:
            queue += op.inputs


def product_flops(op: Op, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    """FLOPs of a matrix product or convolution of arrays of these shapes; 0 for all else."""
    if op.name == "dot_general":
        (contract, _), _ = op.params["dimension_numbers"]
        return 2.0 * math.prod(out) * math.prod(left[dim] for dim in contract)
    if op.name == "conv_general_dilated":
        return 2.0 * math.prod(out) * math.prod(right) / right[op.params["dimension_numbers"].rhs_spec[0]]
    return 0.0
