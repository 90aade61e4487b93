"""The RWKV World tokenizer (rwkv_vocab_v20230424): greedy longest match over bytes.

Every single byte is a token, so that any input can be encoded and every round trip is exact. There are no merges, no
pre-tokenisation and no normalisation: from the left, the longest vocabulary entry that starts here is taken. Greedy
choice depends on what follows, so `encode(a) + encode(b)` is in general not `encode(a + b)`; `encode_stream` is.

Ids 1..65529 are tokens, id 0 ends a document, 65530..65535 pad the embedding and stand for nothing.
The vocabulary is that of the PyPI package `rwkv` by Bo Peng (Apache-2.0, see NOTICE).
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from wkv.errors import TokenizerError
from wkv.tokenizers.base import TableTokenizer, as_bytes

NUM_TOKENS = 65529
VOCAB_SIZE = 65536
LONGEST_TOKEN = 128  # bytes
_BLOCK = 1 << 18  # bytes encoded at a time: bounds the memory of intermediate pieces

# Cuts bytes into pieces that may be encoded one by one. A cut is made only between two bytes that stand side by side
# in no token of the vocabulary, so no greedy match can cross it (tests/tokenizers/test_world.py checks them all):
#   a letter | neither letter nor high byte        a digit | no digit
#   punctuation | neither letter, high byte nor punctuation     punctuation but ' and - | a letter
#   no white space | a space
# Most pieces of prose are then tokens themselves, found by one dictionary look-up.
_PIECES = re.compile(
    rb"(?s: ?+[A-Za-z]++(?![\x80-\xff])"
    rb"|[\t-\r ]*+(?:[A-Za-z]++(?![\x80-\xff])|[0-9]++|[!-/:-@\[-`{-~]++(?![\x80-\xff])(?:(?<!['\-])|(?![A-Za-z])))"
    rb"|.+?(?:(?=(?<![\t-\r ]) )|\Z))"
)


class _Vocabulary:
    """`table[id] -> bytes`, `ids[bytes] -> id`, and `lengths[first two bytes]`: token lengths to try, longest first."""

    def __init__(self, tokens: list[bytes]) -> None:
        padding = VOCAB_SIZE - NUM_TOKENS - 1
        self.table = [b"", *tokens, *[b""] * padding]
        self.ids = {token: index for index, token in enumerate(tokens, start=1)}
        lengths: dict[bytes, tuple[int, ...]] = {}
        for token in reversed(tokens):  # sorted by length, so the longest come first
            tried = lengths.get(token[:2], ())
            if len(token) > 1 and len(token) not in tried:
                lengths[token[:2]] = (*tried, len(token))
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.lengths = {start: shared.setdefault(tried, tried) for start, tried in lengths.items()}


def unpack_vocabulary(packed: bytes) -> list[bytes]:
    """The token bytes in id order (id 1 first) from the packed form written by `tools/build_world_vocabulary.py`.

    zlib of three runs: for the tokens in byte order, how many bytes each shares with the one before; how many it adds;
    the added bytes. Ids follow from sorting by length, then by bytes. Raises TokenizerError if the data are damaged.
    """
    try:
        data = zlib.decompress(packed)
    except zlib.error as error:
        raise TokenizerError(f"the World vocabulary of this installation is damaged ({error}): reinstall wkv") from None
    tokens, previous, at = [], b"", 2 * NUM_TOKENS
    for kept, added in zip(data[:NUM_TOKENS], data[NUM_TOKENS : 2 * NUM_TOKENS], strict=True):
        previous = previous[:kept] + data[at : at + added]
        at += added
        tokens.append(previous)
    tokens.sort(key=len)  # stable: bytes order stays within a length
    return tokens


@functools.cache
def _vocabulary() -> _Vocabulary:
    packed = importlib.resources.files("wkv.tokenizers").joinpath("world_vocabulary.bin").read_bytes()
    return _Vocabulary(unpack_vocabulary(packed))


class WorldTokenizer(TableTokenizer):
    """Greedy longest match over the 65,529 byte strings of the World vocabulary; all instances share one table."""

    eos_id: int | None = 0

    def __init__(self) -> None:
        self._vocabulary = _vocabulary()
        super().__init__(self._vocabulary.table)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text (as UTF-8, lone surrogates in their three-byte form) or of any bytes. Empty for empty input.

        Never returns id 0 or the padding ids. Raises TokenizerError for other types.
        """
        data = as_bytes(text)
        if len(data) <= 2 * _BLOCK:
            return self._encode(data)
        return list(self.encode_stream(data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)))

    def encode_stream(self, chunks: Iterable[str | bytes]) -> Iterator[int]:
        """Ids of a text that comes in chunks (a file read in blocks), in constant memory: `encode` of them all joined.

        The ids of the last 128 bytes of what has been read are held back, because a longer match may still come.
        """
        pending = bytearray()
        for chunk in chunks:
            pending += as_bytes(chunk)
            if len(pending) >= _BLOCK:
                ids, used = self._encode_settled(bytes(pending))
                del pending[:used]
                yield from ids
        yield from self._encode(bytes(pending))

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "world"}`."""
        return {"kind": "world"}

    def _encode_settled(self, data: bytes) -> tuple[list[int], int]:
        """The ids that no continuation of `data` can change, and how many bytes they cover."""
        ids, end = self._encode(data), len(data)
        while ids and end - len(self._table[ids[-1]]) > len(data) - LONGEST_TOKEN:
            end -= len(self._table[ids.pop()])
        return ids, end

    def _encode(self, data: bytes) -> list[int]:
        get = self._vocabulary.ids.get
        out: list[int] = []
        for piece in _PIECES.findall(data):
            token = get(piece)
            if token is not None:
                out.append(token)
            else:
                out += self._longest_matches(piece)
        return out

    def _longest_matches(self, piece: bytes) -> list[int]:
        get, lengths = self._vocabulary.ids.get, self._vocabulary.lengths.get
        out, at, end = [], 0, len(piece)
        while at < end:
            for length in lengths(piece[at : at + 2], ()):
                # A slice cut short by the end can only equal a token that reaches the end: still the longest match.
                token = get(piece[at : at + length])
                if token is not None:
                    break
            else:
                token, length = piece[at] + 1, 1
            out.append(token)
            at += length
        return out

    def __reduce__(self) -> tuple[type[WorldTokenizer], tuple[()]]:
        return WorldTokenizer, ()

    def __repr__(self) -> str:
        return "WorldTokenizer()"
