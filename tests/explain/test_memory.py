"""Memory of programs, by hand: layouts, what shares a place, what is held at the fullest moment and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from jaxpar import _hardware, _hlo
from jaxpar.explain._compiled import Argument, Compiled, MemoryStats
from jaxpar.explain._compiler import memory_stats
from jaxpar.explain._liveness import liveness
from jaxpar.explain._memory import _Reasons, by_kind, from_arguments, memory

KIB = 1024


@pytest.mark.parametrize(
    ("written", "num_bytes", "space"),
    [
        ("f32[3,5]{1,0}", 60, 0),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4, 0),
        ("f32[3,5]{0,1:T(8,128)}", 8 * 128 * 4, 0),
        ("f32[300,9]{0,1:T(8,128)}", 384 * 16 * 4, 0),  # the minor dim is 300
        ("bf16[2,16,130]{2,1,0:T(8,128)(2,1)}", 2 * 16 * 256 * 2, 0),
        ("f32[4096]{0:T(1024)}", 4096 * 4, 0),
        ("u32[]{:T(128)}", 512, 0),
        ("s4[10]{0:E(4)}", 5, 0),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2 * KIB, 1),
        ("f32[1024]{0:T(1024)S(5)}", 4 * KIB, 5),
        ("token[]", 0, 0),
    ],
)
def test_layouts(written, num_bytes, space):
    (leaf,) = _hlo.tree_of(written).leaves
    assert (leaf.bytes, leaf.space) == (num_bytes, space)


def test_trees_of_tuples():
    tree = _hlo.tree_of("((f32[2]{0}, /*index=1*/f32[3]{0:T(128)}), u32[]{:S(2)}, (f32[4]{0}))")
    assert [leaf.shape.dims for leaf in tree.leaves] == [(2,), (3,), (), (4,)]
    assert [list(tree.range_of(index)) for index in range(4)] == [[0, 1], [2], [3], []]


def module(body, *computations, header=""):
    lines = "\n".join(f"  {line}" for line in body)
    return _hlo.read(
        f"HloModule m, is_scheduled=true, {header}entry_computation_layout={{}}\n\n"
        + "".join(f"{each}\n\n" for each in computations)
        + f"ENTRY %main () -> f32[] {{\n{lines}\n}}\n"
    )


def held_most(read):
    return max(total for _, total in liveness(read).curve((0,)))


def test_a_value_lives_to_its_last_use():
    """Three values of 4 KiB beside the argument, of which two live at once: `exp` takes the place of what it reads."""
    read = module([
        "%x = f32[1024]{0} parameter(0)",
        "%a = f32[1024]{0} reverse(%x), dimensions={0}",
        "%b = f32[1024]{0} exponential(%a)",
        "%c = f32[1024]{0} reverse(%b), dimensions={0}",
        "ROOT %d = f32[1024]{0} negate(%c)",
    ])  # fmt: skip
    assert held_most(read) == 3 * 4 * KIB


def test_an_operand_that_is_read_again_keeps_its_place():
    read = module([
        "%x = f32[1024]{0} parameter(0)",
        "%a = f32[1024]{0} reverse(%x), dimensions={0}",
        "%b = f32[1024]{0} exponential(%a)",
        "%c = f32[1024]{0} add(%a, %b)",
        "ROOT %d = f32[1024]{0} reverse(%c), dimensions={0}",
    ])  # fmt: skip
    assert held_most(read) == 3 * 4 * KIB  # x, a with c in its place, and b, then d


def test_a_donated_argument_holds_the_result():
    body = [
        "%x = f32[1024]{0} parameter(0)",
        "%a = f32[1024]{0} negate(%x)",
        "ROOT %t = (f32[1024]{0}) tuple(%a)",
    ]
    assert held_most(module(body)) == 2 * 4 * KIB
    assert held_most(module(body, header="input_output_alias={ {0}: (0, {}, may-alias) }, ")) == 4 * KIB


def test_a_donated_argument_lends_its_place_until_its_next_value_is_made():
    """`b` lies where `x` was, which `a` reads for the last time, and `d` will be."""
    body = [
        "%x = f32[1024]{0} parameter(0)",
        "%a = f32[1024]{0} reverse(%x), dimensions={0}",
        "%b = f32[1024]{0} reverse(%a), dimensions={0}",
        "%c = f32[1024]{0} reverse(%b), dimensions={0}",
        "%d = f32[1024]{0} reverse(%c), dimensions={0}",
        "ROOT %t = (f32[1024]{0}) tuple(%d)",
    ]
    donated = "input_output_alias={ {0}: (0, {}, may-alias) }, "
    assert held_most(module(body)) == 3 * 4 * KIB
    assert held_most(module(body, header=donated)) == 2 * 4 * KIB

    body[4] = "%d = f32[1024]{0} add(%c, %x)"
    assert held_most(module(body, header=donated)) == 3 * 4 * KIB  # `x` is still to be read


LOOP = """%body (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[1024]{0} get-tuple-element(%p), index=1
  %w = f32[1024]{0} reverse(%v), dimensions={0}
  %u = f32[2048]{0} concatenate(%w, %v), dimensions={0}
  %z = f32[1024]{0} slice(%u), slice={[0:1024]}
  ROOT %r = (s32[], f32[1024]{0}) tuple(%i, %z)
}

