"""The shape of a masked language model, and the published ones by name."""

import dataclasses
from dataclasses import replace

from models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """A stack as `models.encoder` has it, over tokens.

    Attributes:
        vocab_size: Tokens.
        mask: The id that stands for a token to be guessed.
        max_positions: Most positions of a sequence.
        num_types: Kinds of segments: BERT's first and second sentence.
        guessed: The share of tokens to guess.
    """

    vocab_size: int
    mask: int
    max_positions: int
    num_types: int = 2
    guessed: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask < self.vocab_size:
            raise ValueError(f"mask={self.mask} is no token of vocab_size={self.vocab_size}. Name one of 0 and on.")


# BERT (Devlin et al., 2018, arXiv:1810.04805, section 3), uncased.
BERT_BASE = Config(
    vocab_size=30_522,
    mask=103,
    max_positions=512,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    mlp_dim=3072,
    norm="after",
    norm_eps=1e-12,
)
BERT_LARGE = replace(BERT_BASE, embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096)

# On bytes, the mask after them, padded to a multiple of 8: one for tests, and one that learns something in a minute.
TINY = replace(
    BERT_BASE, vocab_size=264, mask=256, max_positions=64, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64
)
DEMO = replace(TINY, embed_dim=64, mlp_dim=192)
