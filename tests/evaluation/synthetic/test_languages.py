"""Formal languages: answers by other means, and the stated chance."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import accuracy_of_constants, asked, rows
from wkv.evaluation.synthetic import create_task

ANSWERS = {
    "parity": lambda symbols: 1 + symbols.count(2) % 2,
    "even_pairs": lambda symbols: 1 + sum(a != b for a, b in itertools.pairwise(symbols)) % 2,
    "majority": lambda symbols: 1 + (symbols.count(2) > symbols.count(1)),
    "cycle_navigation": lambda symbols: 4 + (symbols.count(2) - symbols.count(3)) % 5,
}


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=15, deadline=None)
@given(st.integers(3, 12), st.integers(0, 8), st.integers(0, 3), st.integers(0, 9))
def test_answers(name: str, low: int, more: int, space: int, seed: int) -> None:
    high = low + more
    task = create_task(name, min_length=low, max_length=high, context_length=high + space)
    samples = task.sample(8, seed)
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        assert low <= length <= high
        assert len(inputs) == high + space
        symbols = inputs[: length - 1]
        assert 0 not in symbols
        assert not any(inputs[length - 1 :])
        assert asked(labels) == [length - 1]
        assert labels[length - 1] == ANSWERS[name](symbols)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 9))
def test_running_parity(low: int, more: int, seed: int) -> None:
    samples = create_task("running_parity", min_length=low, max_length=low + more).sample(8, seed)
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        assert len(inputs) == low + more
        assert asked(labels) == list(range(length))
        assert labels[:length] == [sum(inputs[: place + 1]) % 2 for place in range(length)]
        assert not any(inputs[length:])


@pytest.mark.parametrize("length", [3, 4, 5, 8, 21])
@pytest.mark.parametrize("name", ANSWERS)
def test_chance(name: str, length: int) -> None:
    task = create_task(name, min_length=length, max_length=length)
    assert abs(accuracy_of_constants(task.sample(20_000, 0, "test"), task.vocab_size) - task.chance) < 0.015


def test_chance_of_several_lengths_is_their_mean() -> None:
    alone = [create_task("cycle_navigation", min_length=length, max_length=length).chance for length in (3, 4, 5)]
    together = create_task("cycle_navigation", min_length=3, max_length=5).chance
    assert together == pytest.approx(sum(alone) / 3)


def test_originals_are_answered_by_the_same_rules() -> None:
    samples = create_task("cycle_navigation", cycle=5, max_length=20).sample(50, 3, compat="xlstm")
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        assert labels[length - 1] == ANSWERS["cycle_navigation"](inputs[: length - 1])
