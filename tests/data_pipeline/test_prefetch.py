"""Made ahead, in order, no more than asked; what goes wrong shows where the batch was taken; nothing is left behind."""

import gc
import threading
import time

import jax
import numpy as np
import pytest

from jaxpar._errors import DataError
from jaxpar.data import Loader, prefetch


def samples(size):
    return [{"x": np.array(index)} for index in range(size)]


def steps_of(loader):
    """Loader whose batch is its step, with a list of those made."""
    made = []
    original = loader.batch

    def batch(step):
        made.append(step)
        return original(step)

    loader.batch = batch
    return loader, made


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    gc.collect()
    wait_for(lambda: not threads())


def test_the_same_batches_in_order():
    expected = Loader(samples(7), batch_size=3, seed=5)
    with prefetch(Loader(samples(7), batch_size=3, seed=5), jax.device_put) as batches:
        for step in range(10):
            batch = next(batches)
            assert isinstance(batch["x"], jax.Array)
            assert batch["x"].tolist() == expected.batch(step)["x"].tolist()


def test_state_is_of_the_batches_taken():
    """Not of those made ahead; from either object."""
    loader, made = steps_of(Loader(samples(100), batch_size=2, seed=None))
    with prefetch(loader, lambda batch: batch, depth=3) as batches:
        next(batches)
        wait_for(lambda: len(made) >= 4)
        assert batches.get_state() == loader.get_state()
        assert (batches.step, batches.get_state()["step"]) == (1, 1)
        state = batches.get_state()
    other = prefetch(Loader(samples(100), batch_size=2, seed=None), lambda batch: batch)
    other.set_state(state)
    assert next(other)["x"].tolist() == [2, 3]
    other.close()


def test_bounded():
    loader, made = steps_of(Loader(samples(100), batch_size=1, seed=None))
    with prefetch(loader, lambda batch: batch, depth=2) as batches:
        next(batches)
        wait_for(lambda: len(made) == 3)
        time.sleep(0.1)
        assert made == [0, 1, 2]  # the one in use and two ahead
        next(batches)
        wait_for(lambda: len(made) == 4)


def test_nothing_starts_before_the_first_batch():
    loader, made = steps_of(Loader(samples(100), batch_size=1))
    with prefetch(loader, lambda batch: batch):
        assert (made, threads()) == ([], [])


@pytest.mark.parametrize("through", ["prefetched", "loader"])
def test_set_state_while_running(through):
    loader = Loader(samples(100), batch_size=1, seed=None)
    with prefetch(loader, lambda batch: batch) as batches:
        state = batches.get_state()
        taken = [next(batches)["x"].item() for _ in range(4)]
        (batches if through == "prefetched" else loader).set_state(state)
        assert [next(batches)["x"].item() for _ in range(5)] == [*taken, 4]


def test_an_exception_shows_at_its_batch_and_skips_none():
    fails = [True]

    class Flaky(list):
        def __getitem__(self, index):
            if index == 2 and fails:
                raise OSError("the disk went away")
            return super().__getitem__(index)

    with prefetch(Loader(Flaky(samples(10)), batch_size=1, seed=None), lambda batch: batch) as batches:
        assert [next(batches)["x"].item() for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                next(batches)
            assert batches.step == 2
        fails.clear()
        assert [next(batches)["x"].item() for _ in range(2)] == [2, 3]


def test_an_interrupt_skips_none(monkeypatch):
    with prefetch(Loader(samples(10), batch_size=1, seed=None), lambda batch: batch) as batches:
        next(batches)
        with monkeypatch.context() as patch:
            patch.setattr(type(batches._ahead), "__next__", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(batches)
        assert next(batches)["x"].item() == 1


def test_close_while_a_batch_is_being_made():
    """Returns at once, and a later batch is right."""
    going = threading.Event()

    class Slow(list):
        def __getitem__(self, index):
            if index >= 1:
                going.wait(100)
            return super().__getitem__(index)

    batches = prefetch(Loader(Slow(samples(5)), batch_size=1, seed=None), lambda batch: batch)
    next(batches)
    began = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - began < 50
    going.set()
    wait_for(lambda: not threads())
    assert next(batches)["x"].item() == 1
    batches.close()


def test_dropped_without_close():
    batches = prefetch(Loader(samples(100), batch_size=1), lambda batch: batch)
    next(batches)
    assert threads()
    del batches
    gc.collect()
    wait_for(lambda: not threads())


def test_one_pass_ends_and_starts_over():
    loader = Loader(samples(5), batch_size=2, seed=None, epochs=1)
    batches = prefetch(loader, jax.device_put)
    for _ in range(2):
        assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert (batches.num_steps, batches.step) == (3, 0)


def test_a_put_that_returns_nothing():
    batches = prefetch(Loader(samples(5), batch_size=2), lambda batch: None)
    with pytest.raises(DataError, match="Batch 0 is None once placed"):
        next(batches)


def test_depth():
    with pytest.raises(DataError, match="depth=0: at least 1 batch is made ahead"):
        prefetch(Loader(samples(5), batch_size=2), jax.device_put, depth=0)


def test_slow_storage_stalls_no_step():
    """Each step finds its batch made, while the storage is at work on a later one that takes as long as it likes."""
    asked, release = [], threading.Semaphore(0)

    class Storage(list):
        def __getitem__(self, index):
            asked.append(index)
            release.acquire()
            return super().__getitem__(index)

    release.release(2)  # the loader looks at sample 0 when it is made; then batch 0
    loader = Loader(Storage(samples(100)), batch_size=1, seed=None)
    asked.clear()
    with prefetch(loader, lambda batch: batch, depth=3) as batches:
        next(batches)
        release.release(3)
        wait_for(lambda: asked == [0, 1, 2, 3])
        assert release._value == 0
        for step in range(1, 20):
            # Read `step + 3` hangs, and this batch is there all the same: nothing is released until it was taken.
            wait_for(lambda ahead=step + 2: asked[-1] >= ahead)
            assert next(batches)["x"].item() == step
            release.release()
        release.release(10)
