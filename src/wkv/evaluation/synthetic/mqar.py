"""Multi-query associative recall: key-value pairs, then the keys again, each of which asks for its value.

Source: Zoology, arXiv 2312.04927, and HazyResearch/zoology, `multiquery_ar` and its variants. The answer is due where
the key is read again. `mqar_updates` gives some keys a new value, the last one counts; in `mqar_compositional` a key is
a pair of tokens, and only both together name the value.

Shape letters: B rows, T time, K pairs, U updates, S tokens of each kind that keys are composed of, R places for
queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wkv.evaluation.synthetic import zoology
from wkv.evaluation.synthetic.draws import distinct, weighted_distinct
from wkv.evaluation.synthetic.task import Samples, Task, empty_labels, register
from wkv.layers.config import at_least, flag, option, positive

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """What the three variants share.

    Args:
        vocab_size: V. Token 0 fills gaps; keys come first, values last.
        length: T, even.
        pairs: K.
        power: a of the gaps' distribution p(g) ~ g^(a-1), g = 1, 2, ...: 1 is uniform, 0.01 keeps most queries close to
            the pairs.
        noise: fill gaps with random tokens of the whole vocabulary instead of token 0.
    """

    vocab_size: int = option(8192, at_least(4))
    length: int = 64
    pairs: int = 4
    power: float = option(0.01, positive)
    noise: bool = option(False, flag)
    compat: ClassVar[tuple[str, ...]] = ("zoology",)
    query_size: ClassVar[int] = 2  # tokens of a query, with the gap for its answer

    def check(self) -> None:
        if self.space < self.pairs:
            needed = self.context_size + self.query_size * self.pairs
            raise self.fail(f"{self.pairs} pairs need a length of at least {needed}, found {self.length}")

    @property
    def context_size(self) -> int:
        """Tokens before the first query."""
        return 2 * self.pairs

    @property
    def space(self) -> int:
        """R."""
        return (self.length - self.context_size) // self.query_size

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.first_value)

    @property
    def first_value(self) -> int:
        """The lowest token that is a value."""
        return self.vocab_size // 2

    def draw_gaps(self, n: int, generator: torch.Generator) -> Tensor:
        """[B, K] different places for queries."""
        weights_R = torch.arange(1, self.space + 1, dtype=torch.float64) ** (self.power - 1)
        return weighted_distinct(n, self.pairs, weights_R, generator)

    def draw_values(self, n: int, generator: torch.Generator) -> Tensor:
        """[B, K] different values."""
        return self.first_value + distinct(n, self.pairs, self.vocab_size - self.first_value, generator)

    def arrange(
        self,
        context: Sequence[Tensor],
        queries: Sequence[Tensor],
        values_BK: Tensor,
        gaps_BK: Tensor,
        noise: Tensor | None,
    ) -> Samples:
        """Lay out the parts of the context, then queries of several tokens; the last of them asks."""
        n = len(values_BK)
        inputs_BT = torch.zeros(n, self.length, dtype=torch.int64)
        inputs_BT[:, : self.context_size] = torch.cat(list(context), 1)
        places_BK = self.context_size + self.query_size * gaps_BK
        for offset, tokens_BK in enumerate(queries):
            inputs_BT.scatter_(1, places_BK + offset, tokens_BK)
        labels_BT = empty_labels(inputs_BT).scatter_(1, places_BK + len(queries) - 1, values_BK)
        if noise is not None:
            inputs_BT = torch.where(inputs_BT == 0, noise, inputs_BT)
        return Samples(inputs_BT, labels_BT, meta={"gaps": gaps_BK})

    def draw_noise(self, n: int, generator: torch.Generator) -> Tensor | None:
        """[B, T] tokens for the gaps, or None."""
        return torch.randint(self.vocab_size, (n, self.length), generator=generator) if self.noise else None

    def noise_as_zoology(self, n: int, seed: int) -> Tensor | None:
        """The same with torch's global generator seeded by `seed`, which the original leaves to its caller."""
        return self.draw_noise(n, torch.Generator().manual_seed(seed))


@register("mqar")
@dataclass(frozen=True, kw_only=True)
class Mqar(Recall):
    """k1 v1 k2 v2 ... and then every key once: keys 1 ... V/2 - 1, values V/2 ... V - 1, all of a row different."""

    def check(self) -> None:
        if self.length % 2:
            raise self.fail(f"length must be even, found {self.length}")
        super().check()
        if self.pairs >= self.first_value:
            needed = 2 * self.pairs + 2
            raise self.fail(f"{self.pairs} pairs need a vocabulary of at least {needed}, found {self.vocab_size}")

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        keys_BK = 1 + distinct(n, self.pairs, self.first_value - 1, generator)
        values_BK, gaps_BK = self.draw_values(n, generator), self.draw_gaps(n, generator)
        return self._arrange(keys_BK, values_BK, gaps_BK, self.draw_noise(n, generator))

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        draws = zoology.mqar(n, self.vocab_size, self.pairs, self.space, self.power, seed)
        return self._arrange(*draws, self.noise_as_zoology(n, seed))

    def _arrange(self, keys_BK: Tensor, values_BK: Tensor, gaps_BK: Tensor, noise: Tensor | None) -> Samples:
        return self.arrange([interleave(keys_BK, values_BK)], [keys_BK], values_BK, gaps_BK, noise)


