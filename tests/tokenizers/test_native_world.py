"""The native World encoder against the Python one and a naive trie; what happens without it; threads."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import random
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.helpers import ALPHABET, PROSE, fragments, mixed_bytes, tokens, trie
from wkv import native
from wkv.errors import TokenizerError
from wkv.tokenizers import WorldTokenizer, native_world
from wkv.tokenizers.native_world import NativeWorld

CASES = json.loads((Path(__file__).parents[1] / "golden/world_tokenizer/cases.json").read_text(encoding="utf-8"))
DATA = [base64.b64decode(case["bytes_b64"]) for case in CASES]
MEGABYTE = 1 << 20

world = WorldTokenizer()
needs_library = pytest.mark.skipif(not native_world.usable(), reason=f"no native tokenizer: {native.unavailable()}")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where wkv was installed without a compiler: every call of native code fails."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(NativeWorld, "_block", None)
    monkeypatch.setattr(NativeWorld, "decode", None)


def words(seed: int, size: int) -> bytes:
    """About `size` bytes of random tokens, some cut off, and pieces of prose."""
    draw, out, length = random.Random(seed), [], 0
    while length < size:
        token = draw.choice(tokens())
        out.append(draw.choice([token, token[: draw.randint(1, len(token))], PROSE[draw.randint(0, 99) :].encode()]))
        length += len(out[-1])
    return b"".join(out)


@needs_library
def test_it_is_in_use() -> None:
    assert native_world.usable()
    assert world._vocabulary.native.num_bytes < 2_000_000


@needs_library
def test_without_torch_it_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(native_world.sys.modules, "torch")
    assert not native_world.usable()


@needs_library
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case: dict[str, Any]) -> None:
    data = base64.b64decode(case["bytes_b64"])
    assert world._vocabulary.native.encode(data, len(data)) == (case["ids"], len(data))
    assert world._vocabulary.native.encode_array(data).tolist() == case["ids"]
    assert world._vocabulary.native.decode(array("H", case["ids"])) == data


@pytest.mark.usefixtures("without_library")
def test_golden_without_the_library() -> None:
    for case, data in zip(CASES, DATA, strict=True):
        assert world.encode(data) == case["ids"]
        assert world.encode_array(data).tolist() == case["ids"]
        assert list(world.encode_stream([data[:5], data[5:]])) == case["ids"]
        assert world.decode_bytes(case["ids"]) == data


@pytest.mark.usefixtures("without_library")
def test_without_the_library_all_the_rest_is_the_same() -> None:
    assert world.encode("") == []
    assert world.encode_array("").shape == (0,)
    with pytest.raises(TokenizerError, match="got int"):
        world.encode_array(5)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="65536 at position 1"):
        world.decode([5, 65536])


@settings(deadline=None, max_examples=500)
@given(st.one_of(mixed_bytes(), st.binary(max_size=300), st.lists(fragments(), max_size=20).map(b"".join)))
def test_equals_the_python_encoder(data: bytes) -> None:
    ids = world.encode(data)
    assert ids == world._encode(data)
    assert world.encode_array(data).tolist() == ids
    assert world.decode_bytes(ids) == data


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.text(ALPHABET)))
def test_text_equals_the_python_encoder(text: str) -> None:
    assert world.encode(text) == world._encode(text.encode("utf-8", "surrogatepass"))
    assert world.decode(world.encode(text)) == text


def test_every_token_and_every_token_cut_short() -> None:
    assert [world.encode(token) for token in tokens()] == [[index] for index in range(1, 65530)]
    joined = b"".join(tokens())
    assert world.encode(joined) == trie().encode(joined)
    cut = b"".join(token[:-1] for token in tokens())
    assert world.encode(cut) == trie().encode(cut)


def test_all_pairs_of_bytes() -> None:
    """The first two levels of the trie are a table of their own; NUL bytes are bytes like others."""
    for first in range(256):
        data = b"".join(bytes([first, second]) for second in range(256))
        assert world.encode(data) == trie().encode(data)
        assert [world.encode(data[at : at + 2]) for at in range(0, 512, 2)] == [
            trie().encode(data[at : at + 2]) for at in range(0, 512, 2)
        ]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x00" * MEGABYTE,
        b" " * (MEGABYTE + 1),
        (b" " * 127 + b"x") * (MEGABYTE // 128),
        (b"-" * 79 + b"=") * (MEGABYTE // 80),
        bytes(range(256)) * (MEGABYTE // 256),
        "漢字かな交じり文、ひらがな。".encode() * (MEGABYTE // 42),
        words(0, MEGABYTE),
        random.Random(1).randbytes(MEGABYTE),
    ],
    ids=["empty", "nul", "nuls", "spaces", "almost", "dashes", "bytes", "japanese", "tokens", "random"],
)
def test_long_inputs(data: bytes) -> None:
    """More than one block each, so that tokens reach across block ends."""
    ids = trie().encode(data)
    assert world.encode(data) == ids
    assert np.array_equal(world.encode_array(data), ids)
    assert world.decode_bytes(ids) == data


@needs_library
@pytest.mark.parametrize("block", [1, 2, 127, 128, 129, 1000])
def test_small_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wkv.tokenizers.native_world._BLOCK", block)
    for data in [*DATA, words(2, 3000)]:
        expected = trie().encode(data)
        assert world.encode(data) == expected
        assert world.encode_array(data).tolist() == expected


@needs_library
@pytest.mark.parametrize("block", [1, 64, 128, 300])
def test_stream(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and Python streams give the same ids, which are those of the whole."""
    monkeypatch.setattr("wkv.tokenizers.world._BLOCK", block)
    data = words(3, 5000) + b" " * 500
    chunks = [data[at : at + 61] for at in range(0, len(data), 61)]
    ids = list(world.encode_stream(chunks))
    monkeypatch.setattr(native_world, "usable", lambda: False)
    assert ids == list(world.encode_stream(chunks)) == trie().encode(data)


