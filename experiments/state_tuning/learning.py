"""The models, their pre-training on the mixture, and the tuning of one adapter on one transform."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from strings import TRANSFORMS, VOCABULARY, Letters, Row, batch, split
from torch import nn

import wkv
from wkv import tuning
from wkv.data import Batch
from wkv.training import Schedule, head_loss

BETAS, CLIP = (0.9, 0.99), 1.0
EXAMPLES = 5  # in a row of pre-training: up to four to learn from, and a question
ATTENTION = ("att.receptance", "att.key", "att.value", "att.output")


@dataclass(frozen=True)
class Size:
    """Of a model, and how it is pre-trained.

    Args:
        num_layers, hidden_size, low_rank: L, D, and the width of all low-rank maps.
        steps, rate: of pre-training.
    """

    num_layers: int
    hidden_size: int
    low_rank: int
    steps: int
    rate: float

    def build(self) -> Any:
        """A new RWKV-7 with official initial values."""
        ranks = {f"{name}_rank": self.low_rank for name in ("decay", "iclr", "value", "gate")}
        return wkv.create_model(
            "rwkv7", vocab_size=VOCABULARY, hidden_size=self.hidden_size, num_layers=self.num_layers, head_size=16,
            ffn_size=2 * self.hidden_size, **ranks,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is trained and tested.

    Args:
        small, large: the models.
        rows: B of pre-training (each row has `EXAMPLES` examples) and of tuning (one each).
        instructed: share of rows that name their transform in pre-training.
        steps: of tuning.
        samples: how many strings the tuned see.
        transforms: those that are tuned for.
        swept: those learning rates are chosen on, with the first seed.
        seeds: of pre-training, data and adapters.
        rates: learning rates tried first; `ladder`: all that may be tried while the best is at an edge.
        scored: strings of a validation or test set.
    """

    small: Size
    large: Size
    rows: int
    instructed: float
    steps: int
    samples: tuple[int, ...]
    transforms: tuple[str, ...]
    swept: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    ladder: tuple[float, ...]
    scored: int

    def settings(self) -> dict[str, Any]:
        """What makes two runs comparable."""
        chosen = ("transforms", "swept", "seeds", "rates", "ladder", "samples", "small", "large")
        return {name: value for name, value in asdict(self).items() if name not in chosen}


PLAN = Plan(
    small=Size(2, 32, 8, 1000, 2e-2), large=Size(3, 64, 16, 700, 1e-2), rows=16, instructed=0.5, steps=100,
    samples=(64, 512), transforms=("reverse", "sort", "shift", "double"), swept=("reverse", "double"),
    seeds=(0, 1, 2), rates=(1e-2, 3e-2, 1e-1), ladder=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), scored=200,
)  # fmt: skip


def loss_of(model: Any, data: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens in nats."""
    hidden, _ = model.forward_features(data.inputs, mask=data.mask)
    return head_loss(hidden, model.head, data.targets, data.loss_mask, l2wrap=0, exists=data.mask)


@torch.no_grad()
def scores(model: Any, data: Batch) -> dict[str, float]:
    """Loss, and the share of rows whose counted answers are all the likeliest: what greedy decoding would write."""
    model.eval()
    right = (model(data.inputs, mask=data.mask).logits.argmax(-1) == data.targets) | ~data.loss_mask
    return {"accuracy": float(right.all(1).float().mean()), "loss": float(loss_of(model, data))}


def fit(model: Any, parameters: list[nn.Parameter], rate: float, steps: int, batches: Any) -> list[float]:
    """Adam with warm-up over 5 per cent of the steps and a cosine to a tenth; the loss of every batch."""
    model.train()
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=BETAS, fused=True)
    schedule = Schedule(rate, 0.1 * rate, max(1, steps // 20))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, step / steps)
        optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(round(loss.item(), 4))
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}, loss {statistics.fmean(losses[-20:]):.3f}", flush=True)
    return losses


def pretrain(size: Size, plan: Plan, seed: int, path: Path) -> dict[str, Any]:
    """Train a model on all transforms, half of the rows with their instruction, and write it."""
    torch.manual_seed(seed)
    model, draw, strings = size.build(), random.Random(seed), split(seed).train

    def batches() -> Any:
        while True:
            yield batch([
                Row(draw.choice(list(TRANSFORMS)), draw.sample(strings, EXAMPLES), draw.random() < plan.instructed)
                for _ in range(plan.rows)
            ])  # fmt: skip

    started = time.process_time()
    losses = fit(model, list(model.parameters()), size.rate, size.steps, batches())
    wkv.save_model(model, path)
    return {
        "parameters": model.num_parameters, "losses": losses[19::20],
        "seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def examples(name: str, seed: int, part: str, count: int, shots: int = 0, instructed: bool = False) -> Batch:
    """The last answer counts in each of `count` rows; before it come `shots` examples from the training part."""
    parts, draw = split(seed), random.Random(f"{seed}-{name}-{part}")
    strings = draw.sample(getattr(parts, part), count)
    rows = [Row(name, [*draw.sample(parts.train, shots), x], instructed) for x in strings]
    return batch(rows, last_only=True)


def tune(
    path: Path, method: str, options: dict[str, Any], name: str, seed: int, rate: float, samples: int, plan: Plan
) -> dict[str, Any]:
    """Tune an adapter for a transform, without its instruction, on `samples` strings.

    Returns:
        scores of the validation and test strings, the loss of every batch, and how many values were trained.
    """
    model: Any = wkv.load_model(path)
    torch.manual_seed(seed)
    adapter: Any = tuning.create(method, model, **options)
    parameters = list(adapter.named_parameters().values())
    draw = random.Random(f"{seed}-{name}-{samples}")
    strings: list[Letters] = draw.sample(split(seed).train, samples)
    started, decorrelation = time.process_time(), []

    def batches() -> Any:
        for data in _epochs(name, strings, plan.rows, draw):
            if options.get("dbp"):
                decorrelation.append(adapter.decorrelation_loss())  # before the step on this batch
            yield data

    losses = fit(model, parameters, rate, plan.steps, batches())
    seconds = time.process_time() - started
    if options.get("dbp"):
        adapter.fold()
    found: dict[str, Any] = {
        part: scores(model, examples(name, seed, part, plan.scored)) for part in ("validation", "test")
    }
    found |= {"parameters": sum(parameter.numel() for parameter in parameters), "losses": losses}
    if decorrelation:
        found["decorrelation"] = [value for value in decorrelation[2::20] if value is not None]
    return {**found, "seconds": round(seconds, 1)}


def _epochs(name: str, strings: list[Letters], rows: int, draw: random.Random) -> Any:
    while True:
        draw.shuffle(strings)
        for start in range(0, len(strings) - rows + 1, rows):
            yield batch([Row(name, [x]) for x in strings[start : start + rows]])
