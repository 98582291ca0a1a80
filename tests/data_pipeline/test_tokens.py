"""Token files: what was written is read, once for each content; damage and misfits are named."""

import json
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from jaxpar._errors import DataError
from jaxpar.data import Bytes, TokenFile, tokenise


class Words:
    """Ids of words by their order in a list: a vocabulary of any size."""

    name = "words"

    def __init__(self, vocab_size, offset=0):
        self.vocab_size, self.offset = vocab_size, offset

    def encode(self, text):
        return np.array([int(word) + self.offset for word in text.split()], np.int64)

    def decode(self, ids):
        return " ".join(map(str, ids))


def write(folder, texts):
    files = [folder / f"{index:03}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return files


TEXTS = ["to be", "or not", "to be, that is the question"]


def test_round_trip(tmp_path):
    tokens = tokenise(write(tmp_path, TEXTS), tmp_path / "cache")
    assert [Bytes().decode(tokens.document(index)) for index in range(3)] == TEXTS
    assert (tokens.num_tokens, tokens.num_documents, tokens.vocab_size) == (sum(map(len, TEXTS)), 3, 256)
    assert tokens.tokens.dtype == np.uint8
    assert isinstance(tokens.tokens, np.memmap)
    assert not tokens.tokens.flags.writeable
    again = TokenFile.open(tokens.path)
    assert (again.fingerprint, again.starts.tolist()) == (tokens.fingerprint, tokens.starts.tolist())
    assert repr(tokens) == f"TokenFile(38 tokens of 'bytes' in 3 documents, '{tokens.path}')"


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_smallest_dtype(tmp_path, vocab_size, dtype):
    files = write(tmp_path, [f"0 {vocab_size - 1}"])
    tokens = tokenise(files, tmp_path / "cache", Words(vocab_size))
    assert tokens.tokens.dtype == dtype
    assert tokens.document(0).tolist() == [0, vocab_size - 1]


def test_a_second_run_does_not_tokenise(tmp_path):
    files = write(tmp_path, ["1 2", "3"])
    calls = []

    class Counting(Words):
        def encode(self, text):
            calls.append(text)
            return super().encode(text)

    first = tokenise(files, tmp_path / "cache", Counting(10))
    assert tokenise(files, tmp_path / "cache", Counting(10)).path == first.path
    assert calls == ["1 2", "3"]
    moved = write(tmp_path / "cache", ["1 2", "3"])  # other names, same content
    assert tokenise(moved, tmp_path / "cache", Counting(10)).path == first.path
    for other in (
        tokenise(files[::-1], tmp_path / "cache", Counting(10)),
        tokenise(files, tmp_path / "cache", Words(11)),
    ):
        assert other.path != first.path


def test_files_that_join_to_the_same_text_are_different(tmp_path):
    first = tokenise(write(tmp_path, ["ab", "c"]), tmp_path / "cache")
    assert tokenise(write(tmp_path, ["a", "bc"]), tmp_path / "cache").path != first.path


def test_many_processes_at_once(tmp_path):
    """Each writes beside; one is kept, nothing else is left."""
    files = write(tmp_path, ["1 2 3"] * 5)
    barrier = threading.Barrier(4)

    class Slow(Words):
        def encode(self, text):
            if text:
                barrier.wait(timeout=20)
            return super().encode(text)

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(tokenise(files, tmp_path / "cache", Slow(10)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tokens.path for tokens in found}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found[0].path.name]
    assert found[0].num_tokens == 15


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken(Words):
        def encode(self, text):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tokenise(write(tmp_path, ["1"]), tmp_path / "cache", Broken(10))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("offset", [-1, 8])
def test_ids_outside_of_the_vocabulary(tmp_path, offset):
    files = write(tmp_path, ["0 1 2"])
    with pytest.raises(DataError) as error:
        tokenise(files, tmp_path / "cache", Words(10, offset))
    assert str(error.value) == (
        f"{files[0]}: tokeniser 'words' gave ids from {offset} to {offset + 2}, but says vocab_size=10. "
        "Ids go from 0 to vocab_size - 1: mend the tokeniser's vocab_size."
    )


def test_not_a_vector_of_integers(tmp_path):
    class Floats(Words):
        def encode(self, text):
            return np.ones(3)

    with pytest.raises(DataError, match=r"gave float64 of shape \(3,\)"):
        tokenise(write(tmp_path, ["1"]), tmp_path / "cache", Floats(10))


def test_documents_without_a_token(tmp_path):
    files = write(tmp_path, ["  ", "1", "\n"])
    with pytest.raises(DataError) as error:
        tokenise(files, tmp_path / "cache", Words(10))
    assert str(error.value).splitlines()[1:-1] == [
        f"{files[0]}: 2 bytes give no token of 'words'",
        f"{files[2]}: 1 bytes give no token of 'words'",
    ]


def test_no_files(tmp_path):
    with pytest.raises(DataError, match="the list of files is empty"):
        tokenise([], tmp_path)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        tokenise(write(tmp_path, ["a"]), tmp_path / "file")


def cut(path, name, num_bytes):
    with (path / name).open("r+b") as file:
        file.truncate(num_bytes)


def edit(path, **values):
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps({**header, **values}))


