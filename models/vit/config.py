"""The shape of a Vision Transformer, and the published ones by name."""

import dataclasses
from dataclasses import replace

from models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """A stack as `models.encoder` has it, over patches of an image.

    Attributes:
        image: Pixels of a side.
        patch: Pixels of a side of a patch.
        channels: Numbers of a pixel.
        num_classes: Classes.
    """

    image: int
    patch: int
    channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image % self.patch:
            raise ValueError(f"image={self.image} is no multiple of patch={self.patch}. Change one of the two.")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


# An Image is Worth 16x16 Words (Dosovitskiy et al., 2020, arXiv:2010.11929, table 1).
VIT_B16 = Config(
    image=224, patch=16, embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, norm="before", norm_eps=1e-6
)
VIT_L16 = replace(VIT_B16, embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096)
VIT_H14 = replace(VIT_B16, patch=14, embed_dim=1280, num_layers=32, num_heads=16, mlp_dim=5120)

# On digits of 8 x 8 pixels: one for tests, and one that learns them in seconds.
TINY = replace(
    VIT_B16, image=8, patch=2, channels=1, num_classes=10, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64
)
DEMO = replace(TINY, embed_dim=64, num_layers=3, mlp_dim=192)
