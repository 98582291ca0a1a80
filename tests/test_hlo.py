"""Reading HLO text: every notation of groups, loops, asynchronous pairs, reduce-scatter in disguise, and garbage.

Texts are literal, or lie in `data/hlo`: compiled once for v5e 2x4 (one of them for two slices) and for H100s, stripped
of what is not read, so that no TPU or GPU compiler is needed here. `tests/testing/test_traffic.py` compiles programs.
"""

import pathlib
import random

import pytest

from jaxpar import _hlo
from jaxpar._hlo._text import short_file

DATA = pathlib.Path(__file__).parent / "data" / "hlo"
MESH = _hlo.MeshAxes(names=("fsdp", "tensor"), sizes=(4, 2))
CUBE = _hlo.MeshAxes(names=("data", "fsdp", "tensor"), sizes=(2, 2, 2))


def found(text, mesh=MESH):
    """What each collective does, over which axes, how often, at which loop depth."""
    module = _hlo.read(text)
    assert module.unread == ()
    return [(each.kind, each.axes, each.count, each.depth) for each in module.collectives(mesh)]


ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
"""


def entry(*lines, header="HloModule test, num_partitions=8"):
    body = "\n".join(f"  {line}" for line in lines)
    return f"{header}\n\n{ADD}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def reduced(groups):
    return entry(
        "%p = f32[8]{0} parameter(0)",
        f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add",
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", ("fsdp",)),
        ("{{1,3,5,7},{0,2,4,6}}", ("fsdp",)),
        ("{{6,4,2,0},{1,3,5,7}}", ("fsdp",)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,1,2,3,4,5,6,7}}", ("fsdp", "tensor")),
        ("{}", ("fsdp", "tensor")),
        ("[2,4]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[1,8]<=[8]", ("fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("fsdp",)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ("tensor",)),
        ("mesh['x'=4,'y'=2] {'x','y'}", ("fsdp", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("tensor",)),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("fsdp",)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("fsdp[2/4]",)),
        ("{{0,2},{4,6},{1,3},{5,7}}", ("fsdp[2/4]",)),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),
        ("{{0,1},{2,4},{3,5},{6,7}}", ("?",)),
        ("{{8,9},{10,11}}", ("?",)),
    ],
)
def test_groups_become_axes(groups, axes):
    assert found(reduced(groups)) == [("all-reduce", axes, 1, 0)]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['a'=2,'b'=2,'c'=2] {'a'}", ("data",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor")),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", ("data", "tensor")),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("data",)),
        ("{{0,2},{4,6},{1,3},{5,7}}", ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
    ],
)
def test_groups_on_three_axes(groups, axes):
    assert found(reduced(groups), CUBE) == [("all-reduce", axes, 1, 0)]


def test_groups_of_one_are_left_out():
    assert found(reduced("{{0},{1},{2},{3},{4},{5},{6},{7}}")) == []
    assert found(reduced("[8,1]<=[8]")) == []
    assert found(reduced("[4,2]<=[8]")) != []


@pytest.mark.parametrize("groups", ["mesh['a'=2] {'b'}", "[4,2]<=[9]", "{{0,1},{2}}", "sometime=else"])
def test_unknown_groups_are_listed(groups):
    module = _hlo.read(reduced(groups))
    assert "replica groups in an unknown notation" in module.unread[0]
    assert [each.axes for each in module.collectives(MESH)] == [("?",)]


def test_groups_on_2048_devices():
    mesh = _hlo.MeshAxes(names=("data", "fsdp", "tensor"), sizes=(4, 256, 2))
    assert found(reduced("[8,256]<=[4,256,2]T(0,2,1)"), mesh) == [("all-reduce", ("fsdp",), 1, 0)]
    explicit = "{" + ",".join("{" + ",".join(str(i + 2 * j) for j in range(1024)) + "}" for i in range(2)) + "}"
    assert found(reduced(explicit), mesh) == [("all-reduce", ("data", "fsdp"), 1, 0)]


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", [("fsdp",)]),
        ("{{0,2},{1,3}}", [("fsdp",)]),
        ("{{0,1},{1,0}}", [("tensor",)]),
        ("{{0,0},{1,2},{2,1},{3,3}}", [("fsdp", "tensor")]),
        ("{{0,0},{1,1}}", []),
        ("{}", []),
    ],
)
def test_permutes_move_along_axes(pairs, axes):
    text = entry(
        "%p = f32[8]{0} parameter(0)", f"ROOT %r = f32[8]{{0}} collective-permute(%p), source_target_pairs={pairs}"
    )
    assert [each.axes for each in _hlo.read(text).collectives(MESH)] == axes


# Payload: what `bytes` and `shape` mean, for each kind.

GROUPS = "replica_groups=[2,4]<=[4,2]T(1,0)"


@pytest.mark.parametrize(
    ("op", "kind", "shape", "size"),
    [
        (f"f32[16,4] all-gather(%p), {GROUPS}, dimensions={{0}}", "all-gather", (16, 4), 256),
        (f"f32[4,16] all-gather(%p), {GROUPS}, dimensions={{1}}", "all-gather", (4, 16), 256),
        (f"f32[1,4] reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add", "reduce-scatter", (4, 4), 64),
        (f"f32[4,4] all-reduce(%p), {GROUPS}, to_apply=%add", "all-reduce", (4, 4), 64),
        (f"f32[4,4] all-to-all(%p), {GROUPS}, dimensions={{0}}", "all-to-all", (4, 4), 64),
        ("f32[4,4] collective-permute(%p), source_target_pairs={{0,2}}", "collective-permute", (4, 4), 64),
        (f"f32[4,4] collective-broadcast(%p), {GROUPS}", "collective-broadcast", (4, 4), 64),
        (f"(f32[1,4], f32[1,4]) all-to-all(%q, %q), {GROUPS}", "all-to-all", (2, 1, 4), 32),
    ],
)
def test_payload(op, kind, shape, size):
    text = entry("%p = f32[4,4]{1,0} parameter(0)", "%q = f32[1,4]{1,0} parameter(1)", f"ROOT %r = {op}")
    [each] = _hlo.read(text).collectives(MESH)
    assert (each.kind, each.shape, each.bytes, each.dtype) == (kind, shape, size, "f32")


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("pred", 8), ("c64", 64)])
def test_bytes_follow_the_dtype(dtype, size):
    text = reduced("{}").replace("f32[8]", f"{dtype}[8]")
    assert [each.bytes for each in _hlo.read(text).collectives(MESH)] == [size]


def test_operands_may_carry_their_types():
    text = reduced("{}").replace("all-reduce(%p)", "all-reduce(f32[8]{0:T(256)} %p)").replace("%", "")
    assert [(each.shape, each.bytes) for each in _hlo.read(text).collectives(MESH)] == [((8,), 32)]


def test_combined_collectives_are_one_round_of_several_tensors():
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        "%q = bf16[4]{0} parameter(1)",
        "%r = (f32[8]{0}, /*index=1*/bf16[4]{0}) all-reduce(%p, /*index=1*/%q), channel_id=7, replica_groups={}",
        "ROOT %g = f32[8]{0} get-tuple-element(%r), index=0",
    )
    both = _hlo.read(text).collectives(MESH)
    assert [(each.shape, each.dtype, each.bytes) for each in both] == [((8,), "f32", 32), ((4,), "bf16", 8)]
    assert {(each.name, each.channel) for each in both} == {("r", 7)}


# Asynchronous spellings.


def test_start_and_done_are_one():
    text = entry(
        "%p = f32[4]{0} parameter(0)",
        f"%s = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(%p), {GROUPS}, dimensions={{0}}",
        "%d = f32[16]{0} all-gather-done(%s)",
        f"%a = f32[16]{{0}} all-reduce-start(%d), {GROUPS}, to_apply=%add",
        "ROOT %r = f32[16]{0} all-reduce-done(%a)",
    )
    assert found(text) == [("all-gather", ("fsdp",), 1, 0), ("all-reduce", ("fsdp",), 1, 0)]
    gathered, reduced_ = _hlo.read(text).collectives(MESH)
    assert (gathered.bytes, gathered.spelling, reduced_.bytes) == (64, "all-gather-start", 64)


@pytest.mark.parametrize(
    ("start", "done"),
    [("async-start(%p), calls=", "async-done(%s), calls=%wrapped"), ("call-start(%p), to_apply=", "call-done(%s)")],
    ids=["GPU", "a SparseCore of TPU 7x"],
)
def test_wrapped_in_an_async_computation(start, done):
    text = entry(
        "%p = f32[16]{0} parameter(0)",
        f"%s = ((f32[16]{{0}}), f32[4]{{0}}) {start}%wrapped",
        f"ROOT %d = f32[4]{{0}} {done}",
    ).replace(
        "ENTRY",
        f"%wrapped (x: f32[16]) -> f32[4] {{\n  %x = f32[16]{{0}} parameter(0)\n"
        f"  ROOT %rs = f32[4]{{0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%add\n}}\n\nENTRY",
    )
    assert found(text) == [("reduce-scatter", ("fsdp",), 1, 0)]


def test_a_gather_that_a_sparse_core_does():
    """An all-reduce, in another computation, of zeros with a piece in them."""
    text = entry(
        "%p = f32[4]{0} parameter(0)",
        "%none = f32[] constant(0)",
        "%zeros = f32[16]{0} broadcast(%none), dimensions={}",
        *offset_of("{0, 0, 2, 2, 4, 4, 6, 6}"),
        "%put = f32[16]{0} dynamic-update-slice(%zeros, %p, %offset)",
        "%s = ((f32[16]{0}), f32[16]{0}) call-start(%put), to_apply=%wrapped",
        "ROOT %d = f32[16]{0} call-done(%s)",
    ).replace(
        "ENTRY",
        f"%wrapped (x: f32[16]) -> f32[16] {{\n  %x = f32[16]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[16]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add\n}}\n\nENTRY",
    )
    (gathered,) = _hlo.read(text).collectives(MESH)
    assert (gathered.kind, gathered.axes, gathered.bytes) == ("all-gather", ("fsdp",), 64)


def test_a_permute_that_was_taken_apart():
    pairs = "channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,2},{2,4}}}"
    text = entry(
        "%p = f32[4]{0} parameter(0)",
        "%t = token[] after-all()",
        f"%s = (f32[4]{{0}}, u32[], token[]) send(%p, %t), {pairs}",
        f"%r = (f32[4]{{0}}, u32[], token[]) recv(%t), {pairs}",
        "ROOT %d = (f32[4]{0}, token[]) recv-done(%r)",
    )
    assert found(text) == [("collective-permute", ("fsdp",), 1, 0)]


# Loops, branches, calls.


def loop(condition, body="%next = s32[] add(%i, %one)", start=0, config=""):
    """A while over `(s32[], f32[8])` that all-reduces in its body."""
    return f"""HloModule test, num_partitions=8

