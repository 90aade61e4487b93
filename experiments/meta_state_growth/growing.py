"""The models, the one training loop, and how a run is divided into phases of equal compute."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "architecture_comparison"))  # the text

import torch
from learning import Texts

import wkv
from wkv.data import UniformWindows
from wkv.evaluation import bits_per_byte
from wkv.models.growth import grow, grow_optimizer_state
from wkv.training import Schedule, create_optimizer, head_loss, set_learning_rate

CLIP, FINAL, BETAS, WEIGHT_DECAY = 1.0, 0.1, (0.9, 0.99), 0.1


@dataclass(frozen=True)
class Size:
    """Of a small model, and what it grows to: more heads and parameter tokens; layers and width stay."""

    layers: int
    width: int
    head_size: int
    ffn: tuple[int, int]
    attention: tuple[int, int]
    vocabulary: int

    def build(self, kind: str) -> Any:
        """A new model: "small", "large", or "rwkv7", which is small, too."""
        place = int(kind == "large")
        return wkv.create_model(
            "rwkv7" if kind == "rwkv7" else "meta_state", vocab_size=self.vocabulary, hidden_size=self.width,
            num_layers=self.layers, head_size=self.head_size, ffn_size=self.ffn[place],
            attention_size=self.attention[place],
        )  # fmt: skip

    def grown(self, model: Any) -> Any:
        """A small model at the large one's size, with the same outputs."""
        return grow(model, attention_size=self.attention[1], ffn_size=self.ffn[1])


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, for how long.

    Args:
        size: of the models.
        context, rows: T and B of a batch.
        steps: of the small model, which set the compute of a whole run.
        swept: part of that compute for the short runs that choose learning rates.
        warmup: steps at the start, and again after growth.
        rates, most_rates: the learning rates tried first, and how many may be tried in all.
        seeds: of initial values and batches.
        test_bytes, validation_bytes, documents: of text that is scored, and how many speeches are read (None: all).
    """

    size: Size
    context: int
    rows: int
    steps: int
    swept: float
    warmup: int
    rates: tuple[float, ...]
    most_rates: int
    seeds: tuple[int, ...]
    test_bytes: int
    validation_bytes: int
    documents: int | None = None

    def settings(self) -> dict[str, Any]:
        """What makes two runs comparable."""
        other = ("seeds", "rates", "most_rates")
        return {name: value for name, value in asdict(self).items() if name not in other}

    def steps_of(self, kind: str, part: float) -> int:
        """Steps of a model that cost `part` of the compute of a run."""
        with torch.device("meta"):
            small, own = (compute(self.size.build(name)) for name in ("small", kind))
        return round(part * self.steps * small / own)


class Phase(NamedTuple):
    """A stretch of a run: which model, and up to which part of the compute."""

    kind: str
    until: float


CONTENDERS = {
    "small": (Phase("small", 1.0),),
    "rwkv7": (Phase("rwkv7", 1.0),),
    "large": (Phase("large", 1.0),),
    "large, half": (Phase("large", 0.5),),
    "grown": (Phase("small", 0.5), Phase("large", 1.0)),
}


def compute(model: Any) -> int:
    """Multiplications of one token in the matrices of a forward pass; the operator and vectors are left out."""
    return sum(p.numel() for name, p in model.named_parameters() if name != "emb.weight" and p.squeeze().ndim == 2)


def train(
    phases: tuple[Phase, ...], plan: Plan, texts: Texts, seed: int, rates: dict[str, float], part: float = 1.0
) -> tuple[Any, dict[str, Any]]:
    """A trained model, and what is known about its training. `part` shortens the whole run, schedule included.

    One cosine runs over the compute of the whole run; the optimizer's moments are taken along when a model grows.
    """
    torch.manual_seed(seed)
    model = plan.size.build(phases[0].kind)
    optimizer = create_optimizer(model, rates[phases[0].kind], WEIGHT_DECAY, BETAS)
    sampler = UniformWindows(texts.store, plan.context, plan.rows, seed)
    started, start, losses, growth = time.process_time(), 0.0, [], {}
    for phase in phases:
        if start:
            model, optimizer, growth = _grown(model, optimizer, plan, texts, rates[phase.kind])
        steps = plan.steps_of(phase.kind, part * (phase.until - start))
        schedule = Schedule(rates[phase.kind], FINAL * rates[phase.kind], plan.warmup)
        for step in range(steps):
            done = start + (phase.until - start) * step / steps
            set_learning_rate(optimizer, schedule.learning_rate(step, done / phases[-1].until))
            losses.append((round(done, 5), round(_step(model, optimizer, sampler.next_batch()), 4)))
        start = phase.until
    seconds = round(time.process_time() - started, 1)
    facts = {"parameters": model.num_parameters, "steps": len(losses), "losses": losses[::5], "seconds": seconds}
    return model, {**facts, **growth}


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    optimizer.zero_grad()
    hidden, _ = model.forward_features(batch.inputs)
    loss = head_loss(hidden, model.head, batch.targets, l2wrap=0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()


def _grown(model: Any, optimizer: Any, plan: Plan, texts: Texts, rate: float) -> tuple[Any, Any, dict[str, Any]]:
    """The grown model, its optimizer, and bits per byte of the validation texts right before and after."""
    large = plan.size.grown(model)
    new_optimizer = create_optimizer(large, rate, WEIGHT_DECAY, BETAS)
    grow_optimizer_state(optimizer, model, new_optimizer, large)
    before, after = (bits_per_byte(x, texts.validation, texts.tokenizer) for x in (model, large))
    return large, new_optimizer, {"growth": {"before": before, "after": after, "history": large.config.growth}}
