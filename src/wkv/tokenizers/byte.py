"""One id per byte: the tokenizer of the smallest experiments."""

from __future__ import annotations

from typing import Any

from wkv.tokenizers.base import TableTokenizer, as_bytes


class ByteTokenizer(TableTokenizer):
    """Ids are byte values, 0 to 255. There is no end-of-text id."""

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of the text (UTF-8, lone surrogates in their three-byte form) as integers."""
        return list(as_bytes(text))

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "bytes"}`."""
        return {"kind": "bytes"}

    def __repr__(self) -> str:
        return "ByteTokenizer()"
