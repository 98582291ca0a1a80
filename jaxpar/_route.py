"""`route`: which experts each token goes to, with what weight, and the two losses that keep the choice even.

Notable: the balance loss is of one sequence, as in GShard (Lepikhin et al., 2020, arXiv:2006.16668, algorithm 1: of one
group of tokens), not of the batch. So it is a sum over examples like any other loss: the same number on every mesh and
with any accumulation. [Note: balance over the batch] The product of two means over a whole batch, as in Switch
Transformer (Fedus et al., 2021, arXiv:2101.03961, equation 4), is not: `balance` of `Routing.load` and
`Routing.probability` averaged over the batch is that one, and a loss with it says `separable=False`.

Shapes: B batch, T sequence, E experts, K choices of a token, C tokens of one sequence that an expert takes.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from . import _context
from ._errors import ShardingError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens go.

    Attributes:
        chosen: [B, T, K] integers, the experts of each token, the likeliest first; from `route_by_expert` [B, E, C],
            the tokens of each expert.
        weights: What the output of each counts, float32, of the shape of `chosen`.
        load: [B, E], the share of a sequence's choices that each expert gets: 1 / E where all get the same.
        probability: [B, E], the mean probability of each expert over a sequence.
        z: [B], the mean over a sequence of the squared log-sum-exp of its logits: the router's z loss (Zoph et al.,
            2022, arXiv:2202.08906, equation 5), which keeps logits small.
        by_expert: Whether experts have chosen tokens.
    """

    chosen: jax.Array
    weights: jax.Array
    load: jax.Array
    probability: jax.Array
    z: jax.Array
    by_expert: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def balance(self) -> jax.Array:
        """[B], the balance loss of each sequence: `balance(load, probability)`, 1 where all experts get the same."""
        return balance(self.load, self.probability)


def balance(load: jax.Array, probability: jax.Array) -> jax.Array:
    """E times the sum over experts of the share of choices and the mean probability (arXiv:2101.03961, equation 4).

    1 for an even load, up to E where one expert gets all. The share has no gradient, the probability has.

    Args:
        load: [..., E].
        probability: [..., E].

    Example:
        >>> even, one = jnp.full(4, 0.25), jnp.array([1.0, 0.0, 0.0, 0.0])
        >>> float(jp.balance(even, even)), float(jp.balance(one, one))
        (1.0, 4.0)
    """
    return load.shape[-1] * jnp.sum(jax.lax.stop_gradient(load) * probability, axis=-1)


def route(
    logits: jax.Array, num_chosen: int, *, weights: Literal["renormalised", "softmax"] = "renormalised"
) -> Routing:
    """Give each token the `num_chosen` experts with the highest logits.

    Moves nothing between devices.

    Args:
        logits: [B, T, E]; the softmax is in float32.
        num_chosen: Experts of a token, K.
        weights: `"renormalised"`: the probabilities of the chosen experts, divided by their sum, as in Mixtral (Jiang
            et al., 2024, arXiv:2401.04088, section 2.1). `"softmax"`: as they are, as in Switch Transformer; a token
            of one expert needs it, or its router has no gradient.

    Raises:
        ShardingError: The shape is another one, there are not as many experts, or the plan shows the model parts of
            sequences, `CP(reduce="step")`.

    Example:
        >>> routing = jp.route(jnp.array([[[0.0, 3.0, 1.0]]]), 2)
        >>> routing.chosen[0, 0].tolist(), [f"{weight:.3f}" for weight in routing.weights[0, 0]]
        ([1, 2], ['0.881', '0.119'])
    """
    _check(logits, "route")
    num_experts = logits.shape[-1]
    if not 1 <= num_chosen <= num_experts:
        raise ShardingError(
            f"route: {num_chosen} of {num_experts} experts for each token. Choose at least 1, and no more than "
            "there are."
        )
    probabilities, z = _probabilities(logits)
    chosen = _likeliest(probabilities, num_chosen)
    picked = jnp.take_along_axis(probabilities, chosen, axis=-1)  # B T K
    if weights == "renormalised":
        picked = picked / picked.sum(-1, keepdims=True)
    ones = jax.nn.one_hot(chosen, num_experts)  # B T K E
    return Routing(
        chosen=chosen,
        weights=picked,
        load=ones.mean((1, 2)),
        probability=probabilities.mean(1),
        z=z,
    )


def route_by_expert(logits: jax.Array, capacity: float) -> Routing:
    """Give each expert the tokens of each sequence that it scores highest: expert choice (arXiv:2202.09368).

    Every expert gets the same number of tokens, so that nothing overflows and no balance loss is needed. But whether an
    expert takes a token depends on *later tokens* of the sequence: a model that generates one token after another
    cannot route as it was trained. For encoders and vision, not for decoders. Moves nothing between devices.

    Args:
        logits: [B, T, E]; the softmax over experts is in float32.
        capacity: How many experts a token has on average: each takes `capacity` T / E tokens of T, rounded up.

    Raises:
        ShardingError: The shape is another one, `capacity` is not above 0 and at most E, or parts of sequences as in
            `route`.

    Example:
        >>> routing = jp.route_by_expert(jnp.array([[[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]]), 1.0)
        >>> routing.chosen[0].tolist()
        [[0, 1], [2, 3]]
    """
    _check(logits, "route_by_expert")
    num_experts = logits.shape[-1]
    if not 0 < capacity <= num_experts:
        raise ShardingError(
            f"route_by_expert: capacity is {capacity}, for {num_experts} experts. It is the mean number of experts of "
            f"a token: above 0, at most {num_experts}."
        )
    probabilities, z = _probabilities(logits)
    count = math.ceil(capacity * logits.shape[1] / num_experts)
    scores = jnp.swapaxes(probabilities, 1, 2)  # B E T
    chosen = jnp.argsort(scores, axis=-1, stable=True, descending=True)[..., :count]  # B E C
    picked = jnp.take_along_axis(scores, chosen, axis=-1)
    return Routing(
        chosen=chosen,
        weights=picked,
        load=jnp.full((logits.shape[0], num_experts), 1 / num_experts),
        probability=probabilities.mean(1),
        z=z,
        by_expert=True,
    )


def _likeliest(probabilities: jax.Array, number: int) -> jax.Array:
    """[B, T, K], the experts with the highest probabilities, the first of equal ones first.

    One after another: the partitioner gathers the operand of `top_k` (XLA:CPU, jax 0.10.2).
    """
    rest, found = jax.lax.stop_gradient(probabilities), []
    experts = jnp.arange(rest.shape[-1])[None, None]
    for _ in range(number):
        found.append(jnp.argmax(rest, axis=-1))
        rest = jnp.where(experts == found[-1][..., None], -1.0, rest)
    return jnp.stack(found, axis=-1)


def _probabilities(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, E], and the z loss of each sequence [B]."""
    wide = logits.astype(jnp.float32)
    return jax.nn.softmax(wide, axis=-1), jnp.square(jax.nn.logsumexp(wide, axis=-1)).mean(1)


def _check(logits: jax.Array, caller: str) -> None:
    region = _context.current()
    split = None if region is None else region.plan.context
    if region is not None and split is not None and split.axis in region.replicas:
        raise ShardingError(
            f"{caller}: loads and losses of a router are means over a sequence, but with CP(reduce='step') the model "
            f"sees the part of one device of {split.axis!r}. Use CP(reduce='microbatch')."
        )
    if logits.ndim != 3:
        raise ShardingError(f"{caller}: logits have shape {logits.shape}. Give [batch, sequence, experts].")
