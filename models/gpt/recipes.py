"""How the decoder is trained: its rules for tensor parallelism, and a recipe for each size.

The names at the end are what the command line takes, each called without arguments:
`jaxpar plan models.gpt:llama_70b --mesh meshes/v5p_8x16x16.toml`. A recipe allocates nothing.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import optax
from flax import nnx

import jaxpar as jp
from models.language import batch_of

from . import config
from .config import Config
from .model import GPT, loss


def tensor_rules(cfg: Config) -> jp.TP:
    """Which matrices are split by their outputs, which by their inputs, and which by the vocabulary."""
    gate = ["*.gate"] if cfg.mlp == "silu" else []
    head = [] if cfg.tied else ["lm_head"]
    return jp.TP(
        column=["*.q", "*.k", "*.v", "*.up", *gate],
        row=["*.o", "*.down"],
        vocab=["embed", *head],
        heads={"*.[qo]": cfg.num_heads, "*.[kv]": cfg.num_kv_heads},
    )


def strategies(cfg: Config) -> list[jp.DP | jp.FSDP | jp.TP]:
    """Data, FSDP and tensor parallelism; on a mesh that lacks an axis, its strategy rests."""
    return [jp.DP(), jp.FSDP(), tensor_rules(cfg)]


def recipe(
    cfg: Config,
    *,
    batch: int,
    seq: int | None = None,
    accumulate: int = 1,
    learning_rate: float = 3e-4,
    warmup: int = 2000,
    steps: int = 100_000,
) -> jp.Recipe:
    """Train `cfg` with AdamW, warmed up linearly and decayed along a cosine to a tenth.

    Args:
        cfg: The shape.
        batch: Sequences in a global batch.
        seq: Tokens in a sequence; `max_positions` if not given.
        accumulate: Microbatches in a step.
        learning_rate: The highest.
        warmup: Steps to get there.
        steps: Steps until the lowest.
    """
    seq = cfg.max_positions if seq is None else seq
    return jp.Recipe(
        model=lambda: GPT(cfg, rngs=nnx.Rngs(0)),
        loss=loss,
        optimizer=adamw(learning_rate, warmup, steps),
        clip_norm=1.0,
        strategies=strategies(cfg),
        accumulate=accumulate,
        batch=batch_of(batch, seq),
    )


def adamw(learning_rate: float, warmup: int, steps: int) -> optax.GradientTransformation:
    """AdamW for a decoder, warmed up linearly and decayed along a cosine to a tenth.

    Args:
        learning_rate: The highest.
        warmup: Steps to get there.
        steps: Steps until the lowest.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup, steps, learning_rate / 10
    )
    return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)


def matrices(params: Any) -> Any:
    """Weight decay is for matrices, not for norms and biases; a stack holds these as [layers, D], so names decide."""

    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        return not {"scale", "bias"} & {getattr(key, "key", None) for key in path}

    return jax.tree_util.tree_map_with_path(decays, params)


tiny = ft.partial(recipe, config.TINY, batch=16, learning_rate=1e-2, warmup=10, steps=100)
demo = ft.partial(recipe, config.DEMO, batch=32, learning_rate=4e-3, warmup=30, steps=300)

# The vocabulary of 50,257 padded to 50,304, so that up to 128 devices can share it.
_padded = ft.partial(dataclasses.replace, vocab_size=50_304)
gpt2_small = ft.partial(recipe, _padded(config.GPT2_SMALL), batch=512, learning_rate=6e-4)
gpt2_medium = ft.partial(recipe, _padded(config.GPT2_MEDIUM), batch=512)
gpt2_large = ft.partial(recipe, _padded(config.GPT2_LARGE), batch=512, learning_rate=2.5e-4)
gpt2_xl = ft.partial(recipe, _padded(config.GPT2_XL), batch=512, learning_rate=2e-4)  # its 25 heads share no axis

llama_1b = ft.partial(recipe, config.LLAMA_1B, batch=1024)
llama_7b = ft.partial(recipe, config.LLAMA_7B, batch=1024)
llama_8b = ft.partial(recipe, config.LLAMA_8B, batch=1024)
llama_13b = ft.partial(recipe, config.LLAMA_13B, batch=1024)
llama_34b = ft.partial(recipe, config.LLAMA_34B, batch=1024, learning_rate=1.5e-4)
llama_70b = ft.partial(recipe, config.LLAMA_70B, batch=2048, learning_rate=1.5e-4)
