"""Rows of whole documents: nothing is cut, and the losses are those of the documents one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_samplers import a_store
from tests.inference.helpers import tiny_model
from wkv.data import PaddedDocuments, TokenStore, conversation
from wkv.data.whole import WholeDocuments
from wkv.errors import DataError
from wkv.tokenizers import ByteTokenizer
from wkv.training import next_token_loss

stores = st.builds(a_store, st.lists(st.integers(0, 12), min_size=1, max_size=12).map(lambda x: [9, *x]), st.booleans())


@given(store=stores, context=st.integers(11, 20), rows=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_document_is_read_whole_once_per_epoch(store: TokenStore, context: int, rows: int, seed: int) -> None:
    sampler = WholeDocuments(store, context, rows, seed)
    usable = [i for i in range(len(store)) if store.document_mask(i)[1:].any()]
    assert sampler.num_skipped == len(store) - len(usable)
    expected = sorted(token for i in usable for token in store.document(i).tolist())
    assert sampler.filled == pytest.approx(len(expected) / (sampler.num_rows * (context + 1)))
    read: list[int] = []
    while len(read) < 2 * len(expected):
        batch = sampler.next_batch()
        assert batch.reset is not None
        assert batch.mask is not None
        assert batch.loss_mask is not None
        for inputs, targets, counts, reset, mask in zip(
            batch.inputs, batch.targets, batch.loss_mask, batch.reset, batch.mask, strict=True
        ):
            length = int(mask.sum())
            assert mask[:length].all(), "padding is on the right"
            assert not (counts | reset)[length:].any()
            tokens = [*inputs[:length].tolist(), int(targets[length - 1])]
            assert tokens[1:] == targets[:length].tolist()
            starts = set(store.starts[usable].tolist())
            # A document of one token has nothing to learn and is not there, so the last token never begins one.
            assert [token in starts for token in tokens] == [*reset[:length].tolist(), False]
            own = [store.loss_mask is None or bool(store.loss_mask[token]) for token in tokens[1:]]
            assert counts[:length].tolist() == [
                counting and token not in starts for counting, token in zip(own, tokens[1:], strict=True)
            ]
            read += tokens
    first = read[: len(expected)]
    assert sorted(first) == expected


def test_losses_are_those_of_the_documents_one_by_one() -> None:
    talks = [conversation([("user", f"q{i}"), ("assistant", "word " * i)]) for i in range(1, 7)]
    store = TokenStore.from_documents(talks, ByteTokenizer())
    whole, single = WholeDocuments(store, 120, 1, seed=1), PaddedDocuments(store, 120, 1, seed=1)
    assert whole.num_rows < len(talks)
    sums = []
    for sampler, batches in ((whole, whole.num_rows), (single, len(talks))):
        nats, targets = 0.0, 0
        for batch in (sampler.next_batch() for _ in range(batches)):
            with torch.no_grad():
                logits = tiny_model()(batch.inputs, mask=batch.mask, reset=batch.reset).logits
            nats += float(next_token_loss(logits, batch.targets, batch.loss_mask)) * batch.num_targets
            targets += batch.num_targets
        sums.append((nats, targets))
    assert sums[0][1] == sums[1][1]
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5)


def test_rows_are_well_filled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 120, (400,), generator=generator).tolist()
    assert WholeDocuments(a_store(lengths), 255, 4, seed=1).filled > 0.98


def test_long_texts_are_divided() -> None:
    """Every token is a target once, as with `PackedDocuments`."""
    store = a_store([21, 5, 17, 1])
    sampler = WholeDocuments(store, 8, 1, seed=1)
    targets: list[int] = []
    for batch in (sampler.next_batch() for _ in range(sampler.num_rows)):
        assert batch.loss_mask is not None
        assert torch.equal(batch.targets[batch.loss_mask], batch.inputs[batch.loss_mask] + 1)
        targets += batch.targets[batch.loss_mask].tolist()
    assert sorted(targets) == [token for token in range(43) if token not in store.starts]
    assert sampler.num_skipped == 1


def test_resume_and_shares_of_ranks() -> None:
    store = a_store([5, 0, 1, 7, 3, 9, 2, 8, 4, 4] * 3, masked=True)
    whole = WholeDocuments(store, 11, 6, seed=3)
    shares = [WholeDocuments(store, 11, 2, seed=3, rank=rank, world_size=3) for rank in range(3)]
    seen = []
    for _ in range(4):
        expected, parts = whole.next_batch(), [share.next_batch() for share in shares]
        seen.append(expected.inputs.tolist())
        for row in range(6):
            part, width = parts[row % 3], parts[row % 3].inputs.shape[1]
            for name, value in vars(expected).items():
                assert torch.equal(getattr(part, name)[row // 3], value[row, :width])
    resumed = WholeDocuments(store, 11, 6, seed=3)
    resumed.load_state_dict({**shares[0].state_dict(), "step": 2})
    assert [resumed.next_batch().inputs.tolist() for _ in range(2)] == seen[2:]
    with pytest.raises(DataError, match="seed was 3 in the checkpoint and is now 4"):
        WholeDocuments(store, 11, 6, seed=4).load_state_dict(whole.state_dict())
    with pytest.raises(DataError, match="made with PaddedDocuments, not WholeDocuments"):
        whole.load_state_dict(PaddedDocuments(store, 11, 6, seed=3).state_dict())


def test_what_cannot_be_packed() -> None:
    with pytest.raises(DataError, match=r"document 1 has 10 tokens, and 9 fit \(context_length \+ 1\); raise"):
        WholeDocuments(a_store([9, 10], masked=True), 8, 1, seed=1)
    with pytest.raises(DataError, match="none of 3 documents has a token to learn"):
        WholeDocuments(a_store([1, 0, 1]), 8, 1, seed=1)