%condition (p: (s32[], f32[1024])) -> pred[] {
  %p = (s32[], f32[1024]{0}) parameter(0)
  ROOT %never = pred[] constant(false)
}"""


def test_a_loop_holds_its_carry_and_the_fullest_moment_of_its_body():
    read = module(
        [
            "%x = f32[1024]{0} parameter(0)",
            "%n = s32[] constant(0)",
            "%v = f32[1024]{0} reverse(%x), dimensions={0}",
            "%t = (s32[], f32[1024]{0}) tuple(%n, %v)",
            "%w = (s32[], f32[1024]{0}) while(%t), condition=%condition, body=%body",
            "ROOT %o = f32[1024]{0} get-tuple-element(%w), index=1",
        ],
        LOOP,
    )
    assert held_most(read) == (4 + 4 + 4 + 8) * KIB  # x, the carry, and inside w and u


def test_the_halves_of_an_asynchronous_copy_are_one_place():
    read = module([
        "%x = f32[1024]{0} parameter(0)",
        "%s = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[1024]{0:S(1)} copy-done(%s)",
        "%g = (f32[1024]{0:S(1)}, f32[4096]{0}) all-gather-start(%d), dimensions={0}",
        "%h = f32[4096]{0} all-gather-done(%g)",
        "ROOT %o = f32[4096]{0} negate(%h)",
    ])  # fmt: skip
    live = liveness(read)
    assert max(total for _, total in live.curve((0,))) == (4 + 16) * KIB
    assert max(total for _, total in live.curve((1,))) == 4 * KIB


def test_an_update_in_place_takes_no_memory():
    read = module([
        "%x = f32[1024]{0} parameter(0)",
        "%i = s32[] constant(0)",
        "%a = f32[8192]{0} broadcast(%i), dimensions={}",
        "%b = f32[8192]{0} dynamic-update-slice(%a, %x, %i)",
        "ROOT %c = f32[8192]{0} dynamic-update-slice(%b, %x, %i)",
    ])  # fmt: skip
    assert held_most(read) == (4 + 32) * KIB


def test_of_two_branches_the_fuller_counts():
    branches = [
        f"%{name} (p: f32[1024]) -> f32[1024] {{\n"
        "  %p = f32[1024]{0} parameter(0)\n"
        f"  %big = f32[{size}]{{0}} pad(%p, %p), padding=0_0\n"
        "  ROOT %o = f32[1024]{0} slice(%big), slice={[0:1024]}\n}"
        for name, size in (("one", 2048), ("two", 4096))
    ]
    read = module(
        [
            "%x = f32[1024]{0} parameter(0)",
            "%c = s32[] parameter(1)",
            "ROOT %o = f32[1024]{0} conditional(%c, %x, %x), branch_computations={%one, %two}",
        ],
        *branches,
    )
    assert held_most(read) == 4 + (4 + 16 + 4) * KIB  # the scalar, x, and in the second branch its two


# A compiled step.


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(256, 1024, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(1024, 256, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.sin(self.up(x)))


@pytest.fixture(scope="module")
def step():
    """One step of a layer under DP by plain gradient descent, on 8 CPU devices: (Compiled, its module)."""
    mesh = jp.mesh(data=8)
    plan = jp.plan(lambda: Model(rngs=nnx.Rngs(0)), mesh, [jp.DP()])
    model = plan.init()

    @plan.jit
    def train_step(model, x):
        loss, grads = nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
        return loss

    compiled = train_step.lower(model, plan.batch(np.ones((1024, 256), np.float32))).compile()
    matrix = 256 * 1024 * 4
    arguments = (
        Argument(path="down.kernel", kind="parameter", shape=(1024, 256), dtype="float32", bytes=matrix, donated=True),
        Argument(path="up.kernel", kind="parameter", shape=(256, 1024), dtype="float32", bytes=matrix, donated=True),
        Argument(path="x", kind="batch", shape=(1024, 256), dtype="float32", bytes=128 * 256 * 4),
    )
    found = Compiled(
        name="train_step",
        text=compiled.as_text(),
        hardware=_hardware.parse("cpu:8"),
        axes=_hlo.mesh_axes(mesh),
        memory=memory_stats(compiled.memory_analysis()),
        arguments=arguments,
    )
    return found, _hlo.read(found.text)


def test_a_step_is_accounted_for(step):
    """At the sum of the gradients nothing else is left but a few scalars."""
    compiled, read = step
    found = memory(read, compiled)
    kinds = by_kind(found)
    matrix = 256 * 1024 * 4

    assert kinds["parameter"] == 2 * matrix
    assert kinds["batch"] == 128 * 256 * 4
    assert {row.path for row in found.held if row.kind == "parameter"} == {"up.kernel", "down.kernel"}
    assert kinds["gradient"] == 4 * matrix  # both, each before and after the sum: XLA:CPU does not sum in place
    assert sum(kinds.values()) == found.peak
    assert abs(kinds.get("unattributed", 0)) < 0.001 * found.peak


def test_totals_are_the_compilers_own(step):
    compiled, read = step
    stats, found = compiled.memory, memory(read, compiled)
    assert (found.argument, found.output, found.temporary, found.alias, found.code) == (
        stats.argument,
        stats.output,
        stats.temporary,
        stats.alias,
        stats.code,
    )
    assert found.peak == stats.argument + stats.output - stats.alias + stats.temporary  # XLA:CPU's leaves the last out
    assert stats.argument == sum(each.bytes for each in compiled.arguments)


def test_without_arguments_their_names_tell(step):
    """A text alone: parameters are what is donated, the batch what is not."""
    compiled, read = step
    alone = Compiled(name="f", text=compiled.text, hardware=compiled.hardware, axes=compiled.axes)
    kinds = by_kind(memory(read, alone))
    assert kinds["parameter"] == 2 * 256 * 1024 * 4
    assert "unattributed" not in kinds


REFUSAL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_type="dot_general" op_name="jit(f)/jvp(blocks)/while/body/each/attn/dot_general" source_line=3
     Shape: bf16[4,32,32768,1024]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: f32[128,1048576]{1,0:T(8,128)}
     Unpadded size: 512.0M
     Allocation type: entry parameter
     ==========================
"""