DAMAGE = {
    "cut tokens": (lambda path: cut(path, "tokens.bin", 30), "tokens.bin: 30 bytes, but by header.json it has 38"),
    "no tokens": (lambda path: (path / "tokens.bin").unlink(), "tokens.bin: is missing"),
    "cut documents": (
        lambda path: cut(path, "documents.bin", 17),
        "documents.bin: 17 bytes, but by header.json it has 48",
    ),
    "cut header": (lambda path: cut(path, "header.json", 20), "header.json: is not JSON"),
    "empty header": (lambda path: cut(path, "header.json", 0), "header.json: is not JSON"),
    "list": (lambda path: (path / "header.json").write_text("[1]"), "the format is 'list', not 'jaxpar-tokens'"),
    "format": (lambda path: edit(path, format="zip"), "the format is 'zip', not 'jaxpar-tokens'"),
    "dtype": (lambda path: edit(path, dtype="object"), "dtype is 'object', not one of uint8, uint16, uint32"),
    "text": (lambda path: edit(path, num_tokens="38"), "num_tokens is '38', not of type int"),
    "negative": (lambda path: edit(path, num_tokens=-1), "num_tokens is -1, not above 0"),
    "gone": (lambda path: edit(path, tokenizer=None), "tokenizer is None, not of type str"),
    "count": (lambda path: edit(path, num_tokens=39), "tokens.bin: 38 bytes, but by header.json it has 39"),
    "ends": (
        lambda path: (path / "documents.bin").write_bytes(bytes(48)),
        "documents do not end one after another, the last at token 38",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    files = write(tmp_path, TEXTS)
    path = tokenise(files, tmp_path / "cache").path
    harm, message = DAMAGE[damage]
    harm(path)
    for again in (lambda: TokenFile.open(path), lambda: tokenise(files, tmp_path / "cache")):
        with pytest.raises(DataError) as error:
            again()
        assert str(error.value).startswith("A token file is damaged:\n")
        assert message in str(error.value)
        assert str(path) in str(error.value)
        assert str(error.value).endswith("Delete its directory and tokenise again: it is only a cache.")


def test_another_version(tmp_path):
    path = tokenise(write(tmp_path, TEXTS), tmp_path / "cache").path
    edit(path, version=2)
    with pytest.raises(DataError, match="version 2 of the format, and this jaxpar reads version 1"):
        TokenFile.open(path)


def test_not_a_token_file(tmp_path):
    with pytest.raises(DataError, match=r"is not a token file: header.json is not there. Make one with"):
        TokenFile.open(tmp_path)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    fraction=st.floats(0.05, 0.9),
    copies=st.booleans(),
)
def test_split_is_by_document(tmp_path_factory, sizes, fraction, copies):
    """Nothing is in both, nothing is lost, and validation has no more than asked."""
    folder = tmp_path_factory.mktemp("split")
    texts = [("a" if copies else chr(97 + index)) * size for index, size in enumerate(sizes)]
    tokens = tokenise(write(folder, texts), folder / "cache")
    try:
        train, validation = tokens.split(fraction)
    except DataError:
        assume(False)  # too little for two sides; see test_split_of_too_little
        return
    assert train.num_tokens + validation.num_tokens == tokens.num_tokens
    assert 2 <= validation.num_tokens <= fraction * tokens.num_tokens
    assert len({train.fingerprint, validation.fingerprint, tokens.fingerprint}) == 3
    covered = np.concatenate(
        [
            np.arange(start, start + length)
            for view in (train, validation)
            for start, length in zip(view.starts, view.lengths, strict=True)
        ]
    )
    assert sorted(covered.tolist()) == list(range(tokens.num_tokens))


def test_split_is_the_same_in_any_order(tmp_path):
    texts = [f"document {index} " * (index + 3) for index in range(30)]
    files = write(tmp_path, texts)

    def validation(files):
        _, view = tokenise(files, tmp_path / "cache").split(0.2)
        return sorted(view.document(index).tobytes() for index in range(view.num_documents))

    assert validation(files) == validation(files[::-1])
    assert len(validation(files)) > 1


def test_equal_documents_are_on_one_side(tmp_path):
    tokens = tokenise(write(tmp_path, [f"text {index // 2}" for index in range(20)]), tmp_path / "cache")
    train, validation = tokens.split(0.25)
    assert validation.num_documents % 2 == 0
    assert not set(train.hashes.tolist()) & set(validation.hashes.tolist())


def test_one_long_document_is_cut(tmp_path):
    train, validation = tokenise(write(tmp_path, ["0123456789" * 10]), tmp_path / "cache").split(0.1)
    assert (train.num_tokens, Bytes().decode(validation.document(0))) == (90, "0123456789")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5])
def test_split_wants_a_fraction(tmp_path, fraction):
    tokens = tokenise(write(tmp_path, TEXTS), tmp_path / "cache")
    with pytest.raises(DataError, match="is not a fraction\\. Use one above 0 and below 1"):
        tokens.split(fraction)


def test_split_of_too_little(tmp_path):
    tokens = tokenise(write(tmp_path, ["abc"]), tmp_path / "cache")
    with pytest.raises(DataError, match=r"split\(0.1\) of 3 tokens in 1 documents leaves 0 tokens for validation"):
        tokens.split(0.1)
