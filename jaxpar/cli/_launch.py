"""`jaxpar launch` and `jaxpar status`."""

import dataclasses
import pathlib
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from .._errors import MeshError
from ..run._every import parse_every
from ..run._launch import Launch as Group, launch
from ..run._slurm import Slurm
from ..run._status import status

ELASTIC = "MIN:MAX. Go on with as few as MIN processes when one does not come back, and grow to MAX again."
DEVICES = "CPU devices that each process simulates. By default the GPUs of this machine are shared out; without any, 1."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Start processes on this machine that find one another, and start them again when they fail: launch -- COMMAND.

    `jaxpar launch -n 4 -- python train.py --steps 1000`; the script calls jp.initialize() first. Exits with 0 when all
    end well, 75 after SIGTERM (saved: start it again), 130 after Ctrl-C, 70 when it gave up.
    """

    command: Suppress[tuple[str, ...]] = ()  # what stands after `--`
    num_processes: Annotated[int, arg(aliases=["-n"], help="How many; with --elastic, MAX by default.")] = 0
    devices_per_process: Annotated[int | None, arg(help=DEVICES)] = None
    elastic: Annotated[str | None, arg(metavar="MIN:MAX", help=ELASTIC)] = None
    restarts: int = 5
    """Give up after so many failures in a row without a new checkpoint between."""
    same_step: int = 3
    """Give up when one step fails so many times, one after another."""
    backoff: str = "1s"
    """Before the first restart; twice as long before the next."""
    frozen_after: str = "60s"
    """Kill the group when a process that lives is not heard of for so long."""
    stuck_after: str = "30min"
    """Kill the group when no step is completed for so long."""
    grace: str = "120s"
    """How long the processes have to save after SIGTERM."""
    regrow: str = "10min"
    """With --elastic: when a place that was left out is tried again."""
    slurm: bool = False
    """Start nothing: print the batch script for SLURM instead, for `sbatch`."""
    nodes: int = 1
    """With --slurm: on how many nodes."""
    gpus_per_node: int = 0
    """With --slurm: GPUs to ask for on each node."""
    time: str = "24:00:00"
    """With --slurm: the time limit."""

    def run(self) -> int:
        """Start and watch them, or print the script."""
        least, most = _range(self.elastic)
        num = self.num_processes or most or 1
        if most not in (None, num):
            raise MeshError(f"-n {num} and --elastic {self.elastic} name two numbers of processes. Leave -n out.")
        if self.slurm:
            print(self._script(num), end="")
            return 0
        return launch(
            Group(
                command=self.command,
                num_processes=num,
                least=least,
                devices_per_process=self.devices_per_process,
                restarts=self.restarts,
                same_step=self.same_step,
                backoff=_seconds("backoff", self.backoff),
                frozen_after=_seconds("frozen-after", self.frozen_after),
                stuck_after=_seconds("stuck-after", self.stuck_after),
                grace=_seconds("grace", self.grace),
                regrow=_seconds("regrow", self.regrow),
            )
        )

    def _script(self, num: int) -> str:
        if self.elastic or self.devices_per_process:
            raise MeshError(
                "--elastic and --devices-per-process are for processes of this machine, and have no effect with "
                "--slurm. Leave them out."
            )
        return Slurm(
            command=self.command,
            num_processes=num,
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            time=self.time,
            restarts=self.restarts,
        ).script()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Say in ten lines how a run stands: what failed, where, what was done about it, and who runs now."""

    directory: Annotated[Positional[pathlib.Path], arg(metavar="DIRECTORY", help="The directory of a run.")]

    def run(self) -> int:
        """Print it. Exits with 1 if the run has failed or is silent."""
        found = status(self.directory)
        print(found)
        return 1 if found.state in ("failed", "silent") else 0


def _range(elastic: str | None) -> tuple[int | None, int | None]:
    if elastic is None:
        return None, None
    least, colon, most = elastic.partition(":")
    if not (colon and least.isdigit() and most.isdigit() and 0 < int(least) <= int(most)):
        raise MeshError(f"--elastic {elastic}: write MIN:MAX, such as 2:4.")
    return int(least), int(most)


def _seconds(name: str, text: str) -> float:
    every = parse_every(int(text) if text.isdigit() else text)
    if every.seconds is None or every.steps is not None:
        raise MeshError(f"--{name} {text}: a time, such as 90s or 10min.")
    return every.seconds
