"""What a call of a step is made of, and that the quick way of the second call sees all that the first one saw."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from tests import _programs as programs

D = 16


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.layer = nnx.Linear(D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = 1.0
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.layer(x)) * self.scale


def mean(model, x):
    return jnp.mean(model(x) ** 2)


@pytest.fixture(scope="module")
def plan():
    return jp.plan(lambda: Net(rngs=nnx.Rngs(0, dropout=1)), programs.mesh(data=8), [jp.DP()])


@pytest.fixture
def model(plan):
    return plan.init()


@pytest.fixture
def x(plan):
    return plan.batch(np.random.default_rng(0).standard_normal((8, D)).astype(np.float32))


def twice(step, *args, **kwargs):
    step(*args, **kwargs)
    return step(*args, **kwargs)


def is_quick(step):
    return step._glance is not None


# ---- what the quick way must not miss


def test_state_changes_in_place_on_every_call(plan, model, x):
    step = plan.jit(mean)
    values = [float(step(model, x)) for _ in range(4)]
    assert is_quick(step)
    assert len(set(values)) == 4  # the dropout stream moves on
    assert int(model.calls[...]) == 4


def test_train_and_eval(plan, model, x):
    """A flag of a submodule changes between two calls: another program, compiled once for each."""
    step = plan.jit(mean, on_recompile="allow")
    twice(step, model, x)
    model.eval()
    assert float(step(model, x)) == float(step(model, x))
    model.train()
    assert float(step(model, x)) != float(step(model, x))
    assert step.num_compilations == 2


def test_an_attribute_that_is_set(plan, model, x):
    model.eval()
    step = plan.jit(mean, on_recompile="allow")
    before = float(twice(step, model, x))
    model.scale = 2.0
    np.testing.assert_allclose(float(step(model, x)), 4 * before, rtol=1e-6)


def test_a_variable_that_is_exchanged(plan, model, x):
    model.eval()
    step = plan.jit(mean, on_recompile="allow")
    before = float(twice(step, model, x))
    model.layer.kernel = nnx.Param(2 * model.layer.kernel[...])
    model.layer.bias = nnx.Param(2 * model.layer.bias[...])
    np.testing.assert_allclose(float(step(model, x)), 4 * before, rtol=1e-6)
    model.layer.kernel[...] = model.layer.kernel[...] / 2
    np.testing.assert_allclose(float(step(model, x)), before, rtol=1e-6)


def test_values_that_are_loaded(plan, model, x):
    """Weights from the host, put in by `nnx.update`, are placed by the next call."""
    model.eval()
    step = plan.jit(mean)
    twice(step, model, x)
    nnx.update(model, jax.tree.map(np.zeros_like, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    assert float(step(model, x)) == 0
    assert float(step(model, x)) == 0
    jp.testing.assert_sharding(model, plan)
    assert step.num_compilations == 1


def test_another_model(plan, model, x):
    step = plan.jit(mean)
    twice(step, model, x)
    other = plan.init()
    other.layer.kernel[...] = jnp.zeros_like(other.layer.kernel[...])
    assert float(step(other, x)) == 0
    assert int(other.calls[...]) == 1
    assert step.num_compilations == 1


def test_metadata_of_a_variable(plan, model, x):
    step = plan.jit(lambda model, x: mean(model, x) * model.layer.kernel.get_metadata().get("weight", 1.0))
    model.eval()
    before = float(twice(step, model, x))
    model.layer.kernel.set_metadata(weight=3.0)
    np.testing.assert_allclose(float(step(model, x)), 3 * before, rtol=1e-6)


def test_settings_and_numbers(plan, model, x):
    """A static argument compiles again, a number does not; both count on the first call and on the next."""
    step = plan.jit(lambda model, x, how, factor: getattr(jnp, how)(model(x) ** 2) * factor, on_recompile="allow")
    model.eval()
    mean, total = (float(twice(step, model, x, how, 1.0)) for how in ("mean", "sum"))
    assert total > mean
    assert step.num_compilations == 2
    np.testing.assert_allclose(float(step(model, x, "sum", 2.0)), 2 * total, rtol=1e-6)
    np.testing.assert_allclose(float(step(model, x, factor=3.0, how="sum")), 3 * total, rtol=1e-6)
    assert step.num_compilations == 3  # by keyword it is another structure


def test_keys(plan, model, x):
    step = plan.jit(lambda model, x, key: jax.random.uniform(key) + 0 * mean(model, x))
    first, second, third = (float(step(model, x, jax.random.key(seed))) for seed in (0, 1, 0))
    assert first == third != second
    assert step.num_compilations == 1


def test_shapes_and_placement(plan, model, x):
    step = plan.jit(mean, on_recompile="allow")
    twice(step, model, x)
    step(model, plan.batch(np.ones((16, D), np.float32)))
    assert step.num_compilations == 2
    step(model, jax.device_put(x, plan.sharding(jax.P())))
    assert step.num_compilations == 3
    step(model, x)
    assert step.num_compilations == 3


def test_a_batch_from_the_host_is_still_refused(plan, model, x):
    step = plan.jit(mean)
    twice(step, model, x)
    with pytest.raises(jp.StepError, match=r"Split the batch with plan\.batch"):
        step(model, np.asarray(x))


@pytest.mark.parametrize("kind", ["array", "list"])
def test_what_cannot_be_watched_takes_the_long_way(kind, x):
    """A bare array in a module, and a list: right, if slow."""

    class Odd(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((D, D)))
            self.extra = nnx.data(jnp.ones(())) if kind == "array" else nnx.data([nnx.Variable(jnp.ones(()))])

    def total(model, x):
        extra = model.extra if kind == "array" else model.extra[0][...]
        if kind == "array":
            model.extra = extra + 1
        else:
            model.extra[0][...] = extra + 1
        return jnp.mean(x @ model.w[...]) * extra

    plan = jp.plan(Odd, programs.mesh(data=8), [jp.DP()])
    model, step = plan.init(), plan.jit(total)
    first = float(step(model, x))
    assert not is_quick(step)
    np.testing.assert_allclose([float(step(model, x)) for _ in range(2)], [2 * first, 3 * first], rtol=1e-6)
    assert step.num_compilations == 1


# ---- what is kept, given away and given back


def test_nothing_is_kept_alive(plan, x):
    """Neither the arrays of the last call nor its model outlive it: a second model fits where the first was."""
    gc.collect()
    before = len(jax.live_arrays())
    model = plan.init()
    step = plan.jit(mean)
    twice(step, model, x)
    del model
    gc.collect()
    assert len(jax.live_arrays()) == before
    params = {"w": jax.device_put(jnp.ones((D, D)), plan.sharding(jax.P()))}
    plain = jp.plan(lambda: {"w": jnp.ones((D, D))}, plan.mesh, [jp.DP()])
    step = plain.jit(lambda params, x: (jax.tree.map(lambda leaf: leaf + 1, params), jnp.mean(x @ params["w"])))
    for _ in range(3):
        params = step(params, x)[0]
    gc.collect()
    assert len(jax.live_arrays()) == before + 1
    del params


def test_only_what_changes_is_given_away(plan, model, x):
    """A step that reads a model leaves its arrays as they are: no copy comes back, and none is deleted."""
    kernel, calls = model.layer.kernel[...], model.calls[...]
    step = plan.jit(mean)
    assert len(step.lower(model, x).out_info) == 1 + 2  # the mean; the number of calls and the dropout counter
    twice(step, model, x)
    assert model.layer.kernel[...] is kernel
    assert not kernel.is_deleted()
    assert calls.is_deleted()


def test_donation_can_be_declined(plan, model, x):
    calls = model.calls[...]
    twice(plan.jit(mean, donate=False), model, x)
    assert int(calls) == 0
    assert int(model.calls[...]) == 2


def test_donated_pytrees(x):
    plan = jp.plan(lambda: {"w": jnp.ones((D, D))}, programs.mesh(data=8), [jp.DP()])
    update = lambda params, x: jax.tree.map(lambda leaf: leaf * jnp.mean(x), params)
    for numbers, deleted in (((), False), (0, True), ((0,), True)):
        params = plan.init()
        plan.jit(update, donate_argnums=numbers)(params, x)
        assert params["w"].is_deleted() == deleted


def test_one_buffer_in_two_places(plan, model, x):
    """Given away once: two variables that hold the same array are two after the step."""
    shared = jax.device_put(jnp.zeros((), jnp.int32), plan.sharding(jax.P()))

    class Counts(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(()))
            self.a, self.b = nnx.Variable(jnp.zeros((), jnp.int32)), nnx.Variable(jnp.zeros((), jnp.int32))

    def add(model):
        model.a[...] += 1
        model.b[...] += 2

    plan = jp.plan(Counts, plan.mesh, [jp.DP()])
    model, step = plan.init(), plan.jit(add)
    step(model)
    model.a.set_raw_value(shared)
    model.b.set_raw_value(shared)
    step(model)
    assert (int(model.a[...]), int(model.b[...])) == (1, 2)


# ---- results of every kind


def test_results(plan, model, x):
    """Nodes that came in come back as the caller's own; new ones, pytrees and settings as they are."""
    opt = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @plan.jit
    def step(model, opt, x):
        gradients = nnx.grad(mean)(model, x)
        return {"model": model, "new": nnx.clone(model), "gradients": gradients, "name": "step", "x": x}

    for _ in range(2):
        out = step(model, opt, x)
        assert out["model"] is model
        assert out["new"] is not model
        assert isinstance(out["new"], Net)
        assert type(out["new"].layer.kernel) is nnx.Param
        assert type(out["gradients"]["layer"]["kernel"]) is nnx.Param
        assert out["name"] == "step"
        assert out["x"].sharding.spec == jax.P("data")


