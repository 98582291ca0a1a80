"""What a compiled program moves between devices, asserted exactly: against numbers, or against a file."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import jax
from jax.sharding import NamedSharding

from jaxpar import _hlo, _tree
from jaxpar._errors import ShardingError, listed, nearest
from jaxpar._hlo import Collective

from . import _baseline


class Traffic(tuple[Collective, ...]):
    """The collectives of one compiled program, in its order. A tuple that prints as a table.

    Attributes:
        compiler: What compiled it: two compilers may move the same data by other means.
        axes: The axes of the mesh.
        sizes: The size of each.
        unread: What could not be read of the program's text; empty for known compilers.
    """

    compiler: str
    axes: tuple[str, ...]
    sizes: dict[str, int]
    unread: tuple[str, ...]

    def __new__(
        cls, found: Iterable[Collective], *, compiler: str, sizes: dict[str, int], unread: tuple[str, ...]
    ) -> Self:
        self = super().__new__(cls, found)
        self.compiler, self.axes, self.sizes, self.unread = compiler, tuple(sizes), sizes, unread
        return self

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{len(self)} collectives by {self.compiler}\n" + "\n".join(_said(each) for each in self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expect:
    """What is expected of the collectives under one key, where a count does not say enough.

    Attributes:
        count: Tensors moved in a step, loops multiplied out; `None`: a loop does not say how often.
        bytes: Of all of them together, on one device (see `Collective.bytes`).
        rounds: Collectives run in a step: those that the compiler combined count once.
    """

    count: int | None
    bytes: int | None = None
    rounds: int | None = None


class _Key(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    depth: int | None


def collectives(fn: Any, *args: Any, mesh: Any = None) -> Traffic:
    """Every collective that `fn(*args)` runs, once compiled: what it does, axes, bytes, times, source line.

    Compiles, and runs nothing. Loops are multiplied out; a collective in a branch counts as if the branch is taken.

    Args:
        fn: A function, plain or jitted; a step of a plan; or what `jax.jit(...).lower(...)` or `.compile()` gave.
        args: Its arguments, placed (or `jax.ShapeDtypeStruct`s with a sharding).
        mesh: Whose axes to name; needed where neither a plan nor the arguments say.

    Raises:
        ShardingError: No mesh, or more than one, is to be found; or `mesh` has another number of devices.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x = jax.device_put(jnp.ones((16, 4)), jax.sharding.NamedSharding(mesh, P("data")))
        >>> [(c.kind, c.axes, c.bytes, c.count) for c in jp.testing.collectives(lambda x: x.sum(0), x)]
        [('all-reduce', ('data',), 16, 1)]
    """
    compiled = _compile(fn, args)
    mesh = _mesh(fn, args, compiled) if mesh is None else mesh
    module = _hlo.read(compiled.as_text() or "")
    axes = _hlo.mesh_axes(mesh)
    partitions = module.program.num_partitions
    slices = len(set(axes.slices)) or 1
    if partitions not in (1, axes.size, axes.size // slices):
        raise ShardingError(
            f"collectives: the program runs on {partitions} devices, the mesh {dict(mesh.shape)} has {axes.size}. "
            "Give the mesh that it was compiled for."
        )
    sizes = dict(zip(axes.names, axes.sizes, strict=True))
    return Traffic(module.collectives(axes), compiler=_compiler(mesh), sizes=sizes, unread=module.unread)


def assert_traffic(
    program: Callable[..., Any] | Iterable[Collective] | Any,
    expected: Mapping[Any, int | Expect | None] | str | os.PathLike[str],
    *args: Any,
    mesh: Any = None,
) -> None:
    """Assert what a program moves between devices, exactly: all that is expected, and nothing else.

    Expected is a count for each kind of collective, or a file that says what a program moved when it was last accepted.

    Counts are of tensors in one step: a combined all-reduce of three gradients is 3, one in a loop of 8 is 8.

    A file holds bytes in a step by kind, axes and number of loops, and these are compared. How often collectives run
    and where in the model is shown and not compared: compilers combine them as they like. Those under 1 KiB, such as
    the sum of a loss, are left out. `pytest --update-traffic` (or `JAXPAR_UPDATE_TRAFFIC=1`) writes the files rather
    than comparing; a file that is not there is a failure. Keep them under version control.

    Args:
        program: As for `collectives`; or what it gave, perhaps filtered; or the report of `jp.explain`.
        expected: By `(kind, axes)`, or `(kind, axes, depth)` where the number of loops around it matters: a count, or
            an `Expect` with bytes and rounds. Or the path of a file.
        args: Arguments of the function.
        mesh: As for `collectives`.

    Raises:
        AssertionError: With what was expected beside what was found, the source lines, and the compiler.
        ShardingError: A key that names no collective, or an axis that the mesh has not; a file of another mesh.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x = jax.device_put(jnp.ones((16, 4)), jax.sharding.NamedSharding(mesh, P("data")))
        >>> jp.testing.assert_traffic(lambda x: x.sum(0), {("all-reduce", "data"): 1}, x)
    """
    is_report = isinstance(getattr(program, "collectives", None), tuple)
    is_given = is_report or isinstance(program, list | tuple)
    if is_given and (args or mesh is not None):
        raise ShardingError("assert_traffic: collectives are given, so arguments and a mesh have no effect.")
    if isinstance(expected, str | os.PathLike):
        _baseline.compare(_as_baseline(program if is_given else collectives(program, *args, mesh=mesh)), expected)
        return
    if is_report:
        raise ShardingError(
            "assert_traffic: a report has a row for each collective, not for each tensor. Compare it with a file, "
            'assert_traffic(report, "traffic.json"), or give the step and its arguments to count tensors.'
        )
    traffic: Any = program if is_given else collectives(program, *args, mesh=mesh)
    wanted = _wanted(expected, getattr(traffic, "axes", None))
    found: dict[_Key, list[Collective]] = {key: [] for key in wanted}
    for each in traffic:
        exactly = _Key(each.kind, each.axes, each.depth)
        anywhere = _Key(each.kind, each.axes, None)
        found.setdefault(exactly if exactly in wanted or anywhere not in wanted else anywhere, []).append(each)
    tally = {key: _tally(each) for key, each in found.items()}
    verdicts = {key: _verdict(wanted.get(key, Expect(count=0)), tally[key]) for key in found}
    if any(verdicts.values()):
        raise AssertionError(_failure(traffic, wanted, found, tally, verdicts))


def _as_baseline(program: Any) -> _baseline.Baseline:
    """Of a report, of what `collectives` gave, or of a part of that, which has forgotten its mesh."""
    axes = getattr(program, "axes", {})
    sizes = axes if isinstance(axes, dict) else getattr(program, "sizes", {})
    rows = getattr(program, "collectives", program)
    return _baseline.Baseline.of(rows, axes=sizes, compiler=getattr(program, "compiler", ""))


def _compile(fn: Any, args: tuple[Any, ...]) -> Any:
    if hasattr(fn, "as_text") and (hasattr(fn, "compile") or hasattr(fn, "memory_analysis")):
        if args:
            raise ShardingError(
                "collectives: the program is lowered or compiled already; its arguments have no effect."
            )
        return fn.compile() if hasattr(fn, "compile") else fn
    if hasattr(fn, "lower"):
        return fn.lower(*args).compile()
    if _tree.is_graph(args):
        from flax import nnx

        return nnx.jit(fn).lower(*args).compile()
    return jax.jit(fn).lower(*args).compile()


def _mesh(fn: Any, args: tuple[Any, ...], compiled: Any) -> Any:
    plan = getattr(fn, "plan", None)
    if plan is not None:
        return plan.mesh
    shardings = [getattr(leaf, "sharding", None) for leaf in _tree.leaves(args).values()]
    shardings += jax.tree.leaves(getattr(compiled, "input_shardings", None))
    shardings += jax.tree.leaves(getattr(compiled, "output_shardings", None))
    meshes = dict.fromkeys(each.mesh for each in shardings if isinstance(each, NamedSharding) and each.mesh.size)
    if len(meshes) != 1:
        which = listed([f"  {dict(mesh.shape)}" for mesh in meshes])
        raise ShardingError(
            "collectives: the arguments are on no mesh, so no axis can be named. Place them, or give mesh=."
            if not meshes
            else f"collectives: the arguments are on {len(meshes)} meshes:\n{which}\nGive mesh=."
        )
    return next(iter(meshes))


def _compiler(mesh: Any) -> str:
    devices = getattr(mesh, "devices", None)
    platform = jax.default_backend() if devices is None else devices.flat[0].platform
    sizes = ", ".join(f"{axis}={size}" for axis, size in dict(mesh.shape).items())
    return f"XLA:{platform.upper()}, jax {jax.__version__}, on ({sizes})"


def _wanted(expected: Mapping[Any, int | Expect | None], axes: tuple[str, ...] | None) -> dict[_Key, Expect]:
    wanted = {}
    for key, value in expected.items():
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise ShardingError(f"assert_traffic: the key {key!r} is not (kind, axes) or (kind, axes, depth).")
        kind, depth = key[0], key[2] if len(key) == 3 else None
        over: tuple[str, ...] = (key[1],) if isinstance(key[1], str) else tuple(key[1])
        if kind not in _hlo.KINDS:
            raise ShardingError(
                f"assert_traffic: {kind!r} is no collective.{nearest(str(kind), _hlo.KINDS)} "
                f"They are: {', '.join(_hlo.KINDS)}."
            )
        strange = [axis for axis in over if axes is not None and axis.partition("[")[0] not in (*axes, "?")]
        if strange:
            raise ShardingError(
                f"assert_traffic: the mesh has no axis {strange[0]!r}.{nearest(strange[0], axes or ())} "
                f"It has: {', '.join(axes or ())}."
            )
        order = {axis: place for place, axis in enumerate(axes or over)}
        over = tuple(sorted(over, key=lambda axis: order.get(axis.partition("[")[0], -1)))
        wanted[_Key(kind, over, depth)] = value if isinstance(value, Expect) else Expect(count=value)
    return wanted


def _tally(found: list[Collective]) -> Expect:
    known = [each.count for each in found if each.count is not None]
    if len(known) < len(found):
        return Expect(count=None)
    once = {each.name: each.count or 0 for each in found}
    moved = sum(each.bytes * (each.count or 0) for each in found)
    return Expect(count=sum(known), bytes=moved, rounds=sum(once.values()))


def _verdict(wanted: Expect, found: Expect) -> str:
    if found.count is None or wanted.count is None:
        if found.count == wanted.count:
            return ""
        return "a loop does not say how often it runs" if found.count is None else "the count is known"
    if found.count != wanted.count:
        more = found.count - wanted.count
        return f"surplus {more}" if more > 0 else f"missing {-more}"
    said = []
    if wanted.bytes is not None and wanted.bytes != found.bytes:
        said.append(f"{found.bytes} bytes instead of {wanted.bytes}")
    if wanted.rounds is not None and wanted.rounds != found.rounds:
        said.append(f"{found.rounds} rounds instead of {wanted.rounds}")
    return ", ".join(said)


def _failure(
    traffic: Iterable[Collective],
    wanted: Mapping[_Key, Expect],
    found: Mapping[_Key, list[Collective]],
    tally: Mapping[_Key, Expect],
    verdicts: Mapping[_Key, str],
) -> str:
    rows = [("", "collective", "axes", "depth", "expected", "found", "")]
    for key in sorted(found, key=lambda key: (key.kind, key.axes, -1 if key.depth is None else key.depth)):
        depth = "any" if key.depth is None else str(key.depth)
        expected = _counted(wanted[key].count) if key in wanted else "-"
        mark = "!" if verdicts[key] else ""
        rows.append((mark, key.kind, ", ".join(key.axes), depth, expected, _counted(tally[key].count), verdicts[key]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [_said(each) for key, verdict in verdicts.items() if verdict for each in found[key]]
    compiler = getattr(traffic, "compiler", f"jax {jax.__version__}")
    message = [f"What moves between devices is not as expected. Compiled by {compiler}.", *table]
    if lines:
        message += ["Found there:", listed(lines, 30)]
    if unread := getattr(traffic, "unread", ()):
        message += ["Not read of the program's text:", listed(list(unread), 5)]
    return "\n".join(message)


def _counted(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _said(each: Collective) -> str:
    times = "an unknown number of times" if each.count is None else f"x {each.count}"
    shape = f"{each.dtype}[{','.join(map(str, each.shape))}]"
    branch = ", in a branch" if each.conditional else ""
    spelt = "" if each.spelling == each.kind else f" as {each.spelling!r}"
    return (
        f"  {each.kind} over {', '.join(each.axes)}: {shape}, {each.bytes} B {times}, loop depth {each.depth}{branch}"
        f"{spelt}, at {each.source or 'an unknown line'} ({each.op_name or each.name})"
    )