{ADD}
%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %n = s32[] constant(10)
  ROOT %less = pred[] {condition}
}}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{{0}} get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %three = s32[] constant(3)
  {body}
  %r = f32[8]{{0}} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %r)
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %init = (s32[], f32[8]{{0}}) tuple(%copied, %p)
  %w = (s32[], f32[8]{{0}}) while(%init), condition=%condition, body=%body{config}
  ROOT %g = f32[8]{{0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop("compare(%i, %n), direction=LT"), 10),
        (loop("compare(%i, %n), direction=LE"), 11),
        (loop("compare(%n, %i), direction=GT"), 10),
        (loop("compare(%i, %n), direction=NE"), 10),
        (loop("compare(%i, %n), direction=LT", start=4), 6),
        (loop("compare(%i, %n), direction=LT", start=12), 0),
        (loop("compare(%i, %n), direction=LT", body="%next = s32[] add(%three, %i)"), 4),
        (loop("compare(%i, %one), direction=GE", body="%next = s32[] subtract(%i, %one)", start=5), 5),
        (loop("compare(%i, %n), direction=GT", body="%next = s32[] subtract(%i, %three)", start=20), 4),
        (loop("nonsense(%i)", config=', backend_config={"known_trip_count":{"n":"7"},"x":{}}'), 7),
        (loop("compare(%i, %n), direction=LT", config=', backend_config={"known_trip_count":{"n":"7"}}'), 7),
        # Not a plain counter: the step is not constant, the counter runs away, the bound is data.
        (loop("compare(%i, %n), direction=LT", body="%next = s32[] multiply(%i, %three)"), None),
        (loop("compare(%i, %n), direction=LT", body="%next = s32[] subtract(%i, %one)"), None),
        (loop("compare(%n, %n), direction=LT"), None),
        (loop("and(%i, %n)"), None),
    ],
)
def test_trip_counts(text, trips):
    module = _hlo.read(text)
    assert [each.trips for each in module.loops()] == [trips]
    assert [(each.count, each.depth) for each in module.collectives(MESH)] == [(trips, 1)]


