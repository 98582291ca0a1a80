"""Each finding on a program that has the fault and on its like that has not, on eight simulated devices.

The programs are plain JAX, as a user would have written them, since under a plan most of these faults do not arise.
"""

import dataclasses
import functools as ft
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hardware, _hlo
from jaxpar.explain._collectives import rows
from jaxpar.explain._compiled import Argument, Compiled
from jaxpar.explain._explain import explain
from jaxpar.explain._findings import find
from jaxpar.explain._memory import Held, Memory, from_arguments
from jaxpar.explain._timeline import predict
from jaxpar.explain._units import size_text
from tests import _programs
from tests.explain._described import array, compiled, findings, kinds, mesh, placed, timeline_of
from tests.explain._layers import Form, is_line_of

D, F, LAYERS, ROUNDS, ROWS = 32, 64, 3, 4, 16


def one(found, kind):
    """The one finding of a kind, with everything a reader needs."""
    (finding,) = [each for each in found if each.kind == kind]
    assert any(letter.isdigit() for letter in finding.reason)
    assert finding.remedy
    return finding


DATA = pathlib.Path(__file__).parents[1] / "data" / "hlo"


# ---- reductions in loops


def test_a_reduction_a_layer_is_no_fault():
    """Data parallelism over scanned layers reduces each layer's gradient once: the loop adds nothing up."""
    on = mesh(data=4)
    params, run = Form(frontend="linen", is_scanned=True).pure()

    def step(params, batch):
        gradients = jax.grad(lambda params: (run(params, batch) ** 2).mean())(params)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)

    assert kinds(findings(step, on, params=placed(on, params), batch=array(on, (ROWS, D), "data"))) == set()


def test_a_sum_that_the_loop_uses_is_no_fault():
    """The residual stream of tensor parallelism is a sum over a loop, and each round computes with it."""
    on = mesh(tensor=4)

    def step(params, batch):
        def layer(x, weights):
            up, down = weights
            return x + jnp.tanh(x @ up) @ down, None

        return jax.lax.scan(layer, batch, params)[0]

    params = (array(on, (LAYERS, D, F), None, None, "tensor"), array(on, (LAYERS, F, D), None, "tensor"))
    found = findings(step, on, params=params, batch=array(on, (ROWS, D)))
    assert kinds(found, above="none") == set()


def test_one_matrix_for_all_layers_reduces_in_the_layer_loop():
    """A matrix that every layer shares has one gradient, which the loop over layers reduces piece by piece."""
    on = mesh(data=4)

    def step(params, batch):
        def loss(params):
            return (jax.lax.scan(lambda x, _: (jnp.tanh(x @ params), None), batch, length=LAYERS)[0] ** 2).mean()

        return params - 0.1 * jax.grad(loss)(params)

    found = findings(step, on, params=array(on, (D, D)), batch=array(on, (ROWS, D), "data"))
    assert f"in each of {LAYERS} rounds" in one(found, "reduction-in-loop").reason


def test_a_sum_whose_first_value_is_sunk_into_its_loop():
    """XLA:TPU's own schedule for v5e 2x2 of four microbatches through eight layers: `select(first round, 0, sum)`."""
    text = (DATA / "tpu_accumulated.txt").read_text()
    axes = _hlo.MeshAxes(names=("data",), sizes=(4,))
    program = Compiled(name="step", text=text, hardware=_hardware.parse("v5e:2x2"), axes=axes)
    finding = one(find(_hlo.read(text), program), "reduction-in-loop")
    assert "in each of 4 rounds" in finding.reason
    assert "32.0 MiB a step and device, where 8.0 MiB" in finding.reason
    assert finding.place == "w at model.py:8"


# ---- gathers


def scanned_step(at_once, on):
    """FSDP by hand over stacked layers: each gathered in its round, or split by layer so that all are at once."""

    def step(params, batch):
        def layer(x, weight):
            if not at_once:
                weight = jax.lax.with_sharding_constraint(weight, NamedSharding(on, P()))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(on, P("fsdp")))
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, batch, params)[0]

    return step


