"""Windows of the token stream: the official order to the last offset, and random ones."""

from __future__ import annotations

import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wkv.data import MagicPrimeWindows, RandomWindows, TokenStore, UniformWindows, magic_prime
from wkv.data.windows import window_offset
from wkv.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/rwkv_training/data_and_schedule.json").read_text())
EPOCH = 40320  # samples in a mini-epoch of the official trainer


def a_store(count: int, masked: bool = False) -> TokenStore:
    return TokenStore(np.arange(count, dtype=np.int32), np.array([0]), np.arange(count) % 2 == 0 if masked else None)


def test_official_offsets() -> None:
    sampler = GOLDEN["sampler"]
    prime, ranks = magic_prime(GOLDEN["data_tokens"], GOLDEN["ctx_len"]), sampler["world_size"]
    assert prime == GOLDEN["magic_prime"]
    for (epoch, index, rank), expected in zip(sampler["queries_epoch_idx_rank"], sampler["token_offsets"], strict=True):
        assert window_offset(epoch * EPOCH + index * ranks + rank, prime, GOLDEN["ctx_len"]) == expected


def test_a_rank_draws_the_official_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample `idx` of a rank is row `idx % micro_bsz` of its batch `idx // micro_bsz`."""
    golden = GOLDEN["sampler"]
    store: Any = a_store(1)
    monkeypatch.setattr(TokenStore, "num_tokens", GOLDEN["data_tokens"])
    seen: dict[tuple[int, int], np.ndarray] = {}
    for rank in range(8):
        sampler = MagicPrimeWindows(store, 512, golden["micro_bsz"], rank, golden["world_size"])
        monkeypatch.setattr(sampler, "read", sampler.offsets)
        for step in range(3):
            seen[rank, step] = np.asarray(sampler.next_batch())
    found = 0
    for (epoch, index, rank), expected in zip(golden["queries_epoch_idx_rank"], golden["token_offsets"], strict=True):
        if epoch == 0 and index < 6:
            assert seen[rank, index // 2][index % 2] == expected
            found += 1
    assert found == 5


def test_magic_primes() -> None:
    for sizes, expected in GOLDEN["magic_small"].items():
        assert magic_prime(*literal_eval(sizes)) == expected
    assert magic_prime(1_498_226_207, 4096) == 365_759
    assert magic_prime(332_115_325_534, 4096) == 81_082_817
    assert [magic_prime(tokens, 1) for tokens in (3, 5, 6, 11, 12, 17, 18)] == [2, 2, 5, 5, 11, 11, 17]
    with pytest.raises(DataError, match="29 tokens are 2 times context_length 10; the magic prime needs 3 times"):
        magic_prime(29, 10)


@given(tokens=st.integers(3, 3000), context=st.integers(1, 20))
def test_every_chunk_once(tokens: int, context: int) -> None:
    if tokens < 3 * context:
        return
    prime = magic_prime(tokens, context)
    chunks = {window_offset(row, prime, context) // context for row in range(prime)}
    assert chunks == set(range(prime))
    assert (prime - 1) * context + context + 1 <= tokens


def test_windows_and_their_loss_mask() -> None:
    for masked in (False, True):
        sampler = MagicPrimeWindows(a_store(100, masked), 5, 4)
        for _ in range(5):
            batch = sampler.next_batch()
            assert batch.inputs.dtype == torch.int64
            assert torch.equal(batch.inputs - batch.inputs[:, :1], torch.arange(5).expand(4, 5))
            assert torch.equal(batch.targets, batch.inputs + 1)
            assert (batch.reset, batch.mask) == (None, None)
            assert batch.loss_mask is None if not masked else torch.equal(batch.loss_mask, batch.targets % 2 == 0)  # type: ignore[arg-type]


def test_uniform_windows_are_random_windows() -> None:
    old, new = RandomWindows(torch.arange(50), 6, 3, seed=9), UniformWindows(a_store(50, masked=True), 6, 3, seed=9)
    for _ in range(10):
        windows, batch = old.next_batch(), new.next_batch()
        assert torch.equal(batch.inputs, windows[:, :-1])
        assert torch.equal(batch.targets, windows[:, 1:])
        assert batch.loss_mask is not None
        assert torch.equal(batch.loss_mask, windows[:, 1:] % 2 == 0)
    with pytest.raises(DataError, match="6 tokens, a window needs 7"):
        UniformWindows(a_store(6), 6, 1, seed=1)
