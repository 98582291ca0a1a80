"""A report as data, text, pictures and a page: what it says, that it is whole, and that it stays small."""

import dataclasses
import html.parser
import json
import math

import pytest

from jaxpar._errors import ShardingError
from jaxpar.explain import Finding, Report
from jaxpar.explain._memory import Held
from tests.explain import _reports

REPORTS = {
    make.__name__: make() for make in (_reports.decoder_16b, _reports.llama_70b, _reports.on_a_cpu, _reports.nothing)
}
WITHOUT = [(), ("memory",), ("flops",), ("timeline",), ("memory", "flops", "timeline")]


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]


@pytest.fixture
def decoder():
    return REPORTS["decoder_16b"]


# Figures, by hand


def test_derived_figures(decoder):
    assert (decoder.step_seconds, decoder.compute_seconds) == (10.1, 10.1 - 1.25)
    assert decoder.exposed_communication_seconds == 1.25
    assert decoder.peak_bytes == 9_280_236_544
    assert decoder.mfu == pytest.approx(3.11e17 / (256 * 197e12 * 10.1))
    assert decoder.hfu == pytest.approx(4.02e17 / (256 * 197e12 * 10.1))
    assert decoder.tokens_per_second == pytest.approx(6 * 2048 * 256 / 10.1)
    assert decoder.tokens_per_second_per_chip == pytest.approx(6 * 2048 / 10.1)


def test_the_largest_thing_is_told_by_its_name_if_anything_has_one(decoder):
    named = Held(kind="parameter", path="embed.embedding", bytes=2**20, shape="f32[512,512]", source="")
    rest = dataclasses.replace(named, path="", bytes=2**21, shape="f32[8,256,256]")
    for held, told in (((rest, named), "embed.embedding f32[512,512] 1.0 MiB"), ((rest,), "f32[8,256,256] 2.0 MiB")):
        memory = dataclasses.replace(decoder.memory, held=held)
        assert told in dataclasses.replace(decoder, memory=memory).table("memory")


def test_a_chip_may_be_two_devices(decoder):
    twin = dataclasses.replace(decoder, target="7x:4x4x8")
    assert (twin.num_devices, twin.num_chips) == (256, 128)
    assert twin.tokens_per_second_per_chip == pytest.approx(2 * decoder.tokens_per_second_per_chip)


def test_figures_that_are_not_known_are_none():
    empty = _reports.nothing()
    names = ("step_seconds", "compute_seconds", "exposed_communication_seconds", "peak_bytes", "mfu", "hfu")
    assert {name: getattr(empty, name) for name in names} == dict.fromkeys(names)
    assert (empty.tokens_per_second, empty.tokens_per_second_per_chip, empty.traffic) == (None, None, ())


@pytest.mark.parametrize("fields", [{"peak_flops": 0.0}, {"flops": None}, {"timeline": None}], ids=str)
def test_no_utilisation_without_each_of_its_parts(decoder, fields):
    assert dataclasses.replace(decoder, **fields).mfu is None


def test_traffic_is_the_sum_of_rows_by_kind_and_axes():
    rows = (
        _reports.row(size=100, count=3, seconds=0.5, exposed_seconds=0.2, expected=""),
        _reports.row(size=10, count=2, seconds=0.25, exposed_seconds=0.0, expected="weight"),
        _reports.row(size=10, axes=("data",), seconds=9.0, exposed_seconds=0.0),
        _reports.row("all-reduce", size=7, count=None, seconds=1.0, exposed_seconds=1.0),
    )
    data, fsdp, reduced = dataclasses.replace(_reports.nothing(), collectives=rows).traffic
    assert (data.axes, data.num_unexpected) == (("data",), None)
    assert (fsdp.count, fsdp.bytes, fsdp.seconds, fsdp.exposed_seconds) == (5, 320, 2.0, 0.2)
    assert (fsdp.num_rows, fsdp.num_unexpected) == (2, 1)
    assert (reduced.kind, reduced.count, reduced.bytes) == ("all-reduce", None, 7)


