"""Bytes through main memory, by hand: slices, updates in place, memory on the chip, what only passes through."""

import pytest

from jaxpar import _hlo

BIG, PART = 64 * 1024 * 1024 * 4, 1024 * 1024 * 4
"""f32[64,1024,1024], and one of its 64."""


def traffic(entry, *others, name="r"):
    body = "\n".join(f"  {line}" for line in entry)
    text = "HloModule m\n\n" + "\n".join(others) + f"\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    program = _hlo.read(text).program
    return _hlo.traffic(program, program.computations["main"].ops[name])


def fusion(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (x: f32[]) -> f32[] {{\n{body}\n}}\n"


WHOLE = "%x = f32[64,1024,1024] parameter(0)"
INDEX = "%i = s32[] parameter(1)"
ONE = "%o = f32[1,1024,1024] parameter(2)"
SLICED = "f32[1,1024,1024] dynamic-slice(%x, %i, %i, %i)"
UPDATED = "f32[64,1024,1024] dynamic-update-slice(%x, %o, %i, %i, %i)"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%r = f32[64,1024,1024] negate(%x)", 2 * BIG),
        ("%r = f32[64,1024,1024]{2,1,0:T(8,128)S(1)} negate(%x)", BIG),  # into the chip's memory
        (f"%r = {SLICED}", 2 * PART),
        (f"%r = {UPDATED}", 2 * PART),
        ("%r = f32[64,1024,1024] broadcast(%i), dimensions={}", BIG),
        ("%r = f32[64,1024,1024] bitcast(%x)", 0),
    ],
    ids=["elementwise", "on-chip", "slice", "update", "broadcast", "bitcast"],
)
def test_single_operations(line, expected):
    assert traffic([WHOLE, INDEX, ONE, line]) == pytest.approx(expected, abs=64)


def test_a_fusion_reads_the_slice_that_it_takes_and_writes_the_update():
    call = "%r = f32[64,1024,1024] fusion(%x, %i, %o), kind=kLoop, calls=%f"

    inside = fusion("f", WHOLE, INDEX, ONE, f"ROOT %u = {UPDATED}")
    assert traffic([WHOLE, INDEX, ONE, call], inside) == pytest.approx(2 * PART, abs=64)

    inside = fusion("f", WHOLE, INDEX, ONE, f"%s = {SLICED}", "ROOT %u = f32[1,1024,1024] add(%s, %o)")
    call = "%r = f32[1,1024,1024] fusion(%x, %i, %o), kind=kLoop, calls=%f"
    assert traffic([WHOLE, INDEX, ONE, call], inside) == pytest.approx(3 * PART, abs=64)


def test_a_slice_in_a_fusion_inside_of_the_fusion_is_a_slice():
    inner = fusion("g", WHOLE, INDEX, f"ROOT %s = {SLICED}")
    outer = fusion("f", WHOLE, INDEX, "ROOT %n = f32[1,1024,1024] fusion(%x, %i), kind=kLoop, calls=%g")
    call = "%r = f32[1,1024,1024] fusion(%x, %i), kind=kOutput, calls=%f"

    assert traffic([WHOLE, INDEX, call], inner, outer) == pytest.approx(2 * PART, abs=64)


def test_what_is_used_otherwise_too_is_read_whole():
    inside = fusion("f", WHOLE, INDEX, f"%s = {SLICED}", "ROOT %a = f32[64,1024,1024] negate(%x)")
    call = "%r = f32[64,1024,1024] fusion(%x, %i), kind=kLoop, calls=%f"

    assert traffic([WHOLE, INDEX, call], inside) == pytest.approx(2 * BIG, abs=64)


def test_what_a_fusion_sends_or_hands_on_is_not_its_traffic():
    gathered = "%g = f32[64,1024,1024] all-gather(%o), replica_groups={}, dimensions={0}"
    inside = fusion("f", WHOLE, INDEX, ONE, gathered, "ROOT %t = (f32[64,1024,1024], f32[64,1024,1024]) tuple(%x, %g)")
    call = (
        "%r = (f32[64,1024,1024], f32[64,1024,1024]) fusion(%x, %i, %o), kind=kOutput, "
        "output_to_operand_aliasing={{0}: (0, {}), {1}: (0, {})}, calls=%f"
    )

    assert traffic([WHOLE, INDEX, ONE, call], inside) == pytest.approx(0, abs=64)


def test_estimates():
    for written, expected in (("1500", 1500), (str(2**64 - 1), None), (str(2**63 - 1), None)):
        op = f'%r = f32[] negate(%x), backend_config={{"estimated_cycles":"{written}"}}'
        program = _hlo.read(f"HloModule m\n\nENTRY %main () -> f32[] {{\n  {op}\n}}").program
        assert _hlo.cycles(program.computations["main"].ops["r"]) == expected
