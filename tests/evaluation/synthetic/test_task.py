"""What all tasks have in common."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from wkv.errors import WkvError
from wkv.evaluation.synthetic import Task, VaryingTask, create_task, list_tasks
from wkv.evaluation.synthetic.languages import Language
from wkv.evaluation.synthetic.task import stream

SMALL: dict[str, dict[str, Any]] = {"mqar": {"vocab_size": 64}, "memorization": {"vocab_size": 20}}
all_tasks = pytest.mark.parametrize("name", list_tasks())


def small(name: str) -> Task:
    return create_task(name, **SMALL.get(name, {}))


@all_tasks
def test_samples_are_tokens_and_answers(name: str) -> None:
    task = small(name)
    for split in ("train", "test"):
        samples = task.sample(50, 1, split)
        assert samples.inputs.dtype == samples.labels.dtype == torch.int64
        assert samples.inputs.shape == samples.labels.shape
        assert samples.inputs.min() >= 0
        assert samples.inputs.max() < task.vocab_size
        asked = samples.labels != -100
        assert asked.any(1).all()
        assert samples.labels[asked].min() >= 0
        assert samples.labels[asked].max() < task.vocab_size
        assert samples.mask is None
        assert all(len(values) == 50 for values in samples.meta.values())


@all_tasks
def test_the_same_seed_gives_the_same_samples_and_another_one_does_not(name: str) -> None:
    task = small(name)
    first, again = task.sample(20, 7), task.sample(20, 7)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    others = [task.sample(20, 8), task.sample(20, 7, "test"), task.sample(20, 7 + 2**32), task.sample(20, -7)]
    assert not any(torch.equal(first.inputs, other.inputs) for other in others)


@all_tasks
def test_global_generators_do_not_matter(name: str) -> None:
    task = small(name)
    torch.manual_seed(1)
    first, before = task.sample(5, 0).inputs, torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(task.sample(5, 0).inputs, first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


@all_tasks
def test_options_are_complete(name: str) -> None:
    task = small(name)
    again = create_task(name, **task.options)
    assert again == task
    assert torch.equal(again.sample(3, 0).inputs, task.sample(3, 0).inputs)
    assert task.name == name
    assert 0 < task.chance < 0.6


@all_tasks
def test_other_lengths(name: str) -> None:
    task = small(name)
    widths = [task.sample(3, 0, "test", length).inputs.shape[1] for length in (100, 144)]
    assert widths[1] == {"compression": 286}.get(name, 144 - (name in ("in_context_recall", "noisy_recall")))
    assert widths[0] < widths[1]
    if "length" not in task.options:
        assert all((task.sample(3, 0, "train", 100).labels[:, 99] >= 0).tolist()) or name == "modular_arithmetic"


def test_streams_of_the_splits_are_disjoint() -> None:
    seeds = [0, 1, -1, 2**32, 2**64 + 3, *range(1000, 3000)]
    train, test = ({stream(seed, split).initial_seed() for seed in seeds} for split in ("train", "test"))
    assert not train & test
    assert len(train) == len(test) == len(seeds)
    assert max(train | test) < 2**32  # torch would drop the rest


def test_lengths_of_rows_vary_evenly() -> None:
    for name in ("parity", "running_parity", "group_s3", "modular_arithmetic_brackets"):
        task = create_task(name, min_length=4, max_length=7)
        assert isinstance(task, VaryingTask)
        counts = task.sample(4000, 0).meta["lengths"].bincount().tolist()
        assert counts[:4] == [0, 0, 0, 0]
        assert all(850 < count < 1150 for count in counts[4:])


def test_a_context_is_wider_than_its_rows() -> None:
    task = create_task("parity", max_length=6, context_length=9)
    assert isinstance(task, Language)
    assert task.sample(4, 0).inputs.shape == (4, 9)
    assert task.sample(4, 0, length=5).inputs.shape == (4, 5)


def test_big_samples_take_seconds() -> None:
    start = time.perf_counter()
    samples = create_task("mqar", vocab_size=8192, length=64, pairs=4).sample(100_000, 0)
    assert samples.inputs.shape == (100_000, 64)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mqr", {}, "task 'mqr' is unknown; one of compression, "),
        ("mqar", {"keys": 3}, "mqar has no option 'keys'; one of length, noise, pairs, power, vocab_size"),
        ("mqar", {"pairs": 4.0}, "mqar: pairs must be a positive integer, found 4.0"),
        ("mqar", {"pairs": True}, "pairs must be a positive integer, found True"),
        ("mqar", {"noise": 1}, "noise must be true or false, found 1"),
        ("mqar", {"power": 0}, "power must be a positive number, found 0"),
        ("mqar", {"power": math.nan}, "power must be a positive number, found nan"),
        ("mqar", {"length": 33}, "mqar: length must be even, found 33"),
        ("mqar", {"pairs": 17}, "17 pairs need a length of at least 68, found 64"),
        ("mqar", {"vocab_size": 8}, "4 pairs need a vocabulary of at least 10, found 8"),
        ("mqar_updates", {"updates": 5}, "updates must not be above pairs, found 5 of 4"),
        ("mqar_compositional", {"pairs": 5}, "pairs must be a square number, found 5"),
        ("mqar_compositional", {"vocab_size": 9, "pairs": 4}, "4 pairs need a larger vocabulary than 9"),
        ("in_context_recall", {"length": 7}, "length must be even, found 7"),
        ("in_context_recall", {"vocab_size": 15}, "vocab_size must be even, found 15"),
        ("noisy_recall", {"noise_vocab_size": 31}, "noise_vocab_size must be even and leave"),
        ("noisy_recall", {"noise_vocab_size": 32}, "noise_vocab_size must be even and leave"),
        ("noisy_recall", {"noise_fraction": 1.5}, "noise_fraction must be a number in"),
        ("fuzzy_recall", {"vocab_size": 6}, "motifs of 3 and 3 tokens need a larger vocabulary"),
        ("fuzzy_recall", {"length": 10}, "length must be at least 11, found 10"),
        ("selective_copying", {"length": 32}, "16 tokens need a length of at least 33, found 32"),
        ("memorization", {"length": 5}, "length must be even, found 5"),
        ("parity", {"min_length": 9, "max_length": 5}, "lengths must satisfy 2 <= min_length <= max_length"),
        ("even_pairs", {"min_length": 2}, "lengths must satisfy 3 <= min_length <= max_length"),
        ("parity", {"context_length": 8}, "context_length 8 is below max_length 40"),
        ("group_a5", {"moved_points": 2}, "no element but the identity moves at most 2 points"),
        ("group_s3", {"bos": True, "min_length": 1}, "min_length must be at least 2 with bos"),
        ("copying", {"min_symbols": 20}, "min_symbols 20 is above max_symbols 16"),
        ("passkey", {"fillers": 31}, "31 fillers leave no payload in a vocabulary of 32"),
        ("passkey", {"length": 4}, "length must be at least 5, found 4"),
        ("passkey", {"depth": 2}, "depth must be a number in"),
        ("first_token_recall", {"min_gap": 40}, "min_gap 40 is above max_gap 30"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WkvError) as caught:
        create_task(name, **options)
    assert words in str(caught.value)
    assert str(caught.value).count(f"{name}: ") <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n must be a positive integer, found 0"),
        ({"seed": 1.5}, "seed must be an integer, found 1.5"),
        ({"split": "valid"}, "split must be 'train' or 'test', found 'valid'"),
        ({"compat": "mad"}, "compat must be one of xlstm, zoology, found 'mad'"),
        ({"compat": "zoology", "seed": 2**32}, "seed must be in [0, 2^32)"),
        ({"compat": "xlstm", "seed": -1}, "seed must be in [0, 2^32)"),
        ({"compat": "zoology"}, "compat='zoology' has one length"),
        ({"length": 1}, "lengths must satisfy 2 <= min_length"),
        ({"length": "9"}, "min_length must be a positive integer, found '9'"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(WkvError, match="parity: ") as caught:
        create_task("parity").sample(**{"n": 2, "seed": 0, **arguments})
    assert words in str(caught.value)


def test_a_task_without_original() -> None:
    with pytest.raises(WkvError, match="majority: compat must be one of nothing, found 'xlstm'"):
        create_task("majority").sample(2, 0, compat="xlstm")
