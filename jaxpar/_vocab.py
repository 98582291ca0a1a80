"""`embed` and `cross_entropy`: the two ends of a language model, split over the vocabulary.

By specs alone XLA gathers embedded activations in the lookup and full-vocabulary logits in the loss. Where the plan
splits `vocab`, both are full-manual `jax.shard_map` kernels instead: each device serves its own rows. (Full-manual
composes with the `vmap` over replicas and with `scan` and remat; a kernel that is manual over a subset does not.)

Shapes: B batch, T sequence, D embed, V vocabulary, N the tokens on one device, C the tokens of one chunk;
`v` is the number of devices that share the vocabulary.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from . import _context
from ._constrain import layout
from ._copies import copied, copies_for
from ._errors import ShardingError
from ._manual import varying
from ._types import Axes


def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of `table` named by `ids`.

    Where the plan splits `vocab`, each device looks up the ids that it holds, and one all-reduce over the axes of
    `vocab` sums the parts: B T D elements, of which all but one are zeros. Backward moves no activation; the gradient
    of the table is summed once over the axes of the batch. Otherwise nothing moves.

    Args:
        table: [V, D].
        ids: [B] or [B, T] integers. One outside of 0..V-1 gives NaN.

    Returns:
        [B, D] or [B, T, D], in the dtype of `table`.

    Raises:
        ShardingError: The shapes do not fit, or the axes do not divide V, B or T.

    Example:
        >>> jp.embed(jnp.eye(4), jnp.array([[2, 0]]))
        Array([[[0., 0., 1., 0.],
                [1., 0., 0., 0.]]], dtype=float32)
    """
    if table.ndim != 2 or ids.ndim not in (1, 2):
        raise ShardingError(
            f"embed: table {table.shape} and ids {ids.shape}. A table has shape [vocab, embed], ids [batch] or "
            "[batch, seq]."
        )
    ids = ids.astype(jnp.int32)
    region = _context.current()
    if region is None or not region.axes_of("vocab"):
        return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    vocab, *tokens = layout(region, "embed", ("vocab", *_TOKEN_DIMS[: ids.ndim]), (table.shape[0], *ids.shape))
    kernel = jax.shard_map(
        ft.partial(_embed_rows, vocab=vocab, vocab_size=table.shape[0]),
        mesh=region.mesh,
        in_specs=(P(vocab), P(*tokens)),
        out_specs=P(*tokens),
    )
    return kernel(table, ids)


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy of `hidden @ head`, summed, without ever holding the logits of all tokens.

    Each device takes its own tokens `chunk` at a time and rematerialises their logits in the backward pass: the
    memory is `chunk` × V / v float32 numbers, for one matmul more than holding all logits would take. Where the plan
    splits `vocab`, each device has V / v logits a token, and what crosses the axes of `vocab` is 3 float32 numbers a
    token (once, outside of the loop), and the gradient of `hidden` once. The gradient of `head` adds up in float32
    over chunks and crosses the axes of the batch once, after the loop.

    Args:
        hidden: [B, T, D], or [B, D]. In bfloat16 the logits still accumulate in float32.
        head: [D, V]; of a tied embedding [V, D], pass `table.T`: nothing is copied.
        labels: Integers of the shape of `hidden` less D.
        weights: As `labels`, for a mask or importances; 1 without. Where it is 0 a label may be anything; elsewhere a
            label outside of 0..V-1 gives NaN.
        chunk: Most tokens whose logits a device holds at once. Uneven counts are padded.

    Returns:
        The weighted sum of the losses, and the sum of the weights: float32 scalars over the whole batch (inside
        accumulation, over one replica's part of it). Their ratio is the mean.

    Raises:
        ShardingError: The shapes do not fit, or the axes do not divide V, B or T.

    Example:
        >>> total, weight = jp.cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((4, 8)), jnp.zeros((2, 3), int))
        >>> print(f"{total / weight:.3f} = log 8 over {weight:.0f} tokens")
        2.079 = log 8 over 6 tokens
    """
    _check_loss(hidden, head, labels, weights, chunk)
    labels = labels.astype(jnp.int32)
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    region = _context.current()
    if region is None:
        return _loss_on_device(
            hidden, head, labels, weights, vocab=(), tokens=(), copied=(), vocab_size=head.shape[1], chunk=chunk
        )
    dims = ("vocab", *_TOKEN_DIMS[: labels.ndim])
    vocab, *token_axes = layout(region, "cross_entropy", dims, (head.shape[1], *labels.shape))
    tokens = P(*token_axes)
    copies = copies_for(region, head.shape, P(None, vocab))
    kernel = jax.shard_map(
        ft.partial(
            _loss_on_device,
            vocab=vocab,
            tokens=sum(token_axes, ()),
            copied=copies.axes,
            vocab_size=head.shape[1],
            chunk=chunk,
        ),
        mesh=region.mesh,
        in_specs=(tokens, copies.spread, tokens, tokens),
        out_specs=(P(), P()),
    )
    return kernel(hidden, copied(head, copies), labels, weights)


_TOKEN_DIMS = ("batch", "seq")


def _embed_rows(table: jax.Array, ids: jax.Array, *, vocab: Axes, vocab_size: int) -> jax.Array:
    """Look up what this device holds, zeros for the rest, and sum over the devices that share the vocabulary."""
    local = ids - lax.axis_index(vocab) * table.shape[0]
    rows = table.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    known = (ids >= 0) & (ids < vocab_size)
    return jnp.where(known[..., None], lax.psum(rows, vocab), jnp.array(jnp.nan, table.dtype))


def _loss_on_device(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    vocab: Axes,
    tokens: Axes,
    copied: Axes,
    vocab_size: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The loss of one device's tokens over its rows of the vocabulary, then summed over both."""
    head = head.reshape(head.shape[len(copied) :])
    # Varying and in float32 *before* the loop: so that gradients add up over chunks in float32, and cross the axes
    # once, after the loop. Left implicit, both would happen inside of it.
    head32 = varying(head, tuple(axis for axis in tokens if axis not in copied)).astype(jnp.float32)  # D V/v
    hidden = varying(hidden, vocab).reshape(-1, head.shape[0])  # N D
    start = lax.axis_index(vocab) * head.shape[1] if vocab else 0
    log_sum, picked = _scores(hidden, head32, labels.reshape(-1) - start, chunk)  # N, N: of V/v logits
    if vocab:
        peak = lax.pmax(lax.stop_gradient(log_sum), vocab)
        total, picked = lax.psum((jnp.exp(log_sum - peak), picked), vocab)
        log_sum = jnp.log(total) + peak
    known = (labels >= 0) & (labels < vocab_size)
    nll = log_sum.reshape(labels.shape) - jnp.where(known, picked.reshape(labels.shape), jnp.nan)
    counted = jnp.where(weights != 0, nll * weights, 0.0)
    return lax.psum((counted.sum(), weights.sum()), tokens)


