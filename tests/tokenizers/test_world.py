"""The World tokenizer: golden ids, the facts known about the vocabulary, exactness against a naive trie."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.helpers import literal, mixed_bytes, token_bytes, tokens, trie, vocabulary_text
from wkv.errors import TokenizerError
from wkv.tokenizers import WorldTokenizer
from wkv.tokenizers.world import _BLOCK, LONGEST_TOKEN, unpack_vocabulary

ROOT = Path(__file__).parents[2]
CASES = json.loads((ROOT / "tests/golden/world_tokenizer/cases.json").read_text(encoding="utf-8"))
SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
SHIPPED = ROOT / "src/wkv/tokenizers/world_vocabulary.bin"

world = WorldTokenizer()


def test_there_are_70_golden_cases() -> None:
    assert len(CASES) == 70


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case: dict[str, Any]) -> None:
    data = base64.b64decode(case["bytes_b64"])
    assert world.encode(data) == case["ids"]
    assert world.decode_bytes(case["ids"]) == data
    assert trie().encode(data) == case["ids"]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        assert case["decode_str"] == "\ufffd"  # the reference gives up on the whole; we replace what is invalid
        assert world.decode(case["ids"]) == data.decode("utf-8", "replace")
    else:
        assert world.encode(text) == case["ids"]
        assert world.decode(case["ids"]) == text == case["decode_str"]


def test_the_shipped_vocabulary_is_the_published_file() -> None:
    assert hashlib.sha256(vocabulary_text().encode("utf-8")).hexdigest() == SHA256


def test_facts_of_the_vocabulary() -> None:
    assert len(tokens()) == len(set(tokens())) == 65529
    assert [len(token) for token in tokens()] == sorted(len(token) for token in tokens())
    assert tokens()[:256] == [bytes([value]) for value in range(256)]
    assert (tokens()[65528], tokens()[65527]) == (b" " * 128, b"-" * 80)
    assert max(map(len, tokens())) == LONGEST_TOKEN
    assert trie().count() == 116079
    literals = [literal(token) for token in tokens()]
    assert sum(text.startswith("b") for text in literals) == 486
    assert sum(text.startswith('"') for text in literals) == 194


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("\x00", [1]),
        ("\n", [11]),
        (" ", [33]),
        (b"\xff", [256]),
        ("\n\n", [261]),
        ("User:", [24281, 59]),
        ("<think>", [61, 35762, 63]),
        (" " * 128, [65529]),
        ("-" * 80, [65528]),
        ("", []),
        (b"", []),
    ],
)
def test_known_ids(text: str | bytes, ids: list[int]) -> None:
    assert world.encode(text) == ids


def test_every_token_encodes_to_itself() -> None:
    assert [world.encode(token) for token in tokens()] == [[index] for index in range(1, 65530)]


def test_sizes() -> None:
    assert (world.vocab_size, world.eos_id) == (65536, 0)
    assert SHIPPED.stat().st_size < 400_000


def test_no_token_spans_a_cut() -> None:
    """The four kinds of place where `encode` cuts its input before matching (see `_PIECES`)."""
    cuts = re.compile(
        rb"[A-Za-z][^A-Za-z\x80-\xff]|[0-9][^0-9]|[!-/:-@\[-`{-~][^A-Za-z\x80-\xff!-/:-@\[-`{-~]"
        rb"|[!-&(-,./:-@\[-`{-~][A-Za-z]|[^\t-\r ] ",
        re.DOTALL,
    )
    assert [token for token in tokens() if cuts.search(token)] == []


def test_pieces_around_every_token() -> None:
    """Each token between neighbours of every kind is encoded as the trie says."""
    for before, after in [
        (b"", b""),
        (b"x", b" y"),
        (b" ", b"\n"),
        (b"\n  ", b"1"),
        (b"'", b"\xe3\x81"),
        (b"\xc3", b"-"),
    ]:
        joined = [before + token + after for token in tokens()[256::29]]
        assert [world.encode(data) for data in joined] == [trie().encode(data) for data in joined]


@pytest.mark.parametrize(
    "data",
    [
        b" " * 127,
        b" " * 129,
        b" " * 1000 + b"x",
        b"-" * 79,
        b"-" * 159,
        b"=" * 63 + b"\n",
        b"\n" * 77 + b" " * 33 + b"a",
        b"\r\n" * 50,
        b"\t \n" * 20,
        b" \xe3" * 9,
        b"\xe2\x80\xa6\n",
        b"'s't'mx-m\xc3\xaame",
        bytes(range(256)) * 3,
    ],
)
def test_greedy_traps(data: bytes) -> None:
    assert world.encode(data) == trie().encode(data)


def test_prefixes_that_are_no_tokens() -> None:
    """Every seventh non-terminal node of the trie: matching must fall back to the last token passed."""
    known = set(tokens())
    prefixes = {token[:end] for token in tokens() for end in range(1, len(token))} - known
    assert len(prefixes) == 50549  # and the root
    for prefix in sorted(prefixes)[::7]:
        assert world.encode(prefix) == trie().encode(prefix)


@settings(deadline=None, max_examples=500)
@given(mixed_bytes())
def test_equals_the_naive_trie(data: bytes) -> None:
    ids = world.encode(data)
    assert ids == trie().encode(data)
    assert world.decode_bytes(ids) == data
    assert not ids or 1 <= min(ids) <= max(ids) <= 65529


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_text_round_trip(text: str) -> None:
    assert world.decode(world.encode(text)) == text


def test_lone_surrogates() -> None:
    assert world.decode_bytes(world.encode("a\ud800b")) == b"a\xed\xa0\x80b"
    assert world.decode(world.encode("a\ud800b")) == "a\ufffd\ufffd\ufffdb"


def test_control_and_padding_ids_decode_to_nothing() -> None:
    assert world.decode([0, 24281, 0, *range(65530, 65536), 59]) == "User:"


@settings(deadline=None, max_examples=100)
@given(mixed_bytes(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_stream_equals_whole(data: bytes, sizes: list[int]) -> None:
    chunks: list[bytes] = []
    at = 0
    while at < len(data):
        chunks.append(data[at : at + sizes[len(chunks) % len(sizes)]])
        at += len(chunks[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wkv.tokenizers.world._BLOCK", 150)
        assert list(world.encode_stream(chunks)) == trie().encode(data)


@pytest.mark.parametrize("block", [1, 127, 128, 129, 1000])
def test_stream_of_long_runs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs longer than the longest token, with no place to cut, in blocks around its length."""
    monkeypatch.setattr("wkv.tokenizers.world._BLOCK", block)
    data = b" " * 700 + b"-" * 300 + "日本語".encode() * 90 + b"\n" * 200
    assert list(world.encode_stream([data[at : at + 64] for at in range(0, len(data), 64)])) == trie().encode(data)
    assert list(world.encode_stream(["日", "本", b"", "語"])) == world.encode("日本語")
    assert list(world.encode_stream([])) == []