def test_a_stack_gathered_whole():
    on = mesh(fsdp=4)
    batch = array(on, (ROWS * 8, D), "fsdp")

    found = findings(scanned_step(True, on), on, params=array(on, (4, D, D), "fsdp"), batch=batch)
    finding = one(found, "gathered-whole")
    assert finding.bytes == 4 * D * D * 4
    assert finding.place.startswith("params at ")
    assert 'jp.FSDP(blocks="blocks.*")' in finding.remedy

    found = findings(scanned_step(False, on), on, params=array(on, (4, D, D), None, "fsdp"), batch=batch)
    assert kinds(found, above="none") == set()


def test_optimiser_state_gathered_whole():
    """State that is made whole before the update, against ZeRO, where the update is made in pieces."""
    on = mesh(data=4)

    def step(params, opt, batch, *, whole):
        grad = jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)
        opt = jax.lax.with_sharding_constraint(opt, NamedSharding(on, P() if whole else P("data")))
        opt = 0.9 * opt + grad
        opt = jax.lax.with_sharding_constraint(opt, NamedSharding(on, P() if whole else P("data")))
        params = jax.lax.with_sharding_constraint(params - 0.1 * opt, NamedSharding(on, P()))
        return params, jax.lax.with_sharding_constraint(opt, NamedSharding(on, P("data")))

    arguments = {
        "params": array(on, (D, F)),
        "opt": {"mu": array(on, (D, F), "data")},
        "batch": array(on, (ROWS, D), "data"),
    }

    def run(whole):
        def named(params, opt, batch):
            params, mu = step(params, opt["mu"], batch, whole=whole)
            return params, {"mu": mu}

        return findings(named, on, **arguments)

    finding = one(run(True), "gathered-whole")
    assert finding.reason.startswith("mu is optimiser state, split over 'data'")
    assert finding.bytes == D * F * 4
    assert "gathered-whole" not in kinds(run(False), above="none")


def test_involuntary_full_rematerialisation():
    on = mesh(a=4, b=2)

    def between(first, second):
        def step(params, batch):
            y = jax.lax.with_sharding_constraint(jnp.tanh(batch @ params), NamedSharding(on, P(*first)))
            return jax.lax.with_sharding_constraint(jnp.cos(y), NamedSharding(on, P(*second)))

        return findings(step, on, params=array(on, (D, F), None, "b"), batch=array(on, (ROWS, D), "a"))

    finding = one(between((None, "b"), ("a",)), "full-rematerialisation")
    assert f"f32[{ROWS},{F}] is gathered over 'b'" in finding.reason
    assert is_line_of(finding.place, test_involuntary_full_rematerialisation)
    assert "full-rematerialisation" not in kinds(between(("a", "b"), ("a", "b")), above="none")


def test_the_compiler_s_own_complaint_is_a_finding():
    """XLA says so only while it compiles; the line names the operation, the program knows its place in the code."""
    on = mesh(a=4, b=2)
    line = (
        "W1125 14:56:57.110734 21391 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler "
        "cannot go from sharding {devices=[1,2,4]<=[4,2]T(1,0) last_tile_dim_replicate} to {devices=[4,1,2]<=[8] "
        "last_tile_dim_replicate} efficiently for HLO operation %dot.0 = f32[64,32]{1,0} dot(%a, %b), sharding="
        '{devices=[1,2,4]<=[4,2]T(1,0) last_tile_dim_replicate}, metadata={op_name="jit(step)/tanh" stack_frame_id=4}. '
        "As the last resort, SPMD will replicate the tensor and then partition it."
    )

    def step(params, batch):
        return jnp.tanh(batch @ params)

    program = compiled(step, on, params=array(on, (D, F), None, "b"), batch=array(on, (ROWS, D), "a"))
    assert find(_hlo.read(program.text), program) == ()

    program = dataclasses.replace(program, log=("I0000 something else", line, line))
    finding = one(find(_hlo.read(program.text), program), "full-rematerialisation")
    assert "takes f32[64,32] from {devices=[1,2,4]" in finding.reason
    assert is_line_of(finding.place, test_the_compiler_s_own_complaint_is_a_finding)


