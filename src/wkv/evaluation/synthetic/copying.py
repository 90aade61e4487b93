"""Writing down what was read, in order or reversed. The model reads its own right answers, as when it writes text.

A row is x1 ... xm, a separator, and all but the last token of the answer; the separator and each of those tokens ask
for the next token of the answer. Rows have 2 m tokens; behind their end stands a token of its own, with nothing asked.

Source: ours. Reversed numbers are the kind of question that grows with the number of digits; the task is a standard
probe of length generalisation.

Shape letters: B rows, T time, M symbols.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from wkv.evaluation.synthetic.task import Samples, Task, empty_labels, register
from wkv.layers.config import at_least, option


@dataclass(frozen=True, kw_only=True)
class Transcription(Task):
    """What both tasks share.

    Args:
        min_symbols, max_symbols: m; each number is equally likely.
    """

    min_symbols: int = 1
    max_symbols: int = 16

    def check(self) -> None:
        if self.min_symbols > self.max_symbols:
            raise self.fail(f"min_symbols {self.min_symbols} is above max_symbols {self.max_symbols}")

    def with_length(self, length: int) -> Transcription:
        if length % 2 or length < 2:
            raise self.fail(f"length must be even (twice the number of symbols) and at least 2, found {length}")
        return dataclasses.replace(self, min_symbols=length // 2, max_symbols=length // 2)

    @property
    @abstractmethod
    def num_symbols(self) -> int:
        """Symbols are the tokens below it, the separator is the next token, the last one fills rows up."""

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 2

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        symbols_BM = self.draw_symbols(n, generator)
        counts_B1 = torch.randint(self.min_symbols, self.max_symbols + 1, (n, 1), generator=generator)
        places = torch.arange(2 * self.max_symbols)
        # At place m + i the answer's symbol i is due; one place later it is read.
        due_BT = self._answer(symbols_BM, places - counts_B1, counts_B1)
        read_BT = self._answer(symbols_BM, places - counts_B1 - 1, counts_B1)
        first_BT = symbols_BM.repeat(1, 2)
        inputs_BT = torch.where(places < counts_B1, first_BT, read_BT)
        inputs_BT = torch.where(places == counts_B1, self.num_symbols, inputs_BT)
        inputs_BT = torch.where(places < 2 * counts_B1, inputs_BT, self.num_symbols + 1)
        asked = (places >= counts_B1) & (places < 2 * counts_B1)
        labels_BT = torch.where(asked, due_BT, empty_labels(due_BT))
        return Samples(inputs_BT, labels_BT, meta={"lengths": 2 * counts_B1[:, 0]})

    def draw_symbols(self, n: int, generator: torch.Generator) -> Tensor:
        """int64 [B, M]."""
        return torch.randint(self.num_symbols, (n, self.max_symbols), generator=generator)

    def _answer(self, symbols_BM: Tensor, index_BT: Tensor, counts_B1: Tensor) -> Tensor:
        """The answer's symbols at the given indices; anything where an index is out of range."""
        return symbols_BM.gather(1, self.source(index_BT, counts_B1).clamp(0, self.max_symbols - 1))

    @abstractmethod
    def source(self, index_BT: Tensor, counts_B1: Tensor) -> Tensor:
        """Which symbol of the input stands at these indices of the answer."""


@register("copying")
@dataclass(frozen=True, kw_only=True)
class Copying(Transcription):
    """The symbols once more.

    Args:
        vocab_size: symbols 0 ... V-3, separator V-2, filler V-1.
    """

    vocab_size: int = option(16, at_least(3))

    @property
    def num_symbols(self) -> int:
        return self.vocab_size - 2

    @property
    def chance(self) -> float:
        return 1 / self.num_symbols

    def source(self, index_BT: Tensor, counts_B1: Tensor) -> Tensor:
        return index_BT


@register("digit_reversal")
@dataclass(frozen=True, kw_only=True)
class DigitReversal(Transcription):
    """A number, the separator, its digits from the last to the first. The first digit of a number is not 0.

    Args:
        base: of the numbers. Digits are the tokens below it, the separator is `base`, the filler `base` + 1.
    """

    max_symbols: int = 10
    base: int = option(10, at_least(3))

    @property
    def num_symbols(self) -> int:
        return self.base

    @property
    def chance(self) -> float:
        counts = range(self.min_symbols, self.max_symbols + 1)
        means = [((count - 1) / self.base + 1 / (self.base - 1)) / count for count in counts]
        return sum(means) / len(means)

    def draw_symbols(self, n: int, generator: torch.Generator) -> Tensor:
        digits_BM = super().draw_symbols(n, generator)
        digits_BM[:, 0] = torch.randint(1, self.base, (n,), generator=generator)
        return digits_BM

    def source(self, index_BT: Tensor, counts_B1: Tensor) -> Tensor:
        return counts_B1 - 1 - index_BT
