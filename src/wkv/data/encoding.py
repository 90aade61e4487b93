"""From a document to token ids, and which of them count in the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wkv.data.document import Document, Part
from wkv.tokenizers import Tokenizer


class Encoded(NamedTuple):
    """Token ids [N] of one document, and bool [N] whether each counts as a target; None: all do."""

    ids: NDArray[Any]
    counts: NDArray[np.bool_] | None


def encode_document(document: Document, tokenizer: Tokenizer) -> Encoded:
    """The ids of a document, with `tokenizer.eos_id` at its end if there is one, else the document's `closing`.

    Parts are tokenised each by itself: `encode(a) + encode(b)` is in general not `encode(a + b)`. With `document.keep`
    ids and what counts are cut after that many, so that the end is missing.
    """
    ids, counts = _whole(document, tokenizer)
    return Encoded(ids[: document.keep], None if counts is None else counts[: document.keep])


def _whole(document: Document, tokenizer: Tokenizer) -> Encoded:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if not document.parts:
        return Encoded(_with_end(_encode(document.text, tokenizer), end), None)
    parts = list(document.parts)
    if not end and document.closing:
        parts.append(Part(document.closing, len(document.closing)))
    pieces = [tokenizer.encode(part.text) for part in parts]
    counts = [_counting(part, ids, tokenizer) for part, ids in zip(parts, pieces, strict=True)]
    counts.append(np.full(len(end), parts[-1].written))
    return Encoded(np.array([token for ids in (*pieces, end) for token in ids], np.int32), np.concatenate(counts))


def _encode(text: str, tokenizer: Tokenizer) -> NDArray[Any]:
    """Straight into an array where the tokenizer can do that: a list takes twenty times the memory."""
    direct = getattr(tokenizer, "encode_array", None)
    return np.array(tokenizer.encode(text), np.int32) if direct is None else direct(text)


def _with_end(ids: NDArray[Any], end: list[int]) -> NDArray[Any]:
    return np.concatenate([ids, np.array(end, ids.dtype)]) if end else ids


def _counting(part: Part, ids: list[int], tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """bool [N]: which tokens begin within the characters that count."""
    if part.written or part.counts <= 0:
        return np.full(len(ids), part.written and part.counts > 0)
    limit = len(part.text[: part.counts].encode("utf-8", "surrogatepass"))
    sizes = [len(tokenizer.decode_bytes([token])) for token in ids[:limit]]
    begins = np.cumsum([0, *sizes])[:-1]
    return np.concatenate([begins < limit, np.zeros(len(ids) - len(sizes), np.bool_)])
