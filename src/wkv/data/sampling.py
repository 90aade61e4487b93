"""What all samplers share: settings, the position, shares of ranks, and how rows are cut from a store."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wkv.data.batch import Batch
from wkv.data.store import TokenStore
from wkv.errors import DataError

Integers = NDArray[np.int64]


class RowSampler(ABC):
    """Numbers all rows ever drawn by all ranks 0, 1, 2, ... and lets subclasses say what row number n holds.

    That number is all the state there is, so that a sampler resumes exactly, and ranks share without speaking.

    Args:
        store: the corpus.
        context_length: T, inputs per row.
        batch_size: B, rows per batch of this rank.
        rank, world_size: this process, and how many there are.
        settings: what else must be the same when a run is resumed.

    Raises:
        DataError: for sizes that are no positive integers, or a rank outside 0 .. world_size - 1.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, rank: int, world_size: int, **settings: Any
    ) -> None:
        for name, size in (("context_length", context_length), ("batch_size", batch_size), ("world_size", world_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise DataError(f"{name} must be a positive integer, found {size!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            raise DataError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, found {rank!r}")
        self.store, self.context_length, self.batch_size = store, context_length, batch_size
        self.rank, self.world_size = rank, world_size
        self._settings = {"context_length": context_length, "rows": batch_size * world_size, **settings}
        self._step = 0

    @abstractmethod
    def read(self, rows: Integers) -> Batch:
        """The batch of these rows (int64 [B], numbers over all ranks and steps)."""

    def next_batch(self) -> Batch:
        """The next batch of this rank."""
        first = self._step * self.batch_size
        rows = (first + np.arange(self.batch_size, dtype=np.int64)) * self.world_size + self.rank
        batch = self.read(rows)
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches drawn, a fingerprint of the corpus, and the settings it belongs to."""
        position = {"sampler": type(self).__name__, "step": self._step}
        return {**position, "fingerprint": self.store.fingerprint, "settings": dict(self._settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, perhaps on another number of ranks with as many rows in all.

        Raises:
            DataError: if it was taken by another kind of sampler, on other tokens or with other settings.
        """
        check_state(state, type(self).__name__, self.store, self._settings)
        self._step = state["step"]


def check_state(state: dict[str, Any], sampler: str, store: TokenStore, settings: dict[str, Any]) -> None:
    """Refuse the state of another sampler, other tokens or other settings."""
    if state.get("sampler") != sampler:
        found = state.get("sampler", "another sampler")
        raise DataError(f"the checkpoint was made with {found}, not {sampler}; start a new run")
    if state["fingerprint"] != store.fingerprint:
        raise DataError("the training text or its tokenizer has changed since the checkpoint; start a new run")
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value:
            raise DataError(f"{name} was {before!r} in the checkpoint and is now {value!r}; keep it or start a new run")


def windows(store: TokenStore, starts: Integers, context_length: int) -> Batch:
    """Windows of `context_length` + 1 tokens from `starts` (int64 [B]) on; documents make no difference."""
    index_BT1 = starts[:, None] + np.arange(context_length + 1)
    batch = Batch.from_windows(as_tensor(store.tokens[index_BT1]))
    if store.loss_mask is None:
        return batch
    return Batch(batch.inputs, batch.targets, torch.from_numpy(store.loss_mask[index_BT1[:, 1:]]))


def as_tensor(values: NDArray[Any]) -> Tensor:
    """int64, of this process's own memory."""
    return torch.from_numpy(values.astype(np.int64))


def shuffled(count: int, *seed: int) -> Integers:
    """The numbers 0 .. count - 1 in an order that depends on the seeds alone."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    order: Integers = torch.randperm(count, generator=generator).numpy()
    return order
