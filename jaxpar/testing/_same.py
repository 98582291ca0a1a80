"""Does a sharded function compute what one device computes? Outputs, gradients, and the state it changes."""

import dataclasses
import functools as ft
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import _tree
from jaxpar._types import PyTree

from ._compare import Comparison, compare, host

_Leaves = dict[str, Any]
_WIDE = 64  # bits
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma")


def assert_same(sharded: Any, reference: Any, args: tuple[Any, ...], *, grads: bool = True) -> Comparison:
    """Assert that a sharded function or layer computes what `reference` computes on one device.

    Runs `sharded(*args)` as it is, and `reference(*args)` on one device, in float32 and in float64, all with the
    highest matmul precision. A leaf passes if its sharded error against float64 is at most twice the single-device
    float32 error (see `jaxpar.testing.compare`). Gradients are those of a random weighting of all outputs, for every
    float in `args` and in a layer; of a scalar output they are its own. State that a module changes is compared too.

    Where float64 cannot be had (the reference raises, casts to another precision inside, or draws random numbers, which
    differ in float64), the float32 run is the reference and each leaf may be off by a stated bound; the result says so.

    A step that `plan.jit` made is called as it is, on copies of `args`; it cannot be differentiated (`grads=False`).

    Costs a compilation and a run of each; all leaves are brought to the host.

    Args:
        sharded: A function, or an nnx module that is called. May shard inside, or be given placed arguments.
        reference: The same, for one device. It is given, never guessed: the definition, not another sharding.
        args: Positional arguments of both: pytrees of arrays, nnx modules among them.
        grads: Whether to compare gradients.

    Returns:
        The table, to print: every leaf, its error, and what it may be.

    Raises:
        AssertionError: The table, failing leaves first.
        TypeError: `args` is not a tuple.
        ValueError: There is nothing to differentiate, or it cannot be.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> mean = jax.shard_map(
        ...     lambda x: jax.lax.pmean(x.mean(0), "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        ... )
        >>> jp.testing.assert_same(mean, lambda x: x.mean(0), (jnp.ones((16, 4)),)).ok
        True
    """
    table = compare_runs(sharded, reference, args, grads=grads)
    if not table.ok:
        raise AssertionError(f"The sharded run differs from one device.\n{table}")
    return table


