"""How a residual network is trained, and a recipe for each size."""

import functools as ft

import optax
from flax import nnx

import jaxpar as jp
from models import classify

from . import config
from .config import Config
from .model import ResNet


def strategies() -> list[jp.DP | jp.FSDP]:
    """Data and FSDP; a kernel with too few channels to divide, the first of three, stays whole."""
    return [jp.DP(), jp.FSDP(whole=["first.*", "head"])]


def recipe(
    cfg: Config,
    *,
    batch: int,
    image: int = 224,
    accumulate: int = 1,
    learning_rate: float = 0.1,
    warmup: int = 6000,
    steps: int = 112_600,
) -> jp.Recipe:
    """Train `cfg` with SGD and Nesterov momentum, warmed up and decayed along a cosine.

    Batch statistics see a whole microbatch, so that the loss is not a sum over examples, and says so.

    Args:
        cfg: The shape.
        batch: Images in a global batch.
        image: Pixels of a side.
        accumulate: Microbatches in a step.
        learning_rate: The highest; 0.1 for 256 images (Goyal et al., 2017, arXiv:1706.02677).
        warmup: Steps to get there.
        steps: Steps until 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return jp.Recipe(
        model=lambda: ResNet(cfg, rngs=nnx.Rngs(0)),
        loss=classify.loss,
        has_aux=True,
        separable=False,
        optimizer=optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(schedule, momentum=0.9, nesterov=True)),
        strategies=strategies(),
        accumulate=accumulate,
        batch=classify.batch_of(batch, image=image, channels=cfg.channels),
    )


tiny = ft.partial(recipe, config.TINY, batch=32, image=8, learning_rate=0.1, warmup=5, steps=100)
demo = ft.partial(recipe, config.DEMO, batch=64, image=8, learning_rate=0.1, warmup=10, steps=120)
resnet18 = ft.partial(recipe, config.RESNET18, batch=256)
resnet50 = ft.partial(recipe, config.RESNET50, batch=256)
resnet101 = ft.partial(recipe, config.RESNET101, batch=256)
resnet152 = ft.partial(recipe, config.RESNET152, batch=256)
