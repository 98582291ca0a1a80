"""`experts`: each token through the experts that a router chose for it, which may lie on other devices.

Where a plan is in force this is one full-manual kernel (`_manual`), so that it composes with the `vmap` over replicas,
with `scan` and with remat, and in a stage of a pipeline. Tokens are split over the axes of the batch, the expert axis
among them; experts lie over the expert axis, their hidden features over the axes of `mlp`. Tokens cross the expert axis
by one all-to-all to their experts and one back, and twice more in the backward pass. Two ways to dispatch them:

    Capacity   every expert takes the same number of slots from each sequence; what does not fit is dropped and counted
               as one batched product       B E C D  ->  all-to-all  ->  E/p (p B C) D
    Dropless   tokens sorted by expert, a grouped product; nothing is dropped. Each device sends every other one a
               buffer of a fixed size, since XLA:CPU has no `ragged_all_to_all` ("UNIMPLEMENTED", jax 0.12.0), and
               for its gradient it is young (jax#26915): p S D  ->  all-to-all  ->  p S D, sorted once more

Shapes: B batch, T sequence, D embed, F hidden, E experts, K choices of a token, C slots of an expert for one sequence,
S rows of a buffer, `p` the devices of the expert axis; in the kernel B, T, E and F are what one device has.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from . import _context
from ._constrain import layout
from ._errors import ShardingError
from ._grouped import grouped_dot
from ._hlo._flops import FILLED
from ._manual import manual, varying
from ._planned import Traced
from ._route import Routing
from ._types import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Every expert has a fixed number of slots for each sequence, and what does not fit is dropped.

    An expert takes at most `factor` K T / E tokens of a sequence, rounded up. First choices of all tokens come before
    second ones, and earlier tokens before later ones (GShard, algorithm 1). A choice that is dropped adds nothing: the
    token passes by the residual connection. What is dropped does not depend on the mesh, and is counted.

    Args:
        factor: 1 fits an even load exactly; at E / K nothing can be dropped.

    Raises:
        ShardingError: `factor` is not positive.
    """

    factor: float = 1.25

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ShardingError(f"Capacity: factor is {self.factor}. Use a positive one, such as 1.25.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropless:
    """Tokens are sorted by expert, and every expert takes all that come.

    Args:
        buffer: How many times its even share of rows a device may send to each device of the expert axis. By default
            a buffer holds all that a device could send, so that nothing is ever dropped, for `p` times the memory of an
            even load. With less, rows beyond it are dropped and counted; which, depends on the mesh.

    Raises:
        ShardingError: `buffer` is below 1.
    """

    buffer: float | None = None

    def __post_init__(self) -> None:
        if self.buffer is not None and self.buffer < 1:
            raise ShardingError(f"Dropless: buffer is {self.buffer}. Use 1 or more, or None for one that holds all.")


def experts(
    x: jax.Array,
    routing: Routing,
    *,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    dispatch: Capacity | Dropless = Dropless(),
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of what its chosen experts make of each token: `(activation(x gate) * (x up)) down`.

    Where the plan splits `expert` (`jp.EP`), each pass moves every chosen token to its expert and back, two
    all-to-alls over the expert axis; with the sizes of its groups first if `Dropless`. Where it splits `mlp` too
    (`jp.TP`), one all-reduce of the sums follows, [B, T, D]. Weights do not move, but for FSDP's gathers. The step's
    `notes` say which kernel was taken.

    Args:
        x: [B, T, D].
        routing: From `jp.route` or `jp.route_by_expert`.
        up: [E, D, F].
        down: [E, F, D].
        gate: [E, D, F]; without it an expert is `activation(x up) down`.
        activation: Of the hidden features, one by one.
        dispatch: `jp.Capacity(...)`, or `jp.Dropless(...)`. Experts that chose their tokens have slots already, and
            take neither.

    Returns:
        [B, T, D] in the dtype of `x`, and [B] float32: how many choices of each sequence were dropped. Show it.

    Raises:
        ShardingError: Shapes do not fit; an axis does not divide a size; or `Capacity`, whose slots are for a whole
            sequence, where the plan splits the sequence over an axis that splits no hidden features.

    Example:
        >>> x, (up, down) = jnp.ones((1, 4, 2)), (jnp.ones((3, 2, 5)), jnp.ones((3, 5, 2)))
        >>> routing = jp.route(jnp.zeros((1, 4, 3)), 1)  # all tokens choose expert 0, which has 2 slots
        >>> y, dropped = jp.experts(x, routing, up=up, down=down, dispatch=jp.Capacity(factor=1.5))
        >>> [f"{value:.1f}" for value in y[0, :, 0]], dropped.tolist()
        (['8.8', '8.8', '0.0', '0.0'], [2.0])
    """
    _check_shapes(x, routing, up, down, gate)
    region = _context.current()
    matrices = (up, down) if gate is None else (up, down, gate)
    kernel = ft.partial(_on_device, activation=activation, dispatch=dispatch, by_expert=routing.by_expert)
    if region is None:
        return kernel(x, routing.chosen, routing.weights, matrices, at=_At())
    if region.plan.context is not None and region.plan.context.axis in region.replicas:
        raise ShardingError(
            "experts: loads and slots are of whole sequences, and CP(reduce='step') shows a model the tokens of one "
            "device. Use CP(reduce='microbatch')."
        )
    batch, seq, hidden = layout(region, "experts", ("batch", "seq", "mlp"), (*x.shape[:2], up.shape[2]))
    (expert,) = layout(region, "experts", ("expert",), up.shape[:1])
    if seq and (isinstance(dispatch, Capacity) or routing.by_expert):
        raise ShardingError(
            f"experts: slots are for a whole sequence, but this plan splits the sequence over {'+'.join(seq)}. Use "
            "jp.route and dispatch=jp.Dropless()."
        )
    _note(region, routing, dispatch, expert)
    tokens = P(batch, seq)
    into, out_of = P(expert, None, hidden), P(expert, hidden, None)
    return manual(
        region,
        jax.jit(ft.partial(kernel, at=_At(expert=expert, hidden=hidden, batch=batch, seq=seq))),  # as in `_vocab`
        in_specs=(tokens, tokens, tokens, (into, out_of, into)[: len(matrices)]),
        out_specs=(tokens, P(batch)),
    )(x, routing.chosen, routing.weights, matrices)


MLP = Callable[[Callable[[jax.Array, jax.Array], jax.Array], jax.Array], jax.Array]
"""`mlp(dot, rows)`: rows through their experts, `dot` being the product of rows and the matrices of their experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _At:
    """The mesh axes of experts, of their hidden features, of the batch and of the sequence."""

    expert: Axes = ()
    hidden: Axes = ()
    batch: Axes = ()
    seq: Axes = ()


def _on_device(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    matrices: tuple[jax.Array, ...],
    *,
    activation: Callable[[jax.Array], jax.Array],
    dispatch: Capacity | Dropless,
    by_expert: bool,
    at: _At,
) -> tuple[jax.Array, jax.Array]:
    """One device's tokens through all experts."""
    # Varying, matrices in float32, before anything is computed: so that gradients of matrices are summed in float32,
    # and those of tokens over the axes of hidden features once a token, not once a choice.
    others = tuple(axis for axis in (*at.batch, *at.seq) if axis not in at.expert)
    matrices = tuple(varying(each.astype(jnp.float32), others).astype(each.dtype) for each in matrices)
    rows, weights = varying(x, at.hidden), varying(weights, at.hidden)

    def mlp(dot: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
        made = dot(rows, matrices[0])
        inside = activation(made) if len(matrices) == 2 else activation(dot(rows, matrices[2])) * made
        return dot(inside, matrices[1])

    num_experts = matrices[0].shape[0] * _size(at.expert)
    if by_expert:
        y, dropped = _in_slots(rows, chosen, weights, mlp, at), jnp.zeros(x.shape[:1])
    elif isinstance(dispatch, Capacity):
        size = math.ceil(dispatch.factor * chosen[0].size / num_experts)
        token, kept, dropped = _slots(chosen, weights, num_experts, size)
        y = _in_slots(rows, token, kept, mlp, at)
    else:
        y, dropped = _in_buffers(rows, chosen, weights, mlp, dispatch, num_experts, at)
        dropped = lax.psum(dropped, at.seq) if at.seq else dropped
    y = y.astype(x.dtype)
    return (lax.psum(y, at.hidden) if at.hidden else y), dropped


def _slots(
    chosen: jax.Array, weights: jax.Array, num_experts: int, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which token is in each slot, with what weight, both [B, E, C], and how many choices found none, [B].

    Written without `vmap` over sequences: one inside of the `vmap` over replicas fails on every operation that mixes
    what is mapped and what is not ("pvary is a invariant->variant collective", jax 0.10.2).

    Args:
        chosen: [B, T, K].
        weights: [B, T, K].
        num_experts: E.
        size: C.
    """
    queue = jnp.swapaxes(chosen, 1, 2).reshape(len(chosen), -1)  # first choices first: B KT
    order = jnp.argsort(queue, axis=1, stable=True)
    counts = (queue[:, :, None] == jnp.arange(num_experts)[None, None]).sum(1)  # B E
    slot = jnp.arange(size)[None, None]
    place = (jnp.cumsum(counts, axis=1) - counts)[:, :, None] + slot  # B E C
    place = jnp.minimum(place, queue.shape[1] - 1).reshape(len(chosen), -1)
    entry = jnp.take_along_axis(order, place, axis=1)  # B EC
    num_tokens = chosen.shape[1]
    token, choice = entry % num_tokens, entry // num_tokens
    kept = jnp.take_along_axis(weights.reshape(len(weights), -1), token * chosen.shape[2] + choice, axis=1)
    shape = (len(chosen), num_experts, size)
    kept = jnp.where(slot < counts[:, :, None], kept.reshape(shape), 0)
    return token.reshape(shape), kept, jnp.maximum(counts - size, 0).sum(1).astype(jnp.float32)


def _in_slots(x: jax.Array, token: jax.Array, weights: jax.Array, mlp: MLP, at: _At) -> jax.Array:
    """[B, T, D] float32: the tokens in each slot through their expert, one batched product, and back.

    Args:
        x: [B, T, D].
        token: [B, E, C], which token of the sequence is in a slot.
        weights: [B, E, C], 0 for empty slots.
        mlp: The experts of this device.
        at: The axes.
    """
    batch, num_experts, size = token.shape
    place = jnp.swapaxes(token + jnp.arange(batch)[:, None, None] * x.shape[1], 0, 1).reshape(-1)  # EBC
    rows = x.reshape(-1, x.shape[2])[place].reshape(num_experts, batch * size, -1)  # E BC D
    if at.expert:
        rows = lax.all_to_all(rows, at.expert, split_axis=0, concat_axis=1, tiled=True)  # E/p pBC D
    rows = mlp(lambda rows, matrices: jnp.einsum("emk,ekn->emn", rows, matrices), rows)
    if at.expert:
        rows = lax.all_to_all(rows, at.expert, split_axis=1, concat_axis=0, tiled=True)  # E BC D
    rows = rows.reshape(place.size, -1).astype(jnp.float32) * jnp.swapaxes(weights, 0, 1).reshape(-1)[:, None]
    return jnp.zeros((batch * x.shape[1], x.shape[2]), jnp.float32).at[place].add(rows).reshape(x.shape)


def _in_buffers(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, mlp: MLP, dispatch: Dropless, num_experts: int, at: _At
) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] float32: every choice of a token through its expert, sorted by expert, and back; and the dropped, [B].

    A row is one choice of one token: M = B T K of them on a device.
    """
    num_choices, parts = chosen.shape[-1], _size(at.expert)
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # M
    token = order // num_choices
    counts = _counts(chosen.reshape(-1), num_experts)  # E
    rows, kept = x.reshape(-1, x.shape[-1])[token], weights.reshape(-1)[order]
    if not at.expert:
        made, lost = mlp(lambda rows, matrices: grouped_dot(rows, matrices, counts), rows), jnp.zeros(len(token))
    else:
        share = order.size / parts
        size = order.size if dispatch.buffer is None else min(order.size, math.ceil(dispatch.buffer * share))
        made, lost = _across(rows, counts.reshape(parts, -1), size, mlp, at)
    made = made.astype(jnp.float32) * kept[:, None]
    y = jnp.zeros((x.shape[0] * x.shape[1], x.shape[2]), jnp.float32).at[token].add(made)
    dropped = jnp.zeros(x.shape[:1]).at[token // x.shape[1]].add(lost)
    return y.reshape(x.shape), dropped


def _across(rows: jax.Array, counts: jax.Array, size: int, mlp: MLP, at: _At) -> tuple[jax.Array, jax.Array]:
    """Rows sorted by expert to the devices of their experts, through these, and back to where they were.

    Args:
        rows: [M, D].
        counts: [p, E/p], how many rows each expert gets from here.
        size: S, the rows of the buffer for one device.
        mlp: The experts of this device.
        at: The axes.

    Returns:
        [M, D], zeros for what no buffer had room for, and [M], 1 for these.
    """
    parts, own = counts.shape
    sent = counts.sum(1)  # p
    start = jnp.cumsum(sent) - sent
    slot = jnp.arange(size)
    place = start[:, None] + slot[None]  # p S
    buffer = _rows_where(slot[None] < sent[:, None], rows[jnp.minimum(place, len(rows) - 1)])
    upto = jnp.minimum(jnp.cumsum(counts, axis=1), size)  # p E/p: how many rows of a buffer are of experts so far
    buffer, upto = (lax.all_to_all(each, at.expert, 0, 0, tiled=True) for each in (buffer, upto))
    # What came is sorted by expert within each buffer; sort it over all buffers, room that was not needed last.
    expert = (slot[None, :, None] >= upto[:, None]).sum(-1).reshape(-1)  # pS, E/p for room
    order = jnp.argsort(expert, stable=True)
    sizes, filled = _counts(expert, own), jnp.sort(expert) < own

    def dot(came: jax.Array, matrices: jax.Array) -> jax.Array:
        with jax.named_scope(FILLED.format(min(len(rows), len(came)), len(came))):  # as many as leave, in the mean
            return _rows_where(filled, grouped_dot(came, matrices, sizes))

    made = mlp(dot, buffer.reshape(parts * size, -1)[order])
    made = jnp.zeros_like(made).at[order].set(made, unique_indices=True).reshape(parts, size, -1)
    made = lax.all_to_all(made, at.expert, 0, 0, tiled=True)
    device = jnp.repeat(jnp.arange(parts), sent, total_repeat_length=len(rows))
    rank = jnp.arange(len(rows)) - start[device]
    fits = rank < size
    back = _rows_where(fits, made[device, jnp.minimum(rank, size - 1)])
    return back, (~fits).astype(jnp.float32)


def _counts(ids: jax.Array, number: int) -> jax.Array:
    """[number] integers: how often each of the first numbers is in `ids`."""
    return jnp.zeros(number, jnp.int32).at[ids].add(1, mode="drop")


def _rows_where(wanted: jax.Array, rows: jax.Array) -> jax.Array:
    """`rows` where `wanted`, zeros elsewhere, whatever is there."""
    return jnp.where(wanted[..., None], rows, jnp.zeros_like(rows))


def _size(axes: Axes) -> int:
    return math.prod(map(lax.axis_size, axes))


def _note(region: _context.Region, routing: Routing, dispatch: Capacity | Dropless, expert: Axes) -> None:
    """Say in the step's notes which kernel was taken."""
    if not isinstance(region, Traced):
        return
    if isinstance(dispatch, Dropless) and not routing.by_expert:
        kind, how = f"Dropless(buffer={dispatch.buffer})", "sorted rows, jax.lax.ragged_dot"
        moved = "padded buffers"
    else:
        kind = f"Capacity(factor={dispatch.factor})" if isinstance(dispatch, Capacity) else "expert choice"
        how, moved = "one batched product", "slots"
    where = f"{moved} by all-to-all over {'+'.join(expert)}" if expert else "nothing crosses devices"
    note = f"experts: {kind}, {how}; {where}"
    if note not in region.notes:
        region.notes.append(note)


def _check_shapes(x: jax.Array, routing: Routing, up: jax.Array, down: jax.Array, gate: jax.Array | None) -> None:
    failures = []
    if x.ndim != 3:
        failures.append(f"x {x.shape}: tokens have shape [batch, sequence, embed]")
    known = routing.load.shape[-1]
    if up.ndim != 3 or up.shape[0] != known or up.shape[1] != x.shape[-1]:
        failures.append(
            f"up {up.shape}: for x {x.shape} and a router of {known} experts, [{known}, {x.shape[-1]}, hidden]"
        )
    elif down.shape != (known, up.shape[2], up.shape[1]):
        failures.append(f"up {up.shape} and down {down.shape}: down is [{known}, {up.shape[2]}, {up.shape[1]}]")
    if gate is not None and gate.shape != up.shape:
        failures.append(f"up {up.shape} and gate {gate.shape}: these have one shape")
    leading = routing.chosen.shape[: 1 if routing.by_expert else 2]
    if leading != x.shape[: len(leading)]:
        failures.append(f"x {x.shape} and a routing {routing.chosen.shape}: it is one of other tokens")
    if failures:
        raise ShardingError("\n".join(f"experts: {failure}." for failure in failures))
