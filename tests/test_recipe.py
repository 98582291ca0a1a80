"""`Recipe` and `Program`, written on the public parts of a loop: clipping, evaluation, precision, errors."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _tree
from tests import _programs as programs

D, F, ROWS = 64, 128, 16
MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
STRATEGIES = [jp.DP(), jp.FSDP(), jp.TP(column=["*up"], row=["*down"])]


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.tanh(self.up(x)))


class NoisyNet(Net):
    """With dropout, and statistics of what it has seen."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.dropout(self.norm(x)))


def loss(model, batch):
    each = jnp.mean((model(batch["x"]) - 1) ** 2, axis=-1)
    return (each * batch["weight"].astype(each.dtype)).sum(), batch["weight"].sum()


def batch(rows=ROWS):
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, D)).astype(np.float32)
    return {"x": x, "weight": random.integers(0, 3, rows).astype(np.float32)}


def make(**changes):
    recipe = jp.Recipe(
        model=lambda: Net(rngs=nnx.Rngs(0)),
        loss=loss,
        optimizer=optax.sgd(0.1, momentum=0.9),
        strategies=STRATEGIES,
        batch=batch(),
    )
    return dataclasses.replace(recipe, **changes)


def run(recipe, axes, steps=2):
    program = recipe.on(programs.mesh(**axes))
    state, metrics = program.init(), []
    for _ in range(steps):
        state, found = program.step(state, program.plan.batch(recipe.batch))
        metrics.append({name: float(value) for name, value in found.items()})
    return program, state, metrics


def by_hand(transform, steps=2):
    """Flax and Optax alone, on one device."""
    model = nnx.jit(lambda: Net(rngs=nnx.Rngs(0)))()
    opt = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt, batch):
        value, gradients = nnx.value_and_grad(lambda model, batch: programs.mean_of(loss(model, batch)))(model, batch)
        opt.update(model, gradients)
        return value, optax.tree.norm(gradients)

    return model, [step(model, opt, batch()) for _ in range(steps)]


def assert_same_model(ours, theirs):
    table = jp.testing.compare(_tree.leaves(ours), _tree.leaves(theirs), None, bound=2e-6)
    assert table.ok, str(table)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def clipped(request):
    return run(make(clip_norm=0.01, accumulate=2), request.param)


def test_clipping_is_by_the_global_norm_on_every_mesh(clipped):
    """A norm of pieces, or of one replica's gradients, would scale otherwise."""
    program, state, metrics = clipped
    model, expected = by_hand(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1, momentum=0.9)))
    assert expected[0][1] > 0.02  # so that it clips
    for ours, theirs in zip(metrics, expected, strict=True):
        np.testing.assert_allclose([ours["loss"], ours["grad_norm"]], theirs, rtol=2e-6)
        assert ours["weight"] == batch()["weight"].sum()
    assert_same_model(state["model"], model)
    assert program.train_step.num_compilations == 1
    jp.testing.assert_sharding((state["model"], state["optimizer"]), program.plan)


def test_a_program_says_its_batch_and_precision(clipped):
    program, *_ = clipped
    shards = program.plan.num_batch_shards
    text = str(program)
    assert f"global batch 16 = {16 // shards // 2} per device x 2 microbatches x {shards} batch shards" in text
    assert "= 16 per device x 1 microbatch x 1 batch shard\n" in str(make().on(programs.mesh(tensor=8)))
    assert "precision: parameters as given, compute as stored, reduce float32, output as computed" in text


