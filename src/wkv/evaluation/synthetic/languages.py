"""Formal languages: one question about a whole sequence of symbols, or, in `running_parity`, about every prefix.

Source: the Chomsky-hierarchy tasks as xLSTM (arXiv 2405.04517) and "Unlocking State-Tracking in Linear RNNs"
(arXiv 2411.12537, code automl/unlocking_state_tracking) draw them. A row of s tokens is s - 1 symbols and token 0, at
which the answer is due. What stands behind is token 0 as well, with nothing asked.

Shape letters: B rows, T time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from wkv.evaluation.synthetic import zoology
from wkv.evaluation.synthetic.task import Samples, VaryingTask, empty_labels, register
from wkv.layers.config import at_least, option


@dataclass(frozen=True, kw_only=True)
class Language(VaryingTask):
    """A question at the end of a row.

    Args:
        context_length: width of the samples; by default `max_length`.
    """

    context_length: int | None = None
    compat: ClassVar[tuple[str, ...]] = ("xlstm",)
    shortest: ClassVar[int] = 2

    def check(self) -> None:
        super().check()
        if self.width < self.max_length:
            raise self.fail(f"context_length {self.width} is below max_length {self.max_length}")

    @property
    def width(self) -> int:
        """T."""
        return self.context_length or self.max_length

    def with_length(self, length: int) -> Language:
        return type(self)(**{**self.options, "min_length": length, "max_length": length, "context_length": None})

    def ask(self, symbols_BT: Tensor, lengths_B: Tensor, answers_B: Tensor) -> Samples:
        """Samples with the answer of each row at its last place."""
        places = torch.arange(self.width)
        inputs_BT = torch.where(places < lengths_B[:, None] - 1, symbols_BT, 0)
        at_end = places == lengths_B[:, None] - 1
        labels_BT = torch.where(at_end, answers_B[:, None], empty_labels(inputs_BT))
        return Samples(inputs_BT, labels_BT, meta={"lengths": lengths_B})

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        random = np.random.default_rng(seed)
        symbols_BT = self.symbols_as_xlstm(n, random)
        lengths = random.integers(self.min_length, self.max_length + 1, n)
        return self.answer(symbols_BT, torch.from_numpy(lengths).long())

    def symbols_as_xlstm(self, n: int, random: np.random.Generator) -> Tensor:
        """int64 [B, T], more of them than a row may need; an error for a language that has no original."""
        raise self.fail("there are no draws of an original")

    @abstractmethod
    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        """Samples of rows that are given by their symbols and lengths."""

    def symbols_of(self, symbols_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The symbols that belong to the rows, 0 elsewhere."""
        return torch.where(torch.arange(self.width) < lengths_B[:, None] - 1, symbols_BT, 0)


@dataclass(frozen=True, kw_only=True)
class BinaryLanguage(Language):
    """Symbols 1 and 2; the answer is one of them."""

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        symbols_BT = torch.randint(1, 3, (n, self.width), generator=generator)
        return self.answer(symbols_BT, self.draw_lengths(n, generator))

    def symbols_as_xlstm(self, n: int, random: np.random.Generator) -> Tensor:
        symbols = torch.ones(n, self.width, dtype=torch.int64)
        symbols[:, :-1] += torch.from_numpy(random.integers(0, 2, (n, self.width - 1)))
        return symbols


@register("parity")
@dataclass(frozen=True, kw_only=True)
class Parity(BinaryLanguage):
    """Is the number of symbols 2 odd? Answers: 1 no, 2 yes.

    `compat="zoology"` has an alphabet of its own: bits 0 and 1, token 2 asks, the answer is 0 or 1; one length.
    """

    compat: ClassVar[tuple[str, ...]] = ("xlstm", "zoology")

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        twos_B = (self.symbols_of(symbols_BT, lengths_B) == 2).sum(1)
        return self.ask(symbols_BT, lengths_B, twos_B % 2 + 1)

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        if compat == "xlstm":
            return super().draw_as(compat, n, seed, split)
        _one_length(self)
        bits_BT = zoology.bits(n, self.max_length - 1, seed)
        inputs_BT = torch.cat([bits_BT, bits_BT.new_full((n, 1), 2)], 1)
        labels_BT = empty_labels(inputs_BT)
        labels_BT[:, -1] = bits_BT.sum(1) % 2
        return Samples(inputs_BT, labels_BT)


