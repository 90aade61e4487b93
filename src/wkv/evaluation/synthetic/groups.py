"""Word problems of finite groups: every place asks for the product of all elements so far.

Source: Merrill et al., "The Illusion of State in State-Space Models", arXiv 2404.08819 (code jopetty/word-problem);
swaps only: "Unlocking State-Tracking in Linear RNNs", arXiv 2411.12537. Its circuit complexity makes S5 and A5 harder
than the other groups here for models that compute in parallel. Draws are ours.

Products are read from the left: a permutation p is the tuple (p(0), p(1), ...), and p q means first p, then q.

Shape letters: B rows, T time, G elements.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from wkv.evaluation.synthetic.task import Samples, VaryingTask, empty_labels, register
from wkv.layers.config import at_least, flag, option

Permutation = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GroupWords(VaryingTask):
    """A token is the place of an element in `elements`; the identity is 0. Behind a row's end stands 0, unasked.

    Args:
        moved_points: read only elements that move at most this many points: with 2 the identity and the swaps, with 3
            the cycles of three as well. None: all elements. For groups of permutations.
        bos: begin each row with a token of its own, the last of the vocabulary, where nothing is asked. It counts in
            the length.
    """

    min_length: int = 3
    max_length: int = 32
    moved_points: int | None = option(None, at_least(2))
    bos: bool = option(False, flag)
    group: ClassVar[str]

    def check(self) -> None:
        super().check()
        if self.moved_points is not None and len(self.readable) < 2:
            found = f"no element but the identity moves at most {self.moved_points} points"
            raise self.fail(f"{found}; leave moved_points out")
        if self.min_length < 1 + self.bos:
            raise self.fail("min_length must be at least 2 with bos")

    @property
    def vocab_size(self) -> int:
        return len(elements(self.group)) + self.bos

    @property
    def readable(self) -> list[int]:
        """Elements that may occur in a row."""
        if self.moved_points is None:
            return list(range(len(elements(self.group))))
        return [place for place, one in enumerate(elements(self.group)) if _moved(one) <= self.moved_points]

    @property
    def chance(self) -> float:
        highest = self._highest()
        means = [np.mean(highest[: length - self.bos]) for length in self.lengths]
        return float(np.mean(means))

    def _highest(self) -> list[float]:
        """Probability of the most frequent product of 1, 2, ... elements."""
        table, read = multiplication_table(self.group).numpy(), self.readable
        odds = np.zeros(len(table))
        odds[read] = 1 / len(read)
        highest = []
        for _ in range(self.max_length - self.bos):
            highest.append(float(odds.max()))
            following = np.zeros_like(odds)
            for one in read:
                following[table[:, one]] += odds / len(read)
            odds = following
        return highest

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        size = self.max_length - self.bos
        read = torch.tensor(self.readable)
        inputs_BT = read[torch.randint(len(read), (n, size), generator=generator)]
        lengths_B = self.draw_lengths(n, generator)
        exists = torch.arange(size) < lengths_B[:, None] - int(self.bos)
        inputs_BT = torch.where(exists, inputs_BT, 0)
        labels_BT = torch.where(exists, products(inputs_BT, self.group), empty_labels(inputs_BT))
        if self.bos:
            inputs_BT = torch.cat([inputs_BT.new_full((n, 1), self.vocab_size - 1), inputs_BT], 1)
            labels_BT = torch.cat([empty_labels(inputs_BT[:, :1]), labels_BT], 1)
        return Samples(inputs_BT, labels_BT, meta={"lengths": lengths_B})


@register("group_s3")
class GroupS3(GroupWords):
    """S3: the 6 permutations of 3 things."""

    group = "s3"


@register("group_s4")
class GroupS4(GroupWords):
    """S4: 24 permutations; solvable."""

    group = "s4"


@register("group_s5")
class GroupS5(GroupWords):
    """S5: 120 permutations; not solvable."""

    group = "s5"


@register("group_a5")
class GroupA5(GroupWords):
    """A5: the 60 even permutations of 5 things; the smallest group that is not solvable."""

    group = "a5"


@register("group_z60")
class GroupZ60(GroupWords):
    """Z60: addition modulo 60; commutative."""

    group = "z60"


@register("group_a4xz5")
class GroupA4Z5(GroupWords):
    """A4 x Z5: the 12 even permutations of 4 things, each with a number modulo 5; solvable, not commutative.

    Written as permutations of 9 points: four of A4, and a circle of five.
    """

    group = "a4xz5"


@functools.cache
def elements(group: str) -> tuple[Permutation, ...]:
    """All elements of a group as permutations, the identity first, the others in lexicographic order.

    Element 5 p + z of A4 x Z5 is the p-th of A4 with z; element z of Z60 is the rotation by z.
    """
    if group == "a4xz5":
        turns = [tuple(4 + (point + turn) % 5 for point in range(5)) for turn in range(5)]
        return tuple(first + turn for first in elements("a4") for turn in turns)
    points = int(group[1:])
    if group[0] == "z":
        return tuple(tuple((point + turn) % points for point in range(points)) for turn in range(points))
    found = itertools.permutations(range(points))
    return tuple(one for one in found if group[0] == "s" or _is_even(one))


@functools.cache
def multiplication_table(group: str) -> Tensor:
    """int64 [G, G]: `table[g, h]` is the place of g h, first g, then h."""
    listed = elements(group)
    places = {one: place for place, one in enumerate(listed)}
    rows = [[places[tuple(second[point] for point in first)] for second in listed] for first in listed]
    return torch.tensor(rows)


def products(tokens_BT: Tensor, group: str) -> Tensor:
    """int64 [B, T]: the product of the elements up to each place."""
    table = multiplication_table(group)
    out = [tokens_BT[:, 0]]
    for place in range(1, tokens_BT.shape[1]):
        out.append(table[out[-1], tokens_BT[:, place]])
    return torch.stack(out, 1)


def _is_even(permutation: Permutation) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0


def _moved(permutation: Permutation) -> int:
    return sum(point != place for place, point in enumerate(permutation))
