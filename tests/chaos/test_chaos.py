"""Runs that are killed, stopped, frozen and starved, by real processes: each ends as if nothing had happened.

Final parameters, optimiser, dropout's RNG and data position are those of an uninterrupted run on the same mesh, bit for
bit; each sample of an epoch was trained on once; and no checkpoint is half-visible. `make chaos` does it 50 times over.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxpar import checkpoint
from jaxpar.run import read, status
from jaxpar.run._beat import pulses

WORKER = pathlib.Path(__file__).parent / "worker.py"
BATCH = 8


def launcher(
    directory, env, *, num, loop="run", steps=24, every=3, faults=None, options=(), devices=1, under=(), **more
):
    """`jaxpar launch` of the worker, as a process of its own, `under` another command."""
    settings = {"loop": loop, "directory": str(directory), "steps": steps, "every": every, "batch": BATCH,
                "faults": faults or {}, **more}  # fmt: skip
    jaxpar = [sys.executable, "-m", "jaxpar", "launch", "-n", str(num), "--devices-per-process", str(devices)]
    with said(directory).open("a") as out:  # not a pipe: nobody reads while it runs
        return subprocess.Popen(
            [*under, *jaxpar, "--backoff", "0.1s", *options, "--", sys.executable, WORKER, json.dumps(settings)],
            env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process):
    """Kill a launcher and what it runs under, and with it what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def said(directory):
    """The file of what a launcher said."""
    return directory.with_suffix(".out")


def launched(directory, env, **options):
    """Its exit code, and what it said."""
    process = launcher(directory, env, **options)
    try:
        process.wait(timeout=280)
    finally:
        end(process)
    return process.returncode, said(directory).read_text()


@contextlib.contextmanager
def alongside(directory, env, **options):
    """The uninterrupted run, beside what is done meanwhile: that waits for deadlines, and this does not."""
    process = launcher(directory, env, **options)
    try:
        yield
        process.wait(timeout=280)
    finally:
        end(process)
    assert process.returncode == 0, said(directory).read_text()


def ids_by_step(directory, total):
    """The ids of each step, whichever start did it: all that did agree."""
    parts = {}
    for file in sorted(directory.with_suffix(".ids").iterdir()):
        attempt = file.name.partition("_")[0]
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            parts.setdefault((step, attempt), {}).update({int(row): each for row, each in rows.items()})
    found = {}
    for (step, _), rows in parts.items():
        ids = [each for _, each in sorted(rows.items())]
        if len(ids) == BATCH:  # of a step in which a process died some rows were never noted
            assert found.setdefault(step, ids) == ids
    assert sorted(found) == list(range(1, total + 1))
    return [found[step] for step in range(1, total + 1)]


