"""The random draws of athms/mad-lab, in its order: one generator per split, read row after row.

Training and test splits of one seed have the same inputs there, apart from fuzzy recall, whose order is not known to
us.

Shape letters: B rows, T time, P pairs, M tokens to copy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def recall(
    n: int, num_keys: int, pairs: int, seed: int, noise_vocab: int = 0, noise_fraction: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Pairs of tokens, int64 [B, P, 2], and whether each is a key with its value, bool [B, P]."""
    random = np.random.default_rng(seed)
    tokens = np.empty((n, pairs, 2), np.int64)
    is_pair = np.ones((n, pairs), bool)
    noise = np.arange(2 * num_keys, 2 * num_keys + noise_vocab)
    for row in range(n):
        kept = random.choice(pairs)
        values: dict[int, int] = {}
        for place in range(pairs - 1):
            if noise_vocab and place != kept and random.random() < noise_fraction:
                tokens[row, place], is_pair[row, place] = random.choice(noise, 2), False
                continue
            key = int(random.choice(num_keys))
            if key not in values:
                values[key] = num_keys + int(random.choice(num_keys))
            tokens[row, place] = key, values[key]
        last = int(random.choice(list(values)))
        tokens[row, -1] = last, values[last]
    return torch.from_numpy(tokens), torch.from_numpy(is_pair)


def selective_copying(n: int, symbols: int, count: int, length: int, blank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens to copy, int64 [B, M], and the same with blanks between them, int64 [B, length - M - 1].

    The blanks' places come from numpy's global generator, which the original leaves to its caller: seeded like the
    rest.
    """
    random, places_random = np.random.default_rng(seed), np.random.RandomState(seed)
    tokens, spread = [], []
    for _ in range(n):
        tokens.append(random.choice(symbols, count))
        places = places_random.randint(0, count, length - 2 * count - 1)
        spread.append(np.insert(tokens[-1], places, blank))
    return torch.from_numpy(np.stack(tokens)).long(), torch.from_numpy(np.stack(spread)).long()


def compression(n: int, symbols: int, length: int, seed: int) -> Tensor:
    """int64 [B, T]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, symbols, (n, length))).long()


def memorized_map(vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and their values, which stay the same for all rows and splits."""
    random = np.random.default_rng(seed)
    first = (vocab_size - 1) // 2
    keys, values = random.permutation(np.arange(first)), random.permutation(np.arange(first, vocab_size - 1))
    return torch.from_numpy(keys).long(), torch.from_numpy(values[: len(keys)]).long()


def memorization(n: int, num_keys: int, pairs: int, seed: int) -> Tensor:
    """int64 [B, P] places in the map's keys."""
    random = np.random.default_rng(seed)
    places = np.empty((n, pairs), np.int64)
    for row in range(n):
        random.choice(pairs)  # the original draws a number here that it does not use
        for pair in range(pairs):
            places[row, pair] = random.choice(num_keys)
    return torch.from_numpy(places)
