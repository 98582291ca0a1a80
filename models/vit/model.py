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
        self.patches = Patches(cfg, rngs=rngs)
        self.token = nnx.Param(small(rngs.params(), (1, cfg.embed_dim)))
        self.positions = nnx.Param(small(rngs.params(), (cfg.num_patches + 1, cfg.embed_dim)))
        self.blocks = encoder(cfg, rngs=rngs)
        self.norm = Norm(cfg)
        self.head = Linear(cfg.embed_dim, cfg.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, classes] of [B, S, S, C]."""
        x = self.patches(images)  # B T-1 D
        token = jnp.broadcast_to(self.token[...][None], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1) + self.positions[...][None]
        x = jp.constrain(x, "batch", "seq", "embed")
        x = self.blocks(x, None)
        return self.head(self.norm(x)[:, 0])


class Patches(nnx.Module):
    """Each patch times one matrix: a convolution whose windows do not overlap, and with the kernel of one."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        shape = (cfg.patch, cfg.patch, cfg.channels, cfg.embed_dim)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), shape[-1:]))

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, T-1, D] of [B, S, S, C]."""
        kernel = self.kernel[...]  # P P C D
        batch, patch = len(images), len(kernel)
        side = images.shape[1] // patch
        cut = images.astype(kernel.dtype).reshape(batch, side, patch, side, patch, -1)
        x = jnp.einsum("bipjqc,pqcd->bijd", cut, kernel).reshape(batch, side * side, -1)
        return x + self.bias[...][None, None]
