"""A model small enough to derive its traffic by hand: a first matrix, then residual blocks of two.

The sizes are all different, so that a matrix is known by its bytes.
"""

import jax.numpy as jnp
from flax import nnx

import jaxpar as jp

DIM, HIDDEN, INPUTS, DEPTH, TOKENS = 64, 256, 48, 3, 32
MATRIX, FIRST = DIM * HIDDEN * 4, INPUTS * DIM * 4  # bytes of one block's up or down, and of the first matrix

TP = jp.TP(column="*.up", row="*.down")
BLOCKS = jp.FSDP(blocks="blocks.*")


class Block(nnx.Module):
    def __init__(self, rngs, dim=DIM, hidden=HIDDEN):
        self.up = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inp = nnx.Linear(INPUTS, DIM, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return x


def make():
    return Model(nnx.Rngs(0))
