"""`jp.value_and_grad`: its forms and why each is chosen, what a loss may return, hooks, weights, and its errors."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import _tree
from tests import _programs as programs

D, F, ROWS = 16, 64, 48
DATA = {"data": 8}
ALL = {"data": 2, "fsdp": 2, "tensor": 2}


def strategies(**tensor):
    return [jp.DP(), jp.FSDP(min_bytes=0), jp.TP(**(tensor or {"column": ["*up"], "row": ["*down"]}))]


def batch(rows=ROWS):
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((rows, D)).astype(np.float32),
        "weight": np.linspace(0, 2, rows).astype(np.float32),
        "sample": np.arange(rows, dtype=np.int32),
    }


class Net(nnx.Module):
    """Two matrices and whatever a test puts between them."""

    def __init__(self, between=None, *, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.between = between(rngs) if between else None
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x, *args):
        hidden = jax.nn.tanh(self.up(x))
        return self.down(hidden if self.between is None else self.between(hidden, *args))


def squares(model, batch):
    return jnp.mean(model(batch["x"]) ** 2)


def weighted(model, batch):
    each = jnp.mean(model(batch["x"]) ** 2, axis=-1)
    return (each * batch["weight"]).sum(), batch["weight"].sum()


def run(make, loss, axes, *, accumulate=1, chosen=None, data=None, options=None, **settings):
    """One call under a plan: value, gradients by path, the model, the step."""
    plan = jp.plan(make, programs.mesh(**axes), chosen or strategies(), **(options or {}))
    model = plan.init()
    step = plan.jit(jp.value_and_grad(loss, accumulate=accumulate, **settings))
    value, gradients = step(model, plan.batch(batch() if data is None else data))
    return value, programs.host(_tree.leaves(gradients)), model, step


@ft.cache
def by_hand(make, loss, *, accumulate=1, wide=False):
    """The same on one device by Flax alone, in float32 or float64: one microbatch of consecutive rows after another."""
    model = nnx.jit(make)()

    def summed(model, part):
        out = loss(model, part)
        total, weight = out if isinstance(out, tuple) else (out * len(part["x"]), len(part["x"]))
        return total, weight

    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard" if wide else "strict"):
        whole = batch()
        if wide:
            nnx.update(model, widened(nnx.state(model)))
            whole = widened(whole)
        step = nnx.jit(nnx.value_and_grad(summed, has_aux=True))
        found = [step(model, microbatch(whole, index, accumulate)) for index in range(accumulate)]
        weight = sum(float(each[0][1]) for each in found)
        gradients = [programs.host(_tree.leaves(each[1])) for each in found]
    mean = {
        path: sum(each[path] for each in gradients) / gradients[0][path].dtype.type(weight) for path in gradients[0]
    }
    return sum(float(each[0][0]) for each in found) / weight, mean, model


def microbatch(whole, index, count):
    return jax.tree.map(lambda leaf: np.split(np.asarray(leaf), count)[index], whole)


def widened(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf, tree)


def assert_same(ours, theirs, exact=None):
    """By the criterion where there is a float64 run; random masks differ in float64, and a bound holds instead."""
    tables = [
        jp.testing.compare(*(each and pick(each) for each in (ours, theirs, exact)), group=group)
        for group, pick in {
            "outputs": lambda each: {"loss": np.asarray(each[0], np.float64 if each is exact else np.float32)},
            "gradients": lambda each: each[1],
        }.items()
    ]
    assert all(table.ok for table in tables), "\n".join(map(str, tables))


def plain(**options):
    return lambda: Net(rngs=nnx.Rngs(0, dropout=1), **options)


class Convolved(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 1, kernel_size=(3,), rngs=rngs)

    def __call__(self, hidden):
        return self.conv(hidden[..., None])[..., 0]


class KeyedDropout(nnx.Module):
    """A mask for each position of a batch: not for each sample."""

    def __init__(self, rngs):
        pass

    def __call__(self, hidden):
        return hidden * jax.random.bernoulli(jax.random.key(3), 0.5, hidden.shape).astype(hidden.dtype)


def by_sample(model, batch):
    hidden = jp.dropout(jax.nn.tanh(model.up(batch["x"])), 0.5, key=jax.random.key(1), ids=batch["sample"])
    return jnp.mean(model.down(hidden) ** 2)


PLAIN = plain()
MASKED = plain(between=KeyedDropout)
DROPOUT = plain(between=lambda rngs: nnx.Dropout(0.5, rngs=rngs))
STATISTICS = plain(between=lambda rngs: nnx.BatchNorm(F, rngs=rngs))
CONVOLUTION = plain(between=Convolved)
FORMS = {
    "mean": (PLAIN, squares, DATA, {}, "replica, one reduction a step over data"),
    "weighted": (PLAIN, weighted, ALL, {}, "replica, one reduction a step over data"),
    "fsdp": (PLAIN, weighted, {"fsdp": 8}, {}, "sharded, one reduce-scatter a microbatch over fsdp"),
    "tensor": (PLAIN, weighted, {"tensor": 8}, {}, "sharded, one reduce-scatter a microbatch over no axis"),
    "said": (PLAIN, weighted, ALL, {"separable": False}, "whole, the loss says it is not separable"),
    "sample ids": (PLAIN, by_sample, ALL, {}, "replica, one reduction a step over data"),
    "key": (MASKED, squares, ALL, {}, "whole, it draws random numbers that do not depend on the sample"),
    "dropout": (DROPOUT, squares, ALL, {}, "whole, the loss changes the model's state"),
    "statistics": (STATISTICS, weighted, ALL, {}, "whole, the loss changes the model's state"),
    "convolution": (
        CONVOLUTION,
        weighted,
        DATA,
        {},
        "manual, one reduction a step over data; a convolution cannot be mapped",
    ),
    "convolution beside": (
        CONVOLUTION,
        weighted,
        {"data": 4, "tensor": 2},
        {},
        "whole, a convolution cannot be mapped over replicas beside axis 'tensor'",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_and_its_numbers(name, caplog):
    """The form that a loss gets, its reason, and one device's numbers in it."""
    make, loss, axes, settings, note = FORMS[name]
    found = run(make, loss, axes, accumulate=2, **settings)
    exact = None if make in (DROPOUT, MASKED) or loss is by_sample else by_hand(make, loss, accumulate=2, wide=True)
    assert_same(found, by_hand(make, loss, accumulate=2), exact)
    assert found[-1].notes[0].startswith(f"accumulation over 2 microbatches: {note}")
    assert ("gradients are reduced 2 times a step" in caplog.text) == (note.startswith("whole") and axes != {"fsdp": 8})