def compare_runs(
    sharded: Any,
    reference: Any,
    args: tuple[Any, ...],
    *,
    grads: bool = True,
    wide: bool = False,
    family: Callable[[str], str] = lambda path: "",
) -> Comparison:
    """What `assert_same` asserts, as a table: nothing is raised for numbers that differ.

    With `wide` the sharded run is in float64 too, rounded at the end, for what amplifies rounding. If float64 cannot be
    had, the table is then empty, and notes why. `family` is as for `compare`.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"assert_same: args is a {type(args).__name__}; give a tuple, as in assert_same(f, g, (x,)).")
    if grads and hasattr(sharded, "plan"):
        raise ValueError(
            "assert_same: a step that a plan compiled runs as it is and cannot be differentiated: grads=False. "
            "For a training step, jp.verify compares gradients and updates."
        )
    ours, theirs = _Side.of(sharded, args), _Side.of(reference, args)
    with jax.default_matmul_precision("highest"):
        moved = {path: _local(leaf) for path, leaf in theirs.leaves.items()}
        weights = _weights(theirs.shapes(moved)) if grads else None
        if grads and not (weights and any(_is_inexact(leaf) for leaf in moved.values())):
            raise ValueError(
                "assert_same: no output or no argument is a float, so nothing can be differentiated: grads=False."
            )
        single = theirs.run(moved, weights)
        exact, reason, bound = _exactly(theirs, moved, weights)
        if wide and exact is None:
            return Comparison(rows=(), reference="float64 on one device", notes=(reason,))
        if wide:
            with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
                found = ours.run_as_it_is({path: _widened(leaf) for path, leaf in ours.leaves.items()})
            found = {group: _rounded(leaves, single[group]) for group, leaves in found.items()}
        else:
            found = ours.run_as_it_is(ours.leaves) if hasattr(sharded, "plan") else ours.run(ours.leaves, weights)
    changed = _changed(moved, single["updates"]) | _changed(ours.leaves, found["updates"])
    tables = []
    for group, leaves in single.items():
        kept = changed if group == "updates" else {*leaves, *found[group]}
        if kept:
            true = None if exact is None else _only(exact[group], kept)
            here, there = _only(found[group], kept), _only(leaves, kept)
            tables.append(compare(here, there, true, group=group, bound=bound, family=family))
    if not tables:
        raise ValueError("assert_same: the reference returns no arrays and changes none, so nothing would be compared.")
    table = ft.reduce(lambda one, other: one + other, tables)
    if reason:
        table = dataclasses.replace(table, reference=f"{table.reference}: {reason}")
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """A function of leaves by path: the one under test, or the reference."""

    fn: Callable[..., Any]
    leaves: _Leaves
    build: Callable[[Mapping[str, Any]], PyTree]

    @classmethod
    def of(cls, fn: Any, args: tuple[Any, ...]) -> "_Side":
        if _tree.is_graph(fn):  # a layer is a function of itself too
            flat = _tree.flatten((fn, *args))
            return cls(fn=lambda layer, *rest: layer(*rest), leaves=flat.leaves, build=flat.build)
        flat = _tree.flatten(args)
        return cls(fn=fn, leaves=flat.leaves, build=flat.build)

    def outputs(self, leaves: _Leaves) -> tuple[_Leaves, _Leaves]:
        """What comes out, and the arguments afterwards where they can change in place."""
        args = self.build(leaves)
        if any(leaf.dtype == np.float64 for leaf in leaves.values()):
            _widen_modules(args)
        out = self.fn(*args)
        return _tree.leaves(out), _tree.leaves(args) if _tree.is_graph(args) else {}

    def shapes(self, leaves: _Leaves) -> dict[str, jax.ShapeDtypeStruct]:
        return jax.eval_shape(lambda leaves: self.outputs(leaves)[0], leaves)

    def run(self, leaves: _Leaves, weights: _Leaves | None) -> dict[str, _Leaves]:
        """Outputs, updates, and gradients if `weights` are given, on the host."""
        results = jax.jit(self.results)(leaves, weights)
        return {group: {path: host(leaf) for path, leaf in found.items()} for group, found in results.items()}

    def run_as_it_is(self, leaves: _Leaves) -> dict[str, _Leaves]:
        """Outputs and updates of a step that is compiled already, and may use its arguments up."""
        out, after = self.outputs({path: jnp.copy(leaf) for path, leaf in leaves.items()})
        return {
            "outputs": {path: host(leaf) for path, leaf in out.items()},
            "updates": {path: host(leaf) for path, leaf in after.items()},
        }

    def results(self, leaves: _Leaves, weights: _Leaves | None) -> dict[str, _Leaves]:
        if weights is None:
            out, after = self.outputs(leaves)
            return {"outputs": out, "updates": after}
        varied = {path: leaf for path, leaf in leaves.items() if _is_inexact(leaf)}

        def weighted(varied: _Leaves) -> tuple[Any, tuple[_Leaves, _Leaves]]:
            out, after = self.outputs({**leaves, **varied})
            terms = [jnp.sum((out[path] * weight.astype(out[path].dtype)).real) for path, weight in weights.items()]
            return ft.reduce(jnp.add, [term.astype(terms[0].dtype) for term in terms]), (out, after)

        gradients, (out, after) = jax.grad(weighted, has_aux=True)(varied)
        return {"outputs": out, "gradients": gradients, "updates": after}


def _exactly(side: _Side, leaves: _Leaves, weights: _Leaves | None) -> tuple[dict[str, _Leaves] | None, str, float]:
    """The float64 run; or none, the reason, and the bound that holds instead."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # constants may stay float32: they are exact
        wide = {path: _widened(leaf) for path, leaf in leaves.items()}
        wide_weights = None if weights is None else {path: _widened(leaf) for path, leaf in weights.items()}
        try:
            traced = jax.make_jaxpr(side.results)(wide, wide_weights)
        except Exception as error:  # a user's function may raise anything when its dtypes change
            return None, f"in float64 the reference raises {type(error).__name__}: {str(error)[:80]}", _bound([])
        equations = list(_equations(traced.jaxpr))
        if any(each.primitive.name in _RANDOM for each in equations):
            return None, "the reference draws random numbers, which differ in float64", _bound([])
        narrow = [dtype for each in equations for dtype in _narrowed(each)]
        if narrow:
            kinds = ", ".join(sorted({str(dtype) for dtype in narrow}))
            return None, f"the reference casts to {kinds} inside", _bound(narrow)
        return side.run(wide, wide_weights), "", 0.0


