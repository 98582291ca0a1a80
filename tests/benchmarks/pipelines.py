"""Seconds a training step of a pipeline takes on 8 simulated devices, beside a plain scan-and-autodiff GPipe (A/A).

The plain one is what one writes first: a scan over ticks in a region that is manual over the pipe, each tick
rematerialised, a permute at its end, gradients by autodiff; every stage computes in every tick, on zeros in bubbles.
Both compute the same loss and gradients, which is checked, and both recompute the forward pass of a stage in its
backward pass. Rounds are interleaved, as wall time on a shared machine wanders; what is reported is the median over
rounds of the ratio within a round, and the same of the plain one beside itself.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import pipeline

ROUNDS = 9
STAGES, REPLICAS, LAYERS, WIDTH, VOCAB, ROWS, SEQ = 4, 2, 8, 256, 1024, 4, 64


def embed(ends, batch):
    return ends[batch["tokens"]]


def block(layer, x, batch):
    del batch
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def loss(ends, x, batch):
    logits = x @ ends.T
    picked = jnp.take_along_axis(logits, batch["tokens"][..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).sum(), jnp.float32(batch["tokens"].size)


MODEL = pipeline.Model(embed=embed, block=block, loss=loss)


def plain(mesh, m):
    """GPipe by scan and autodiff."""
    p = STAGES
    forth = [(i, i + 1) for i in range(p - 1)]

    def stage(layers, x):
        return lax.scan(lambda x, layer: (block(layer, x, None), None), x, layers)[0]

    def through(layers, xs):
        first = lax.axis_index("pipe") == 0

        def tick(came, t):
            y = stage(layers, jnp.where(first, xs[jnp.clip(t, 0, m - 1)], came))
            return lax.ppermute(y, "pipe", forth), y

        zeros = lax.pcast(jnp.zeros(xs.shape[1:], xs.dtype), ("pipe", "data"), to="varying")
        xs = lax.pcast(xs, "pipe", to="varying")
        _, ys = lax.scan(jax.checkpoint(tick), zeros, jnp.arange(m + p - 1))
        return ys[p - 1 :][None]

    region = jax.shard_map(through, mesh=mesh, in_specs=(P("pipe"), P(None, "data")), out_specs=P("pipe", None, "data"))

    def mean(parameters, batch):
        ends, blocks = parameters
        micro = jax.tree.map(lambda leaf: leaf.reshape(m, -1, *leaf.shape[1:]), batch)
        ys = region(blocks, embed(ends, micro))[-1]
        total, weight = loss(ends, ys, micro)
        return total / weight

    return lambda ends, blocks, batch: jax.value_and_grad(mean)((ends, blocks), batch)


def contestants(m):
    """Name and zero-argument training step of each."""
    jp.simulate(8)
    mesh = jax.make_mesh((REPLICAS, STAGES), ("data", "pipe"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
    put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    blocks = {"up": normal(LAYERS, WIDTH, 4 * WIDTH), "down": normal(LAYERS, 4 * WIDTH, WIDTH)}
    parameters = put(normal(VOCAB, WIDTH)), jax.tree.map(lambda leaf: put(leaf, "pipe"), blocks)
    tokens = put(jnp.asarray(rng.integers(0, VOCAB, (m * ROWS * REPLICAS, SEQ))), "data")

    def executor(name):
        schedule = jp.schedule(name, stages=STAGES, microbatches=m)
        return pipeline.value_and_grad(MODEL, schedule, mesh, replicas=("data",))

    forms = {
        "plain": plain(mesh, m), "plain again": plain(mesh, m), "gpipe": executor("gpipe"), "1f1b": executor("1f1b"),
    }  # fmt: skip
    found, values = {}, {}
    for name, gradient in forms.items():

        @jax.jit
        def step(parameters, batch, gradient=gradient):
            value, gradients = gradient(*parameters, batch)
            return value, jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradients)

        found[name] = lambda step=step: jax.block_until_ready(step(parameters, {"tokens": tokens}))
        values[name] = found[name]()
    for name, value in values.items():
        for mine, theirs in zip(jax.tree.leaves(value), jax.tree.leaves(values["plain"]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6, err_msg=name)
    return found


def main():
    """Time every contestant, interleaved."""
    for m in (STAGES, 4 * STAGES):
        calls = contestants(m)
        took = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - start)
        print(f"{STAGES} stages, {REPLICAS} replicas, {m} microbatches")
        for name, seconds in took.items():
            ratios = [mine / theirs for mine, theirs in zip(seconds, took["plain"], strict=True)]
            print(
                f"  {name:12} {1e3 * min(seconds):8.1f} ms at best   {statistics.median(ratios):5.2f} of the plain one"
            )


if __name__ == "__main__":
    main()
