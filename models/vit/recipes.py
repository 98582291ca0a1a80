"""How a Vision Transformer is trained, and a recipe for each size."""

import functools as ft

import optax
from flax import nnx

import jaxpar as jp
from models import classify
from models.encoder import tensor_rules

from . import config
from .config import Config
from .model import ViT


def strategies(cfg: Config) -> list[jp.DP | jp.FSDP | jp.TP]:
    """Data, FSDP and tensor parallelism; the class token and the positions, which nothing divides, stay whole."""
    return [jp.DP(), jp.FSDP(whole=["token", "positions"]), tensor_rules(cfg)]


def recipe(
    cfg: Config, *, batch: int, accumulate: int = 1, learning_rate: float = 1e-3, steps: int = 100_000
) -> jp.Recipe:
    """Train `cfg` with AdamW, warmed up over a tenth of the steps and decayed along a cosine.

    Args:
        cfg: The shape.
        batch: Images in a global batch.
        accumulate: Microbatches in a step.
        learning_rate: The highest.
        steps: Steps until the lowest.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
    return jp.Recipe(
        model=lambda: ViT(cfg, rngs=nnx.Rngs(0)),
        loss=classify.loss,
        has_aux=True,
        optimizer=optax.adamw(schedule, weight_decay=0.05),
        clip_norm=1.0,
        strategies=strategies(cfg),
        accumulate=accumulate,
        batch=classify.batch_of(batch, image=cfg.image, channels=cfg.channels),
    )


tiny = ft.partial(recipe, config.TINY, batch=32, learning_rate=1e-2, steps=100)
demo = ft.partial(recipe, config.DEMO, batch=64, learning_rate=3e-3, steps=240)
vit_b16 = ft.partial(recipe, config.VIT_B16, batch=4096)
vit_l16 = ft.partial(recipe, config.VIT_L16, batch=4096)
vit_h14 = ft.partial(recipe, config.VIT_H14, batch=4096)
