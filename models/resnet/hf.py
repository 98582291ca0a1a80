"""Weights of ResNet as Hugging Face keeps them, those of `ResNetForImageClassification`: `read_config`, `load`, `save`.

Notable: running statistics come and go with the weights. For their update torch takes the variance of a sample (over
n - 1), and flax that of the batch (over n), which matters to nothing but small batches; torch's momentum of 0.1 is ours
of 0.9. Images are [B, C, S, S] there and [B, S, S, C] here.
"""

from jaxpar.checkpoint import Tensor
from models import hf

from .config import Config

IGNORED = ("*.num_batches_tracked",)  # how many steps there were, which torch counts and, with a momentum, never reads


def layout(cfg: Config) -> hf.Layout:
    """Where each leaf of `ResNet(cfg)` lives in files of transformers."""
    found = _conv("first", "resnet.embedder.embedder")
    index, features = 0, cfg.width
    for stage, depth in enumerate(cfg.depths):
        for layer in range(depth):
            ours, theirs = f"blocks.{index}", f"resnet.encoder.stages.{stage}.layers.{layer}"
            for conv in range(3 if cfg.bottleneck else 2):
                found |= _conv(f"{ours}.convs.{conv}", f"{theirs}.layer.{conv}")
            out = cfg.features[stage]
            if features != out or (stage and not layer):
                found |= _conv(f"{ours}.project", f"{theirs}.shortcut")
            index, features = index + 1, out
    return found | hf.linear("head", "classifier.1")


def _conv(ours: str, theirs: str) -> hf.Layout:
    """A convolution, and its BatchNorm."""
    statistics = {
        f"{ours}.norm.{name}": Tensor(f"{theirs}.normalization.running_{name}") for name in ("mean", "var")
    }  # fmt: skip
    kernel = hf.convolution(f"{ours}.conv", f"{theirs}.convolution")
    return kernel | hf.norm(f"{ours}.norm", f"{theirs}.normalization") | statistics


def _from_resnet(said: hf.Said) -> tuple[Config, hf.Said]:
    cfg = Config(
        depths=tuple(said.get("depths", (3, 4, 6, 3))),
        width=said.get("embedding_size", 64),
        bottleneck=said.get("layer_type", "bottleneck") == "bottleneck",
        channels=said.get("num_channels", 3),
        num_classes=hf.classes_from(said),
    )
    return cfg, {
        "hidden_sizes": list(cfg.features),
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _describe(cfg: Config) -> hf.Said:
    return {
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification"],
        "depths": list(cfg.depths),
        "embedding_size": cfg.width,
        "hidden_sizes": list(cfg.features),
        "layer_type": "bottleneck" if cfg.bottleneck else "basic",
        "num_channels": cfg.channels,
        "hidden_act": "relu",
        **hf.classes_to(cfg.num_classes),
    }


FORMAT = hf.Format(
    folder="resnet",
    layout=layout,
    ignored=IGNORED,
    kinds={"resnet": _from_resnet},
    describe=_describe,
    unsaid=("momentum",),
)
read_config, load, save = FORMAT.read_config, FORMAT.load, FORMAT.save
