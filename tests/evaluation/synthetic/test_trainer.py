"""Training on a task that can be learnt in a moment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wkv.errors import WkvError
from wkv.evaluation.synthetic.streams import Part
from wkv.evaluation.synthetic.trainer import Outcome, Settings, train

from .helpers import Echo, tiny

QUICK = Settings(learning_rate=2e-2, steps=60, batch_size=16, eval_every=20, validation_samples=32, test_samples=40)


def run(settings: Settings = QUICK, seed: int = 0, watch: Any = None, **part: Any) -> Outcome:
    task: Any = Echo()
    return train(tiny("rwkv7"), [Part(task, **part)], [Part(task), Part(task, length=12)], settings, seed, watch)


def test_it_learns_stops_and_tests_beyond_the_trained_length() -> None:
    found = run()
    assert found.stopped_early
    assert found.steps < 60
    assert found.steps % 20 == 0
    assert [point["step"] for point in found.curve] == list(range(20, found.steps + 1, 20))
    assert found.validation["accuracy"] >= 0.99
    assert found.curve[-1]["train_loss"] < 0.5 < math.log(8)
    assert [(test["label"], test["length"]) for test in found.tests] == [("6", 6), ("12", 12)]
    assert min(test["accuracy"] for test in found.tests) > 0.95
    assert found.seconds > 0


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    settings = Settings(steps=10, batch_size=4, eval_every=5, stop_at=None, validation_samples=8, test_samples=8)
    first, same, other = (run(settings, seed) for seed in (1, 1, 2))
    assert first.curve == same.curve
    assert first.tests == same.tests
    assert first.curve != other.curve
    assert [point["step"] for point in first.curve] == [5, 10]
    assert not first.stopped_early


def test_epochs_over_a_fixed_number_of_samples() -> None:
    settings = Settings(epochs=3, batch_size=16, stop_at=None, validation_samples=8, test_samples=8)
    watched: list[tuple[int, int]] = []
    found = run(settings, watch=lambda step, total, loss, scores: watched.append((step, total)), samples=40)
    assert watched == [(step, 9) for step in range(1, 10)]
    assert [point["step"] for point in found.curve] == [9]  # the end is always looked at


def test_the_first_loss_is_that_of_the_asked_positions() -> None:
    losses: list[float] = []
    settings = Settings(steps=1, batch_size=4, validation_samples=8, test_samples=8)
    run(settings, watch=lambda step, total, loss, scores: losses.append(loss))
    samples = Echo().sample(4, 0)
    logits = tiny("rwkv7")(samples.inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), samples.labels.flatten())  # -100 is left out
    assert losses == [pytest.approx(expected.item(), abs=1e-6)]


def test_the_learning_rate_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    from wkv.evaluation.synthetic import trainer

    rates: list[float] = []
    original = trainer.set_learning_rate
    monkeypatch.setattr(trainer, "set_learning_rate", lambda o, rate: (rates.append(rate), original(o, rate)))
    run(Settings(learning_rate=0.01, steps=20, warmup=0.25, batch_size=2, validation_samples=4, test_samples=4))
    assert rates[:6] == sorted(rates[:6])
    assert rates[5] == max(rates) == pytest.approx(0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.005 * (1 + math.cos(math.pi * 14 / 15)))


def test_weights_that_are_no_numbers_end_the_run() -> None:
    model = tiny()
    torch.nn.init.constant_(model.emb.weight, float("nan"))
    task: Any = Echo()
    with pytest.raises(WkvError, match="the loss became nan; try a smaller learning rate"):
        train(model, [Part(task)], [], QUICK)


def test_a_vocabulary_that_is_too_small() -> None:
    task: Any = Echo()
    with pytest.raises(WkvError, match="echo has 8 tokens, the model knows 7; create it with vocab_size=8"):
        train(tiny(vocab_size=7), [Part(task)], [], QUICK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 1, "epochs": 1}, "either steps or epochs"),
        ({"steps": 0}, "steps must be a positive integer, found 0"),
        ({"steps": 1, "batch_size": 2.5}, "batch_size must be a positive integer"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"steps": 1, "warmup": "yes"}, r"warmup must be a number in \[0, 1\]"),
        ({"steps": 1, "betas": 0.9}, "betas must be two numbers"),
        ({"steps": 1, "stop_at": 99}, "stop_at must be"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        Settings(**fields)
