"""The reference decoder: GPT-2 and Llama shapes, how to partition them, and a recipe for each published size."""

from .config import Config as Config
from .generate import generate as generate
from .model import GPT as GPT, loss as loss
from .recipes import (
    demo as demo,
    gpt2_large as gpt2_large,
    gpt2_medium as gpt2_medium,
    gpt2_small as gpt2_small,
    gpt2_xl as gpt2_xl,
    llama_1b as llama_1b,
    llama_7b as llama_7b,
    llama_8b as llama_8b,
    llama_13b as llama_13b,
    llama_34b as llama_34b,
    llama_70b as llama_70b,
    recipe as recipe,
    strategies as strategies,
    tensor_rules as tensor_rules,
    tiny as tiny,
)
