"""Bits per byte against a direct computation, whatever the batches and segments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import wkv
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte, document_nats
from wkv.tokenizers import BPETokenizer, ByteTokenizer

TEXTS = ["The state of the union", "is", "strong; größer als je zuvor " * 4, "", "x"]


def small_model(vocab_size: int) -> Any:
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", vocab_size=vocab_size, num_layers=2, hidden_size=32, head_size=16).double()
    for parameter in model.parameters():  # the initial model is too uniform to tell mistakes apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def direct_bits(model: Any, tokenizer: Any) -> float:
    """Document by document, in one forward pass each."""
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if not ids:
            continue
        if tokenizer.eos_id is None:
            nats += math.log(model.config.vocab_size)
        else:
            ids = [tokenizer.eos_id, *ids]
        if len(ids) > 1:
            log_p = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)
            nats -= float(log_p[0].gather(-1, torch.tensor(ids[1:])[:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_equals_the_direct_computation_for_every_batch_and_segment(kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer.train(TEXTS, 270)
    model = small_model(tokenizer.vocab_size)
    with torch.no_grad():
        expected = direct_bits(model, tokenizer)
    for batch_size, segment in ((1, 1000), (2, 7), (5, 1), (16, 16)):
        found = bits_per_byte(model, TEXTS, tokenizer, batch_size, segment)
        assert found == pytest.approx(expected, rel=1e-9)


def test_bytes_and_the_tokenizer_of_the_model() -> None:
    model = small_model(256)
    model.tokenizer = ByteTokenizer()
    assert bits_per_byte(model, [text.encode() for text in TEXTS]) == bits_per_byte(model, TEXTS)


def test_an_untrained_uniform_model_needs_eight_bits() -> None:
    model = small_model(256)
    model.head.weight.data.zero_()
    assert bits_per_byte(model, TEXTS, ByteTokenizer()) == pytest.approx(8.0)


def test_the_model_is_left_in_its_mode_and_without_gradients() -> None:
    model = small_model(256).train()
    nats = document_nats(model, [[1, 2, 3], [], [4]], start_id=0)
    assert model.training
    assert not nats.requires_grad
    assert nats.shape == (3,)
    assert nats[1] == 0


def test_errors() -> None:
    model = small_model(256)
    with pytest.raises(WkvError, match="carries no tokenizer"):
        bits_per_byte(model, TEXTS)
    with pytest.raises(WkvError, match="needs some text"):
        bits_per_byte(model, [""], ByteTokenizer())
    with pytest.raises(WkvError, match="list of texts, found one str"):
        bits_per_byte(model, "text", ByteTokenizer())
    with pytest.raises(WkvError, match="at least 1, found 0"):
        bits_per_byte(model, TEXTS, ByteTokenizer(), batch_size=0)
