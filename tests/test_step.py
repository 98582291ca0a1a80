"""`plan.jit`: any step in one compilation, what it says of a second one, and what it refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import _tree
from tests import _programs as programs

D, F, ROWS = 64, 128, 16
FSDP_TP = {"fsdp": 4, "tensor": 2}


def strategies():
    return [jp.FSDP(), jp.TP(column=["*up"], row=["*down"])]


def make_params():
    return {"up": jnp.ones((D, F)) / D, "down": jnp.ones((F, D)) / F}


def loss(params, x):
    return jnp.mean((x @ params["up"] @ params["down"]) ** 2)


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.tanh(self.up(x)))


@pytest.fixture(scope="module")
def plan():
    return jp.plan(make_params, programs.mesh(**FSDP_TP), strategies())


@pytest.fixture(scope="module")
def nnx_plan():
    return jp.plan(lambda: Net(rngs=nnx.Rngs(0)), programs.mesh(**FSDP_TP), strategies())


def batch(plan, rows=ROWS):
    return plan.batch(np.random.default_rng(0).standard_normal((rows, D)).astype(np.float32))


# ---- any step


def test_two_models_and_two_optimizers():
    """A generator and a discriminator in one plan and one step, each with its optimiser: as on one device."""

    def make():
        return {"maker": Net(rngs=nnx.Rngs(0)), "judge": Net(rngs=nnx.Rngs(1))}

    def fools(maker, judge, x):
        return jnp.mean((judge(maker(x)) - 1) ** 2)

    def tells(judge, maker, x):
        return jnp.mean((judge(x) - 1) ** 2) + jnp.mean(judge(maker(x)) ** 2)

    def train_step(maker, judge, maker_opt, judge_opt, x):
        judge_loss, gradients = nnx.value_and_grad(tells)(judge, maker, x)
        judge_opt.update(judge, gradients)
        maker_loss, gradients = nnx.value_and_grad(fools)(maker, judge, x)
        maker_opt.update(maker, gradients)
        return maker_loss, judge_loss

    def train(models, jit, x):
        maker, judge = models["maker"], models["judge"]
        opts = [
            nnx.Optimizer(model, optax.sgd(rate, 0.9), wrt=nnx.Param) for model, rate in ((maker, 0.1), (judge, 0.2))
        ]
        step = jit(train_step)
        return [step(maker, judge, *opts, x) for _ in range(3)], step, opts

    plan = jp.plan(make, programs.mesh(**FSDP_TP), strategies())
    models, x = plan.init(), np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32)
    losses, step, opts = train(models, plan.jit, plan.batch(x))
    expected, *_ = train(nnx.jit(make)(), nnx.jit, x)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert step.num_compilations == 1
    jp.testing.assert_sharding((models, opts), plan)


def test_twin_models_that_lie_alike_need_no_names():
    """Both twins match by path and shape; they lie alike, so either record serves."""
    plan = jp.plan(lambda: (Net(rngs=nnx.Rngs(0)), Net(rngs=nnx.Rngs(1))), programs.mesh(**FSDP_TP), strategies())
    first, second = plan.init()
    step = plan.jit(lambda first, second, x: jnp.mean(first(x)) - jnp.mean(second(x)))
    value = step(first, second, batch(plan))
    assert value.shape == ()
    jp.testing.assert_sharding((first, second), plan)


def test_loaded_weights(nnx_plan):
    """From the host into a model that is there, or a whole model by `plan.shard`; the step computes with them."""
    x = batch(nnx_plan)
    step = nnx_plan.jit(lambda model, x: jnp.mean(model(x) ** 2))
    loaded = nnx.jit(lambda: Net(rngs=nnx.Rngs(7)))()
    expected = float(jnp.mean(loaded(np.asarray(x)) ** 2))

    model = nnx_plan.init()
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(loaded)))
    np.testing.assert_allclose(float(step(model, x)), expected, rtol=1e-6)
    jp.testing.assert_sharding(model, nnx_plan)

    assert nnx_plan.shard(loaded) is loaded
    jp.testing.assert_sharding(loaded, nnx_plan)
    np.testing.assert_allclose(float(step(loaded, x)), expected, rtol=1e-6)
    assert step.num_compilations == 1


@pytest.mark.parametrize("trainable", ["up", lambda path: path.startswith("up")], ids=["pattern", "function"])
def test_frozen_parameters_stay(trainable):
    """No gradient, no slot, no change; `wrt=plan.trainable` in the user's own loop."""
    plan = jp.plan(lambda: Net(rngs=nnx.Rngs(0)), programs.mesh(**FSDP_TP), strategies(), trainable=trainable)
    model = plan.init()
    opt = nnx.Optimizer(model, optax.adam(0.1), wrt=plan.trainable)
    before = programs.host(_tree.leaves(model))

    @plan.jit
    def step(model, opt, x):
        value, gradients = jp.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), accumulate=2)(model, x)
        opt.update(model, gradients)
        return value

    for _ in range(2):
        step(model, opt, batch(plan))
    after = programs.host(_tree.leaves(model))
    assert [path for path in before if not np.array_equal(before[path], after[path])] == ["up.bias", "up.kernel"]
    assert not any("down" in path for path in _tree.leaves(opt))
    assert step.num_compilations == 1