# JSON


def test_json_goes_both_ways(report):
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.to_json() == report.to_json()
    assert not again.diff(report)


def test_json_has_derived_figures_at_its_top(decoder):
    fields = json.loads(decoder.to_json())
    for name in ("step_seconds", "compute_seconds", "exposed_communication_seconds", "peak_bytes", "mfu"):
        assert fields[name] == getattr(decoder, name)
    assert len(fields["collectives"]) == len(decoder.collectives)
    assert fields["format"] == 1


def test_json_has_no_infinity_and_no_nan(decoder):
    rows = (dataclasses.replace(decoder.collectives[0], seconds=math.inf), *decoder.collectives[1:])
    timeline = dataclasses.replace(decoder.timeline, high=math.nan)
    text = dataclasses.replace(decoder, collectives=rows, timeline=timeline).to_json()
    fields = json.loads(text, parse_constant=pytest.fail)
    assert fields["collectives"][0]["seconds"] is None
    assert math.isnan(Report.from_json(text).timeline.high)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"formt": 1}'])
def test_what_is_no_report_is_an_error(text):
    with pytest.raises(ShardingError, match=r"^this is not the JSON of a report.* Write it with report.to_json\(\)\.$"):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "this report has format 2, and this version of jaxpar reads 1. Explain again."),
        ({"num_devices": "8"}, "report.num_devices: expected a whole number, found '8'."),
        ({"num_devices": True}, "report.num_devices: expected a whole number, found True."),
        ({"axes": 3}, "report.axes: expected an object, found 3."),
        ({"notes": "x"}, "report.notes: expected a list, found 'x'."),
        ({"collectives": [{}]}, "report.collectives[0]: 'kind' is missing."),
        ({"findings": [{"kind": "a", "severity": "bad"}]}, "report.findings[0]: 'reason' is missing."),
        ({"colour": 1}, "report: this version of jaxpar knows no 'colour'. Read it with the one that wrote it."),
    ],
    ids=str,
)
def test_a_report_with_one_wrong_field_is_an_error(decoder, change, said):
    fields = json.loads(decoder.to_json())
    with pytest.raises(ShardingError) as error:
        Report.from_json(json.dumps({**fields, **change}))
    assert str(error.value) == said


def test_a_field_that_an_older_version_did_not_have_has_its_default(decoder):
    fields = json.loads(decoder.to_json())
    del fields["compile_seconds"], fields["memory"]["curve"]
    again = Report.from_json(json.dumps(fields))
    assert (again.compile_seconds, again.memory.curve) == (0.0, ())


# Differences


def test_equal_reports_do_not_differ(report):
    difference = report.diff(report)
    assert not difference
    assert str(difference) == "the two reports say the same"


def test_a_difference_has_both_numbers(decoder):
    rows = tuple(each for each in decoder.collectives if each.expected != "")
    timeline = dataclasses.replace(decoder.timeline, step_seconds=9.09)
    other = dataclasses.replace(decoder, collectives=rows, timeline=timeline, findings=decoder.findings[1:])
    found = {(each.section, each.what): (each.mine, each.theirs) for each in decoder.diff(other).changes}
    assert found["time", "step"] == (10.1, 9.09)
    assert found["collectives", "all-gather over fsdp: count"] == (434, 386)
    assert (
        found["collectives", "all-gather over fsdp: bytes"][0] - found["collectives", "all-gather over fsdp: bytes"][1]
        == 48 * 48 * _reports.MIB
    )
    assert found["findings", "gathered-whole at blocks.each.attn, decoder.py:77"] == ("warning", None)
    assert not [key for key in found if key[0] == "memory"]
    text = str(decoder.diff(other))
    assert [line.split() for line in text.splitlines() if line.startswith("time")] == [
        ["time", "step", "10.1", "s", "9.09", "s", "-10.0", "%"]
    ]


