"""`jp.verify`: what is right passes, leaf by leaf; what is wrong is caught, and named."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxpar as jp
from jaxpar import _mesh

X = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def loss_fn(model, x):
    return jnp.mean((model(x) - x) ** 2)


def planned(*strategies, **axes):
    return jp.plan(lambda: Model(nnx.Rngs(0)), jp.mesh(**axes), strategies)


def stepped(plan, transform, loss=None):
    model = plan.init()
    opt = nnx.Optimizer(model, transform, wrt=nnx.Param)
    loss = loss or jp.value_and_grad(loss_fn, accumulate=2)

    @plan.jit
    def train_step(model, opt, x):
        value, grads = loss(model, x)
        opt.update(model, grads)
        return value

    return train_step, model, opt


TP = jp.TP(column=["up"], row=["down"])


def paths(found, group):
    return {row.path for row in found.rows if row.group == group}


def pmean(grads, axes):
    """A reduction that forgets that sums are wanted."""
    return {path: jax.lax.pmean(gradient, axes) for path, gradient in grads.items()}


def test_a_right_step_passes_and_nothing_changes():
    plan = planned(jp.DP(), jp.FSDP(), TP, data=2, fsdp=2, tensor=2)
    train_step, model, opt = stepped(plan, optax.adamw(1e-3))
    before = np.asarray(model.up.kernel[...])

    found = jp.verify(train_step, model, opt, plan.batch(X))

    assert found.ok
    groups = {row.group for row in found.rows}
    assert groups == {"outputs", "gradients", "updates"}
    params = {f"{layer}.{leaf}" for layer in ("up", "down") for leaf in ("kernel", "bias")}
    assert paths(found, "gradients") == params
    assert {f"model.{path}" for path in params} < paths(found, "updates")
    assert {f"opt.opt_state.0.nu.{path}" for path in params} < paths(found, "updates")
    np.testing.assert_array_equal(before, model.up.kernel[...])
    assert "float64 on one device" in str(found)


def test_a_forgotten_sum_is_caught_and_named():
    plan = planned(jp.DP(reduce=pmean), data=8)
    train_step, model, opt = stepped(plan, optax.adamw(1e-3))

    found = jp.verify(train_step, model, opt, plan.batch(X))

    assert not found.ok
    assert found.worst.group == "gradients"
    assert {row.group for row in found.rows if not row.ok} == {"gradients"}  # the optimiser itself is right
    with pytest.raises(jp.ShardingError, match="differs from one device"):
        found.check()


def test_a_bfloat16_plan_is_compared_in_float32():
    plan = jp.plan(lambda: Model(nnx.Rngs(0)), jp.mesh(fsdp=8), [jp.FSDP()], precision=jp.Precision(compute="bfloat16"))
    train_step, model, opt = stepped(plan, optax.sgd(1e-2), nnx.value_and_grad(loss_fn))
    found = jp.verify(train_step, model, opt, plan.batch(X))
    assert found.ok
    assert max(row.allowed for row in found.rows if row.group == "gradients") < 1e-4


def test_a_train_state():
    plan = jp.plan(lambda: {"params": {"w": jnp.ones((64, 64)) / 64}}, jp.mesh(fsdp=4, tensor=2), [
        jp.FSDP(), jp.TP(column=["*.w"])])  # fmt: skip
    params = plan.init()["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))

    @plan.jit
    def train_step(state, x):
        loss, grads = jp.value_and_grad(lambda params, x: jnp.mean((x @ params["w"] - x) ** 2))(state.params, x)
        return state.apply_gradients(grads=grads), loss

    found = jp.verify(train_step, state, plan.batch(X))
    assert found.ok
    assert {row.group for row in found.rows} == {"outputs", "gradients", "updates"}


def recipe(**changes):
    fields = {
        "model": lambda: Model(nnx.Rngs(0)),
        "loss": loss_fn,
        "optimizer": optax.adamw(1e-3),
        "strategies": [jp.ZeRO(1)],
        "batch": jax.ShapeDtypeStruct((16, 64), jnp.float32),
        "clip_norm": 1.0,
    }
    return jp.Recipe(**{**fields, **changes})


def test_a_program_with_values_of_its_own():
    assert jp.verify(recipe().on(jp.mesh(data=8))).ok


def test_a_pytree_program():
    loss = lambda params, x: jnp.mean((x @ params["w"] - x) ** 2)
    program = recipe(model=lambda: {"w": jnp.ones((64, 64)) / 64}, loss=loss).on(jp.mesh(data=8))
    assert jp.verify(program, program.plan.batch(X)).ok


def test_an_equinox_program():
    """Functions among its leaves; one parameter is frozen."""
    program = recipe(
        model=lambda: eqx.nn.MLP(64, 64, 64, 1, key=jax.random.key(0)),
        loss=lambda model, x: jnp.mean((jax.vmap(model)(x) - x) ** 2),
        strategies=[jp.FSDP()],
        trainable="*.weight",
    ).on(jp.mesh(fsdp=8))
    found = jp.verify(program)
    assert found.ok
    assert paths(found, "gradients") == {"layers.0.weight", "layers.1.weight"}


def hidden(reduce=None):
    """A loop of plain pytrees, as the README of Optax has it."""
    make = lambda: {"w": jnp.sin(jnp.arange(64.0 * 64)).reshape(64, 64) / 8, "b": jnp.zeros(64)}
    plan = jp.plan(make, jp.mesh(data=4, fsdp=2), [jp.DP(reduce=reduce), jp.FSDP()])
    transform = optax.adamw(1e-3)

    @plan.jit
    def train_step(params, opt_state, x):
        loss, grads = jp.value_and_grad(lambda p, x: jnp.mean((jnp.sin(x @ p["w"] + p["b"][None]) - x) ** 2))(params, x)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = plan.init()
    return train_step, params, plan.make(transform.init, params), plan.batch(X)


def test_a_hidden_optimiser_is_said_and_its_updates_are_compared_in_float64():
    """In float32 a first step of Adam differs by percents where a gradient is near zero, on any two devices."""
    found = jp.verify(*hidden())
    assert found.ok
    assert paths(found, "updates") >= {"0.w", "0.b", "1.0.mu.w", "1.0.nu.b"}
    assert paths(found, "gradients") == set()
    (note,) = found.notes
    assert note.startswith("its optimiser is not among the step's arguments")
    assert "compared in float64 on both sides" in str(found)


def test_a_mistake_before_a_hidden_optimiser_is_caught():
    found = jp.verify(*hidden(reduce=pmean))
    assert {row.path for row in found.rows if not row.ok} >= {"1.0.mu.w", "1.0.nu.w"}


def test_a_hidden_optimiser_beside_a_cast():
    """Without float64 the float32 numbers stand, and the table says what they are worth."""
    plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(data=8), [jp.DP()])

    @plan.jit
    def train_step(params, x):
        loss = lambda params, x: jnp.mean((x @ params["w"]).astype(jnp.float32) ** 2)
        grads = jp.value_and_grad(loss)(params, x)[1]
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    found = jp.verify(train_step, plan.init(), plan.batch(X))
    assert found.ok
    assert "the reference casts to float32 inside: a first step of Adam amplifies rounding" in found.notes[0]


def test_optimisers_in_a_container():
    plan = planned(jp.FSDP(), fsdp=8)
    _, model, opt = stepped(plan, optax.adamw(1e-3))

    @plan.jit
    def train_step(state, x):
        value, grads = nnx.value_and_grad(loss_fn)(state["model"], x)
        state["opt"].update(state["model"], grads)
        return {"loss": value, "step": state["count"] + 1}

    found = jp.verify(train_step, {"model": model, "opt": opt, "count": 3}, plan.batch(X))
    assert found.ok
    assert paths(found, "gradients") == {"up.kernel", "up.bias", "down.kernel", "down.bias"}
    assert paths(found, "outputs") == {"loss", "step"}
    assert {"state.opt.step", "state.opt.opt_state.0.mu.up.kernel"} <= paths(found, "updates")


def test_two_optimisers():
    plan = jp.plan(lambda: (Model(nnx.Rngs(0)), nnx.Linear(64, 64, rngs=nnx.Rngs(1))), jp.mesh(data=8), [jp.DP()])
    model, critic = plan.init()
    opts = [nnx.Optimizer(each, optax.adam(1e-3), wrt=nnx.Param) for each in (model, critic)]

    @plan.jit
    def train_step(model, critic, opt, critic_opt, x):
        grads = nnx.grad(lambda model: jnp.mean(critic(model(x)) ** 2))(model)
        opt.update(model, grads)
        grads = nnx.grad(lambda critic: jnp.mean((critic(x) - 1) ** 2))(critic)
        critic_opt.update(critic, grads)

    found = jp.verify(train_step, model, critic, *opts, plan.batch(X))
    assert found.ok
    assert paths(found, "gradients") >= {"2.up.kernel", "3.kernel"}
    assert paths(found, "outputs") == set()


def test_an_optimiser_that_takes_more_than_gradients():
    plan = planned(jp.DP(), data=8)
    model = plan.init()
    opt = nnx.Optimizer(model, optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau()), wrt=nnx.Param)

    @plan.jit
    def train_step(model, opt, x):
        value, grads = nnx.value_and_grad(loss_fn)(model, x)
        opt.update(model, grads, value=value)
        return value

    found = jp.verify(train_step, model, opt, plan.batch(X))
    assert found.ok
    assert paths(found, "gradients")
    assert paths(found, "updates") == {"opt.step"}
    assert found.notes[0].startswith("updates are not compared, since the optimiser takes more than gradients")


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)


def test_state_beside_parameters_is_an_update():
    plan = jp.plan(lambda: Normed(nnx.Rngs(0)), jp.mesh(data=8), [jp.DP()])
    model = plan.init()
    opt = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @plan.jit
    def train_step(model, opt, x):
        value, grads = nnx.value_and_grad(lambda model, x: jnp.mean((model.norm(model.up(x)) - x) ** 2))(model, x)
        opt.update(model, grads)
        return value

    found = jp.verify(train_step, model, opt, plan.batch(X))
    assert found.ok
    assert {"model.norm.mean", "model.norm.var"} <= paths(found, "updates")


def test_a_reduction_in_bfloat16_is_set_aside():
    plan = planned(jp.DP(reduce_dtype="bfloat16"), data=8)
    train_step, model, opt = stepped(plan, optax.sgd(1e-2))
    found = jp.verify(train_step, model, opt, plan.batch(X))
    assert found.ok
    assert found.reference == "float64 on one device"


def test_tokens_come_from_the_whole_vocabulary():
    """Of a split vocabulary, ids of 0 and 1 would use the first device's part alone."""
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), batch["tokens"])
        return jnp.mean(params["embed"][batch["tokens"]] ** 2)

    ids = {"tokens": jax.ShapeDtypeStruct((16, 64), jnp.int32)}
    program = recipe(model=lambda: {"embed": jnp.ones((96, 64))}, loss=loss, batch=ids).on(jp.mesh(data=8))
    assert jp.verify(program).ok
    assert max(ids.max() for ids in seen) == 95


