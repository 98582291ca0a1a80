"""A decoder-only transformer with experts in place of MLPs: Mixtral is a setting of it.

Notable: attention, norms and positions are those of `models.gpt`; what is new is `Experts`, and that the stream through
the blocks carries what their routers say of each sequence: two losses, and how many choices were dropped. The losses
are sums over sequences, so that the model trains alike on every mesh and with any accumulation (`jp.route`).

Shapes: B batch, T sequence, D embed_dim, E experts, F mlp_dim, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp
from models.gpt import model as gpt

from .config import Config


class Routers(NamedTuple):
    """What the routers of all blocks say of each sequence, each [B]: means over blocks, dropped as a share."""

    balance: jax.Array
    z: jax.Array
    dropped: jax.Array


class MoE(nnx.Module):
    """Tokens in, hidden states of the last layer and what the routers say out; `head` makes logits.

    Args:
        cfg: The shape.
        rngs: The stream `params` initialises the weights.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(cfg.vocab_size, cfg.embed_dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.blocks = jp.Stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers, rngs=rngs, remat=cfg.remat)
        self.norm = gpt.Norm(cfg)
        if not cfg.tied:
            self.lm_head = nnx.Linear(cfg.embed_dim, cfg.vocab_size, use_bias=False, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Routers]:
        """Hidden states [B, T, D], and `Routers`.

        Args:
            tokens: [B, T] integers.
            positions: [B, T] integers, counted from the start of each segment; by default 0..T-1.
            segments: [B, T] integers; a token attends only to its own segment. By default one segment.
        """
        x = jp.constrain(jp.embed(self.embed.embedding[...], tokens), "batch", "seq", "embed")  # B T D
        none = jnp.zeros(tokens.shape[:1])
        x, said = self.blocks((x, Routers(none, none, none)), positions, segments)
        return self.norm(x), said

    def head(self) -> jax.Array:
        """The matrix [D, V] from hidden states to logits."""
        return self.embed.embedding[...].T if self.cfg.tied else self.lm_head.kernel[...]


class Block(nnx.Module):
    """Attention and experts, each normed before and added to the residual stream after."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.num_layers = cfg.num_layers
        self.attn_norm = gpt.Norm(cfg)
        self.attn = gpt.Attention(cfg, rngs=rngs)
        self.mlp_norm = gpt.Norm(cfg)
        self.mlp = Experts(cfg, rngs=rngs)

    def __call__(
        self, stream: tuple[jax.Array, Routers], positions: jax.Array | None, segments: jax.Array | None
    ) -> tuple[jax.Array, Routers]:
        x, said = stream
        x = x + self.attn(self.attn_norm(x), positions, segments)
        y, more = self.mlp(self.mlp_norm(x))
        return x + y, Routers(*(sofar + each / self.num_layers for sofar, each in zip(said, more, strict=True)))


class Experts(nnx.Module):
    """A router, and as many MLPs with a gate as there are experts, in three stacked matrices; perhaps a shared one."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.router = nnx.Linear(cfg.embed_dim, cfg.num_experts, use_bias=False, rngs=rngs)
        self.experts = Matrices(cfg, rngs=rngs)
        if cfg.num_shared:
            self.shared = gpt.MLP(dataclasses.replace(cfg, mlp_dim=cfg.num_shared * cfg.mlp_dim), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routers]:
        routing = jp.route(self.router(x), self.cfg.num_chosen)
        y, dropped = jp.experts(
            x,
            routing,
            up=self.experts.up[...],
            gate=self.experts.gate[...],
            down=self.experts.down[...],
            dispatch=self.cfg.dispatch,
        )
        y = jp.constrain(y, "batch", "seq", "embed")
        if self.cfg.num_shared:
            y = y + self.shared(x)
        return y, Routers(routing.balance, routing.z, dropped / (x.shape[1] * self.cfg.num_chosen))


class Matrices(nnx.Module):
    """Those of all experts: up and gate [E, D, F], down [E, F, D]."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        inside, outside = (cfg.num_experts, cfg.embed_dim, cfg.mlp_dim), (cfg.num_experts, cfg.mlp_dim, cfg.embed_dim)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        residual = nnx.initializers.variance_scaling(1 / (2 * cfg.num_layers), "fan_in", "normal", batch_axis=0)
        self.up = nnx.Param(init(rngs.params(), inside))
        self.gate = nnx.Param(init(rngs.params(), inside))
        self.down = nnx.Param(residual(rngs.params(), outside))


def loss(model: MoE, batch: gpt.Batch) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
    """The weighted sum of the losses of a batch and the sum of its weights, and what to watch.

    A sequence's router losses count as much as its tokens do together. What to watch are means over tokens:
    `cross_entropy` in nats, `balance` (1 is even), and `overflow`, the share of choices that were dropped.

    Args:
        model: The model.
        batch: `tokens` and `labels` must be there; see `models.gpt.model.Batch`.
    """
    hidden, said = model(batch["tokens"], batch.get("positions"), batch.get("segments"))
    weights = batch.get("weights")
    entropy, weight = jp.cross_entropy(hidden, model.head(), batch["labels"], weights)
    each = jnp.full(len(hidden), 1.0 * hidden.shape[1]) if weights is None else weights.sum(1)  # B
    of_routers = jnp.sum(each * (model.cfg.balance * said.balance + model.cfg.z * said.z))
    mean = lambda total: total / jnp.maximum(weight, 1e-9)
    watched = {
        "cross_entropy": mean(entropy),
        "balance": mean(jnp.sum(each * said.balance)),
        "overflow": mean(jnp.sum(each * said.dropped)),
    }
    return (entropy + of_routers, weight), watched