def test_a_refused_program_is_told_by_its_arguments_and_the_refusal():
    gib = 2**30
    compiled = Compiled(
        name="f",
        text="",
        hardware=_hardware.parse("v5e:2x4"),
        axes=_hlo.MeshAxes(names=("fsdp",), sizes=(8,)),
        arguments=(
            Argument(path="blocks.each.attn.q.kernel", kind="parameter", shape=(8, 8), dtype="float32", bytes=gib),
            Argument(
                path="mu.blocks.each.attn.q.kernel", kind="optimizer", shape=(8, 8), dtype="float32", bytes=2 * gib
            ),
        ),
        refusal=REFUSAL,
        needed=20 * gib,
    )
    found = memory(_hlo.read(""), compiled)
    assert found == from_arguments(compiled)
    assert [(row.kind, row.path, row.bytes) for row in found.held] == [
        ("parameter", "blocks.each.attn.q.kernel", gib),
        ("optimizer", "mu.blocks.each.attn.q.kernel", 2 * gib),
        ("temporary", "blocks.each.attn", 8 * gib),
        ("unattributed", "", 9 * gib),
    ]
    assert (found.peak, found.argument, found.origin) == (20 * gib, 3 * gib, "estimate")


def test_a_refusal_of_one_line_leaves_the_rest_open():
    said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.80G) exceeds available HBM (15.75G)."
    compiled = Compiled(
        name="f",
        text="",
        hardware=_hardware.parse("v5e:2x4"),
        axes=_hlo.MeshAxes(names=(), sizes=()),
        refusal=said,
        needed=5,
    )
    assert by_kind(from_arguments(compiled)) == {"unattributed": 5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HloModule",
        "\x00(((\n}",
        "HloModule m\n\nENTRY %e {\n  %a = (f32[2]{0}, f32[3 parameter(0)\n  ROOT %w = f32[2] while(%a), body=%e\n}\n",
        "HloModule m\n\nENTRY %e {\n  ROOT %g = f32[2]{0} get-tuple-element(%missing), index=7\n",
        "HloModule m\n\nENTRY %e {\n  %f = f32[2]{0:T(0,x)S()} fusion(%f), calls=%e\n}\n",
        "HloModule m, input_output_alias={ {9}: (3, {4}) }\n\nENTRY %e {\n  ROOT %t = () tuple()\n}\n",
    ],
)
def test_garbage_is_unattributed(text):
    stats = MemoryStats(argument=1, output=0, temporary=2, alias=0, code=0, peak=3)
    compiled = Compiled(
        name="f",
        text=text,
        hardware=_hardware.parse("v5e:2x4"),
        axes=_hlo.MeshAxes(names=("a",), sizes=(8,)),
        memory=stats,
    )
    found = memory(_hlo.read(text), compiled)
    assert found.peak == 3
    assert sum(row.bytes for row in found.held) == 3


def test_an_activation_is_what_the_backward_pass_reads(step):
    """The input of the sine, that of the second product, and the result, whose square is the loss."""
    compiled, read = step
    live = liveness(read, platform="cpu")
    reasons = _Reasons(read, compiled, live)
    saved = [row for buffer in live.buffers if (row := reasons.held(buffer)).kind == "activation"]
    shapes = sorted(row.shape for row in saved if row.bytes > KIB)
    assert shapes == ["f32[128,1024]", "f32[128,1024]", "f32[128,256]"]
    assert {row.source.split(":")[0] for row in saved if row.bytes > KIB} == {"tests/explain/test_memory.py"}
