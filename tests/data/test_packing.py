"""Packed, padded and streamed documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_samplers import a_store, stores
from tests.inference.helpers import tiny_model
from wkv.data import (
    Batch,
    PackedDocuments,
    PaddedDocuments,
    StreamingDocuments,
    TokenStore,
    conversation,
)
from wkv.errors import DataError
from wkv.tokenizers import ByteTokenizer
from wkv.training import next_token_loss


def line(batches: list[Batch]) -> tuple[list[int], list[int]]:
    """Inputs and targets of batches of one row, joined."""
    rows = [(batch.inputs[0].tolist(), batch.targets[0].tolist()) for batch in batches]
    return [token for row, _ in rows for token in row], [token for _, row in rows for token in row]


@given(store=stores, context=st.integers(1, 9), seed=st.integers(0, 9))
def test_packing_reads_every_document_once_per_epoch(store: TokenStore, context: int, seed: int) -> None:
    sampler = PackedDocuments(store, context, 1, seed)
    inputs, targets = line([sampler.next_batch() for _ in range(2 * store.num_tokens // context + 1)])
    assert targets[:-1] == inputs[1:]
    orders = []
    for epoch in (0, 1):
        read = inputs[epoch * store.num_tokens : (epoch + 1) * store.num_tokens]
        assert sorted(read) == list(range(store.num_tokens))
        starts = set(store.starts[store.lengths > 0].tolist())
        orders.append([token for token in read if token in starts])
        jumps = {now for before, now in itertools.pairwise(read) if now != before + 1}
        assert jumps <= starts, "documents stay whole"
    assert len(orders[0]) < 8 or orders[0] != orders[1]
    assert sampler.epoch >= 2


@given(store=stores, context=st.integers(1, 9), rows=st.integers(1, 3), reset=st.booleans())
def test_resets_and_loss_masks_of_packed_documents(store: TokenStore, context: int, rows: int, reset: bool) -> None:
    sampler = PackedDocuments(store, context, rows, 1, reset)
    starts = torch.from_numpy(store.starts[store.lengths > 0])
    for _ in range(5):
        batch = sampler.next_batch()
        counts = torch.ones_like(batch.targets, dtype=torch.bool)
        if store.loss_mask is not None:
            counts &= torch.from_numpy(store.loss_mask)[batch.targets]
        if reset:
            assert batch.reset is not None
            assert torch.equal(batch.reset, torch.isin(batch.inputs, starts))
            counts &= ~torch.isin(batch.targets, starts)
        else:
            assert batch.reset is None
        assert (batch.loss_mask is None) == (store.loss_mask is None and not reset)
        assert batch.loss_mask is None or torch.equal(batch.loss_mask, counts)


def losses(batch: Batch) -> torch.Tensor:
    """Loss of every counted target."""
    with torch.no_grad():
        logits = tiny_model()(batch.inputs, mask=batch.mask, reset=batch.reset).logits
    assert batch.loss_mask is not None
    return torch.nn.functional.cross_entropy(logits.mT, batch.targets, reduction="none")[batch.loss_mask]


def test_packed_documents_are_read_like_separate_ones() -> None:
    talks = [conversation([("user", f"question {i}"), ("assistant", "word " * (i + 1))]) for i in range(5)]
    store = TokenStore.from_documents(talks, ByteTokenizer())
    packed = PackedDocuments(store, store.num_tokens - 1, 1, seed=1).next_batch()
    padded = PaddedDocuments(store, 500, 5, seed=2).next_batch()
    separate = torch.cat([losses(PaddedDocuments(store_of(talk), 500, 1, seed=1).next_batch()) for talk in talks])
    assert len(separate) == sum(part.counts for talk in talks for part in talk.parts) + 5 * len("\n\nUser:")
    for together in (packed, padded):
        torch.testing.assert_close(losses(together).sort().values, separate.sort().values, atol=1e-5, rtol=1e-5)
        mean = next_token_loss(tiny_model()(together.inputs, mask=together.mask, reset=together.reset).logits,
                               together.targets, together.loss_mask)  # fmt: skip
        torch.testing.assert_close(mean, separate.mean(), atol=1e-5, rtol=1e-5)


def store_of(*documents: object) -> TokenStore:
    return TokenStore.from_documents(documents, ByteTokenizer())  # type: ignore[arg-type]


@given(store=stores, context=st.integers(1, 9), rows=st.integers(1, 4))
def test_padded_documents(store: TokenStore, context: int, rows: int) -> None:
    sampler = PaddedDocuments(store, context, rows, seed=1)
    usable = [i for i in range(len(store)) if store.document_mask(i)[1 : context + 1].any()]
    assert sampler.num_skipped == len(store) - len(usable)
    seen = []
    for _ in range(len(usable)):
        batch = sampler.next_batch()
        assert batch.mask is not None
        assert batch.loss_mask is not None
        assert batch.mask.any(0).all(), "no wider than the longest"
        for inputs, targets, counts, mask in zip(batch.inputs, batch.targets, batch.loss_mask, batch.mask, strict=True):
            length = int(mask.sum())
            assert mask[:length].all(), "padding is on the right"
            document = int(np.searchsorted(store.starts, int(inputs[0]), side="right")) - 1
            ids = torch.from_numpy(store.document(document)[: context + 1].astype(np.int64))
            assert torch.equal(inputs[:length], ids[:-1])
            assert torch.equal(targets[:length], ids[1:])
            assert counts.tolist() == [*store.document_mask(document)[1 : context + 1], *[False] * (len(mask) - length)]
            seen.append(document)
    for epoch in range(rows):
        assert sorted(seen[epoch * len(usable) : (epoch + 1) * len(usable)]) == usable


def test_no_document_to_learn_from() -> None:
    with pytest.raises(DataError, match="none of 3 documents has a token to learn within the first 5"):
        PaddedDocuments(a_store([1, 0, 1]), 4, 1, seed=1)
    talk = conversation([("user", "a long question"), ("assistant", "a")])
    with pytest.raises(DataError, match="give others or a longer context_length"):
        PaddedDocuments(store_of(talk), 10, 1, seed=1)


@given(store=stores, context=st.integers(1, 9), rows=st.integers(1, 4), seed=st.none() | st.integers(0, 3))
def test_streams_walk_their_shares(store: TokenStore, context: int, rows: int, seed: int | None) -> None:
    sampler = StreamingDocuments(store, context, rows, seed)
    batches = [sampler.next_batch() for _ in range(2 * store.num_tokens // context + 2)]
    inputs, targets, resets, counts = (
        torch.cat([getattr(batch, name) for batch in batches], 1)
        for name in ("inputs", "targets", "reset", "loss_mask")
    )
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not (resets[:, 1:] & counts[:, :-1]).any(), "what follows a reset is not predicted from before it"
    shares = []
    for row in range(rows):
        length = (row + 1) * store.num_tokens // rows - row * store.num_tokens // rows
        share = inputs[row, :length].tolist()
        assert inputs[row, length : 2 * length].tolist() == share, "a share begins anew"
        starts = set(store.starts.tolist())
        expected = [place == 0 or token in starts for place, token in enumerate(share)]
        assert resets[row, :length].tolist() == expected
        shares += share
    assert sorted(shares) == list(range(store.num_tokens))
    assert seed is not None or shares == list(range(store.num_tokens))


def test_carried_states_read_the_stream_as_a_whole() -> None:
    """Segments with the state carried on give the losses of one long pass."""
    store = store_of(*(conversation([("user", f"q{i}"), ("assistant", "word " * i)]) for i in range(1, 5)))
    short, whole = StreamingDocuments(store, 16, 2), StreamingDocuments(store, 64, 2).next_batch()
    state, pieces = None, []
    with torch.no_grad():
        for batch in (short.next_batch() for _ in range(4)):
            logits, state = tiny_model()(batch.inputs, state, reset=batch.reset)
            pieces.append(logits)
        expected = tiny_model()(whole.inputs, reset=whole.reset).logits
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)


def test_too_many_rows() -> None:
    with pytest.raises(DataError, match="3 tokens for 4 rows"):
        StreamingDocuments(a_store([3]), 1, 2, world_size=2)
