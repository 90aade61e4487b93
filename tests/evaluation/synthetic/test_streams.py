"""Which samples a run sees, and in which order."""

from __future__ import annotations

import pytest
import torch

from wkv.errors import WkvError
from wkv.evaluation.synthetic import streams
from wkv.evaluation.synthetic.streams import Part

from .helpers import Echo


def part(samples: int | None = None, length: int | None = None) -> Part:
    return Part(Echo(20), samples, length)  # type: ignore[arg-type]


def test_streams_steps_and_seeds_share_nothing() -> None:
    drawn = [streams.test_samples(part(), 4)]
    drawn += [streams.validation_samples(part(), 4, seed) for seed in range(3)]
    drawn += [streams.training_samples(part(), 4, seed, step) for seed in range(2) for step in range(3)]
    texts = {tuple(samples.inputs.flatten().tolist()) for samples in drawn}
    assert len(texts) == len(drawn)
    assert torch.equal(streams.test_samples(part(), 4).inputs, drawn[0].inputs)


def test_fresh_batches_take_the_parts_in_turn() -> None:
    found = list(streams.fresh_batches([part(), part(length=9)], 5, 4, seed=1))
    assert [list(batch.inputs.shape) for batch in found] == [[5, 20], [5, 9], [5, 20], [5, 9]]
    assert not torch.equal(found[0].inputs, found[2].inputs)


def test_repeated_batches_are_the_same_in_every_epoch_part_after_part() -> None:
    parts = [part(5), part(4, length=9)]
    found = [batch.inputs for batch in streams.repeated_batches(parts, 2, 2, seed=1)]
    assert [list(x.shape) for x in found] == 2 * [[2, 20], [2, 20], [1, 20], [2, 9], [2, 9]]
    assert all(torch.equal(a, b) for a, b in zip(found[:5], found[5:], strict=True))
    assert streams.num_batches(parts, 2) == 5


def test_epochs_need_a_number_of_samples() -> None:
    with pytest.raises(WkvError, match="needs the number of samples of echo"):
        streams.num_batches([part()], 2)


def test_sample_length() -> None:
    assert (streams.sample_length(part()), streams.sample_length(part(length=9))) == (20, 9)
