"""Where findings are: the line of the code and the path in the model, of NNX and Linen, scanned and written out.

Each fault is in one program of each form, and its like that has none is beside it; programs are shared, as compiling
them is all that these tests cost.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hlo
from jaxpar.explain._explain import _compiled_here
from jaxpar.explain._findings import find
from jaxpar.explain._subject import subject
from tests.explain._described import array, findings, kinds, mesh, placed, timeline_of
from tests.explain._layers import FORMS, LAYERS, WIDE, D, F, Form, is_line_of, name_of

ROWS, ROUNDS, TINY = 16, 4, 20

forms = pytest.mark.parametrize("form", FORMS, ids=name_of)


def of(form, **more):
    """The same form of another model."""
    return Form(frontend=form.frontend, is_scanned=form.is_scanned, **more)


def one(found, kind):
    (finding,) = [each for each in found if each.kind == kind]
    return finding


def path_of(finding):
    return finding.place.partition(" at ")[0]


@ft.cache
def compiled_step(step, form, on, strategies, num_batches):
    """`step(plan, form)` of the form's model under a plan, and the plan."""
    plan = jp.plan(form.make, mesh(**dict(on)), list(strategies), dims=form.dims)
    batch = [plan.batch(np.ones((ROWS, D), np.float32)) for _ in range(num_batches)]
    function, args = step(plan, form)
    return _compiled_here(subject(function, (*args, batch), {}, None)), plan


def found_in(step, form, on, strategies, *, num_batches=1, seconds=0.0):
    """What is found in it, if each collective takes `seconds` of a step of 10 ms; if 0, bytes are what counts."""
    program, plan = compiled_step(step, form, on, strategies, num_batches)
    timeline = timeline_of(program, seconds, step=0.01) if seconds else None
    return find(_hlo.read(program.text), program, timeline=timeline, plan=plan)


# ---- what layers do


DATA_TENSOR = (("data", 4), ("tensor", 2))
PAIR = (jp.DP(), jp.TP(column=["*up"], row=["*down"]))


def laid(x, *spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(**dict(DATA_TENSOR)), P(*spec)))


def rematerialised(x):
    x = laid(jnp.sin(x), None, "tensor")
    return laid(jnp.cos(x), ("data", "tensor"))


def resharded(x):
    x = laid(jnp.sin(x), "data", "tensor")
    return laid(jnp.cos(x), "tensor", "data")


def by_device(function, x):
    """`function` of each device's part."""
    on, spec = mesh(**dict(DATA_TENSOR)), P("data", "tensor")
    return jax.shard_map(function, mesh=on, in_specs=spec, out_specs=spec, check_vma=False)(x)


def branching(x):
    def device(x):
        def move(x):
            return jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)])

        return jax.lax.cond(jax.lax.axis_index("data") == 0, move, lambda x: x, x)

    return by_device(device, x)


def tiny(x):
    def device(x):
        def body(total, _):
            return total + jax.lax.pmean(jnp.tanh(x * total[None]).sum(0), "data") / TINY, None

        return x + jax.lax.scan(body, jnp.ones(x.shape[1]), length=TINY)[0][None]

    return by_device(device, x)


def forward(plan, form):
    @plan.jit
    def step(model, batch):
        return form.run(model, batch[0])

    return step, (plan.init(),)


@forms
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("full-rematerialisation", rematerialised),
        ("reshard", resharded),
        ("permute-in-branch", branching),
        ("small-collectives", tiny),
    ],
)
def test_what_a_layer_does(form, kind, fault):
    """The line is of what does it, the path that of the layer; a layer that does nothing more has no finding."""
    seconds = 10e-6 if fault is tiny else 0.0
    found = found_in(forward, of(form, between=fault), DATA_TENSOR, PAIR, seconds=seconds)
    lines = (fault, form.layer) if kind == "full-rematerialisation" else (fault,)  # JAX 0.12: of what is gathered
    here = [each for each in found if each.kind == kind and any(is_line_of(each.place, where) for where in lines)]
    assert here, found
    assert {path_of(each) for each in here} <= form.paths()  # of layers written out, one speaks for a line

    assert kinds(found_in(forward, form, DATA_TENSOR, PAIR, seconds=seconds), above="none") == set()


# ---- gradients


DATA = (("data", 4),)


def squares(form, model, x):
    return (form.run(model, x) ** 2).mean()