def test_activations_gathered_along_the_batch():
    """FSDP by placement alone: at few tokens the compiler moves activations; of weights read whole, the weights."""
    on = mesh(fsdp=8)

    def step(params, batch, *, read):
        def loss(params):
            x = batch
            for name in ("up", "down"):
                whole = jax.lax.with_sharding_constraint(params[name], NamedSharding(on, P()))
                x = jnp.tanh(x @ (whole if read else params[name]))
            return (x**2).mean()

        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, jax.grad(loss)(params))

    arguments = {
        "params": {"up": array(on, (D, 8 * D), None, "fsdp"), "down": array(on, (8 * D, D), "fsdp")},
        "batch": array(on, (ROWS, D), "fsdp"),
    }
    finding = one(findings(named(ft.partial(step, read=False)), on, **arguments), "activation-gathered")
    assert "over 'fsdp', which splits the batch" in finding.reason
    assert is_line_of(finding.place, test_activations_gathered_along_the_batch)
    assert kinds(findings(named(ft.partial(step, read=True)), on, **arguments)) == set()


def named(function):
    """A function of two arguments, for `donate_argnames`."""

    def step(params, batch):
        return function(params, batch)

    return step


def test_reshard_between_operations():
    on = mesh(fsdp=4, tensor=2)

    def reshaped(first):
        def step(params, batch):
            y = jax.lax.with_sharding_constraint(jnp.sin(batch) @ params, NamedSharding(on, P(*first)))
            return jax.lax.with_sharding_constraint(jnp.cos(y), NamedSharding(on, P("tensor", "fsdp")))

        return findings(step, on, params=array(on, (64, 64), None, "tensor"), batch=array(on, (64, 64), "fsdp"))

    finding = one([each for each in reshaped(("fsdp", "tensor")) if "all-to-all" in each.reason], "reshard")
    assert finding.severity == "note"  # an annotation may have asked for it, and lost its name
    assert is_line_of(finding.place, test_reshard_between_operations)


def test_a_reshard_that_was_asked_for_is_no_finding():
    on = mesh(fsdp=4, tensor=2)

    def step(params, batch):
        def swap(x):
            return jax.lax.all_to_all(x, "tensor", split_axis=1, concat_axis=0, tiled=True)

        swapped = jax.shard_map(swap, mesh=on, in_specs=P(("fsdp", "tensor")), out_specs=P("fsdp", "tensor"))
        return swapped(jnp.sin(batch)) * params

    found = findings(step, on, params=array(on, (1, 64), None, "tensor"), batch=array(on, (64, 64), ("fsdp", "tensor")))
    assert kinds(found, above="none") == set()


# ---- branches


@pytest.mark.parametrize("collective", ["ppermute", "psum"])
def test_a_collective_in_a_branch_that_some_devices_take(collective):
    on = mesh(pipe=2, data=4)

    def step(params, batch, *, condition):
        def device(x, step):
            def move(x):
                if collective == "psum":
                    return jax.lax.pcast(jax.lax.psum(x, "data"), "data", to="varying")
                return jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)])

            return jax.lax.cond(condition(step), move, lambda x: x, x)

        spec = P(("pipe", "data"))
        return jax.shard_map(device, mesh=on, in_specs=(spec, P()), out_specs=spec, check_vma=False)(batch, params)

    def run(condition):
        arguments = {"params": array(on, (), dtype=np.int32), "batch": array(on, (ROWS, D), ("pipe", "data"))}
        return findings(named(ft.partial(step, condition=condition)), on, **arguments)

    divergent = run(lambda step: jax.lax.axis_index("data") == 0)
    finding = divergent[0]
    assert finding.kind == {"ppermute": "permute-in-branch", "psum": "collective-in-branch"}[collective]
    assert finding.severity == "error"
    assert "along 'data' take and others do not" in finding.reason
    assert is_line_of(finding.place, test_a_collective_in_a_branch_that_some_devices_take)

    assert kinds(run(lambda step: step % 10 == 0)) == set()  # the same on every device


