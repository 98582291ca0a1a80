"""The shape of a decoder with experts, and the published ones by name."""

import dataclasses
from dataclasses import replace

import jaxpar as jp
from models import gpt
from models.gpt import config as gpt_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gpt.Config):
    """A decoder as `models.gpt` has it, `mlp_dim` being the hidden features of one expert.

    Attributes:
        num_experts: Experts of a block.
        num_chosen: How many of them each token goes to.
        num_shared: Experts beside these that every token goes to, as in DeepSeekMoE (Dai et al., 2024).
        dispatch: How tokens get there; see `jp.experts`.
        balance: What the balance loss of the routers counts, as a mean over blocks.
        z: What their z loss counts.
    """

    num_experts: int
    num_chosen: int
    num_shared: int = 0
    dispatch: jp.Capacity | jp.Dropless = jp.Dropless()  # noqa: RUF009  # a frozen value
    balance: float = 0.01
    z: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(
                f"num_chosen={self.num_chosen} of num_experts={self.num_experts}. Choose at least one, and no more "
                "than there are."
            )


# Mixtral of experts (Jiang et al., 2024, arXiv:2401.04088, table 1), without losses that its authors do not publish;
# the coefficient of its balance loss is that of its release.
MIXTRAL_8X7B = Config(
    **vars(replace(gpt_config.LLAMA_7B, num_kv_heads=8, mlp_dim=14_336, max_positions=32_768, rope_theta=1_000_000.0)),
    num_experts=8,
    num_chosen=2,
    balance=0.02,
    z=0.0,
)
MIXTRAL_8X22B = replace(
    MIXTRAL_8X7B, embed_dim=6144, num_layers=56, num_heads=48, mlp_dim=16_384, max_positions=65_536, balance=0.001
)

# On bytes: one for tests, and one that learns something in a minute on two cores.
TINY = Config(**vars(replace(gpt_config.TINY, mlp_dim=32)), num_experts=8, num_chosen=2, num_shared=1)
DEMO = Config(
    **vars(replace(gpt_config.DEMO, max_positions=128, embed_dim=64, num_layers=2, mlp_dim=64)),
    num_experts=8,
    num_chosen=2,
    dispatch=jp.Capacity(factor=1.5),
)