def test_long_input_is_encoded_in_blocks() -> None:
    data = (b"one two  three\n\n" + bytes(range(200, 256)) + b" " * 130) * (3 * _BLOCK // 200)
    assert len(data) > 2 * _BLOCK
    ids = world.encode(data)
    assert ids == world._encode(data)
    assert world.decode_bytes(ids) == data


@pytest.mark.parametrize("bad", [None, 5, 1.5, ["a"], [1, 2], object()])
def test_encode_refuses_what_is_not_text(bad: Any) -> None:
    with pytest.raises(TokenizerError, match=f"str or bytes, got {type(bad).__name__}"):
        world.encode(bad)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 65536], "65536 at position 2"),
        ([-1], "-1 at position 0"),
        ([5, 10**30], "at position 1"),
        ([1, 1.5], "1.5 at position 1 is not an integer"),
        ([None], "None at position 0"),
        (["1"], "'1' at position 0"),
        ([[1]], "position 0"),
        (7, "sequence of token ids, got int"),
        ("12", "got str"),
        (b"12", "got bytes"),
    ],
)
def test_decode_refuses_what_are_not_ids(ids: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        world.decode(ids)


def test_instances_share_one_table_and_can_be_pickled() -> None:
    other = pickle.loads(pickle.dumps(world))
    assert other._vocabulary is world._vocabulary
    assert len(pickle.dumps(world)) < 200


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"y" + data[1:]])
def test_damaged_vocabulary(damage: Any) -> None:
    with pytest.raises(TokenizerError, match="damaged"):
        unpack_vocabulary(damage(SHIPPED.read_bytes()))


START_UP = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from wkv.tokenizers import WorldTokenizer
WorldTokenizer().encode("Hello, world!")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, *(name for name in ("torch", "numpy", "tokenizers") if name in sys.modules))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read with the resource module")
def test_start_up_is_small_and_imports_nothing_heavy() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", START_UP], capture_output=True, text=True, check=True
    ).stdout.split()
    kibibytes = int(printed[0]) / (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 30 * 1000**2 / 1024
    assert printed[1:] == []


def build_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_world_vocabulary", ROOT / "tools/build_world_vocabulary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_tool_reads_both_line_ends_and_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, source, out = build_tool(), tmp_path / "vocabulary.txt", tmp_path / "packed.bin"
    source.write_bytes(vocabulary_text().replace("\n", "\r\n").encode("utf-8"))
    monkeypatch.setattr(sys, "argv", ["build", str(source), "--out", str(out)])
    tool.main()
    assert unpack_vocabulary(out.read_bytes()) == tokens()
    assert [path.name for path in tmp_path.iterdir() if path != source] == ["packed.bin"]


def test_build_tool_refuses_another_file(tmp_path: Path) -> None:
    source = tmp_path / "vocabulary.txt"
    source.write_text(vocabulary_text()[:-40], encoding="utf-8")
    with pytest.raises(SystemExit, match="sha256"):
        build_tool().read_text_file(source)
    with pytest.raises(SystemExit, match="all different"):
        build_tool().check([*tokens()[:-1], b"a"])


def test_token_bytes_of_id_261() -> None:
    assert token_bytes(261) == b"\n\n"
