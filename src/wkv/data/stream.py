"""From documents to one stream of token ids, and from the stream to training batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wkv.data.document import Document
from wkv.data.encoding import encode_document
from wkv.errors import DataError
from wkv.tokenizers import Tokenizer


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Tensor:
    """All documents back to back as int32 ids, each followed by `tokenizer.eos_id` (id 0) if there is one.

    Which parts of a conversation count in the loss is not kept; `TokenStore.from_documents` keeps it.

    Raises:
        DataError: if there is not a single token.
    """
    parts = [encode_document(document, tokenizer).ids.astype(np.int32) for document in documents]
    if not sum(len(part) for part in parts):
        raise DataError("there is no text to train on")
    return torch.from_numpy(np.concatenate(parts))


class RandomWindows:
    """Batches of windows that start anywhere in a stream of tokens, drawn with their own seeded generator.

    As in the official trainer, windows run across document ends and every window starts with an empty state.

    Args:
        tokens: integer ids, one dimension.
        context_length: T, inputs per window; a window holds T + 1 tokens.
        batch_size: B, windows per batch.
        seed: two samplers with one seed draw the same windows.

    Raises:
        DataError: if the stream is shorter than one window.
    """

    def __init__(self, tokens: Tensor, context_length: int, batch_size: int, seed: int) -> None:
        if tokens.numel() < context_length + 1:
            found = f"{tokens.numel()} tokens, a window needs {context_length + 1}"
            raise DataError(f"the training text has {found}; give more text or a shorter context_length")
        self._tokens, self._batch_size = tokens, batch_size
        self._offsets = torch.arange(context_length + 1)
        self._generator = torch.Generator().manual_seed(seed)
        self._checksum = zlib.crc32(tokens.numpy().tobytes())

    def next_batch(self) -> Tensor:
        """int64 [B, T + 1]: inputs are `[:, :-1]`, targets `[:, 1:]`."""
        choices = self._tokens.numel() - self._offsets.numel() + 1
        starts = torch.randint(choices, (self._batch_size, 1), generator=self._generator)
        return self._tokens[starts + self._offsets].long()

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence of batches, and a checksum of the tokens it belongs to."""
        return {"generator": self._generator.get_state(), "checksum": self._checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: if it was taken on other tokens.
        """
        if state["checksum"] != self._checksum:
            raise DataError("the training text or its tokenizer has changed since the checkpoint; start a new run")
        self._generator.set_state(state["generator"])