def _scores(hidden: jax.Array, head: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """For each token the log-sum-exp of its logits and the logit of its label (0 if that is not among them)."""
    num_tokens = labels.size
    num_chunks = max(1, -(-num_tokens // chunk))
    size = -(-num_tokens // num_chunks)
    padding = num_chunks * size - num_tokens

    # The inner `jit`: without it the `vmap` over replicas fails on every operation here that mixes an operand with the
    # replica dim and one without, as `==` does ("requires varying manual axes to match"; jax 0.10.2 and 0.12.0).
    @ft.partial(jax.checkpoint, prevent_cse=False)  # needless in a scan, and it would keep the cast of the head inside
    @jax.jit
    def one_chunk(head: jax.Array, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)  # C V/v
        at_label = lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
        return jax.nn.logsumexp(logits, axis=-1), jnp.where(at_label, logits, 0.0).sum(-1)

    chunks = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(num_chunks, size, -1),
        jnp.pad(labels, (0, padding)).reshape(num_chunks, size),
    )
    _, (log_sum, picked) = lax.scan(lambda _, at: (None, one_chunk(head, *at)), None, chunks)
    return log_sum.reshape(-1)[:num_tokens], picked.reshape(-1)[:num_tokens]


def _check_loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array | None, chunk: int) -> None:
    failures = []
    if labels.ndim not in (1, 2) or hidden.shape[:-1] != labels.shape:
        failures.append(f"hidden {hidden.shape} and labels {labels.shape}: one label for each hidden vector")
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        tied = head.ndim == 2 and head.shape[1] == hidden.shape[-1]
        failures.append(
            f"hidden {hidden.shape} and head {head.shape}: a head has shape [embed, vocab]"
            + (" (of a tied embedding, pass table.T)" if tied else "")
        )
    if weights is not None and weights.shape != labels.shape:
        failures.append(f"weights {weights.shape} and labels {labels.shape}: one weight for each label")
    if chunk < 1:
        failures.append(f"chunk is {chunk}: at least one token")
    if failures:
        raise ShardingError("\n".join(f"cross_entropy: {failure}." for failure in failures))
