"""Damage of every kind is seen before a number of it is used, named, and passed over aloud."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import checkpoint
from jaxpar._errors import CheckpointError

LIKE = {"w": np.zeros((16, 16), np.float32)}


def message(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def name(path, file):
    return str(file.relative_to(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Steps 1 and 2, to be copied: a test damages its copy."""
    home = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        checkpoint.save(home, step, {"w": jnp.arange(256.0).reshape(16, 16) + step})
    return home


@pytest.fixture
def home(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "home", copy_function=os.link)  # a fault replaces a file, by `put`


def put(file, data):
    """Other bytes under the name of `file`, which may be linked elsewhere."""
    file.unlink()
    file.write_bytes(data)


def test_sha256sum_checks_it_too(whole):
    found = subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=whole / "2", check=False)
    assert found.returncode == 0
    listed = {line[66:] for line in (whole / "2" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {name(whole / "2", file) for file in files(whole / "2")} - {"SHA256SUMS"}
    assert checkpoint.verify(whole) == [1, 2]


def test_a_flipped_bit_anywhere_is_seen(home):
    """Every file, one bit in the middle and one at the end: none passes, and no other step is blamed."""
    step, rng = home / "2", np.random.default_rng(0)
    for file in files(step):
        data = file.read_bytes()
        for at in {int(rng.integers(len(data))), len(data) - 1} if data else ():
            put(file, data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
            assert f"{home}: step 2 is damaged." in message(checkpoint.verify, home), (file, at)
            put(file, data)
    assert checkpoint.verify(home) == [1, 2]


def biggest(step):
    """The file with the numbers."""
    return max(step.rglob("d/*"), key=lambda file: file.stat().st_size)


def flip(step):
    file = biggest(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    put(file, bytes(data))
    return f"{name(step, file)}: other bytes than were saved (SHA-256)"


def truncate(step):
    file = biggest(step)
    size = file.stat().st_size
    put(file, file.read_bytes()[: size // 2])
    return f"{name(step, file)}: {size // 2:,} bytes, and {size:,} were saved"


def lose(step):
    file = biggest(step)
    file.unlink()
    return f"{name(step, file)}: missing"


def add(step):
    (step / "state" / "more").write_text("x")
    return "state/more: was not saved with it"


def link(step):
    """The same bytes, elsewhere: a checkpoint reads nothing outside of its directory."""
    file = biggest(step)
    outside = file.rename(step.parent / "outside")
    file.symlink_to(outside)
    return f"{name(step, file)}: neither a file nor a directory (a link?)"


def lose_the_sums(step):
    (step / "SHA256SUMS").unlink()
    return "SHA256SUMS: missing"


def lose_one_sum(step):
    sums = (step / "SHA256SUMS").read_text().splitlines(keepends=True)
    put(step / "SHA256SUMS", "".join(sums[1:]).encode())
    return f"{sums[0][66:-1]}: was not saved with it"


def spoil_the_sums(step):
    put(step / "SHA256SUMS", b"../../../etc/passwd\n")
    return "SHA256SUMS: not a list of SHA-256 sums"


def empty(step):
    shutil.rmtree(step)
    step.mkdir()
    return "an empty directory"


def link_the_step(step):
    step.rename(step.parent / "elsewhere")
    step.symlink_to(step.parent / "elsewhere")
    return "not a directory of its own (a link?)"


FAULTS = [flip, truncate, lose, add, link, lose_the_sums, lose_one_sum, spoil_the_sums, empty, link_the_step]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_step_is_named_and_passed_over(fault, home, caplog):
    line = fault(home / "2")
    assert checkpoint.restore(home, LIKE)["w"][0, 0] == 1  # of step 1
    assert caplog.messages == [f"{home}: step 2 is DAMAGED, so the latest valid step is 1.\n2: {line}"]
    assert message(checkpoint.restore, home, LIKE, 2) == (
        f"{home}/2 is damaged.\n{line}\nComplete: {'1, 2' if fault is flip else '1'}. Copy it again from where it is "
        "whole, or restore without a step, which takes the newest that is valid."
    )
    assert message(checkpoint.verify, home) == (
        f"{home}: step 2 is damaged.\n2: {line}\nCopy it again from where it is whole, or delete it; restore without a "
        "step passes over it."
    )
    assert checkpoint.latest(home) == 1
    assert checkpoint.verify(home, 1) == [1]


def test_no_valid_step_is_left(home):
    lines = [flip(home / "1"), flip(home / "2")]
    assert message(checkpoint.restore, home, LIKE) == (
        f"{home} holds no valid checkpoint: steps 1, 2 are damaged.\n2: {lines[1]}\n1: {lines[0]}\n"
        "Copy one again from where it is whole, or start in another directory."
    )


def test_damage_leaves_the_reader_untouched(home):
    flip(home / "2")
    like = {"w": jnp.zeros((16, 16))}
    message(checkpoint.restore, home, like, 2, donate=True)
    assert not like["w"].is_deleted()


def test_metadata_of_a_changed_file(home):
    file = home / "2" / "checkpoint.json"
    put(file, file.read_bytes().replace(b'"flax"', b'"flix"'))
    assert "2 is damaged.\ncheckpoint.json: other bytes than were saved" in message(checkpoint.metadata, home)


def test_the_newest_valid_step_is_never_pruned(home, caplog):
    flip(home / "2")
    assert checkpoint.prune(home, 1) == []
    (said,) = caplog.messages
    assert said.startswith(f"{home}: step 2 is DAMAGED, so the latest valid step is 1.\n2: state/")
    flip(home / "1")
    assert "holds no valid checkpoint: steps 1, 2 are damaged" in message(checkpoint.prune, home, 1)
    assert checkpoint.steps(home) == [1, 2]


def test_older_steps_are_pruned_while_the_newest_is_valid(home):
    flip(home / "1")
    assert checkpoint.prune(home, 1) == [1]
    assert checkpoint.steps(home) == [2]


@pytest.mark.parametrize("written", ["[]", "{", '{"jaxpar": 1}', '{"jaxpar": 2}'])
def test_a_forged_description(written, home):
    """Even with its sum set right, what is no description is no checkpoint."""
    put(home / "2" / "checkpoint.json", written.encode())
    sums = checkpoint._sums.of_files(home / "2", checkpoint._sums.read(home / "2"))
    put(home / "2" / "SHA256SUMS", b"")
    checkpoint._sums.write(home / "2", sums)
    assert "\ncheckpoint.json: " in message(checkpoint.restore, home, LIKE, 2)


@pytest.mark.parametrize("leaf", ['[[-1], "float32"]', '[[1], "object"]', '[[1], "float33"]', "[]", "3"])
def test_a_forged_leaf(leaf, home):
    file = home / "2" / "checkpoint.json"
    written = json.loads(file.read_text())
    put(file, json.dumps({**written, "leaves": {"w": json.loads(leaf)}}).encode())
    with pytest.raises(ValueError, match=r"^w: .* is not the shape and dtype of an array$"):
        checkpoint._about.read(home / "2")


CHILD = """
    import os, signal, sys
    import jax.numpy as jnp
    from jaxpar import checkpoint

    tree = {"w": jnp.ones((256, 256))}
    checkpoint.save(sys.argv[1], 1, tree)
    at = sys.argv[2]
    steps = checkpoint._save._sums
    real = getattr(steps, at)

    def kill(*args, **kwargs):
        if at == "write":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(steps, at, kill)
    checkpoint.save(sys.argv[1], 2, tree)
"""


@pytest.mark.parametrize("at", ["of_files", "write"])
def test_a_kill_before_the_commit(at, child_env, tmp_path):
    """Orbax has finished, the sums are not there, or are: the step is not visible, and can be saved again."""
    script = [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path, at]
    assert subprocess.run(script, env=child_env, check=False).returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.saving"]
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.verify(tmp_path) == [1]
    checkpoint.save(tmp_path, 2, {"w": jnp.ones((256, 256))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def of_files(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._sums, "of_files", of_files)
    saving = checkpoint.save_async(tmp_path, 3, {"w": jnp.ones(3)})
    assert message(saving.wait) == (
        f"Step 3 could not be saved at {tmp_path}/3: [Errno 28] No space left on device. "
        "Earlier steps are as they were."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_nobody_waits_for_is_told_at_exit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint._sums, "of_files", lambda *_, **__: 1 / 0)
    for step, waits in ((1, True), (2, False)):
        saving = checkpoint.save_async(tmp_path, step, {"w": jnp.ones(3)})
        saving._thread.join()
        if waits:
            message(saving.wait)
    checkpoint._save._tell()
    (said,) = caplog.messages
    assert said.startswith(f"Step 2 could not be saved at {tmp_path}/2: division by zero")


def test_orbax_reads_it(whole):
    """Without jaxpar, a step is an Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    assert ocp.load(str(whole / "2"), {"w": np.empty((16, 16), np.float32)})["w"][0, 0] == 2