def _narrowed(equation: Any) -> list[Any]:
    """Dtypes to which an equation rounds a float64. What is float32 from the start, such as a count, is exact."""
    if next(_inner(equation), None) is not None:
        return []  # a loop or a call: its own equations tell
    floats = [
        [variable.aval.dtype for variable in side if _is_float(variable)]
        for side in (equation.invars, equation.outvars)
    ]
    is_wide = any(jnp.finfo(dtype).bits == _WIDE for dtype in floats[0])
    return [dtype for dtype in floats[1] if is_wide and jnp.finfo(dtype).bits < _WIDE]


def _is_float(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _rounded(leaves: _Leaves, like: _Leaves) -> _Leaves:
    return {
        path: leaf.astype(like[path].dtype) if path in like and _is_inexact(leaf) else leaf
        for path, leaf in leaves.items()
    }


def _changed(before: _Leaves, after: _Leaves) -> set[str]:
    """The leaves that a call changed in place."""
    pairs = {path: (host(before[path]), leaf) for path, leaf in after.items()}
    return {path for path, (old, new) in pairs.items() if not np.array_equal(old, new, equal_nan=new.dtype.kind == "f")}


def _only(leaves: _Leaves, paths: set[str]) -> _Leaves:
    return {path: leaf for path, leaf in leaves.items() if path in paths}


def _bound(narrow: list[Any]) -> float:
    """How far a leaf may be off without float64: 1e-5, or 4 ulps of the coarsest precision inside."""
    return max([1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in narrow)])


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    parameters = list(equation.params.values())
    for value in jax.tree.leaves(parameters, is_leaf=lambda each: hasattr(each, "eqns") or hasattr(each, "jaxpr")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def _weights(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> _Leaves:
    """How much each output counts in the scalar that is differentiated: itself if it is the only one and a scalar."""
    floats = {path: shape for path, shape in shapes.items() if _is_inexact(shape)}
    draw = np.random.default_rng(0)
    weights = {path: draw.standard_normal(shape.shape).astype(np.float32) for path, shape in floats.items()}
    if len(floats) == 1 and all(shape.shape == () for shape in floats.values()):
        return dict.fromkeys(floats, np.ones((), np.float32))
    return weights


def _local(leaf: Any) -> Any:
    """A leaf on no mesh: on the host, or on one device for keys."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(jax.device_put(data, jax.devices()[0]), impl=jax.random.key_impl(leaf))
    return np.asarray(leaf)


def _widen_modules(args: PyTree) -> None:
    """Tell nnx modules that were told to compute in float32 (as `nnx.Embed` is, by default) to do so in float64."""
    if not _tree.is_graph(args):
        return
    from flax import nnx

    for _, node in nnx.iter_graph(args):
        told: Any = node
        if isinstance(node, nnx.Module) and getattr(node, "dtype", None) in (jnp.float32, np.dtype(np.float32)):
            told.dtype = jnp.float64


def _widened(leaf: Any) -> Any:
    if not _is_inexact(leaf):
        return leaf
    return leaf.astype(np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else np.float64)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
