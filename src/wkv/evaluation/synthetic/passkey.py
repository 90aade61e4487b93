"""Remembering one thing over a distance: a passkey in filler, and the first token of a sequence.

Source: the usual passkey test in the form of a toy that small models can be trained on; layout ours. For a test of
models that read text see `needle`.

Shape letters: B rows, T time, P payload tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from wkv.evaluation.synthetic.task import Samples, Task, empty_labels, register
from wkv.layers.config import at_least, between, option


@register("passkey")
@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Filler, in it a marker and the payload; at the end the marker again, which asks for the payload token by token.

    Filler tokens are 0 ... F-1, the marker is F, payload tokens are F+1 ... V-1. The last P inputs are the marker and
    the payload without its last token.

    Args:
        vocab_size: V.
        length: T.
        fillers: F.
        payload: P.
        depth: where the first marker stands, 0 at the beginning, 1 right before the question; None: anywhere.
    """

    vocab_size: int = option(32, at_least(3))
    length: int = 64
    fillers: int = 8
    payload: int = 2
    depth: float | None = option(None, between(0, 1))

    def check(self) -> None:
        if self.fillers > self.vocab_size - 2:
            raise self.fail(f"{self.fillers} fillers leave no payload in a vocabulary of {self.vocab_size}")
        if self.last_place < 0:
            raise self.fail(f"length must be at least {2 * self.payload + 1}, found {self.length}")

    @property
    def last_place(self) -> int:
        """Of the first marker."""
        return self.length - 2 * self.payload - 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.fillers - 1)

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        inputs_BT = torch.randint(self.fillers, (n, self.length), generator=generator)
        payload_BP = torch.randint(self.fillers + 1, self.vocab_size, (n, self.payload), generator=generator)
        needle = torch.cat([torch.full((n, 1), self.fillers), payload_BP], 1)
        places_B1 = self._places(n, generator)
        inputs_BT.scatter_(1, places_B1 + torch.arange(self.payload + 1), needle)
        inputs_BT[:, -self.payload :] = needle[:, :-1]
        labels_BT = empty_labels(inputs_BT)
        labels_BT[:, -self.payload :] = payload_BP
        return Samples(inputs_BT, labels_BT, meta={"places": places_B1[:, 0]})

    def _places(self, n: int, generator: torch.Generator) -> Tensor:
        """[B, 1] places of the first marker."""
        if self.depth is None:
            return torch.randint(self.last_place + 1, (n, 1), generator=generator)
        return torch.full((n, 1), round(self.depth * self.last_place))


@register("first_token_recall")
@dataclass(frozen=True, kw_only=True)
class FirstTokenRecall(Task):
    """A token, a gap of random tokens, and token 0, which asks for the first one.

    All tokens but 0 can be first, and all of them stand in gaps, so that only the place tells which one is asked for.

    Args:
        vocab_size: V.
        min_gap, max_gap: tokens between the first one and the question; each number is equally likely. A row has gap +
            2 tokens, and zeros behind them, with nothing asked.
    """

    vocab_size: int = option(32, at_least(3))
    min_gap: int = option(0, at_least(0))
    max_gap: int = option(30, at_least(0))

    def check(self) -> None:
        if self.min_gap > self.max_gap:
            raise self.fail(f"min_gap {self.min_gap} is above max_gap {self.max_gap}")

    def with_length(self, length: int) -> FirstTokenRecall:
        return dataclasses.replace(self, min_gap=length - 2, max_gap=length - 2)

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        inputs_BT = torch.randint(1, self.vocab_size, (n, self.max_gap + 2), generator=generator)
        gaps_B1 = torch.randint(self.min_gap, self.max_gap + 1, (n, 1), generator=generator)
        places = torch.arange(self.max_gap + 2)
        inputs_BT = torch.where(places < gaps_B1 + 1, inputs_BT, 0)
        labels_BT = torch.where(places == gaps_B1 + 1, inputs_BT[:, :1], empty_labels(inputs_BT))
        return Samples(inputs_BT, labels_BT, meta={"gaps": gaps_B1[:, 0]})
