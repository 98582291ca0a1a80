"""A process of a chaos test: trains the program beside it by a loop of its own over `Run`, or by `fit`.

    python worker.py '{"loop": "run", "directory": ..., "steps": 24, "every": 3, "faults": {"1": ["raise", 0, 5]}}'

A fault belongs to one start of the group (`JAXPAR_ATTEMPT`) and one process. Each process notes the ids of the samples
of each of its steps beside the run's directory, whose disk may be full.
"""

import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time

settings = json.loads(sys.argv[1])
attempt = int(os.environ.get("JAXPAR_ATTEMPT", "1"))
slot = int(os.environ.get("JAXPAR_SLOT", "0"))
directory = pathlib.Path(settings["directory"])
fault, *where = settings.get("faults", {}).get(str(attempt), ["none"])
is_here = bool(where) and where[0] == slot

filler = directory / "filler"
if fault != "full disk":
    filler.unlink(missing_ok=True)  # somebody has made room
if fault == "dies at start" and is_here:
    sys.exit("no such device")
if (directory / f"broken_{slot}").exists():
    os._exit(13)

if fault == "clocks jump":
    # The wall clock of this process, before anything has imported it: every other step eight minutes forth or back.
    # (With more than 20 minutes Orbax, which reckons by it, calls a save of seconds too long.)
    import datetime as dt

    shift, honest = [0.0], time.time

    class Jumping(dt.datetime):
        __slots__ = ()

        @classmethod
        def now(cls, tz=None):
            return dt.datetime.fromtimestamp(time.time(), tz)

    time.time, dt.datetime = lambda: honest() + shift[0], Jumping

import jax
import numpy as np
from flax import nnx

import jaxpar as jp
from tests.chaos import program

jp.initialize()
if fault == "SIGTERM" and is_here and len(where) == 1:  # before the loop: JAX's preemption service takes it
    os.kill(os.getpid(), signal.SIGTERM)


class Noted:
    """Batches, whose ids are noted, and at whose steps something happens."""

    def __init__(self, batches):
        self.batches = batches
        self.get_state, self.close = batches.get_state, batches.close
        self.set_state = batches.set_state

    def __iter__(self):
        return self

    def __next__(self):
        step = self.batches.step + 1
        strike(step)
        batch = next(self.batches)
        shards = [(s.index[0].start or 0, np.asarray(s.data)) for s in batch["id"].addressable_shards]
        weights = [(s.index[0].start or 0, np.asarray(s.data)) for s in batch["weights"].addressable_shards]
        rows = {
            start + row: int(each)
            for (start, ids), (_, real) in zip(shards, weights, strict=True)
            for row, each in enumerate(ids)
            if real[row]
        }
        file = directory.with_suffix(".ids") / f"{attempt}_{jax.process_index()}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as opened:
            opened.write(json.dumps([step, rows]) + "\n")
        time.sleep(settings.get("pause", 0.0))
        return batch


def strike(step):
    if fault == "clocks jump" and step % 2:
        shift[0] = random.choice([-480.0, 0.0, 480.0])
    if not is_here or len(where) < 2 or step != where[1]:
        return
    if fault == "raise":
        raise RuntimeError("out of luck")
    if fault in ("SIGKILL", "SIGTERM", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, fault))
    if fault == "for good":
        (directory / f"broken_{slot}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "full disk":
        fill_the_disk()
    if fault == "killed in a save":
        threading.Thread(target=kill_in_a_save, daemon=True).start()


def fill_the_disk():
    """To the last byte, if the disk is a small one; else the kernel refuses what goes beyond 2 kB in any file."""
    while not (directory / "checkpoints" / "3").exists():  # whatever the machine's pace, there is one before
        time.sleep(0.01)
    if os.statvfs(directory).f_blocks * os.statvfs(directory).f_frsize > 2**30:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def kill_in_a_save():
    while not any((directory / "checkpoints").glob("*.saving*")):
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.02))
    os.kill(os.getpid(), signal.SIGKILL)


batch = {
    "x": np.zeros((settings["batch"], 16), np.float32),
    "id": np.zeros(settings["batch"], np.int32),
    "weights": np.ones(settings["batch"], np.float32),
    "sample": np.zeros(settings["batch"], np.int32),
}
mesh = jp.mesh(**settings.get("mesh", {"fsdp": -1}))
strategies = program.strategies(mesh)
make = lambda: program.Model(nnx.Rngs(0), dropout=settings.get("dropout", True), layers=settings.get("layers", 0))
loader = jp.data.Loader(program.Samples(), batch_size=settings["batch"])
if settings["loop"] == "fit":
    recipe = jp.Recipe(model=make, loss=program.loss_fn, optimizer=program.ADAM, strategies=strategies, batch=batch)
    trained = recipe.on(mesh)
    batches = Noted(loader.to(trained.plan))
    fitted = jp.fit(trained, batches, steps=settings["steps"], directory=directory, every=settings["every"])
    sys.exit(fitted.exit_code)

plan = jp.plan(make, mesh, strategies)
model = plan.init()
opt = nnx.Optimizer(model, program.ADAM, wrt=nnx.Param)


@plan.jit
def train_step(model, opt, batch):
    loss, grads = jp.value_and_grad(program.loss_fn)(model, batch)
    opt.update(model, grads)
    return loss


run = jp.Run(directory, every=settings["every"], writers=())
model, opt, batches = run.restore((model, opt, Noted(loader.to(plan))))
for _ in run.steps(settings["steps"]):
    run.log(loss=train_step(model, opt, next(batches)))
batches.close()
sys.exit(run.exit_code)