def test_a_bound_carried_through_the_loop():
    """XLA hoists the bound into the loop's tuple, and hands it on unchanged."""
    text = loop("compare(%i, %bound), direction=LT")
    text = text.replace("(s32[], f32[8]{0})", "(s32[], f32[8]{0}, s32[])")
    text = text.replace("  %n = s32[] constant(10)\n", "  %bound = s32[] get-tuple-element(%c), index=2\n")
    text = text.replace("tuple(%next, %r)", "tuple(%next, %r, %kept)").replace(
        "tuple(%copied, %p)", "tuple(%copied, %p, %n)"
    )
    text = text.replace("  %three", "  %kept = s32[] get-tuple-element(%b), index=2\n  %three")
    text = text.replace("  %start", "  %n = s32[] constant(6)\n  %start")
    assert [each.trips for each in _hlo.read(text).loops()] == [6]
    changed = text.replace("tuple(%next, %r, %kept)", "tuple(%next, %r, %next)")
    assert [each.trips for each in _hlo.read(changed).loops()] == [None]


def test_branches_and_calls_are_entered():
    body = """(x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add
}

"""
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%one = f32[8]{0} call(%p), to_apply=%called",
        "%two = f32[8]{0} call(%one), to_apply=%called",
        "ROOT %c = f32[8]{0} conditional(%i, %two, %two), branch_computations={%no, %yes}",
    ).replace(
        "ENTRY",
        "%called "
        + body.replace("%r", "%r0").replace("GROUPS", "{}")
        + "%no "
        + body.replace("%r", "%r1").replace("GROUPS", "[4,2]<=[8]")
        + "%yes "
        + body.replace("%r", "%r2").replace("GROUPS", "[2,4]<=[4,2]T(1,0)")
        + "ENTRY",
    )
    found_ = _hlo.read(text).collectives(MESH)
    assert [(each.axes, each.count, each.conditional) for each in found_] == [
        (("fsdp", "tensor"), 2, False),
        (("tensor",), 1, True),
        (("fsdp",), 1, True),
    ]
    old = text.replace("branch_computations={%no, %yes}", "true_computation=%yes, false_computation=%no")
    assert sorted(each.name for each in _hlo.read(old).collectives(MESH)) == ["r0", "r1", "r2"]


