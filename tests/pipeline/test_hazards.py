"""What goes wrong in pipelines on stock JAX and XLA, each shown by the obvious form beside the executor's.

A test whose obvious form begins to work tells that the cause has gone, and with it the reason for a detour.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import pipeline
from jaxpar._branches import refuse_stuck
from jaxpar._context import Region
from jaxpar._manual import manual

WIDTH = 8


def mesh(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def model(block):
    return pipeline.Model(
        embed=lambda ends, batch: batch @ ends,
        block=block,
        loss=lambda ends, x, batch: (jnp.sum(x**2), jnp.float32(len(x))),
    )


def arguments(layers=2, rows=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, dtype)
    return normal(WIDTH, WIDTH), normal(layers, WIDTH, WIDTH), normal(rows, WIDTH)


def compiled(block, on, schedule=None, blocks=None):
    ends, stacked, batch = arguments()
    schedule = schedule or jp.schedule("1f1b", stages=on.shape["pipe"], microbatches=2)
    run = jax.jit(pipeline.value_and_grad(model(block), schedule, on))
    return run.lower(ends, blocks or stacked, batch).compile()


# ---- wrong gradients without an error (jax#40823)


def test_differentiating_through_a_branch_by_stage_gives_another_gradient():
    """Stage 0 doubles, stage 1 triples: the gradient of the sum is 5, and JAX says 4. Declared as varying, it is 5."""
    on = mesh(pipe=2)

    def naive(x, declared):
        def stage(x):
            x = lax.pcast(x, "pipe", to="varying") if declared else x
            return lax.cond(lax.axis_index("pipe") == 0, lambda x: 2 * x, lambda x: 3 * x, x)[None]

        return jax.shard_map(stage, mesh=on, in_specs=P(), out_specs=P("pipe"))(x).sum()

    gradient = jax.jit(jax.grad(naive), static_argnums=1)
    assert gradient(2.0, True) == 5
    assert gradient(2.0, False) == 4  # jax#40823


def test_a_pipeline_gives_the_gradient_of_what_it_computes():
    """(2 · 3 · x)² by two stages: the gradient for x is 72 x."""
    scale = pipeline.Model(
        embed=lambda ends, batch: ends * batch,
        block=lambda layer, x, batch: layer * x,
        loss=lambda ends, x, batch: (jnp.sum(x**2), jnp.float32(1)),
    )
    run = pipeline.value_and_grad(scale, jp.schedule("1f1b", stages=2, microbatches=1), mesh(pipe=2))
    value, (ends, blocks) = jax.jit(run)(jnp.float32(2), jnp.float32([2, 3]), jnp.ones(1))
    assert (value, ends, *blocks) == (144, 144, 144, 96)


# ---- branches of unlike shardings


def constrained(layer, x, batch):
    return lax.with_sharding_constraint(x + jnp.tanh(x @ layer), P("tensor", None))


def test_branches_that_end_in_unlike_constraints_do_not_compile():
    on = mesh(pipe=2, tensor=2)

    def stage(layers, x):
        skip = lambda layer, x: x * 2
        run = lambda layer, x: constrained(layer, x, None)
        return lax.cond(lax.axis_index("pipe") == 0, run, skip, layers[0], x[0])[None]

    naive = jax.shard_map(stage, mesh=on, in_specs=(P("pipe"), P("pipe")), out_specs=P("pipe"), axis_names={"pipe"})
    _, layers, _ = arguments()
    with pytest.raises(jax.errors.JaxRuntimeError, match="Inconsistent conditional sharding"), jax.set_mesh(on):
        jax.jit(naive).lower(layers, jnp.ones((2, 4, WIDTH))).compile()


def test_blocks_of_a_pipeline_may_end_in_a_constraint():
    on = mesh(pipe=2, tensor=2)
    with jax.set_mesh(on):
        program = compiled(constrained, on)
    refuse_stuck("step", program, on)
    ends, blocks, batch = arguments()
    value, _ = program(ends, blocks, batch)
    x = batch @ ends
    for layer in blocks:
        x = x + jnp.tanh(x @ layer)
    assert float(value) == pytest.approx(float(jnp.sum(x**2) / len(batch)), rel=1e-5)


# ---- permutes in branches: asked of the program, for to run it would be to wait for ever


def turned(layer, x, batch):
    """Rows over `tensor`, then columns, then rows again: the partitioner makes permutes of this."""
    x = lax.with_sharding_constraint(x + jnp.tanh(x @ layer), P("data", "tensor"))
    return lax.with_sharding_constraint(jnp.sin(x), P("tensor", "data"))


def test_a_permute_by_hand_in_a_branch_is_refused():
    on = mesh(pipe=4)

    def stage(x):
        x, forth = x[0], [(0, 1), (1, 2), (2, 3), (3, 0)]
        return lax.cond(lax.axis_index("pipe") < 2, lambda x: lax.ppermute(x, "pipe", forth), lambda x: x, x)[None]

    program = jax.jit(jax.shard_map(stage, mesh=on, in_specs=P("pipe"), out_specs=P("pipe"))).lower(jnp.ones((4, 2)))
    with pytest.raises(jp.StepError, match=r"(?s)some devices along 'pipe' take and others do not.*on every device"):
        refuse_stuck("step", program.compile(), on)


@pytest.mark.parametrize(("axis", "is_stuck"), [("expert", False), ("pipe", True)])
def test_an_exchange_in_a_branch_is_refused_if_its_groups_are_of_two_minds(axis, is_stuck):
    """Along an inner axis a group lies within one stage, all of which takes the branch: nobody is waited for."""
    on = mesh(pipe=2, expert=2)

    def stage(x):
        x = x[0]
        swap = lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True)
        return lax.cond(lax.axis_index("pipe") == 0, swap, lambda x: x, x)[None]

    both = P("pipe", "expert")
    program = jax.jit(jax.shard_map(stage, mesh=on, in_specs=both, out_specs=both)).lower(jnp.ones((2, 4))).compile()
    if is_stuck:
        with pytest.raises(jp.StepError, match=r"all-to-all over 'pipe'.* Its groups run along 'pipe'"):
            refuse_stuck("step", program, on)
    else:
        refuse_stuck("step", program, on)
        np.testing.assert_array_equal(program(jnp.arange(8.0).reshape(2, 4)), [[0, 2, 1, 3], [4, 5, 6, 7]])


def test_a_block_that_the_partitioner_reshards_by_permutes_is_refused():
    on = mesh(pipe=2, data=2, tensor=2)
    with jax.set_mesh(on):
        program = compiled(turned, on)
    with pytest.raises(jp.StepError) as caught:
        refuse_stuck("step", program, on)
    first, *_, last = str(caught.value).splitlines()
    assert first == "step: it would never end."
    assert "test_hazards.py" in str(caught.value)  # the line that made it
    assert 'compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}' in last


def test_branches_that_all_stages_take_alike_may_permute():
    """The first and the last part of a model, here resharded, are under a condition on the tick alone."""
    on = mesh(pipe=2, data=2, tensor=2)
    ends = pipeline.Model(
        embed=lambda ends, batch: turned(ends, batch, None),
        block=lambda layer, x, batch: x + jnp.tanh(x @ layer),
        loss=lambda ends, x, batch: (jnp.sum(x**2), jnp.float32(len(x))),
    )
    run = pipeline.value_and_grad(ends, jp.schedule("1f1b", stages=2, microbatches=2), on)
    with jax.set_mesh(on):
        program = jax.jit(run).lower(*arguments(rows=8)).compile()
    refuse_stuck("step", program, on)
    found = jp.testing.collectives(program, mesh=on)
    assert [each for each in found if each.kind == "collective-permute" and each.conditional]


@pytest.mark.libtpu
@pytest.mark.parametrize("split_rows", [True, False])
def test_a_wide_product_of_split_rows_is_refused_on_tpu_and_one_of_whole_rows_is_not(split_rows):
    """XLA:TPU makes permutes of a gathered product from some width on (windowed einsum): small shapes are blind to it.

    Without windowed einsums one permute stays, by which XLA:TPU evens out the pieces of a reduce-scatter.
    """
    from jax.experimental import topologies

    devices = np.array(topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices).reshape(2, 4)
    on = Mesh(devices, ("pipe", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = P("tensor", None) if split_rows else P(None, None)

    def stage(up, down, x):
        def run(x):
            h = lax.with_sharding_constraint(jax.nn.relu(x @ up[0]), P(None, "tensor"))
            return lax.with_sharding_constraint(h @ down[0], rows)

        skip = lambda x: lax.with_sharding_constraint(x, rows)
        return lax.cond(lax.axis_index("pipe") == 0, run, skip, lax.with_sharding_constraint(x[0], rows))[None]

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(on, P(*axes)))

    width, inner = 4096, 16384
    arrays = array((2, width, inner), "pipe", None, "tensor"), array((2, inner, width), "pipe", "tensor")
    naive = jax.shard_map(stage, mesh=on, in_specs=(P("pipe"),) * 3, out_specs=P("pipe"), axis_names={"pipe"})
    with jax.set_mesh(on):
        program = jax.jit(naive).lower(*arrays, array((2, 1024, width), "pipe", *rows)).compile()
    if split_rows:
        with pytest.raises(jp.StepError, match="windowed einsum"):
            refuse_stuck("step", program, on)
    else:
        refuse_stuck("step", program, on)


# ---- a kernel in a stage


@pytest.mark.parametrize("naive", [True, False])
def test_a_kernel_in_a_stage_is_differentiated_inside_not_across_its_edge(naive):
    """Across it, what is kept for the backward pass is said to differ over the pipe too, which the stage has taken.

    The constant is kept as well, by a scan that asks what it can compute before its loop.
    """
    strategies = [jp.DP(axis="pipe"), jp.FSDP(axis="expert", min_bytes=0)]
    plan = jp.plan(lambda: {"w": jnp.ones((4, 4))}, mesh(pipe=2, expert=2), strategies)
    region = Region(plan=plan, replicas=("pipe",), manual=True)
    rows = P("expert")

    def body(x, w):
        return jnp.tanh(lax.all_to_all(x, "expert", 0, 0, tiled=True) @ w) * jnp.arange(4.0)[None]

    def layer(x, w):
        if naive:
            kernel = jax.shard_map(body, mesh=region.mesh, axis_names={"expert"}, in_specs=(rows, P()), out_specs=rows)
        else:
            kernel = manual(region, body, in_specs=(rows, P()), out_specs=rows)
        return jax.checkpoint(kernel)(x, w), None

    def total(w, x):
        return jnp.sum(lax.scan(layer, x, w)[0] ** 2)

    def stage(w, x):
        return lax.cond(lax.axis_index("pipe") == 0, jax.grad(total), lambda w, x: w, w[0], x[0])[None]

    w, x = (jax.random.normal(jax.random.key(at), shape) for at, shape in enumerate([(2, 3, 4, 4), (2, 4, 4)]))
    run = jax.jit(jax.shard_map(stage, mesh=plan.mesh, in_specs=P("pipe"), out_specs=P("pipe"), axis_names={"pipe"}))
    if naive:
        with pytest.raises(ValueError, match="manual"):
            run.lower(w, x)
        return
    program = run.lower(w, x).compile()
    refuse_stuck("step", program, plan.mesh)
    one = lambda x, w: (jnp.tanh(x[jnp.array([0, 2, 1, 3])] @ w) * jnp.arange(4.0)[None], None)
    expected = jax.grad(lambda w, x: jnp.sum(lax.scan(one, x, w)[0] ** 2))(w[0], x[0])
    np.testing.assert_allclose(program(w, x)[0], expected, rtol=1e-5, atol=1e-6)


# ---- bfloat16


NAIVE_SUM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((2, 2), ("pipe", "tensor"), axis_types=(AxisType.Auto,) * 2)
total = lambda x: jax.lax.psum(x, "pipe")
run = jax.shard_map(total, mesh=mesh, in_specs=P("pipe"), out_specs=P(), axis_names={"pipe"})
jax.jit(run).lower(jnp.ones(2, jnp.DTYPE)).compile()
"""


@pytest.mark.parametrize(("dtype", "aborts"), [("bfloat16", True), ("float32", False)])
def test_a_sum_in_bfloat16_over_some_axes_aborts_the_compiler_on_cpu(dtype, aborts):
    """So the executor sums in float32, where it sums; it does run in bfloat16 (test_execute)."""
    done = subprocess.run(
        [sys.executable, "-c", NAIVE_SUM.replace("DTYPE", dtype)], capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == aborts
    if aborts:
        assert "Invalid binary instruction opcode copy" in done.stderr
