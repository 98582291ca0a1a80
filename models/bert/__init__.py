"""The masked language model: BERT's shape, how to partition it, and a recipe for each size."""

from .config import Config as Config
from .model import Bert as Bert, loss as loss
from .recipes import (
    bert_base as bert_base,
    bert_large as bert_large,
    demo as demo,
    recipe as recipe,
    strategies as strategies,
    tiny as tiny,
)
