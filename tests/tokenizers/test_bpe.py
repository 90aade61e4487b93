"""Byte-level BPE: training, lossless round trips, control tokens, foreign and damaged files."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.helpers import ALPHABET, PROSE, mixed_bytes, small_bpe
from wkv.errors import TokenizerError
from wkv.tokenizers import BPETokenizer
from wkv.tokenizers.tokenizer_json import byte_characters

Change = Callable[[dict[str, Any]], Any]


def definition() -> dict[str, Any]:
    return json.loads(small_bpe().to_dict()["json"])


def changed(change: Change) -> BPETokenizer:
    parsed = definition()
    change(parsed)
    return BPETokenizer(json.dumps(parsed))


def neox_like() -> BPETokenizer:
    """What is particular about the GPT-NeoX file: NFC, a second control token, tokens for runs of spaces, no token
    for the bytes that never occur in UTF-8, no `use_regex` entry."""
    parsed = definition()
    never = {byte_characters()[value] for value in (0xC0, 0xC1, *range(0xF5, 0x100))}
    kept = [token for token in parsed["model"]["vocab"] if token not in never]
    parsed["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    parsed["normalizer"] = {"type": "NFC"}
    parsed["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [("<|padding|>", True)] + [(" " * count, False) for count in range(2, 5)]
    for index, (content, special) in enumerate(added, start=len(kept)):
        entry = {"id": index, "content": content, "special": special, "normalized": not special}
        parsed["added_tokens"].append(entry | plain)
    return BPETokenizer(json.dumps(parsed))


def sequence(first: dict[str, Any], parsed: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, parsed["pre_tokenizer"]]}


@settings(deadline=None, max_examples=200)
@given(mixed_bytes())
def test_any_bytes_round_trip(data: bytes) -> None:
    ids = small_bpe().encode(data)
    assert small_bpe().decode_bytes(ids) == data
    assert 0 not in ids


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(), st.text(ALPHABET)))
def test_any_text_round_trip(text: str) -> None:
    assert small_bpe().decode(small_bpe().encode(text)) == text
    assert small_bpe().encode(text) == small_bpe().encode(text.encode())


def test_vocabulary_layout() -> None:
    bpe = small_bpe()
    assert bpe.eos_id == 0
    assert bpe.decode_bytes([0]) == b""
    assert {bpe.decode_bytes([index]) for index in range(1, 257)} == {bytes([value]) for value in range(256)}
    assert bpe.vocab_size == len({bpe.decode_bytes([index]) for index in range(bpe.vocab_size)}) <= 1000
    assert len(bpe.encode(" banana bandana")) == 2


def test_invalid_bytes_stand_alone() -> None:
    bpe = small_bpe()
    single = {bpe.decode_bytes([index]): index for index in range(1, 257)}
    fox = bpe.encode("fox")
    assert bpe.encode(b"fox\xff\xc3fox") == [*fox, single[b"\xff"], single[b"\xc3"], *fox]
    assert bpe.encode("fox\udcff") == [*fox, *(single[bytes([value])] for value in b"\xed\xb3\xbf")]


def test_without_end_of_text() -> None:
    bpe = BPETokenizer.train([PROSE * 4], 300, end_of_text=False)
    assert (bpe.vocab_size, bpe.eos_id) == (300, None)
    assert bpe.decode(bpe.encode("<|endoftext|>", special=True)) == "<|endoftext|>"


def test_control_tokens_are_text_unless_asked_for() -> None:
    bpe, text = small_bpe(), "one<|endoftext|>two"
    assert 0 not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text, special=True) == [*bpe.encode("one"), 0, *bpe.encode("two")]
    assert bpe.decode(bpe.encode(text, special=True)) == "onetwo"
    assert bpe.encode("<|endoftext|>", special=True) == [0]


TRAIN = """
import sys
from wkv.tokenizers import BPETokenizer
sys.stdout.buffer.write(BPETokenizer.train(TEXTS, 600).to_dict()["json"].encode())
"""


def test_training_is_deterministic() -> None:
    texts = [" ".join(random.Random(seed).choices(PROSE.split(), k=300)) for seed in range(20)]
    here = BPETokenizer.train(texts, 600).to_dict()["json"]
    assert BPETokenizer.train(iter(texts), 600).to_dict()["json"] == here
    script = TRAIN.replace("TEXTS", repr(texts))
    there = subprocess.run([sys.executable, "-"], input=script.encode(), capture_output=True, check=True).stdout
    assert there.decode() == here


def test_training_on_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE * 4, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"banana bandana \xff" * 9)
    from_files = BPETokenizer.train([tmp_path / "a.txt", tmp_path / "b.txt"], 1000)
    assert from_files.to_dict() == small_bpe().to_dict()


def nothing() -> Iterable[str]:
    yield ""


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([PROSE], 256, "at least 257"),
        ([PROSE], -1, "at least 257"),
        ([PROSE], "2048", "'2048'"),
        ([PROSE], 2048.0, "2048.0"),
        ([PROSE], True, "at least 257"),
        (PROSE, 300, "iterable of texts or Paths, got one str"),
        (Path("a"), 300, "got one"),
        ([b"bytes"], 300, "got bytes"),
        ([5], 300, "got int"),
        ([], 300, "no text"),
        (nothing(), 300, "no text"),
        ([Path("no such file")], 300, "no such file: No such file"),
    ],
)
def test_training_refuses(texts: Any, vocab_size: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        BPETokenizer.train(texts, vocab_size)


def test_little_text_gives_a_smaller_vocabulary() -> None:
    bpe = BPETokenizer.train(["ab ab"], 5000)
    assert 257 < bpe.vocab_size < 300
    assert bpe.decode(bpe.encode("ab\ud800")) == "ab\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("bpe", [small_bpe(), neox_like()], ids=["own", "neox"])
@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.one_of(st.text(ALPHABET, max_size=20), st.sampled_from(PROSE.split(" "))), max_size=60).map(
        " ".join
    )
)
def test_long_text_is_encoded_in_blocks(bpe: BPETokenizer, text: str) -> None:
    assert bpe._may_cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wkv.tokenizers.bpe._BLOCK", 7)
        in_blocks = bpe.encode(text)
    assert in_blocks == bpe._backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda parsed: parsed["pre_tokenizer"].update(use_regex=False),
        lambda parsed: parsed["pre_tokenizer"].update(add_prefix_space=True),
        lambda parsed: parsed.update(pre_tokenizer=sequence({"type": "Digits", "individual_digits": True}, parsed)),
        lambda parsed: parsed.update(normalizer={"type": "NFKC"}),
    ],
)  # fmt: skip
def test_other_splits_are_encoded_whole(change: Change) -> None:
    bpe = changed(change)
    assert not bpe._may_cut
    text = PROSE * 100
    assert bpe.encode(text) == bpe._backend.encode(text, add_special_tokens=False).ids
    assert bpe.decode(bpe.encode(text)).strip() == text.strip()


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old", encoding="utf-8")
    small_bpe().save(path)
    assert BPETokenizer.load(path).to_dict() == small_bpe().to_dict()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(TokenizerError, match="cannot write the tokenizer file"):
        small_bpe().save(tmp_path / "absent" / "tokenizer.json")
    with pytest.raises(TokenizerError, match="cannot write the tokenizer file"):
        small_bpe().save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_file_like_that_of_gpt_neox() -> None:
    bpe = neox_like()
    padding, two, _, four = range(bpe.vocab_size - 4, bpe.vocab_size)
    assert bpe.eos_id == 0
    text = "def f(x):\n    return  x <|padding|><|endoftext|> café"
    assert {two, four} <= set(bpe.encode(text))
    assert not {0, padding} & set(bpe.encode(text))
    assert {0, padding} <= set(bpe.encode(text, special=True))
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([0, padding, two]) == "  "
    assert bpe.decode(bpe.encode("e\u0301")) == "é"  # the file's own normaliser
    assert bpe.decode_bytes(bpe.encode(b"a\x80\xe3b")) == b"a\x80\xe3b"
    with pytest.raises(TokenizerError, match="no token for byte 0xFF"):
        bpe.encode(b"a\xff")


def test_settings_for_batches_and_training_are_ignored() -> None:
    def spoil(parsed: dict[str, Any]) -> None:
        parsed["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        parsed["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip
        parsed["model"]["dropout"] = 0.5

    assert changed(spoil).encode(PROSE) == small_bpe().encode(PROSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parsed: parsed.pop("model"), "no 'model' entry"),
        (lambda parsed: parsed["model"].update(type="Unigram"), "'Unigram'; only byte-level BPE"),
        (lambda parsed: parsed["model"].update(type="WordPiece"), "'WordPiece'"),
        (lambda parsed: parsed.update(pre_tokenizer=None), "over characters"),
        (lambda parsed: parsed.update(pre_tokenizer={"type": "Metaspace"}), "over characters"),
        (lambda parsed: parsed["model"].update(end_of_word_suffix="</w>"), "prefix or suffix"),
        (lambda parsed: parsed["model"]["vocab"].pop("~"), "1 of the 243 bytes"),
        (lambda parsed: parsed["model"]["vocab"].update(q=5), "same id"),
        (lambda parsed: parsed["model"]["vocab"].update({"日本": 1500}), "'日本'"),
        (lambda parsed: parsed["model"]["vocab"].update({"qqq": 2**31}), "larger than any vocabulary"),
        (lambda parsed: parsed["added_tokens"][0].update(content="q", id=parsed["model"]["vocab"]["q"]), "of a byte"),
        (lambda parsed: parsed["added_tokens"][0].update(content="<s>", id=7), "id 7 in the file"),
        (lambda parsed: parsed["model"]["merges"].append(["qq", "zz"]), "usable"),
        (lambda parsed: parsed["model"].update(vocab=[]), "usable"),
        (lambda parsed: parsed.update(added_tokens=5), "usable"),
    ],
)  # fmt: skip
def test_files_that_are_not_byte_level_bpe(change: Change, message: str, tmp_path: Path) -> None:
    parsed = definition()
    change(parsed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message) as caught:
        BPETokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_files_that_are_no_json_objects(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        BPETokenizer.load(path)


@pytest.mark.parametrize("part", range(1, 10))
def test_truncated_files(part: int) -> None:
    text = json.dumps(definition())
    with pytest.raises(TokenizerError, match="invalid JSON"):
        BPETokenizer(text[: len(text) * part // 10])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read the tokenizer file"):
        BPETokenizer.load(tmp_path / "absent.json")


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every entry of a JSON document, a few per long list."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        entries = list(node.items())[:20]
    elif isinstance(node, list):
        entries = list(enumerate(node))[:6]
    return [found for key, child in entries for found in [(*path, key), *places(child, (*path, key))]]


JUNK: list[Any] = [None, 0, -1, 2**70, 1.5, "x", "", [], {}, [1], {"type": "X"}, True, "\0", 2**31, ["a", "b", "c"]]
JUNK += [{"type": "Sequence"}, {"type": "ByteLevel"}, 2**32 - 1]


@pytest.mark.parametrize("seed", range(100))
def test_spoiled_files_give_a_clear_error_or_a_tokenizer(seed: int) -> None:
    rng, parsed, text = random.Random(seed), copy.deepcopy(definition()), "hello world wxyz 12 é"
    *parents, last = rng.choice(places(parsed))
    node: Any = parsed
    for key in parents:
        node = node[key]
    if rng.random() < 0.3:
        del node[last]
    else:
        node[last] = rng.choice(JUNK)
    try:
        bpe = BPETokenizer(json.dumps(parsed))
    except TokenizerError:
        return  # any other exception fails the test
    assert bpe.decode(bpe.encode(text)).strip() == text


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r'pip install "wkv\[train\]"'):
        BPETokenizer.train([PROSE], 300)
    with pytest.raises(TokenizerError, match=r'pip install "wkv\[train\]"'):
        BPETokenizer(json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}))


@pytest.mark.parametrize("bad", [None, 5, [1], ["a"]])
def test_encode_refuses_what_is_not_text(bad: Any) -> None:
    with pytest.raises(TokenizerError, match="str or bytes"):
        small_bpe().encode(bad)


def test_decode_names_a_bad_id() -> None:
    with pytest.raises(TokenizerError, match=f"{small_bpe().vocab_size} at position 1"):
        small_bpe().decode([1, small_bpe().vocab_size])


def test_byte_characters_are_the_alphabet_of_the_library() -> None:
    alphabet = byte_characters()
    assert len(set(alphabet)) == 256
    assert [alphabet[value] for value in (0, 10, 32, 0x41, 0xAD, 0xFF)] == ["Ā", "Ċ", "Ġ", "A", "Ń", "ÿ"]