# Reduce-scatter, spelt as an all-reduce and a slice.


def offset_of(table):
    """Twice what a table has for this partition."""
    return (
        "%id = u32[] partition-id()",
        f"%table = u32[8]{{0}} constant({table})",
        "%row = u32[1]{0} dynamic-slice(%table, %id), dynamic_slice_sizes={1}",
        "%scalar = u32[] reshape(%row)",
        "%two = u32[] constant(2)",
        "%zero = u32[] constant(0)",
        "%offset = u32[] multiply(%scalar, %two)",
    )


def sliced(*after, table="{0, 0, 1, 1, 2, 2, 3, 3}", rows=8, groups="[2,4]<=[4,2]T(1,0)"):
    """An all-reduce over fsdp of f32[rows,2] and an offset from a table by partition."""
    return entry(
        f"%p = f32[{rows},2]{{1,0}} parameter(0)",
        *offset_of(table),
        "%counter = u32[] parameter(1)",
        f"%r = f32[{rows},2]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add",
        *after,
    )


SLICE = "ROOT %s = f32[2,2]{1,0} dynamic-slice(%r, %offset, %zero), dynamic_slice_sizes={2,2}"


@pytest.mark.parametrize(
    "after",
    [
        (SLICE,),
        ("%c = f32[8,2]{0,1} copy(%r)", SLICE.replace("%r,", "%c,")),
        ("%n = f32[8,2]{1,0} multiply(%r, %p)", SLICE.replace("%r,", "%n,")),
        ("%t = f32[2,8]{1,0} transpose(%r), dimensions={1,0}",
         "ROOT %s = f32[2,2] dynamic-slice(%t, %zero, %offset), dynamic_slice_sizes={2,2}"),
        ("%u = (f32[8,2]) tuple(%r)", "%g = f32[8,2] get-tuple-element(%u), index=0", SLICE.replace("%r,", "%g,")),
        (SLICE.replace("ROOT ", ""), SLICE.replace("%s", "%s2")),
        # a part of the own part: what is left is another axis's to keep
        ("ROOT %s = f32[1,2]{1,0} dynamic-slice(%r, %offset, %zero), dynamic_slice_sizes={1,2}",),
    ],
)  # fmt: skip
def test_reduce_scatter_as_all_reduce_and_slice(after):
    [each] = _hlo.read(sliced(*after)).collectives(MESH)
    assert (each.kind, each.axes, each.shape, each.spelling) == (
        "reduce-scatter",
        ("fsdp",),
        (8, 2),
        "all-reduce and slice",
    )