def test_the_stages_of_a_pipeline_may_branch_around_a_sum_of_their_own():
    """A sum over `data` in a branch by stage runs in groups that take it as one; a permute joins all, and hangs."""
    on = mesh(pipe=2, data=4)

    def step(params, batch, *, move):
        def device(x):
            return jax.lax.cond(jax.lax.axis_index("pipe") == 0, move, lambda x: x, x)

        spec = P(("pipe", "data"))
        return jax.shard_map(device, mesh=on, in_specs=spec, out_specs=spec, check_vma=False)(batch) * params

    def run(move):
        arguments = {"params": array(on, ()), "batch": array(on, (ROWS, D), ("pipe", "data"))}
        return findings(named(ft.partial(step, move=move)), on, **arguments)

    assert kinds(run(lambda x: jax.lax.psum(x, "data"))) == set()
    moved = run(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]))
    assert "along 'pipe' take" in one(moved, "permute-in-branch").reason


# ---- copies


def test_an_axis_that_no_tensor_uses():
    def step(params, batch):
        return params - 0.1 * jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)

    def run(axes, *spec):
        on = mesh(**axes)
        return findings(step, on, params=array(on, (D, F)), batch=array(on, (ROWS, D), *spec))

    finding = one(run({"data": 4, "tensor": 2}, "data"), "unused-axis")
    assert "Axis 'tensor' of size 2 splits no argument" in finding.reason
    assert "50% of the machine" in finding.reason
    assert "jp.mesh(data=8)" in finding.remedy
    assert kinds(run({"data": 4, "tensor": 2}, ("data", "tensor"))) == set()
    assert kinds(run({"data": 4, "tensor": 1}, "data")) == set()


def test_a_large_parameter_left_whole_and_its_products():
    """An output matrix that tensor parallelism leaves out: whole on each device, and multiplied on each."""
    on = mesh(tensor=4)

    def step(params, batch):
        return jnp.tanh(batch @ params["up"]) @ params["down"] @ params["head"]

    def run(*spec):
        params = {
            "up": array(on, (D, F), None, "tensor"),
            "down": array(on, (F, D), "tensor"),
            "head": array(on, (D, 8 * D), *spec),
        }
        return findings(step, on, params=params, batch=array(on, (ROWS, D)))

    found = run()
    finding = one(found, "replicated")
    assert finding.place == "head"
    assert finding.bytes == 8 * D * D * 4 * 3 // 4
    assert 'jp.TP(vocab=["head"])' in finding.remedy
    finding = one(found, "repeated-compute")
    assert finding.severity == "warning"
    assert f"f32[{ROWS},{8 * D}]" in finding.reason
    assert is_line_of(finding.place, test_a_large_parameter_left_whole_and_its_products)
    assert kinds(run(None, "tensor"), above="none") == set()


@pytest.mark.parametrize(("share", "is_dear"), [(0.1, False), (0.3, True)])
def test_optimiser_state_that_is_whole_everywhere(plain, share, is_dear):
    """Data parallelism keeps it so on purpose: only where it fills the memory is it worth a note."""
    size = int(share * plain.hardware.memory)
    arguments = [
        dataclasses.replace(each, bytes=size) if each.kind == "optimizer" else each for each in plain.arguments
    ]
    found = find(_hlo.read(plain.text), dataclasses.replace(plain, arguments=tuple(arguments)))
    if not is_dear:
        assert found == ()
        return
    finding = one(found, "replicated")
    assert finding.severity == "note"
    assert finding.remedy == 'jp.ZeRO(1, axis="data").'
    assert finding.bytes == size * 7 // 8
    assert finding.place == "opt"
    assert finding.reason.endswith(
        f"the largest opt with {size_text(size)}. Split over 'data' that would be {size_text(size / 8)}."
    )


