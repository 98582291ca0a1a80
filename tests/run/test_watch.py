"""Faults in a real loop: the run goes back, leaves the batch out, and ends as a run that never had it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import StepError
from jaxpar.data import Loader
from jaxpar.run import Hang, Loss, Replicas, Run, Slow, read


class Rows:
    """Sample `i` is `i`, and those that are bad are no numbers."""

    fingerprint = "rows"

    def __init__(self, *bad):
        self.bad = bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": np.float32(math.nan if index in self.bad else index)}


class Counter(nnx.Module):
    def __init__(self):
        self.total = nnx.Param(jnp.zeros(()))


@nnx.jit
def step_of(model, x):
    model.total[...] = model.total[...] * 0.9 + x.sum()
    return x.mean()


def train(directory, *bad, steps=12, every=3, seen=None, **given):
    """The sum over batches; `seen` gets the samples of each step done."""
    run = Run(directory, every=every, keep=None, writers=(), **given)
    loader = Loader(Rows(*bad), batch_size=2, seed=None)
    model, loader = run.restore((Counter(), loader))
    for step in run.steps(steps):
        batch = next(loader)
        if seen is not None:
            seen[step] = batch["sample"].tolist()
        run.log(loss=step_of(model, batch["x"]))
    return run, float(model.total[...])


def kinds(run):
    return [event.kind for event in read(run.directory)]


def test_a_batch_that_is_no_number_is_left_out(tmp_path):
    """Ends in the bits of a run over the other batches, each once; one line says what happened and what was done."""
    seen = {}
    run, total = train(tmp_path / "run", 15, seen=seen)  # of step 8
    assert seen == {step: [2 * (step - 1 + (step >= 8)), 2 * (step - 1 + (step >= 8)) + 1] for step in range(1, 13)}
    model = Counter()
    for step in range(1, 13):
        step_of(model, jnp.array(seen[step], jnp.float32))
    assert total == float(model.total[...])
    (fault,) = [event for event in read(run.directory) if event.kind == "nan"]
    assert fault.text == "loss is nan in step 8. The run goes back to step 6; the batch of step 8 is left out."
    assert kinds(run) == ["start", "save", "save", "nan", "rollback", "skip", "save", "save", "stop"]
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9), *range(7, 13)]


def test_a_resumed_run_leaves_out_the_same(tmp_path):
    _, whole = train(tmp_path / "whole", 15)
    train(tmp_path / "parts", 15, steps=9)
    later = {}
    run, total = train(tmp_path / "parts", 15, seen=later)
    assert (total, min(later)) == (whole, 10)
    assert later[10] == [20, 21]
    for step in checkpoints_after(run, 6):
        jp.checkpoint._steps._delete(run.directory / "checkpoints", step)
    again = {}
    assert train(tmp_path / "parts", 15, seen=again)[1] == whole
    assert again[8] == [16, 17]


def checkpoints_after(run, step):
    return [each for each in jp.checkpoint.steps(run.directory / "checkpoints") if each > step]


def test_a_checkpoint_of_a_bad_step_is_not_made(tmp_path):
    """The loss of the step that is saved is looked at first; the state before the step before is gone back to."""
    run, _ = train(tmp_path / "run", 17)  # of step 9, which saves
    (fault,) = [event for event in read(run.directory) if event.kind == "nan"]
    assert "loss is nan in step 9. The run goes back to step 6" in fault.text
    assert jp.checkpoint.verify(run.directory / "checkpoints") == [3, 6, 9, 12]


def test_a_loss_that_stays_bad_ends_the_run(tmp_path):
    with pytest.raises(
        StepError, match=r"loss is nan in step 7, again, and the run went back 3 times within 1000 steps"
    ):
        train(tmp_path / "run", *range(14, 40))
    events = read(tmp_path / "run")
    assert [event.kind for event in events].count("rollback") == 3
    assert [event.text for event in events if event.kind == "nan"][-1].endswith("already.")


def test_without_a_checkpoint_the_run_goes_on(tmp_path):
    run, total = train(tmp_path / "run", 3, 7, every=None)
    assert math.isnan(total)
    (fault,) = [event for event in read(run.directory) if event.kind == "nan"]
    assert fault.text.endswith("There is no checkpoint before it to go back to, so the run goes on.")


def test_nothing_is_looked_for_if_nothing_is_asked(tmp_path):
    run, total = train(tmp_path / "run", 15, watch=())
    assert math.isnan(total)
    assert "nan" not in kinds(run)


def test_a_spike(tmp_path):
    """Sample 30 and 31 are 100 times what is usual: step 16 is left out, resumed or not."""

    class Spiked(Rows):
        def __getitem__(self, index):
            return {"x": np.float32(300.0 if index == 30 else 2 + index % 3)}

    def spiked(directory, steps):
        run = Run(directory, every=4, writers=(), watch=[Loss(spike=10, window=8)])
        model, loader = run.restore((Counter(), Loader(Spiked(), batch_size=2, seed=None)))
        for _ in run.steps(steps):
            run.log(loss=step_of(model, next(loader)["x"]))
        return run, float(model.total[...])

    run, total = spiked(tmp_path / "whole", 19)
    (fault,) = [event for event in read(run.directory) if event.kind == "spike"]
    assert fault.text.startswith("loss is 151.5 in step 16, and 3 is usual (")
    assert fault.text.endswith("The run goes back to step 12; the batch of step 16 is left out.")
    spiked(tmp_path / "parts", 14)
    resumed, again = spiked(tmp_path / "parts", 19)
    assert again == total
    assert "spike" in kinds(resumed)


def plain(directory, *, follows, **given):
    """A loop over plain arrays."""
    run = Run(directory, every=3, writers=(), **given)
    state, loader = run.restore(({"w": jnp.zeros(())}, Loader(Rows(15), batch_size=2, seed=None)))
    for _ in run.steps(12):
        if follows:
            state, loader = run.state
        x = jnp.asarray(next(loader)["x"])
        state = {"w": state["w"] * 0.9 + x.sum()}
        run.update((state, loader))
        run.log(loss=x.mean())
    return run, float(state["w"])


def test_a_loop_over_plain_arrays_follows_or_is_started_again(tmp_path):
    _, total = plain(tmp_path / "follows", follows=True)
    assert math.isfinite(total)
    with pytest.raises(SystemExit) as left:
        plain(tmp_path / "restarted", follows=False)
    assert left.value.code == 76
    (fault,) = [event for event in read(tmp_path / "restarted") if event.kind == "nan"]
    assert fault.text.endswith("the batch of step 8 is left out, when it is started again (code 76).")
    assert plain(tmp_path / "restarted", follows=False)[1] == total


@pytest.mark.parametrize("checked", [2, 4], ids=["saved before", "nothing sound is saved"])
def test_a_corrupted_copy_is_found_and_undone(checked, tmp_path):
    """A device's copy of a replicated parameter changes in step 6: found after it, named, and the run is as without."""
    from tests.run.test_replicas import corrupted

    mesh = jp.mesh(data=-1)

    def run_of(directory, *, device=None):
        run = Run(directory, every=4, writers=(), watch=[Replicas(every=checked)])
        sharding = NamedSharding(mesh, P())
        model = Counter()
        model.total.set_value(jax.device_put(jnp.zeros(3), sharding))
        model = run.restore(model)
        for step in run.steps(8):
            model.total.set_value(jax.device_put(model.total[...] + np.float32(step), sharding))
            if step == 6 and device is not None:
                model.total.set_value(corrupted(model.total[...], device, bit=64))
                device = None
        return run, model.total[...]

    _, clean = run_of(tmp_path / "clean")
    run, total = run_of(tmp_path / "run", device=mesh.devices.flat[5])
    assert total.tolist() == clean.tolist()
    assert {float(np.asarray(shard.data)[-1]) for shard in total.addressable_shards} == {36.0}
    (fault,) = [event for event in read(run.directory) if event.kind == "disagree"]
    found_at = 6 if checked == 2 else 8
    assert fault.text == (
        f"After step {found_at} total on {mesh.devices.flat[5]} of process 0 is not what the other 7 hold. "
        "The run goes back to step 4."
    )