@pytest.mark.parametrize(
    "text",
    [
        sliced(SLICE.replace("ROOT ", ""), "ROOT %also = f32[8,2]{1,0} negate(%r)"),  # someone uses it all
        sliced("ROOT %all = f32[8,2]{1,0} copy(%r)"),
        sliced(SLICE.replace("%offset", "%zero")),  # every device keeps the first rows
        sliced(SLICE.replace("%offset", "%counter")),  # a slice by data, not by device
        sliced(SLICE, table="{0, 0, 0, 0, 1, 1, 1, 1}"),  # two devices of a group keep the same rows
        sliced(SLICE, groups="[4,2]<=[8]"),  # reduced over tensor, kept by fsdp: the tensor pair keeps the same
        sliced("ROOT %s = f32[2,2]{1,0} slice(%r), slice={[0:2], [0:2]}"),
        sliced("%w = f32[8,2,2] broadcast(%r), dimensions={0,1}",
               "ROOT %s = f32[2,2,2] dynamic-slice(%w, %offset, %zero, %zero), dynamic_slice_sizes={2,2,2}"),
        sliced("ROOT %s = f32[4,2]{1,0} dynamic-slice(%r, %offset, %zero), dynamic_slice_sizes={4,2}"),  # too much
    ],
)  # fmt: skip
def test_an_all_reduce_stays_one(text):
    assert [each.kind for each in _hlo.read(text).collectives(MESH)] == ["all-reduce"]


def test_a_table_that_the_text_elides():
    """XLA writes `{...}` for long constants: then sizes and a dependence on the device decide."""
    assert [each.kind for each in _hlo.read(sliced(SLICE, table="{...}")).collectives(MESH)] == ["reduce-scatter"]
    wide = sliced(SLICE.replace("[2,2]", "[1,2]").replace("{2,2}", "{1,2}"), table="{...}")
    assert [each.kind for each in _hlo.read(wide).collectives(MESH)] == ["all-reduce"]


def test_one_of_two_combined_is_scattered():
    text = entry(
        "%p = f32[8,2]{1,0} parameter(0)",
        "%id = u32[] partition-id()",
        "%zero = u32[] constant(0)",
        "%r = (f32[8,2], f32[8,2]) all-reduce(%p, %p), replica_groups={}, to_apply=%add",
        "%a = f32[8,2] get-tuple-element(%r), index=0",
        "%b = f32[8,2] get-tuple-element(%r), index=1",
        "%s = f32[1,2] dynamic-slice(%b, %id, %zero), dynamic_slice_sizes={1,2}",
        "ROOT %out = (f32[8,2], f32[1,2]) tuple(%a, %s)",
    )
    assert [each.kind for each in _hlo.read(text).collectives(MESH)] == ["all-reduce", "reduce-scatter"]


# All-gather, spelt as an all-reduce of zeros with the own piece in them.


def put(base="constant(0)", piece="f32[2,2]{1,0} parameter(0)", table="{0, 0, 1, 1, 2, 2, 3, 3}", *, offset="%offset"):
    """An all-reduce over fsdp of f32[8,2] into which each device puts a piece, at an offset from a table."""
    return entry(
        f"%p = {piece}",
        *offset_of(table),
        f"%none = f32[] {base}",
        "%zeros = f32[8,2]{1,0} broadcast(%none), dimensions={}",
        f"%put = f32[8,2]{{1,0}} dynamic-update-slice(%zeros, %p, {offset}, %zero)",
        "%c = f32[8,2]{1,0} copy(%put)",
        "ROOT %r = f32[8,2]{1,0} all-reduce(%c), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
    )


def test_all_gather_as_all_reduce_of_zeros():
    """XLA:TPU gathers small pieces so; its bytes are those of an all-gather, the whole result."""
    [each] = _hlo.read(put()).collectives(MESH)
    assert (each.kind, each.spelling) == ("all-gather", "dynamic-update-slice and all-reduce")
    assert (each.axes, each.shape, each.bytes) == (("fsdp",), (8, 2), 64)


