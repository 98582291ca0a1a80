"""The batch script for SLURM, run by bash with an `srun` and a `scontrol` that stand in for SLURM's own."""

import os
import signal
import subprocess
import time

import pytest

from jaxpar._errors import MeshError
from jaxpar.run._slurm import Slurm

SRUN = """#!/bin/bash
# Runs one task, hands signals on to it as srun does, and notes that it was started.
echo start "$JAXPAR_ATTEMPT" >> {log}
trap 'kill -TERM $task' TERM
{task} &
task=$!
wait $task; code=$?
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""
SAVES = "bash -c 'trap \"exit 75\" TERM; while true; do sleep 0.02; done'"


@pytest.fixture
def job(tmp_path):
    """Starts the batch script with a task; returns the process and the log of what SLURM was asked."""

    def start(task, **options):
        log = tmp_path / "log"
        tools = {"srun": SRUN.format(log=log, task=task), "scontrol": f"#!/bin/bash\necho scontrol $* >> {log}\n"}
        tools["sleep"] = "#!/bin/bash\nexec /bin/sleep 0.02\n"
        for name, text in tools.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        script = Slurm(command=("python", "train.py"), num_processes=2, **options).script()
        (tmp_path / "job.sh").write_text(script)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
        return subprocess.Popen(["bash", tmp_path / "job.sh"], env=env, start_new_session=True), log

    return start


def asked(log):
    return log.read_text().splitlines()


def wait_for(log, text):
    until = time.monotonic() + 20
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_heads():
    text = Slurm(
        command=("python", "a file.py"), num_processes=16, nodes=2, gpus_per_node=8, options=("--partition=large",)
    ).script()
    heads = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert heads == [
        "--job-name=jaxpar", "--nodes=2", "--ntasks-per-node=8", "--time=24:00:00", "--signal=B:USR1@120", "--requeue",
        "--open-mode=append", "--output=%x-%j.log", "--gpus-per-node=8", "--partition=large",
    ]  # fmt: skip
    assert "srun --kill-on-bad-exit=1 --label python 'a file.py' &" in text
    with pytest.raises(MeshError, match="num_processes=3 are not the same number on each of nodes=2"):
        Slurm(command=("true",), num_processes=3, nodes=2)


def test_the_end(job):
    process, log = job("true")
    assert process.wait(20) == 0
    assert asked(log) == ["start 1"]


def test_time_is_up(job):
    """USR1 to the script alone: the processes get SIGTERM and save, and the job is queued again."""
    process, log = job(SAVES)
    wait_for(log, "start 1")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert asked(log) == ["start 1", "scontrol requeue 42"]


def test_a_cancelled_job_stays_cancelled(job):
    """SIGTERM to all that belongs to the job, as scancel sends it: saved, and not queued again."""
    process, log = job(SAVES)
    wait_for(log, "start 1")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) in (75, -signal.SIGTERM)
    assert asked(log) == ["start 1"]


def test_failures_start_it_again_within_the_job(job):
    process, log = job("exit 3", restarts=2)
    assert process.wait(20) == 70
    assert asked(log) == ["start 1", "start 2", "start 3"]


def test_given_up_is_given_up(job):
    process, log = job("exit 70")
    assert process.wait(20) == 70
    assert asked(log) == ["start 1"]