def test_a_warning_is_logged_once_though_the_step_is_traced_twice(caplog):
    """A table that the plan did not foresee is met while a step is traced, which is then traced again."""

    def make():
        return {"words": jnp.ones((64, D)), "up": jnp.ones((D, F))}

    def loss(params, batch):
        return jnp.mean((params["words"][batch["sample"]] @ params["up"]) ** 2)

    chosen = [jp.DP(), jp.FSDP(min_bytes=0)]
    *_, step = run(make, loss, {"data": 2, "fsdp": 4}, accumulate=2, separable=False, chosen=chosen)
    assert any(note.startswith("looked up by index, which the plan did not foresee: words") for note in step.notes)
    assert caplog.text.count("gradients are reduced 2 times a step: the loss says it is not separable.") == 1


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "data": 2}], ids=str)
def test_one_dim_split_by_a_replica_axis_and_then_another(axes):
    """`ZeRO(2)` sums its piece in the loop; `FSDP(reduce="step")`, which split the dim first, cuts that after it."""
    chosen = [jp.ZeRO(2, min_bytes=0), jp.FSDP(min_bytes=0, reduce="step")]
    plan = jp.plan(lambda: {"w": jnp.ones((D, 5))}, programs.mesh(**axes), chosen)
    assert plan.records["w"].gradient == P(("fsdp", "data"))
    loss = lambda params, batch: jnp.mean((batch["x"] @ params["w"]) ** 2)
    step = plan.jit(jp.value_and_grad(loss, accumulate=2))
    _, gradients = step(plan.init(), plan.batch(batch()))
    expected = jax.jit(jax.grad(loss))({"w": jnp.ones((D, 5))}, batch())
    table = jp.testing.compare(programs.host(gradients), programs.host(expected), None, bound=2e-6)
    assert table.ok, str(table)
    assert gradients["w"].sharding.is_equivalent_to(plan.sharding(plan.records["w"].storage), 2)


