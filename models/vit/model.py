"""A Vision Transformer: patches of an image, each a vector, and a class token, through an encoder.

Shapes: B batch, S pixels of a side, P of a side of a patch, C channels, T patches and the class token, D embed_dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp
from models.encoder import Linear, Norm, encoder

from .config import Config


class ViT(nnx.Module):
    """Images in, logits out.

    Args:
        cfg: The shape.
        rngs: The stream `params` initialises the weights.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        small = nnx.initializers.normal(0.02)
        self.patches = Linear(cfg.patch**2 * cfg.channels, cfg.embed_dim, rngs=rngs)
        self.token = nnx.Param(small(rngs.params(), (1, cfg.embed_dim)))
        self.positions = nnx.Param(small(rngs.params(), (cfg.num_patches + 1, cfg.embed_dim)))
        self.blocks = encoder(cfg, rngs=rngs)
        self.norm = Norm(cfg)
        self.head = Linear(cfg.embed_dim, cfg.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, classes] of [B, S, S, C]."""
        batch, side, patch = len(images), self.cfg.image // self.cfg.patch, self.cfg.patch
        cut = images.reshape(batch, side, patch, side, patch, -1).swapaxes(2, 3)  # B S/P S/P P P C
        x = self.patches(cut.reshape(batch, side * side, -1))  # B T-1 D
        token = jnp.broadcast_to(self.token[...][None], (batch, 1, x.shape[-1]))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1) + self.positions[...][None]
        x = jp.constrain(x, "batch", "seq", "embed")
        x = self.blocks(x, jnp.zeros(x.shape[:2], jnp.int32))
        return self.head(self.norm(x)[:, 0])