def test_data_parallelism_holds_parameters_whole_on_purpose():
    on = mesh(data=8)

    def step(params, batch):
        return params - 0.1 * jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)

    assert (
        kinds(findings(step, on, params=array(on, (D, F)), batch=array(on, (ROWS, D), "data")), above="none") == set()
    )


# ---- memory


def test_state_that_is_not_donated():
    on = mesh(data=8)

    def step(params, batch):
        return params - 0.1 * jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)

    def gradient(params, batch):
        return jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)

    step.donates = gradient.donates = False
    arguments = {"params": array(on, (D, F)), "batch": array(on, (ROWS, D), "data")}
    finding = one(findings(step, on, **arguments), "not-donated")
    assert finding.bytes == D * F * 4
    assert finding.place == "params"
    assert (
        kinds(findings(gradient, on, **arguments), above="none") == set()
    )  # of the same shape, and not its next value

    step.donates = True
    assert kinds(findings(step, on, **arguments), above="none") == set()


@pytest.fixture(scope="module")
def plain():
    """A program with nothing wrong, on a TPU that it was not compiled for: for what is told beside the text."""
    on = mesh(data=8)

    def step(params, opt, batch):
        grad = jax.grad(lambda w: (jnp.tanh(batch @ w) ** 2).mean())(params)
        opt = 0.9 * opt + grad
        return params - 0.1 * opt, opt

    arguments = {"params": array(on, (D, F)), "opt": array(on, (D, F)), "batch": array(on, (ROWS, D), "data")}
    program = compiled(step, on, **arguments)
    return dataclasses.replace(program, hardware=_hardware.parse("v5e:2x4"))


