import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _context
from jaxpar._errors import ShardingError
from jaxpar._vocab import cross_entropy, embed
from tests.test_constrain import inside, layout

B, T, D, V = 8, 6, 16, 24
DIMS = {"batch": ("data", "fsdp"), "seq": ("context",), "vocab": ("tensor",)}
MESHES = [
    {"data": 8, "fsdp": 1, "context": 1, "tensor": 1},
    {"data": 2, "fsdp": 2, "context": 1, "tensor": 2},
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    {"data": 1, "fsdp": 1, "context": 1, "tensor": 8},
    {"data": 1, "fsdp": 1, "context": 2, "tensor": 4},
]
on_meshes = pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "x".join(map(str, axes.values())))


def example(seed=0):
    """A table, token ids, labels and a mask."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(V, D)).astype(np.float32)
    ids, labels = random.integers(0, V, (2, B, T), np.int32)
    weights = (random.random((B, T)) > 0.3).astype(np.float32) * random.random((B, T)).astype(np.float32)
    return jnp.asarray(table), jnp.asarray(ids), jnp.asarray(labels), jnp.asarray(weights)


def tied_loss(table, ids, labels, weights, chunk=5):
    hidden = jnp.tanh(embed(table, ids))
    return cross_entropy(hidden, table.T, labels, weights, chunk=chunk)


def exact(table, ids, labels, weights):
    """`tied_loss` and its gradient in float64, by hand."""
    table, weights = np.asarray(table, np.float64), np.asarray(weights, np.float64)
    hidden = np.tanh(table[ids])
    logits = hidden @ table.T
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    at_label = np.eye(V)[labels]
    loss = -(np.log((probabilities * at_label).sum(-1)) * weights).sum()
    d_logits = (probabilities - at_label) * weights[..., None]
    d_table = np.einsum("btv,btd->vd", d_logits, hidden)
    d_rows = (d_logits @ table) * (1 - hidden**2)
    np.add.at(d_table, np.asarray(ids), d_rows)
    return (loss, weights.sum()), d_table


def assert_as_exact(found, single, wanted):
    """The error against float64 is at most twice that of one device (of one unit in the last place, if it is less)."""
    for one, alone, truth in zip(*map(jax.tree.leaves, (found, single, wanted)), strict=True):
        unit = np.finfo(np.float32).eps * np.abs(truth).max()
        assert np.abs(one - truth).max() <= 2 * max(np.abs(alone - truth).max(), unit)


def reductions(program):
    """The all-reduces of a compiled step: (number in the entry, number in loops)."""
    text = program.as_text()
    entry = text[text.index("\nENTRY ") :]
    count = lambda text: len(re.findall(r"= .*? all-reduce(?:-start)?\(", text))
    return count(entry), count(text) - count(entry)


def placed_inputs(plan, table, *tokens):
    spec = P(*(plan.dims.get(dim, ()) or None for dim in ("batch", "seq")))
    return (
        jax.device_put(table, NamedSharding(plan.mesh, P(plan.dims["vocab"] or None))),
        *jax.device_put(tokens, NamedSharding(plan.mesh, spec)),
    )


@on_meshes
def test_loss_and_gradient_are_those_of_one_device(axes):
    """Uneven chunks, weights, a tied table, and axes of size 1."""
    plan = layout(DIMS, **axes)
    grad = jax.value_and_grad(tied_loss, has_aux=True)
    assert_as_exact(inside(plan, grad, *placed_inputs(plan, *example())), grad(*example()), exact(*example()))


def test_a_vocabulary_left_whole_needs_no_axis():
    plan = layout({**DIMS, "vocab": ()}, data=2, fsdp=4, context=1)
    grad = jax.value_and_grad(tied_loss, has_aux=True)
    assert_as_exact(inside(plan, grad, *placed_inputs(plan, *example())), grad(*example()), exact(*example()))


def test_a_vocabulary_over_two_axes():
    plan = layout({"batch": ("data",), "vocab": ("fsdp", "tensor")}, data=2, fsdp=2, tensor=2)
    grad = jax.value_and_grad(tied_loss, has_aux=True)
    assert_as_exact(inside(plan, grad, *placed_inputs(plan, *example())), grad(*example()), exact(*example()))


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_chunks_change_no_value(chunk):
    grad = jax.value_and_grad(ft.partial(tied_loss, chunk=chunk), has_aux=True)
    assert_as_exact(grad(*example()), jax.value_and_grad(tied_loss, has_aux=True)(*example()), exact(*example()))


def accumulated(plan, inputs, num_microbatches=2):
    """The step with accumulation: replicas by `vmap`, microbatches by `scan`, one reduction over `data` at the end."""
    replicas = plan.mesh.shape["data"]

    def split(x):
        x = x.reshape(replicas, num_microbatches, -1, T).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(plan.mesh, P(None, "data", "fsdp")))

    def step(table, *tokens):
        grad = jax.vmap(
            jax.value_and_grad(jax.checkpoint(tied_loss), has_aux=True), in_axes=(None, 0, 0, 0), spmd_axis_name="data"
        )

        def microbatch(total, tokens):
            return jax.tree.map(jnp.add, total, grad(table, *tokens)), None

        held = NamedSharding(plan.mesh, P("data", "tensor"))
        zeros = jax.lax.with_sharding_constraint(jnp.zeros((replicas, V, D)), held)
        start = ((jnp.zeros(replicas), jnp.zeros(replicas)), zeros)
        sums, table_grad = jax.lax.scan(microbatch, start, jax.tree.map(split, tokens))[0]
        reduced = jax.shard_map(
            lambda grad: jax.lax.psum(grad[0], "data"),
            mesh=plan.mesh,
            in_specs=P("data", "tensor"),
            out_specs=P("tensor"),
        )(table_grad)
        return jax.tree.map(jnp.sum, sums), reduced

    return step


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (2, 1, 4)], ids=str)
def test_inside_the_vmap_over_replicas(sizes):
    """With `scan` over microbatches and remat around the model: gradients do not cross the replicas until the end."""
    plan = layout(
        {"batch": ("data", "fsdp"), "vocab": ("tensor",)}, **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    )
    inputs = placed_inputs(plan, *example())
    found = inside(plan, accumulated(plan, inputs), *inputs, replicas=("data",))
    single = jax.value_and_grad(tied_loss, has_aux=True)(*example())
    assert_as_exact(found, single, exact(*example()))


def compiled(plan, function, *args, replicas=()):
    @jax.jit
    def step(*args):
        with _context.entered(_context.Region(plan=plan, replicas=replicas)):
            return function(*args)

    return step.lower(*args).compile()


def test_traffic():
    """Nothing crosses an axis inside the loop over chunks.

    Over `tensor` go the lookup, the maximum, the sums and the gradient of hidden; over the batch the gradient of the
    table, which the compiler joins with the scalars.
    """
    plan = layout(DIMS, data=2, fsdp=2, context=1, tensor=2)
    grad = jax.value_and_grad(tied_loss, has_aux=True)
    assert reductions(compiled(plan, grad, *placed_inputs(plan, *example()))) == (5, 0)


def test_the_replicas_reduce_once_outside_of_every_loop():
    plan = layout({"batch": ("data", "fsdp"), "vocab": ("tensor",)}, data=4, fsdp=1, tensor=2)
    inputs = placed_inputs(plan, *example())
    program = compiled(plan, accumulated(plan, inputs), *inputs, replicas=("data",))
    assert reductions(program) == (1, 7)  # four over `tensor` a microbatch, as above, three of them again for remat


def head_loss(params, batch):
    return cross_entropy(batch["hidden"], params["head"], batch["labels"], batch["weights"], chunk=5)


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 4, "tensor": 2}],
    ids=str,
)
def test_the_gradient_of_a_head_moves_as_the_plan_says(axes):
    """Cut over fsdp, and its pieces summed over data; what leaves a manual region is otherwise summed whole over both.

    Its own gradient too: a Hessian-vector product.
    """
    table, _, labels, weights = example()
    batch = {"hidden": np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)}
    batch |= {"labels": np.asarray(labels), "weights": np.asarray(weights)}
    strategies = {"data": jp.DP(), "fsdp": jp.FSDP(min_bytes=0), "tensor": jp.TP(vocab="head")}
    plan = jp.plan(lambda: {"head": table.T}, jp.mesh(**axes), [strategies[axis] for axis in axes])
    params, placed = plan.init(), plan.batch(batch)

    def both(params, batch):
        gradient = lambda params: jp.value_and_grad(head_loss)(params, batch)[1]
        return jax.jvp(gradient, (params,), (jax.tree.map(jnp.cos, params),))

    found, single = plan.jit(both)(params, placed), jax.jit(both)(params, batch)
    for one, alone in zip(jax.tree.leaves(found), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-6)
    traffic = jp.testing.collectives(plan.jit(jp.value_and_grad(head_loss)), params, placed)
    moved = [(each.kind, each.axes, each.bytes) for each in traffic if each.shape and each.axes != ("tensor",)]
    told = [(move.kind, move.axes, move.bytes) for move in plan.follow("head").moves]
    assert sorted(moved) == sorted(told), str(traffic)


@pytest.mark.parametrize("tensor", [1, 4])
def test_logits_of_all_tokens_are_never_held(tensor):
    """4,096 tokens on a vocabulary of 8,192 would be 128 MiB; a chunk of 64 is 2 MiB, divided by the axis."""
    plan = layout({"batch": ("data",), "vocab": ("tensor",)}, data=1, tensor=tensor)
    hidden, head = jax.ShapeDtypeStruct((4, 1024, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8192), jnp.float32)
    labels = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    grad = jax.grad(lambda *args: cross_entropy(*args, chunk=64)[0], argnums=(0, 1))
    program = compiled(plan, grad, hidden, head, labels)
    chunk_bytes = 64 * 8192 * 4 // tensor
    assert program.memory_analysis().temp_size_in_bytes < 4 * chunk_bytes


def test_bfloat16_accumulates_in_float32():
    """Logits, and the gradient of the head over 48 chunks, are no worse than one rounding to bfloat16."""
    table, ids, labels, weights = example()
    table = table.astype(jnp.bfloat16)
    hidden = jnp.tanh(table[ids])
    loss = lambda hidden, head: cross_entropy(hidden, head, labels, weights, chunk=1)[0]
    for plan in (None, layout(DIMS, data=2, fsdp=2, context=1, tensor=2)):
        run = jax.jit if plan is None else lambda f, plan=plan: ft.partial(inside, plan, f)
        found, grads = run(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, table.T)
        wide = (hidden.astype(jnp.float32), table.T.astype(jnp.float32))
        wanted, wanted_grads = jax.value_and_grad(loss, argnums=(0, 1))(*wide)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        for one, other in zip(grads, wanted_grads, strict=True):
            assert one.dtype == jnp.bfloat16
            np.testing.assert_allclose(one.astype(jnp.float32), other, atol=2**-8 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("plan", [None, layout(DIMS, data=2, fsdp=2, context=1, tensor=2)], ids=["alone", "planned"])
def test_values_outside_of_the_vocabulary(plan):
    """NaN, wherever they count; a label under a zero weight does not."""
    run = (lambda f, *args: f(*args)) if plan is None else ft.partial(inside, plan)
    table, ids, labels, _ = example()
    rows = run(embed, table, ids.at[0, 0].set(V).at[1, 1].set(-1))
    assert jnp.isnan(rows).all(-1).sum() == 2
    assert jnp.isnan(rows[0, 0]).all()
    assert jnp.isnan(rows[1, 1]).all()
    hidden, labels = jnp.tanh(table[ids]), labels.at[2, 3].set(-100)
    masked = jnp.ones((B, T)).at[2, 3].set(0)
    total, gradient = run(jax.value_and_grad(lambda hidden: cross_entropy(hidden, table.T, labels, masked)[0]), hidden)
    assert jnp.isfinite(total)
    assert jnp.isfinite(gradient).all()
    assert (gradient[2, 3] == 0).all()
    assert jnp.isnan(run(lambda hidden: cross_entropy(hidden, table.T, labels)[0], hidden))


def test_tokens_may_be_bytes_and_come_without_a_sequence():
    table, ids, labels, _ = example()
    rows = embed(table, ids[:, 0].astype(jnp.uint8))
    np.testing.assert_array_equal(rows, table[ids[:, 0]])
    flat, whole = (
        cross_entropy(rows, table.T, labels[:, 0].astype(jnp.uint8)),
        tied_loss(table, ids[:, :1], labels[:, :1], None),
    )
    assert flat[1] == whole[1] == B
    np.testing.assert_allclose(cross_entropy(jnp.tanh(rows), table.T, labels[:, 0])[0], whole[0], rtol=1e-6)


@pytest.mark.parametrize(("size", "fits"), [(24, True), (22, False)])
def test_an_indivisible_vocabulary_is_an_error(size, fits):
    plan = layout({"vocab": ("tensor",)}, tensor=4)
    run = lambda: inside(plan, embed, jnp.zeros((size, D)), jnp.zeros((2, 3), jnp.int32))
    if fits:
        assert run().shape == (2, 3, D)
        return
    with pytest.raises(ShardingError) as error:
        run()
    assert str(error.value) == (
        "embed: dim 0 ('vocab') has size 22, which tensor=4 (4 parts) does not divide. The next multiple is 24.\n"
        "Use a size that divides, or a mesh with a smaller axis."
    )


def test_shapes_that_do_not_fit_are_named_all_at_once():
    hidden, table, labels = jnp.zeros((2, 3, 4)), jnp.zeros((8, 4)), jnp.zeros((2, 3), jnp.int32)
    assert cross_entropy(hidden, table.T, labels)[1] == 6
    with pytest.raises(ShardingError) as error:
        cross_entropy(hidden, table, labels[:, :2], jnp.ones((2, 3)), chunk=0)
    assert str(error.value).splitlines() == [
        "cross_entropy: hidden (2, 3, 4) and labels (2, 2): one label for each hidden vector.",
        (
            "cross_entropy: hidden (2, 3, 4) and head (8, 4): a head has shape [embed, vocab] "
            "(of a tied embedding, pass table.T)."
        ),
        "cross_entropy: weights (2, 3) and labels (2, 2): one weight for each label.",
        "cross_entropy: chunk is 0: at least one token.",
    ]
    with pytest.raises(ShardingError, match=r"embed: table \(4,\) and ids \(2, 3\)"):
        embed(table[0], labels)
