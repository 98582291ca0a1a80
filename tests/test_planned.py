"""`jp.gather`: what of a plain pytree is whole when, in numbers, bytes and collectives; and what a step says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from tests import _programs as programs

L, D, F, V, ROWS, T = 6, 64, 128, 96, 16, 8
MATRIX = D * F * 4
DIMS = [("blocks.*", ("layers", ...))]
TOKENS = np.random.default_rng(0).integers(0, V, (ROWS, T)).astype(np.int32)


def make():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": jax.random.normal(keys[0], (V, D)),
        "blocks": {
            "up": jax.random.normal(keys[1], (L, D, F)) / 8,
            "down": jax.random.normal(keys[2], (L, F, D)) / 11,
            "scale": jnp.ones((L, D)),
        },
        "head": jax.random.normal(keys[3], (D, V)) / 8,
    }


def model(read, remat="full"):
    """A loss whose scan reads each layer by `read`."""

    def block(x, layer):
        layer = read(layer)
        return x + jnp.tanh((x * layer["scale"][None, None]) @ layer["up"]) @ layer["down"], None

    def loss(params, tokens):
        x, _ = jax.lax.scan(jp.remat(block, remat), params["embed"][tokens], params["blocks"])
        return jnp.mean((x @ params["head"]) ** 2)

    return loss


BY_LAYER = model(lambda layer: jp.gather(layer, "blocks"))
WHOLE = model(lambda layer: layer)


def planned(factory=make, *, dims=tuple(DIMS), mesh=None, **options):
    strategies = [jp.DP(), jp.FSDP(), jp.TP(column=["*up"], row=["*down"])]
    return jp.plan(factory, mesh or programs.mesh(fsdp=8), strategies, dims=dims, **options)


def stepped(loss, plan=None, **options):
    plan = plan or planned()
    step = plan.jit(jp.value_and_grad(loss, **options))
    return step, (plan.init(), plan.batch(TOKENS))


def moved(step, args):
    """Collectives of matrices over `fsdp`: `(kind, loops around it, shape of one device's whole): times`."""
    found = {}
    for each in jp.testing.collectives(step, *args):
        if each.bytes >= MATRIX // 2 and "fsdp" in each.axes:
            key = each.kind, each.depth
            found[key] = found.get(key, 0) + each.count
    return found


# ---- one layer at a time


def test_one_layer_is_whole_at_a_time():
    """Gathered in the scan, forward and again backward, gradients reduce-scattered there; the rest once, outside."""
    step, args = stepped(BY_LAYER)
    assert moved(step, args) == {
        ("all-gather", 0): 2,  # embed, head
        ("all-gather", 1): 2 * 2 * L,
        ("reduce-scatter", 1): 2 * L,
        ("reduce-scatter", 0): 2,
    }
    step(*args)
    assert step.notes == ("gathered one layer at a time, where the loss calls jp.gather: blocks.down, blocks.up",)

    memory = {
        name: each.lower(*args).compile().memory_analysis().temp_size_in_bytes
        for name, each in {"by layer": step, "whole": stepped(WHOLE)[0]}.items()
    }
    assert memory["by layer"] < 2 * L * MATRIX < memory["whole"]  # less than all layers once


def test_gradients_lie_with_their_parameters():
    step, args = stepped(BY_LAYER)
    _, gradients = step(*args)
    jp.testing.assert_sharding(gradients, step.plan)
    assert gradients["blocks"]["up"].sharding.spec == P(None, None, "fsdp")


def test_accumulation_reduces_in_both_loops():
    step, args = stepped(BY_LAYER, accumulate=2)
    found = moved(step, args)
    assert found["all-gather", 2] == 2 * 2 * 2 * L
    assert found["reduce-scatter", 2] == 2 * 2 * L
    step(*args)
    assert step.notes[1:] == ("gathered one layer at a time, where the loss calls jp.gather: blocks.down, blocks.up",)


def test_frozen_layers_are_gathered_too():
    """Only the head is trained: no gradient, and so no second gather, of the layers."""
    step, args = stepped(BY_LAYER, planned(trainable="head"))
    assert moved(step, args) == {("all-gather", 0): 2, ("all-gather", 1): 2 * L, ("reduce-scatter", 0): 1}


def test_a_recipe_evaluates_as_it_trains():
    recipe = jp.Recipe(
        model=make, loss=BY_LAYER, optimizer=optax.sgd(0.1), strategies=[jp.FSDP()], batch=TOKENS, dims=DIMS
    )
    program = recipe.on(programs.mesh(fsdp=8))
    state = program.init()
    batch = program.plan.batch(TOKENS)
    found = moved(program._eval_step, (state["model"], batch))
    assert found == {("all-gather", 0): 2, ("all-gather", 1): 2 * L}
    loss = program.eval_step(state, batch)["loss"]
    assert float(loss) == pytest.approx(float(program.step(state, batch)[1]["loss"]), rel=1e-6)


def test_what_a_loss_gathers_itself_it_gathers_once(caplog):
    """Such a loss needs no `jp.value_and_grad` around it, and loses nothing by it."""
    inner = model(lambda layer: jp.gather(layer, "blocks"))

    def loss(params, tokens):
        rest = jp.gather({"embed": params["embed"], "head": params["head"]})
        return inner({"blocks": params["blocks"], **rest}, tokens)

    step, args = stepped(loss)
    assert moved(step, args) == moved(*stepped(BY_LAYER))
    alone = step.plan.jit(loss)
    assert moved(alone, args) == {("all-gather", 0): 2, ("all-gather", 1): 2 * L}
    assert float(alone(*args)) == pytest.approx(float(step(*args)[0]), rel=1e-6)
    assert not caplog.records


def test_outside_of_a_plan_it_is_identity():
    layer = {"w": jnp.ones((4, 4))}
    assert jp.gather(layer, "no.such") is layer


# ---- what a step says


def test_layers_that_are_gathered_whole_are_noted(caplog):
    step, args = stepped(WHOLE)
    step(*args)
    (note,) = step.notes
    assert note == (
        "gathered whole, all layers at once, 384.0 KiB a device: blocks.down, blocks.up. To hold one layer at a time, "
        "call jp.gather(layer) in the body of the scan over them, and jp.remat it"
    )
    assert not caplog.records


def test_layers_that_the_backward_pass_keeps_are_a_warning(caplog):
    step, args = stepped(model(lambda layer: jp.gather(layer, "blocks"), remat="none"))
    step(*args)
    note = (
        "layers gathered in a scan are all kept whole for its backward pass. Rematerialise its body: "
        'jax.lax.scan(jp.remat(body, "full"), ...)'
    )
    assert step.notes[1:] == (note,)
    assert caplog.messages == [f"run: {note}."]


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, tokens: BY_LAYER(jp.gather(params), tokens),
        model(lambda layer: jp.gather(jp.gather(layer, "blocks"), "blocks")),
    ],
    ids=["whole and by layer", "by layer"],
)
def test_what_is_gathered_twice_is_a_warning(loss, caplog):
    step, args = stepped(loss)
    step(*args)
    note = "gathered, and then gathered again: blocks.down, blocks.up. Call jp.gather once for each use"
    assert note in step.notes
    assert f"run: {note}." in caplog.messages


def test_a_plan_says_that_it_is_for_the_loss_to_say():
    assert planned().notes[-1] == (
        "stacked layers: blocks.down, blocks.up are gathered one layer at a time where the loss calls jp.gather(layer) "
        "in its scan over them (and once more where that is rematerialised), all at once where it does not."
    )
    assert not any("stacked" in note for note in planned(dims=()).notes)


# ---- which parameter is meant


def two_stacks():
    return {"a": {"w": jnp.ones((L, D, F))}, "b": {"w": jnp.ones((L, D, F))}, "w": jnp.ones((D, D))}


def scanned(read, stack="a"):
    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, layer: (x @ read(layer)["w"] @ read(layer)["w"].T, None), x, params[stack])
        return jnp.mean(x**2)

    return loss


BOTH = [("[ab].w", ("layers", ...))]


def run(loss, dims):
    plan = jp.plan(two_stacks, programs.mesh(fsdp=8), [jp.FSDP()], dims=dims)
    return plan.jit(loss)(plan.init(), plan.batch(np.ones((ROWS, D), np.float32)))


def test_stacks_that_lie_alike_need_no_path():
    assert run(scanned(jp.gather), BOTH) == run(scanned(lambda layer: jp.gather(layer, "a")), BOTH)


def test_stacks_that_lie_differently_need_one():
    dims = [("a.w", ("layers", "embed", None)), ("b.w", ("layers", None, "embed"))]
    with pytest.raises(jp.ShardingError) as error:
        run(scanned(jp.gather), dims)
    assert str(error.value) == (
        "jp.gather: w may be one layer of a.w or one layer of b.w, which lie differently. Say where it lives in the "
        'model: jp.gather(params, "a"), or another path.'
    )
    run(scanned(lambda layer: jp.gather(layer, "a")), dims)
    run(scanned(lambda layer: jp.gather(layer, "b"), "b"), dims)


def test_an_array_alone_needs_a_path():
    def loss(path):
        def body(x, w):
            w = jp.gather(w, path)
            return x @ w @ w.T, None

        return lambda params, x: jnp.mean(jax.lax.scan(body, x, params["a"]["w"])[0] ** 2)

    with pytest.raises(jp.ShardingError) as error:
        run(loss(None), BOTH)
    assert str(error.value) == (
        "jp.gather: the plan has no parameter, nor a layer of one, such as\nthe array (64, 128)\nSay where it lives in "
        'the model, jp.gather(layer, "blocks"); parameters here are a.w, b.w, w.'
    )
    run(loss("a.w"), BOTH)


def test_rejects_a_path_that_the_plan_does_not_have():
    with pytest.raises(jp.ShardingError, match="the plan has no parameter in 'c', nor a layer of one"):
        run(scanned(lambda layer: jp.gather(layer, "c")), BOTH)