def test_nan_everywhere_proves_nothing():
    program = recipe(loss=lambda model, x: loss_fn(model, x) * jnp.nan).on(jp.mesh(data=8))
    found = jp.verify(program)
    assert not found.ok
    assert "NaN everywhere" in found.worst.note


def test_a_recipe_has_no_mesh():
    with pytest.raises(jp.StepError, match=r"a recipe has no mesh: jp.verify\(recipe.on"):
        jp.verify(recipe())


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.blocks = jp.Stack(lambda rngs: nnx.Linear(64, 64, rngs=rngs), 40, rngs=rngs)

    def __call__(self, x):
        return self.blocks(x)


class Listed(nnx.Module):
    """The same as a list, which `FSDP(blocks=...)` stacks."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(40)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def memory(monkeypatch):
    """Sets how much a host of eight devices has."""

    def host_of(num_bytes):
        hardware = _mesh.hardware_of(jp.mesh(data=8))
        chip = dataclasses.replace(hardware.chip, memory=num_bytes // 8)
        monkeypatch.setattr(_mesh, "hardware_of", lambda mesh: dataclasses.replace(hardware, chip=chip))

    return host_of


BIG = jax.ShapeDtypeStruct((4096, 64), jnp.float32)


@pytest.mark.parametrize(
    ("changes", "num_bytes", "needs", "choice"),
    [
        # A parameter is held with Adam's two slots, six times over: 40 layers of 16,640 bytes are 11.4 MiB.
        ({"model": lambda: Deep(nnx.Rngs(0))}, 6 << 20, "at least 11.4 MiB", {"layers": 2, "batch_size": 8}),
        (
            {"model": lambda: Listed(nnx.Rngs(0)), "strategies": [jp.FSDP(blocks="blocks.*")]},
            6 << 20,
            "at least 11.4 MiB",
            {"layers": 2, "batch_size": 8},
        ),
        ({"batch": BIG}, 12 << 20, "about ", {"batch_size": 8}),  # its activations are too many
        (
            {"model": lambda: Deep(nnx.Rngs(0)), "batch": BIG, "accumulate": 4},
            14 << 20,
            "at least 17.4 MiB",
            {"batch_size": 32},
        ),
    ],
    ids=["stack", "list", "batch", "accumulate"],
)
def test_what_does_not_fit_is_refused_with_a_call_that_does(changes, num_bytes, needs, choice, memory):
    whole = recipe(**changes)
    axis = "fsdp" if isinstance(whole.strategies[0], jp.FSDP) else "data"
    memory(num_bytes)
    with pytest.raises(jp.ShardingError) as error:
        jp.verify(whole.on(jp.mesh(**{axis: 8})))
    assert f"verifying needs {needs}" in str(error.value)
    said = ", ".join(f"{name}={value}" for name, value in choice.items())
    assert f"jp.verify(recipe.reduced({said}).on(mesh)), or jaxpar verify ... --" in str(error.value)
    found = jp.verify(whole.reduced(**choice).on(jp.mesh(**{axis: 8})))
    assert found.ok
    assert len(paths(found, "gradients")) >= 2


def test_what_cannot_be_made_small_enough_is_said(memory):
    memory(1000)
    with pytest.raises(jp.ShardingError) as error:
        jp.verify(recipe(model=lambda: Deep(nnx.Rngs(0))).on(jp.mesh(data=8)))
    assert "which has 1000 B. Even recipe.reduced(layers=1, batch_size=8) needs " in str(error.value)
    with pytest.raises(jp.ShardingError) as error:
        jp.verify(recipe().on(jp.mesh(data=8)))
    assert str(error.value).endswith(
        "dataclasses.replace(recipe, model=...). It has no jp.Stack, and no FSDP(blocks=...), whose layers could be "
        "fewer."
    )


def test_a_step_that_does_not_fit_is_refused(memory):
    plan = planned(jp.DP(), data=8)
    train_step, model, opt = stepped(plan, optax.adamw(1e-3))
    memory(1000)
    with pytest.raises(jp.ShardingError, match=r"at least .* MiB on one device .* which has 1000 B\. Verify a smaller"):
        jp.verify(train_step, model, opt, plan.batch(X))


def test_only_steps_can_be_verified():
    with pytest.raises(jp.StepError, match=r"not a function. Write plan.jit\(step\)"):
        jp.verify(lambda x: x, 1)
