"""Tokenizers by name, file and description; and plain bytes, the simplest of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.helpers import small_bpe
from wkv import tokenizers
from wkv.errors import TokenizerError
from wkv.tokenizers import ByteTokenizer, TableTokenizer, Tokenizer, WorldTokenizer

TOKENIZERS = [WorldTokenizer(), ByteTokenizer(), small_bpe()]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)


@each
def test_protocol(tokenizer: TableTokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert type(tokenizer).__name__ in repr(tokenizer)


@each
def test_description_and_pickle_give_the_same_tokenizer(tokenizer: TableTokenizer) -> None:
    description = json.loads(json.dumps(tokenizer.to_dict()))
    for other in (tokenizers.from_dict(description), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer)
        assert other.to_dict() == tokenizer.to_dict()
        assert (other.vocab_size, other.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert other.encode("The quick <|endoftext|> é") == tokenizer.encode("The quick <|endoftext|> é")


@each
def test_ids_may_be_tensors_and_arrays(tokenizer: TableTokenizer) -> None:
    ids = tokenizer.encode("déjà vu")
    for form in (torch.tensor(ids), np.array(ids, dtype=np.uint16), tuple(ids), iter(ids)):
        assert tokenizer.decode(form) == "déjà vu"
    with pytest.raises(TokenizerError, match="position 0"):
        tokenizer.decode(torch.tensor([ids]))
    with pytest.raises(TokenizerError, match="position 0 is not an integer"):
        tokenizer.decode(torch.tensor([1.5]))


@each
def test_empty(tokenizer: TableTokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode(b"") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("name", tokenizers.available())
def test_load_by_name(name: str) -> None:
    assert tokenizers.load(name).to_dict() == {"kind": name}


def test_available() -> None:
    assert tokenizers.available() == ["bytes", "world"]


@pytest.mark.parametrize("name", ["wordl", "", "World", "bpe", "no/such/tokenizer.json", Path("absent.json")])
def test_unknown_names_list_the_choices(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match=r"'bytes', 'world' or the path of a tokenizer.json"):
        tokenizers.load(name)


def test_load_refuses_other_types() -> None:
    bad: Any = 5
    with pytest.raises(TokenizerError, match="name or a path, got int"):
        tokenizers.load(bad)


def test_load_from_file_and_folder(tmp_path: Path) -> None:
    small_bpe().save(tmp_path / "tokenizer.json")
    for source in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert tokenizers.load(source).to_dict() == small_bpe().to_dict()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "None"),
        ({"kind": "sentencepiece"}, "'sentencepiece'"),
        ({"kind": ["world"]}, "world"),
        ({"kind": "bpe"}, "under 'json'"),
        ({"kind": "bpe", "json": {}}, "under 'json'"),
        ({"kind": "bpe", "json": "{"}, "invalid JSON"),
        (None, "None"),
        ("world", "unknown tokenizer kind"),
    ],
)
def test_bad_descriptions(description: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizers.from_dict(description)


@settings(deadline=None)
@given(st.binary())
def test_bytes_round_trip(data: bytes) -> None:
    assert ByteTokenizer().encode(data) == list(data)
    assert ByteTokenizer().decode_bytes(list(data)) == data


def test_bytes_of_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, None)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0xC3, 0xA9, 10]) == "é\n"
    with pytest.raises(TokenizerError, match=r"256 at position 1 is outside the vocabulary 0\.\.255"):
        tokenizer.decode([1, 256])
    bad: Any = 5
    with pytest.raises(TokenizerError, match="got int"):
        tokenizer.encode(bad)
