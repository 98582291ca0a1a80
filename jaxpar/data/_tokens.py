"""Token files: tokenised documents on disk, memory-mapped.

A token file is a directory:

    header.json     {"format": "jaxpar-tokens", "version": 1, "dtype": "uint8", "vocab_size": 256, "tokenizer": "bytes",
                     "num_tokens": 10955316, "num_documents": 573, "fingerprint": "..."}
    tokens.bin      num_tokens little-endian ids of `dtype`, document after document
    documents.bin   num_documents records (end: <i8, hash: <u8): where a document ends in tokens.bin, and the first
                    eight bytes of the SHA-256 of its text

`dtype` is the smallest of uint8, uint16 and uint32 that holds the vocabulary. The directory is written beside its
place and renamed, so that it is there whole or not at all; its name is a hash of the texts and of the tokeniser, so
that a second run, or another process of the same run, finds it. Nothing in it is ever unpickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._errors import DataError, listed
from ._text import raise_for, read_text
from ._tokenizer import Bytes, Tokenizer

_FORMAT = "jaxpar-tokens"
_VERSION = 1
_DOCUMENT = np.dtype([("end", "<i8"), ("hash", "<u8")])
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32")}
_KEYS = {"vocab_size": int, "tokenizer": str, "num_tokens": int, "num_documents": int, "fingerprint": str}


class Split(NamedTuple):
    """Two views of one token file that share no document."""

    train: "TokenFile"
    validation: "TokenFile"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenFile:
    """Documents of a token file on disk: all of them, or one side of a split. Made by `tokenise` or `open`.

    Attributes:
        path: The directory.
        tokenizer: The name of the tokeniser that made it.
        vocab_size: Every id is below it.
        tokens: The whole `tokens.bin`, memory-mapped, read-only: `[all tokens]`.
        starts: Where each document of this view begins in `tokens`: int64 `[num_documents]`.
        lengths: Tokens of each document, at least 1: int64 `[num_documents]`.
        hashes: Of each document's text: uint64 `[num_documents]`.
        fingerprint: Changes when the texts, their order, the tokeniser or the split change.
    """

    path: Path
    tokenizer: str
    vocab_size: int
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    fingerprint: str

    @classmethod
    def open(cls, path: str | Path) -> "TokenFile":
        """Open the token file in the directory `path`. Reads the header and the documents' ends, no tokens.

        Raises:
            DataError: There is none, or it is of another format, cut short, or does not add up.
        """
        return _open(Path(path))

    @property
    def num_tokens(self) -> int:
        """Tokens in the documents of this view."""
        return int(self.lengths.sum())

    @property
    def num_documents(self) -> int:
        """Documents in this view."""
        return len(self.starts)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, not copied: `[length]`."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def split(self, validation: float = 0.1) -> Split:
        """Part the documents in two, the same way on every machine and in every order of the files.

        Whole documents go to validation, in the order of their hash, while they fit into `validation` of all tokens.
        Equal documents go to one side. Where not even the first fits (one long file), its tail is validation.

        Args:
            validation: The most of all tokens that go to validation, above 0 and below 1.

        Raises:
            DataError: The fraction is out of range, or one side has fewer than two tokens.
        """
        if not 0 < validation < 1:
            raise DataError(f"validation={validation} is not a fraction. Use one above 0 and below 1, as 0.1.")
        budget = int(validation * self.num_tokens)
        order = np.argsort(self.hashes, kind="stable")
        num_taken = int(np.searchsorted(np.cumsum(self.lengths[order]), budget, side="right"))
        while 0 < num_taken < len(order) and self.hashes[order[num_taken]] == self.hashes[order[num_taken - 1]]:
            num_taken -= 1
        starts, lengths = self.starts.copy(), self.lengths.copy()
        taken = np.zeros(len(order), bool)
        if num_taken:
            taken[order[:num_taken]] = True
            held_starts, held_lengths, held_hashes = starts[taken], lengths[taken], self.hashes[taken]
            starts, lengths, hashes = starts[~taken], lengths[~taken], self.hashes[~taken]
        else:
            cut, hashes = order[0], self.hashes
            budget = min(budget, int(lengths[cut]) - 1)
            lengths[cut] -= budget
            held_starts, held_lengths = starts[[cut]] + lengths[[cut]], np.array([budget])
            held_hashes = hashes[[cut]]
        for name, size in (("train", lengths.sum()), ("validation", held_lengths.sum())):
            if size < 2:
                raise DataError(
                    f"{self.path}: split({validation}) of {self.num_tokens} tokens in {self.num_documents} documents "
                    f"leaves {int(size)} tokens for {name}. Add text, or choose another fraction."
                )
        made = f"{self.fingerprint}/{validation!r}"
        return Split(
            dataclasses.replace(self, starts=starts, lengths=lengths, hashes=hashes, fingerprint=f"{made}/train"),
            dataclasses.replace(
                self, starts=held_starts, lengths=held_lengths, hashes=held_hashes, fingerprint=f"{made}/validation"
            ),
        )

    def __repr__(self) -> str:
        return (
            f"TokenFile({self.num_tokens:,} tokens of {self.tokenizer!r} in {self.num_documents:,} documents, "
            f"{str(self.path)!r})"
        )


def tokenise(files: Sequence[str | Path], directory: str | Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Tokenise text files, one document each, into a token file below `directory`; or find it there.

    The texts are read once for their hash, and a second time only if this content was not yet tokenised. Any number
    of processes may do this at once: each writes beside, the first to finish is kept. Holds one document in memory.

    Args:
        files: Text files, in the order in which they are wanted; see `text_files`.
        directory: A cache; each content and tokeniser has its own directory in it.
        tokenizer: `Bytes()` if not given.

    Raises:
        DataError: Naming every file that cannot be read, is not text, or gives no token; or a tokeniser that gives
            ids outside its vocabulary.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("to be")
        >>> tokens = tokenise([folder / "a.txt"], folder / "cache")
        >>> tokens.num_tokens, tokens.document(0)[:2].tolist()
        (5, [116, 111])
    """
    tokenizer = Bytes() if tokenizer is None else tokenizer
    paths = [Path(file) for file in files]
    if not paths:
        raise DataError("No data: the list of files is empty. Name at least one; text_files(['notes/']) finds them.")
    texts = _digests(paths)
    fingerprint = hashlib.sha256(
        b"".join([f"{_FORMAT} {_VERSION} {tokenizer.name} {tokenizer.vocab_size}\n".encode(), *texts])
    ).hexdigest()[:32]
    target = Path(directory).expanduser() / fingerprint
    if not target.exists():
        with _written_beside(target) as draft:
            _write(draft, paths, texts, tokenizer, fingerprint)
    return _open(target)


