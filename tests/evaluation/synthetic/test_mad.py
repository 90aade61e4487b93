"""MAD's tasks: structure of the native draws, and of the original's samples of fuzzy recall."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.evaluation.synthetic.answers import IGNORED, accuracy_of_constants, asked, rows
from tests.evaluation.synthetic.test_originals import golden
from wkv.evaluation.synthetic import Samples, create_task


@pytest.mark.parametrize(("name", "noise"), [("in_context_recall", 0), ("noisy_recall", 4)])
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(2, 20), st.floats(0, 1), st.integers(0, 9))
def test_recall(name: str, noise: int, keys: int, pairs: int, fraction: float, seed: int) -> None:
    options = {"noise_vocab_size": noise, "noise_fraction": fraction} if noise else {}
    task = create_task(name, vocab_size=max(4, 2 * keys) + noise, length=2 * pairs, **options)
    keys = max(4, 2 * keys) // 2
    train, test = (task.sample(4, seed, split) for split in ("train", "test"))
    assert torch.equal(train.inputs[:, 1:], train.labels[:, :-1])
    assert train.inputs.shape == test.inputs.shape == (4, 2 * pairs - 1)
    for inputs, labels in rows(test):
        tokens = [*inputs, labels[-1]]
        seen: dict[int, int] = {}
        for place in range(0, 2 * pairs, 2):
            key, value = tokens[place : place + 2]
            if key >= 2 * keys:
                assert value >= 2 * keys
                assert labels[place] == IGNORED
                continue
            assert labels[place] == seen.get(key, IGNORED)
            assert key < keys <= seen.setdefault(key, value) == value < 2 * keys
        assert len(asked(labels)) >= 1
        assert labels[-1] != IGNORED
        assert not any(place % 2 for place in asked(labels))


def test_noise_is_as_frequent_as_asked() -> None:
    is_pair = create_task("noisy_recall", length=40, noise_fraction=0.4).sample(2000, 0).meta["is_pair"]
    # Of 20 pairs the last one and a random one are never noise.
    assert abs(float(is_pair.double().mean()) - (2 + 18 * 0.6) / 20) < 0.01


def assert_fuzzy(tokens: Tensor, labels: Tensor, key_sizes: set[int]) -> None:
    """Rows of V=16 with motifs of at most three tokens, and the labels that a test has for them."""
    for row, asks in zip(tokens.tolist(), labels.tolist(), strict=True):
        pads = next(place for place, token in enumerate(row) if token != 15)
        assert pads <= 9  # another pair and a last one of full size would not have fitted
        place, pairs = pads, []
        while place < len(row):
            middle = next(at for at in range(place, len(row)) if row[at] >= 7)
            end = next((at for at in range(middle, len(row)) if row[at] < 7), len(row))
            pairs.append((tuple(row[place:middle]), tuple(row[middle:end]), middle))
            place = end
        values: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = [IGNORED] * len(row)
        for number, (key, value, start) in enumerate(pairs):
            assert len(key) in key_sizes
            assert len(value) in (1, 2, 3)
            assert len(set(key)) == len(key)
            assert len(set(value)) == len(value)
            assert max(value) < 15
            if key in values:
                expected[start : start + len(value)] = value
            elif number == len(pairs) - 1:
                pytest.fail("the last key was not seen before")
            assert values.setdefault(key, value) == value
        assert asks == expected[1:]


@pytest.mark.parametrize("source", ["native", "original"])
def test_fuzzy_recall(source: str) -> None:
    task = create_task("fuzzy_recall")
    found = {}
    for split in ("train", "test"):
        if source == "native":
            found[split] = task.sample(60, 3, split)
        else:
            entry = f"mad_fuzzy_recall.{split}"
            found[split] = Samples(golden()[f"{entry}.inputs"], golden()[f"{entry}.targets"])
        assert found[split].inputs.shape[1] == 128
    train, test = found["train"], found["test"]
    assert torch.equal(train.inputs[:, 1:], train.labels[:, :-1])
    assert_fuzzy(torch.cat([test.inputs, test.labels[:, -1:]], 1), test.labels, {3})
    tokens = torch.cat([train.inputs, train.labels[:, -1:]], 1)
    assert_fuzzy(tokens, _test_labels(tokens), {1, 2, 3})


def _test_labels(tokens: Tensor) -> Tensor:
    """What a test would ask of training rows, by a search for each key in the text before it."""
    labels = torch.full_like(tokens, IGNORED)
    for row, out in zip(tokens.tolist(), labels, strict=True):
        starts = [at for at in range(1, len(row)) if row[at] < 7 and row[at - 1] >= 7] + [len(row)]
        seen = set()
        for start, end in itertools.pairwise(starts):
            middle = next(at for at in range(start, end) if row[at] >= 7)
            if tuple(row[start:middle]) in seen:
                out[middle:end] = torch.tensor(row[middle:end])
            seen.add(tuple(row[start:middle]))
    return labels[:, 1:]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 30), st.sampled_from(["train", "test"]), st.integers(0, 9))
def test_fuzzy_sizes(key: int, value: int, more: int, split: str, seed: int) -> None:
    length = 2 * (key + value) - 1 + more
    task = create_task("fuzzy_recall", vocab_size=9, length=length, key_motif=key, value_motif=value)
    samples = task.sample(5, seed, split)
    assert samples.inputs.shape == (5, length)
    assert (samples.labels[:, -1] >= 4).all()
    assert not (samples.labels[:, -1] == 8).any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 9))
def test_selective_copying(tokens: int, blanks: int, seed: int) -> None:
    task = create_task("selective_copying", vocab_size=6, length=2 * tokens + 1 + blanks, tokens=tokens)
    for inputs, labels in rows(task.sample(5, seed)):
        assert inputs[-tokens - 1] == 5
        assert inputs[-tokens:] == [4] * tokens
        assert [token for token in inputs[: -tokens - 1] if token != 4] == labels[-tokens:]
        assert asked(labels) == list(range(tokens + blanks + 1, 2 * tokens + 1 + blanks))
        assert inputs[-tokens - 2] != 4


def test_compression() -> None:
    for inputs, labels in rows(create_task("compression", vocab_size=5, length=9).sample(5, 0)):
        assert inputs[8:] == [4] * 8
        assert labels[:8] == [IGNORED] * 8
        assert labels[8:] == inputs[:8]
        assert max(inputs[:8]) < 4


def test_memorization_has_one_map() -> None:
    task = create_task("memorization", vocab_size=21, length=12)
    learnt: dict[int, int] = {}
    for split in ("train", "test"):
        for inputs, labels in rows(task.sample(40, 1, split)):
            assert inputs[1::2] == [20] * 6
            assert asked(labels) == [1, 3, 5, 7, 9, 11]
            for key, value in zip(inputs[::2], labels[1::2], strict=True):
                assert key < 10 <= learnt.setdefault(key, value) == value < 20
    assert len(learnt) == len(set(learnt.values())) == 10
    other = create_task("memorization", vocab_size=21, length=12, map_seed=1)
    assert not torch.equal(other.sample(40, 1).labels, task.sample(40, 1).labels)


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall", "selective_copying", "compression"])
def test_chance(name: str) -> None:
    task = create_task(name)
    found = accuracy_of_constants(task.sample(2000, 0, "test"), task.vocab_size)
    assert abs(found - task.chance) < 0.01
