"""Documents packed into rows of one length, each row found by its number.

The documents of a token file stand one after another, and the line is cut every `seq_len` tokens:

    documents   a b c d e | f g | h i j k      seq_len 4
    row 0       tokens a b c d   labels b c d e   positions 0 1 2 3   segments 1 1 1 1   weights 1 1 1 1
    row 1       tokens e f g h   labels - g - i   positions 0 0 1 0   segments 1 2 2 3   weights 0 1 0 1
    row 2       tokens i j k -   labels j k - -   positions 0 1 2 0   segments 1 1 1 0   weights 1 1 0 0

So every token that follows another in its document is a label exactly once, and weights sum to tokens less documents.
A label never comes from the next document, though the token beside it may. Segment 0 is padding.

Grain's packing (`ConcatThenSplitIterDataset`, first fit, best fit) is a stream with a state inside: it cannot say what
row 7 is without rows 0 to 6, so that order could not be a function of the step, nor a resume exact on other processes.
"""

import dataclasses

import numpy as np

from .._errors import DataError
from ._tokens import TokenFile


@dataclasses.dataclass(frozen=True)
class Packed:
    """The rows of a token file, a random-access source for `Loader`.

    Each row is a dict of arrays `[seq_len]`: `tokens`, `labels`, `positions` and `segments` in int32, and `weights` in
    float32. Reading a row copies `seq_len + 1` tokens from the memory map. Holds 8 bytes a document.

    Args:
        file: The documents.
        seq_len: Tokens in a row.

    Raises:
        DataError: `seq_len` is below 1, or no document has two tokens.

    Example:
        >>> import tempfile, pathlib
        >>> from jaxpar.data import tokenise
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_text("abcde"), (folder / "b").write_text("fg")
        >>> rows = Packed(tokenise([folder / "a", folder / "b"], folder), 4)
        >>> len(rows), rows[1]["segments"].tolist(), rows[1]["weights"].tolist()
        (2, [1, 2, 2, 0], [0.0, 1.0, 0.0, 0.0])
    """

    file: TokenFile
    seq_len: int
    ends: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise DataError(f"seq_len={self.seq_len}: a row has at least 1 token. Use the context length of the model.")
        if self.file.num_tokens == self.file.num_documents:
            raise DataError(
                f"{self.file.path}: {self.file.num_documents} documents of one token each hold nothing to predict. "
                "Add text, or split off less."
            )
        object.__setattr__(self, "ends", np.cumsum(self.file.lengths))

    @property
    def fingerprint(self) -> str:
        """Changes when a row changes."""
        return f"{self.file.fingerprint}/packed {self.seq_len}"

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 2) // self.seq_len + 1  # the last token need only be a label

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)}.")
        first = row * self.seq_len
        last = min(first + self.seq_len + 1, int(self.ends[-1]))  # one more, for the last label
        ids, segments, positions = self._line(first, last)
        same = segments[1:] == segments[:-1]
        padded = {
            "tokens": ids[: self.seq_len],
            "labels": np.where(same, ids[1:], 0),
            "positions": positions[: self.seq_len],
            "segments": segments[: self.seq_len],
            "weights": same.astype(np.float32),
        }
        return {name: _to_length(values, self.seq_len) for name, values in padded.items()}

    def _line(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, segments and positions of the tokens from `first` to `last` in the line of all documents."""
        first_document = int(np.searchsorted(self.ends, first, side="right"))
        last_document = int(np.searchsorted(self.ends, last, side="left"))
        documents = slice(first_document, last_document + 1)
        starts, lengths, ends = self.file.starts[documents], self.file.lengths[documents], self.ends[documents]
        begins = np.maximum(ends - lengths, first)  # in the line, as are `ends`
        stops = np.minimum(ends, last)
        offset = starts - (ends - lengths)  # from a place in the line to one in the file
        pieces = [self.file.tokens[b + o : s + o] for b, s, o in zip(begins, stops, offset, strict=True)]
        sizes = stops - begins
        segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        positions = np.arange(first, last) - np.repeat(begins, sizes)
        return np.concatenate(pieces).astype(np.int32), segments.astype(np.int32), positions.astype(np.int32)


def _to_length(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values))) if len(values) < length else values
