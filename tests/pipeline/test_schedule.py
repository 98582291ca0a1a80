"""Schedules against the published formulas, and against an independent account of what a table must keep."""

import collections
import functools as ft
import itertools
import xml.etree.ElementTree as ET

import pytest

import jaxpar as jp
from jaxpar._draw_scene import Area
from jaxpar.pipeline import NAMED, Op, Table

GRID = [*itertools.product((1, 2, 3, 4, 8), (1, 3, 4, 8, 13), (1, 2, 3)), (8, 32, 2)]
COSTS = [(1, 1, 1), (2, 3, 1.5)]  # F, B, W


def grid(name):
    """The stages, microbatches and chunks that a schedule is for."""
    return [(p, m, v) for p, m, v in GRID if name != "zb-h1" or v == 1]


@ft.cache
def scheduled(name, p, m, v):
    return jp.schedule(name, stages=p, microbatches=m, chunks=v)


def simulated(name, p, m, v, costs, clock):
    F, B, W = costs
    return scheduled(name, p, m, v).simulate(forward=F, backward=B, weight=W, clock=clock)


@pytest.mark.parametrize("clock", ["ticks", "stages"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_time_and_bubble_are_the_published_ones(name, clock):
    """(p-1)(F+B+W)/v of idle time, in one program as in many; a chunk waits for p microbatches where there are less."""
    for (p, m, v), (F, B, W) in itertools.product(grid(name), COSTS):
        found = simulated(name, p, m, v, (F, B, W), clock)
        line = m * v if m >= p else (v - 1) * p + m
        assert found.time == pytest.approx((line + p - 1) * (F + B + W) / v)
        if m >= p or v == 1:
            assert found.idle == pytest.approx((p - 1) * (F + B + W) / v)
            assert found.bubble == pytest.approx((p - 1) / (m * v + p - 1))


def test_zero_bubble_is_the_published_one_with_a_program_for_each_stage():
    """(p-1)(F+B-W) of idle time for m >= p."""
    for (p, m, _), (F, B, W) in itertools.product(grid("zb-h1"), COSTS):
        found = simulated("zb-h1", p, m, 1, (F, B, W), "stages")
        hidden = min(m, p) - 1  # gradients of weights in bubbles, on each stage
        assert found.time == pytest.approx((m + p - 1) * (F + B) + (m - hidden) * W)
        if m >= p:
            assert found.idle == pytest.approx((p - 1) * (F + B - W))


def test_zero_bubble_in_one_program_has_more_bubble():
    """Not all of what it saves elsewhere: one program has (p-1)(F+B) of idle time, 1F1B (p-1)(F+B+W)."""
    for (p, m, _), (F, B, W) in itertools.product(grid("zb-h1"), COSTS):
        assert simulated("zb-h1", p, m, 1, (F, B, W), "ticks").idle == pytest.approx((p - 1) * (F + B))


def test_peak_activations_are_the_published_ones():
    for p, m, v in GRID:
        gpipe = scheduled("gpipe", p, m, v).simulate()
        assert max(gpipe.peak) == m
        in_step = scheduled("1f1b", p, m, v).simulate().peak
        if v > 1 and m % p == 0:
            warm_up = [(v - 1) * p + 2 * (p - 1 - i) for i in range(p)]  # Megatron's
            assert in_step == tuple(min(m * v, ops + 1) / v for ops in warm_up)
        if v == 1:
            assert in_step == tuple(min(m, 2 * (p - 1 - i) + 1) for i in range(p))


@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 4), (4, 4), (4, 8), (8, 16)])
def test_1f1b_in_the_order_of_separate_programs(p, m):
    """Its own order, one op a tick: the published time and its p microbatches. In one program it would be slower."""
    orders = []
    for i in range(p):
        warm = min(p - 1 - i, m)
        steady = [f"F{warm + k} B{k}" for k in range(m - warm)]
        orders.append(" ".join([*(f"F{k}" for k in range(warm)), *steady, *(f"B{k}" for k in range(m - warm, m))]))
    schedule = jp.Schedule.of_orders(orders, name="pipedream-flush")
    apart = schedule.simulate(clock="stages")
    assert apart.time == (m + p - 1) * 3
    assert apart.peak == tuple(min(m, p - i) for i in range(p))
    assert schedule.simulate().time >= apart.time
    assert schedule.buffers.inputs.size <= jp.schedule("1f1b", stages=p, microbatches=m).buffers.inputs.size


def test_transfers_take_their_time():
    """One way and back for one microbatch; in one program every stage also waits for what it does not need."""
    for clock in ("ticks", "stages"):
        assert scheduled("1f1b", 4, 1, 1).simulate(transfer=0.5, clock=clock).time == 12 + 6 * 0.5
        assert scheduled("1f1b", 1, 8, 1).simulate(transfer=9, clock=clock).time == 24
    schedule = scheduled("1f1b", 4, 8, 1)
    assert schedule.simulate(transfer=0.5, clock="stages").time < schedule.simulate(transfer=0.5).time


