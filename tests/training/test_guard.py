"""Bad steps, best evaluations, averaged parameters."""

from __future__ import annotations

import math

import pytest
import torch

from wkv.training import Ema
from wkv.training.guard import Best, Guard

from .helpers import tiny_model


def test_what_is_not_finite_is_bad_and_counted() -> None:
    guard = Guard(limit=2)
    assert guard.problem(1.0, 1.0) is None
    for bad in ((math.nan, 1.0), (1.0, math.inf)):
        assert "gradient norm" in (guard.problem(*bad) or "")
        assert not guard.exhausted
    guard.problem(math.nan, math.nan)
    assert guard.exhausted
    assert guard.problem(1.0, 1.0) is None
    assert not guard.exhausted


def test_spikes_are_measured_against_the_running_median() -> None:
    guard = Guard(limit=1, spike=3.0)
    assert all(guard.problem(1.0, norm) is None for norm in (500.0, *[1.0] * 18))  # the first steps set no measure
    assert guard.problem(1.0, 100.0) is None
    assert "3.1 times its median" in (guard.problem(1.0, 3.1) or "")
    assert guard.problem(1.0, 2.9) is None
    other = Guard(limit=1, spike=3.0)
    other.load_state_dict(guard.state_dict())
    assert other.problem(1.0, 3.1) == guard.problem(1.0, 3.1) is not None


def test_best_counts_evaluations_since() -> None:
    best = Best()
    assert [best.update(score, step) for step, score in enumerate([3.0, 2.0, 2.0, 2.5, 1.0], 1)] == [1, 1, 0, 0, 1]
    assert (best.score, best.step, best.waited) == (1.0, 5, 0)
    assert Best(**best.state_dict()) == best


def test_the_average_follows_its_formula_and_gives_the_parameters_back() -> None:
    model = tiny_model()
    ema, weight = Ema(model, 0.5), model.head.weight
    expected = weight.detach().clone()
    for step in (1, 2, 30):
        ema.steps = step - 1
        with torch.no_grad():
            weight.add_(1.0)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = expected * decay + weight.detach() * (1 - decay)
    before, place = weight.detach().clone(), weight
    with ema.applied():
        torch.testing.assert_close(model.head.weight.detach(), expected)
    assert torch.equal(model.head.weight, before)
    assert model.head.weight is place
    with pytest.raises(RuntimeError, match="stop"), ema.applied():
        raise RuntimeError("stop")
    assert torch.equal(model.head.weight, before)
