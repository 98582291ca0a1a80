"""A baseline in a file: what it survives, what it catches, and what it says then."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar._errors import ShardingError
from jaxpar.testing import assert_traffic, collectives
from tests.explain import _reports


@pytest.fixture
def update(monkeypatch):
    """Accept what is found, for as long as a `with` lasts."""

    def write(program, path):
        with monkeypatch.context() as patch:
            patch.setenv("JAXPAR_UPDATE_TRAFFIC", "1")
            assert_traffic(program, path)

    return write


@pytest.fixture
def report():
    return _reports.decoder_16b()


def replaced(report, old, *new):
    """The report with other rows in place of one."""
    rows = [each for each in report.collectives if each is not old]
    return dataclasses.replace(report, collectives=(*rows, *new))


def failure(program, path):
    with pytest.raises(AssertionError) as error:
        assert_traffic(program, path)
    return str(error.value).splitlines()


def test_a_report_agrees_with_what_it_wrote(report, update, tmp_path):
    path = tmp_path / "golden" / "traffic.json"
    update(report, path)
    assert_traffic(report, path)
    assert_traffic(report, str(path))
    assert len(path.read_text()) < 2000


def test_a_file_that_is_not_there_fails_and_is_not_written(report, tmp_path):
    path = tmp_path / "traffic.json"
    (line,) = failure(report, path)
    assert line == (
        f"{path} is not there, so there is nothing to compare with. To accept what the program does now: pytest "
        "--update-traffic, or JAXPAR_UPDATE_TRAFFIC=1 in the environment, writes traffic.json."
    )
    assert not path.exists()


def test_names_order_spelling_times_and_lines_may_differ(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    rows = [
        dataclasses.replace(each, name="other", spelling="fusion", source="b.py:1", seconds=9.0, wire_bytes=1)
        for each in reversed(report.collectives)
    ]
    assert_traffic(dataclasses.replace(report, collectives=tuple(rows), compiler="another"), path)


def test_tensors_may_be_combined(report, update, tmp_path):
    """Four gradients in one collective are the same traffic as four collectives."""
    path = tmp_path / "traffic.json"
    update(report, path)
    scattered = [each for each in report.collectives if each.kind == "reduce-scatter" and each.depth]
    assert len(scattered) == 4
    whole = dataclasses.replace(scattered[0], bytes=sum(each.bytes for each in scattered))
    others = tuple(each for each in report.collectives if each not in scattered)
    assert_traffic(dataclasses.replace(report, collectives=(*others, whole)), path)


def test_sums_of_a_few_numbers_may_come_and_go(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    small = next(each for each in report.collectives if each.bytes < 1024)
    assert_traffic(replaced(report, small), path)


def test_one_collective_more_fails_with_both_numbers_and_its_place(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    more = _reports.row("all-gather", size=2 * _reports.MIB, path="blocks.7.attn.k.kernel", name="new")
    changed = replaced(report, None, more)
    lines = failure(changed, path)
    assert lines[0] == f"What moves between devices is not what {path} says."
    by_another = failure(dataclasses.replace(changed, compiler="another"), path)
    assert by_another[0] == f"{lines[0]} It was compiled by {report.compiler}, now by another."
    assert by_another[1:] == lines[1:]
    assert lines[1] == (
        "  all-gather over fsdp, outside of loops: 524,288,000 bytes (500.0 MiB, 2 times) in the file, "
        "526,385,152 bytes (502.0 MiB, 3 times) now: +0.4 %"
    )
    assert lines[2] == "    + blocks.*.attn.k.kernel"
    assert lines[-1].startswith("To accept what the program does now: pytest --update-traffic")


def test_a_collective_that_is_gone_and_a_kind_that_is_new(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    head = next(each for each in report.collectives if each.kind == "reduce-scatter" and not each.depth)
    lines = failure(replaced(report, head, dataclasses.replace(head, kind="all-reduce")), path)
    assert (
        "  reduce-scatter over fsdp, outside of loops: 262,144,000 bytes (250.0 MiB, 1 times) in the file, nothing now"
    ) in lines
    assert any(line.startswith("  all-reduce over fsdp, outside of loops: 8,192 bytes") for line in lines)


@pytest.mark.parametrize("fields", [{"axes": ("data",)}, {"count": 96}, {"count": None}, {"bytes": 65}], ids=str)
def test_axes_counts_and_bytes_are_compared(report, update, tmp_path, fields):
    path = tmp_path / "traffic.json"
    update(report, path)
    first = report.collectives[0]
    assert failure(replaced(report, first, dataclasses.replace(first, **fields)), path)


def test_the_same_bytes_in_another_loop_are_said_to_be_the_same(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    first = report.collectives[0]
    lines = failure(replaced(report, first, dataclasses.replace(first, depth=2)), path)
    assert lines[-2] == "Over all loops together the bytes are the same: they only run at another place."


def test_another_mesh_is_an_error(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    with pytest.raises(ShardingError) as error:
        assert_traffic(dataclasses.replace(report, axes={"fsdp": 128}), path)
    assert str(error.value).endswith("the program is of {'fsdp': 128}. Keep a file for each mesh.")
    assert_traffic(dataclasses.replace(report, axes={"fsdp": 256}), path)  # an axis of size 1 is none


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "collectives": [{}]}'])
def test_what_is_no_baseline_is_an_error(report, tmp_path, text):
    path = tmp_path / "traffic.json"
    path.write_text(text)
    with pytest.raises(ShardingError, match=r"is no baseline of traffic .* writes traffic\.json\."):
        assert_traffic(report, path)


def test_another_format_is_an_error(report, update, tmp_path):
    path = tmp_path / "traffic.json"
    update(report, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ShardingError, match="has format 2, and this version of jaxpar reads 1"):
        assert_traffic(report, path)


def test_a_function_is_compared_too(update, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((16, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    path = tmp_path / "traffic.json"
    update(collectives(lambda x: x.sum(0), x), path)
    (row,) = json.loads(path.read_text())["collectives"]
    assert (row["kind"], row["axes"], row["depth"], row["bytes"], row["count"]) == ("all-reduce", ["data"], 0, 4096, 1)
    assert_traffic(lambda x: x.sum(0), path, x)
    with pytest.raises(AssertionError, match=r"4,096 bytes .* in the file, nothing now"):
        assert_traffic(lambda x: x.sum(1), path, x)


def test_a_report_is_not_compared_with_counts(report):
    with pytest.raises(ShardingError, match="a report has a row for each collective, not for each tensor"):
        assert_traffic(report, {("all-reduce", "fsdp"): 1})


def test_a_report_takes_no_arguments(report, tmp_path):
    with pytest.raises(ShardingError, match="arguments and a mesh have no effect"):
        assert_traffic(report, tmp_path / "traffic.json", jnp.ones(3))


def test_nothing_is_written_where_nothing_moves(update, tmp_path):
    path = tmp_path / "traffic.json"
    update(_reports.nothing(), path)
    assert json.loads(path.read_text())["collectives"] == []
    assert_traffic(_reports.nothing(), path)
