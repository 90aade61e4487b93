"""Multi-query recall: structure of the native draws."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import asked, rows
from wkv.evaluation.synthetic import create_task


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.integers(0, 40), st.booleans(), st.integers(0, 9))
def test_every_key_is_asked_for_once(pairs: int, space: int, words: int, noise: bool, seed: int) -> None:
    length, vocab_size = 4 * pairs + 2 * space, 2 * pairs + 2 + words
    task = create_task("mqar", vocab_size=vocab_size, length=length, pairs=pairs, noise=noise)
    samples = task.sample(4, seed)
    assert samples.inputs.shape == (4, length)
    for inputs, labels in rows(samples):
        keys, values = inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        places = asked(labels)
        assert sorted(inputs[place] for place in places) == sorted(keys)
        assert all(place % 2 == 0 and place >= 2 * pairs for place in places)
        assert all(labels[place] == values[keys.index(inputs[place])] for place in places)
        if not noise:
            assert not any(inputs[place] for place in range(2 * pairs, length) if place not in places)


def test_noise_fills_the_gaps_with_everything() -> None:
    quiet, noisy = (create_task("mqar", vocab_size=64, noise=noise).sample(50, 0) for noise in (False, True))
    assert torch.equal(quiet.labels, noisy.labels)
    gaps = quiet.inputs == 0
    assert torch.equal(quiet.inputs[~gaps], noisy.inputs[~gaps])
    assert set(noisy.inputs[gaps].tolist()) == set(range(64))


def test_a_small_power_keeps_queries_close() -> None:
    near, even = (
        create_task("mqar", vocab_size=64, length=128, pairs=2, power=power).sample(4000, 0).meta["gaps"][:, 0]
        for power in (0.01, 1.0)
    )
    weights = torch.arange(1, 63, dtype=torch.float64) ** -0.99
    assert abs(float((near == 0).double().mean()) - float(weights[0] / weights.sum())) < 0.025
    assert abs(float(even.double().mean()) - 30.5) < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.data(), st.integers(0, 9))
def test_the_last_value_counts(pairs: int, data: st.DataObject, seed: int) -> None:
    updates = data.draw(st.integers(1, pairs))
    context = 2 * (pairs + updates)
    task = create_task("mqar_updates", vocab_size=20, length=context + 2 * pairs + 4, pairs=pairs, updates=updates)
    for inputs, labels in rows(task.sample(4, seed)):
        values: dict[int, int] = {}
        for key, value in zip(inputs[:context:2], inputs[1:context:2], strict=True):
            assert values.get(key) != value
            values[key] = value
        places = asked(labels)
        assert len(values) == len(places) == pairs
        assert {inputs[place]: labels[place] for place in places} == values


def test_all_new_values_are_equally_likely() -> None:
    samples = create_task("mqar_updates", vocab_size=8, length=8, pairs=1, updates=1).sample(6000, 0)
    change = (samples.inputs[:, 3] - samples.inputs[:, 1]) % 4
    assert all(1850 < count < 2150 for count in change.bincount()[1:].tolist())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(0, 7), st.integers(0, 9))
def test_both_tokens_name_the_value(side: int, space: int, seed: int) -> None:
    pairs, vocab_size = side**2, 30
    task = create_task("mqar_compositional", vocab_size=vocab_size, length=6 * pairs + space, pairs=pairs)
    for inputs, labels in rows(task.sample(4, seed)):
        context = [tuple(inputs[place : place + 3]) for place in range(0, 3 * pairs, 3)]
        first, second, values = (set(column) for column in zip(*context, strict=True))
        assert len(first) == len(second) == side
        assert len(values) == len({triple[:2] for triple in context}) == pairs
        assert max(first) < 10 <= min(second) <= max(second) < 20 <= min(values)
        queries = {(inputs[place - 1], inputs[place], labels[place]) for place in asked(labels)}
        assert queries == set(context)


def test_chance() -> None:
    assert create_task("mqar", vocab_size=64).chance == 1 / 32
    assert create_task("mqar_compositional", vocab_size=30).chance == 1 / 10
