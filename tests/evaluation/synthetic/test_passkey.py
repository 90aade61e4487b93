"""Passkeys among filler tokens, and first tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import asked, rows
from wkv.evaluation.synthetic import create_task


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 40), st.integers(0, 9))
def test_passkey(payload: int, space: int, seed: int) -> None:
    length = 2 * payload + 1 + space
    samples = create_task("passkey", length=length, payload=payload).sample(6, seed)
    for (inputs, labels), place in zip(rows(samples), samples.meta["places"].tolist(), strict=True):
        assert inputs[place] == inputs[-payload] == 8
        key = inputs[place + 1 : place + 1 + payload]
        assert min(key) > 8
        assert asked(labels) == list(range(length - payload, length))
        assert labels[-payload:] == key
        assert inputs[length - payload :] == [8, *key[:-1]]
        needle = range(place, place + 1 + payload)
        assert all(inputs[at] < 8 for at in range(length - payload) if at not in needle)


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.5, 48), (1.0, 95)])
def test_depth(depth: float, place: int) -> None:
    samples = create_task("passkey", depth=depth).sample(5, 0, length=100)
    assert samples.meta["places"].tolist() == [place] * 5


def test_depths_are_even() -> None:
    places = create_task("passkey", length=14).sample(10_000, 0).meta["places"]
    assert all(850 < count < 1150 for count in places.bincount(minlength=10).tolist())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9), st.integers(0, 6), st.integers(0, 9))
def test_first_token(low: int, more: int, seed: int) -> None:
    samples = create_task("first_token_recall", min_gap=low, max_gap=low + more).sample(6, seed)
    assert samples.inputs.shape == (6, low + more + 2)
    for (inputs, labels), gap in zip(rows(samples), samples.meta["gaps"].tolist(), strict=True):
        assert low <= gap <= low + more
        assert 0 not in inputs[: gap + 1]
        assert not any(inputs[gap + 1 :])
        assert asked(labels) == [gap + 1]
        assert labels[gap + 1] == inputs[0]


def test_chance() -> None:
    assert create_task("passkey").chance == 1 / 23
    assert create_task("first_token_recall", vocab_size=5).chance == 1 / 4
