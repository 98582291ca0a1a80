"""What counting can predict: the entropies that a language model has to beat. All in nats per token."""

from collections.abc import Iterator

import numpy as np

from .._errors import DataError
from ._tokens import TokenFile

_DENSE = 1 << 22  # pairs that are counted in a table; more are sorted
_CHUNK = 1 << 22  # tokens at once: 32 MiB of pairs


def unigram_entropy(tokens: TokenFile | np.ndarray) -> float:
    """The entropy of the frequencies of `tokens`: no model that ignores context has a lower mean loss on them.

    Args:
        tokens: A token file or one side of its split, or ids `[num_tokens]`.

    Raises:
        DataError: There are no tokens.

    Example:
        >>> round(unigram_entropy(np.array([0, 1, 2, 3])), 4)  # log 4
        1.3863
    """
    found, counts = _counted(_chunks(_documents(tokens)), _vocab(tokens))
    if not len(found):
        raise DataError("The entropy of no tokens is not defined. Give at least one.")
    return _entropy(counts)


def bigram_entropy(tokens: TokenFile | np.ndarray) -> float:
    """The entropy of a token given the one before it, by the counts of `tokens` themselves.

    H = - sum over pairs (a, b) of n(a, b) / n * log(n(a, b) / n(a)), pairs within a document. No model that sees one
    token of context has a lower mean loss on `tokens`, not even one that was fitted to them. The first token of a
    document is given and not predicted, as in the loss over packed rows.

    Args:
        tokens: A token file or one side of its split, or ids `[num_tokens]` of one document.

    Raises:
        DataError: No document has two tokens.

    Example:
        >>> bigram_entropy(np.array([0, 1, 0, 1, 0]))  # each token says the next
        0.0
    """
    vocab = _vocab(tokens)
    pairs, counts = _pairs(tokens, vocab)
    _, of_first = _summed(pairs // vocab, counts)
    return max(0.0, _entropy(counts) - _entropy(of_first))


def bigram_cross_entropy(train: TokenFile | np.ndarray, validation: TokenFile | np.ndarray) -> float:
    """The mean loss on `validation` of a bigram model counted on `train`, with one added to each count.

    P(b | a) = (n(a, b) + 1) / (n(a) + vocab_size). Never below `bigram_entropy(validation)`.

    Args:
        train: What is counted: a token file or one side of its split, or ids of one document.
        validation: What is predicted. The vocabulary is the larger of the two.

    Raises:
        DataError: In one of the two, no document has two tokens.

    Example:
        >>> round(bigram_cross_entropy(np.array([0, 1, 0, 1, 0]), np.array([0, 1])), 4)  # log(4 / 3)
        0.2877
    """
    vocab = max(_vocab(train), _vocab(validation))
    known, known_counts = _pairs(train, vocab)
    asked, asked_counts = _pairs(validation, vocab)
    of_pair = _look_up(asked, known, known_counts)
    of_first = _look_up(asked // vocab, *_summed(known // vocab, known_counts))
    losses = np.log(of_first + vocab) - np.log(of_pair + 1)
    return float((losses * asked_counts).sum() / asked_counts.sum())


def _documents(tokens: TokenFile | np.ndarray) -> Iterator[np.ndarray]:
    if isinstance(tokens, TokenFile):
        for index in range(tokens.num_documents):
            yield tokens.document(index)
    else:
        yield tokens.reshape(-1)


def _vocab(tokens: TokenFile | np.ndarray) -> int:
    return tokens.vocab_size if isinstance(tokens, TokenFile) else int(tokens.max(initial=0)) + 1


def _pairs(tokens: TokenFile | np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that occur within documents, as first * vocab + second, ascending, and how often."""
    pairs = (ids[:-1].astype(np.int64) * vocab + ids[1:] for piece in _documents(tokens) for ids in _overlapping(piece))
    found, counts = _counted(_chunks(pairs), vocab * vocab)
    if not len(found):
        raise DataError(
            "The bigram entropy is not defined: no document has two tokens. Add text, or split off a larger part."
        )
    return found, counts


def _overlapping(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces of `ids` that share their ends, so that each pair is in one."""
    for start in range(0, len(ids) - 1, _CHUNK):
        yield ids[start : start + _CHUNK + 1]


def _chunks(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Small pieces joined, because each count costs a pass over the table."""
    held: list[np.ndarray] = []
    for piece in pieces:
        held.append(piece)
        if len(held) >= 1 << 10 or sum(map(len, held)) >= _CHUNK:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _counted(chunks: Iterator[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The values in `chunks`, which are below `size`, ascending, and how often each occurs."""
    if size <= _DENSE:
        table = np.zeros(size, np.int64)
        for chunk in chunks:
            table += np.bincount(chunk, minlength=size)
        found = np.flatnonzero(table)
        return found, table[found]
    found, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for chunk in chunks:
        values, more = np.unique(chunk, return_counts=True)
        found, counts = _summed(np.concatenate([found, values]), np.concatenate([counts, more]))
    return found, counts


def _summed(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each value once, ascending, with the sum of its counts."""
    found, group = np.unique(values, return_inverse=True)
    total = np.zeros(len(found), np.int64)
    np.add.at(total, group, counts)
    return found, total


def _look_up(asked: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The count of each of `asked`; 0 for one that is not `known`."""
    place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[place] == asked, counts[place], 0)


def _entropy(counts: np.ndarray) -> float:
    total = counts.sum()
    return float(np.log(total) - (counts * np.log(counts)).sum() / total)