@pytest.mark.parametrize("make", [DROPOUT, STATISTICS], ids=["dropout", "statistics"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_state_that_a_loss_changes(make, accumulate):
    """Batch statistics over the global batch, and random-number counters, are those of one device afterwards."""
    ours, theirs = run(make, squares, ALL, accumulate=accumulate), by_hand(make, squares, accumulate=accumulate)
    assert_same(ours, theirs)
    state = lambda model: programs.host(
        {
            path: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            for path, leaf in _tree.leaves(model).items()
        }
    )
    table = jp.testing.compare(state(ours[2]), state(theirs[2]), None, bound=1e-6)
    assert table.ok, str(table)


# ---- what a loss may return


def test_no_accumulation_is_direct():
    found = run(PLAIN, weighted, ALL)
    assert_same(found, by_hand(PLAIN, weighted), by_hand(PLAIN, weighted, wide=True))
    assert found[-1].notes == ()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weight_of_a_mean(accumulate):
    """A weighted mean with `weight=` is what (sum, weight) is: the true mean, not a mean of means."""

    def mean(model, batch):
        total, weight = weighted(model, batch)
        return total / weight

    ours = run(PLAIN, mean, ALL, accumulate=accumulate, weight=lambda batch: batch["weight"].sum())
    assert_same(ours, by_hand(PLAIN, weighted))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_aux_is_averaged_by_weight(accumulate):
    def loss(model, batch):
        total, weight = weighted(model, batch)
        return (total, weight), {"mean x": (batch["x"].mean(-1) * batch["weight"]).sum() / weight}

    value, gradients, *_ = run(PLAIN, loss, ALL, accumulate=accumulate, has_aux=True)
    assert_same((value[0], gradients), by_hand(PLAIN, weighted))
    expected = np.average(batch()["x"].mean(-1), weights=batch()["weight"])
    np.testing.assert_allclose(value[1]["mean x"], expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_of_weight_zero_change_nothing(accumulate):
    """An uneven last batch, filled up: loss and gradients are the true mean over its 41 rows."""
    rows = 41
    real = {name: leaf[:rows] for name, leaf in batch().items()}
    filled = {name: np.concatenate([leaf, np.full_like(leaf[:7], 9)]) for name, leaf in real.items()}
    filled["weight"][rows:] = 0
    ours = run(PLAIN, weighted, ALL, accumulate=accumulate, data=filled)
    model = nnx.jit(PLAIN)()
    mean = lambda model: programs.mean_of(weighted(model, real))
    value, gradients = nnx.jit(nnx.value_and_grad(mean))(model)
    assert_same(ours, (value, programs.host(_tree.leaves(gradients))))


def test_a_batch_of_no_weight_gives_zero():
    nothing = {**batch(), "weight": np.zeros(ROWS, np.float32)}
    for accumulate in (1, 2):
        value, gradients, *_ = run(PLAIN, weighted, ALL, accumulate=accumulate, data=nothing)
        assert float(value) == 0
        assert all((leaf == 0).all() for leaf in gradients.values())


def test_outside_of_a_plan_it_is_nnx_value_and_grad():
    model = nnx.jit(PLAIN)()
    for accumulate in (1, 4):
        value, gradients = nnx.jit(jp.value_and_grad(weighted, accumulate=accumulate))(model, batch())
        assert_same((value, programs.host(_tree.leaves(gradients))), by_hand(PLAIN, weighted))
        assert isinstance(gradients, nnx.State)


# ---- hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hook_gets_unreduced_gradients_by_path_and_axes(accumulate):
    """A user's own sum gives the same numbers; without its sum each device's own gradients would come out."""
    seen = {}

    def hook(gradients, axes):
        seen.update(axes=axes, shapes={path: leaf.shape for path, leaf in gradients.items()})
        return {path: jax.lax.psum(leaf, axes) for path, leaf in gradients.items()}

    chosen = [jp.DP(reduce=hook), *strategies()[1:]]
    ours = run(PLAIN, weighted, ALL, accumulate=accumulate, chosen=chosen)
    assert_same(ours, by_hand(PLAIN, weighted))
    assert seen["axes"] == ("data",)
    assert seen["shapes"] == {  # the pieces that fsdp and tensor leave on a device
        "down.bias": (D,),
        "down.kernel": (F // 2, D // 2),
        "up.bias": (F // 2,),
        "up.kernel": (D // 2, F // 2),
    }


def test_hook_may_do_other_than_sum():
    """As Adasum and divergence checks do: here the largest magnitude over the replicas, of gradients not yet summed."""
    largest = lambda gradients, axes: {p: jax.lax.pmax(jnp.abs(leaf), axes) for p, leaf in gradients.items()}
    _, gradients, *_ = run(PLAIN, weighted, DATA, chosen=[jp.DP(reduce=largest)])
    model = nnx.jit(PLAIN)()
    own = nnx.jit(nnx.grad(lambda model, rows: weighted(model, rows)[0]))
    each = [programs.host(_tree.leaves(own(model, microbatch(batch(), part, 8)))) for part in range(8)]
    total = batch()["weight"].sum()
    expected = {path: np.max([np.abs(leaves[path]) for leaves in each], axis=0) / total for path in each[0]}
    table = jp.testing.compare(gradients, expected, None, bound=1e-5)
    assert table.ok, str(table)


@pytest.mark.parametrize("setting", [{"reduce": lambda g, axes: g}, {"reduce_dtype": "bfloat16"}])
def test_hook_is_refused_where_gradients_are_not_apart(setting):
    """Rejects: batch statistics see the whole batch. Those above are allowed."""
    with pytest.raises(jp.StepError) as error:
        run(STATISTICS, squares, DATA, chosen=[jp.DP(**setting)])
    assert "needs gradients that are apart on each replica" in str(error.value)
    assert "the loss changes the model's state" in str(error.value)


def test_reduce_dtype_is_what_crosses_the_axis():
    """In bfloat16 the sum is asked for, and costs 3 digits."""
    exact = run(PLAIN, weighted, DATA, chosen=[jp.DP()])
    rough = run(PLAIN, weighted, DATA, chosen=[jp.DP(reduce_dtype="bfloat16")])
    error = np.abs(exact[1]["up.kernel"] - rough[1]["up.kernel"]).max() / np.abs(exact[1]["up.kernel"]).max()
    assert 1e-4 < error < 2e-2
    lowered = rough[-1].lower(rough[2], rough[-1].plan.batch(batch())).as_text()
    assert "all_reduce" in lowered
    assert "tensor<16x64xbf16>) -> tensor<16x64xbf16>" in lowered
    assert all(leaf.dtype == np.float32 for leaf in rough[1].values())


@pytest.mark.parametrize(("make", "form"), [(PLAIN, "replica"), (CONVOLUTION, "manual")], ids=["replica", "manual"])
def test_a_precisions_reduce_crosses_the_axis_in_either_form(make, form):
    options = {"precision": jp.Precision(reduce="bfloat16")}
    *_, model, step = run(make, weighted, DATA, accumulate=2, chosen=[jp.DP()], options=options)
    assert step.notes[0].startswith(f"accumulation over 2 microbatches: {form}, one reduction a step over data")
    lowered = step.lower(model, step.plan.batch(batch())).as_text()
    assert "tensor<16x64xbf16>) -> tensor<16x64xbf16>" in lowered


# ---- which parameters


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_parameters_have_no_gradient(accumulate):
    options = {"trainable": "up"}
    _, gradients, *_ = run(PLAIN, weighted, ALL, accumulate=accumulate, options=options)
    expected = by_hand(PLAIN, weighted)[1]
    assert list(gradients) == ["up.bias", "up.kernel"]
    table = jp.testing.compare(gradients, {path: expected[path] for path in gradients}, None, bound=2e-6)
    assert table.ok, str(table)


def test_frozen_leaves_of_a_pytree_have_gradient_zero():
    loss = lambda params, batch: jnp.mean((batch["x"] @ params["up"] @ params["down"]) ** 2)
    make = lambda: {"up": jnp.ones((D, F)), "down": jnp.ones((F, D)), "count": jnp.zeros((), jnp.int32)}
    _, gradients, *_ = run(make, loss, ALL, chosen=strategies(column=["up"], row=["down"]), options={"trainable": "up"})
    assert (gradients["down"] == 0).all()
    assert gradients["count"].dtype == np.int32
    assert (gradients["up"] != 0).all()


# ---- errors, each with what is allowed beside it


def failing(loss, accumulate=1, data=None, axes=ALL, **settings):
    with pytest.raises(jp.StepError) as error:
        run(PLAIN, loss, axes, accumulate=accumulate, data=data, **settings)
    return str(error.value)


def test_rejects_what_is_no_loss():
    assert "the loss returned float32[48]. Return a scalar" in failing(lambda m, b: jnp.mean(m(b["x"]), -1))
    assert "Return a scalar mean or (sum, weight), two scalars" in failing(
        lambda m, b: (jnp.mean(m(b["x"])), b["weight"])
    )
    assert "not a pair of the loss and what else it says" in failing(squares, has_aux=True)
    assert "weight= has no effect on a loss that returns (sum, weight)" in failing(weighted, weight=lambda b: 1.0)


def test_rejects_aux_that_cannot_be_averaged():
    loss = lambda model, batch: (squares(model, batch), {"x": batch["x"]})
    assert "aux x is not a scalar" in failing(loss, accumulate=2, has_aux=True)
    run(PLAIN, loss, ALL, has_aux=True)  # one microbatch: nothing to average


def test_rejects_a_batch_that_does_not_divide():
    message = failing(weighted, accumulate=5)
    assert message == (
        "sample: 48 rows do not divide into accumulate=5 microbatches. Use a batch of 40 or 60, or another accumulate."
    )
    message = failing(weighted, accumulate=4, data=batch(24), axes=DATA, chosen=[jp.DP()])
    assert message == (
        "a batch of 24 rows does not divide into 4 microbatches over 8 devices (data 8). Use a batch of 32, or another "
        "accumulate."
    )
    run(PLAIN, weighted, DATA, accumulate=3, data=batch(24), chosen=[jp.DP()])


def test_rejects_no_microbatch():
    with pytest.raises(jp.StepError) as error:
        jp.value_and_grad(squares, accumulate=0)
    assert str(error.value) == ("jp.value_and_grad: accumulate is 0. Use 1 for none, or the number of microbatches.")


def test_rejects_a_loss_that_makes_variables():
    def loss(model, batch):
        model.more = nnx.Param(jnp.ones(3))
        return squares(model, batch)

    assert "adds or removes variables of the model" in failing(loss)


def test_replicated_specs_are_whole():
    """What comes out lies with its parameter."""
    plan = jp.plan(PLAIN, programs.mesh(**ALL), strategies())
    step = plan.jit(jp.value_and_grad(weighted, accumulate=2))
    value, gradients = step(plan.init(), plan.batch(batch()))
    jp.testing.assert_sharding(gradients, plan)
    assert value.sharding.is_equivalent_to(plan.sharding(P()), 0)
