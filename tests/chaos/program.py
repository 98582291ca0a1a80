"""What chaos tests train: a tiny model with dropout, and if asked a stack of blocks, which a pipeline can cut.

Dropout draws by a counter, which is state to be saved; before a stack by the samples' ids, as in a pipeline it must.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxpar as jp

NUM_SAMPLES, WIDTH = 64, 16
ADAM = optax.adam(1e-2)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 64, rngs=rngs)
        self.down = nnx.Linear(64, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs, *, dropout=True, layers=0):
        self.up = nnx.Linear(WIDTH, 64, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs) if dropout and not layers else lambda x: x
        self.down = nnx.Linear(64, WIDTH, rngs=rngs)
        self.blocks = jp.Stack(Block, layers, rngs=rngs) if layers else None

    def __call__(self, x, ids):
        x = self.down(self.drop(nnx.gelu(self.up(x))))
        if self.blocks is None:
            return x
        return self.blocks(jp.dropout(x, 0.2, key=jax.random.key(7), ids=ids))


def loss_fn(model, batch):
    error = ((model(batch["x"], batch["id"]) - batch["x"][:, ::-1]) ** 2).mean(axis=1)
    return (error * batch["weights"]).sum(), batch["weights"].sum()


class Samples:
    """Samples that know their number."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=WIDTH).astype(np.float32)
        return {"x": x, "id": np.int32(index), "weights": np.float32(1)}


def strategies(mesh):
    """Those whose axes the mesh has."""
    those = [
        jp.DP(), jp.FSDP(min_bytes=0), jp.TP(column=["up", "*.up"], row=["down", "*.down"]), jp.PP(microbatches=4),
    ]  # fmt: skip
    return [each for each in those if each.axis in mesh.shape]
