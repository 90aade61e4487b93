"""Samplers that know where documents begin: packed, padded, and streamed with a carried state."""

from __future__ import annotations

import numpy as np
import torch

from wkv.data.batch import Batch
from wkv.data.sampling import Integers, RowSampler, as_tensor, shuffled
from wkv.data.store import TokenStore
from wkv.errors import DataError


class _Line:
    """All documents back to back in a given order: which token of the store stands where.

    Args:
        order: int64 [D], the documents.
    """

    def __init__(self, store: TokenStore, order: Integers) -> None:
        lengths = store.lengths[order]
        self._ends = np.cumsum(lengths)
        # A token's place in the store, less its place in the line.
        self._shifts = store.starts[order] - (self._ends - lengths)
        self._begins = self._ends - lengths

    def find(self, places: Integers) -> tuple[Integers, np.ndarray]:
        """(where in the store the tokens at these places are, whether each is the first of its document)."""
        documents = np.searchsorted(self._ends, places, side="right")
        return places + self._shifts[documents], places == self._begins[documents]


class PackedDocuments(RowSampler):
    """Documents in an order shuffled anew for every epoch, back to back, cut into rows of T + 1 tokens.

    Rows overlap by one token and run on from epoch to epoch, so that in every epoch every token is an input once and a
    target once. A document that does not fit into a row goes on in the next one, from an empty state.

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.
        seed: of the orders.
        reset: let the model forget at the start of every document, and do not count the prediction of a document's
            first token from the one before. False: as in the official trainer, the model learns where documents end.

    Raises:
        DataError: for impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, seed: int, reset: bool = True, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(store, context_length, batch_size, rank, world_size, seed=seed, reset=reset)
        self._seed, self._reset = seed, reset
        self._lines: dict[int, _Line] = {}

    @property
    def epoch(self) -> float:
        """How many times the corpus has been read, by all ranks together."""
        return self._step * self._settings["rows"] * self.context_length / self.store.num_tokens

    def read(self, rows: Integers) -> Batch:
        """The batch of these rows."""
        epochs_BT1, places_BT1 = np.divmod(
            rows[:, None] * self.context_length + np.arange(self.context_length + 1), self.store.num_tokens
        )
        index_BT1, first_BT1 = np.empty_like(places_BT1), np.empty(places_BT1.shape, np.bool_)
        wanted = np.unique(epochs_BT1).tolist()
        for epoch in wanted:
            there = epochs_BT1 == epoch
            index_BT1[there], first_BT1[there] = self._line(epoch).find(places_BT1[there])
        self._lines = {epoch: self._lines[epoch] for epoch in wanted[-1:]}
        return _cut(self.store, index_BT1, first_BT1 if self._reset else None)

    def _line(self, epoch: int) -> _Line:
        if epoch not in self._lines:
            self._lines[epoch] = _Line(self.store, shuffled(len(self.store), self._seed, epoch))
        return self._lines[epoch]


class StreamingDocuments(RowSampler):
    """Every row walks through its own share of the corpus, T tokens per batch, for a trainer that carries the state.

    The corpus is divided into as many shares of equal length as there are rows (over all ranks); batch number k holds
    the tokens k T to k T + T of every share. A row at the end of its share goes back to its beginning. States are
    reset there and where documents begin; the first token after a reset is not counted as a target.

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.
        seed: shuffle the documents once; None keeps their order.

    Raises:
        DataError: if there are fewer tokens than rows, and for impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, seed: int | None = None, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(store, context_length, batch_size, rank, world_size, seed=seed)
        if store.num_tokens < batch_size * world_size:
            found = f"{store.num_tokens} tokens for {batch_size * world_size} rows"
            raise DataError(f"the training text has {found}; give more text or a smaller batch_size")
        count = len(store)
        self._line = _Line(store, np.arange(count) if seed is None else shuffled(count, seed))

    def read(self, rows: Integers) -> Batch:
        """The batch of these rows."""
        total = self._settings["rows"]
        steps, shares = np.divmod(rows, total)
        begins, ends = (share * self.store.num_tokens // total for share in (shares, shares + 1))
        walked_BT1 = steps[:, None] * self.context_length + np.arange(self.context_length + 1)
        places_BT1 = walked_BT1 % (ends - begins)[:, None]
        index_BT1, first_BT1 = self._line.find(places_BT1 + begins[:, None])
        return _cut(self.store, index_BT1, first_BT1 | (places_BT1 == 0))


class PaddedDocuments(RowSampler):
    """One document per row, padded on the right to the longest of the batch: for fine-tuning.

    Documents come in an order shuffled anew for every epoch. Of a document with more than T + 1 tokens the beginning
    is kept, as inference starts there too (`num_cut` documents; `FittedDocuments` has other rules). Documents that then
    have no token to learn are left out (`num_skipped`).

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.
        seed: of the orders.

    Raises:
        DataError: if no document can be used, and for impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(store, context_length, batch_size, rank, world_size, seed=seed)
        self._seed = seed
        self._usable = np.flatnonzero(store.lengths > 1)
        if store.loss_mask is not None:
            self._usable = np.array([i for i in self._usable.tolist() if self._has_target(i)], np.int64)
        self.num_skipped = len(store) - len(self._usable)
        self.num_cut = int((store.lengths[self._usable] > context_length + 1).sum())
        if not len(self._usable):
            found = f"none of {len(store)} documents has a token to learn"
            raise DataError(f"{found} within the first {context_length + 1}; give others or a longer context_length")
        self._orders: dict[int, Integers] = {}

    def read(self, rows: Integers) -> Batch:
        """The batch of these rows."""
        epochs, places = np.divmod(rows, len(self._usable))
        wanted = np.unique(epochs).tolist()
        orders = {epoch: self._order(epoch) for epoch in wanted}
        self._orders = {wanted[-1]: orders[wanted[-1]]}
        documents = [int(self._usable[orders[epoch][place]]) for epoch, place in zip(epochs, places, strict=True)]
        return self._pad(documents)

    def _order(self, epoch: int) -> Integers:
        return self._orders[epoch] if epoch in self._orders else shuffled(len(self._usable), self._seed, epoch)

    def _has_target(self, index: int) -> bool:
        return bool(self.store.document_mask(index)[1 : self.context_length + 1].any())

    def _pad(self, documents: list[int]) -> Batch:
        ids = [self.store.document(i)[: self.context_length + 1] for i in documents]
        counts = [self.store.document_mask(i)[: self.context_length + 1] for i in documents]
        shape = len(ids), max(map(len, ids))
        tokens_BT1, counts_BT1, mask_BT1 = (
            np.zeros(shape, np.int64),
            np.zeros(shape, np.bool_),
            np.zeros(shape, np.bool_),
        )
        for row, (some, counting) in enumerate(zip(ids, counts, strict=True)):
            tokens_BT1[row, : len(some)], counts_BT1[row, : len(some)] = some, counting
            mask_BT1[row, : len(some) - 1] = True  # the last token is a target and no input
        whole = Batch.from_windows(torch.from_numpy(tokens_BT1))
        loss_mask, mask = torch.from_numpy(counts_BT1)[:, 1:], torch.from_numpy(mask_BT1)[:, :-1]
        return Batch(whole.inputs, whole.targets, loss_mask, mask=mask)


def _cut(store: TokenStore, index_BT1: Integers, first_BT1: np.ndarray | None) -> Batch:
    """Rows of these tokens; with `first` (whether each begins a document) states are reset there."""
    batch = Batch.from_windows(as_tensor(store.tokens[index_BT1]))
    counts_BT = None if store.loss_mask is None else store.loss_mask[index_BT1[:, 1:]]
    if first_BT1 is None:
        loss_mask = None if counts_BT is None else torch.from_numpy(counts_BT)
        return Batch(batch.inputs, batch.targets, loss_mask)
    counts_BT = ~first_BT1[:, 1:] if counts_BT is None else counts_BT & ~first_BT1[:, 1:]
    return Batch(batch.inputs, batch.targets, torch.from_numpy(counts_BT), torch.from_numpy(first_BT1[:, :-1].copy()))