@pytest.mark.parametrize(
    "text",
    [
        put("constant(1)"),  # a sum after all
        put("parameter(1)"),
        put(offset="%zero"),  # every device puts its piece at the same place
        put(table="{0, 0, 0, 0, 1, 1, 1, 1}"),
        put(piece="f32[1,2]{1,0} parameter(0)"),  # half of it stays zero
        put(piece="f32[8,2]{1,0} parameter(0)"),
    ],
)
def test_an_all_reduce_of_pieces_that_stays_one(text):
    assert [each.kind for each in _hlo.read(text).collectives(MESH)] == ["all-reduce"]


def test_parts_of_a_combined_collective_have_their_own_names():
    """A reduction's is that of what is summed, a gather's of its use; the instruction has one for all."""

    def named(name):
        return f'metadata={{op_name="jit(step)/{name}"}}'

    text = entry(
        "%p = f32[8,2]{1,0} parameter(0), " + named("params['up']"),
        "%up = f32[8,2]{1,0} negate(%p), " + named("transpose(jvp(up))/dot_general"),
        "%down = f32[8,2]{1,0} sine(%p), " + named("transpose(jvp(down))/dot_general"),
        "%nameless = f32[8,2]{1,0} cosine(%p)",
        "%r = (f32[8,2], f32[8,2], f32[8,2]) all-reduce(%up, %down, %nameless), replica_groups={}, to_apply=%add",
        "%a = f32[8,2] get-tuple-element(%r), index=0",
        "%b = f32[8,2] get-tuple-element(%r), index=1",
        "%c = f32[8,2] get-tuple-element(%r), index=2",
        "%sum = f32[8,2] add(%a, %b), " + named("update/add"),
        "%g = (f32[64,2], f32[64,2]) all-gather(%p, %p), replica_groups={}, dimensions={0}",
        "%d = f32[64,2] get-tuple-element(%g), index=0",
        "%e = f32[64,2] get-tuple-element(%g), index=1",
        "%first = f32[64,2] negate(%d), " + named("jvp(up)/dot_general"),
        "%second = f32[64,2] negate(%e), " + named("jvp(down)/dot_general"),
        "ROOT %out = (f32[8,2], f32[8,2], f32[64,2], f32[64,2]) tuple(%sum, %c, %first, %second)",
    )
    names = [each.op_name.removeprefix("jit(step)/") for each in _hlo.read(text).collectives(MESH)]
    assert names == [
        "transpose(jvp(up))/dot_general",
        "transpose(jvp(down))/dot_general",
        "update/add",  # nothing tells of it: what the whole instruction has
        "jvp(up)/dot_general",
        "jvp(down)/dot_general",
    ]


# What the TPU compiler wrote.


def test_tpu_reduce_scatter_fusion():
    module = _hlo.read((DATA / "tpu_fsdp_grad.txt").read_text())
    gather, scatter = module.collectives(MESH)
    assert module.unread == ()
    assert (gather.kind, gather.axes, gather.dtype, gather.shape) == ("all-gather", ("fsdp",), "bf16", (256, 256))
    assert (scatter.kind, scatter.axes, scatter.bytes) == ("reduce-scatter", ("fsdp",), 256 * 256 * 4)
    assert scatter.spelling == "fusion all-reduce-scatter"
    assert scatter.op_name == "jit(loss)/transpose(jvp())/dot_general"  # kept by the fusion, not by what is in it
    assert scatter.source == "model.py:30"


def test_tpu_scan_with_asynchronous_fusions():
    """FSDP x TP in a scan of 6: forward and backward gather the weight and the activation.

    One gather is asynchronous, and stands in the text three times.
    """
    text = (DATA / "tpu_fsdp_scan.txt").read_text()
    assert text.count(" all-gather(") == 6
    assert sorted(found(text)) == [
        ("all-gather", ("fsdp",), 6, 1),
        ("all-gather", ("fsdp",), 6, 1),
        ("all-gather", ("tensor",), 6, 1),
        ("all-gather", ("tensor",), 6, 1),
        ("reduce-scatter", ("fsdp",), 6, 1),
        ("reduce-scatter", ("tensor",), 6, 1),
    ]


def test_tpu_nested_loops_without_written_trip_counts():
    text = (DATA / "tpu_nested.txt").read_text()
    assert "known_trip_count" not in text
    assert found(text) == [("all-reduce", ("fsdp",), 15, 2)]
    assert sorted(each.trips or 0 for each in _hlo.read(text).loops()) == [3, 5]