@needs_library
@settings(deadline=None, max_examples=100)
@given(mixed_bytes(), st.integers(0, 200))
def test_tokens_that_begin_before_a_stop(data: bytes, stop: int) -> None:
    """What `encode_stream` rests on: ids up to a stop are a prefix of all ids, and the rest follows from there."""
    stop, whole = min(stop, len(data)), world._encode(data)
    ids, end = world._vocabulary.native.encode(data, stop)
    assert ids + world.encode(data[end:]) == whole
    assert end >= stop
    assert not ids or end - len(tokens()[ids[-1] - 1]) < stop


def test_threads_share_the_table() -> None:
    texts = [words(seed, 40_000) for seed in range(8)]
    expected = [trie().encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(world.encode, texts * 4)) == expected * 4
        assert [ids.tolist() for ids in pool.map(world.encode_array, texts * 4)] == expected * 4
        assert list(pool.map(world.decode_bytes, expected * 4)) == texts * 4


def test_copies_share_the_table() -> None:
    for other in (copy.copy(world), copy.deepcopy(world), pickle.loads(pickle.dumps(world)), WorldTokenizer()):
        assert other._vocabulary is world._vocabulary
        assert other.encode(PROSE) == world.encode(PROSE)


def test_arrays_of_ids() -> None:
    ids = world.encode_array(bytearray(PROSE.encode()))  # type: ignore[arg-type]
    assert (ids.dtype, ids.shape) == (np.uint16, (len(world.encode(PROSE)),))
    assert ids.flags.owndata
    assert ids.flags.writeable
    kinds: list[Any] = [ids, ids.tolist(), tuple(ids), list(ids), iter(ids), torch.tensor(ids.astype(np.int64))]
    kinds.append(list(torch.tensor(ids.astype(np.int64))))
    assert [world.decode(kind) for kind in kinds] == [PROSE] * len(kinds)
    with pytest.raises(TokenizerError, match="sequence of token ids, got Tensor"):
        world.decode(torch.tensor(5))


@needs_library
@pytest.mark.parametrize(
    "listed",
    [
        tokens()[:255],
        tokens()[:300] + tokens()[299:300],
        [*tokens()[:300], b""],
        [*tokens()[:300], b"x" * 256],
        [*tokens()[1:], b"x" * 200],
        [*tokens()[:256], *(b"%06d" % number for number in range(65_280))],
    ],
    ids=["too few", "two alike", "empty", "too long", "a byte is missing", "too many"],
)
def test_unusable_lists_of_tokens(listed: list[bytes]) -> None:
    joined, offsets = b"".join(listed), array("I", [0, 0])
    for token in listed:
        offsets.append(offsets[-1] + len(token))
    with pytest.raises(TokenizerError, match="cannot be made"):
        NativeWorld(joined, offsets, len(listed))


@needs_library
def test_other_lists_of_tokens() -> None:
    """In any order; the table adapts to its longest token; nothing is known of the World vocabulary."""
    draw = random.Random(4)
    listed = [bytes([value]) for value in range(256)]
    listed += sorted({draw.randbytes(draw.randint(2, 5)) for _ in range(5000)} | {b"ab" * 120, b"\x00" * 255})
    draw.shuffle(listed)
    joined, offsets = b"".join(listed), array("I", [0, 0])
    for token in listed:
        offsets.append(offsets[-1] + len(token))
    encoder = NativeWorld(joined, offsets, len(listed))
    numbers = {token: index for index, token in enumerate(listed, start=1)}
    data = b"".join(draw.choice([token, token[:-1]]) for token in draw.choices(listed, k=3000)) + b"\x00" * 600
    ids, at = [], 0
    while at < len(data):
        end = next(end for end in range(min(at + 255, len(data)), at, -1) if data[at:end] in numbers)
        ids.append(numbers[data[at:end]])
        at = end
    assert encoder.encode(data, len(data)) == (ids, len(data))
    assert encoder.decode(array("H", ids)) == data
