"""Writers: JSON lines, the terminal, TensorBoard; each works alone."""

import json
import resource
import sys

import pytest

from jaxpar.run import Console, JSONLines, TensorBoard, Writer


def test_json_lines(tmp_path):
    writer = JSONLines(tmp_path / "new" / "metrics.jsonl")
    writer.write(1, {"loss": 2.5})
    writer.close()
    writer.write(2, {"loss": float("nan"), "eval/loss": 1.0})
    first, second = [json.loads(line) for line in writer.path.read_text().splitlines()]
    assert (first["step"], first["loss"], second["eval/loss"]) == (1, 2.5, 1.0)
    assert second["loss"] != second["loss"]
    assert first["time"] > 1.7e9


def test_lines_wait_for_room(tmp_path, caplog):
    """What a full disk refuses is whole in the file later, in order, once; of what did not fit no part stays."""
    writer = JSONLines(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 9, limits[1]))
    for step in (2, 3):
        writer.write(step, {"loss": 1.0})
    size = writer.path.stat().st_size
    writer.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (writer.path.read_text().count("\n"), size) == (1, writer.path.stat().st_size)
    assert "so metrics from step 2 on wait until there is room." in caplog.text
    assert "so 2 lines of metrics are lost." in caplog.text
    writer.write(4, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1, 2, 3, 4]
    assert caplog.text.count("metrics from step") == 1


def test_console_shows_the_first_and_the_last(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    writer = Console(seconds=5.0)
    for now in range(8):
        writer.write(now, {"loss": 1 / (now + 1), "tokens": 123456.0})
    assert capsys.readouterr().out == "step 0  loss 1  tokens 1.235e+05\nstep 5  loss 0.1667  tokens 1.235e+05\n"
    writer.close()
    writer.close()
    assert capsys.readouterr().out == "step 7  loss 0.125  tokens 1.235e+05\n"


def test_tensorboard(tmp_path):
    writer = TensorBoard(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()
    writer.write(1, {"loss": 2.5})
    writer.close()
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs tensorboardX: pip install 'jaxpar\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_all_are_writers(tmp_path):
    assert all(isinstance(writer, Writer) for writer in (JSONLines("m"), Console(), TensorBoard(tmp_path)))