@register("mqar_updates")
@dataclass(frozen=True, kw_only=True)
class MqarUpdates(Mqar):
    """After the pairs, `updates` of the keys come again with another value; each key is asked for its last one.

    The original means to choose a value that differs from the old one and compares with that of another pair;
    `compat="zoology"` keeps this, the native draws do not.

    Args:
        updates: U, at most `pairs`.
    """

    updates: int = 2

    def check(self) -> None:
        super().check()
        if self.updates > self.pairs:
            raise self.fail(f"updates must not be above pairs, found {self.updates} of {self.pairs}")

    @property
    def context_size(self) -> int:
        return 2 * (self.pairs + self.updates)

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        keys_BK = 1 + distinct(n, self.pairs, self.first_value - 1, generator)
        values_BK = self.draw_values(n, generator)
        updated_BU = distinct(n, self.updates, self.pairs, generator)
        old_BU = values_BK.gather(1, updated_BU)
        new_BU = torch.randint(self.first_value, self.vocab_size - 1, old_BU.shape, generator=generator)
        new_BU += new_BU >= old_BU  # every value but the old one
        gaps_BK = self.draw_gaps(n, generator)
        return self._arrange_updates(keys_BK, values_BK, updated_BU, new_BU, gaps_BK, self.draw_noise(n, generator))

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        sizes = (self.vocab_size, self.pairs, self.updates, self.space)
        draws = zoology.mqar_updates(n, *sizes, self.power, seed)
        return self._arrange_updates(*draws, self.noise_as_zoology(n, seed))

    def _arrange_updates(
        self,
        keys_BK: Tensor,
        values_BK: Tensor,
        updated_BU: Tensor,
        new_BU: Tensor,
        gaps_BK: Tensor,
        noise: Tensor | None,
    ) -> Samples:
        context = [interleave(keys_BK, values_BK), interleave(keys_BK.gather(1, updated_BU), new_BU)]
        last_BK = values_BK.scatter(1, updated_BU, new_BU)
        samples = self.arrange(context, [keys_BK], last_BK, gaps_BK, noise)
        return Samples(samples.inputs, samples.labels, meta={**samples.meta, "updated": updated_BU})


@register("mqar_compositional")
@dataclass(frozen=True, kw_only=True)
class MqarCompositional(Recall):
    """A key is two tokens: all combinations of sqrt(K) first and sqrt(K) second ones have a value each.

    First tokens are 1 ... V/3 - 1, second ones V/3 ... 2V/3 - 1, values 2V/3 ... V - 1. A query is both tokens.
    """

    vocab_size: int = option(8190, at_least(6))
    query_size: ClassVar[int] = 3

    def check(self) -> None:
        super().check()
        if self.side**2 != self.pairs:
            raise self.fail(f"pairs must be a square number, found {self.pairs}")
        third = self.vocab_size // 3
        if self.side >= third or self.pairs > self.vocab_size - self.first_value:
            raise self.fail(f"{self.pairs} pairs need a larger vocabulary than {self.vocab_size}")

    @property
    def side(self) -> int:
        """S."""
        return math.isqrt(self.pairs)

    @property
    def context_size(self) -> int:
        return 3 * self.pairs

    @property
    def first_value(self) -> int:
        return 2 * self.vocab_size // 3

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        third = self.vocab_size // 3
        first_BS = 1 + distinct(n, self.side, third - 1, generator)
        second_BS = third + distinct(n, self.side, self.first_value - third, generator)
        cells_BK = distinct(n, self.pairs, self.pairs, generator)
        values_BK, gaps_BK = self.draw_values(n, generator), self.draw_gaps(n, generator)
        return self._arrange(first_BS, second_BS, cells_BK, values_BK, gaps_BK, self.draw_noise(n, generator))

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        draws = zoology.mqar_compositional(n, self.vocab_size, self.pairs, self.space, self.power, seed)
        return self._arrange(*draws, self.noise_as_zoology(n, seed))

    def _arrange(
        self,
        first_BS: Tensor,
        second_BS: Tensor,
        cells_BK: Tensor,
        values_BK: Tensor,
        gaps_BK: Tensor,
        noise: Tensor | None,
    ) -> Samples:
        first_BK = first_BS.gather(1, cells_BK // self.side)
        second_BK = second_BS.gather(1, cells_BK % self.side)
        context = [interleave(first_BK, second_BK, values_BK)]
        return self.arrange(context, [first_BK, second_BK], values_BK, gaps_BK, noise)


def interleave(*parts: Tensor) -> Tensor:
    """a1 b1 a2 b2 ..."""
    return torch.stack(parts, 2).flatten(1)
