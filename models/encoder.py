"""A stack of transformer blocks in which every position sees every other: what BERT and ViT have in common.

Notable: the same scanned stack as `models.gpt`, with biases and LayerNorms, normed before each half of a block (ViT) or
after it (BERT, as the original transformer).

Shapes: B batch, T sequence, D embed_dim, N heads, H features of a head, F mlp_dim.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of a stack.

    Attributes:
        embed_dim: Features of the residual stream.
        num_layers: Blocks.
        num_heads: Heads; each has `embed_dim / num_heads` features.
        mlp_dim: Hidden features of an MLP.
        norm: Whether each half of a block is normed before it or after it.
        norm_eps: Added to the variance.
        remat: What the backward pass of a block keeps, by `jp.Stack`'s names.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    norm: Literal["before", "after"]
    norm_eps: float
    remat: Literal["full", "dots", "none"] = "full"

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}. Change one of the two."
            )


def tensor_rules(cfg: EncoderConfig, *, vocab: tuple[str, ...] = ()) -> jp.TP:
    """Which matrices are split by their outputs, which by their inputs, and which by the vocabulary."""
    return jp.TP(
        column=["*.q", "*.k", "*.v", "*.up"],
        row=["*.o", "*.down"],
        vocab=list(vocab),
        heads={"*.[qkvo]": cfg.num_heads},
    )


def encoder(cfg: EncoderConfig, *, rngs: nnx.Rngs) -> jp.Stack:
    """The blocks of `cfg`, called as `(x, segments)`: [B, T, D] and [B, T] or `None`, and giving [B, T, D]."""
    return jp.Stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers, rngs=rngs, remat=cfg.remat)


class Block(nnx.Module):
    """Attention and an MLP, added to the residual stream."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.attn_norm, self.mlp_norm = Norm(cfg), Norm(cfg)
        self.q, self.k, self.v, self.o = (Linear(cfg.embed_dim, cfg.embed_dim, rngs=rngs) for _ in range(4))
        self.up = Linear(cfg.embed_dim, cfg.mlp_dim, rngs=rngs)
        self.down = Linear(cfg.mlp_dim, cfg.embed_dim, rngs=rngs)

    def __call__(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        if self.cfg.norm == "before":
            x = x + self.attend(self.attn_norm(x), segments)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attn_norm(x + self.attend(x, segments))
        return self.mlp_norm(x + self.mlp(x))

    def attend(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        """Self-attention within segments; `None` is one."""
        batch, seq, _ = x.shape
        q, k, v = (project(x).reshape(batch, seq, self.cfg.num_heads, -1) for project in (self.q, self.k, self.v))
        mixed = jp.attention(q, k, v, segments=segments, causal=False).reshape(x.shape)
        return jp.constrain(self.o(mixed), "batch", "seq", "embed")

    def mlp(self, x: jax.Array) -> jax.Array:
        """Two matrices with an exact GELU between them."""
        hidden = jp.constrain(jax.nn.gelu(self.up(x), approximate=False), "batch", "seq", "mlp")  # B T F
        return jp.constrain(self.down(hidden), "batch", "seq", "embed")


class Norm(nnx.Module):
    """LayerNorm, its statistics in float32 whatever the dtype of `x`."""

    def __init__(self, cfg: EncoderConfig):
        self.eps = cfg.norm_eps
        self.scale, self.bias = nnx.Param(jnp.ones(cfg.embed_dim)), nnx.Param(jnp.zeros(cfg.embed_dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)  # B T D
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...][None, None] + self.bias[...][None, None]


class Linear(nnx.Linear):
    """A matrix with a bias, of variance 1 / inputs."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, rngs=rngs)
