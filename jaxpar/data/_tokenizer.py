"""Tokenisers: text to ids and back. Bytes need no download; Hugging Face files need the `hf` extra."""

import hashlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._errors import DataError


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        name: Says which tokeniser this is, to the bit: token files made with another name are not reused.
        vocab_size: Ids are below it.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, /) -> np.ndarray:
        """The ids of `text`, integers `[num_tokens]`."""
        ...

    def decode(self, ids: np.ndarray, /) -> str:
        """The text of `ids`, integers `[num_tokens]`."""
        ...


class Bytes:
    """One token for each byte of UTF-8; 256 ids.

    Example:
        >>> Bytes().encode("né").tolist()
        [110, 195, 169]
        >>> Bytes().decode(np.array([110, 195, 169]))
        'né'
    """

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Any) -> str:
        """The text of `ids`; bytes that are not UTF-8, as an untrained model writes, show as U+FFFD.

        Raises:
            DataError: An id is not a byte.
        """
        ids = np.asarray(ids).reshape(-1)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise DataError(
                f"Ids from {int(ids.min())} to {int(ids.max())} are not bytes, which go from 0 to 255. "
                "Decode with the tokeniser that made them, or sample below its vocab_size."
            )
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    def __repr__(self) -> str:
        return "Bytes()"


class HuggingFace:
    """A `tokenizer.json` of Hugging Face `tokenizers`, from a local path. Adds no special tokens.

    Args:
        path: The file, or the directory that holds it as `tokenizer.json`.

    Raises:
        DataError: The `hf` extra is not installed, or the file is not a tokeniser.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read as a tokeniser ({error.strerror or error}). "
                "Name the tokenizer.json of a model that you have downloaded."
            ) from None
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{file}: reading it takes the package `tokenizers`, which is not installed. "
                "Type: pip install 'jaxpar[hf]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the Rust side raises a bare Exception
            raise DataError(
                f"{file}: is not a tokeniser file of `tokenizers` {tokenizers.__version__} ({error}). "
                "It wants the tokenizer.json of a fast tokeniser, not vocab.txt, merges.txt or tokenizer.model."
            ) from None
        # A file may carry the truncation of the model that it was made for: 512 tokens of each document, in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._path = file
        self.name = f"hf:{hashlib.sha256(data).hexdigest()[:16]}"
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Any) -> str:
        return self._tokenizer.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False)

    def __repr__(self) -> str:
        return f"HuggingFace({str(self._path)!r})"