def test_tpu_loop_over_data_is_unknown():
    assert found((DATA / "tpu_dynwhile.txt").read_text()) == [("all-reduce", ("fsdp",), None, 1)]


def test_tpu_permute():
    assert found((DATA / "tpu_pp.txt").read_text()) == [("collective-permute", ("fsdp",), 1, 0)]


def test_tpu_two_slices():
    """One program a slice: groups count within it, and what crosses slices is a send."""
    text = (DATA / "tpu_two_slices.txt").read_text()
    slices = (0, 0, 0, 0, 1, 1, 1, 1) * 2
    mesh = _hlo.MeshAxes(names=("fsdp", "data", "tensor"), sizes=(2, 2, 4), slices=slices)
    assert found(text, mesh) == [
        ("all-gather", ("fsdp",), 1, 0),
        ("reduce-scatter", ("fsdp",), 1, 0),
        ("all-reduce", ("data",), 1, 0),
    ]


# What the GPU compiler wrote (H100, compiled without one).


def test_gpu_starts_in_every_form():
    """Two weights gathered by one operation, whose result is a tuple of tuples; reduce-scatter written as itself."""
    text = (DATA / "gpu_fsdp_two.txt").read_text()
    assert sorted(found(text)) == [
        ("all-gather", ("fsdp",), 1, 0),
        ("all-gather", ("fsdp",), 1, 0),
        ("all-gather", ("fsdp",), 1, 0),
        ("all-gather", ("fsdp",), 1, 0),
        ("all-to-all", ("fsdp",), 1, 0),
        ("all-to-all", ("fsdp",), 1, 0),
        ("all-to-all", ("fsdp",), 1, 0),
        ("reduce-scatter", ("fsdp",), 1, 0),
    ]
    weights = [each for each in _hlo.read(text).collectives(MESH) if each.channel == 1]
    assert [(each.shape, each.bytes) for each in weights] == [((256, 512), 256 * 512 * 4), ((512, 128), 512 * 128 * 4)]
    assert len({each.name for each in weights}) == 1


def test_gpu_nested_loops():
    assert found((DATA / "gpu_nested.txt").read_text()) == [("all-reduce", ("fsdp",), 15, 2)]


# Sources, counts, garbage.


def test_sources_in_both_spellings():
    tables = (
        'FileNames\n1 "train.py"\n2 "/x/site-packages/flax/linear.py"\n\nFunctionNames\n1 "f"\n\nFileLocations\n'
        "1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=0 end_column=0}\n"
        "2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=0 end_column=0}\n\nStackFrames\n"
        "1 {file_location_id=1 parent_frame_id=1}\n2 {file_location_id=2 parent_frame_id=2}\n"
    )
    new = reduced("{}").replace("to_apply=%add", 'to_apply=%add, metadata={op_name="jit(f)/sum" stack_frame_id=2}')
    new = new.replace("num_partitions=8\n", f"num_partitions=8\n\n{tables}")
    [each] = _hlo.read(new).collectives(MESH)
    assert (each.source, each.op_name) == ("train.py:12", "jit(f)/sum")  # the user's line, not flax's
    old = reduced("{}").replace(
        "to_apply=%add", 'to_apply=%add, metadata={op_name="f" source_file="a.py" source_line=3}'
    )
    assert _hlo.read(old).collectives(MESH)[0].source == "a.py:3"
    assert _hlo.read(reduced("{}")).collectives(MESH)[0].source == ""


def test_op_counts():
    counts = _hlo.read(loop("compare(%i, %n), direction=LT")).op_counts()
    assert counts["while"] == counts["compare"] == counts["all-reduce"] == 1
    assert counts["add"] == 1  # the counter's; the reduction's own add is not an operation of the program
    assert counts["constant"] == 5


@pytest.mark.parametrize(
    "text", ["", "garbage", "HloModule", "ENTRY {", "}\n}\n", "\x00", "HloModule x\n\nENTRY %e {\n"]
)
def test_garbage_is_listed(text):
    module = _hlo.read(text)
    assert module.unread
    assert module.collectives(MESH) == module.loops() == ()


def test_an_unreadable_line_is_listed_and_the_rest_is_read():
    module = _hlo.read(reduced("[4,2]<=[8]").replace("  %p =", "  %%% what\n  %p ="))
    assert module.unread == ("line 8: %%% what",)
    assert len(module.collectives(MESH)) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.txt")))
