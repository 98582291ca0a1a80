"""The smallest complete example: a model, its loss, and a recipe that runs on any mesh.

Learns which of C random directions each of its inputs points to. Shapes: B batch, D inputs, F hidden, C classes.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpar as jp

D, F, C = 64, 256, 16


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, C, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jp.constrain(jax.nn.gelu(self.up(x)), "batch", "mlp")  # B F
        return self.down(hidden)  # B C


def loss(model: MLP, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropies, and how many there are."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"])  # B
    return losses.sum(), jnp.float32(losses.size)


def batches(size: int, seed: int = 0) -> dict[str, jax.Array]:
    """Inputs near one of C fixed directions, with the number of the direction."""
    directions = jax.random.normal(jax.random.key(0), (C, D))
    key, noise_key = jax.random.split(jax.random.key(1 + seed))
    label = jax.random.randint(key, (size,), 0, C)
    return {"x": directions[label] + jax.random.normal(noise_key, (size, D)), "label": label}


def mlp() -> jp.Recipe:
    """As `jaxpar plan models.mlp:mlp --mesh meshes/cpu_8.toml` shows it."""
    return jp.Recipe(
        model=lambda: MLP(rngs=nnx.Rngs(0)),
        loss=loss,
        optimizer=optax.sgd(0.1),
        strategies=[jp.DP(), jp.FSDP(), jp.TP(column=["up"], row=["down"])],
        batch=jax.eval_shape(lambda: batches(64)),
    )
