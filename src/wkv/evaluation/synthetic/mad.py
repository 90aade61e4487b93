"""MAD's selective copying, compression and memorisation.

Source: MAD, arXiv 2403.17844, and athms/mad-lab.

Shape letters: B rows, T time, P pairs, M tokens to copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wkv.evaluation.synthetic import mad_original
from wkv.evaluation.synthetic.mad_recall import MadTask
from wkv.evaluation.synthetic.task import Samples, empty_labels, register
from wkv.layers.config import at_least, option


@register("selective_copying")
@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(MadTask):
    """Tokens among blanks, a token that says "copy", then blanks, each of which asks for one of the tokens in order.

    Tokens 0 ... V-3, blank V-2, copy V-1. The last token to copy stands right before the copy token, as in MAD.

    Args:
        tokens: M, how many to copy.
    """

    length: int = 256
    tokens: int = 16

    def check(self) -> None:
        if self.length < 2 * self.tokens + 1:
            needed = 2 * self.tokens + 1
            raise self.fail(f"{self.tokens} tokens need a length of at least {needed}, found {self.length}")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        tokens_BM = torch.randint(self.vocab_size - 2, (n, self.tokens), generator=generator)
        # Every blank stands before one of the tokens, each equally likely.
        blanks = self.length - 2 * self.tokens - 1
        before = torch.randint(self.tokens, (n, blanks), generator=generator)
        counts_BM = torch.zeros(n, self.tokens, dtype=torch.int64).scatter_add_(1, before, torch.ones_like(before))
        places_BM = counts_BM.cumsum(1) + torch.arange(self.tokens)
        spread_BT = torch.full((n, self.tokens + blanks), self.vocab_size - 2).scatter_(1, places_BM, tokens_BM)
        return self._ask(tokens_BM, spread_BT)

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        symbols = self.vocab_size - 2
        return self._ask(*mad_original.selective_copying(n, symbols, self.tokens, self.length, symbols, seed))

    def _ask(self, tokens_BM: Tensor, spread_BT: Tensor) -> Samples:
        copy = spread_BT.new_full((len(spread_BT), 1), self.vocab_size - 1)
        inputs_BT = torch.cat([spread_BT, copy, torch.full_like(tokens_BM, self.vocab_size - 2)], 1)
        labels_BT = empty_labels(inputs_BT)
        labels_BT[:, -self.tokens :] = tokens_BM
        return Samples(inputs_BT, labels_BT)


@register("compression")
@dataclass(frozen=True, kw_only=True)
class Compression(MadTask):
    """Random tokens, then a token V-1 that says "compress", then each token is asked for.

    Native draws: `length - 1` random tokens, then `length - 1` times token V-1, each of which asks for one of them in
    order, so that any language model can be tested: what it knows of the tokens is its state.

    In MAD (`compat="mad"`) there are `length` inputs and each is its own label: a decoder outside of the model is to
    read all of them from the last position alone. A language model copies its inputs instead, and learns nothing.
    """

    length: int = option(32, at_least(2))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        tokens = torch.randint(self.vocab_size - 1, (n, self.length - 1), generator=generator)
        inputs_BT = torch.cat([tokens, torch.full_like(tokens, self.vocab_size - 1)], 1)
        labels_BT = torch.cat([empty_labels(tokens), tokens], 1)
        return Samples(inputs_BT, labels_BT)

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        tokens = mad_original.compression(n, self.vocab_size - 1, self.length - 1, seed)
        inputs_BT = torch.cat([tokens, tokens.new_full((n, 1), self.vocab_size - 1)], 1)
        return Samples(inputs_BT, inputs_BT.clone())


@register("memorization")
@dataclass(frozen=True, kw_only=True)
class Memorization(MadTask):
    """k, V-1, k, V-1, ...: token V-1 asks for the key's value, by a map that is the same for all rows and splits.

    What is tested is what the weights can hold, not the state.

    Args:
        map_seed: of the map; 12345 in MAD.
    """

    vocab_size: int = option(256, at_least(4))
    length: int = option(32, at_least(2))
    map_seed: int = option(12345, at_least(0))

    def check(self) -> None:
        if self.length % 2:
            raise self.fail(f"length must be even, found {self.length}")

    @property
    def num_keys(self) -> int:
        """Keys are the tokens below it."""
        return (self.vocab_size - 1) // 2

    @property
    def chance(self) -> float:
        return 1 / self.num_keys

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        return self._ask(torch.randint(self.num_keys, (n, self.length // 2), generator=generator))

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        return self._ask(mad_original.memorization(n, self.num_keys, self.length // 2, seed))

    def _ask(self, places_BP: Tensor) -> Samples:
        keys, values = mad_original.memorized_map(self.vocab_size, self.map_seed)
        asks = torch.full_like(places_BP, self.vocab_size - 1)
        inputs_BT = torch.stack([keys[places_BP], asks], 2).flatten(1)
        labels_BT = torch.stack([empty_labels(asks), values[places_BP]], 2).flatten(1)
        return Samples(inputs_BT, labels_BT)
