"""Samplers that cut windows of equal length out of the stream of all tokens, as the official trainer does.

Windows run across document ends, and every window starts with an empty state.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from wkv.data.batch import Batch
from wkv.data.sampling import Integers, RowSampler, check_state, windows
from wkv.data.store import TokenStore
from wkv.errors import DataError


class UniformWindows(RowSampler):
    """Windows that start anywhere, drawn with their own seeded generator: `RandomWindows` over a `TokenStore`.

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.
        seed: one process draws the same windows as `RandomWindows` with this seed.

    Raises:
        DataError: if the corpus is shorter than one window, and for impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(store, context_length, batch_size, rank, world_size, seed=seed)
        self._choices = store.num_tokens - context_length
        if self._choices < 1:
            found = f"{store.num_tokens} tokens, a window needs {context_length + 1}"
            raise DataError(f"the training text has {found}; give more text or a shorter context_length")
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, rows: Integers) -> Batch:
        """The next windows of the generator, which alone knows where they are."""
        count = self.batch_size * self.world_size
        starts = torch.randint(self._choices, (count, 1), generator=self._generator).flatten()
        return windows(self.store, starts[self.rank :: self.world_size].numpy(), self.context_length)

    def state_dict(self) -> dict[str, Any]:
        """As of all samplers, with the generator's state."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            DataError: if it was taken by another kind of sampler, on other tokens or with other settings.
        """
        check_state(state, type(self).__name__, self.store, self._settings)
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])


class MagicPrimeWindows(RowSampler):
    """The official order (RWKV-LM `dataset.py`): every chunk of T tokens once, in an order that needs no memory.

    Row number n starts at token `(phi (n + 1)^3 mod P) T`, with P from `magic_prime` and phi = P (sqrt(5) - 1) / 2
    rounded down; cubing permutes the residues of such a P, so P rows visit P chunks. Then the order begins anew.

    Args:
        store, context_length, batch_size, rank, world_size: see `RowSampler`.

    Raises:
        DataError: if the corpus has fewer than 3 T tokens, and for impossible arguments.
    """

    def __init__(
        self, store: TokenStore, context_length: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(store, context_length, batch_size, rank, world_size)
        self.prime = magic_prime(store.num_tokens, context_length)

    def offsets(self, rows: Integers) -> Integers:
        """int64 [B]: the token at which each row starts."""
        return np.array([window_offset(int(row), self.prime, self.context_length) for row in rows], np.int64)

    def read(self, rows: Integers) -> Batch:
        """The windows of these rows."""
        return windows(self.store, self.offsets(rows), self.context_length)


def window_offset(row: int, prime: int, context_length: int) -> int:
    """The token at which row `row` of the official order starts. Python's integers do not overflow, int64 would."""
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return factor * (row + 1) ** 3 % prime * context_length


def magic_prime(num_tokens: int, context_length: int) -> int:
    """P: the largest prime of the form 3 k + 2 that is at most `num_tokens // context_length - 1`.

    Raises:
        DataError: if there is none.
    """
    largest = num_tokens // context_length - 1
    for number in range(largest - (largest - 2) % 3, 1, -3):
        if _is_prime(number):
            return number
    found = f"{num_tokens} tokens are {num_tokens // context_length} times context_length {context_length}"
    raise DataError(f"{found}; the magic prime needs 3 times: give more text or a shorter context_length")


def _is_prime(number: int) -> bool:
    """By trial division: a second for 10^13 chunks."""
    if number < 4:
        return number > 1
    return number % 2 != 0 and all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))