def test_variables_of_no_module():
    """An `nnx.State` is a pytree: what the step returns is the new one. Changing it in place is refused."""
    plan = jp.plan(lambda: nnx.state(nnx.Linear(D, D, rngs=nnx.Rngs(0))), programs.mesh(data=8), [jp.DP()])
    state = plan.init()
    doubled = plan.jit(lambda state: jax.tree.map(lambda leaf: 2 * leaf, state))(state)
    np.testing.assert_array_equal(doubled["kernel"][...], 2 * state["kernel"][...])
    assert type(doubled["kernel"]) is nnx.Param

    def in_place(state):
        state["kernel"][...] = 2 * state["kernel"][...]

    with pytest.raises(jp.StepError) as error:
        plan.jit(in_place)(state)
    assert str(error.value) == (
        "in_place: the step changes variables in place that are in no module: state.kernel. Only modules are updated "
        "in place: return the new state, or give the module itself."
    )


def test_rejects_what_is_neither_array_nor_setting(plan, model, x):
    """A list of numbers is a pytree of numbers; a slice of a file handle is nothing."""
    step = plan.jit(lambda model, x, extra: mean(model, x))
    step(model, x, [1, 2])
    with pytest.raises(jp.StepError) as error:
        step(model, x, {1, 2})
    assert str(error.value) == (
        "extra: a set is neither an array nor hashable, so a step cannot take it. Pass arrays, nnx modules, pytrees of "
        "them, or hashable settings."
    )
