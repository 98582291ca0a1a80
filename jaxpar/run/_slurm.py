"""The batch script by which SLURM starts a group, hands it a notice in time, and queues it again.

SLURM signals the batch script alone (`B:`) two minutes before the time limit, and the script hands SIGTERM to the
processes: so it knows that the time was up and queues itself again, and a job that somebody cancelled stays cancelled.
Preemption (`PreemptMode=REQUEUE`) and a lost node queue it again without us.
"""

import dataclasses
import shlex

NOTICE = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """What to ask of SLURM.

    Attributes:
        command: What each process runs.
        num_processes: How many, over all nodes.
        nodes: On how many nodes; their processes share the node's GPUs evenly, so one per GPU and one per node are
            both right.
        gpus_per_node: GPUs to ask for on each node; 0 asks for none.
        time: The time limit, as SLURM writes it.
        name: Of the job.
        restarts: How often the group is started again within the job when a process fails.
        options: Further lines of `#SBATCH`: `--partition=large`.
    """

    command: tuple[str, ...]
    num_processes: int
    nodes: int = 1
    gpus_per_node: int = 0
    time: str = "24:00:00"
    name: str = "jaxpar"
    restarts: int = 5
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from .._errors import MeshError

        if self.num_processes % self.nodes:
            raise MeshError(
                f"num_processes={self.num_processes} are not the same number on each of nodes={self.nodes}. "
                "Use a multiple of the nodes."
            )

    def script(self) -> str:
        """The text of the batch script.

        Example:
            >>> text = Slurm(command=("python", "train.py"), num_processes=16, nodes=2, gpus_per_node=8).script()
            >>> [line for line in text.splitlines() if "B:USR1" in line or "srun --" in line]
            ['#SBATCH --signal=B:USR1@120', '    srun --kill-on-bad-exit=1 --label python train.py &']
        """
        asked = [
            f"--job-name={self.name}", f"--nodes={self.nodes}", f"--ntasks-per-node={self.num_processes // self.nodes}",
            f"--time={self.time}", f"--signal=B:USR1@{NOTICE}", "--requeue", "--open-mode=append", "--output=%x-%j.log",
        ]  # fmt: skip
        if self.gpus_per_node:
            asked.append(f"--gpus-per-node={self.gpus_per_node}")
        heads = "\n".join(f"#SBATCH {line}" for line in [*asked, *self.options])
        return _SCRIPT.format(heads=heads, command=shlex.join(self.command), restarts=self.restarts)


_SCRIPT = """\
#!/bin/bash
{heads}

# Written by `jaxpar launch --slurm`. SLURM sends USR1 to this script alone, before the time limit; the processes get
# SIGTERM, save, and end with 75; then the job is queued again. Exit code 70 or a failed limit ends it for good.

is_time_up=no
trap 'is_time_up=yes; kill -TERM "$srun" 2>/dev/null' USR1

for start in $(seq 0 {restarts}); do
    export JAXPAR_ATTEMPT=$(( ${{SLURM_RESTART_COUNT:-0}} * 1000 + start + 1 ))
    srun --kill-on-bad-exit=1 --label {command} &
    srun=$!
    wait "$srun"; code=$?
    while kill -0 "$srun" 2>/dev/null; do wait "$srun"; code=$?; done  # a signal ends `wait` before srun has ended

    if [ "$is_time_up" = yes ] && [ "$code" != 0 ]; then
        echo "The time is up: the job is queued again, and goes on from its last checkpoint."
        scontrol requeue "$SLURM_JOB_ID"
        exit 75
    fi
    case "$code" in
        0 | 70 | 75 | 130 | 143) exit "$code" ;;  # done; given up; stopped from outside
    esac
    echo "Start $(( start + 1 )) of the processes ended with code $code."
    sleep $(( start < 6 ? 1 << start : 60 ))
done
echo "Given up after {restarts} restarts."
exit 70
"""
