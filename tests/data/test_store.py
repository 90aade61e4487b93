"""Token stores: what holds together, and what tells corpora apart."""

from __future__ import annotations

import numpy as np
import pytest

from wkv.data import Document, TokenStore, conversation
from wkv.data import store as store_module
from wkv.errors import DataError
from wkv.tokenizers import ByteTokenizer, WorldTokenizer


def test_documents_in_memory() -> None:
    talk = conversation([("user", "a"), ("assistant", "b")])
    store = TokenStore.from_documents([Document("", "xy"), Document("", ""), talk], WorldTokenizer())
    assert len(store) == 3
    assert store.tokens.dtype == np.uint16
    assert store.document(0).tolist() == [*WorldTokenizer().encode("xy"), 0]
    assert store.document(1).tolist() == [0]
    assert store.loss_mask is not None
    assert store.document_mask(0).all()
    assert 0 < store.document_mask(2).sum() < len(store.document(2))
    assert store.num_tokens == store.lengths.sum() == len(store.loss_mask)
    plain = TokenStore.from_documents([Document("", "xy")], ByteTokenizer())
    assert plain.loss_mask is None
    assert plain.document_mask(0).all()
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"document {index} of 1"):
            plain.document(index)


def test_what_does_not_fit_together() -> None:
    tokens, starts = np.arange(5, dtype=np.uint16), np.array([0, 3])
    for arguments, message in (
        ((tokens.astype(float), starts), "tokens must be integers"),
        ((tokens[None], starts), "tokens must be integers"),
        ((tokens[:0], starts), "no tokens"),
        ((tokens, starts + 1), "starts must be int64"),
        ((tokens, starts[:0]), "starts must be int64"),
        ((tokens, starts.astype(np.int32)), "starts must be int64"),
        ((tokens, np.array([0, 6])), "must rise from 0 to at most 5"),
        ((tokens, np.array([0, 3, 2])), "must rise"),
        ((tokens, starts, np.ones(4, np.bool_)), "loss_mask must be bool"),
        ((tokens, starts, np.ones(5)), "loss_mask must be bool"),
    ):
        with pytest.raises(DataError, match=message):
            TokenStore(*arguments)
    with pytest.raises(DataError, match="no documents"):
        TokenStore.from_documents([], ByteTokenizer())
    with pytest.raises(DataError, match="no tokens"):
        TokenStore.from_documents([Document("", "")], ByteTokenizer())


def test_fingerprints_tell_corpora_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, starts = np.arange(5000, dtype=np.uint16), np.array([0, 3])
    mask = np.ones(5000, np.bool_)
    changed, shifted, uncounted = tokens.copy(), np.array([0, 4]), mask.copy()
    changed[4999], uncounted[0] = 0, False
    stores = [TokenStore(tokens, starts), TokenStore(changed, starts), TokenStore(tokens, shifted),
              TokenStore(tokens, starts, mask), TokenStore(tokens, starts, uncounted),
              TokenStore(tokens[:-1], starts)]  # fmt: skip
    assert len({store.fingerprint for store in stores}) == len(stores)
    assert TokenStore(tokens.astype(np.int32), starts.copy()).fingerprint == stores[0].fingerprint
    monkeypatch.setattr(store_module, "_SAMPLED", 2048)  # a corpus too big to be read as a whole: first and last block
    assert TokenStore(tokens, starts).fingerprint != TokenStore(changed, starts).fingerprint
