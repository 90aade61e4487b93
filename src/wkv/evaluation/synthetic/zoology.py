"""The random draws of HazyResearch/zoology, in its order.

The original seeds numpy's global generator; a `RandomState` of our own gives the same numbers and disturbs nobody. All
rows of one thing are drawn before the next thing.

Shape letters: B rows, T time, K pairs, U updates, S = sqrt(K).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def mqar(n: int, vocab: int, pairs: int, space: int, power: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gaps, int64 [B, K] each."""
    random = np.random.RandomState(seed)
    keys, values = _pairs(random, n, vocab, pairs)
    return keys, values, _gaps(random, n, pairs, space, power)


def mqar_updates(
    n: int, vocab: int, pairs: int, updates: int, space: int, power: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys [B, K], values [B, K], updated pairs [B, U], their new values [B, U], gaps [B, K]."""
    random = np.random.RandomState(seed)
    keys, values = _pairs(random, n, vocab, pairs)
    choices = np.arange(vocab // 2, vocab)
    new = torch.empty(n, updates, dtype=torch.int64)
    for row in range(n):
        for place in range(updates):
            # The original excludes the old value of this pair, which need not be the pair that is updated.
            new[row, place] = int(random.choice(choices[choices != int(values[row, place])]))
    updated = _rows(n, lambda: random.choice(pairs, updates, replace=False))
    return keys, values, updated, new, _gaps(random, n, pairs, space, power)


def mqar_compositional(
    n: int, vocab: int, pairs: int, space: int, power: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First and second tokens [B, S], cells of their grid [B, K], values [B, K], gaps [B, K]."""
    random = np.random.RandomState(seed)
    side, third, values_from = math.isqrt(pairs), vocab // 3, 2 * vocab // 3
    first = _rows(n, lambda: random.choice(np.arange(1, third), side, replace=False))
    second = _rows(n, lambda: random.choice(np.arange(third, values_from), side, replace=False))
    cells = _rows(n, lambda: random.permutation(pairs))
    values = _rows(n, lambda: random.choice(np.arange(values_from, vocab), pairs, replace=False))
    return first, second, cells, values, _gaps(random, n, pairs, space, power)


def bits(n: int, length: int, seed: int) -> Tensor:
    """int64 [B, T] of 0 and 1."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 2, (n, length))).to(torch.int64)


def segment_seeds(seed: int, train: int, test: int) -> tuple[list[int], list[int]]:
    """Seeds of the training and test segments that zoology derives from the seed of its configuration.

    Args:
        seed: of the configuration (123 in zoology).
        train, test: numbers of segments. Training seeds are below 2^31, test seeds above.
    """
    random = np.random.RandomState(seed)
    first = [int(random.randint(0, 2**31, dtype=np.int64)) for _ in range(train)]
    return first, [int(random.randint(2**31, 2**32, dtype=np.int64)) for _ in range(test)]


def _pairs(random: np.random.RandomState, n: int, vocab: int, pairs: int) -> tuple[Tensor, Tensor]:
    keys = _rows(n, lambda: random.choice(np.arange(1, vocab // 2), pairs, replace=False))
    return keys, _rows(n, lambda: random.choice(np.arange(vocab // 2, vocab), pairs, replace=False))


def _gaps(random: np.random.RandomState, n: int, pairs: int, space: int, power: float) -> Tensor:
    weights = power * np.arange(1, space + 1) ** (power - 1)
    weights = weights / weights.sum()
    return _rows(n, lambda: random.choice(np.arange(space), pairs, replace=False, p=weights))


def _rows(n: int, draw: Callable[[], np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([draw() for _ in range(n)])).to(torch.int64)