def test_what_a_step_returns_lies_somewhere_sensible(plan):
    """With its parameter, with the batch, or whole."""
    out = plan.jit(lambda params, x: {"up": 2 * params["up"], "rows": x @ jp.gather(params)["up"], "mean": x.mean(0)})(
        plan.init(), batch(plan)
    )
    assert [out[name].sharding.spec for name in ("up", "rows", "mean")] == [
        plan.records["up"].storage,
        jax.P("fsdp"),
        jax.P(),
    ]


def test_compiler_options_reach_the_compiler(plan):
    step = plan.jit(loss_through_plan, compiler_options={"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        step(plan.init(), batch(plan))


def test_the_users_name_is_on_the_program(plan):
    def my_step(params, x):
        """What it does."""
        return loss_through_plan(params, x)

    step = plan.jit(my_step)
    assert (step.__name__, step.__doc__) == ("my_step", "What it does.")
    assert "module @jit_my_step" in step.lower(plan.init(), batch(plan)).as_text()


def test_lower_needs_no_arrays(plan):
    step = plan.jit(loss_through_plan)
    x = jax.ShapeDtypeStruct((ROWS, D), jnp.float32, sharding=plan.batch_sharding)
    memory = step.lower(plan.abstract(), x).compile().memory_analysis()
    assert memory.argument_size_in_bytes == 2 * D * F * 4 // 8 + ROWS * D * 4 // 4


def loss_through_plan(params, x):
    return loss(jp.gather(params), x)


# ---- another compilation


def test_recompilation_names_the_leaf(plan, caplog):
    step = plan.jit(lambda params, data, flag: loss_through_plan(params, data["x"]), donate=False)
    step.__name__ = "train_step"
    params = plan.init()
    step(params, {"x": batch(plan)}, True)
    assert not caplog.records
    step(params, {"x": batch(plan, 8)}, True)
    assert caplog.messages == [
        "train_step is compiled again, now 2 times, because\ndata.x: float32[16, 64] before, float32[8, 64] now"
    ]
    caplog.clear()
    step(params, {"x": jax.device_put(batch(plan, 8), plan.sharding(jax.P()))}, True)
    assert caplog.messages[0].endswith("data.x: placed as P('fsdp',) before, as P() now")
    caplog.clear()
    step(params, {"x": batch(plan), "y": batch(plan)}, True)
    assert "data.y: new, float32[16, 64]" in caplog.messages[0]
    caplog.clear()
    step(params, {"x": batch(plan)}, True)
    assert not caplog.records  # compiled already
    assert step.num_compilations == 4


def test_a_setting_that_changes_is_named(plan, caplog):
    step = plan.jit(lambda params, x, how: getattr(jnp, how)(x @ jp.gather(params)["up"]))
    for how in ("mean", "sum"):
        step(plan.init(), batch(plan), how)
    assert caplog.messages[0].endswith("static arguments: ('mean',) before, ('sum',) now")


def test_a_structure_that_changes_is_named(nnx_plan, caplog):
    step = nnx_plan.jit(lambda model, x: jnp.mean(model(x)))
    model = nnx_plan.init()
    step(model, batch(nnx_plan))
    model.up.preferred_element_type = jnp.float32
    step(model, batch(nnx_plan))
    assert caplog.messages[0].endswith(
        "the structure of an argument changed: a module's settings, or a container's keys"
    )


@pytest.mark.parametrize("choice", ["warn", "error", "allow"])
def test_on_recompile(choice, plan, caplog):
    step = plan.jit(loss_through_plan, on_recompile=choice)
    step(plan.init(), batch(plan))
    if choice == "error":
        with pytest.raises(jp.StepError) as error:
            step(plan.init(), batch(plan, 8))
        assert "x: float32[16, 64] before, float32[8, 64] now" in str(error.value)
        assert str(error.value).endswith("or allow it: plan.jit(..., on_recompile='allow').")
        assert step.num_compilations == 1
    else:
        step(plan.init(), batch(plan, 8))
        assert len(caplog.records) == (choice == "warn")


def test_counters_do_not_compile_twice(plan):
    """A Python number, a numpy one and what comes back are one type each, step after step."""
    step = plan.jit(lambda params, count, scale: (count + 1, scale * 2))
    count, scale = 0, np.float32(1)
    for _ in range(3):
        count, scale = step(plan.init(), count, scale)
    assert (int(count), float(scale), step.num_compilations) == (3, 8.0, 1)


# ---- what is refused, each with what is allowed beside it


def test_rejects_parameters_that_are_not_read_through_the_plan(plan, caplog):
    """A loss differentiated by JAX alone would leave it to the compiler what is gathered."""
    step = plan.jit(jax.value_and_grad(loss))
    with pytest.raises(jp.StepError) as error:
        step(plan.init(), batch(plan))
    assert str(error.value) == (
        "loss: none of the 2 sharded parameters is read through the plan, so the compiler may gather activations "
        "instead of weights. Differentiate the loss with jp.value_and_grad(loss) in place of jax.value_and_grad(loss), "
        "or read parameters by jp.gather(params)."
    )
    plan.jit(jp.value_and_grad(loss))(plan.init(), batch(plan))
    assert not caplog.records
    half = plan.jit(lambda params, x: x @ jp.gather(params)["up"] @ params["down"])
    half(plan.init(), batch(plan))
    (message,) = caplog.messages
    assert message == (
        "<lambda>: 1 of 2 sharded parameters are used without being read through the plan: down. Read them by "
        "jp.gather, or as variables of the model."
    )


def test_allows_arithmetic_on_parameters(plan, caplog):
    """An average of parameters, a decay, a norm: element by element, each device on its own piece."""

    @plan.jit
    def average(average, params):
        norm = optax.tree.norm(params)
        return jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p / norm, average, params)

    out = average(plan.init(), plan.init())
    jp.testing.assert_sharding(out, plan)
    gathers = [each for each in jp.testing.collectives(average, plan.init(), plan.init()) if each.kind == "all-gather"]
    assert not gathers
    assert not caplog.records


def test_a_helper_that_the_user_jitted_is_seen_by_every_step(plan):
    """JAX keeps its trace for the second step; what it reads counts there too."""
    helper = jax.jit(loss_through_plan)
    for _ in range(2):
        plan.jit(lambda params, x: 2 * helper(params, x))(plan.init(), batch(plan))


def test_a_batch_of_indices_is_no_parameter_of_its_name_and_shape():
    """Positions of 64 rows of 64 tokens, beside 64 learned positions of 64 features that lie over `fsdp` alone."""
    mesh = programs.mesh(data=2, fsdp=4)
    plan = jp.plan(lambda: {"positions": jnp.ones((D, D)), "up": jnp.ones((D, F))}, mesh, [jp.DP(), jp.FSDP()])
    seen = {}

    @plan.jit
    def step(params, batch):
        jax.debug.inspect_array_sharding(batch["positions"], callback=lambda each: seen.setdefault("spec", each.spec))
        params = jp.gather(params)
        return jnp.sum(params["positions"] @ params["up"]), jnp.max(batch["positions"])

    step(plan.init(), plan.batch({"positions": np.zeros((D, D), np.int32)}))
    assert seen["spec"] == P(("data", "fsdp"))


def test_rejects_a_batch_that_is_not_split(plan):
    step = plan.jit(loss_through_plan)
    x = np.ones((ROWS, D), np.float32)
    with pytest.raises(jp.StepError) as error:
        step(plan.init(), x)
    assert str(error.value) == (
        "x: an array of shape (16, 64) that is not on the plan's mesh would be copied whole to all 8 devices. Split "
        "the batch with plan.batch(...) before the step, or replicate on purpose with jax.device_put(x, "
        "plan.sharding(P()))."
    )
    step(plan.init(), jax.device_put(x, plan.sharding(jax.P())))


def test_rejects_a_model_of_another_plan(nnx_plan):
    other = nnx.Linear(D, 3, rngs=nnx.Rngs(0))
    with pytest.raises(jp.ShardingError) as error:
        nnx_plan.jit(lambda model, other, x: jnp.mean(other(model(x))))(nnx_plan.init(), other, batch(nnx_plan))
    assert str(error.value).startswith("the plan has no parameter for\nother.bias (3,)\nother.kernel (64, 3)\n")
    assert "Plan all models of a step together" in str(error.value)


def test_rejects_a_step_that_makes_variables(nnx_plan):
    def step(model, x):
        model.cache = nnx.Variable(jnp.mean(x))
        return jnp.mean(model(x))

    with pytest.raises(jp.StepError, match="the step adds, removes or renames variables"):
        nnx_plan.jit(step)(nnx_plan.init(), batch(nnx_plan))
    model = nnx_plan.init()
    with pytest.raises(jp.StepError, match=r"call model\.train\(\) or model\.eval\(\) outside of it"):
        nnx_plan.jit(lambda model: model.set_attributes(promote_dtype=None))(model)
    assert nnx_plan.jit(lambda model, x: jnp.mean(model(x)))(model, batch(nnx_plan)).shape == ()  # it is as it was


def test_rejects_hardware_that_is_not_here():
    plan = jp.plan(make_params, jp.mesh("v5e:2x4", fsdp=4, tensor=2), strategies())
    step = plan.jit(loss_through_plan)
    with pytest.raises(jp.StepError) as error:
        step(plan.abstract(), jax.ShapeDtypeStruct((ROWS, D), jnp.float32))
    assert "can be looked at but not run" in str(error.value)
    assert "jp.simulate(n)" in str(error.value)


def test_rejects_a_sequence_that_nobody_names():
    """TP(sequence=True) needs a model that says which dim is its sequence; a step that runs no model does not."""
    tensor = jp.TP(column=["*up"], row=["*down"], sequence=True)
    plan = jp.plan(lambda: Net(rngs=nnx.Rngs(0)), programs.mesh(**FSDP_TP), [jp.FSDP(), tensor])
    model, x = plan.init(), plan.batch(np.ones((4, 8, D), np.float32))
    with pytest.raises(jp.StepError) as error:
        plan.jit(lambda model, x: jnp.mean(model(x)))(model, x)
    assert str(error.value) == (
        "<lambda>: TP splits the sequence dim of activations (sequence=True), but nothing in this step says which dim "
        'that is. Say it in the model, jp.constrain(x, "batch", "seq", "embed"), or stack its blocks, '
        'FSDP(blocks="blocks.*") or jp.Stack; or leave sequence out.'
    )
    plan.jit(lambda model, x: jnp.mean(jp.constrain(model(x), "batch", "seq", "embed"))).lower(model, x)
    plan.jit(lambda model: jnp.mean(model.up.bias[...])).lower(model)


def test_errors_of_a_step_are_the_users_own(nnx_plan):
    """What the user's code raises comes out unchanged, and the model is as it was."""

    def step(model, x):
        raise KeyError("mine")

    model = nnx_plan.init()
    with pytest.raises(KeyError, match="mine"):
        nnx_plan.jit(step)(model, batch(nnx_plan))
    assert type(model.up.kernel) is nnx.Param
    assert logging.getLogger("jaxpar").level == logging.NOTSET