def test_traffic_from_another_place_differs(decoder):
    first = decoder.collectives[0]
    rows = (dataclasses.replace(first, path="elsewhere"), *decoder.collectives[1:])
    changes = decoder.diff(dataclasses.replace(decoder, collectives=rows)).changes
    assert {each.what.split(", ")[1] for each in changes} == {first.path, "elsewhere"}


def test_any_other_field_that_differs_is_named(decoder):
    timeline = dataclasses.replace(decoder.timeline, events=())
    (change,) = decoder.diff(dataclasses.replace(decoder, timeline=timeline)).changes
    assert (change.section, change.what) == ("details", "timeline")


def test_reports_of_two_meshes_differ(decoder):
    changes = decoder.diff(REPORTS["llama_70b"]).changes
    assert {"axes", "num devices", "strategies"} <= {each.what for each in changes}
    assert max(map(len, str(decoder.diff(REPORTS["llama_70b"])).splitlines())) <= 125


def test_a_difference_is_a_table_in_a_notebook_too(decoder):
    """All that the text says and what it leaves out, in the style of a report."""
    other = REPORTS["llama_70b"]
    difference = decoder.diff(other)
    page = difference._repr_html_()
    assert page.count("<h3>") == len(difference.sections())
    assert "more</p>" in page  # longer than what is shown at first
    assert page.count("<details>") == sum(len(each) > 14 for each in difference.sections().values())
    first = difference.changes[0]
    assert f"<td>{first.what}</td>" in page
    assert "border-bottom:3px" in page  # axes have their colours
    assert len(page) < 200_000
    assert not Page(page).open
    assert "the two reports say the same" in decoder.diff(decoder)._repr_html_()


# Text


def test_text_fits(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 118
    assert len(lines) <= 72


def test_the_headline(decoder):
    lines = str(decoder).splitlines()
    assert lines[0] == "train_step on TPU v5e 16x16, 256 chips: data 1 × fsdp 256"
    assert lines[5:9] == [
        "  step     10.1 s, between 9.30 s and 11.2 s",
        "  MFU      61.1 %, with recomputation 78.9 %",
        "  tokens   311,458 a second, 1,217 a second and chip",
        "  memory   8.6 GiB, 55 % of the 15.7 GiB of a device",
    ]


def test_equal_layers_are_one_row_and_what_is_left_out_is_summed():
    text = str(REPORTS["llama_70b"])
    assert "blocks.[0-79].mlp.gate  1.30 EFLOP" in text
    assert "blocks.17" not in text
    assert "and 2 more: 92.6 PFLOP, 2.0 %" in text
    assert "at blocks.0.norm.scale and 79 more places" in text


def test_what_the_plan_does_not_expect_is_said(decoder):
    assert "not in the plan: 1 of 19, all-gather over fsdp 2.2 GiB" in str(decoder)
    assert "not in the plan" not in str(_reports.on_a_cpu())


def test_a_section_is_whole(decoder):
    text = decoder.table("collectives")
    for each in decoder.collectives:
        assert (each.path or each.name) in text
    assert "fusion all-reduce-scatter" in text
    assert "weight, backward pass of each layer, which computes the block again" in text


@pytest.mark.parametrize("ask", [lambda report: report.table("memroy"), lambda report: report.draw("memroy")])
def test_an_unknown_section_or_picture_is_an_error(decoder, ask):
    with pytest.raises(ShardingError, match="Did you mean 'memory'"):
        ask(decoder)


# Partial reports


@pytest.mark.parametrize("names", WITHOUT, ids=str)
def test_a_report_without_a_part_has_all_its_faces(decoder, names):
    partial = dataclasses.replace(decoder, **dict.fromkeys(names))
    assert str(partial)
    assert partial.to_html()
    assert partial.draw().text
    assert Report.from_json(partial.to_json()) == partial
    assert not partial.diff(partial)
    assert bool(partial.diff(decoder)) == bool(names)
    for section in ("memory", "collectives", "flops", "time", "findings"):
        assert partial.table(section)


def test_what_could_not_be_read_is_told(decoder):
    partial = dataclasses.replace(decoder, unread=tuple(f"line {at}: nonsense" for at in range(40)))
    assert "not read of the program: 40 things, such as" in str(partial)
    assert "line 0: nonsense" in partial.to_html()


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf])
def test_strange_times_are_drawn_too(decoder, seconds):
    timeline = dataclasses.replace(decoder.timeline, step_seconds=seconds)
    rows = tuple(dataclasses.replace(each, seconds=seconds) for each in decoder.collectives)
    strange = dataclasses.replace(decoder, timeline=timeline, collectives=rows)
    assert strange.mfu is None
    assert str(strange)
    assert strange.to_html()


