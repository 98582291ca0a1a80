"""Residual networks: convolutions with batch statistics, how to partition them, and a recipe for each size."""

from .config import Config as Config
from .model import ResNet as ResNet
from .recipes import (
    demo as demo,
    recipe as recipe,
    resnet18 as resnet18,
    resnet50 as resnet50,
    resnet101 as resnet101,
    resnet152 as resnet152,
    strategies as strategies,
    tiny as tiny,
)
