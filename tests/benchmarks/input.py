"""Steps that wait for slow storage, with batches made ahead and without, in turn.

Storage takes a time a batch that wanders, now and then several steps long; a step takes a bit more than a batch does on
average. Waiting in a step is what the loop spends in `next`. That no step waits while a batch is there is asserted, in
`tests/data_pipeline/test_prefetch.py`; how deep to go is a matter of how much storage wanders.

    python tests/benchmarks/input.py
"""

import time

import numpy as np

from jaxpar.data import Loader, prefetch

STEP, STEPS, SLOW = 0.02, 200, 10  # seconds of a step, steps, and one batch of ten takes several steps


class Storage:
    fingerprint = "slow"

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(STEP * (3.0 if index % SLOW == SLOW - 1 else 0.5))
        return {"x": np.zeros(8, np.float32)}


def waited(batches):
    """Seconds in `next`, and in all."""
    next(batches)  # starts the thread
    time.sleep(10 * STEP)
    start, inside = time.perf_counter(), 0.0
    for _ in range(STEPS):
        asked = time.perf_counter()
        next(batches)
        inside += time.perf_counter() - asked
        time.sleep(STEP)
    return inside, time.perf_counter() - start


if __name__ == "__main__":
    for depth in (0, 0, 1, 2, 4, 8):
        loader = Loader(Storage(), batch_size=1, seed=None)
        if depth:
            with prefetch(loader, lambda batch: batch, depth=depth) as batches:
                inside, total = waited(batches)
        else:
            inside, total = waited(loader)
        print(f"{depth} ahead: {inside / total:6.1%} of the time is waiting; {total / STEPS * 1000:5.1f} ms a step")
