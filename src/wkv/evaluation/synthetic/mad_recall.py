"""In-context recall of MAD, without and with noise: key-value pairs in which keys come again with their value.

Source: MAD, arXiv 2403.17844, and athms/mad-lab. Keys are the lower half of the vocabulary, values the upper half;
every row has a random map of its own. Training asks for the next token everywhere, the test for values of keys that
were seen.

Shape letters: B rows, T time, P pairs, N keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wkv.evaluation.synthetic import mad_original
from wkv.evaluation.synthetic.draws import first_places, pick
from wkv.evaluation.synthetic.task import Samples, Task, empty_labels, register
from wkv.layers.config import at_least, between, option


@dataclass(frozen=True, kw_only=True)
class MadTask(Task):
    """What MAD's tasks have in common.

    Args:
        vocab_size: V.
        length: MAD's `seq_len`.
    """

    vocab_size: int = option(16, at_least(4))
    length: int = 128
    compat: ClassVar[tuple[str, ...]] = ("mad",)


@register("in_context_recall")
@dataclass(frozen=True, kw_only=True)
class InContextRecall(MadTask):
    """k v k v ...: every pair has a random key; the last key is one that was seen.

    The inputs have `length - 1` tokens: the last value is only asked for.
    """

    length: int = option(128, at_least(4))

    def check(self) -> None:
        for name, value in (("length", self.length), ("vocab_size", self.vocab_size)):
            if value % 2:
                raise self.fail(f"{name} must be even, found {value}")

    @property
    def num_keys(self) -> int:
        """N, and as many values."""
        return self.vocab_size // 2

    @property
    def pairs(self) -> int:
        """P."""
        return self.length // 2

    @property
    def chance(self) -> float:
        return 1 / self.num_keys

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        is_pair = torch.ones(n, self.pairs, dtype=torch.bool)
        return self.draw_pairs(is_pair, generator, split)

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        tokens_BP2, is_pair_BP = mad_original.recall(n, self.num_keys, self.pairs, seed)
        return self.ask(tokens_BP2, is_pair_BP, split)

    def draw_pairs(self, is_pair_BP: Tensor, generator: torch.Generator, split: str) -> Samples:
        """Keys and values wherever `is_pair` says so; at other places the caller puts something else."""
        n = len(is_pair_BP)
        keys_BP = torch.randint(self.num_keys, (n, self.pairs), generator=generator)
        seen_BN = torch.zeros(n, self.num_keys, dtype=torch.int64)
        seen_BN.scatter_add_(1, keys_BP[:, :-1], is_pair_BP[:, :-1].long())
        keys_BP[:, -1] = pick(seen_BN > 0, generator)
        map_BN = torch.randint(self.num_keys, 2 * self.num_keys, (n, self.num_keys), generator=generator)
        tokens_BP2 = torch.stack([keys_BP, map_BN.gather(1, keys_BP)], 2)
        return self.ask(self.disturb(tokens_BP2, is_pair_BP, generator), is_pair_BP, split)

    def disturb(self, tokens_BP2: Tensor, is_pair_BP: Tensor, generator: torch.Generator) -> Tensor:
        """Replace what is no pair."""
        return tokens_BP2

    def ask(self, tokens_BP2: Tensor, is_pair_BP: Tensor, split: str) -> Samples:
        """Inputs and labels of rows of pairs, of which some are noise."""
        tokens_BT = tokens_BP2.flatten(1)
        targets_BT = tokens_BT[:, 1:].clone()
        if split == "test":
            # Noise has ids of its own, so that no key is mistaken for one that was seen in noise.
            repeated_BP = first_places(tokens_BP2[:, :, 0]) < torch.arange(self.pairs)
            asked_BT = torch.zeros_like(targets_BT, dtype=torch.bool)
            asked_BT[:, 0::2] = repeated_BP & is_pair_BP
            targets_BT[~asked_BT] = empty_labels(targets_BT)[~asked_BT]
        return Samples(tokens_BT[:, :-1].clone(), targets_BT, meta={"is_pair": is_pair_BP})


@register("noisy_recall")
@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """The same with some pairs replaced by two tokens of noise, which are never asked for in the test.

    Args:
        noise_vocab_size: how many of the V tokens, the last ones, are noise.
        noise_fraction: probability that a pair becomes noise. One random pair of each row never does.
    """

    vocab_size: int = option(32, at_least(6))
    noise_vocab_size: int = option(16, at_least(2))
    noise_fraction: float = option(0.2, between(0, 1))

    def check(self) -> None:
        super().check()
        if self.noise_vocab_size % 2 or self.num_keys < 1:
            found = f"found {self.noise_vocab_size} of {self.vocab_size}"
            raise self.fail(f"noise_vocab_size must be even and leave at least one key and one value, {found}")

    @property
    def num_keys(self) -> int:
        return (self.vocab_size - self.noise_vocab_size) // 2

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        is_pair_BP = torch.rand(n, self.pairs, generator=generator) >= self.noise_fraction
        kept_B1 = torch.randint(self.pairs - 1, (n, 1), generator=generator)
        is_pair_BP.scatter_(1, kept_B1, True)
        is_pair_BP[:, -1] = True
        return self.draw_pairs(is_pair_BP, generator, split)

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        noise = (self.noise_vocab_size, self.noise_fraction)
        tokens_BP2, is_pair_BP = mad_original.recall(n, self.num_keys, self.pairs, seed, *noise)
        return self.ask(tokens_BP2, is_pair_BP, split)

    def disturb(self, tokens_BP2: Tensor, is_pair_BP: Tensor, generator: torch.Generator) -> Tensor:
        first = self.vocab_size - self.noise_vocab_size
        noise_BP2 = torch.randint(first, self.vocab_size, tokens_BP2.shape, generator=generator)
        return torch.where(is_pair_BP[:, :, None], tokens_BP2, noise_BP2)
