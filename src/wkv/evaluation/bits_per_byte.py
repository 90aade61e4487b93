"""Bits per byte: the size a text would have if the model compressed it, independent of the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.tokenizers import Tokenizer


def bits_per_byte(
    model: LanguageModel,
    documents: Sequence[str | bytes],
    tokenizer: Tokenizer | None = None,
    batch_size: int = 16,
    segment: int = 256,
) -> float:
    """Mean number of bits the model needs for one byte of `documents`, each read from its start to its end.

    Args:
        model: any registered model; it is put into evaluation mode for the time of the call.
        documents: texts. Each starts with an empty state and one end-of-text id; without such an id in the
            vocabulary, its first token is charged `log2(V)` bits.
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
    num_bytes = sum(len(text.encode() if isinstance(text, str) else text) for text in documents)
    if not num_bytes:
        raise WkvError("bits per byte needs some text, found none")
    tokens = [tokenizer.encode(text) for text in documents]
    nats = document_nats(model, tokens, tokenizer.eos_id, batch_size, segment)
    return float(nats.sum()) / math.log(2) / num_bytes


@torch.no_grad()
def document_nats(
    model: LanguageModel,
    documents: Sequence[Sequence[int]],
    start_id: int | None = 0,
    batch_size: int = 16,
    segment: int = 256,
) -> Tensor:
    """Negative log-likelihood of each document in nats, float64 [len(documents)].

    Args:
        model: any registered model.
        documents: token ids of each document, without start or end.
        start_id: the token before the first one; None charges `log(V)` for the first token instead.
        batch_size, segment: as for `bits_per_byte`.
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
            nats[rows] = _batch_nats(model, lines, segment)
    finally:
        model.train(training)
    if start_id is None:
        nats[order] += math.log(model.config.vocab_size)
    return nats


def _batch_nats(model: LanguageModel, lines: list[list[int]], segment: int) -> Tensor:
    """Nats of tokens 1, 2, ... of every line given those before them; the longest line comes first."""
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
        real = torch.arange(start, start + window.shape[1] - 1) < lengths[:live, None] - 1
        nats[:live] += losses.double().cpu().view(real.shape).masked_fill(~real, 0).sum(1)
    return nats


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