@pytest.mark.parametrize("name", NAMED)
def test_no_slot_is_written_while_it_is_needed(name):
    """Played tick by tick: what an op reads is still in its slot. No ring has a slot more than are in use at once."""
    for p, m, v in [size for size in grid(name) if size[0] in (1, 3, 4) and size[1] in (1, 3, 8)]:
        schedule = scheduled(name, p, m, v)
        for ring in (schedule.buffers.inputs, schedule.buffers.gradients, schedule.buffers.deferred):
            most = 0
            for stage, tick in itertools.product(range(p), range(schedule.num_ticks)):
                alive = [
                    item for item, (first, last) in ring.intervals.items() if item[0] == stage and first <= tick <= last
                ]
                slots = [ring.slots[item] for item in alive]
                assert len(set(slots)) == len(slots)
                most = max(most, len(slots))
            assert ring.size == most


@pytest.mark.parametrize(("p", "m", "v", "inputs", "gradients"), [(4, 8, 1, 7, 1), (4, 64, 1, 7, 1), (4, 8, 2, 11, 1)])
def test_rings_of_1f1b_do_not_grow_with_microbatches(p, m, v, inputs, gradients):
    buffers = jp.schedule("1f1b", stages=p, microbatches=m, chunks=v).buffers
    assert (buffers.inputs.size, buffers.gradients.size, buffers.deferred.size) == (inputs, gradients, 0)


@pytest.mark.parametrize("name", NAMED)
def test_csv_and_back(name, tmp_path):
    for p, m, v in grid(name)[::5]:
        schedule = scheduled(name, p, m, v)
        schedule.save(tmp_path / "mine.csv")
        loaded = jp.Schedule.load(tmp_path / "mine.csv")
        assert loaded.cells == schedule.cells
        assert loaded.name == "mine.csv"


GOOD = """tick,stage 0,stage 1
0,F0,
1,F1,F0 B0
2,B0,F1 B1
3,B1,
"""


