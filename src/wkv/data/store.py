"""`TokenStore`: the tokens of a corpus, in memory or in mapped files, with one interface for all samplers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wkv.data.document import Document
from wkv.data.encoding import encode_document
from wkv.errors import DataError
from wkv.tokenizers import Tokenizer

_SAMPLED = 1 << 20  # tokens that a fingerprint reads, in blocks spread evenly over the corpus
_BLOCK = 1 << 10
_PIECE = 1 << 22  # document starts hashed at a time


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents back to back as token ids.

    Args:
        tokens: integer ids [N], an array or a mapped file.
        starts: int64 [D], where each document begins; the first begins at 0. A document may be empty.
        loss_mask: bool [N], whether a token counts as a target of the loss; None: every one does.

    Raises:
        DataError: if the parts do not fit together, or there is not a single token.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        tokens, starts, mask = self.tokens, self.starts, self.loss_mask
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"tokens must be integers [N], found {tokens.dtype} {list(tokens.shape)}")
        if not len(tokens):
            raise DataError("there is no text to train on: the corpus has no tokens")
        if starts.ndim != 1 or starts.dtype != np.int64 or not len(starts) or starts[0] != 0:
            raise DataError(f"starts must be int64 [D] from 0 on, found {starts.dtype} {list(starts.shape)}")
        if starts[-1] > len(tokens) or (starts[1:] < starts[:-1]).any():
            raise DataError(f"the starts of documents must rise from 0 to at most {len(tokens)} tokens")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != tokens.shape):
            raise DataError(f"loss_mask must be bool {list(tokens.shape)}, found {mask.dtype} {list(mask.shape)}")

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
        """Tokenise documents in memory (`encode_document`); `build_cache` does it for big corpora."""
        encoded = [encode_document(document, tokenizer) for document in documents]
        if not encoded:
            raise DataError("there is no text to train on: the corpus has no documents")
        lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
        tokens = np.concatenate([ids for ids, _ in encoded]).astype(token_dtype(tokenizer.vocab_size))
        starts = np.cumsum(lengths) - lengths
        if all(counts is None for _, counts in encoded):
            return cls(tokens, starts)
        masks = [np.ones(len(ids), np.bool_) if counts is None else counts for ids, counts in encoded]
        return cls(tokens, starts, np.concatenate(masks))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [D]: tokens per document."""
        return np.diff(self.starts, append=np.int64(self.num_tokens))

    def document(self, index: int) -> NDArray[Any]:
        """The ids of document `index`; a view, not a copy.

        Raises:
            IndexError: outside 0 .. D - 1.
        """
        begin, end = self._bounds(index)
        return self.tokens[begin:end]

    def document_mask(self, index: int) -> NDArray[np.bool_]:
        """bool: whether each token of document `index` counts as a target."""
        begin, end = self._bounds(index)
        return np.ones(end - begin, np.bool_) if self.loss_mask is None else self.loss_mask[begin:end]

    @cached_property
    def fingerprint(self) -> str:
        """Tells corpora apart: the same for the same documents, however they are stored.

        A hash of the number of tokens, of where documents start, and of up to a million tokens and mask values in
        blocks spread evenly over the corpus, so that a mapped file of any size answers at once. The complete content
        of a cache is verified by `open_cache`.
        """
        digest = hashlib.blake2b(self.num_tokens.to_bytes(8, "little"), digest_size=16)
        for begin in range(0, len(self), _PIECE):
            digest.update(self.starts[begin : begin + _PIECE].astype("<i8").tobytes())
        for begin in _block_starts(self.num_tokens):
            digest.update(self.tokens[begin : begin + _BLOCK].astype("<i8").tobytes())
            if self.loss_mask is not None:
                digest.update(self.loss_mask[begin : begin + _BLOCK].tobytes())
        return digest.hexdigest()

    def _bounds(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return int(self.starts[index]), int(self.starts[index + 1]) if index + 1 < len(self) else self.num_tokens


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type for the ids of a vocabulary: uint16 up to 65536 entries, else uint32; little endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _block_starts(num_tokens: int) -> Iterable[int]:
    """Where the blocks of a fingerprint begin: all blocks of a small corpus, evenly spread ones of a big one."""
    if num_tokens <= _SAMPLED:
        return range(0, num_tokens, _BLOCK)
    count = _SAMPLED // _BLOCK
    return (i * (num_tokens - _BLOCK) // (count - 1) for i in range(count))
