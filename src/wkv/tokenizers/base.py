"""What every tokenizer of the library offers, and the parts they share: decoding by table and streaming decode.

A tokenizer here is a reversible map between bytes and ids. Text is its UTF-8 encoding; nothing is normalised.
"""

from __future__ import annotations

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from wkv.errors import TokenizerError


@runtime_checkable
class Tokenizer(Protocol):
    """The interface that models, samplers and the training data rely on."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, `0 .. vocab_size - 1`."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, or None where the vocabulary has none."""
        ...

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, or of any bytes."""
        ...

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes that the ids stand for; control ids stand for none."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """`decode_bytes` read as UTF-8, invalid sequences as U+FFFD."""
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder for ids that arrive one at a time."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description from which `wkv.tokenizers.from_dict` makes the same tokenizer."""
        ...


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8 of a str (lone surrogates as their three-byte form, `errors="surrogatepass"`), or the bytes themselves."""
    if isinstance(text, str):
        return text.encode("utf-8", "surrogatepass")
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TokenizerError(f"encode takes str or bytes, got {type(text).__name__}")


class TableTokenizer(ABC):
    """Base of the tokenizers here, whose ids stand for fixed bytes: `table[id]`, empty for control ids."""

    eos_id: int | None = None

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table

    @property
    def vocab_size(self) -> int:
        """Number of ids, `0 .. vocab_size - 1`."""
        return len(self._table)

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, or of any bytes."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description from which `wkv.tokenizers.from_dict` makes the same tokenizer."""

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, joined. Any iterable of integers: a list, a one-dimensional tensor or array.

        Raises TokenizerError naming the first id that is not in the vocabulary, and its position.
        """
        if isinstance(ids, (str, bytes)):
            raise TokenizerError(f"decode takes token ids, got {type(ids).__name__}")
        try:
            ids = list(ids)
        except TypeError:
            raise TokenizerError(f"decode takes a sequence of token ids, got {type(ids).__name__}") from None
        return b"".join([self._token_bytes(token, position) for position, token in enumerate(ids)])

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """`decode_bytes` read as UTF-8; every invalid sequence becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A fresh `StreamDecoder` for ids that arrive one at a time."""
        return StreamDecoder(self)

    def _token_bytes(self, token: SupportsIndex, position: int) -> bytes:
        try:
            index = operator.index(token)
        except TypeError:
            raise TokenizerError(f"token {token!r} at position {position} is not an integer") from None
        if not 0 <= index < len(self._table):
            raise TokenizerError(
                f"token id {index} at position {position} is outside the vocabulary 0..{len(self._table) - 1}"
            )
        return self._table[index]


class StreamDecoder:
    """Turns ids into text as they arrive, for showing a text while it is written.

    What all `feed` calls and the closing `flush` return, joined, is exactly `tokenizer.decode` of all ids. A character
    whose bytes are spread over several ids comes out with the last of them; bytes that can no longer become a
    character come out as U+FFFD at once.
    """

    def __init__(self, tokenizer: TableTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._position = 0

    def feed(self, token: SupportsIndex) -> str:
        """The text that this id completes, often empty. An id outside the vocabulary raises and changes nothing."""
        data = self._tokenizer._token_bytes(token, self._position)
        self._position += 1
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character, else empty. The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._position = 0
        return rest