# Pages and pictures


class Page(html.parser.HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "polygon", "polyline", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_needs_no_script_and_no_file(report):
    page = Page(report.to_html())
    assert not page.open
    assert "script" not in page.tags
    assert not page.links
    assert "url(" not in report.to_html()
    assert "@import" not in report.to_html()


def test_text_from_outside_is_escaped(decoder):
    finding = Finding(kind="<b>", severity="note", reason="<script>", place="<i>", remedy="<u>")
    row = dataclasses.replace(decoder.collectives[0], path="<img>", source="<a>", expected="<p>")
    page = dataclasses.replace(decoder, name="<title>", findings=(finding,), collectives=(row,), notes=("<hr>",))
    assert not {"script", "img", "i", "u", "a", "hr"} & Page(page.to_html()).tags


def test_nothing_kept_is_large(report):
    bundle, _ = report._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "image/png"}
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert len(bundle["text/html"]) + len(bundle["text/plain"]) + 4 / 3 * len(bundle["image/png"]) < 200_000 + 20_000
    assert len(report.to_html()) < 100_000


def test_without_matplotlib_there_is_no_png(decoder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bundle, _ = decoder._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert "<table" in bundle["text/html"]


def test_an_axis_has_its_colour_in_every_picture(decoder):
    from jaxpar._palette import hues

    hue = hues(["fsdp"])["fsdp"]
    for picture in ("timeline", "collectives", "mesh"):
        assert any(getattr(shape, "fill", "") == hue for shape in decoder.draw(picture).scene.shapes)


def test_a_step_of_any_length_is_drawn_with_few_shapes():
    report = REPORTS["llama_70b"]
    assert len(report.timeline.events) > 400
    assert len(report.draw("timeline").scene.shapes) < 400


def test_boxes_are_where_events_are(decoder):
    """The lane of a link is as full as its events: the sum of the boxes is the sum of their seconds."""
    from jaxpar._draw_scene import Area
    from jaxpar._palette import hues

    shapes = decoder.draw("timeline").scene.shapes
    boxes = [
        shape
        for shape in shapes
        if isinstance(shape, Area) and shape.fill == hues(["fsdp"])["fsdp"] and shape.opacity == 1
    ]
    drawn = sum(shape.points[1][0] - shape.points[0][0] + 1 for shape in boxes)  # a pixel between boxes
    events = sum(event.seconds for event in decoder.timeline.events if event.lane == "fsdp")
    assert drawn / (860 - 96 - 92) == pytest.approx(events / 10.1, rel=0.01)


def test_more_than_the_limit_is_said_and_drawn(decoder):
    memory = dataclasses.replace(decoder.memory, limit=2**32)
    over = dataclasses.replace(decoder, memory=memory, origin="refused")
    assert "4.6 GiB too much" in str(over)
    assert "memory and time are estimates" in str(over)
    assert over.draw("memory").scene.shapes


@pytest.mark.parametrize("suffix", [".html", ".json", ".txt", ".svg", ".png"])
def test_save(decoder, tmp_path, suffix):
    path = tmp_path / f"report{suffix}"
    decoder.save(path)
    assert 500 < path.stat().st_size < 200_000


def test_save_knows_no_other_ending(decoder, tmp_path):
    with pytest.raises(ShardingError, match=r"a report is written as .html, .json, .txt, .svg or .png, not '.pdf'"):
        decoder.save(tmp_path / "report.pdf")
