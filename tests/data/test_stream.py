"""Token streams and random windows."""

from __future__ import annotations

import pytest
import torch

from wkv.data import Document, RandomWindows, tokenize
from wkv.errors import DataError
from wkv.tokenizers import BPETokenizer, ByteTokenizer


def test_every_document_ends_with_id_0_where_there_is_one() -> None:
    documents = [Document("a", "low lower"), Document("b", "lowest")]
    tokenizer = BPETokenizer.train(["low lower lowest low low"] * 3, 270)
    expected = [*tokenizer.encode("low lower"), 0, *tokenizer.encode("lowest"), 0]
    assert tokenizer.eos_id == 0
    assert tokenize(documents, tokenizer).tolist() == expected
    assert tokenize(documents, ByteTokenizer()).tolist() == list(b"low lowerlowest")


def test_windows_are_pieces_of_the_stream_and_reach_both_ends() -> None:
    sampler = RandomWindows(torch.arange(20, dtype=torch.int32), 4, 8, seed=3)
    seen = set()
    for _ in range(40):
        batch = sampler.next_batch()
        assert batch.shape == (8, 5)
        assert batch.dtype == torch.int64
        assert torch.equal(batch - batch[:, :1], torch.arange(5).expand(8, 5))
        seen.update(batch[:, 0].tolist())
    assert seen == set(range(16))


def test_position_is_saved_and_restored() -> None:
    tokens = torch.arange(1000)
    first, second = (RandomWindows(tokens, 8, 4, seed) for seed in (1, 2))
    for _ in range(3):
        first.next_batch()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first.next_batch(), second.next_batch()) for _ in range(5))
    assert not torch.equal(RandomWindows(tokens, 8, 4, 1).next_batch(), RandomWindows(tokens, 8, 4, 2).next_batch())


def test_other_text_cannot_be_resumed() -> None:
    state = RandomWindows(torch.arange(100), 8, 4, 1).state_dict()
    with pytest.raises(DataError, match="changed since the checkpoint"):
        RandomWindows(torch.arange(1, 101), 8, 4, 1).load_state_dict(state)


def test_too_little_text() -> None:
    with pytest.raises(DataError, match="8 tokens, a window needs 9"):
        RandomWindows(torch.arange(8), 8, 1, 1)
    with pytest.raises(DataError, match="no text"):
        tokenize([Document("a", "")], ByteTokenizer())
