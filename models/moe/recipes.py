"""How the decoder with experts is trained: its rules, and a recipe for each size.

`jaxpar plan models.moe:mixtral_8x7b --mesh ...` takes the names at the end.
"""

import dataclasses
import functools as ft

from flax import nnx

import jaxpar as jp
from models.gpt.recipes import adamw
from models.language import batch_of

from . import config
from .config import Config
from .model import MoE, loss

dims = [
    ("*.experts.up", ("expert", "embed", "mlp")),
    ("*.experts.gate", ("expert", "embed", "mlp")),
    ("*.experts.down", ("expert", "mlp", "embed")),
]
"""What the dims of the stacked matrices are: `EP` splits `expert`, `TP` splits `mlp`, `FSDP` splits `embed`."""


def strategies(cfg: Config) -> list[jp.DP | jp.FSDP | jp.TP | jp.EP]:
    """Data, FSDP, tensor and expert parallelism; on a mesh that lacks an axis, its strategy rests."""
    shared = {"column": ["*.shared.up", "*.shared.gate"], "row": ["*.shared.down"]} if cfg.num_shared else {}
    tensor = jp.TP(
        column=["*.q", "*.k", "*.v", *shared.get("column", [])],
        row=["*.o", *shared.get("row", [])],
        vocab=["embed"] if cfg.tied else ["embed", "lm_head"],
        heads={"*.[qo]": cfg.num_heads, "*.[kv]": cfg.num_kv_heads},
    )
    return [jp.DP(), jp.FSDP(), tensor, jp.EP()]


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
    """Train `cfg` with AdamW, warmed up linearly and decayed along a cosine to a tenth; the arguments are gpt's."""
    seq = cfg.max_positions if seq is None else seq
    return jp.Recipe(
        model=lambda: MoE(cfg, rngs=nnx.Rngs(0)),
        loss=loss,
        has_aux=True,
        optimizer=adamw(learning_rate, warmup, steps),
        clip_norm=1.0,
        strategies=strategies(cfg),
        dims=dims,
        accumulate=accumulate,
        batch=batch_of(batch, seq),
    )


tiny = ft.partial(recipe, config.TINY, batch=16, learning_rate=1e-2, warmup=10, steps=100)
demo = ft.partial(recipe, config.DEMO, batch=32, learning_rate=6e-3, warmup=20, steps=200)
mixtral_8x7b = ft.partial(recipe, config.MIXTRAL_8X7B, batch=512, seq=4096)
# With as many choices as fit a quarter more than an even load, as trained at scale: slots rather than buffers.
mixtral_8x22b = ft.partial(
    recipe, dataclasses.replace(config.MIXTRAL_8X22B, dispatch=jp.Capacity(factor=1.25)), batch=512, seq=4096
)
