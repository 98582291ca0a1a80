"""The Vision Transformer: images as sequences of patches, how to partition it, and a recipe for each size."""

from .config import Config as Config
from .model import ViT as ViT
from .recipes import (
    demo as demo,
    recipe as recipe,
    strategies as strategies,
    tiny as tiny,
    vit_b16 as vit_b16,
    vit_h14 as vit_h14,
    vit_l16 as vit_l16,
)
