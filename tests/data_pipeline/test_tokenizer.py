"""Text to ids and back."""

import builtins
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxpar._errors import DataError
from jaxpar.data import Bytes, HuggingFace, Tokenizer, tokenise


@pytest.fixture
def tokenizer_file(tmp_path):
    """A word tokeniser that, as many do, carries the truncation of its model."""
    import tokenizers

    vocab = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 9}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    ids = Bytes().encode(text)
    assert ids.dtype == np.uint8
    assert Bytes().decode(ids) == text


def test_bytes_of_an_untrained_model():
    assert Bytes().decode([104, 255, 105]) == "h�i"
    with pytest.raises(DataError, match="Ids from 3 to 300 are not bytes, which go from 0 to 255"):
        Bytes().decode([3, 300])


def test_hugging_face(tokenizer_file):
    tokenizer = HuggingFace(tokenizer_file)
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(Bytes(), Tokenizer)
    assert tokenizer.encode("to be or not to be").tolist() == [1, 2, 3, 9, 1, 2]  # neither cut at 2 nor padded to 8
    assert tokenizer.decode(np.array([1, 2, 3])) == "to be or"
    assert tokenizer.vocab_size == 10  # ids go up to 9, though there are five
    assert HuggingFace(tokenizer_file.parent).name == tokenizer.name
    assert tokenizer.name.startswith("hf:")


def test_hugging_face_token_file(tokenizer_file, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not")
    tokenizer = HuggingFace(tokenizer_file)
    tokens = tokenise([tmp_path / "a.txt"], tmp_path / "cache", tokenizer)
    assert tokens.document(0).tolist() == [1, 2, 3, 9]
    assert tokens.tokenizer == tokenizer.name
    assert tokens.path != tokenise([tmp_path / "a.txt"], tmp_path / "cache").path


def test_missing_package(tokenizer_file, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError) as error:
        HuggingFace(tokenizer_file)
    assert str(error.value) == (
        f"{tokenizer_file}: reading it takes the package `tokenizers`, which is not installed. "
        "Type: pip install 'jaxpar[hf]'"
    )


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read as a tokeniser \(No such file or directory\)"):
        HuggingFace(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match="is not a tokeniser file of `tokenizers`"):
        HuggingFace(tmp_path)
