"""Scores, against a count by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wkv.errors import WkvError
from wkv.evaluation.synthetic.scoring import Scores, evaluate

from .helpers import FakeSamples, tiny


def random_samples(masked: bool = False) -> FakeSamples:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(8, (9, 7), generator=generator)
    labels = torch.where(torch.rand(9, 7, generator=generator) < 0.5, inputs, -100)
    labels[4] = -100  # nothing is asked here
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[2, :3] = False
    labels[2, :3] = -100
    return FakeSamples(inputs, labels, mask if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_equal_a_count_by_hand(masked: bool, batch_size: int) -> None:
    model, samples = tiny(), random_samples(masked)
    with torch.no_grad():
        logits = model(samples.inputs, mask=samples.mask).logits
    told = (samples.labels >= 0) & (torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) < 0.7)
    samples.labels[told] = logits.argmax(-1)[told]
    shares, whole, last, losses = [], [], [], []
    for row, labels in zip(logits, samples.labels, strict=True):
        asked = [t for t, label in enumerate(labels.tolist()) if label >= 0]
        if asked:
            right = [int(row[t].argmax()) == int(labels[t]) for t in asked]
            shares.append(sum(right) / len(right))
            whole.append(all(right))
            last.append(right[-1])
        losses += [float(F.cross_entropy(row[t], labels[t])) for t in asked]
    found = evaluate(model, samples, batch_size)  # type: ignore[arg-type]
    expected = [sum(column) / len(column) for column in (shares, whole, last, losses)]
    assert list(vars(found).values()) == pytest.approx(expected, abs=1e-6)
    assert 0 < found.sequence_accuracy < found.accuracy < 1
    assert model.training


def test_samples_that_ask_for_nothing_are_refused() -> None:
    samples = random_samples()
    samples.labels[:] = -100
    with pytest.raises(WkvError, match="ask for nothing"):
        evaluate(tiny(), samples)  # type: ignore[arg-type]


def test_the_mean_of_scores() -> None:
    assert Scores.mean([Scores(0, 0.5, 1, 2), Scores(1, 0.5, 0, 4)]) == Scores(0.5, 0.5, 0.5, 3)