def _digests(paths: Sequence[Path]) -> list[bytes]:
    digests, problems = [], []
    for path in paths:
        data = read_text(path)
        if isinstance(data, str):
            problems.append(f"{path}: {data}")
        else:
            digests.append(hashlib.sha256(data).digest())
    raise_for(problems, len(paths))
    return digests


@contextlib.contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """A directory to write in, renamed to `target` at the end; gone if anything fails."""
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        yield draft
        _sync(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, with the same content
                raise
        _sync(target.parent)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror or error}). Give tokenise() a directory on a disk with room."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(draft: Path, paths: Sequence[Path], texts: Sequence[bytes], tokenizer: Tokenizer, fingerprint: str) -> None:
    dtype = next(name for name, dtype in _DTYPES.items() if tokenizer.vocab_size - 1 <= np.iinfo(dtype).max)
    documents = np.zeros(len(paths), _DOCUMENT)
    end, problems = 0, []
    with (draft / "tokens.bin").open("wb") as file:
        for index, (path, digest) in enumerate(zip(paths, texts, strict=True)):
            data = read_text(path)
            if isinstance(data, str) or hashlib.sha256(data).digest() != digest:
                problems.append(f"{path}: changed while it was being read; run again")
                continue
            ids = np.asarray(tokenizer.encode(data.decode()))
            if not ids.size:
                problems.append(f"{path}: {len(data)} bytes give no token of {tokenizer.name!r}")
                continue
            _check_ids(ids, tokenizer, path)
            ids.astype(_DTYPES[dtype]).tofile(file)
            end += ids.size
            documents[index] = (end, int.from_bytes(digest[:8], "little"))
        raise_for(problems, len(paths))
        file.flush()
        os.fsync(file.fileno())
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.name,
        "num_tokens": end,
        "num_documents": len(paths),
        "fingerprint": fingerprint,
    }
    for name, data in (("documents.bin", documents.tobytes()), ("header.json", json.dumps(header, indent=1).encode())):
        with (draft / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, path: Path) -> None:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{path}: tokeniser {tokenizer.name!r} gave {ids.dtype} of shape {ids.shape}. "
            "encode() returns a vector of integers."
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise DataError(
            f"{path}: tokeniser {tokenizer.name!r} gave ids from {int(ids.min())} to {int(ids.max())}, but says "
            f"vocab_size={tokenizer.vocab_size}. Ids go from 0 to vocab_size - 1: mend the tokeniser's vocab_size."
        )


