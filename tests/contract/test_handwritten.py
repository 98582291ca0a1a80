"""What `plan.jit` compiles against a `jax.jit` step written by hand for the same model, optimiser and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hlo, testing

X = np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32)
SPECS = {  # stored, and as the model computes
    "up": (P("fsdp", "tensor"), P(None, "tensor")),
    "down": (P("tensor", "fsdp"), P("tensor", None)),
}


def init():
    keys = jax.random.split(jax.random.key(0))
    return {"up": jax.random.normal(keys[0], (128, 256)) / 12, "down": jax.random.normal(keys[1], (256, 128)) / 16}


def loss(params, x):
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - x) ** 2)


def planned(mesh, transform):
    plan = jp.plan(init, mesh, [jp.FSDP(), jp.TP(column=["up"], row=["down"])])

    def train_step(params, opt_state, x):
        value, grads = jp.value_and_grad(loss)(params, x)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = plan.init()
    step = plan.jit(train_step, donate_argnums=(0, 1))
    return step, (params, plan.make(transform.init, params), plan.batch(X))


def by_hand(mesh, transform):
    stored, used = ({name: NamedSharding(mesh, pair[at]) for name, pair in SPECS.items()} for at in (0, 1))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
    params = jax.jit(init, out_shardings=stored)()
    like = lambda leaf: stored[{(128, 256): "up", (256, 128): "down"}[leaf.shape]] if leaf.shape else whole
    state_shardings = jax.tree.map(like, jax.eval_shape(transform.init, params))
    opt_state = jax.jit(transform.init, out_shardings=state_shardings)(params)

    def train_step(params, opt_state, x):
        def constrained(params):
            return loss(jax.lax.with_sharding_constraint(params, used), x)

        value, grads = jax.value_and_grad(constrained)(params)
        grads = jax.lax.with_sharding_constraint(grads, stored)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(
        train_step,
        donate_argnums=(0, 1),
        in_shardings=(stored, state_shardings, rows),
        out_shardings=(stored, state_shardings, whole),
    )
    return step, (params, opt_state, jax.device_put(X, rows))


@pytest.mark.parametrize("transform", [optax.sgd(0.1), optax.adamw(1e-3)], ids=["sgd", "adamw"])
def test_no_more_than_by_hand(transform):
    """Operations, FLOPs, collectives and peak memory are equal or lower, and so the losses are the same bits."""
    mesh = jp.mesh(fsdp=4, tensor=2)
    (ours, our_args), (theirs, their_args) = planned(mesh, transform), by_hand(mesh, transform)
    one, two = ours.lower(*our_args).compile(), theirs.lower(*their_args).compile()

    counts = [_hlo.read(compiled.as_text()).op_counts() for compiled in (one, two)]
    assert sum(counts[0].values()) <= sum(counts[1].values()), counts
    assert one.cost_analysis()["flops"] <= two.cost_analysis()["flops"]
    assert one.memory_analysis().peak_memory_in_bytes <= two.memory_analysis().peak_memory_in_bytes
    moved = [
        sorted((each.kind, each.axes, each.bytes, each.count) for each in testing.collectives(compiled, mesh=mesh))
        for compiled in (one, two)
    ]
    assert moved[0] == moved[1]
    assert moved[0]  # and something moves

    for _ in range(3):
        *our_state, our_loss = ours(*our_args)
        *their_state, their_loss = theirs(*their_args)
        assert float(our_loss) == float(their_loss)
        our_args, their_args = (*our_state, our_args[-1]), (*their_state, their_args[-1])
