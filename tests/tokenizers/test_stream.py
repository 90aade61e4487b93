"""Streaming decode: feeds and flush, joined, are the decoded whole; every character comes out as soon as it can."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.helpers import ALPHABET, small_bpe
from wkv.errors import TokenizerError
from wkv.tokenizers import ByteTokenizer, TableTokenizer, WorldTokenizer

TOKENIZERS = [WorldTokenizer(), ByteTokenizer(), small_bpe()]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)


def streamed(tokenizer: TableTokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.feed, ids), stream.flush()]


@each
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_ids(tokenizer: TableTokenizer, data: st.DataObject) -> None:
    """Random ids are mostly invalid UTF-8: nothing is lost, replaced or delayed differently from the whole."""
    ids = data.draw(st.lists(st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.integers(100, 255)), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@each
@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.one_of(st.binary(max_size=6), st.text(ALPHABET, max_size=6).map(str.encode)), max_size=12))
def test_any_bytes(tokenizer: TableTokenizer, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    for ids in (tokenizer.encode(data), [index for piece in pieces for index in tokenizer.encode(piece)]):
        assert "".join(streamed(tokenizer, ids)) == data.decode("utf-8", "replace")


@each
@settings(deadline=None, max_examples=100)
@given(text=st.text(ALPHABET, max_size=30))
def test_valid_text_is_never_held_back_longer_than_needed(tokenizer: TableTokenizer, text: str) -> None:
    ids, stream, shown = tokenizer.encode(text), tokenizer.stream(), ""
    for count, index in enumerate(ids, start=1):
        shown += stream.feed(index)
        so_far = tokenizer.decode_bytes(ids[:count])
        assert shown == so_far.decode("utf-8", "ignore")
    assert shown == text
    assert stream.flush() == ""


def test_bytes_of_one_character() -> None:
    assert streamed(ByteTokenizer(), list("é😀".encode())) == ["", "é", "", "", "", "😀", ""]


def test_a_genuine_replacement_character_does_not_block() -> None:
    assert streamed(ByteTokenizer(), list("\ufffdab".encode())) == ["", "", "\ufffd", "a", "b", ""]


def test_an_unfinished_character_comes_with_the_flush() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.feed(0x61), stream.feed(0xF0), stream.feed(0x9F), stream.flush()] == ["a", "", "", "\ufffd"]
    assert [stream.feed(0x62), stream.flush(), stream.flush()] == ["b", "", ""]


def test_a_broken_character_comes_as_soon_as_it_is_broken() -> None:
    assert streamed(ByteTokenizer(), [0xE3, 0x81, 0x41, 0xFF]) == ["", "", "\ufffdA", "\ufffd", ""]


def test_a_bad_id_names_its_position_and_changes_nothing() -> None:
    stream = WorldTokenizer().stream()
    first, *rest = WorldTokenizer().encode("é".encode()[:1]) + WorldTokenizer().encode("é".encode()[1:])
    assert stream.feed(first) == ""
    with pytest.raises(TokenizerError, match="70000 at position 1"):
        stream.feed(70000)
    assert "".join(map(stream.feed, rest)) == "é"


def test_control_ids_are_silent() -> None:
    assert streamed(WorldTokenizer(), [0, 65535, 34]) == ["", "", "!", ""]
