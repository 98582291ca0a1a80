"""A decoder-only transformer: GPT-2 and Llama are two settings of it.

Notable: pre-norm blocks in one scanned stack; attention by `jp.attention`, which goes by positions and segments, never
by array indices, so that a sequence may be packed, permuted or split; the residual stream in the dtype in which
parameters are read, statistics and softmax in float32; the loss by `jp.cross_entropy`, so that full logits never exist.

Shapes: B batch, T sequence, D embed_dim, N query heads, K key and value heads, H features of a head, F mlp_dim,
V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp

from .config import Config


class GPT(nnx.Module):
    """Tokens in, hidden states of the last layer out; `head` turns these into logits.

    Args:
        cfg: The shape.
        rngs: The stream `params` initialises the weights.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(cfg.vocab_size, cfg.embed_dim, embedding_init=_small, rngs=rngs)
        if cfg.positions == "learned":
            self.positions = nnx.Param(_small(rngs.params(), (cfg.max_positions, cfg.embed_dim)))
        self.dropout = Dropout(cfg.dropout)
        self.blocks = jp.Stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_layers, rngs=rngs, remat=cfg.remat)
        self.norm = Norm(cfg)
        if not cfg.tied:
            self.lm_head = nnx.Linear(cfg.embed_dim, cfg.vocab_size, use_bias=False, kernel_init=_small, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        sample: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states, ready for `head`.

        Args:
            tokens: [B, T] integers.
            positions: [B, T] integers, counted from the start of each segment; by default 0..T-1.
            segments: [B, T] integers; a token attends only to its own segment. By default one segment.
            sample: [B] integers that name the examples, for dropout.

        Returns:
            [B, T, D].
        """
        if tokens.shape[1] > self.cfg.max_positions:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens, but the model has max_positions={self.cfg.max_positions}. "
                "Cut the sequences, or give the model more positions."
            )
        key = jax.random.key(0)  # the ids make masks differ between steps, the layers split it between themselves

        x = jp.embed(self.embed.embedding[...], tokens)  # B T D
        if self.cfg.positions == "learned":
            x = x + jnp.take(self.positions[...], _in_order(x) if positions is None else positions, axis=0)
        x = jp.constrain(self.dropout(x, key, sample), "batch", "seq", "embed")
        x, _ = self.blocks((x, key), positions, segments, sample)
        return self.norm(x)

    def head(self) -> jax.Array:
        """The matrix [D, V] from hidden states to logits."""
        return self.embed.embedding[...].T if self.cfg.tied else self.lm_head.kernel[...]


class Block(nnx.Module):
    """Attention and an MLP, each normed before and added to the residual stream after.

    Takes and returns the stream with a dropout key, from which each block draws its own and leaves the next.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attn_norm = Norm(cfg)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = Norm(cfg)
        self.mlp = MLP(cfg, rngs=rngs)
        self.dropout = Dropout(cfg.dropout)

    def __call__(
        self,
        stream: tuple[jax.Array, jax.Array],
        positions: jax.Array | None,
        segments: jax.Array | None,
        sample: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        x, key = stream
        key, attn_key, mlp_key = jax.random.split(key, 3)
        x = x + self.dropout(self.attn(self.attn_norm(x), positions, segments), attn_key, sample)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)), mlp_key, sample)
        return x, key


