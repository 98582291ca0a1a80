"""Entropies, against counting by hand."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxpar._errors import DataError
from jaxpar.data import _entropy as entropy, bigram_cross_entropy, bigram_entropy, tokenise, unigram_entropy

IDS = st.lists(st.integers(0, 5), min_size=2, max_size=60).map(np.array)


def by_hand(documents):
    pairs = collections.Counter(pair for ids in documents for pair in itertools.pairwise(ids))
    firsts = collections.Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    return pairs, firsts


@given(IDS)
def test_unigram(ids):
    counts = collections.Counter(ids.tolist())
    expected = -sum(count / len(ids) * math.log(count / len(ids)) for count in counts.values())
    assert unigram_entropy(ids) == pytest.approx(expected, abs=1e-12)


@given(IDS)
def test_bigram(ids):
    pairs, firsts = by_hand([ids.tolist()])
    expected = -sum(count * math.log(count / firsts[pair[0]]) for pair, count in pairs.items()) / (len(ids) - 1)
    assert bigram_entropy(ids) == pytest.approx(expected, abs=1e-12)


@given(IDS, IDS)
def test_cross(train, validation):
    vocab = max(train.max(), validation.max()) + 1
    known, firsts = by_hand([train.tolist()])
    asked, _ = by_hand([validation.tolist()])
    losses = {(a, b): math.log((firsts[a] + vocab) / (known[a, b] + 1)) for a, b in asked}
    expected = sum(losses[pair] * count for pair, count in asked.items()) / (len(validation) - 1)
    assert bigram_cross_entropy(train, validation) == pytest.approx(expected, abs=1e-12)
    assert bigram_cross_entropy(train, validation) >= bigram_entropy(validation) - 1e-12


@settings(max_examples=20)
@given(ids=IDS, chunk=st.integers(1, 7))
def test_in_chunks_and_sorted(ids, chunk):
    """A large file is counted piece by piece, a large vocabulary by sorting: the same numbers."""
    expected = unigram_entropy(ids), bigram_entropy(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "_CHUNK", chunk)
        assert (unigram_entropy(ids), bigram_entropy(ids)) == pytest.approx(expected, abs=1e-12)
        patch.setattr(entropy, "_DENSE", 1)
        assert (unigram_entropy(ids), bigram_entropy(ids)) == pytest.approx(expected, abs=1e-12)


def test_no_pair_across_documents(tmp_path):
    for name, text in (("a", "abab"), ("b", "abab"), ("c", "c")):
        (tmp_path / name).write_text(text)
    tokens = tokenise([tmp_path / name for name in "abc"], tmp_path / "cache")
    assert bigram_entropy(tokens) == 0.0  # a is followed by b, b by a; "b|a" and "b|c" are not pairs
    assert unigram_entropy(tokens) == pytest.approx(-(8 / 9 * math.log(4 / 9) + 1 / 9 * math.log(1 / 9)))


def test_nothing_to_count():
    with pytest.raises(DataError, match="The entropy of no tokens is not defined"):
        unigram_entropy(np.array([], np.int64))
    with pytest.raises(DataError, match="no document has two tokens"):
        bigram_entropy(np.array([1]))
