"""Packing loses no token, mixes no documents, and finds any row by its number."""

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from jaxpar._errors import DataError
from jaxpar.data import Packed, TokenFile


def in_memory(documents, order=None):
    """A token file without a file, its documents lying in `order`."""
    order = list(range(len(documents))) if order is None else order
    lengths = np.array([len(document) for document in documents], np.int64)
    starts = np.zeros(len(documents), np.int64)
    starts[order] = np.cumsum(lengths[order]) - lengths[order]
    return TokenFile(
        path=__import__("pathlib").Path("memory"),
        tokenizer="test",
        vocab_size=10_000,
        tokens=np.concatenate([documents[index] for index in order]).astype(np.uint16),
        starts=starts,
        lengths=lengths,
        hashes=np.arange(len(documents), dtype=np.uint64),
        fingerprint="memory",
    )


def numbered(sizes):
    """Documents in which every token is different."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def test_the_example_of_the_module():
    rows = Packed(in_memory(numbered([5, 2, 4])), 4)
    assert len(rows) == 3
    expected = [
        ([0, 1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1]),
        ([4, 5, 6, 7], [0, 6, 0, 8], [0, 0, 1, 0], [1, 2, 2, 3], [0, 1, 0, 1]),
        ([8, 9, 10, 0], [9, 10, 0, 0], [0, 1, 2, 0], [1, 1, 1, 0], [1, 1, 0, 0]),
    ]
    for row, values in enumerate(expected):
        names = ("tokens", "labels", "positions", "segments", "weights")
        assert {name: field.tolist() for name, field in rows[row].items()} == dict(zip(names, values, strict=True))
        assert {name: str(field.dtype) for name, field in rows[row].items()} == {
            **dict.fromkeys(names, "int32"), "weights": "float32",
        }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda sizes: max(sizes) > 1),
    seq_len=st.integers(1, 40),
    shuffle=st.randoms(use_true_random=False),
)
@example(sizes=[5], seq_len=4, shuffle=None)
@example(sizes=[1, 1, 6, 1], seq_len=3, shuffle=None)
def test_no_token_is_lost(sizes, seq_len, shuffle):
    """Every token that follows another in its document is a label once, beside the token before it."""
    documents = numbered(sizes)
    order = list(range(len(sizes)))
    if shuffle:
        shuffle.shuffle(order)
    packed = Packed(in_memory(documents, order), seq_len)
    rows = [packed[row] for row in range(len(packed))]
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    real, taught = joined["segments"] > 0, joined["weights"] > 0

    pairs = [pair for document in documents for pair in zip(document[:-1].tolist(), document[1:].tolist(), strict=True)]
    assert list(zip(joined["tokens"][taught].tolist(), joined["labels"][taught].tolist(), strict=True)) == pairs
    assert joined["weights"].sum() == sum(sizes) - len(sizes)
    assert set(joined["weights"].tolist()) <= {0.0, 1.0}

    line = np.concatenate(documents)
    assert joined["tokens"][real].tolist() == line[: real.sum()].tolist()
    assert sum(sizes) - real.sum() in (0, 1)  # the last token may be a label alone
    assert not joined["tokens"][~real].any()
    assert not joined["labels"][~taught].any()
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    for index, row in enumerate(rows):
        here = row["segments"] > 0
        own = document_of[index * seq_len :][: here.sum()]
        assert (np.diff(row["segments"][here]) == np.diff(own)).all()  # a new segment where a document begins
        assert row["segments"][0] == 1
        new = np.diff(row["segments"][here], prepend=0) > 0
        assert (row["positions"][here][new] == 0).all()
        assert (np.diff(row["positions"][here])[~new[1:]] == 1).all()


def test_rows_end():
    """`list(rows)` and a negative row."""
    rows = Packed(in_memory(numbered([5])), 2)
    assert len(list(rows)) == len(rows) == 2
    for row in (2, -1):
        with pytest.raises(IndexError):
            rows[row]


def test_fingerprint():
    file = in_memory(numbered([5]))
    assert Packed(file, 2).fingerprint != Packed(file, 3).fingerprint


def test_nothing_to_predict():
    with pytest.raises(DataError, match="3 documents of one token each hold nothing to predict"):
        Packed(in_memory(numbered([1, 1, 1])), 4)
    assert len(Packed(in_memory(numbered([1, 2, 1])), 4)) == 1


def test_seq_len():
    with pytest.raises(DataError, match="seq_len=0: a row has at least 1 token"):
        Packed(in_memory(numbered([5])), 0)
