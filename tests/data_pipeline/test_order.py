"""Each epoch is a permutation, another for each seed and epoch, and looks like chance."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxpar.data._order import order


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 2**33))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    places = epoch * size + np.arange(size)
    assert sorted(order(places, size, seed).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**17 + 1])
def test_permutation_around_powers_of_two(size):
    """Where grain's index_shuffle maps two places to one sample."""
    assert len(np.unique(order(np.arange(size), size, 3))) == size


@settings(max_examples=30, deadline=None)
@given(places=st.lists(st.integers(0, 10**7), min_size=1, max_size=30), size=st.integers(1, 10**6))
def test_random_access(places, size):
    """A place has its sample, whatever is asked for beside it."""
    together = order(np.array(places), size, 5).tolist()
    assert together == [int(order(np.array([place]), size, 5)[0]) for place in places]


@pytest.mark.parametrize("size", [2, 3, 5, 16, 100])
def test_every_sample_is_equally_likely_first(size):
    first = np.array([order(np.array([0, 1]), size, seed) for seed in range(500)])
    for found, num_cells in ((first[:, 0], size), ((first[:, 1] - first[:, 0]) % size - 1, size - 1)):
        if num_cells > 1:
            counts = np.bincount(found, minlength=num_cells)
            expected = len(found) / num_cells
            freedom = num_cells - 1
            chi_squared = ((counts - expected) ** 2 / expected).sum()
            assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_epochs_and_seeds_are_independent():
    size = 65_536
    epochs = order(np.arange(2 * size), size, 0).reshape(2, size)
    other = order(np.arange(size), size, 1)
    for a, b in ((epochs[0][:-1], epochs[0][1:]), (epochs[0], epochs[1]), (epochs[0], other), (epochs[1], other)):
        cells = np.bincount((a * 16 // size) * 16 + b * 16 // size, minlength=256)
        expected = len(a) / 256
        assert ((cells - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)


def test_no_seed_keeps_the_order():
    assert order(np.arange(7), 3, None).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_never_changes():
    """A checkpoint of an older version goes on with the same samples: these numbers are part of the format."""
    assert order(np.arange(8), 1000, 0).tolist() == FIRST


FIRST = [779, 198, 722, 562, 914, 687, 75, 926]