def test_pytrees_with_frozen_leaves():
    """A state is a dict of parameters and Optax's state; what is frozen stays, what is aux joins the metrics."""

    def make_params():
        return {"up": jnp.ones((D, F)) / D, "down": jnp.ones((F, D)) / F, "seen": jnp.zeros((), jnp.int32)}

    def with_aux(params, batch):
        out = jax.nn.tanh(batch["x"] @ params["up"]) @ params["down"]
        return jnp.mean((out - 1) ** 2), {"size": {"out": jnp.mean(out**2)}}

    recipe = make(model=make_params, loss=with_aux, has_aux=True, trainable="up", accumulate=2)
    program, state, metrics = run(recipe, MESHES[2])
    assert metrics[1]["loss"] < metrics[0]["loss"]
    assert set(metrics[0]) == {"loss", "weight", "grad_norm", "size.out"}
    np.testing.assert_array_equal(state["model"]["down"], make_params()["down"])
    assert not any("down" in path for path in _tree.leaves(state["optimizer"]))
    assert program.train_step.num_compilations == 1


def test_equinox_model():
    """A pytree with functions among its leaves."""

    def mean(model, batch):
        return jnp.mean((jax.vmap(model)(batch["x"])) ** 2)

    model = lambda: eqx.nn.MLP(D, D, F, 1, key=jax.random.key(0))
    program, state, metrics = run(make(model=model, loss=mean, strategies=[jp.FSDP()]), {"fsdp": 8})
    assert metrics[1]["loss"] < metrics[0]["loss"]
    assert isinstance(state["model"], eqx.nn.MLP)
    assert float(program.eval_step(state, program.plan.batch(batch()))["loss"]) < metrics[1]["loss"]


# ---- evaluation


def test_evaluation_changes_nothing():
    """A model evaluates without dropout and with its running statistics, which stay; its weights are not copied."""
    recipe = make(model=lambda: NoisyNet(rngs=nnx.Rngs(0, dropout=1)))
    program, state, _ = run(recipe, {"fsdp": 8})
    before = dict(_tree.leaves(state["model"]))
    first, second = (program.eval_step(state, program.plan.batch(batch())) for _ in range(2))
    assert float(first["loss"]) == float(second["loss"])
    assert all(leaf is before[path] for path, leaf in _tree.leaves(state["model"]).items())

    model = nnx.jit(recipe.model)()
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(state["model"], nnx.Not(nnx.RngState))))
    model.eval()
    np.testing.assert_allclose(first["loss"], programs.mean_of(loss(model, batch())), rtol=2e-6)


def test_evaluation_of_an_uneven_last_batch():
    """Filled up with rows of weight 0: the mean over batches, each by its weight, is the true one."""
    program, state, _ = run(make(), {"data": 8}, steps=1)
    whole = batch(28)
    last = {name: np.concatenate([leaf[16:], np.zeros_like(leaf[:4])]) for name, leaf in whole.items()}
    parts = [{name: leaf[:16] for name, leaf in whole.items()}, last]
    found = [program.eval_step(state, program.plan.batch(part)) for part in parts]
    total = sum(float(each["loss"]) * float(each["weight"]) for each in found)
    expected, weight = loss(state["model"], whole)
    np.testing.assert_allclose(total / sum(float(each["weight"]) for each in found), expected / weight, rtol=2e-6)


def test_another_loss_to_evaluate_with():
    program, state, _ = run(make(eval_loss=lambda model, batch: jnp.mean(model(batch["x"]))), {"data": 8}, steps=1)
    found = program.eval_step(state, program.plan.batch(batch()))
    np.testing.assert_allclose(found["loss"], jnp.mean(state["model"](batch()["x"])), rtol=1e-5)
    assert float(found["weight"]) == ROWS


# ---- precision


