"""Rows of whole documents: for conversations, where an answer must never be read without its question."""

from __future__ import annotations

import bisect

import numpy as np
import torch

from wkv.data.batch import Batch
from wkv.data.sampling import Integers, RowSampler, as_tensor, shuffled
from wkv.data.store import TokenStore
from wkv.errors import DataError


class WholeDocuments(RowSampler):
    """As many whole documents per row as fit, back to back and padded on the right, each from an empty state.

    `PackedDocuments` fills rows to the last token and cuts documents at their ends: what follows is then learnt from an
    empty state, of a conversation perhaps the answer without its question. Here a little padding is the price. Which
    documents share a row is chosen once, best fit with the longest first; the order of rows is shuffled anew for every
    epoch. Plain texts that do not fit are divided into pieces of T + 1 tokens that overlap by one. Documents that have
    no token to learn are left out (`num_skipped`).

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.
        seed: of the orders.

    Attributes:
        num_rows: in an epoch.
        filled: part of their places that have a token, in (0, 1].

    Raises:
        DataError: if a document that does not count as a whole has more than T + 1 tokens, or none can be used, and for
            impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(store, context_length, batch_size, rank, world_size, seed=seed)
        self._seed, room = seed, context_length + 1
        pieces = [_divide(store, document, context_length) for document in range(len(store))]
        self.num_skipped = sum(not found for found in pieces)
        self._pieces = np.array([piece for found in pieces for piece in found], np.int64).reshape(-1, 2)
        if not len(self._pieces):
            raise DataError(f"none of {len(store)} documents has a token to learn; give others")
        lengths = self._pieces[:, 1]
        self._rows = _fill(shuffled(len(lengths), seed), lengths, room)
        self.num_rows = len(self._rows)
        self.filled = float(lengths.sum() / (self.num_rows * room))
        self._orders: dict[int, Integers] = {}

    def read(self, rows: Integers) -> Batch:
        """The batch of these rows."""
        epochs, places = np.divmod(rows, self.num_rows)
        wanted = np.unique(epochs).tolist()
        orders = {epoch: self._order(epoch) for epoch in wanted}
        self._orders = {wanted[-1]: orders[wanted[-1]]}
        return self._join([self._rows[orders[epoch][place]] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch: int) -> Integers:
        return self._orders[epoch] if epoch in self._orders else shuffled(self.num_rows, self._seed, epoch)

    def _join(self, rows: list[list[int]]) -> Batch:
        """Rows of these pieces."""
        lengths = [int(self._pieces[row, 1].sum()) for row in rows]
        shape = len(rows), max(lengths)
        index_BT1 = np.zeros(shape, np.int64)
        first_BT1, real_BT1 = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        for b, row in enumerate(rows):
            end = 0
            for start, length in self._pieces[row].tolist():
                begin, end = end, end + length
                index_BT1[b, begin:end] = np.arange(start, start + length)
                first_BT1[b, begin] = True
            real_BT1[b, :end] = True
        counts_BT1 = real_BT1 & ~first_BT1
        if self.store.loss_mask is not None:
            counts_BT1 &= self.store.loss_mask[index_BT1]
        whole = Batch.from_windows(as_tensor(np.where(real_BT1, self.store.tokens[index_BT1], 0)))
        mask_BT = real_BT1[:, 1:]  # the last token is a target and no input
        flags = counts_BT1[:, 1:], first_BT1[:, :-1] & mask_BT, mask_BT
        return Batch(whole.inputs, whole.targets, *(torch.from_numpy(values.copy()) for values in flags))


def _divide(store: TokenStore, document: int, context_length: int) -> list[tuple[int, int]]:
    """(where it begins in the store, tokens) of the pieces of a document that have something to learn."""
    begin, length, counts = int(store.starts[document]), int(store.lengths[document]), store.document_mask(document)
    if length <= context_length + 1:
        return [(begin, length)] if counts[1:].any() else []
    if not counts.all():
        found = f"document {document} has {length} tokens, and {context_length + 1} fit (context_length + 1)"
        raise DataError(f"{found}; raise context_length, or make it shorter first (wkv.data.FittedDocuments)")
    places = range(0, length - 1, context_length)
    return [(begin + place, min(context_length + 1, length - place)) for place in places]


def _fill(pieces: Integers, lengths: Integers, room: int) -> list[list[int]]:
    """Rows of at most `room` tokens: every piece, the longest first, goes where it leaves the least room."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row), in rising order
    for piece in pieces[np.argsort(-lengths[pieces], kind="stable")].tolist():
        length = int(lengths[piece])
        place = bisect.bisect_left(left, (length, -1))
        rest, row = left.pop(place) if place < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if rest > length:
            bisect.insort(left, (rest - length, row))
    return rows
