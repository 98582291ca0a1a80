"""Experts against one dense reference: every token through every expert, times a weight that is mostly zero."""

import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpar as jp
from jaxpar import _experts, testing
from jaxpar._errors import ShardingError
from jaxpar._grouped import grouped_dot
from tests import _programs as programs

B, T, D, F, E, K = 16, 8, 16, 32, 8, 2
DIMS = [("up", ("expert", "embed", "mlp")), ("gate", ("expert", "embed", "mlp")), ("down", ("expert", "mlp", "embed"))]
BATCH = {"x": np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)}
FITS = {"capacity": jp.Capacity(factor=E / K), "dropless": jp.Dropless()}


def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    made = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {name: leaf / leaf.shape[-2] ** 0.5 for name, leaf in made.items()}


def dense(x, routing, *, up, gate, down, activation=jax.nn.silu):
    """[B, T, D]: what each expert makes of each token, B T E D, weighed."""
    hidden = activation(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    made = jnp.einsum("btef,efd->bted", hidden, down)
    if routing.by_expert:
        weights = (jax.nn.one_hot(routing.chosen, T) * routing.weights[..., None]).sum(2).swapaxes(1, 2)
    else:
        weights = (jax.nn.one_hot(routing.chosen, E) * routing.weights[..., None]).sum(2)
    return jnp.einsum("bted,bte->btd", made, weights)


def loss(params, batch, *, dispatch, choose=None):
    """All that can go wrong is in it: outputs, gradients of tokens, weights and the router, both router losses."""
    matrices = {name: leaf for name, leaf in params.items() if name != "router"}
    x = jp.constrain(batch["x"] + jnp.tanh(batch["x"] @ params["router"] @ params["router"].T), "batch", "seq", "embed")
    logits = x @ params["router"]
    routing = (choose or ft.partial(jp.route, num_chosen=K))(logits)
    if dispatch is None:
        y, dropped = dense(x, routing, **matrices), jnp.zeros(len(x))
    else:
        y, dropped = jp.experts(x, routing, **matrices, dispatch=dispatch)
    total = jnp.sum((y - 1) ** 2) + T * D * (0.1 * routing.balance.sum() + 0.01 * routing.z.sum())
    return (total, jnp.float32(y.size)), {"dropped": dropped.mean()}


@ft.cache
def reference(dispatch=None, choose=None):
    step = jp.value_and_grad(ft.partial(loss, dispatch=dispatch, choose=choose), has_aux=True)
    return jax.jit(step)(jax.jit(params)(), BATCH)


@ft.cache
def sharded(dispatch, choose=None, accumulate=1, **axes):
    """A step's value and gradients on a mesh, and its traffic."""
    plan = jp.plan(params, programs.mesh(**axes), [jp.DP(), jp.FSDP(min_bytes=0), jp.TP(), jp.EP()], dims=DIMS)
    grad = jp.value_and_grad(ft.partial(loss, dispatch=dispatch, choose=choose), has_aux=True, accumulate=accumulate)
    step = plan.jit(grad)
    args = plan.init(), plan.batch(BATCH)
    return step(*args), step, args


def check(found, expected):
    (value, aux), gradients = found
    (value_of_one, aux_of_one), gradients_of_one = expected
    mine, one = {"loss": value, **gradients}, {"loss": value_of_one, **gradients_of_one}
    table = testing.compare(mine, one, None)
    assert table.ok, str(table)
    np.testing.assert_allclose(aux["dropped"], aux_of_one["dropped"], rtol=1e-6)


CASES = [
    ("capacity", {"expert": 8}, 2),
    ("capacity", {"data": 2, "expert": 2, "tensor": 2}, 1),
    ("dropless", {"data": 2, "fsdp": 2, "expert": 2}, 1),
    ("dropless", {"data": 2, "expert": 2, "tensor": 2}, 2),
    ("dropless", {"data": 4, "tensor": 2}, 2),
]


@pytest.mark.parametrize(("dispatch", "axes", "accumulate"), CASES, ids=str)
def test_where_nothing_overflows_it_is_the_dense_reference(dispatch, axes, accumulate):
    found, step, _ = sharded(FITS[dispatch], accumulate=accumulate, **axes)
    check(found, reference())
    assert step.num_compilations == 1
    assert found[0][1]["dropped"] == 0


def test_experts_that_choose_are_the_dense_reference():
    choose = ft.partial(jp.route_by_expert, capacity=1.5)
    found, *_ = sharded(jp.Dropless(), choose=choose, data=2, expert=4)
    check(found, reference(choose=choose))


def skewed(logits):
    """Two of three tokens of a sequence prefer expert 0 by far."""
    preferred = (jnp.arange(E) == 0)[None, None] & (jnp.arange(T) % 3 > 0)[None, :, None]
    return jp.route(jnp.where(preferred, 10.0, logits), K)


def test_a_skewed_router_reports_its_overflow():
    """The same tokens are dropped on every mesh, and as many as a count by hand says."""
    tight = jp.Capacity(factor=1.0)
    found, *_ = sharded(tight, choose=skewed, accumulate=2, data=2, expert=4)
    expected = reference(tight, skewed)
    check(found, expected)
    size = T * K // E
    x = BATCH["x"] + np.tanh(BATCH["x"] @ np.asarray(params()["router"]) @ np.asarray(params()["router"]).T)
    chosen = np.asarray(skewed(jnp.asarray(x @ np.asarray(params()["router"]))).chosen)
    by_hand = [sum(max(0, count - size) for count in np.bincount(row.ravel(), minlength=E)) for row in chosen]
    assert np.mean(by_hand) > 3
    np.testing.assert_allclose(found[0][1]["dropped"], np.mean(by_hand))


def to_one_device(logits, dropping=False):
    """All tokens prefer experts 0 and 1; `dropping` weighs the choices for which there is no room with zero.

    A device has two sequences, and a buffer of the even share has room for the choices of expert 0 of the first.
    """
    routing = jp.route(jnp.where((jnp.arange(E) < 2)[None, None], 100.0 + logits, logits), K)
    kept = (routing.chosen == 0) & (jnp.arange(B) % 2 == 0)[:, None, None]
    return dataclasses.replace(routing, weights=jnp.where(kept, routing.weights, 0.0)) if dropping else routing


def test_a_buffer_that_is_too_small_reports_its_overflow():
    """Of what goes to one device of four a quarter finds room; what does not adds nothing, and has no gradient."""
    (value, aux), gradients = sharded(jp.Dropless(buffer=1.0), choose=to_one_device, data=2, expert=4)[0]
    np.testing.assert_allclose(aux["dropped"], T * K * 3 / 4)
    (expected, _), gradients_of_one = reference(choose=ft.partial(to_one_device, dropping=True))
    table = testing.compare({"loss": value, **gradients}, {"loss": expected, **gradients_of_one}, None)
    assert table.ok, str(table)


@pytest.mark.parametrize(("dispatch", "sizes"), [("capacity", 0), ("dropless", 1)])
def test_tokens_cross_twice_a_pass(dispatch, sizes):
    """XLA:CPU and TPU: two all-to-alls forward, two backward; dropless, one of a few sizes before them."""
    axes = {"data": 2, "expert": 2, "tensor": 2} if dispatch == "capacity" else {"data": 2, "fsdp": 2, "expert": 2}
    _, step, args = sharded(FITS[dispatch], accumulate=1, **axes)
    traffic = testing.collectives(step, *args)
    moved = [each for each in traffic if each.kind == "all-to-all"]
    assert {each.axes for each in moved} == {("expert",)}
    large = [each for each in moved if each.dtype != "s32"]
    assert (len(large), len(moved) - len(large)) == (4, sizes), str(traffic)
    over_expert = [each for each in traffic if each.kind == "all-reduce" and "expert" in each.axes]
    assert max(math.prod(each.shape) for each in over_expert) <= D * E, str(
        traffic
    )  # the router's gradient, no expert's


def test_replicas_are_summed_once_a_step():
    """With accumulation experts and router cross `data` once, outside of the loop; only `expert` is met in it."""
    _, step, args = sharded(FITS["dropless"], accumulate=2, data=2, expert=2, tensor=2)
    traffic = testing.collectives(step, *args)
    assert all(each.depth == 0 for each in traffic if "data" in each.axes), str(traffic)
    assert any("replica, one reduction a step over data" in note for note in step.notes)


def test_notes_say_which_kernel_was_taken():
    _, step, _ = sharded(FITS["dropless"], accumulate=1, data=2, fsdp=2, expert=2)
    assert step.notes == (
        "experts: Dropless(buffer=None), sorted rows, jax.lax.ragged_dot; padded buffers by all-to-all over expert",
    )
    _, step, _ = sharded(FITS["capacity"], accumulate=1, data=2, expert=2, tensor=2)
    assert step.notes == ("experts: Capacity(factor=4.0), one batched product; slots by all-to-all over expert",)


def test_balance_over_the_batch_is_not_separable_and_the_same_on_a_mesh():
    """The mean over the whole batch, as in Switch Transformer: in a microbatch it is that of the microbatch."""

    def of_batch(params, batch):
        routing = jp.route(batch["x"] @ params["router"], K)
        return jp.balance(routing.load.mean(0), routing.probability.mean(0))

    grad = jp.value_and_grad(of_batch, accumulate=2, separable=False)
    value, gradients = jax.jit(grad)(jax.jit(params)(), BATCH)
    plan = jp.plan(params, programs.mesh(data=8), [jp.DP()])
    mine, mine_gradients = plan.jit(grad)(plan.init(), plan.batch(BATCH))
    table = testing.compare({"loss": mine, **mine_gradients}, {"loss": value, **gradients}, None)
    assert table.ok, str(table)


def test_routes():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, E)), jnp.float32)
    routing = jp.route(logits, 2)
    order = np.argsort(-np.asarray(logits), axis=-1)[..., :2]
    np.testing.assert_array_equal(routing.chosen, order)
    top = np.take_along_axis(np.asarray(logits), order, -1)  # renormalised is a softmax over the chosen
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(top, -1), rtol=1e-5)
    probabilities = jax.nn.softmax(logits, -1)
    as_they_are = jp.route(logits, 1, weights="softmax")
    np.testing.assert_allclose(as_they_are.weights[..., 0], probabilities.max(-1), rtol=1e-6)
    counts = np.stack([np.bincount(row.ravel(), minlength=E) for row in order]) / 10
    expected = E * (counts * np.asarray(probabilities.mean(1))).sum(-1)
    np.testing.assert_allclose(routing.balance, expected, rtol=1e-6)
    np.testing.assert_allclose(routing.z, (jax.nn.logsumexp(logits, -1) ** 2).mean(1), rtol=1e-6)


