"""Microseconds a call of a step costs the host: `plan.jit` beside `jax.jit` and `nnx.jit`, each beside itself (A/A).

A model of 8 blocks and 41 leaves, so small that the work of the devices is nothing; minima over interleaved rounds, as
wall time on a shared machine wanders by more than the differences. The A/A columns say by how much.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxpar as jp

ROUNDS, CALLS = 20, 20


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(8)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def train_step(model, opt, x):
    value, grads = nnx.value_and_grad(lambda model, x: jnp.mean((model(x) - x) ** 2))(model, x)
    opt.update(model, grads)
    return value


def calls():
    """Name and zero-argument call of each contestant, with its own model."""
    jp.simulate(8)
    plan = jp.plan(lambda: Model(nnx.Rngs(0)), jp.mesh(data=8), [jp.DP()])
    x = plan.batch(np.ones((8, 8), np.float32))
    found = {}
    for name in ("plan.jit", "plan.jit again", "nnx.jit", "nnx.jit again"):
        model = plan.init()
        opt = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
        step = plan.jit(train_step) if name.startswith("plan") else nnx.jit(train_step)
        found[name] = lambda step=step, model=model, opt=opt: step(model, opt, x)
    graphdef, state = nnx.split(plan.init())

    @jax.jit
    def functional(state, x):
        value, grads = jax.value_and_grad(lambda state: jnp.mean((nnx.merge(graphdef, state)(x) - x) ** 2))(state)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, state, grads), value

    for name in ("jax.jit", "jax.jit again"):
        holder = [state]

        def call(holder=holder):
            holder[0], value = functional(holder[0], x)
            return value

        found[name] = call
    return found


def main():
    contestants = calls()
    best = dict.fromkeys(contestants, float("inf"))
    for call in contestants.values():
        jax.block_until_ready(call())
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                value = call()
            elapsed = time.perf_counter() - start  # the host's part: the last result is not waited for
            jax.block_until_ready(value)
            best[name] = min(best[name], elapsed / CALLS)
    for name, seconds in best.items():
        print(f"{name:16} {seconds * 1e6:8.0f} us a call")


if __name__ == "__main__":
    main()