class Attention(nnx.Module):
    """Causal self-attention within segments, each key and value head shared by N / K query heads."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        q_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q = _linear(cfg, cfg.embed_dim, q_dim, rngs)
        self.k = _linear(cfg, cfg.embed_dim, kv_dim, rngs)
        self.v = _linear(cfg, cfg.embed_dim, kv_dim, rngs)
        self.o = _linear(cfg, q_dim, cfg.embed_dim, rngs, residual=True)

    def __call__(self, x: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> jax.Array:
        batch, seq, _ = x.shape
        q = self.q(x).reshape(batch, seq, self.cfg.num_heads, -1)  # B T N H
        k = self.k(x).reshape(batch, seq, self.cfg.num_kv_heads, -1)  # B T K H
        v = self.v(x).reshape(batch, seq, self.cfg.num_kv_heads, -1)
        if self.cfg.positions == "rotary":
            at = _in_order(x) if positions is None else positions
            q, k = (rotate(heads, at, self.cfg.rope_theta) for heads in (q, k))
        mixed = jp.attention(q, k, v, positions=positions, segments=segments, window=self.cfg.window)  # B T N H
        return jp.constrain(self.o(mixed.reshape(batch, seq, -1)), "batch", "seq", "embed")


class MLP(nnx.Module):
    """Two matrices with a GELU between them, or three with a gate."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.up = _linear(cfg, cfg.embed_dim, cfg.mlp_dim, rngs)
        if cfg.mlp == "silu":
            self.gate = _linear(cfg, cfg.embed_dim, cfg.mlp_dim, rngs)
        self.down = _linear(cfg, cfg.mlp_dim, cfg.embed_dim, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.up(x)  # B T F
        hidden = jax.nn.silu(self.gate(x)) * up if self.cfg.mlp == "silu" else jax.nn.gelu(up)
        return jp.constrain(self.down(jp.constrain(hidden, "batch", "seq", "mlp")), "batch", "seq", "embed")


class Norm(nnx.Module):
    """LayerNorm or RMSNorm, its statistics in float32 whatever the dtype of `x`."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.ones(cfg.embed_dim))
        if cfg.bias:
            self.bias = nnx.Param(jnp.zeros(cfg.embed_dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)  # B T D
        if self.cfg.norm == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.cfg.norm_eps)
        y = wide.astype(x.dtype) * self.scale[...][None, None]
        return y + self.bias[...][None, None] if self.cfg.bias else y


class Dropout(nnx.Module):
    """`jp.dropout` while training; `model.eval()` turns it off, `model.train()` on again."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, key: jax.Array, sample: jax.Array | None) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        if sample is None:
            raise ValueError(
                f"dropout={self.rate} needs `sample`, an id for each example; or call `model.eval()` first."
            )
        return jp.dropout(x, self.rate, key=key, ids=sample)


def _in_order(x: jax.Array) -> jax.Array:
    """Positions [1, T] of tokens [B, T, ...] that nobody numbered."""
    return jnp.arange(x.shape[1])[None]


def rotate(heads: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al., 2021): features i and i + H/2 turn together, further at each position.

    Args:
        heads: [B, T, heads, H].
        positions: [B, T], or [1, T] for all alike.
        theta: Pair i turns by `theta ** (-2 i / H)` a position.
    """
    half = heads.shape[-1] // 2
    speeds = theta ** (-jnp.arange(half) / half)  # H/2
    angles = positions.astype(jnp.float32)[..., None, None] * speeds[None, None, None]  # B T 1 H/2
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)  # B T heads H/2
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)


_small = nnx.initializers.normal(0.02)


def _linear(cfg: Config, inputs: int, outputs: int, rngs: nnx.Rngs, *, residual: bool = False) -> nnx.Linear:
    """Variance 1 / inputs, over 2 num_layers more where the output joins the residual stream (GPT-2, section 2.3)."""
    variance = 1 / (2 * cfg.num_layers) if residual else 1.0
    init = nnx.initializers.variance_scaling(variance, "fan_in", "normal")
    return nnx.Linear(inputs, outputs, use_bias=cfg.bias, kernel_init=init, rngs=rngs)


Batch = dict[str, Any]
"""Fields of a batch, each [B, T] but the last: tokens, labels, positions, segments, weights, and sample [B]."""


def loss(model: GPT, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the cross-entropies of a batch, in nats, and the sum of its weights.

    Args:
        model: The model.
        batch: `tokens` and `labels` must be there; see `Batch`.
    """
    hidden = model(batch["tokens"], batch.get("positions"), batch.get("segments"), batch.get("sample"))
    return jp.cross_entropy(hidden, model.head(), batch["labels"], batch.get("weights"))
