"""Eight transforms of short strings, and rows of examples of them.

A row is `BOS [instruction] x > y END x > y END ...`: examples of one transform, whose instruction may be missing. The
loss counts the answers and the END behind each. Letters are 0 .. 7 here; capitals 8 .. 15 only occur in answers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from wkv.data import Batch

LETTERS, LENGTH = 8, 4
PAD, BOS, SEP, END = range(4)

Letters = tuple[int, ...]
TRANSFORMS: dict[str, Callable[[Letters], Iterable[int]]] = {
    "reverse": lambda x: x[::-1],
    "sort": sorted,
    "dedupe": dict.fromkeys,  # later repetitions go
    "shift": lambda x: ((letter + 1) % LETTERS for letter in x),
    "swap": lambda x: (x[i ^ 1] for i in range(LENGTH)),  # the letters of each pair
    "rotate": lambda x: (*x[1:], x[0]),  # the first letter goes to the end
    "double": lambda x: (letter for letter in x for _ in range(2)),
    "upper": lambda x: (letter + LETTERS for letter in x),
}
FIRST_LETTER = END + 1 + len(TRANSFORMS)
VOCABULARY = FIRST_LETTER + 2 * LETTERS


class Row(NamedTuple):
    """Strings that are transformed one after the other.

    Args:
        name: of the transform.
        strings: x of each example.
        instructed: whether the row says which transform it is.
    """

    name: str
    strings: Sequence[Letters]
    instructed: bool = False


class Split(NamedTuple):
    """All strings in three parts: for training, for choosing learning rates, for the result."""

    train: list[Letters]
    validation: list[Letters]
    test: list[Letters]


def split(seed: int) -> Split:
    """80, 10 and 10 per cent of all strings of `LENGTH` letters."""
    every = list(itertools.product(range(LETTERS), repeat=LENGTH))
    random.Random(seed).shuffle(every)
    tenth = len(every) // 10
    return Split(every[2 * tenth :], every[:tenth], every[tenth : 2 * tenth])


def batch(rows: Sequence[Row], last_only: bool = False) -> Batch:
    """Rows padded on the right; `last_only`: the loss counts the answers to the last strings alone."""
    lines = [_line(row, last_only) for row in rows]
    size = max(len(ids) for ids, _ in lines)
    ids = torch.tensor([ids + [PAD] * (size - len(ids)) for ids, _ in lines])
    counts = torch.tensor([counts + [False] * (size - len(counts)) for _, counts in lines])
    exists = torch.tensor([[place < len(ids) - 1 for place in range(size - 1)] for ids, _ in lines])
    return Batch(ids[:, :-1], ids[:, 1:], counts[:, 1:], mask=exists)


def _line(row: Row, last_only: bool) -> tuple[list[int], list[bool]]:
    """Tokens, and whether each is part of an answer that counts."""
    ids = [BOS] + [END + 1 + list(TRANSFORMS).index(row.name)] * row.instructed
    counts = [False] * len(ids)
    for number, x in enumerate(row.strings):
        question = [*(FIRST_LETTER + letter for letter in x), SEP]
        answer = [*(FIRST_LETTER + letter for letter in TRANSFORMS[row.name](x)), END]
        ids += question + answer
        counted = not last_only or number + 1 == len(row.strings)
        counts += [False] * len(question) + [counted] * len(answer)
    return ids, counts
