"""The same script on one process with eight devices and on two with four each: the same plan, the same losses."""

import pytest

from tests._peers import peers

SCRIPT = """
    import sys
    import jax
    import numpy as np

    process, port, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, process, initialization_timeout=60)

    import jax.numpy as jnp
    import optax
    from flax import nnx
    import jaxpar as jp

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(64, 128, rngs=rngs)
            self.down = nnx.Linear(128, 64, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    def loss_fn(model, x):
        return jnp.mean((model(x) - x) ** 2)

    sizes = dict(pair.split("=") for pair in sys.argv[4].split(","))
    devices = np.array(jax.devices()).reshape([int(size) for size in sizes.values()])
    mesh = jax.sharding.Mesh(devices, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    strategies = [jp.DP(), jp.FSDP(), jp.TP(column=["up"], row=["down"])]
    plan = jp.plan(lambda: Model(nnx.Rngs(0)), mesh, strategies)
    model = plan.init()
    opt = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @plan.jit
    def train_step(model, opt, batch):
        loss, grads = jp.value_and_grad(loss_fn, accumulate=2)(model, batch)
        opt.update(model, grads)
        return loss

    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    parts = count if list(sizes)[0] != "tensor" else 1  # across processes runs the first axis
    mine = x[process * 16 // count : (process + 1) * 16 // count] if parts > 1 else x
    losses = [float(train_step(model, opt, plan.batch(mine))) for _ in range(4)]
    print("losses", *(f"{loss:.7f}" for loss in losses), "compiled", train_step.num_compilations, flush=True)
"""


def run(count, axes, env):
    """What each of `count` processes with eight devices together printed of its losses."""
    ended = peers(SCRIPT, count, str(count), axes, env=env, devices=8 // count)
    assert [peer.code for peer in ended] == [0] * count, ended
    return [next(line for line in peer.out.splitlines() if line.startswith("losses")) for peer in ended]


@pytest.mark.multiprocess
@pytest.mark.parametrize("axes", ["data=2,fsdp=2,tensor=2", "tensor=2,data=2,fsdp=2"])
def test_two_processes_compute_what_one_does(child_env, axes):
    """In the second mesh both processes hold all rows of the batch."""
    (alone,) = run(1, axes, child_env)
    first, second = run(2, axes, child_env)
    assert first == second

    one, two = (line.split() for line in (alone, first))
    assert one[-2:] == two[-2:] == ["compiled", "1"]
    for a, b in zip(one[1:5], two[1:5], strict=True):
        assert abs(float(a) - float(b)) <= 2e-6 * abs(float(a))