def test_balance_is_one_if_even_and_the_number_of_experts_if_not():
    even = jp.route(10.0 * jnp.eye(E)[None], 1)
    np.testing.assert_allclose(even.balance, 1.0, rtol=1e-6)
    one = jp.route(jnp.zeros((1, 4, E)).at[..., 3].set(50), 1)
    np.testing.assert_allclose(one.balance, E, rtol=1e-6)


def test_grouped_dot_and_its_gradient_alone_and_mapped():
    random = np.random.default_rng(0)
    x, matrices = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 6, 4), (3, 4, 5)))
    sizes = jnp.array([[2, 0, 4], [1, 3, 2]], jnp.int32)

    def by_hand(matrices, x, sizes):
        group = jnp.repeat(jnp.arange(3), sizes, total_repeat_length=6)
        return jnp.sum(jnp.einsum("mk,mkn->mn", x, matrices[group]) ** 2)

    grouped = lambda matrices, x, sizes: jnp.sum(grouped_dot(x, matrices, sizes) ** 2)
    for axes, count in (((None, 0, 0), 2), ((None, 0, 0), 1)):
        args = (matrices, x[:count], sizes[:count])
        found, expected = (jax.vmap(jax.grad(f, argnums=(0, 1)), in_axes=axes)(*args) for f in (grouped, by_hand))
        jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    found, expected = (jax.grad(f, argnums=(0, 1))(matrices, x[0], sizes[0]) for f in (grouped, by_hand))
    jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_experts_without_a_gate():
    made, x = params(), jnp.asarray(BATCH["x"])
    routing = jp.route(x @ made["router"], K)
    y, _ = jp.experts(x, routing, up=made["up"], down=made["down"], activation=jax.nn.gelu)
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, made["up"]))
    weights = (jax.nn.one_hot(routing.chosen, E) * routing.weights[..., None]).sum(2)
    by_hand = jnp.einsum("btef,efd,bte->btd", hidden, made["down"], weights)
    np.testing.assert_allclose(y, by_hand, rtol=1e-4, atol=1e-5)