def _open(path: Path) -> TokenFile:
    header = _header(path)
    dtype, num_tokens, num_documents = _DTYPES[header["dtype"]], header["num_tokens"], header["num_documents"]
    expected = {"tokens.bin": num_tokens * dtype.itemsize, "documents.bin": num_documents * _DOCUMENT.itemsize}
    problems = []
    for name, size in expected.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            problems.append(f"{file}: is missing")
        elif found != size:
            problems.append(f"{file}: {found} bytes, but by header.json it has {size}")
    if problems:
        raise _damaged(problems)
    documents = np.fromfile(path / "documents.bin", _DOCUMENT)
    ends = documents["end"].astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if (lengths < 1).any() or ends[-1] != num_tokens:
        raise _damaged(
            [f"{path / 'documents.bin'}: documents do not end one after another, the last at token {num_tokens}"]
        )
    return TokenFile(
        path=path,
        tokenizer=header["tokenizer"],
        vocab_size=header["vocab_size"],
        tokens=np.memmap(path / "tokens.bin", dtype, "r"),
        starts=ends - lengths,
        lengths=lengths,
        hashes=documents["hash"].astype(np.uint64),
        fingerprint=header["fingerprint"],
    )


def _header(path: Path) -> dict[str, Any]:
    file = path / "header.json"
    try:
        header = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: is not a token file: header.json {_why(error)}. "
            "Make one with jaxpar.data.tokenise(files, directory)."
        ) from None
    except ValueError as error:
        raise _damaged([f"{file}: is not JSON ({error})"]) from None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise _damaged([f"{file}: the format is {found!r}, not {_FORMAT!r}"])
    if header.get("version") != _VERSION:
        raise DataError(
            f"{file}: version {header.get('version')} of the format, and this jaxpar reads version {_VERSION}. "
            "Tokenise the text again, or use the jaxpar that wrote it."
        )
    problems = [
        f"{file}: {key} is {header.get(key)!r}, not of type {kind.__name__}"
        for key, kind in _KEYS.items()
        if type(header.get(key)) is not kind
    ]
    if header.get("dtype") not in _DTYPES:
        problems.append(f"{file}: dtype is {header.get('dtype')!r}, not one of {', '.join(_DTYPES)}")
    problems += [
        f"{file}: {key} is {header[key]}, not above 0"
        for key in ("vocab_size", "num_tokens", "num_documents")
        if type(header.get(key)) is int and header[key] < 1
    ]
    if problems:
        raise _damaged(problems)
    return header


def _why(error: OSError) -> str:
    return "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def _damaged(problems: Sequence[str]) -> DataError:
    return DataError(
        f"A token file is damaged:\n{listed(problems)}\nDelete its directory and tokenise again: it is only a cache."
    )


def _sync(directory: Path) -> None:
    """Makes names in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
