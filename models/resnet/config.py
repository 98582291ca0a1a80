"""The shape of a residual network, and the published ones by name."""

import dataclasses
from dataclasses import replace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Stages of blocks, each stage after the first at half the resolution and twice the features of the one before.

    Attributes:
        depths: Blocks of each stage.
        width: Features of the first stage's convolutions.
        bottleneck: Whether a block is 1 x 1, 3 x 3, 1 x 1 with four times the features out, or 3 x 3 twice.
        stem: Whether a 7 x 7 convolution and a pooling come first, a quarter of the resolution; a 3 x 3 one if not.
        channels: Numbers of a pixel.
        num_classes: Classes.
        norm_eps: Added to the variance.
        momentum: How much of the running statistics a step keeps.
    """

    depths: tuple[int, ...]
    width: int = 64
    bottleneck: bool = True
    stem: bool = True
    channels: int = 3
    num_classes: int = 1000
    norm_eps: float = 1e-5
    momentum: float = 0.9

    @property
    def expansion(self) -> int:
        """Features out of a block for each of its width."""
        return 4 if self.bottleneck else 1

    @property
    def features(self) -> tuple[int, ...]:
        """Features out of the blocks of each stage."""
        return tuple(self.width * 2**stage * self.expansion for stage in range(len(self.depths)))


# Deep Residual Learning (He et al., 2015, arXiv:1512.03385, table 1); a block's stride lies in its 3 x 3 one, as
# is usual now.
RESNET18 = Config(depths=(2, 2, 2, 2), bottleneck=False)
RESNET50 = Config(depths=(3, 4, 6, 3))
RESNET101 = replace(RESNET50, depths=(3, 4, 23, 3))
RESNET152 = replace(RESNET50, depths=(3, 8, 36, 3))

# On digits of 8 x 8 pixels: one for tests, and one that learns them in seconds.
TINY = Config(depths=(1, 1), width=8, stem=False, channels=1, num_classes=10)
DEMO = replace(TINY, depths=(1, 1, 1), width=16, bottleneck=False)
