"""A residual network, whose batch statistics are those of the global batch on any mesh.

The step is one program, and a mean over a dim that devices split is a mean over all of them: BatchNorm, which a program
for each replica would have to be told of its neighbours, is as on one device.

Notable: rows of the image are the `seq` dim, so that what splits sequences (`jp.CP`) splits images too, each device
getting from its neighbours the rows that its convolutions reach over the edge: the compiler exchanges these halos.

Shapes: B batch, S rows and columns, C features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp

from .config import Config


class ResNet(nnx.Module):
    """Images in, logits out; `model.eval()` takes running statistics in place of the batch's.

    Args:
        cfg: The shape.
        rngs: The stream `params` initialises the weights.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.first = Conv(cfg, cfg.channels, cfg.width, 7 if cfg.stem else 3, 2 if cfg.stem else 1, rngs=rngs)
        blocks, features = [], cfg.width
        for stage, depth in enumerate(cfg.depths):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Block(cfg, features, cfg.width * 2**stage, stride, rngs=rngs))
                features = cfg.features[stage]
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features, cfg.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, classes] of [B, S, S, C]."""
        x = jax.nn.relu(self.first(jp.constrain(images, "batch", "seq", None, None)))
        if self.cfg.stem:
            halved, edge = (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), halved, edge)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """Two or three convolutions, added to what came in, which is projected where its shape is another one."""

    def __init__(self, cfg: Config, features: int, width: int, stride: int, *, rngs: nnx.Rngs):
        out = width * cfg.expansion
        if cfg.bottleneck:
            shapes = [(features, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            shapes = [(features, width, 3, stride), (width, out, 3, 1)]
        self.convs = nnx.List([Conv(cfg, *shape, rngs=rngs) for shape in shapes])
        self.project = Conv(cfg, features, out, 1, stride, rngs=rngs) if stride > 1 or features != out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = x if self.project is None else self.project(x)
        for index, conv in enumerate(self.convs):
            x = conv(x) if index == 0 else conv(jax.nn.relu(x))
        return jax.nn.relu(x + kept)


class Conv(nnx.Module):
    """A convolution without bias, and a BatchNorm, its statistics in float32."""

    def __init__(self, cfg: Config, features: int, out: int, size: int, stride: int, *, rngs: nnx.Rngs):
        pad = size // 2
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.conv = nnx.Conv(
            features,
            out,
            (size, size),
            strides=stride,
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            kernel_init=init,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(out, momentum=cfg.momentum, epsilon=cfg.norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jp.constrain(self.norm(self.conv(x)).astype(x.dtype), "batch", "seq", None, None)