def updated(plan, form, gradient, tx):
    """A step that updates a model with what `gradient(model, batch)` gives."""
    if form.frontend == "nnx":

        @plan.jit
        def step(model, optimizer, batch):
            optimizer.update(model, gradient(model, batch))

        model = plan.init()
        return step, (model, nnx.Optimizer(model, tx, wrt=nnx.Param))

    @plan.jit(donate_argnums=(0, 1))
    def step(params, opt, batch):
        updates, opt = tx.update(gradient(params, batch), opt)
        return optax.apply_updates(params, updates), opt

    params = plan.init()
    return step, (params, tx.init(params))


def accumulating(loss):
    """A step that adds up the gradients of its microbatches, and has them reduced in each round."""

    def step(params, batch):
        def body(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, total)

    return step


def accumulating_apart(loss, on):
    """The same with one reduction after the loop."""

    def step(params, batch):
        def each(params, batch):
            def body(total, x):
                return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

            params = jax.lax.pcast(params, "data", to="varying")
            total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)
            return jax.lax.pmean(total, "data")

        total = jax.shard_map(each, mesh=on, in_specs=(P(), P(None, "data")), out_specs=P())(params, batch)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, total)

    return step


@forms
def test_reduction_in_an_accumulation_loop(form):
    """It is found, with the line of the layer and the parameter; reduced after the loop there is nothing to find."""
    on = mesh(**dict(DATA))
    params, run = form.pure()
    loss = lambda params, x: (run(params, x) ** 2).mean()
    arguments = {"params": placed(on, params), "batch": array(on, (ROUNDS, ROWS, D), None, "data")}

    finding = one(findings(accumulating(loss), on, **arguments), "reduction-in-loop")

    total = LAYERS * 2 * D * F * 4
    assert finding.severity == "warning"
    assert f"in each of {ROUNDS} rounds" in finding.reason
    assert f"{ROUNDS * total / 1024} KiB a step" in finding.reason
    assert path_of(finding) in form.paths("up.kernel") | form.paths("down.kernel")
    assert is_line_of(finding.place, form.layer)
    assert f"accumulate={ROUNDS}" in finding.remedy

    assert kinds(findings(accumulating_apart(loss, on), on, **arguments)) == set()


def written_out(plan, form):
    """Microbatches one after the other, without a loop; their gradients are added up."""
    grad = nnx.grad if form.frontend == "nnx" else jax.grad

    def gradient(model, batch):
        found = [grad(ft.partial(squares, form))(model, x) for x in batch]
        return ft.reduce(ft.partial(jax.tree.map, jnp.add), found)

    return updated(plan, form, gradient, optax.sgd(0.1))


def accumulated(plan, form):
    """The same by what reduces once."""
    loss = jp.value_and_grad(lambda model, x: squares(form, model, x), accumulate=2)
    return updated(plan, form, lambda model, batch: loss(model, batch[0])[1], optax.sgd(0.1))


@forms
def test_gradients_that_are_reduced_and_added_up_without_a_loop(form):
    found = found_in(written_out, form, DATA, (jp.DP(),), num_batches=3)
    finding = one(found, "reduction-in-loop")
    matrices = 2 * (1 if form.is_scanned else LAYERS)
    assert finding.reason.startswith(f"{matrices} gradients are summed over 'data' 3 times a step")
    assert path_of(finding) in form.paths("up.kernel") | form.paths("down.kernel")
    assert is_line_of(finding.place, form.layer)
    assert "accumulate=3" in finding.remedy

    assert kinds(found_in(accumulated, form, DATA, (jp.DP(),)), above="none") == set()


@forms
def test_a_layer_that_runs_several_times_has_its_gradient_reduced_as_often(form):
    """In the loop over layers, or as often as it is written out."""
    found = found_in(written_out, of(form, is_shared=True), DATA, (jp.DP(),))
    finding = one(found, "reduction-in-loop")
    assert f"in each of {LAYERS} rounds" in finding.reason if form.is_scanned else f"{LAYERS} times a step"
    assert path_of(finding) in {"layer.up.kernel", "layer.down.kernel"}
    assert is_line_of(finding.place, form.layer)

    assert kinds(found_in(written_out, form, DATA, (jp.DP(),)), above="none") == set()


def whole_state(inner):
    """An optimiser that has its state whole while it updates."""
    everywhere = NamedSharding(mesh(**dict(DATA)), P())

    def whole(state):
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, whole(state), params)
        return updates, whole(state)

    return optax.GradientTransformation(inner.init, update)


