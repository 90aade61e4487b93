"""Fuzzy in-context recall of MAD: keys and values are motifs of one to three tokens.

Source: MAD, arXiv 2403.17844, and athms/mad-lab. The order of the original's draws is not known to us; the structure
is.

Shape letters: B rows, T time, P pairs, M tokens of a pair at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wkv.evaluation.synthetic.draws import distinct, first_places, pick
from wkv.evaluation.synthetic.mad_recall import MadTask
from wkv.evaluation.synthetic.task import Samples, empty_labels, register


@register("fuzzy_recall")
@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(MadTask):
    """Key motif, value motif, key motif, ...: a key keeps its value within a row, and the last key was seen before.

    Keys are made of tokens below (V - 1) // 2, values of those up to V - 2, each motif of different ones; token V - 1
    fills rows up on the left. Training asks for the next token everywhere (the padding included, as in MAD), the test
    for all tokens of the values of keys that were seen. Inputs and labels have `length` tokens.

    Args:
        key_motif: tokens of a key: any number up to this in training, always this many in the test.
        value_motif: tokens of a value at most.
    """

    key_motif: int = 3
    value_motif: int = 3
    compat: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        if self.key_motif > self.num_keys or self.value_motif > self.num_values:
            raise self.fail(f"motifs of {self.key_motif} and {self.value_motif} tokens need a larger vocabulary")
        if self.length + 1 < 2 * self.pair_size:
            raise self.fail(f"length must be at least {2 * self.pair_size - 1}, found {self.length}")

    @property
    def num_keys(self) -> int:
        """Tokens that keys are made of."""
        return (self.vocab_size - 1) // 2

    @property
    def num_values(self) -> int:
        """Tokens that values are made of."""
        return self.vocab_size - 1 - self.num_keys

    @property
    def pair_size(self) -> int:
        """M."""
        return self.key_motif + self.value_motif

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        tokens_BPM, exists_BPM, repeated_BP = self._draw_pairs(n, generator, split)
        is_value = torch.arange(self.pair_size) >= self.key_motif
        asked_BPM = exists_BPM & is_value & repeated_BP[:, :, None]
        size = self.length + 1
        tokens_BT = _right_aligned(tokens_BPM, exists_BPM, size, self.vocab_size - 1)
        labels_BT = tokens_BT[:, 1:].clone()
        if split == "test":
            asked_BT = _right_aligned(asked_BPM.long(), exists_BPM, size, 0)[:, 1:] > 0
            labels_BT = torch.where(asked_BT, labels_BT, empty_labels(labels_BT))
        return Samples(tokens_BT[:, :-1].clone(), labels_BT)

    def _draw_pairs(self, n: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of all pairs, whether each exists, and whether a pair's key was seen before."""
        pairs = (self.length + 1) // 2  # as many as fit if all motifs are single tokens
        key_sizes = torch.full((n, pairs), self.key_motif)
        if split == "train":
            key_sizes = torch.randint(1, self.key_motif + 1, (n, pairs), generator=generator)
        keys_BPM = _motifs(key_sizes, self.key_motif, 0, self.num_keys, generator)
        value_sizes = torch.randint(1, self.value_motif + 1, (n, pairs), generator=generator)
        values_BPM = _motifs(value_sizes, self.value_motif, self.num_keys, self.num_values, generator)
        first_BP = _first_keys(keys_BPM)
        values_BPM = _rows(values_BPM, first_BP)
        tokens_BPM = torch.cat([keys_BPM, values_BPM], 2)
        kept_BP = self._kept(tokens_BPM >= 0)
        last_B1 = kept_BP.sum(1, keepdim=True) - 1
        # The last pair that is kept becomes a copy of an earlier one, which is its first place now.
        earlier_BP = kept_BP & (first_BP == torch.arange(pairs)) & (torch.arange(pairs) < last_B1)
        copied_B1 = pick(earlier_BP, generator)[:, None]
        source_BP = torch.arange(pairs).repeat(n, 1).scatter_(1, last_B1, copied_B1)
        tokens_BPM = _rows(tokens_BPM, source_BP)
        repeated_BP = (first_BP < torch.arange(pairs)).scatter_(1, last_B1, True)
        return tokens_BPM, (tokens_BPM >= 0) & kept_BP[:, :, None], repeated_BP

    def _kept(self, exists_BPM: Tensor) -> Tensor:
        """bool [B, P]: the first pairs, as many as fit into a row whatever size the last of them will have."""
        ends_BP = exists_BPM.sum(2).cumsum(1)
        fits_BP = ends_BP + self.pair_size <= self.length + 1
        return torch.cat([torch.ones_like(fits_BP[:, :1]), fits_BP[:, :-1]], 1)


def _motifs(sizes_BP: Tensor, size: int, first: int, count: int, generator: torch.Generator) -> Tensor:
    """Different tokens from `first` on, int64 [B, P, size]; -1 beyond each motif's own size."""
    tokens = first + distinct(sizes_BP.numel(), size, count, generator)
    return torch.where(torch.arange(size) < sizes_BP[:, :, None], tokens.view(*sizes_BP.shape, size), -1)


def _first_keys(keys_BPM: Tensor) -> Tensor:
    """int64 [B, P]: the first pair of the row with the same key."""
    ids_BP = torch.zeros_like(keys_BPM[:, :, 0])
    base = int(keys_BPM.max()) + 2
    for place in range(keys_BPM.shape[2]):
        ids_BP = ids_BP * base + keys_BPM[:, :, place] + 1
    return first_places(ids_BP)


def _rows(values_BPM: Tensor, places_BP: Tensor) -> Tensor:
    """The pairs at `places`."""
    return values_BPM.gather(1, places_BP[:, :, None].expand_as(values_BPM))


def _right_aligned(values_BPM: Tensor, exists_BPM: Tensor, size: int, filler: int) -> Tensor:
    """[B, size]: the existing values of each row in their order, at its right end."""
    exists = exists_BPM.flatten(1)
    counts = exists.cumsum(1)
    places = size - counts[:, -1:] + counts - 1
    out = torch.full((len(exists), size + 1), filler)
    # What does not exist goes to a place of its own behind the row.
    out.scatter_(1, torch.where(exists, places, size), values_BPM.flatten(1))
    return out[:, :size]
