"""A decoder whose MLPs are mixtures of experts: Mixtral's shape, how to partition it, and a recipe for each size."""

from .config import Config as Config
from .model import MoE as MoE, loss as loss
from .recipes import (
    demo as demo,
    dims as dims,
    mixtral_8x7b as mixtral_8x7b,
    mixtral_8x22b as mixtral_8x22b,
    recipe as recipe,
    strategies as strategies,
    tiny as tiny,
)
