"""BERT, the part that guesses masked tokens: an encoder, and a head tied to the embedding.

Notable: which tokens are masked is drawn from the id of the example, not from where it lies in a batch, so that a mesh
and accumulation change nothing; but from its place in its sequence, so that a mesh which splits sequences keeps their
order, `jp.CP(balance="none")`. The loss is `jp.cross_entropy`, whose bias is a feature that is always 1.

Shapes: B batch, T sequence, D embed_dim, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp
from models.encoder import Linear, Norm, encoder

from .config import Config


class Bert(nnx.Module):
    """Tokens in, what the head makes of each position out; `logits` compares that with the vocabulary.

    Args:
        cfg: The shape.
        rngs: The stream `params` initialises the weights.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(cfg.vocab_size, cfg.embed_dim, embedding_init=small, rngs=rngs)
        self.positions = nnx.Param(small(rngs.params(), (cfg.max_positions, cfg.embed_dim)))
        self.types = nnx.Param(small(rngs.params(), (cfg.num_types, cfg.embed_dim)))
        self.embed_norm = Norm(cfg)
        self.blocks = encoder(cfg, rngs=rngs)
        self.transform, self.transform_norm = Linear(cfg.embed_dim, cfg.embed_dim, rngs=rngs), Norm(cfg)
        self.bias = nnx.Param(jnp.zeros(cfg.vocab_size))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D], ready for `logits`.

        Args:
            tokens: [B, T] integers.
            positions: [B, T] integers; by default 0..T-1.
            segments: [B, T] integers; a token attends to its own segment only. By default one segment.
            types: [B, T] integers below `num_types`; by default 0.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        types = jnp.zeros_like(positions) if types is None else types
        x = jp.embed(self.embed.embedding[...], tokens) + jnp.take(self.positions[...], positions, axis=0)
        x = self.embed_norm(x + jnp.take(self.types[...], types, axis=0))
        x = self.blocks(jp.constrain(x, "batch", "seq", "embed"), segments)
        return self.transform_norm(jax.nn.gelu(self.transform(x), approximate=False))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, V]."""
        return hidden @ self.embed.embedding[...].T + self.bias[...][None, None]


def corrupt(tokens: jax.Array, sample: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Tokens to guess from: of those chosen, 8 of 10 masked, 1 random, 1 left; and which are chosen, as 0 or 1.

    Args:
        tokens: [B, T].
        sample: [B], the ids of the examples: the same id and length, the same places.
        cfg: The mask, and the share that is chosen.
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(1), index))(sample)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (2, tokens.shape[1])))(keys)  # B 2 T
    other = jax.vmap(lambda key: jax.random.randint(key, tokens.shape[1:], 0, cfg.mask))(keys).astype(tokens.dtype)
    chosen, how = draw[:, 0] < cfg.guessed, draw[:, 1]
    changed = jnp.where(how < 0.8, jnp.full_like(tokens, cfg.mask), jnp.where(how < 0.9, other, tokens))
    return jnp.where(chosen, changed, tokens), chosen.astype(jnp.float32)


def loss(model: Bert, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropies of the guessed tokens, in nats, and how many there are.

    Args:
        model: The model.
        batch: `tokens` [B, T] and `sample` [B]; perhaps `positions`, `segments`, `types` and `weights` [B, T].
    """
    tokens, chosen = corrupt(batch["tokens"], batch["sample"], model.cfg)
    hidden = model(tokens, batch.get("positions"), batch.get("segments"), batch.get("types"))
    head = jnp.concatenate([model.embed.embedding[...].T, model.bias[...][None].astype(hidden.dtype)])
    one = jnp.concatenate([hidden, jnp.ones((*hidden.shape[:2], 1), hidden.dtype)], axis=-1)
    return jp.cross_entropy(one, head, batch["tokens"], chosen * batch.get("weights", jnp.ones_like(chosen)))
