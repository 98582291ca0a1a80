"""Tell which half of a vector is the larger, with parameters in plain dictionaries, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpar as jp

WIDTH, HIDDEN, ROWS = 64, 160, 64


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "head": (WIDTH, 2)}
    weights = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"weights": weights, "bias": jnp.zeros(2)}


def loss_fn(params, batch):
    weights = params["weights"]
    hidden = batch["x"] + jax.nn.gelu(batch["x"] @ weights["up"]) @ weights["down"]
    logits = hidden @ weights["head"] + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def batches(seed=0):
    random = np.random.default_rng(seed)
    while True:
        x = random.standard_normal((ROWS, WIDTH)).astype(np.float32)
        first, second = np.split(x, 2, axis=1)
        yield {"x": x, "label": (first.sum(1) > second.sum(1)).astype(np.int32)}


def train(steps):
    plan = jp.plan(make_params, jp.mesh(fsdp=4, tensor=2), [jp.FSDP(), jp.TP(column=["*.up"], row=["*.down"])])
    params = plan.init()
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @plan.jit
    def train_step(params, opt_state, batch):
        loss, grads = jp.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _, batch in zip(range(steps), batches(), strict=False):
        params, opt_state, loss = train_step(params, opt_state, plan.batch(batch))
        losses.append(float(loss))
    return losses, params, opt_state


if __name__ == "__main__":
    print(train(10)[0])
