"""Draws for all rows at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wkv.evaluation.synthetic.draws import distinct, first_places, pick, weighted_distinct

ROWS = 24_000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 30))
def test_distinct_numbers(count: int, more: int, rows: int) -> None:
    found = distinct(rows, count, count + more, generator())
    assert found.shape == (rows, count)
    assert all(len(set(row)) == count and min(row) >= 0 and max(row) < count + more for row in found.tolist())


@pytest.mark.parametrize(("count", "size"), [(3, 4), (2, 8)])  # by sorting, by drawing again
def test_ordered_choices_are_equally_likely(count: int, size: int) -> None:
    found = distinct(ROWS, count, size, generator())
    codes = (found * size ** torch.arange(count)).sum(1).bincount()
    choices = len(list(itertools.permutations(range(size), count)))
    counts = codes[codes > 0].double()
    assert len(counts) == choices
    expected = ROWS / choices
    squares = float(((counts - expected) ** 2 / expected).sum())
    assert squares < choices - 1 + 4 * (2 * (choices - 1)) ** 0.5


def test_weighted_choices_follow_one_after_the_other() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0])
    found = weighted_distinct(ROWS, 2, weights, generator())
    for first, second in itertools.permutations(range(3), 2):
        expected = float(weights[first] / 8 * weights[second] / (8 - weights[first]))
        share = float(((found[:, 0] == first) & (found[:, 1] == second)).double().mean())
        assert abs(share - expected) < 0.015


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 5), min_size=6, max_size=6), min_size=1, max_size=5))
def test_first_places(ids: list[list[int]]) -> None:
    assert first_places(torch.tensor(ids)).tolist() == [[row.index(one) for one in row] for row in ids]


def test_pick_is_even_among_the_allowed() -> None:
    allowed = torch.tensor([False, True, True, False, True]).repeat(6000, 1)
    counts = pick(allowed, generator()).bincount(minlength=5).tolist()
    assert counts[0] == counts[3] == 0
    assert all(1850 < counts[place] < 2150 for place in (1, 2, 4))