def losses(directory):
    """By step; of one that was done again, the last."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def check_survived(directory, reference, total):
    there = checkpoint.steps(directory / "checkpoints")
    assert there[-1] == total
    assert checkpoint.verify(directory / "checkpoints") == there
    assert {path.name for path in (directory / "checkpoints").iterdir() if path.suffix == ".saving"} == set()
    found = checkpoint.diff(directory / "checkpoints", reference / "checkpoints")
    assert not found, str(found)
    ids = ids_by_step(directory, total)
    assert ids == ids_by_step(reference, total)
    line = [each for step in ids for each in step]
    epochs = [line[at : at + 64] for at in range(0, len(line), 64)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)  # none repeated, and with 64 none skipped
    assert losses(directory) == losses(reference)


def texts(directory, kind):
    return [event.text for event in read(directory) if event.kind == kind]


@pytest.mark.multiprocess
def test_two_processes_of_a_users_own_loop(child_env, tmp_path):
    """Killed inside a save, frozen, dead at start, and under clocks that jump: four faults in one run."""
    faults = {"1": ["killed in a save", 1, 5], "2": ["dies at start", 1], "3": ["SIGSTOP", 0, 11], "4": ["clocks jump"]}
    directory = tmp_path / "chaos"
    with alongside(tmp_path / "straight", child_env, num=2):
        code, out = launched(directory, child_env, num=2, faults=faults, options=["--frozen-after", "8s"])
    assert code == 0, out
    check_survived(directory, tmp_path / "straight", 24)

    # Each fault is one line: what happened, where, and what was done.
    killed, missing = texts(directory, "died")
    assert ("Process 1 of 2 on " in killed, ": SIGKILL." in killed, "Starting 2 again in " in killed) == (True,) * 3
    assert "died before its first step: exit code 1. " in missing
    assert missing.endswith("Last words: no such device.")
    (frozen,) = texts(directory, "frozen")
    assert "Process 0 of 2 on " in frozen
    assert "froze in step 11: it lives and was not heard of for 8 s; killed." in frozen
    found = status(directory)
    assert (found.state, found.step, found.saved, found.starts, len(found.faults)) == ("finished", 24, 24, 3, 3)
    assert len(str(found).splitlines()) <= 10
    logged = (directory / "logs" / "process_1.log").read_text()
    assert "no such device" in logged


# A disk of 4 MiB at $1, in a mount namespace that goes with its processes; what it holds at the end is left there.
SMALL_DISK = """
mount -t tmpfs -o size=4m tmpfs "$1" || exit 99
directory=$1
shift
"$@"
code=$?
cp -a "$directory/." "$directory.kept/"
exit $code
"""


def small_disk(directory):
    """What to start a launcher under, so that `directory` is a disk that can be filled; nothing where that is refused.

    The kernel may allow nobody but root to mount, and a container not even root.
    """
    directory.mkdir()
    under = ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL_DISK, "small disk", str(directory)]
    try:
        found = subprocess.run([*under, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return under if found.returncode == 0 else []


@pytest.mark.multiprocess
def test_one_process_of_fit(child_env, tmp_path):
    """A disk that is full for two starts, then SIGTERM, then a checkpoint with a flipped bit and one copied in half."""
    directory = tmp_path / "chaos"
    directory.with_suffix(".kept").mkdir()
    under = small_disk(directory)
    options = {"num": 1, "devices": 2, "loop": "fit"}
    faults = {"1": ["full disk", 0, 5], "2": ["full disk", 0, 5], "3": ["SIGTERM", 0, 14]}
    with alongside(tmp_path / "straight", child_env, **options):
        code, out = launched(directory, child_env, faults=faults, under=under, **options)
    assert code == 75, out
    if under:
        directory.rmdir()
        directory.with_suffix(".kept").rename(directory)
    why = "No space left on device" if under else "File too large"
    for text in texts(directory, "died"):
        assert re.match(
            r"Process 0 of 1 on .* died in step [6-9]: exit code 1\. Starting 1 again in .* from step 3\.", text
        )
        assert "Last words: CheckpointError: Step 6 could not be saved at checkpoints/6: " in text
        assert re.search(rf"{why}.* Earlier steps are as they were\.$", text)
    assert len(texts(directory, "died")) == 2
    assert texts(directory, "stop")[-1] == "Stopped by SIGTERM after step 14, saved; exit code 75."
    assert status(directory).state == "stopped"

    home = directory / "checkpoints"
    assert checkpoint.steps(home) == [9, 12, 14]
    flip_a_bit(home / "14")
    largest(home / "12").unlink()
    code, out = launched(directory, {**child_env, "SLURM_RESTART_COUNT": "1"}, **options)
    assert code == 0, out
    check_survived(directory, tmp_path / "straight", 24)
    aside = texts(directory, "set_aside")
    assert len(aside) == 2
    assert all("and was set aside" in text for text in aside)
    assert any("14 is damaged" in text and "other bytes than were saved (SHA-256)" in text for text in aside)
    if not under:
        pytest.skip("All held, but no disk was filled: a limit on file sizes stood for it, as mounting is refused.")


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(step):
    file = largest(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_four_processes_become_three_and_four_again(child_env, tmp_path):
    """One is killed for good: the run goes on with three, whose devices do not divide the batch, and grows again."""
    options = {"steps": 60, "every": 4, "dropout": False, "pause": 0.1, "mesh": {"data": -1}}
    assert launched(tmp_path / "straight", child_env, num=1, **options | {"pause": 0.0})[0] == 0
    directory = tmp_path / "elastic"
    elastic = ["--elastic", "2:4", "--regrow", "4s"]
    process = launcher(directory, child_env, num=4, faults={"1": ["for good", 3, 6]}, options=elastic, **options)
    try:
        until = time.monotonic() + 800
        while not texts(directory, "lost"):
            assert process.poll() is None, said(directory).read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        (directory / "broken_3").unlink()  # it is mended: the launcher finds that out by itself
        process.wait(timeout=800)
    finally:
        end(process)
    assert process.returncode == 0, said(directory).read_text()[-3000:]
    starts = [(event.step, event.more["processes"]) for event in read(directory) if event.kind == "start"]
    assert [count for _, count in starts if count == 3] == [3] * 3
    assert starts[-1][1] == 4
    (lost,) = texts(directory, "lost")
    assert "Place 3 did not come back, 2 times: going on with 3 processes." in lost
    assert texts(directory, "grow") == ["Trying 4 processes again: the 3 that run save and stop first."]
    assert ids_by_step(directory, 60) == ids_by_step(tmp_path / "straight", 60)
    check_losses(directory, tmp_path / "straight")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_onto_other_meshes_and_back(child_env, tmp_path):
    """8 devices of one process, 4, 2 processes of 4, 1, 2 and 4 stages, 8 again: one loss curve."""
    eight = {"data": 2, "fsdp": 2, "tensor": 2}
    assert launched(tmp_path / "straight", child_env, num=1, devices=8, mesh=eight, steps=28, layers=8)[0] == 0
    directory = tmp_path / "moved"
    for stop, num, devices, mesh in [
        (4, 1, 8, eight), (8, 1, 4, {"fsdp": 4}), (12, 2, 4, eight), (16, 1, 1, {"fsdp": 1}),
        (20, 1, 8, {"data": 2, "pipe": 2, "tensor": 2}), (24, 2, 4, {"fsdp": 2, "pipe": 4}), (28, 1, 8, eight),
    ]:  # fmt: skip
        code, out = launched(directory, child_env, num=num, devices=devices, mesh=mesh, steps=stop, layers=8)
        assert code == 0, out
    assert ids_by_step(directory, 28) == ids_by_step(tmp_path / "straight", 28)
    check_losses(directory, tmp_path / "straight")


def check_losses(directory, reference):
    """Sums in another order differ in the last bits of float32, and Adam divides by them."""
    found, expected = losses(directory), losses(reference)
    assert sorted(found) == sorted(expected)
    worst = max(abs(found[step] - expected[step]) / abs(expected[step]) for step in expected)
    print(f"\nlosses differ by {worst:.1e} at most")
    assert worst < 2e-5


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("loop", ["run", "fit"])
def test_random_kills(loop, child_env, tmp_path):
    """`make chaos`: kill -9 of a random process, at random instants, every third inside a save."""
    kills, steps = int(os.environ.get("JAXPAR_KILLS", "50")), 400
    seed = int(os.environ.get("JAXPAR_SEED", str(random.randrange(10**6))))
    chance = random.Random(seed)
    began = time.monotonic()
    assert launched(tmp_path / "straight", child_env, num=2, loop=loop, steps=steps, every=5)[0] == 0
    straight = time.monotonic() - began
    directory = tmp_path / "chaos"
    options = ["--same-step", "100", "--restarts", "100"]
    process = launcher(directory, child_env, num=2, loop=loop, steps=steps, every=5, pause=0.02, options=options)
    done, inside = 0, 0
    try:
        while process.poll() is None and done < kills:
            in_save = done % 3 == 0
            victim = wait_for_victim(process, directory, chance, in_save)
            if victim is None:
                break
            inside += any((directory / "checkpoints").glob("*.saving*"))
            os.kill(victim, signal.SIGKILL)
            done += 1
            until = time.monotonic() + 60
            while os.path.exists(f"/proc/{victim}") and time.monotonic() < until:  # noqa: PTH110
                time.sleep(0.01)
        process.wait(timeout=3600)
    finally:
        end(process)
    assert process.returncode == 0, said(directory).read_text()[-3000:]
    check_survived(directory, tmp_path / "straight", steps)
    found, leaves = status(directory), checkpoint._about.read(directory / "checkpoints" / str(steps)).leaves
    print(
        f"\n{loop}, seed {seed}: {done} kills ({inside} inside a save) in {time.monotonic() - began - straight:.0f} s, "
        f"{found.starts} starts in the loop, {found.again} of {steps} steps done again; all {len(leaves)} leaves "
        f"bitwise equal, all {steps * BATCH} ids as without kills, no checkpoint half-visible."
    )
    assert done == kills


def wait_for_victim(process, directory, chance, in_save):
    """The pid of a random process, once the group has done up to 14 steps, or is within its next save after that."""
    alive = lambda: [p for p in pulses(directory).values() if p.total and os.path.exists(f"/proc/{p.pid}")]  # noqa: PTH110
    while len(found := alive()) < 2:
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    victim, until = chance.choice(found), found[0].step + chance.randrange(15)
    is_there = lambda: victim.pid in [pulse.pid for pulse in alive()]
    while is_there() and pulses(directory)[victim.process].step < until:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))
    while in_save and is_there() and not any((directory / "checkpoints").glob("*.saving*")):
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.05))
    return victim.pid if is_there() else None