def test_compute_in_bfloat16():
    """A parameter is cast on its shard and gathered as bfloat16; gradients, sums and slots stay float32.

    Read before the compiler: XLA:CPU has no bfloat16 and moves rounded float32.
    """
    recipe = make(loss=cast_loss, precision=jp.Precision(compute="bfloat16"))
    program, state, metrics = run(recipe, {"fsdp": 8})
    assert {leaf.dtype for leaf in _tree.leaves(state["model"]).values()} == {np.dtype("float32")}
    slots = [leaf for path, leaf in _tree.leaves(state["optimizer"]).items() if "trace" in path]
    assert {leaf.dtype for leaf in slots} == {np.dtype("float32")}
    lines = program.train_step.lower(state["model"], state["optimizer"], program.plan.batch(batch())).as_text()
    kernel = (
        r"stablehlo.convert .*<64x128xf32>\) -> tensor<64x128xbf16>\n.*\{\}, \{.fsdp.\}.*bf16>\n.*\[\{\}, \{\}\].*bf16>"
    )
    assert re.search(kernel, lines)
    assert "tensor<64x128xbf16>) -> tensor<64x128xf32>" in lines  # its gradient
    exact = run(make(), {"fsdp": 8})[2]
    np.testing.assert_allclose(metrics[0]["loss"], exact[0]["loss"], rtol=1e-2)
    assert metrics[0]["loss"] != exact[0]["loss"]


def cast_loss(model, batch):
    """As `Precision` asks of a loss: its inputs in the dtype in which the model computes."""
    return loss(model, {**batch, "x": batch["x"].astype(jnp.bfloat16)})


def test_every_dtype_of_a_policy():
    """Stored, computed with, summed in, and given back."""
    precision = jp.Precision(param="bfloat16", compute="float32", reduce="bfloat16", output="float16")
    program = make(precision=precision).on(programs.mesh(data=8))
    state, metrics = program.step(program.init(), program.plan.batch(batch()))
    assert {leaf.dtype for leaf in _tree.leaves(state["model"]).values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype("float16")}
    found = program.eval_step(state, program.plan.batch(batch()))
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float16")}
    lowered = program.train_step.lower(state["model"], state["optimizer"], program.plan.batch(batch())).as_text()
    assert "tensor<64x128xbf16>) -> tensor<64x128xbf16>" in lowered.partition("all_reduce")[2]


def test_precision_by_hardware():
    """bfloat16 compute on accelerators, nothing on a CPU, unless said otherwise."""
    tpu = jp.mesh("v5e:2x4", data=2, fsdp=2, tensor=2)
    assert make().on(tpu).plan.precision == jp.Precision(compute="bfloat16")
    assert make().on(programs.mesh(data=8)).plan.precision == jp.Precision()
    assert make(precision=jp.Precision()).on(tpu).plan.precision == jp.Precision()


@pytest.mark.parametrize("field", ["param", "compute", "reduce", "output"])
def test_rejects_what_is_no_float(field):
    for wrong in ("int8", "float23"):
        with pytest.raises(jp.ShardingError) as error:
            jp.Precision(**{field: wrong})
        assert str(error.value) == (
            f"Precision: {field}={wrong!r} is not a floating dtype. Use 'float32', 'bfloat16' or 'float16'."
        )