def test_damaged_text_never_raises(name):
    text = (DATA / name).read_text()
    draw = random.Random(name)
    for _ in range(15):
        start = draw.randrange(len(text))
        damaged = text[:start] + draw.choice(["", "{", ")", '"', " = ", "%", "\n"]) + text[start + draw.randrange(60) :]
        if draw.random() < 0.3:
            damaged = damaged[: draw.randrange(len(damaged))]
        module = _hlo.read(damaged)
        module.collectives(MESH), module.loops(), module.op_counts()


def test_a_computation_that_calls_itself():
    text = entry("ROOT %c = f32[8] call(%c), to_apply=%main")
    assert _hlo.read(text).collectives(MESH) == ()


def test_an_operation_may_go_on_over_several_lines():
    """XLA:TPU writes the metadata of a Pallas kernel so; its last line looks like the end of a computation."""
    kernel = (
        '  %k = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="jit(f)/attention/pallas_call"}\n'
    )
    start = "HloModule m\n\nENTRY %main () -> f32[8] {\n  %p = f32[8] parameter(0)\n"
    text = f"{start}{kernel}  ROOT %n = f32[8] negate(%k)\n}}\n"
    module = _hlo.read(text)
    ops = module.program.computations["main"].ops

    assert module.unread == ()
    assert list(ops) == ["p", "k", "n"]
    assert 'op_name="jit(f)/attention/pallas_call"' in ops["k"].attributes

    cut = _hlo.read(text[: text.index("}}, metadata")])
    assert list(cut.program.computations["main"].ops) == ["p", "k"]


def test_arrays_say_which_memory_they_are_in():
    arrays = "(f32[8]{0:T(8)S(5)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"
    text = f"HloModule m\n\nENTRY %main () -> f32[8] {{\n  %p = {arrays} parameter(0)\n}}\n"
    shapes = _hlo.read(text).program.computations["main"].ops["p"].shapes

    assert [shape.space for shape in shapes] == [5, 0, 2]


@pytest.mark.parametrize(
    ("groups", "num_devices", "slices", "axes"),
    [
        (["[1,256]<=[256]"], 256, 1, {"x": 256}),
        (["[16,16]<=[256]", "[16,16]<=[16,16]T(1,0)"], 256, 1, {"x": 16, "y": 16}),
        (["[32,8]<=[256]"], 256, 1, {"x": 32, "y": 8}),
        (["[4,2]<=[2,2,2]T(0,2,1)"], 8, 1, {"x": 2, "y": 2, "z": 2}),
        (["mesh['axis_0'=16,'axis_1'=16] {'axis_1'}"], 256, 1, {"x": 16, "y": 16}),
        (["mesh['data'=1,'fsdp'=16,'tensor'=16] {'tensor'}"], 256, 1, {"fsdp": 16, "tensor": 16}),
        (["[16,16]<=[256]"], 512, 2, {"slice": 2, "x": 16, "y": 16}),
        ([], 8, 1, {"x": 8}),
    ],
    ids=str,
)
def test_axes_of_a_program_whose_mesh_nobody_gave(groups, num_devices, slices, axes):
    lines = [
        f"  %g{at} = f32[256] all-gather(%p), replica_groups={each}, dimensions={{0}}, channel_id={at}"
        for at, each in enumerate(groups)
    ]
    per_slice = num_devices // slices
    header = f"HloModule m, num_partitions={per_slice}\n\nENTRY %main () -> f32[1] {{\n  %p = f32[1] parameter(0)\n"
    module = _hlo.read(header + "\n".join(lines) + "\n}\n")
    of = tuple(at // per_slice for at in range(num_devices)) if slices > 1 else ()
    found = module.axes(num_devices, of)

    assert dict(zip(found.names, found.sizes, strict=True)) == axes


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/project/models/gpt.py", "models/gpt.py"),
        ("/home/me/other/gpt.py", "../other/gpt.py"),  # a notebook's folder beside that of the model
        ("/home/you/gpt.py", "/home/you/gpt.py"),
        ("/home/me/projects/gpt.py", "../projects/gpt.py"),
        ("<string>", "<string>"),
    ],
)
def test_files_below_and_beside_the_working_directory_are_short(path, shown, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "cwd", lambda: pathlib.Path("/home/me/project"))
    assert short_file(path) == shown