@register("even_pairs")
@dataclass(frozen=True, kw_only=True)
class EvenPairs(BinaryLanguage):
    """Does the symbol change an even number of times, that is, is the first like the last? Answers: 1 yes, 2 no."""

    shortest: ClassVar[int] = 3

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        last_B = symbols_BT.gather(1, lengths_B[:, None] - 2)[:, 0]
        return self.ask(symbols_BT, lengths_B, (symbols_BT[:, 0] != last_B).long() + 1)


@register("majority")
@dataclass(frozen=True, kw_only=True)
class Majority(BinaryLanguage):
    """Are more than half of the symbols 2? Answers: 1 no, 2 yes. Ours; no original."""

    compat: ClassVar[tuple[str, ...]] = ()

    @property
    def chance(self) -> float:
        return sum(map(_no_majority, self.lengths)) / len(self.lengths)

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        twos_B = (self.symbols_of(symbols_BT, lengths_B) == 2).sum(1)
        return self.ask(symbols_BT, lengths_B, (2 * twos_B > lengths_B - 1).long() + 1)


def _no_majority(length: int) -> float:
    """Probability of at most half, the more frequent answer."""
    symbols = length - 1
    return sum(math.comb(symbols, twos) for twos in range(symbols // 2 + 1)) / 2**symbols


@register("cycle_navigation")
@dataclass(frozen=True, kw_only=True)
class CycleNavigation(Language):
    """Steps on a circle: 1 stays, 2 goes forward, 3 back. Which place is it at the end? Answers: 4 + place.

    Args:
        cycle: places on the circle.
    """

    cycle: int = option(5, at_least(2))

    @property
    def vocab_size(self) -> int:
        return 4 + self.cycle

    @property
    def chance(self) -> float:
        places = np.eye(self.cycle)[0]
        highest = [1.0]
        for _ in range(self.max_length - 1):
            places = (places + np.roll(places, 1) + np.roll(places, -1)) / 3
            highest.append(places.max())
        return float(np.mean([highest[length - 1] for length in self.lengths]))

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        symbols_BT = torch.randint(1, 4, (n, self.width), generator=generator)
        return self.answer(symbols_BT, self.draw_lengths(n, generator))

    def symbols_as_xlstm(self, n: int, random: np.random.Generator) -> Tensor:
        return torch.from_numpy(random.integers(0, 3, (n, self.width))).long() + 1

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        steps = torch.tensor([0, 0, 1, -1])
        sums_B = steps[self.symbols_of(symbols_BT, lengths_B)].sum(1)
        return self.ask(symbols_BT, lengths_B, sums_B % self.cycle + 4)


@register("running_parity")
@dataclass(frozen=True, kw_only=True)
class RunningParity(VaryingTask):
    """Bits 0 and 1; every place asks for the parity of all bits so far. Behind a row's end stands 0, nothing is asked.

    `compat="zoology"` is its cumulative parity, which has one token less than its own setting says.
    """

    compat: ClassVar[tuple[str, ...]] = ("zoology",)

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        bits_BT = torch.randint(2, (n, self.max_length), generator=generator)
        lengths_B = self.draw_lengths(n, generator)
        exists = torch.arange(self.max_length) < lengths_B[:, None]
        bits_BT = torch.where(exists, bits_BT, 0)
        labels_BT = torch.where(exists, bits_BT.cumsum(1) % 2, empty_labels(bits_BT))
        return Samples(bits_BT, labels_BT, meta={"lengths": lengths_B})

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        _one_length(self)
        bits_BT = zoology.bits(n, self.max_length, seed)
        return Samples(bits_BT, bits_BT.cumsum(1) % 2)


def _one_length(task: VaryingTask) -> None:
    if task.min_length != task.max_length:
        found = f"found min_length {task.min_length} and max_length {task.max_length}"
        raise task.fail(f"compat='zoology' has one length, {found}; give `length`")
