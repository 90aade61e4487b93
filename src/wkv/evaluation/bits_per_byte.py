"""Bits per byte: the size a text would have if the model compressed it, independent of the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.data.document import Document
from wkv.data.encoding import encode_document
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.tokenizers import Tokenizer

Text = str | bytes | Document
Counts = Any  # array of bool [N], or None


def scored_bytes(text: Text) -> int:
    """Bytes that `bits_per_byte` charges: all of a text, of a conversation the answers."""
    if isinstance(text, Document) and text.parts:
        return sum(len(part.text[: part.counts].encode()) for part in text.parts)
    whole = text.text if isinstance(text, Document) else text
    return len(whole.encode() if isinstance(whole, str) else whole)


def bits_per_byte(
    model: LanguageModel,
    documents: Sequence[Text],
    tokenizer: Tokenizer | None = None,
    batch_size: int = 16,
    segment: int = 256,
) -> float:
    """Mean number of bits the model needs for one byte of `documents`, each read from its start to its end.

    Args:
        model: any registered model; it is put into evaluation mode for the time of the call.
        documents: texts. Each starts with an empty state and one end-of-text id; without such an id in the
            vocabulary, its first token is charged `log2(V)` bits. Of a `Document` in parts (a conversation) only what
            the model is to write counts: the bits of answers and of what ends them, per byte of the answers.
        tokenizer: `model.tokenizer` by default.
        batch_size, segment: documents side by side and tokens per step. They change speed and memory, not the result.

    Raises:
        WkvError: if there is no tokenizer or no text.
    """
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise WkvError("the model carries no tokenizer; pass tokenizer=")
    if isinstance(documents, str | bytes):
        raise WkvError(f"documents must be a list of texts, found one {type(documents).__name__}")
    num_bytes = sum(map(scored_bytes, documents))
    if not num_bytes:
        raise WkvError("bits per byte needs some text, found none")
    tokens, counts = zip(*(_encode(text, tokenizer) for text in documents), strict=True)
    nats = document_nats(model, tokens, tokenizer.eos_id, batch_size, segment, counts)
    return float(nats.sum()) / math.log(2) / num_bytes


def _encode(text: Text, tokenizer: Tokenizer) -> tuple[Sequence[int], Counts]:
    """Ids, and which of them count; None: all."""
    if isinstance(text, Document):
        if text.parts:
            encoded = encode_document(text, tokenizer)
            return encoded.ids.tolist(), encoded.counts
        text = text.text
    return tokenizer.encode(text), None


@torch.no_grad()
def document_nats(
    model: LanguageModel,
    documents: Sequence[Sequence[int]],
    start_id: int | None = 0,
    batch_size: int = 16,
    segment: int = 256,
    counts: Sequence[Counts] | None = None,
) -> Tensor:
    """Negative log-likelihood of each document in nats, float64 [len(documents)].

    Args:
        model: any registered model.
        documents: token ids of each document, without start or end.
        start_id: the token before the first one; None charges `log(V)` for the first token instead.
        batch_size, segment: as for `bits_per_byte`.
        counts: for each document, which of its tokens are charged; None: all.
    """
    if batch_size < 1 or segment < 1:
        raise WkvError(f"batch_size and segment must be at least 1, found {batch_size} and {segment}")
    nats = torch.zeros(len(documents), dtype=torch.float64)
    # Longest first: documents of a batch are of similar length, and those that end first are its last rows.
    order = sorted((i for i, d in enumerate(documents) if d), key=lambda i: -len(documents[i]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            lines = [[start_id, *documents[i]] if start_id is not None else list(documents[i]) for i in rows]
            flags = [None if counts is None else counts[i] for i in rows]
            nats[rows] = _batch_nats(model, lines, _targets(lines, flags), segment)
    finally:
        model.train(training)
    if start_id is None:
        first = [i for i in order if counts is None or (flags := counts[i]) is None or flags[0]]
        nats[first] += math.log(model.config.vocab_size)
    return nats


def _targets(lines: list[list[int]], counts: list[Counts]) -> Tensor:
    """bool [B, T - 1]: which of tokens 1, 2, ... of every line are charged."""
    rows = []
    for line, flags in zip(lines, counts, strict=True):
        found = torch.ones(len(line), dtype=torch.bool) if flags is None else torch.as_tensor(np.asarray(flags, bool))
        rows.append(found[len(found) - len(line) + 1 :])  # without a start id, the first token is no target
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _batch_nats(model: LanguageModel, lines: list[list[int]], charged: Tensor, segment: int) -> Tensor:
    """Nats of those of tokens 1, 2, ... of every line that are charged; the longest line comes first."""
    lengths = torch.tensor([len(line) for line in lines])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(line) for line in lines], batch_first=True)
    nats = torch.zeros(len(lines), dtype=torch.float64)
    device = next(model.parameters()).device
    state: State | None = None
    for start in range(0, tokens.shape[1] - 1, segment):
        # Tokens behind the end of a line change nothing before it, so they need no mask in the model; lines that
        # have ended leave the batch.
        live = int((lengths - 1 > start).sum())
        if state is not None and live < state.batch_size:
            state = state.select(slice(0, live))
        window = tokens[:live, start : start + segment + 1].to(device)
        logits, state = model(window[:, :-1], state)
        losses = F.cross_entropy(_wide(logits).flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        real = charged[:live, start : start + window.shape[1] - 1]
        nats[:live] += losses.double().cpu().view(real.shape).masked_fill(~real, 0).sum(1)
    return nats


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