def refused(text, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(jp.ShardingError) as caught:
        jp.Schedule.load(tmp_path / "mine.csv")
    return str(caught.value)


def test_a_right_table_is_allowed(tmp_path):
    (tmp_path / "mine.csv").write_text(GOOD.replace("\n0,", "\n\n0,"))  # blank lines do no harm
    assert jp.Schedule.load(tmp_path / "mine.csv").cells == jp.schedule("1f1b", stages=2, microbatches=2).cells


WRONG = {
    "before its neighbour's result arrives": (
        ("1,F1,F0 B0", "1,F1,", "0,F0,", "0,F0,F0 B0"),
        "F0 at tick 0 on stage 1 needs F0 of stage 0, which runs at tick 0 and arrives at tick 1. Move F0 to tick 1",
    ),
    "a backward too early": (
        ("1,F1,F0 B0", "1,F1 B0,F0 B0", "2,B0,", "2,,"),
        "B0 at tick 1 on stage 0 needs B0 of stage 1, which runs at tick 1 and arrives at tick 2. Move B0 to tick 2",
    ),
    "a backward before its forward": (
        ("1,F1,F0 B0", "1,F1,B0", "2,B0,F1 B1", "2,B0,F0 B1", "3,B1,", "3,B1,F1"),
        "B0 at tick 1 on stage 1 needs F0 of its own stage, which runs at tick 2. Move B0 to tick 2 or later.",
    ),
    "a weight gradient before its backward": (
        ("1,F1,F0 B0", "1,F1 W0,F0 B0"),
        "W0 at tick 1 on stage 0 needs B0 of its own stage, which runs at tick 2. Move W0 to tick 2 or later.",
    ),
    "missing": (("3,B1,", "3,,"), "B1, the backward of microbatch 1 through chunk 0, is nowhere on stage 0."),
    "twice": (("3,B1,", "3,B1,B1"), "B1 is on stage 1 twice, at ticks 2 and 3. Keep one of them."),
    "two at once": (("0,F0,", "0,F0 F1,"), "Tick 0, stage 0 runs F0 and F1: a stage runs at most one F in a tick."),
    "order in a cell": (("F1 B1", "B1 F1"), "Tick 2, stage 1 has B1 F1: write F before B before W"),
    "no op": (("B1", "X1"), "line 4, stage 1: 'X1' is no op. Write F, B or W and a microbatch, as F3"),
    "a tick left out": (("3,B1,", "4,B1,"), "line 5: tick '4' where tick 3 is next."),
    "columns": (("0,F0,", "0,F0"), "line 2: 2 columns, but the first line has 3."),
    "header": (("tick,", "time,"), "the first line is 'time,stage 0,stage 1'. It names the columns"),
    "nothing": ((GOOD, "tick,stage 0\n"), "There is no op in it. Write at least F0 and B0 for every stage."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_with_the_op_its_tick_and_its_need(case, tmp_path):
    changes, message = WRONG[case]
    text = GOOD
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    assert message in refused(text, tmp_path)


def test_all_that_is_wrong_is_said_at_once():
    both = (Op("F", 0), Op("B", 0))
    with pytest.raises(jp.ShardingError) as caught:
        jp.Schedule(((both, both),), "mine")
    first, *lines = str(caught.value).splitlines()
    assert first == "mine: it cannot be run."
    assert [line.split(",")[0] for line in lines] == [
        "B0 at tick 0 on stage 0 needs B0 of stage 1",
        "F0 at tick 0 on stage 1 needs F0 of stage 0",
    ]


REFUSED = {
    "name": ({"name": "1f2b"}, "there is none called '1f2b'. Did you mean '1f1b'?"),
    "another name": ({"name": "interleaved"}, "'interleaved' is '1f1b' with chunks=2 or more."),
    "stages": ({"stages": 0}, "stages is 0. Use 1 or more."),
    "microbatches": ({"microbatches": 0}, "microbatches is 0. Use 1 or more."),
    "chunks": ({"chunks": 0}, "chunks is 0. Use 1 or more."),
    "chunks of zb-h1": ({"name": "zb-h1", "chunks": 2}, "chunks is 2, but it has one chunk a stage."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_schedule_can_be_is_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(jp.ShardingError) as caught:
        jp.schedule(**{"name": "1f1b", "stages": 4, "microbatches": 4, "chunks": 1, **changes})
    assert message in str(caught.value)


def test_costs_that_no_time_can_be_are_refused():
    schedule = jp.schedule("1f1b", stages=2, microbatches=2)
    for wrong, message in (({"forward": -1}, "forward is -1"), ({"forward": 0, "backward": 0, "weight": 0}, "all 0")):
        with pytest.raises(jp.ShardingError, match=message):
            schedule.simulate(**wrong)
    with pytest.raises(Exception, match="days"):  # by its type first, where types are checked
        schedule.simulate(clock="days")


def test_orders_that_never_end_are_refused():
    with pytest.raises(jp.ShardingError) as caught:
        jp.Schedule.of_orders(["F0 B0", "B0 F0"], name="mine")
    assert "stage 0 waits with B0 for B0 of stage 1; stage 1 waits with B0 for F0 of stage 1" in str(caught.value)


def test_the_chart_shows_every_op_when_it_runs(tmp_path):
    """A box of its length, with its microbatch in it, for every op; the file is SVG by itself."""
    schedule = jp.schedule("1f1b", stages=4, microbatches=8, chunks=2)
    drawing = schedule.draw(backward=2, weight=1)
    boxes = [shape for shape in drawing.scene.shapes if isinstance(shape, Area)]
    widths = collections.Counter(round(shape.points[1][0] - shape.points[0][0] + 1) for shape in boxes)
    (forward, backward), counts = zip(*widths.most_common(2), strict=True)
    assert counts == (64, 64)
    assert max(forward, backward) == pytest.approx(3 * min(forward, backward), abs=2)
    drawing.save(tmp_path / "chart.svg")
    labels = [text.text for text in ET.parse(tmp_path / "chart.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert [labels.count(str(microbatch)) for microbatch in range(1, 8)] == [16] * 7
    assert "bubble 15.8%" in str(drawing)
    assert str(schedule) in "\n".join(str(drawing).splitlines()[:1] + str(drawing).splitlines()[2:])
    assert set(schedule._repr_mimebundle_()[0]) >= {"text/plain"}


def test_a_long_chart_has_its_beginning_and_its_end():
    drawing = jp.schedule("gpipe", stages=8, microbatches=256).draw()
    assert len(drawing.scene.shapes) < 1500
    assert any(getattr(shape, "text", "") == "⋯" for shape in drawing.scene.shapes)
    small = jp.schedule("gpipe", stages=2, microbatches=4).draw()
    assert not any(getattr(shape, "text", "") == "⋯" for shape in small.scene.shapes)


def test_a_table_is_data():
    assert Table(jp.schedule("1f1b", stages=2, microbatches=2).cells).splits_backward is False
    assert jp.schedule("zb-h1", stages=2, microbatches=2).splits_backward is True
    assert hash(jp.schedule("1f1b", stages=2, microbatches=2)) == hash(jp.schedule("1f1b", stages=2, microbatches=2))
