"""The shape of a decoder, and the published ones by name."""

import dataclasses
from dataclasses import replace
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One family, from GPT-2 to Llama.

    Attributes:
        vocab_size: Tokens.
        max_positions: Most positions of a sequence.
        embed_dim: Features of the residual stream.
        num_layers: Blocks.
        num_heads: Query heads; each has `embed_dim / num_heads` features.
        num_kv_heads: Key and value heads, each shared by `num_heads / num_kv_heads` query heads.
        mlp_dim: Hidden features of an MLP.
        positions: Learned vectors added to the embedding, or rotations of queries and keys.
        norm: Of which statistics: mean and variance, or the mean square alone.
        mlp: `down(gelu(up(x)))`, or `down(silu(gate(x)) * up(x))`.
        tied: Whether the head is the embedding, transposed.
        bias: Whether matrices and norms have biases.
        norm_eps: Added to the variance.
        rope_theta: The longest rotary wavelength is about 2π times this.
        window: How many positions each sees, its own and those before; all of them if `None`.
        dropout: Rate, after the embedding and after each half of a block.
        remat: What the backward pass of a block keeps, by `jp.Stack`'s names.
    """

    vocab_size: int
    max_positions: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "silu"]
    tied: bool
    bias: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    window: int | None = None
    dropout: float = 0.0
    remat: Literal["full", "dots", "none"] = "full"

    def __post_init__(self) -> None:
        for many, few in (("embed_dim", "num_heads"), ("num_heads", "num_kv_heads")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(
                    f"{many}={getattr(self, many)} is no multiple of {few}={getattr(self, few)}. Change one of the two."
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"Rotary positions rotate pairs of features, but a head has {self.head_dim} "
                f"(embed_dim={self.embed_dim} / num_heads={self.num_heads}). Make it even, or use positions='learned'."
            )

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.embed_dim // self.num_heads


# GPT-2 (Radford et al., 2019).
GPT2_SMALL = Config(
    vocab_size=50_257,
    max_positions=1024,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    mlp_dim=3072,
    positions="learned",
    norm="layer",
    mlp="gelu",
    tied=True,
    bias=True,
)
GPT2_MEDIUM = replace(GPT2_SMALL, embed_dim=1024, num_layers=24, num_heads=16, num_kv_heads=16, mlp_dim=4096)
GPT2_LARGE = replace(GPT2_SMALL, embed_dim=1280, num_layers=36, num_heads=20, num_kv_heads=20, mlp_dim=5120)
GPT2_XL = replace(GPT2_SMALL, embed_dim=1600, num_layers=48, num_heads=25, num_kv_heads=25, mlp_dim=6400)

# Llama 2 (Touvron et al., 2023).
LLAMA_7B = Config(
    vocab_size=32_000,
    max_positions=4096,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    mlp_dim=11_008,
    positions="rotary",
    norm="rms",
    mlp="silu",
    tied=False,
    bias=False,
)
LLAMA_13B = replace(LLAMA_7B, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824)
# The 34B of Llama 2 was not released; Code Llama (Rozière et al., 2023) was trained from it and has its shape.
LLAMA_34B = replace(LLAMA_7B, embed_dim=8192, num_layers=48, num_heads=64, num_kv_heads=8, mlp_dim=22_016)

# Llama 3 (Dubey et al., 2024); the 1B is 3.2, without its rotary scaling beyond 8,192 positions.
LLAMA_8B = replace(
    LLAMA_7B, vocab_size=128_256, max_positions=8192, num_kv_heads=8, mlp_dim=14_336, rope_theta=500_000.0
)
LLAMA_1B = replace(LLAMA_8B, embed_dim=2048, num_layers=16, mlp_dim=8192, tied=True)
LLAMA_70B = replace(LLAMA_8B, embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28_672)

# On bytes: one for tests, and one that learns to write something in minutes on two cores.
TINY = replace(
    LLAMA_8B,
    vocab_size=256,
    max_positions=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=64,
    tied=True,
)
DEMO = replace(TINY, max_positions=256, embed_dim=128, num_layers=4, num_kv_heads=4, mlp_dim=384)
