"""Train one model on a synthetic task: AdamW, half a cosine, cross entropy where something is asked.

Training batches, validation samples (the curve, early stopping and the choice of learning rates) and test samples
share nothing; test samples are read once, at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn

from wkv.errors import WkvError
from wkv.evaluation.synthetic.contenders import state_bytes
from wkv.evaluation.synthetic.scoring import Scores, answers, evaluate
from wkv.evaluation.synthetic.streams import (
    Batch,
    Part,
    fresh_batches,
    num_batches,
    repeated_batches,
    test_samples,
    validation_samples,
)
from wkv.layers.config import Check, at_least, between, positive
from wkv.layers.language_model import LanguageModel
from wkv.training.optimizer import create_optimizer, set_learning_rate
from wkv.training.schedule import Schedule

if TYPE_CHECKING:
    import torch

EPS = 1e-8
COUNTS = ("steps", "epochs", "batch_size", "eval_every", "validation_samples", "test_samples")
CHECKS: dict[str, Check] = {
    **dict.fromkeys(COUNTS, at_least(1)),
    **dict.fromkeys(("learning_rate", "clip"), positive),
    **dict.fromkeys(("weight_decay", "warmup", "stop_at"), between(0, 1)),
    "betas": lambda pair: None if isinstance(pair, list | tuple) and len(pair) == 2 else "two numbers",
}
Watch = Callable[[int, int, float, Scores | None], None]


@dataclass(frozen=True)
class Settings:
    """How to train. The budget is `steps` of fresh samples, or `epochs` over a fixed number of samples.

    Args:
        learning_rate: the highest; after the warm-up it falls on half a cosine to 0.
        steps, epochs: exactly one of them.
        batch_size: sequences per step.
        weight_decay: decoupled, of the matrices that the model's own rule names.
        betas: of AdamW.
        clip: largest norm of the gradient.
        warmup: part of the steps in which the rate rises.
        eval_every: steps between two looks at the validation samples.
        validation_samples, test_samples: sequences of each.
        stop_at: validation accuracy that ends the training; None: never.
    """

    learning_rate: float = 3e-3
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 64
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    warmup: float = 0.05
    eval_every: int = 100
    validation_samples: int = 256
    test_samples: int = 512
    stop_at: float | None = 0.99

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise WkvError(f"a budget is either steps or epochs, found steps={self.steps} and epochs={self.epochs}")
        for name, check in CHECKS.items():
            value = getattr(self, name)
            expected = None if value is None and name in ("steps", "epochs", "stop_at") else check(value)
            if expected is not None:
                raise WkvError(f"{name} must be {expected}, found {value!r}")


@dataclass
class Outcome:
    """What came of a run.

    Args:
        steps, seconds: of training alone.
        stopped_early: whether `Settings.stop_at` was reached before the budget was spent.
        curve: step, training loss and validation scores at every evaluation.
        validation: the scores of the last evaluation.
        tests: for every test part its label, length, scores, and bytes of state after a sequence of that length.
    """

    steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    tests: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: LanguageModel,
    parts: Sequence[Part],
    tests: Sequence[Part],
    settings: Settings,
    seed: int = 0,
    watch: Watch | None = None,
) -> Outcome:
    """Train `model` in place, then test it.

    Args:
        model: any language model of the library, on any device.
        parts: what to train on; a batch comes from one of them.
        tests: what to test on at the end.
        settings: budget and optimiser.
        seed: of the training and validation samples. Test samples are the same for every seed.
        watch: called after every step with the steps done and to be done, the loss, and scores where there are new.

    Raises:
        WkvError: if the loss is no longer a number, or the vocabularies do not fit.
    """
    _check_vocabulary(model, [*parts, *tests])
    optimizer = create_optimizer(model, settings.learning_rate, settings.weight_decay, settings.betas, EPS)
    total, stream = _stream(parts, settings, seed)
    schedule = Schedule(settings.learning_rate, 0.0, round(settings.warmup * total))
    held_out = [validation_samples(part, settings.validation_samples, seed) for part in parts]
    outcome = Outcome()
    model.train()
    for step, batch in enumerate(stream):
        start = time.perf_counter()
        progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
        set_learning_rate(optimizer, schedule.learning_rate(step, progress))
        loss = _step(model, batch, optimizer, settings.clip)
        outcome.seconds += time.perf_counter() - start
        outcome.steps = step + 1
        scores = None
        if outcome.steps % settings.eval_every == 0 or outcome.steps == total:
            scores = Scores.mean([evaluate(model, samples, settings.batch_size) for samples in held_out])
            _note(outcome, loss, scores)
        if watch is not None:
            watch(outcome.steps, total, loss, scores)
        if scores is not None and settings.stop_at is not None and scores.accuracy >= settings.stop_at:
            outcome.stopped_early = outcome.steps < total
            break
    outcome.tests = [_test(model, part, settings) for part in tests]
    return outcome


def _stream(parts: Sequence[Part], settings: Settings, seed: int) -> tuple[int, Iterator[Batch]]:
    """Number of steps, and their batches."""
    if settings.steps is not None:
        return settings.steps, fresh_batches(parts, settings.batch_size, settings.steps, seed)
    assert settings.epochs is not None
    total = settings.epochs * num_batches(parts, settings.batch_size)
    return total, repeated_batches(parts, settings.batch_size, settings.epochs, seed)


def _step(model: LanguageModel, batch: Batch, optimizer: torch.optim.Optimizer, clip: float) -> float:
    """One update; returns the loss before it."""
    hidden, labels = answers(model, batch)
    loss = F.cross_entropy(model.forward_head(hidden).float(), labels)
    value = loss.item()
    if not value < math.inf:
        raise WkvError(f"the loss became {value}; try a smaller learning rate")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    optimizer.step()
    return value


def _note(outcome: Outcome, loss: float, scores: Scores) -> None:
    outcome.validation = asdict(scores)
    outcome.curve.append({"step": outcome.steps, "train_loss": loss, **outcome.validation})


def _test(model: LanguageModel, part: Part, settings: Settings) -> dict[str, Any]:
    """One entry of `Outcome.tests`."""
    samples = test_samples(part, settings.test_samples)
    length = samples.inputs.shape[1]
    scores = evaluate(model, samples, settings.batch_size)
    row = {"label": part.label or str(length), "length": length, **asdict(scores)}
    return {**row, "state_bytes": state_bytes(model, length)}


def _check_vocabulary(model: LanguageModel, parts: Sequence[Part]) -> None:
    for part in parts:
        if part.task.vocab_size > model.config.vocab_size:
            found = f"{part.task.name} has {part.task.vocab_size} tokens, the model knows {model.config.vocab_size}"
            raise WkvError(f"{found}; create it with vocab_size={part.task.vocab_size}")
