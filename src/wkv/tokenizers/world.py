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
import itertools
import operator
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from wkv.errors import TokenizerError
from wkv.tokenizers import native_world
from wkv.tokenizers.base import TableTokenizer, as_bytes
from wkv.tokenizers.native_world import NativeWorld

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


class TokenTable(Sequence[bytes]):
    """`table[id] -> bytes`, kept as one string of bytes with offsets: a tenth of what 65,536 objects would take.

    Args:
        joined: the bytes of all tokens, one after the other.
        lengths: of each.
    """

    def __init__(self, joined: bytes, lengths: Iterable[int]) -> None:
        self.joined = joined
        self.offsets = array("I", itertools.accumulate(lengths, initial=0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.joined[self.offsets[index] : self.offsets[index + 1]]


class _Vocabulary:
    """The tokens, and what encoding needs of them, each made when it is first used.

    For native code: `native`. For the Python encoder: `ids[bytes] -> id`, and `lengths[first two bytes]`, the token
    lengths to try, longest first; these two take 8 MB.
    """

    def __init__(self, packed: bytes) -> None:
        self.table = unpack_table(packed)

    @functools.cached_property
    def native(self) -> NativeWorld:
        return NativeWorld(self.table.joined, self.table.offsets, NUM_TOKENS)

    @functools.cached_property
    def ids(self) -> dict[bytes, int]:
        return {self.table[index]: index for index in range(1, NUM_TOKENS + 1)}

    @functools.cached_property
    def lengths(self) -> dict[bytes, tuple[int, ...]]:
        lengths: dict[bytes, tuple[int, ...]] = {}
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}
        for token in reversed(self.ids):  # sorted by length, so the longest come first
            tried = lengths.get(token[:2], ())
            if len(token) > 1 and len(token) not in tried:
                longer = (*tried, len(token))
                lengths[token[:2]] = shared.setdefault(longer, longer)
        return lengths


def unpack_vocabulary(packed: bytes) -> list[bytes]:
    """The token bytes in id order (id 1 first): `unpack_table` as a list."""
    table = unpack_table(packed)
    return [table[index] for index in range(1, NUM_TOKENS + 1)]


def unpack_table(packed: bytes) -> TokenTable:
    """All ids' bytes from the packed form written by `tools/build_world_vocabulary.py`; id 0 and the padding are empty.

    zlib of three runs: for the tokens in byte order, how many bytes each shares with the one before; how many it adds;
    the added bytes. Ids follow from sorting by length, then by bytes. Raises TokenizerError if the data are damaged.
    """
    try:
        data = zlib.decompress(packed)
    except zlib.error as error:
        raise TokenizerError(f"the World vocabulary of this installation is damaged ({error}): reinstall wkv") from None
    # Tokens of one length are joined at once: as 65,529 objects they would take 5 MB, which Python then keeps.
    joined = [bytearray() for _ in range(LONGEST_TOKEN + 1)]
    previous, at = b"", 2 * NUM_TOKENS
    for kept, added in zip(data[:NUM_TOKENS], data[NUM_TOKENS : 2 * NUM_TOKENS], strict=True):
        previous = previous[:kept] + data[at : at + added]
        at += added
        joined[len(previous)] += previous  # in the order of their bytes
    lengths = (length for length in range(1, len(joined)) for _ in range(len(joined[length]) // length))
    padding = VOCAB_SIZE - NUM_TOKENS - 1
    return TokenTable(b"".join(joined), itertools.chain([0], lengths, [0] * padding))


@functools.cache
def _vocabulary() -> _Vocabulary:
    return _Vocabulary(importlib.resources.files("wkv.tokenizers").joinpath("world_vocabulary.bin").read_bytes())


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
        if native_world.usable():
            return self._vocabulary.native.encode(data, len(data))[0]
        if len(data) <= 2 * _BLOCK:
            return self._encode(data)
        return list(self.encode_stream(data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)))

    def encode_array(self, text: str | bytes) -> NDArray[np.uint16]:
        """`encode` as a numpy array, uint16 [T]: two bytes per id where a list takes forty. For training data."""
        data = as_bytes(text)
        if native_world.usable():
            return self._vocabulary.native.encode_array(data)
        import numpy as np

        return np.array(self.encode(data), np.uint16)

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
        rest = bytes(pending)
        yield from self._vocabulary.native.encode(rest, len(rest))[0] if native_world.usable() else self._encode(rest)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, joined. Any iterable of integers: a list, a one-dimensional tensor or array.

        Raises TokenizerError naming the first id that is not in the vocabulary, and its position.
        """
        if not isinstance(ids, (list, tuple)) or not native_world.usable():
            return super().decode_bytes(ids)
        try:
            numbers = array("H", map(operator.index, ids))  # takes 0 .. 65535, which is just the vocabulary
        except (TypeError, OverflowError):
            return super().decode_bytes(ids)  # says which of them is no id
        return self._vocabulary.native.decode(numbers)

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "world"}`."""
        return {"kind": "world"}

    def _encode_settled(self, data: bytes) -> tuple[list[int], int]:
        """The ids that no continuation of `data` can change, and how many bytes they cover."""
        if native_world.usable():
            return self._vocabulary.native.encode(data, max(len(data) - LONGEST_TOKEN + 1, 0))
        ids, end = self._encode(data), len(data)
        while ids and end - len(self._table[ids[-1]]) > len(data) - LONGEST_TOKEN:
            end -= len(self._table[ids.pop()])
        return ids, end

    def _encode(self, data: bytes) -> list[int]:
        """The Python encoder: the reference for the native one, and what runs where that is not available."""
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
