"""Sort short sequences with a small mixer in Flax Linen and a `TrainState`, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

VALUES, LENGTH, WIDTH, HIDDEN, ROWS = 16, 8, 64, 160, 8


class Feed(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.gelu(up))


class Mixer(nn.Module):
    """Mixes along the sequence, then along the features, twice."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VALUES, WIDTH, name="embed")(tokens)
        for index in range(2):
            along = jnp.swapaxes(nn.LayerNorm(name=f"norm_a{index}")(x), 1, 2)
            x = x + jnp.swapaxes(nn.Dense(LENGTH, name=f"mix{index}")(along), 1, 2)
            x = x + Feed(HIDDEN, name=f"feed{index}")(nn.LayerNorm(name=f"norm_b{index}")(x))
        return nn.Dense(VALUES, name="head")(x)


def batches(seed=0):
    random = np.random.default_rng(seed)
    while True:
        tokens = random.integers(0, VALUES, (ROWS, LENGTH)).astype(np.int32)
        yield {"tokens": tokens, "sorted": np.sort(tokens, axis=1)}


def loss_fn(params, batch):
    logits = Mixer().apply({"params": params}, batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["sorted"]).mean()


def make_state():
    params = Mixer().init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return train_state.TrainState.create(apply_fn=Mixer().apply, params=params, tx=optimizer)


def train(steps):
    state = make_state()

    @jax.jit
    def train_step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _, batch in zip(range(steps), batches(), strict=False):
        state, loss = train_step(state, batch)
        losses.append(float(loss))
    return losses, state


if __name__ == "__main__":
    print(train(10)[0])
