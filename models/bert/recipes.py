"""How the masked language model is trained, and a recipe for each size."""

import dataclasses
import functools as ft

import optax
from flax import nnx

import jaxpar as jp
from models.encoder import tensor_rules
from models.gpt.recipes import matrices
from models.language import batch_of

from . import config
from .config import Config
from .model import Bert, loss


def strategies(cfg: Config) -> list[jp.DP | jp.FSDP | jp.TP]:
    """Data, FSDP and tensor parallelism, the vocabulary split; on a mesh that lacks an axis, its strategy rests."""
    return [jp.DP(), jp.FSDP(whole=["types"]), tensor_rules(cfg, vocab=("embed", "bias"))]


def recipe(
    cfg: Config,
    *,
    batch: int,
    seq: int | None = None,
    accumulate: int = 1,
    learning_rate: float = 1e-4,
    warmup: int = 10_000,
    steps: int = 1_000_000,
) -> jp.Recipe:
    """Train `cfg` with AdamW, warmed up and decayed linearly (section A.2 of the paper); the arguments are gpt's."""
    seq = cfg.max_positions if seq is None else seq
    up = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup)
    down = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup))
    return jp.Recipe(
        model=lambda: Bert(cfg, rngs=nnx.Rngs(0)),
        loss=loss,
        optimizer=optax.adamw(optax.join_schedules([up, down], [warmup]), weight_decay=0.01, mask=matrices),
        clip_norm=1.0,
        strategies=strategies(cfg),
        accumulate=accumulate,
        batch=batch_of(batch, seq),
    )


tiny = ft.partial(recipe, config.TINY, batch=16, learning_rate=1e-2, warmup=10, steps=100)
demo = ft.partial(recipe, config.DEMO, batch=64, learning_rate=6e-3, warmup=20, steps=240)

# The vocabulary of 30,522 padded to 30,592, so that up to 128 devices can share it.
_padded = ft.partial(dataclasses.replace, vocab_size=30_592)
bert_base = ft.partial(recipe, _padded(config.BERT_BASE), batch=256)
bert_large = ft.partial(recipe, _padded(config.BERT_LARGE), batch=256)
