"""Weights of ViT as Hugging Face keeps them, those of `ViTForImageClassification`: `read_config`, `load`, `save`.

Notable: the kernel that cuts patches has its dims in torch's order there and in JAX's here, and so have images,
[B, C, S, S] and [B, S, S, C]. Files of models that are no classifiers lack `classifier`, and are refused with its name.
"""

from typing import Any

from jaxpar.checkpoint import Tensor
from models import hf

from .config import Config

IGNORED = ("vit.pooler.dense.*",)  # of the class token, which a classifier reads as it is


def layout(cfg: Config) -> hf.Layout:  # noqa: ARG001  # every shape has the same names
    """Where each leaf of `ViT(cfg)` lives in files of transformers."""
    ours, block, first = "blocks.each.", "vit.encoder.layer.{}.", "vit.embeddings."
    found = {
        "token": Tensor(f"{first}cls_token", merged=(0, 1, 1)),
        "positions": Tensor(f"{first}position_embeddings", merged=(0, 1, 1)),
        "patches.bias": Tensor(f"{first}patch_embeddings.projection.bias"),
    }
    found |= hf.convolution("patches", f"{first}patch_embeddings.projection")
    found |= hf.encoder(block, attention="attention.attention")
    found |= hf.norm(f"{ours}attn_norm", f"{block}layernorm_before")
    found |= hf.norm(f"{ours}mlp_norm", f"{block}layernorm_after")
    return found | hf.norm("norm", "vit.layernorm") | hf.linear("head", "classifier")


def _from_vit(said: hf.Said) -> tuple[Config, hf.Said]:
    cfg = Config(
        image=_side(said["image_size"]),
        patch=_side(said["patch_size"]),
        channels=said.get("num_channels", 3),
        num_classes=hf.classes_from(said),
        **hf.encoder_from(said),
        norm="before",
    )
    return cfg, {"hidden_act": "gelu", "qkv_bias": True}


def _side(said: Any) -> int:
    """Of a square, given as one number or two."""
    sides = set(said) if isinstance(said, list) else {said}
    if len(sides) > 1:
        raise ValueError(f"config.json has images or patches of {said}, and `models.vit` squares. Use another model.")
    return sides.pop()


def _describe(cfg: Config) -> hf.Said:
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": cfg.image,
        "patch_size": cfg.patch,
        "num_channels": cfg.channels,
        **hf.encoder_to(cfg),
        "qkv_bias": True,
        **hf.classes_to(cfg.num_classes),
    }


FORMAT = hf.Format(
    folder="vit",
    layout=layout,
    ignored=IGNORED,
    kinds={"vit": _from_vit},
    describe=_describe,
    unsaid=("remat",),
)
read_config, load, save = FORMAT.read_config, FORMAT.load, FORMAT.save
