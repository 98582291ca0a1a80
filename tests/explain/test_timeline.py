"""What hides behind what, by hand: loops, pairs, asynchronous fusions, kernels, memories, and text that is broken."""

import pytest

from jaxpar import _hardware, _hlo
from jaxpar._hlo import MeshAxes
from jaxpar.explain._coefficients import coefficients
from jaxpar.explain._collectives import rows
from jaxpar.explain._compiled import Compiled
from jaxpar.explain._timeline import predict

KNOWN = coefficients()
PER_CYCLE = KNOWN.estimate / 1.5e9
"""Seconds of a cycle of v5e as the compiler estimates it, for what neither products nor bytes bound."""
GATHER = 2**24 * 255 / 256 / (4 * 50e9 * KNOWN.link) + 16 * KNOWN.hop
"""Seconds to gather 16 MiB over a whole v5e slice."""


def module(*lines, others=""):
    body = "\n".join(f"  {line}" for line in lines)
    return _hlo.read(
        f"HloModule m, is_scheduled=true, num_partitions=256\n\n{others}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    )


def compiled(target="v5e:16x16", **axes):
    axes = axes or {"fsdp": 256}
    return Compiled(
        name="step",
        text="",
        hardware=_hardware.parse(target),
        axes=MeshAxes(names=tuple(axes), sizes=tuple(axes.values())),
    )


def timeline(*lines, others="", **kwargs):
    found = predict(module(*lines, others=others), compiled(**kwargs))
    assert found is not None
    return found


def compute(name, cycles, operands="%p"):
    """An operation of which the compiler expects `cycles`, on scalars: nothing else bounds it."""
    return f"%{name} = f32[] fusion({operands}), kind=kLoop, calls=%f, {estimate(cycles)}"


def estimate(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


PARAMETER = "%p = f32[] parameter(0)"
SHARD = "%w = bf16[128,256]{1,0} parameter(1)"
GATHERED = "bf16[32768,256]{1,0}"
GROUPS = "channel_id=1, replica_groups=[1,256]<=[256], dimensions={0}"
INNER = "%f (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  ROOT %y = f32[] negate(%x)\n}\n"


def test_estimates_are_seconds_by_the_clock():
    got = timeline(PARAMETER, compute("a", 3_000_000), others=INNER)

    assert got.step_seconds == got.compute_seconds == pytest.approx(3_000_000 * PER_CYCLE)
    assert [(op.name, op.origin, op.count) for op in got.ops] == [("a", "cycles", 1)]
    assert got.exposed_communication_seconds == 0


def test_an_unknown_estimate_is_no_estimate():
    got = timeline(PARAMETER, compute("a", 2**64 - 1), others=INNER)

    assert [op.origin for op in got.ops] == ["roofline"]


def test_a_synchronous_collective_is_exposed_whole():
    got = timeline(SHARD, f"%g = {GATHERED} all-gather(%w), {GROUPS}", compute("a", 3_000_000), others=INNER)

    assert got.exposed[("main", "g")] == pytest.approx(GATHER)
    assert got.step_seconds == pytest.approx(GATHER + 3_000_000 * PER_CYCLE)
    assert got.communication_seconds == pytest.approx(GATHER)
    assert got.exposed_communication_seconds == pytest.approx(GATHER)


@pytest.mark.parametrize("hidden", [1.0, 0.25, 0.0])
def test_a_pair_is_exposed_by_what_is_left_of_it(hidden):
    cycles = round(hidden * GATHER / PER_CYCLE * (1.5 if hidden == 1.0 else 1.0))
    got = timeline(
        SHARD,
        f"%s = (bf16[128,256]{{1,0}}, {GATHERED}) all-gather-start(%w), {GROUPS}",
        *([compute("a", cycles)] if cycles else []),
        f"%g = {GATHERED} all-gather-done(%s)",
        others=INNER,
    )

    assert got.exposed[("main", "s")] == pytest.approx((1 - hidden) * GATHER, abs=1e-9)
    assert got.step_seconds == pytest.approx(max(GATHER, cycles * PER_CYCLE))
    assert got.communication_seconds == pytest.approx(GATHER)


def test_two_collectives_on_the_same_links_wait_for_one_another():
    pair = [f"%s{at} = (bf16[128,256]{{1,0}}, {GATHERED}) all-gather-start(%w), {GROUPS}" for at in (1, 2)]
    done = [f"%g{at} = {GATHERED} all-gather-done(%s{at})" for at in (1, 2)]
    got = timeline(SHARD, *pair, *done, others=INNER)

    assert got.step_seconds == pytest.approx(2 * GATHER)
    assert got.exposed == {("main", "s1"): pytest.approx(GATHER), ("main", "s2"): pytest.approx(GATHER)}


def test_two_collectives_on_different_sides_do_not():
    shard = "%w = bf16[2048,256]{1,0} parameter(1)"
    sides = ("[16,16]<=[256]", "[16,16]<=[16,16]T(1,0)")
    pair = [
        f"%s{at} = (bf16[2048,256]{{1,0}}, {GATHERED}) all-gather-start(%w), channel_id={at}, "
        f"replica_groups={side}, dimensions={{0}}"
        for at, side in enumerate(sides)
    ]
    done = [f"%g{at} = {GATHERED} all-gather-done(%s{at})" for at in (0, 1)]
    got = timeline(shard, *pair, *done, others=INNER, fsdp=16, tensor=16)

    assert got.step_seconds == pytest.approx(2**24 * 15 / 16 / (2 * 50e9 * KNOWN.link) + 8 * KNOWN.hop)


CONFIG = 'backend_config={{"async_collective_fusion_config":{{"flag_start":"{}","flag_end":"{}"}}}}'


def fused(name, start, end):
    return (
        f"%{name} (x: bf16[128,256]) -> {GATHERED} {{\n  %x = bf16[128,256]{{1,0}} parameter(0)\n"
        f"  ROOT %ag.{name} = {GATHERED} all-gather(%x), {GROUPS}, {CONFIG.format(start, end)}\n}}\n"
    )


@pytest.mark.parametrize("share", [2.0, 0.5])
def test_an_asynchronous_fusion_lasts_from_its_start_to_its_done(share):
    cycles = round(share * GATHER / PER_CYCLE)
    got = timeline(
        SHARD,
        f"%start = {GATHERED} fusion(%w), kind=kCustom, calls=%one",
        f"%through = {GATHERED} fusion(%w), kind=kOutput, calls=%two, {estimate(cycles)}",
        f"%done = {GATHERED} fusion(%w), kind=kCustom, calls=%three",
        others=fused("one", -1, -1) + fused("two", 2, 8) + fused("three", 2, 8),
    )

    assert got.exposed == {("one", "ag.one"): pytest.approx(max(0.0, 1 - share) * GATHER, abs=1e-9)}
    assert got.compute_seconds == pytest.approx(cycles * PER_CYCLE)


def loop(trips):
    return (
        INNER
        + "%body (c: (s32[], f32[])) -> (s32[], f32[]) {\n  %c = (s32[], f32[]) parameter(0)\n"
        + '  %w = bf16[128,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"\n'
        + f"  %g = {GATHERED} all-gather(%w), {GROUPS}\n"
        + f"  {compute('a', 300_000, '%c')}\n  ROOT %t = (s32[], f32[]) tuple(%a, %a)\n}}\n"
        + "%condition (d: (s32[], f32[])) -> pred[] {\n  %d = (s32[], f32[]) parameter(0)\n"
        + "  ROOT %k = pred[] constant(true)\n}\n",
        "%o = (s32[], f32[]) while(%p), condition=%condition, body=%body"
        + (f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips is not None else ""),
    )


@pytest.mark.parametrize("trips", [0, 1, 2, 32])
def test_loops_multiply(trips):
    others, line = loop(trips)
    found = module(PARAMETER, line, others=others)
    got = predict(found, compiled())
    assert got is not None

    assert got.compute_seconds == pytest.approx(trips * 300_000 * PER_CYCLE)
    assert got.exposed_communication_seconds == pytest.approx(trips * GATHER)
    assert got.step_seconds == pytest.approx(got.compute_seconds + got.exposed_communication_seconds)
    if trips:
        assert [(op.name, op.count) for op in got.ops] == [("a", trips)]
        assert [(event.lane, event.count) for event in got.events] == [("fsdp", trips), ("compute", trips)]
        assert sum(event.seconds for event in got.events) == pytest.approx(got.step_seconds)
        (row,) = rows(found, compiled(), got)
        assert (row.kind, row.count, row.depth, row.seconds) == ("all-gather", trips, 1, pytest.approx(GATHER))
        assert row.exposed_seconds == pytest.approx(trips * GATHER)


def test_a_loop_of_unknown_length_runs_once_and_says_so():
    others, line = loop(None)
    got = timeline(PARAMETER, line, others=others)

    assert got.compute_seconds == pytest.approx(300_000 * PER_CYCLE)
    assert any("how often this loop runs" in note for note in got.notes)


def test_of_branches_the_longest_is_taken_and_said():
    branch = "%{0} (x: f32[]) -> f32[] {{\n  %p = f32[] parameter(0)\n  {1}\n}}\n"
    got = timeline(
        PARAMETER,
        "%c = f32[] conditional(%p, %p, %p), branch_computations={%short, %long}",
        others=INNER + branch.format("short", compute("a", 100)) + branch.format("long", compute("b", 900)),
    )

    assert got.step_seconds == pytest.approx(900 * PER_CYCLE)
    assert any("longest" in note for note in got.notes)


def test_a_reduction_of_which_a_slice_is_kept_costs_the_wire_its_whole():
    """It is called a reduce-scatter, which it is to the program; the compiler runs an all-reduce."""
    lines = (
        f"%w = {GATHERED} parameter(1)",
        "%i = u32[] partition-id()",
        "%n = u32[] constant(128)",
        "%z = u32[] constant(0)",
        "%at = u32[] multiply(%i, %n)",
        f"%r = {GATHERED} all-reduce(%w), channel_id=1, replica_groups=[1,256]<=[256], to_apply=%f",
        "%s = bf16[128,256]{1,0} dynamic-slice(%r, %at, %z), dynamic_slice_sizes={128,256}",
    )
    found = module(*lines, others=INNER)
    got = predict(found, compiled())
    (row,) = rows(found, compiled(), got)

    assert (row.kind, row.spelling) == ("reduce-scatter", "all-reduce and slice")
    assert row.seconds == row.exposed_seconds == pytest.approx(2 * GATHER)


def test_copies_into_the_chip_hide_behind_computation_and_count_as_it():
    moved = "%s = (f32[4096,4096]{1,0:S(1)}, f32[4096,4096]{1,0}, u32[]) copy-start(%x)"
    lines = ("%x = f32[4096,4096]{1,0} parameter(1)", moved, "%c = f32[4096,4096]{1,0:S(1)} copy-done(%s)")
    chip = _hardware.parse("v5e:16x16").chip
    got = timeline(*lines)

    assert got.compute_seconds == got.step_seconds == pytest.approx(2**26 / (chip.hbm * KNOWN.memory))
    assert got.exposed_communication_seconds == 0


def test_copies_to_the_host_are_communication():
    moved = "%s = (f32[4096,4096]{1,0:S(5)}, f32[4096,4096]{1,0}, u32[]) copy-start(%x)"
    lines = ("%x = f32[4096,4096]{1,0} parameter(1)", moved, "%c = f32[4096,4096]{1,0:S(5)} copy-done(%s)")
    chip = _hardware.parse("v5e:16x16").chip
    got = timeline(*lines)

    assert got.exposed_communication_seconds == got.step_seconds == pytest.approx(2**26 / (chip.pcie * KNOWN.host))
    assert [event.lane for event in got.events] == ["to host"]


def test_a_part_brought_back_from_the_host_costs_that_part():
    started = (
        "%s = ((bf16[64,4096,256]{2,1,0:S(5)}, s32[]), bf16[1,4096,256]{2,1,0}, u32[]) dynamic-slice-start(%x, %i)"
    )
    lines = ("%x = bf16[64,4096,256]{2,1,0:S(5)} parameter(1)", "%i = s32[] parameter(2)", started)
    chip = _hardware.parse("v5e:16x16").chip
    got = timeline(*lines, "%d = bf16[1,4096,256]{2,1,0} dynamic-slice-done(%s)")

    assert got.exposed_communication_seconds == pytest.approx(2**21 / (chip.pcie * KNOWN.host))
    assert [event.lane for event in got.events] == ["from host"]


def test_slices_are_joined_by_what_send_and_recv_name():
    """Between slices a collective is a `send` to the runtime and a `recv` of the answer."""
    named = '_xla_host_transfer_rendezvous="a_0",_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f"is_host_transfer=true, frontend_attributes={{{named}}}"
    lines = (
        "%x = bf16[1024,1024]{1,0} parameter(1)",
        "%k = token[] after-all()",
        f"%s = (bf16[1024,1024]{{1,0}}, u32[], token[]) send(%x, %k), channel_id=2, {attributes}",
        f"%r = (bf16[1024,1024]{{1,0}}, u32[], token[]) recv(%k), channel_id=1, {attributes}",
        "%d = (bf16[1024,1024]{1,0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
    )
    axes = MeshAxes(names=("data", "fsdp"), sizes=(2, 256), slices=(0,) * 256 + (1,) * 256)
    two = Compiled(name="step", text="", hardware=_hardware.parse("2xv5e:16x16"), axes=axes)
    got = predict(module(*lines), two)
    assert got is not None

    expected = 2 * (2**21 / 2 / (two.hardware.chip.dcn * KNOWN.dcn) + KNOWN.dcn_hop)
    assert got.exposed == {("main", "s"): pytest.approx(expected)}
    (row,) = rows(module(*lines), two, got)
    assert (row.kind, row.axes, row.algorithm) == ("all-reduce", ("data",), "ring between 2 slices")


def test_a_product_is_no_faster_than_the_matrix_unit():
    """2^36 FLOPs on v5e at 0.95 of 197 TFLOP/s, though the compiler promises a thousand cycles."""
    product = f"%d = bf16[2048,4096]{{1,0}} convolution(%x, %y), dim_labels=bf_io->bf, {estimate(1000)}"
    got = timeline("%x = bf16[2048,4096]{1,0} parameter(1)", "%y = bf16[4096,4096]{1,0} parameter(2)", product)

    assert got.step_seconds == pytest.approx(2**36 / (197e12 * KNOWN.mxu))
    assert [op.origin for op in got.ops] == ["cycles"]


def test_what_no_pass_of_a_loop_waits_for_queues_and_ends_the_step():
    """Each pass sends for GATHER and computes for less; the program waits for what is left when all passes are done."""
    others, line = loop(32)
    pair = f"%g = (bf16[128,256]{{1,0}}, {GATHERED}) all-gather-start(%w), {GROUPS}"
    got = timeline(PARAMETER, line, others=others.replace(f"%g = {GATHERED} all-gather(%w), {GROUPS}", pair))
    computed = 32 * 300_000 * PER_CYCLE

    assert GATHER > 300_000 * PER_CYCLE
    assert got.compute_seconds == pytest.approx(computed)
    assert got.step_seconds == pytest.approx(32 * GATHER)
    assert got.exposed == {("body", "g"): pytest.approx(32 * GATHER - computed)}


def test_a_gpu_is_reckoned_by_a_roofline():
    dot = "%d = bf16[8192,8192]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    got = timeline("%x = bf16[8192,8192]{1,0} parameter(1)", dot, target="h100:1x8", fsdp=8)
    flops = 2 * 8192**3

    assert got.step_seconds == pytest.approx(flops / (989.4e12 * KNOWN.matmul) + KNOWN.launch)
    assert [(op.origin, op.flops) for op in got.ops] == [("roofline", flops)]


def test_no_speed_is_claimed_for_a_cpu():
    assert predict(module(PARAMETER, compute("a", 5), others=INNER), compiled("cpu:8", fsdp=8)) is None


MAIN = "HloModule m\n\nENTRY %main () -> f32[] {\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage\n{ } = )(",
        MAIN + "  %p = f32[] parameter(0)\n  %g = bf16[8] all-gath",
        MAIN + "  %g = bf16[8] all-gather(%nothing), replica_groups=?, dimensions={0}\n}\n",
        MAIN + "  %w = f32[] while(%x), body=%none, condition=%none\n  %d = f32[] warp-drive(%w)\n}\n",
        MAIN + "  %d = f32[] all-gather-done(%s)\n  %c = f32[] copy-done(%q)\n}\n",
    ],
)
def test_broken_text_is_no_exception(text):
    found = _hlo.read(text)
    got = predict(found, compiled())

    assert got is None or got.step_seconds >= 0
    assert isinstance(rows(found, compiled(), got), tuple)


def test_a_program_of_one_device_without_loops_or_collectives():
    got = timeline(PARAMETER, compute("a", 1500), others=INNER, target="v5e:1x1", data=1)

    assert got.step_seconds == pytest.approx(1500 * PER_CYCLE)
    assert got.low <= got.step_seconds <= got.high
    assert got.communication_seconds == 0
