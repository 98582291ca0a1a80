"""A step on its way to a compiler elsewhere: what survives the file, and that JAX is left as it was."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar.explain import _export
from jaxpar.explain._subject import subject


class Noisy(nnx.Module):
    """With random keys and counters among its arrays."""

    def __init__(self, *, rngs):
        self.inner = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.inner(x))


def noisy_step(mesh):
    """A step of a plan, its state and its batch, on attached devices."""
    plan = jp.plan(lambda: Noisy(rngs=nnx.Rngs(0, dropout=1)), mesh, [jp.FSDP()])
    model = plan.init()
    opt = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    @plan.jit
    def train_step(model, opt, batch):
        loss, grads = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, batch["x"])
        opt.update(model, grads)
        return loss

    return train_step, model, opt, plan.batch({"x": np.ones((64, 64), np.float32), "unused": np.ones(64, np.float32)})


def sharded(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def test_a_step_is_planned_anew_for_the_mesh_it_is_explained_on():
    step, *args = noisy_step(jp.mesh(fsdp=8))
    made = subject(step, tuple(args), {}, jp.mesh("v5e:4x4", fsdp=16))
    found = {each.path: each for each in made.arguments}
    assert (found["inner.kernel"].kind, found["inner.kernel"].bytes) == ("parameter", 64 * 64 * 4 // 16)
    assert (found["opt.opt_state.0.mu.inner.kernel"].kind, found["batch.x"].kind) == ("optimizer", "batch")
    assert {each.kind for each in made.arguments if "dropout" in each.path} == {"rng"}
    assert made.num_tokens == 64
    assert step.num_compilations == 0  # the user's own step has seen nothing of it


def test_the_file_holds_types_shardings_donation_and_meaning(tmp_path):
    step, *args = noisy_step(jp.mesh(fsdp=8))
    exported = _export.export(subject(step, tuple(args), {}, jp.mesh("v5e:2x4", fsdp=8)))
    by_path = dict(zip([each.path for each in exported.arguments], exported.inputs, strict=True))
    assert by_path["batch.x"] == {"shape": [64, 64], "dtype": "float32", "weak": False, "spec": ["fsdp"]}
    assert "batch.unused" not in by_path  # nor would it be a parameter of the program
    donated = {exported.arguments[at].path for at in exported.donated}
    stays = {"batch.x", "model.dropout.rngs.key"}  # a key is only counted on from
    assert donated == set(by_path) - stays

    _export.write(exported, tmp_path / "a.step")
    assert _export.read(tmp_path / "a.step") == exported
    assert [file.name for file in tmp_path.iterdir()] == ["a.step"]


def test_the_same_step_is_one_program_wherever_it_is_asked_for():
    """Another line asks, from deeper in the stack: the same. Another line within the step: another program."""
    mesh = jp.mesh("v5e:2x2", data=4)
    x = sharded(mesh, (8, 8), "data")

    def step(x):
        return x + 1

    def ask(step):
        return _export.export(subject(step, (x,), {}, None)).digest()

    def from_deeper(step):
        return ask(step)

    assert ask(step) == from_deeper(step)

    def renamed(x):
        return x + 1

    renamed.__name__ = renamed.__qualname__ = "step"
    assert ask(renamed) != ask(step)


def test_what_the_compiler_does_not_see_makes_no_other_program():
    mesh = jp.mesh("v5e:2x2", data=4)
    one = _export.export(subject(lambda x: x + 1, (sharded(mesh, (8, 8), "data"),), {}, None))
    assert one.digest() == dataclasses.replace(one, notes=("a note",), num_tokens=3, arguments=()).digest()
    assert one.digest() != dataclasses.replace(one, options={"xla_a": True}).digest()
    assert one.digest() != dataclasses.replace(one, donated=(0,)).digest()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"HloModule x"], ids=["empty", "cut", "text"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(jp.StepError, match=r"is not an exported step.*jaxpar export"):
        _export.read(tmp_path / "a")


def test_donation_and_shardings_of_a_users_own_jit_are_kept():
    mesh = jp.mesh(data=8)
    whole = NamedSharding(mesh, P())
    step = jax.jit(lambda w, x: (w - x.mean(0), x.sum()), donate_argnums=0, out_shardings=(whole, whole))
    made = subject(step, (jnp.ones(512), sharded(mesh, (1024, 512), "data")), {}, None)
    assert made.donated == (0,)
    assert [each.sharding.spec for each in made.shapes] == [P(), P("data")]
    args = (jnp.ones(512), sharded(mesh, (1024, 512), "data"))
    exported = _export.export(subject(step, args, {}, jp.mesh("v5e:4x4", data=16)))
    assert (exported.donated, exported.inputs[1]["spec"], exported.outputs[0]["spec"]) == ((0,), ["data"], [])


def test_modules_of_nnx_jit_are_arguments_too():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        model.bias[...] += x.mean()
        return model(x)

    made = subject(step, (model, jnp.ones((2, 8))), {}, None)
    assert [(each.path, each.kind) for each in made.arguments] == [
        ("model.bias", "parameter"),
        ("model.kernel", "parameter"),
        ("x", "batch"),
    ]
    assert made.mesh is None


def test_arguments_that_nobody_splits_are_remarked_on():
    mesh = jp.mesh(data=8)
    assert subject(jnp.sum, (sharded(mesh, (8, 8), "data"),), {}, None).notes == ()
    assert "no argument of sum says how it is split" in subject(jnp.sum, (jnp.ones((8, 8)),), {}, mesh).notes[0]


@pytest.mark.parametrize(
    ("step", "args", "on", "message"),
    [
        (3, (), None, "int is neither a function"),
        (jnp.sum, (1.0,), "v5e-256", "is no mesh"),
        ("recipe", (), None, "a recipe knows no mesh"),
        ("recipe", (1,), None, "leave out the arguments"),
    ],
    ids=["no step", "no mesh", "recipe alone", "recipe with arguments"],
)
def test_what_is_refused(step, args, on, message, recipe):
    with pytest.raises(ValueError, match=message):
        subject(recipe if step == "recipe" else step, args, {}, on)


@pytest.fixture
def recipe():
    return jp.Recipe(
        model=lambda: {"w": jnp.zeros((64, 64))},
        loss=lambda params, batch: jnp.mean((batch["x"].astype(params["w"].dtype) @ params["w"]) ** 2),
        optimizer=optax.adamw(1e-3),
        strategies=[jp.FSDP()],
        batch={"x": jax.ShapeDtypeStruct((64, 64), jnp.float32)},
    )


def test_a_recipe_of_plain_pytrees(recipe):
    exported = _export.export(subject(recipe, (), {}, jp.mesh("v5e:2x4", fsdp=8)))
    kinds = {each.path: each.kind for each in exported.arguments}
    assert kinds == {
        "w": "parameter",
        "optimizer.0.count": "optimizer",
        "optimizer.0.mu.w": "optimizer",
        "optimizer.0.nu.w": "optimizer",
        "batch.x": "batch",
    }
    assert jp.Plan.from_json(exported.plan).strategies == ("FSDP()",)


def test_a_callback_into_python_is_refused_with_the_reason():
    def step(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(jp.StepError, match="may not call back into Python"):
        _export.export(subject(step, (jnp.ones(8),), {}, jp.mesh("v5e:2x2", data=4)))


def test_options_of_a_users_own_jit_are_asked_for_as_an_argument():
    step = jax.jit(lambda x: x + 1, compiler_options={"xla_cpu_enable_fast_math": True})
    with pytest.raises(jp.StepError, match=r"explain\(jax.jit\(<lambda>\), ..., compiler_options=...\)"):
        subject(step, (jnp.ones(8),), {}, None)


def test_jax_is_left_unstarted_and_as_it_was(child_env):
    """In a process that has no devices yet, exporting looks for none; afterwards any may be chosen."""
    code = """
        import json, os
        import jax, jax.numpy as jnp
        import jaxpar as jp
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxpar.explain import _export
        from jaxpar.explain._subject import subject

        environment, flags = dict(os.environ), dict(jax.config.values)
        mesh = jp.mesh("v5p-128", fsdp=64)
        x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        exported = _export.export(subject(lambda x: x.sum(), (x,), {}, None))
        changed = [name for name in flags if jax.config.values[name] != flags[name]]
        same = dict(os.environ) == environment
        jax.config.update("jax_num_cpu_devices", 3)  # JAX refuses this option once it has started
        print(json.dumps([exported.axes, changed, same, jax.device_count()]))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, env=child_env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [{"fsdp": 64}, [], True, 3]