def unfilled(x, sizes):
    """`x` with no numbers in rows of no group."""
    return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, jnp.nan)


@jax.custom_vjp
def kept_as_it_is(x, sizes):
    return x


kept_as_it_is.defvjp(lambda x, sizes: (x, sizes), lambda sizes, cotangent: (unfilled(cotangent, sizes), None))


def careless(x, matrices, sizes):
    """A product that leaves anything in rows of no group, as platforms may: results, and gradients of rows."""
    return unfilled(grouped_dot(kept_as_it_is(x, sizes), matrices, sizes), sizes)


def test_what_a_platform_leaves_in_room_that_was_not_needed_goes_nowhere(monkeypatch):
    monkeypatch.setattr(_experts, "grouped_dot", careless)
    check(sharded.__wrapped__(jp.Dropless(), data=2, expert=4)[0], reference())


MISTAKES = {
    "_counts": lambda ids, number: jnp.roll(COUNTS(ids, number), 1),
    "_slots": lambda chosen, weights, *rest: SLOTS(chosen, weights[..., ::-1], *rest),
    "_rows_where": lambda wanted, rows: rows,
}
COUNTS, SLOTS = _experts._counts, _experts._slots


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, monkeypatch):
    """Groups shifted by one, weights of the other choice, room that was not needed taken for rows."""
    monkeypatch.setattr(_experts, mistake, MISTAKES[mistake])
    if mistake == "_rows_where":
        monkeypatch.setattr(_experts, "grouped_dot", careless)
    dispatch = FITS["capacity" if mistake == "_slots" else "dropless"]
    found, *_ = sharded.__wrapped__(dispatch, data=2, expert=4)
    with pytest.raises(AssertionError):
        check(found, reference())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": (E, D, F + 1)}, r"up \(8, 16, 33\) and down \(8, 32, 16\): down is \[8, 33, 16\]"),
        ({"gate": (E, D, F + 1)}, r"up .* and gate .*: these have one shape"),
        ({"up": (E, F, D)}, r"for x \(16, 8, 16\) and a router of 8 experts, \[8, 16, hidden\]"),
        ({"up": (E - 1, D, F)}, r"a router of 8 experts"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(changes, message):
    shapes = {"up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)} | changes
    x = jnp.asarray(BATCH["x"])
    with pytest.raises(ShardingError, match=message):
        jp.experts(x, jp.route(jnp.zeros((B, T, E)), K), **{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_routings_that_make_no_sense_are_errors():
    with pytest.raises(ShardingError, match=r"route: 9 of 8 experts for each token"):
        jp.route(jnp.zeros((B, T, E)), 9)
    with pytest.raises(ShardingError, match=r"route: logits have shape \(16, 8\). Give \[batch, sequence, experts\]"):
        jp.route(jnp.zeros((B, E)), 1)
    with pytest.raises(ShardingError, match=r"route_by_expert: capacity is 9, for 8 experts"):
        jp.route_by_expert(jnp.zeros((B, T, E)), 9)
    with pytest.raises(ShardingError, match=r"factor is 0. Use a positive one"):
        jp.Capacity(factor=0)
    with pytest.raises(ShardingError, match=r"buffer is 0.5. Use 1 or more"):
        jp.Dropless(buffer=0.5)


def test_a_router_sees_whole_sequences():
    """Its losses are means over a sequence, and of a part they are other numbers."""
    plan = jp.plan(params, programs.mesh(context=2), [jp.CP(balance="none", reduce="step")], dims=DIMS)
    grad = jp.value_and_grad(ft.partial(loss, dispatch=FITS["dropless"]), has_aux=True, accumulate=2)
    with pytest.raises(ShardingError, match=r"route: loads and losses of a router are means over a sequence, but with"):
        plan.jit(grad).lower(plan.abstract(), plan.batch(BATCH))


def test_slots_need_whole_sequences():
    plan = jp.plan(params, programs.mesh(tensor=8), [jp.TP(), jp.EP()], dims=DIMS)
    split = dataclasses.replace(plan, dims={**plan.dims, "seq": ("tensor",), "mlp": ()})
    with pytest.raises(ShardingError, match="slots are for a whole sequence, but this plan splits the sequence over t"):
        split.jit(ft.partial(loss, dispatch=FITS["capacity"]))(plan.init(), plan.batch(BATCH))