# ---- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "Recipe: accumulate is 0. Use 1 for none, or the number of microbatches."),
        ({"clip_norm": -1.0}, "Recipe: clip_norm is -1.0. Use a positive norm, or None for no clipping."),
        (
            {"accumulate": 5},
            "Recipe: a batch of 16 does not divide into accumulate=5 microbatches. Use a batch of 15 or 20.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_rejects_settings(changes, message):
    with pytest.raises(jp.StepError) as error:
        make(**changes)
    assert str(error.value) == message


def test_rejects_a_batch_that_the_mesh_does_not_divide():
    recipe = make(accumulate=4)
    with pytest.raises(jp.StepError) as error:
        recipe.on(programs.mesh(data=8))
    assert str(error.value) == (
        "the global batch of 16 is not per-device x accumulate x batch shards: 4 x 8 = 32 does not divide it. Use a "
        "batch of 32, or another accumulate or mesh."
    )
    assert recipe.on(programs.mesh(fsdp=4, tensor=2)).plan.num_batch_shards == 4


# ---- a smaller recipe


def deep(**strategy):
    """Six blocks, with dropout: whether scanned by a stack of the model's own, or by FSDP."""

    def make_block(rngs):
        return nnx.Linear(D, D, rngs=rngs)

    def make_model():
        rngs = nnx.Rngs(0)
        blocks = nnx.List([make_block(rngs) for _ in range(6)]) if strategy else jp.Stack(make_block, 6, rngs=rngs)
        return nnx.Dict(blocks=blocks, head=nnx.Linear(D, D, rngs=rngs))

    return make(model=make_model, strategies=[jp.FSDP(**strategy)])


@pytest.mark.parametrize("strategy", [{}, {"blocks": "blocks.*"}], ids=["stack", "list"])
def test_fewer_layers_are_made(strategy):
    """Those left out are neither planned nor made: the compiler holds less from the start. All else is as it was."""
    whole, few = (recipe.on(programs.mesh(fsdp=8)) for recipe in (deep(**strategy), deep(**strategy).reduced(layers=2)))
    stacked = {path: record.shape for path, record in few.plan.records.items()}
    assert stacked["blocks.each.kernel"] == (2, D, D)
    for path, record in whole.plan.records.items():
        other = few.plan.records[path]
        assert dataclasses.replace(other, shape=record.shape, reasons=record.reasons) == record
    sizes = [
        jax.jit(each.plan.birth.make).lower().compile().memory_analysis().temp_size_in_bytes for each in (whole, few)
    ]
    assert sizes[1] < sizes[0] / 2
    assert few.init()["model"].blocks.each.kernel.shape == (2, D, D)


def test_fewer_layers_of_a_jitted_factory():
    """JAX keeps the trace of the whole model, and of the smaller one too."""
    make_model = nnx.jit(lambda: jp.Stack(lambda rngs: nnx.Linear(D, D, rngs=rngs), 6, rngs=nnx.Rngs(0)))
    whole = make(model=make_model, strategies=[jp.FSDP()])
    for recipe, layers in ((whole, 6), (whole.reduced(layers=2), 2), (whole, 6)):
        assert recipe.on(programs.mesh(fsdp=8)).plan.records["each.kernel"].shape == (layers, D, D)


def test_a_smaller_batch():
    shapes = {"x": jax.ShapeDtypeStruct((ROWS, D), jnp.float32), "rate": jnp.float32(3)}
    small = make(batch=shapes).reduced(batch_size=8)
    assert small.batch == {"x": jax.ShapeDtypeStruct((8, D), jnp.float32), "rate": jnp.float32(3)}
    arrays = make().reduced(batch_size=8)
    np.testing.assert_array_equal(arrays.batch["x"], batch()["x"][:8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "recipe.reduced: say what to reduce, layers= or batch_size=."),
        ({"layers": 0}, "recipe.reduced: layers is 0. Keep at least one."),
        (
            {"batch_size": 16},
            (
                "recipe.reduced: batch_size is 16, and the recipe's batch has 16 rows. Give fewer than that, and at "
                "least one, or leave it out."
            ),
        ),
        (
            {"batch_size": 3},
            "Recipe: a batch of 3 does not divide into accumulate=2 microbatches. Use a batch of 2 or 4.",
        ),
        (
            {"layers": 6},
            "recipe.reduced(layers=6): the model has 6 already. Leave layers out, or give fewer.",
        ),
    ],
    ids=str,
)
def test_rejects_a_reduction_of_nothing(settings, message):
    with pytest.raises(jp.StepError) as error:
        dataclasses.replace(deep(), accumulate=2).reduced(**settings).on(programs.mesh(fsdp=8))
    assert str(error.value) == message


def test_rejects_layers_of_a_model_that_has_no_equal_ones():
    with pytest.raises(jp.StepError) as error:
        make().reduced(layers=2).on(programs.mesh(data=8))
    assert str(error.value) == (
        "recipe.reduced(layers=2): nothing says which layers of this model are equal: it has no jp.Stack, and no "
        "FSDP(blocks=...) names a list of blocks. Build a smaller one: dataclasses.replace(recipe, model=lambda: "
        "Model(...))."
    )