def memory_of(program, *held, peak):
    limit = program.hardware.memory
    return Memory(
        peak=int(peak * limit), limit=limit, argument=0, output=0, temporary=0, alias=0, code=0, host=0,
        held=tuple(
            Held(kind=kind, path=path, bytes=int(share * limit), source="model.py:7") for kind, path, share in held
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("peak", "held", "severity", "remedy"),
    [
        (0.5, [("activation", "blocks.mlp", 0.3)], None, ""),
        (0.96, [("activation", "blocks.mlp", 0.3)], "warning", "accumulate=2) saves"),
        (1.1, [("activation", "blocks.mlp", 0.6), ("optimizer", "", 0.1)], "error", "accumulate=2) saves"),
        (1.2, [("optimizer", "mu", 0.6), ("activation", "", 0.1)], "error", 'jp.ZeRO(1, axis="data") saves'),
        (1.5, [("parameter", "", 0.9), ("temporary", "", 0.1)], "error", "on jp.mesh(fsdp=8) saves about 12.4 GiB"),
        (3.0, [("activation", "", 0.3)], "error", "do not fit"),
    ],
)
def test_memory_near_and_over_the_limit(plain, peak, held, severity, remedy):
    found = find(_hlo.read(plain.text), plain, memory=memory_of(plain, *held, peak=peak))
    if severity is None:
        assert kinds(found) == set()
        return
    finding = one(found, "memory")
    assert finding.severity == severity
    assert remedy in finding.remedy
    assert finding.place.endswith("model.py:7")
    assert found[0] == finding


def test_a_program_that_the_compiler_refused():
    """There is no text then, and still the two figures."""
    limit = _hardware.parse("v5e:2x4").memory
    program = Compiled(
        name="step", text="", hardware=_hardware.parse("v5e:2x4"), axes=_hlo.MeshAxes(names=("data",), sizes=(8,)),
        refusal="ran out of memory", needed=2 * limit,
    )  # fmt: skip
    finding = one(find(_hlo.read(""), program), "memory")
    assert finding.bytes == limit
    assert finding.severity == "error"


@pytest.mark.parametrize(
    ("axes", "remedy"),
    [
        ((), 'jp.ZeRO(1, axis="data") saves about 21.0 GiB and fits.'),
        (("data",), "Use more devices, or split the batch"),
    ],
    ids=["whole", "split"],
)
def test_a_program_that_the_compiler_refused_is_told_what_would_fit(axes, remedy):
    """By the arguments, of which it is known how they are split."""
    hardware = _hardware.parse("v5e:2x4")
    state = Argument(path="opt.mu", kind="optimizer", shape=(6, 2**30), dtype="float32", bytes=24 * 2**30, axes=axes)
    program = Compiled(
        name="step", text="", hardware=hardware, axes=_hlo.MeshAxes(names=("data",), sizes=(8,)),
        arguments=(state,), refusal="ran out of memory", needed=25 * 2**30,
    )  # fmt: skip
    memory = from_arguments(program)
    assert one(find(_hlo.read(""), program, memory=memory), "memory").remedy.startswith(remedy)


def test_a_change_that_was_found_to_fit_is_the_remedy(plain):
    memory = memory_of(plain, ("activation", "blocks.mlp", 0.6), peak=1.1)
    told = "Recipe(accumulate=8) fits."
    assert one(find(_hlo.read(plain.text), plain, memory=memory, fits=told), "memory").remedy == told


def test_savings_of_the_same_bytes_are_not_added_up(plain):
    """Half, a quarter, a fifth or an eighth of the activations: one of these, not their sum."""
    memory = memory_of(plain, ("activation", "", 1.5), peak=3.0)
    remedy = one(find(_hlo.read(plain.text), plain, memory=memory), "memory").remedy
    assert remedy.startswith("jp.value_and_grad(loss, accumulate=8)")
    assert "accumulate=2" not in remedy
    assert "do not fit: use more devices as well." in remedy


# ---- time


@pytest.mark.parametrize(("exposed", "severity"), [(0.05, None), (0.15, "note"), (0.4, "warning")])
def test_exposed_communication(plain, exposed, severity):
    found = find(_hlo.read(plain.text), plain, timeline=timeline_of(plain, exposed, exposed=exposed))
    if severity is None:
        assert found == ()
        return
    finding = one(found, "exposed-communication")
    assert finding.severity == severity
    assert "devices wait for 'data'" in finding.reason
    assert finding.seconds == pytest.approx(exposed)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_weights_that_wait_are_to_move_in_bfloat16_unless_they_do(dtype):
    text = (DATA / "tpu_fsdp_scan.txt").read_text().replace("bf16[", f"{dtype}[")
    axes = _hlo.MeshAxes(names=("fsdp", "tensor"), sizes=(4, 2))
    program = Compiled(name="step", text=text, hardware=_hardware.parse("v5e:2x4"), axes=axes)
    found = find(_hlo.read(text), program, timeline=timeline_of(program, 0.4, exposed=0.4))
    (finding,) = (each for each in found if each.kind == "exposed-communication" and "'fsdp'" in each.reason)
    assert ("bfloat16" in finding.remedy) == (dtype == "f32"), finding.remedy


def test_collectives_too_small_to_pay():
    """A sum of eight numbers in each of 256 rounds costs its start; once a step it costs nothing to speak of."""
    on = mesh(data=8)

    def step(params, batch, *, rounds):
        def device(x):
            def body(total, _):
                mean = jax.lax.pmean(jnp.tanh(x * total[None]).sum(0), "data")
                return total + mean / rounds, None

            return jax.lax.scan(body, jnp.ones(8), length=rounds)[0]

        return params * jax.shard_map(device, mesh=on, in_specs=P("data"), out_specs=P())(batch)

    def run(rounds):
        arguments = {"params": array(on, (8,)), "batch": array(on, (ROWS, 8), "data")}
        program = compiled(named(ft.partial(step, rounds=rounds)), on, **arguments)
        return find(_hlo.read(program.text), program, timeline=timeline_of(program, 10e-6, step=0.01))

    finding = one(run(256), "small-collectives")
    assert "run 256 times a step: 2.56 ms, 25.6% of the step" in finding.reason
    assert finding.severity == "warning"
    assert is_line_of(finding.place, test_collectives_too_small_to_pay)
    assert kinds(run(2), above="none") == set()


@pytest.mark.parametrize(
    ("name", "is_slow"),
    [
        ("narrow_on", True),  # [2048, 2048] @ [2048, 8192] a chip, cut into sixteen windows
        ("narrow_off", False),  # the same with the option of the remedy
        ("wide_on", False),  # [16384, 8192] @ [8192, 8192]: windows wide enough
    ],
)
def test_windowed_einsums(name, is_slow):
    """XLA:TPU's own schedules for v5e 4x4, FSDP of one matrix."""
    text = (DATA / f"tpu_windows_{name}.txt").read_text()
    module = _hlo.read(text)
    program = Compiled(
        name="step", text=text, hardware=_hardware.parse("v5e:4x4"), axes=_hlo.MeshAxes(names=("fsdp",), sizes=(16,))
    )
    timeline = predict(module, program)
    found = find(module, program, timeline=timeline, rows=rows(module, program, timeline))
    if not is_slow:
        assert "windowed-einsum" not in kinds(found, above="none")
        return
    finding = one(found, "windowed-einsum")
    assert finding.severity == "warning"
    assert 0 < finding.seconds < timeline.step_seconds
    assert finding.place == "params at model.py:8"
    assert 'jp.compiler_options("v5e", "no-windowed-einsum")' in finding.remedy


# ---- good programs, and what is no program


STRATEGIES = {
    "linen": ({"data": 8}, [jp.DP(), jp.ZeRO(1)], 2),
    "mlp": ({"data": 4, "tensor": 2}, [jp.DP(), jp.TP(column=["*up"], row=["*down"])], 1),
    "pytree": ({"fsdp": 8}, [jp.FSDP()], 2),
    "stack": ({"data": 2, "fsdp": 2, "tensor": 2}, None, 4),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_planned_step_gives_no_warning(name):
    case = _programs.CASES[name]
    axes, strategies, accumulate = STRATEGIES[name]
    strategies = strategies or [jp.DP(), jp.FSDP(blocks=case.blocks), jp.TP(**case.tensor)]
    plan = jp.plan(case.make, _programs.mesh(**axes), strategies)
    step, args, _ = _programs._loop(plan.init(), plan, jp.value_and_grad(case.loss, accumulate=accumulate))
    assert kinds(explain(step, *args, plan.batch(case.batch)).findings) == set()


@pytest.mark.parametrize(
    "text", ["", "garbage", "HloModule x\n\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] foo(%d)\n}\n"]
)
@pytest.mark.parametrize("axes", [{}, {"data": 1}, {"data": 8}], ids=str)
def test_nothing_is_found_in_nothing(text, axes):
    mesh = _hlo.MeshAxes(names=tuple(axes), sizes=tuple(axes.values()))
    program = Compiled(name="step", text=text, hardware=_hardware.parse("v5e:2x4"), axes=mesh)
    assert find(_hlo.read(text), program) == ()


def test_truncated_text_is_gone_through_as_far_as_it_reads():
    """Each prefix of a real program, cut in the middle of loops, fusions and tables."""
    text = (DATA / "tpu_fsdp_scan.txt").read_text()
    axes = _hlo.MeshAxes(names=("fsdp", "tensor"), sizes=(4, 2))
    for end in range(0, len(text), 1999):
        program = Compiled(name="step", text=text[:end], hardware=_hardware.parse("v5e:2x4"), axes=axes)
        assert "error" not in {each.severity for each in find(_hlo.read(program.text), program)}


def test_damaged_text_is_never_a_traceback():
    """Lines lost, doubled and swapped, names that call themselves, and the mesh of another program."""
    texts = [(DATA / f"{name}.txt").read_text() for name in ("tpu_fsdp_scan", "gpu_nested")]
    lines = "".join(texts).splitlines()
    draw = random.Random(0)
    for _ in range(12):
        text = list(lines)
        for _ in range(draw.randrange(1, 12)):
            here, there = draw.randrange(len(text)), draw.randrange(len(text))
            change = draw.choice(["lose", "double", "swap", "call"])
            if change == "lose":
                del text[here : here + draw.randrange(1, 40)]
            elif change == "double":
                text.insert(there, text[here])
            elif change == "swap":
                text[here], text[there] = text[there], text[here]
            else:
                text = [line.replace("calls=%fused_computation.2", "calls=%fused_computation") for line in text]
        for axes in ({"fsdp": 4, "tensor": 2}, {"data": 5}):
            mesh = _hlo.MeshAxes(names=tuple(axes), sizes=tuple(axes.values()))
            program = Compiled(name="step", text="\n".join(text), hardware=_hardware.parse("v5e:2x4"), axes=mesh)
            module = _hlo.read(program.text)
            assert isinstance(find(module, program, rows=rows(module, program, None)), tuple)


# ---- calls


def test_recompilation():
    plan = jp.plan(lambda: {"w": jnp.ones((8, 8))}, mesh(data=8), [jp.DP()])

    @plan.jit(on_recompile="allow")
    def step(params, batch):
        return jax.tree.map(lambda w: w - 0.1, params), (batch @ params["w"]).sum()

    params = plan.init()
    step(params, plan.batch(np.ones((16, 8), np.float32)))
    program = Compiled(name="step", text="", hardware=_hardware.parse("cpu:8"), axes=_hlo.mesh_axes(plan.mesh))
    assert find(_hlo.read(""), program, step=step) == ()

    step(params, plan.batch(np.ones((8, 8), np.float32)))
    finding = one(find(_hlo.read(""), program, step=step), "recompiled")
    assert "compiled 2 times, last because batch: float32[16, 8] before, float32[8, 8] now" in finding.reason
    assert "jp.data.pad_batch" in finding.remedy
    assert is_line_of(finding.place, test_recompilation)


@pytest.mark.parametrize("weak", [True, False])
def test_weakly_typed_state(plain, weak):
    scale, *others = plain.arguments
    program = dataclasses.replace(plain, arguments=(dataclasses.replace(scale, kind="optimizer", weak=weak), *others))
    assert ("weak-type" in kinds(find(_hlo.read(plain.text), program), above="none")) == weak


@pytest.mark.parametrize(("name", "is_met"), [("hidden", False), ("mlp", True)])
def test_a_dim_that_no_strategy_reads(plain, name, is_met):
    def make():
        rngs = nnx.Rngs(0)
        kernel_init = nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=("embed", name))
        return nnx.Linear(D, F, use_bias=False, kernel_init=kernel_init, rngs=rngs)

    plan = jp.plan(make, mesh(data=4, tensor=2), [jp.DP(), jp.TP(column=["*"]) if name == "hidden" else jp.TP()])
    found = find(_hlo.read(plain.text), plain, plan=plan)
    if is_met:
        assert found == ()
        return
    assert "'hidden' (1 leaves)" in one(found, "unmet-constraint").reason


@pytest.mark.libtpu
def test_a_program_for_hardware_that_is_elsewhere(tmp_path):
    """The compiler's complaints come from its own process, and what the program shows already is not said twice."""
    on = jp.mesh("v5e:2x4", fsdp=4, tensor=2)

    def step(params, batch):
        y = jax.lax.with_sharding_constraint(jnp.sin(batch) @ params, NamedSharding(on, P(None, "tensor")))
        return jax.lax.with_sharding_constraint(jnp.cos(y), NamedSharding(on, P("fsdp")))

    weights, rows = (
        jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=NamedSharding(on, spec))
        for spec in (P(None, "tensor"), P("fsdp"))
    )
    finding = one(explain(step, weights, rows, cache=tmp_path).findings, "full-rematerialisation")
    assert "f32[1024,1024] is gathered over 'tensor', 4.0 MiB on each device" in finding.reason
    assert is_line_of(finding.place, test_a_program_for_hardware_that_is_elsewhere)
    (log,) = tmp_path.glob("*/log")
    assert "Involuntary full rematerialization" in log.read_text()