def momentum(plan, form, wrap):
    loss = jp.value_and_grad(lambda model, x: squares(form, model, x))
    return updated(plan, form, lambda model, batch: loss(model, batch[0])[1], wrap(optax.sgd(0.1, momentum=0.9)))


gathers_state = ft.partial(momentum, wrap=whole_state)
keeps_state = ft.partial(momentum, wrap=lambda inner: inner)


@forms
def test_optimiser_state_that_is_gathered(form):
    found = [each for each in found_in(gathers_state, form, DATA, (jp.ZeRO(1),)) if each.kind == "gathered-whole"]
    assert found
    for finding in found:
        assert any(path_of(finding).endswith(path) for leaf in ("up", "down") for path in form.paths(f"{leaf}.kernel"))
        assert any(is_line_of(finding.place, where) for where in (whole_state, updated))  # JAX 0.12: where it is used
    assert kinds(found_in(keeps_state, form, DATA, (jp.ZeRO(1),)), above="none") == set()


# ---- parameters


@forms
def test_a_matrix_that_is_left_whole(form):
    """And multiplied alike on every device; the plan's own reason and a rule for it, that then is a plan's."""
    found = found_in(forward, of(form, is_wide=True), DATA_TENSOR, PAIR)
    whole = [each for each in found if each.kind == "replicated"]
    assert {each.place for each in whole} == form.paths("wide.kernel")
    for each in whole:
        assert each.bytes == D * WIDE * 4 * (LAYERS if form.is_scanned else 1) // 2
        assert 'jp.TP(vocab=["' in each.remedy
    finding = one(found, "repeated-compute")
    assert path_of(finding) in form.paths("wide")
    assert is_line_of(finding.place, form.layer)

    split = (jp.DP(), jp.TP(column=["*up", "*wide"], row=["*down"]))
    assert not {"replicated", "repeated-compute"} & kinds(
        found_in(forward, of(form, is_wide=True), DATA_TENSOR, split), above="none"
    )


def forgetful(function):
    """A step that keeps its parameters."""

    def step(params, batch):
        return function(params, batch)

    step.donates = False
    return step


@forms
def test_activations_that_are_gathered_for_weights_that_lie_split(form):
    """Without a plan. NNX opens no scopes there: the line is all there is."""
    on = mesh(fsdp=8)
    params, run = form.pure()

    def step(params, batch, *, read):
        params = jax.lax.with_sharding_constraint(params, NamedSharding(on, P())) if read else params
        return run(params, batch)

    def found(read):
        where = jax.tree.map(lambda leaf: array(on, leaf.shape, *(None,) * (leaf.ndim - 1), "fsdp"), params)
        batch = array(on, (ROWS, D), "fsdp")
        return findings(forgetful(ft.partial(step, read=read)), on, params=where, batch=batch)

    finding = one(found(False), "activation-gathered")
    assert is_line_of(finding.place, form.layer)
    if form.frontend == "linen":
        assert path_of(finding) in form.paths("up") | form.paths("down")
    assert "activation-gathered" not in kinds(found(True), above="none")


@forms
def test_an_axis_that_no_tensor_uses(form):
    """It has no place, and the remedy keeps the other axes. A plan refuses such a mesh, so there is none here."""
    params, run = form.pure()

    def found(*axes):
        on = mesh(data=2, fsdp=2, tensor=2)
        return findings(forgetful(run), on, params=placed(on, params), batch=array(on, (ROWS, D), axes))

    finding = one(found("data", "fsdp"), "unused-axis")
    assert "Axis 'tensor' of size 2 splits no argument" in finding.reason
    assert "jp.mesh(data=4, fsdp=2)" in finding.remedy
    assert kinds(found("data", "fsdp", "tensor"), above="none") == set()


@pytest.mark.libtpu
@forms
def test_a_windowed_einsum(form, tmp_path):
    """A plain `jax.jit` over a split matrix, which XLA:TPU cuts into too narrow windows."""
    on, form = jp.mesh("v5e:4x4", fsdp=16), of(form, scale=64)

    def split(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(on, spec))

    params, run = form.pure()
    params = jax.tree.map(lambda leaf: split(leaf.shape, P(*[None] * (leaf.ndim - 2), "fsdp")), params)
    x = split((2**15, form.scale * D), P("fsdp"))
    finding = one(jp.explain(jax.jit(run), params, x, cache=tmp_path).findings, "windowed-einsum")
    assert any(path_of(finding).endswith(path) for path in form.paths("up.kernel"))
    assert is_line_of(finding.place, form.layer)
