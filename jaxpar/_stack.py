"""A stack of equal blocks, scanned over its layers and rematerialised: one block's weights are whole at a time.

An FSDP model that is unrolled holds every gathered weight at once: 1 GiB over 8 chips peaked at 1,213 MiB unrolled, at
274 MiB scanned and rematerialised. A `Stack` keeps the parameters of `num` equal blocks stacked on a leading dim, the
layers, and runs them by `jax.lax.scan`. A model either has one (`jp.Stack(make_block, num, rngs=rngs)`) or gets one
from `FSDP(blocks="blocks.*")`, which puts a `Stack` where the model's own list of blocks was. The model's own loop,
`for block in self.blocks: x = block(x)`, then still reads and computes the same: iterating yields one stand-in a layer,
and the calls, which must chain, run as one scan.
"""

import contextlib
import dataclasses
import functools as ft
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import _context
from ._errors import ShardingError, StepError, listed, nearest
from ._planned import Traced
from ._types import PyTree

REMAT = {
    "none": "keep every intermediate result: fastest, most memory",
    "full": "keep only each block's input and compute the block again in the backward pass: least memory",
    "dots": "keep the results of matrix products with parameters, compute the rest again",
}
"""The names of remat policies, and what they do."""


def check_remat(name: str) -> None:
    """Raise `StepError` unless `name` is a remat policy."""
    if name not in REMAT:
        raise StepError(f"remat={name!r} is not a remat policy.{nearest(name, REMAT)} Use one of {', '.join(REMAT)}.")


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function`, keeping for its backward pass only what the policy named `policy` keeps.

    Example:
        >>> f = jp.remat(lambda x: jnp.sin(jnp.sin(x)), "full")
        >>> bool(jax.grad(f)(1.0) == jax.grad(lambda x: jnp.sin(jnp.sin(x)))(1.0))
        True
    """
    check_remat(policy)
    if policy == "none":
        return function
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(function, policy=kept)


class Stacked(nnx.Module):
    """Equal blocks whose variables are stacked on a leading dim: what `Stack` is, and what `FSDP(blocks=...)` makes.

    Attributes:
        each: A block whose variables hold all layers.
        num: How many layers.
        remat: What the backward pass keeps; see `jp.remat`.
        shared: Key paths of variables in `each` that are not stacked: all layers use the one.
        chunks: With more than one, variables are stacked as [chunks, layers of a chunk, ...]: a stage of an interleaved
            pipeline then holds its layers of each chunk, which do not follow one another, as one piece of an array.
    """

    def __init__(self, each: nnx.Module, num: int, remat: str, shared: tuple[Any, ...] = ()):
        self.each = each
        self.num = num
        self.remat = remat
        self.shared = shared
        self.chunks = 1

    @classmethod
    def of(cls, blocks: Sequence[nnx.Module], *, path: str, remat: str = "full", outside: frozenset[int]) -> "Stacked":
        """A stack of the existing `blocks`, whose variables have equal structure.

        Args:
            blocks: At least one; the first one's object is kept as the template.
            path: Where they live, for messages.
            remat: As in the constructor.
            outside: `id`s of variables that the rest of the model also holds. These, and the ones that several blocks
                share, are not stacked: all layers use the one variable.

        Raises:
            ShardingError: Naming every block and leaf that differs from the first.
        """
        check_remat(remat)
        found = [_variables(block) for block in blocks]
        _check_equal(blocks, found, path)
        counts: dict[int, int] = {}
        for variables in found:
            for variable in variables.values():
                counts[id(variable)] = counts.get(id(variable), 0) + 1
        shared = tuple(key for key, variable in found[0].items() if counts[id(variable)] > 1 or id(variable) in outside)
        for key, variable in found[0].items():
            if key not in shared:
                variable.set_raw_value(jnp.stack([variables[key].get_raw_value() for variables in found]))
        return cls(blocks[0], len(blocks), remat, shared)

    @property
    def layer_dims(self) -> int:
        """Leading dims of its variables that count layers."""
        return 1 if self.chunks == 1 else 2

    def cut(self, chunks: int) -> None:
        """Lay the variables out as `[chunks, layers of a chunk, ...]`."""
        for keys, variable in _variables(self.each).items():
            if keys not in self.shared:
                value = variable.get_raw_value()
                # Fused with what makes the values, the new shape would round them differently.
                value = jax.lax.optimization_barrier(value)
                variable.set_raw_value(value.reshape(chunks, self.num // chunks, *value.shape[1:]))
        self.chunks = chunks

    def __call__(self, x: PyTree, *rest: Any, **settings: Any) -> PyTree:
        catch = _catch.value
        if catch is not None:
            return catch(self, x, rest, settings)
        graphdef, state = nnx.split(self.each)
        flat = nnx.to_flat_state(state)
        once = [(keys, variable) for keys, variable in flat if keys in self.shared and isinstance(variable, nnx.Param)]
        carried_keys, carried = _parted(
            (keys, variable) for keys, variable in flat if keys in self.shared and not isinstance(variable, nnx.Param)
        )
        mine = [(keys, variable) for keys, variable in flat if keys not in self.shared]
        parameter_keys, parameters = _parted(pair for pair in mine if isinstance(pair[1], nnx.Param))
        state_keys, per_layer = _parted(pair for pair in mine if not isinstance(pair[1], nnx.Param))

        def layer(carry: Any, this: Any) -> Any:
            x, carried = carry
            own, state = this
            here = [
                *once,
                *zip(carried_keys, carried, strict=True),
                *zip(parameter_keys, own, strict=True),
                *zip(state_keys, state, strict=True),
            ]
            block = nnx.merge(graphdef, nnx.from_flat_state(here))
            y = _constrained(block(_constrained(x), *rest, **settings))
            _check_alike(x, y)
            after = dict(nnx.to_flat_state(nnx.state(block)))
            return (y, [after[keys] for keys in carried_keys]), [after[keys] for keys in state_keys]

        region = _context.current()
        axis = None if region is None else region.plan.stage_axis
        per_layer = self._in_a_row(per_layer)
        if region is None or axis is None:
            run = remat(layer, self.remat)
            (x, carried), per_layer = jax.lax.scan(
                run, (x, carried), (self._in_a_row(parameters), per_layer), length=self.num
            )
        else:
            raw = [each.get_raw_value() for each in parameters]

            def fetched(carry: Any, this: Any) -> Any:
                index, state = this
                own = _from_stage(raw, index, region.mesh, axis, self.layer_dims)
                return layer(carry, ([each.replace(value) for each, value in zip(parameters, own, strict=True)], state))

            (x, carried), per_layer = jax.lax.scan(fetched, (x, carried), (jnp.arange(self.num), per_layer))
        if self.chunks > 1:
            per_layer = jax.tree.map(lambda leaf: leaf.reshape(self.chunks, -1, *leaf.shape[1:]), per_layer)
        if carried or per_layer:
            changed = [*zip(carried_keys, carried, strict=True), *zip(state_keys, per_layer, strict=True)]
            nnx.update(self.each, nnx.from_flat_state(changed))
        return x

    def _in_a_row(self, leaves: list[Any]) -> list[Any]:
        """`leaves` with all layers on one leading dim."""
        if self.chunks == 1:
            return leaves
        return jax.tree.map(lambda leaf: leaf.reshape(self.num, *leaf.shape[2:]), leaves)

    def one_layer(self) -> "Layer":
        """What a pipeline needs of this stack: its variables, and how one layer runs."""
        return Layer(self)

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator["_Layer"]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        layers = [_Layer(self, position) for position in range(self.num)]
        chain = _Chain(self)
        for one in layers:
            one.chain = chain
        return layers[index]


class Stack(Stacked):
    """`num` equal blocks with their variables stacked on a leading dim, run one after another by a scan.

    Calling it, `stack(x, *rest, **settings)`, feeds `x` through every block as `x = block(x, *rest, **settings)`; a
    block returns what it takes: same structure, shapes and dtypes. Variables that the blocks change (batch statistics,
    random-number counters) are kept, per layer. Under a plan each layer's parameters move to their compute spec inside
    the scan, so with FSDP one layer is gathered at a time, forward and (under `remat="full"`) again backward.

    Args:
        make_block: Makes one block from its random-number streams.
        num: How many blocks.
        rngs: Split once, a stream per block.
        remat: What the backward pass keeps: `"full"`, `"dots"` or `"none"` (`jp.remat`).

    Raises:
        StepError: From a call, if a block returns another structure, shape or dtype than it takes.

    Example:
        >>> stack = jp.Stack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 3, rngs=nnx.Rngs(0))
        >>> stack.each.kernel.shape, stack(jnp.ones((2, 4))).shape
        ((3, 4, 4), (2, 4))
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], num: int, *, rngs: nnx.Rngs, remat: str = "full"):
        check_remat(remat)
        if num < 1:
            raise StepError(f"jp.Stack: num is {num}. A stack has at least one block.")
        num = _shortened(num)
        make_all = nnx.vmap(make_block, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        super().__init__(make_all(rngs.split(num)), num, remat)


class Layer:
    """One layer of a stack as a function of its variables, the stream, and what else blocks are given.

    Attributes:
        variables: Those of all layers, by key path.
        remat: As in the stack.
        layer_dims: As in the stack.
        num: As in the stack.
    """

    def __init__(self, stack: Stacked):
        self._graphdef, state = nnx.split(stack.each)
        self.variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
        self.shared = [keys for keys in self.variables if keys in stack.shared]
        self.remat, self.layer_dims, self.num = stack.remat, stack.layer_dims, stack.num

    def __call__(self, values: dict[Any, Any], x: PyTree, rest: tuple[Any, ...], settings: dict[str, Any]) -> PyTree:
        """`x` through the layer whose variables have these values."""

        def run(values: dict[Any, Any], x: PyTree) -> PyTree:
            pairs = [(keys, variable.replace(values[keys])) for keys, variable in self.variables.items()]
            y = _constrained(nnx.merge(self._graphdef, nnx.from_flat_state(pairs))(_constrained(x), *rest, **settings))
            _check_alike(x, y)
            return y

        return remat(run, self.remat)(values, x)


Catch = Callable[[Stacked, PyTree, tuple[Any, ...], dict[str, Any]], PyTree]
"""What is called in place of a stack, with its arguments."""

_catch = jax.make_user_context(None)


@contextlib.contextmanager
def caught(catch: Catch) -> Iterator[None]:
    """While this lasts, calls of stacks go to `catch`: a pipeline runs their layers elsewhere."""
    with _catch(catch):
        yield


@ft.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _from_stage(leaves: list[Any], index: jax.Array, mesh: Any, axis: str, layer_dims: int) -> list[Any]:
    """Layer `index` of leaves whose layers are split over `axis`, sent from its stage to all others."""

    def one(leaf: jax.Array, index: jax.Array) -> jax.Array:
        each = leaf.shape[layer_dims - 1]
        across = each * jax.lax.axis_size(axis)
        stage, within = index % across // each, index % each
        local = leaf if layer_dims == 1 else jax.lax.dynamic_index_in_dim(leaf, index // across, 0, keepdims=False)
        value = jax.lax.dynamic_index_in_dim(local, within, 0, keepdims=False)
        # In float32, for XLA on CPU aborts on a sum in bfloat16 here.
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        sent = jax.lax.psum(jnp.where(jax.lax.axis_index(axis) == stage, wide, 0), axis)
        return sent.astype(value.dtype)

    lead = jax.sharding.PartitionSpec(*[None] * (layer_dims - 1), axis)
    return jax.shard_map(
        lambda leaves, index: [one(leaf, index) for leaf in leaves],
        mesh=mesh,
        in_specs=(lead, jax.sharding.PartitionSpec()),
        out_specs=jax.sharding.PartitionSpec(),
        axis_names={axis},
    )(leaves, index)


@_from_stage.defjvp
def _refuse_to_differentiate(*_: Any) -> Any:
    raise StepError(
        "this plan runs the blocks in a pipeline (jp.PP), whose backward passes are no derivative that JAX could take "
        "by itself: differentiate the loss with jp.value_and_grad(loss) in place of jax.value_and_grad or "
        "nnx.value_and_grad. Without a derivative, as here, every stage runs all layers."
    )


_limit = jax.make_user_context(None)  # part of JAX's trace-cache key: a factory may be jitted


@dataclasses.dataclass(frozen=True, eq=False)
class Limit:
    """The most layers that a `Stack` made while `limited` gets; `asked` is how many each wanted."""

    layers: int
    asked: list[int] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def limited(layers: int) -> Iterator[Limit]:
    """While this lasts, a new `Stack` has at most `layers` layers: the others are never made, not even traced."""
    limit = Limit(layers)
    with _limit(limit):
        yield limit


def _shortened(num: int) -> int:
    limit = _limit.value
    if limit is None:
        return num
    limit.asked.append(num)
    return min(num, limit.layers)


class _Layer:
    """Stands for one block of a stack in a model's own loop over its blocks."""

    chain: "_Chain"

    def __init__(self, stack: Stacked, position: int):
        self.stack = stack
        self.position = position

    def __call__(self, x: Any, *rest: Any, **settings: Any) -> Any:
        return self.chain.call(self.position, x, rest, settings)

    def __getattr__(self, name: str) -> Any:
        raise StepError(
            f"block {self.position} of a stack: its attribute {name!r} was read, but a stacked block can only be "
            f"called. "
            "Leave these blocks unstacked, FSDP(blocks=None), or move the read into the block."
        )


@dataclasses.dataclass
class _Chain:
    """One pass over a stack's layers: it runs when the last is called, and insists that each fed the next."""

    stack: Stacked
    waiting: "_Pending | None" = None
    first: tuple[Any, Any, Any] | None = None

    def call(self, position: int, x: Any, rest: Any, settings: Any) -> Any:
        expected = 0 if self.waiting is None else self.waiting.position + 1
        if position != expected:
            raise StepError(
                f"blocks of a stack were called out of order: block {position} after block {expected - 1}. "
                "A stack runs every block once, in order; leave these unstacked: FSDP(blocks=None)."
            )
        if self.first is None or self.waiting is None:
            self.first = (x, rest, settings)
        elif x is not self.waiting:
            raise StepError(
                f"block {position} of a stack was not called with the result of block {position - 1}, unchanged. "
                "What happens between blocks belongs inside them; or leave these unstacked: FSDP(blocks=None)."
            )
        elif not _identical((rest, settings), self.first[1:]):
            raise StepError(
                f"block {position} of a stack was called with other further arguments than block 0. "
                "All layers of a scan get the same ones; or leave these unstacked: FSDP(blocks=None)."
            )
        if position + 1 < self.stack.num:
            self.waiting = _Pending(position)
            return self.waiting
        self.waiting = None
        x, rest, settings = self.first
        return self.stack(x, *rest, **settings)


class _Pending:
    """The result of a block that is not the last: fit only to be given to the next block."""

    def __init__(self, position: int):
        self.position = position

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise StepError(
            f"the result of block {self.position} of a stack was used outside of block {self.position + 1}. "
            "Intermediate results of a scan are not kept; leave these blocks unstacked: FSDP(blocks=None)."
        )

    def __getattr__(self, name: str) -> Any:
        return self._refuse()

    __jax_array__ = __array__ = __iter__ = __getitem__ = __len__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = __neg__ = (
        _refuse
    )


def _parted(pairs: Any) -> tuple[list[Any], list[Any]]:
    """Pairs as a list of firsts and a list of seconds."""
    found = list(pairs)
    return [first for first, _ in found], [second for _, second in found]


def _identical(a: Any, b: Any) -> bool:
    """Whether two argument lists are the same objects, leaf by leaf."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    return tree_a == tree_b and all(
        x is y or (not isinstance(x, jax.Array) and x == y) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def _variables(module: nnx.Module) -> dict[Any, nnx.Variable]:
    """The variables of `module` by key path, the objects themselves."""
    return {keys: node for keys, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)}


def _check_equal(blocks: Sequence[nnx.Module], found: list[dict[Any, nnx.Variable]], path: str) -> None:
    def shapes(variables: dict[Any, nnx.Variable]) -> dict[str, str]:
        return {
            ".".join(map(str, keys)): f"{variable.get_raw_value().dtype}{list(variable.get_raw_value().shape)}"
            for keys, variable in variables.items()
        }

    first = shapes(found[0])
    problems = []
    for index, variables in enumerate(found[1:], 1):
        other = shapes(variables)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                problems.append(
                    f"{path}.{index}.{key} is {other.get(key, 'missing')}, {path}.0.{key} is "
                    f"{first.get(key, 'missing')}"
                )
        if type(blocks[index]) is not type(blocks[0]):
            problems.append(
                f"{path}.{index} is a {type(blocks[index]).__name__}, {path}.0 a {type(blocks[0]).__name__}"
            )
    settings = [_settings(block) for block in blocks]
    for index, own in enumerate(settings[1:], 1):
        for key in sorted(settings[0].keys() | own.keys()):
            if not _same(settings[0].get(key), own.get(key)):
                problems.append(
                    f"{path}.{index}.{key} is {own.get(key, 'missing')!r}, {path}.0.{key} is "
                    f"{settings[0].get(key, 'missing')!r}"
                )
    if problems:
        raise ShardingError(
            f"{path}.*: these blocks are not equal, so they cannot be stacked:\n{listed(problems)}\n"
            "Give FSDP(blocks=...) a pattern of equal blocks only, or leave it out and hold the blocks whole."
        )


def _settings(block: nnx.Module) -> dict[str, Any]:
    """What a block holds beside its variables and modules: sizes, flags, functions."""
    return {
        ".".join(map(str, keys)): node
        for keys, node in nnx.iter_graph(block)
        if not isinstance(node, nnx.Pytree | nnx.Variable) and not str(keys[-1]).startswith("_pytree__")
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; functions are, if they run the same code over equal things."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ft.partial):
        return _same(a.func, b.func) and _same(a.args, b.args) and _same(a.keywords, b.keywords)
    if isinstance(a, types.FunctionType):
        cells = [tuple(cell.cell_contents for cell in function.__closure__ or ()) for function in (a, b)]
        return a.__code__ is b.__code__ and _same(*cells) and _same(a.__defaults__, b.__defaults__)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.all(a == b))


def _check_alike(x: PyTree, y: PyTree) -> None:
    def shapes(tree: PyTree) -> Any:
        return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)

    if jax.tree.structure(x) != jax.tree.structure(y) or shapes(x) != shapes(y):
        raise StepError(
            f"a stacked block takes {shapes(x)} and returns {shapes(y)}. A block of a scan returns what it takes; "
            "carry further results in its input, or leave these blocks unstacked: FSDP(blocks=None)."
        )


def _constrained(x: PyTree) -> PyTree:
    """The activations between blocks: batch and sequence split as the plan says, the rest left to the compiler."""
    region = _context.current()
    if region is None:
        return x

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        if leaf.ndim >= 3 and isinstance(region, Traced):
            region.dims.add("seq")
        free = jax.sharding.PartitionSpec.UNCONSTRAINED
        axes = [region.batch_axes, region.axes_of("seq") if leaf.ndim >= 3 else ()]
        sizes = [_product(region.mesh.shape[axis] for axis in each) for each in axes]
        entries = [
            (each or None) if size % number == 0 else free
            for each, size, number in zip(axes, leaf.shape, sizes, strict=False)
        ]
        spec = jax.sharding.PartitionSpec(*entries, *([free] * (leaf.ndim - len(entries))))
        return region.constrain(leaf, spec)

    return jax.tree.map(one, x)


def _product(numbers: Any) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
