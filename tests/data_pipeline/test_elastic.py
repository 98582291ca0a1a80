"""Processes come and go in the middle of an epoch: each sample is seen as often as by one process, in the same step."""

import collections
import itertools

import numpy as np
import pytest

from jaxpar.data import Loader, tokenise


class Rows:
    fingerprint = "rows"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"x": np.int32(index), "weights": np.float32(1)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    random = np.random.default_rng(0)
    files = [folder / f"{index}.txt" for index in range(5)]
    for file in files:
        file.write_bytes(bytes(random.integers(97, 123, random.integers(30, 90)).tolist()))
    return tokenise(files, folder / "cache")


def sources(tokens):
    return {
        "shuffled, several epochs": (Rows(29), {"seed": 3}),
        "the end of an epoch within a batch": (Rows(7), {"seed": None}),
        "two epochs, then the end": (Rows(29), {"seed": 3, "epochs": 2}),
        "packed": (tokens, {"seed": 1, "seq_len": 16}),
    }


COUNTS = [4, 3, 5, 1, 2]  # 3 and 5 do not divide a batch of 8


@pytest.mark.parametrize("name", sources(None))
def test_the_number_of_processes_changes_in_mid_epoch(name, tokens):
    """Every two steps other processes go on, from the state that process 0 of those before had."""
    source, given = sources(tokens)[name]
    whole = Loader(source, batch_size=8, process_index=0, process_count=1, **given)
    num_steps = min(whole.num_steps or 12, 12)
    state, seen = whole.get_state(), collections.Counter()
    for count in itertools.cycle(COUNTS):
        if state["step"] >= num_steps - 2:
            break
        loaders = [
            Loader(source, batch_size=8, process_index=index, process_count=count, **given) for index in range(count)
        ]
        for loader in loaders:
            loader.set_state(state)
        for _ in range(2):
            step = loaders[0].step
            parts = [next(loader) for loader in loaders]
            assert {len(part["sample"]) for part in parts} == {-(-8 // count)}
            expected = whole.batch(step)
            for field, values in expected.items():
                together = np.concatenate([part[field] for part in parts])
                assert (together[:8] == values).all(), (field, step, count)
                assert not together[8:].any()
            counts = expected["weights"].reshape(8, -1).any(axis=1)
            seen.update(expected["sample"][counts].tolist())
        assert len({str(loader.get_state()) for loader in loaders}) == 1
        state = loaders[0].get_state()
    assert set(seen.values()) == {1}
    assert sorted(seen) == list(range(len(seen)))


def test_one_pass_gives_every_sample_once_whatever_the_processes():
    for count in (1, 2, 3, 7):
        loaders = [
            Loader(Rows(29), batch_size=8, epochs=1, process_index=index, process_count=count) for index in range(count)
        ]
        rows = [row for loader in loaders for batch in loader for row in zip(batch["x"], batch["weights"], strict=True)]
        assert sorted(int(x) for x, weight in rows if weight) == list(range(29))