def test_without_a_sound_checkpoint_a_corrupted_copy_ends_the_run(tmp_path):
    from tests.run.test_replicas import corrupted

    mesh = jp.mesh(data=-1)
    run = Run(tmp_path, writers=(), watch=[Replicas(every=1)])
    model = Counter()
    model.total.set_value(jax.device_put(jnp.zeros(3), NamedSharding(mesh, P())))
    model = run.restore(model)
    steps = run.steps(3)
    next(steps)
    model.total.set_value(corrupted(model.total[...], mesh.devices.flat[1]))
    with pytest.raises(StepError, match="and there is no checkpoint before it to go back to"):
        next(steps)


def test_watchers_are_one_of_a_kind(tmp_path):
    with pytest.raises(StepError, match="Loss is there twice"):
        Run(tmp_path, watch=[Loss(), Loss(spike=5)])
    Run(tmp_path, watch=[Loss(), Slow(), Hang(), Replicas()])
    with pytest.raises(StepError, match="every is at least 1 step"):
        Replicas(every=0)


class Sum:
    """A program for `fit`: sums what it is given, over eight devices."""

    plan = jp.plan(lambda: {"w": jnp.zeros((8, 8))}, jp.mesh(data=-1), [jp.DP()])

    def init(self):
        return self.plan.init()

    def step(self, state, batch):
        return {"w": state["w"] * 0.9 + batch["x"].sum()}, {"loss": batch["x"].mean(), "weight": 8.0}

    def eval_step(self, state, batch):
        raise NotImplementedError


def test_fit_goes_back(tmp_path):
    """With batches that are made ahead, on the devices."""
    directory = tmp_path / "run"
    loader = Loader(Rows(30), batch_size=8, seed=None)  # bad in step 4
    fitted = jp.fit(Sum(), loader, steps=8, directory=directory, every=1)
    weights = np.float32(0)
    for step in (0, 1, 2, 4, 5, 6, 7, 9):  # 3 and 8 hold sample 30, in the first epoch and the second
        weights = weights * np.float32(0.9) + np.float32((np.arange(8 * step, 8 * step + 8) % 40).sum())
    np.testing.assert_allclose(np.asarray(fitted.state["w"]), weights, rtol=1e-6)
    texts = [event.text for event in read(directory) if event.kind == "nan"]
    assert texts == [
        "loss is nan in step 4. The run goes back to step 2; the batch of step 4 is left out.",
        "loss is nan in step 8. The run goes back to step 6; the batch of step 8 is left out.",
    ]
