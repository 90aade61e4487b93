"""The text, the contenders, and the one training loop of all of them.

All see the same batches in the same order (one sampler, one seed), with the same clip and the same shape of schedule.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wkv
from wkv import tuning
from wkv.data import Document, TokenStore, UniformWindows, split_held_out
from wkv.evaluation import bits_per_byte
from wkv.training import Budget, Schedule, head_loss
from wkv.training.loop import clip_texts

METHODS = {"lora": 8, "pissa": 8, "olora": 8, "miss": 16, "bone-row": 16, "bone-col": 16}  # with their ranks
FULL = "full"  # fine-tuning of all parameters, for comparison
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
BETAS, EPSILON, CLIP, FINAL = (0.9, 0.99), 1e-8, 1.0, 0.1  # FINAL: the last learning rate as a part of the first


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, for how long.

    Args:
        rows, context: B and T of a batch.
        steps, warmup: of a run.
        looks: the steps after which the test texts are scored.
        seeds: of initial values and batches; rates are chosen with the first `sweep_seeds` of them.
        rates: the learning rates tried first; `ladder`: all that may be tried, in steps of about 3.
        common: the rate at which all are compared.
        validation_bytes, test_bytes: of text that is scored, for choosing rates and for the result.
        files: how many modules are read; None: all.
    """

    rows: int
    context: int
    steps: int
    warmup: int
    looks: tuple[int, ...]
    seeds: tuple[int, ...]
    sweep_seeds: int
    rates: tuple[float, ...]
    ladder: tuple[float, ...]
    common: float
    validation_bytes: int
    test_bytes: int
    files: int | None = None

    def training(self) -> dict[str, Any]:
        """What makes two runs comparable."""
        other = ("seeds", "sweep_seeds", "rates", "ladder", "common", "test_bytes")
        found = {name: value for name, value in asdict(self).items() if name not in other}
        return found | {"betas": BETAS, "epsilon": EPSILON, "clip": CLIP, "final_learning_rate": FINAL}


@dataclass(frozen=True)
class Texts:
    """Tokens to train on, texts to choose learning rates by (validation), texts for the result (test), and facts."""

    store: TokenStore
    validation: list[Any]
    test: list[Any]
    facts: dict[str, Any]


def load_texts(plan: Plan) -> Texts:
    """The modules at the top of Python's standard library, in sorted order, with the starter model's tokenizer.

    Every 20th file is for the test, every 20th of the others for validation; of each its beginning is scored.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    documents = [Document(path.name, path.read_text("utf-8")) for path in sorted(folder.glob("*.py"))][: plan.files]
    documents = [document for document in documents if document.text]
    train, test = split_held_out(documents)
    train, validation = split_held_out(train)
    store = TokenStore.from_documents(train, wkv.load_model("starter").tokenizer)
    digest = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
    facts = {
        "source": f"top-level modules of the standard library of Python {platform.python_version()}",
        "files": len(documents),
        "sha256": digest,
        "train_bytes": sum(document.num_bytes for document in train),
        "train_tokens": store.num_tokens,
        "validation_files": [document.name for document in validation],
        "test_files": [document.name for document in test],
    }
    scored = [clip_texts([d.text for d in part], size) for part, size in (
        (validation, plan.validation_bytes), (test, plan.test_bytes))]  # fmt: skip
    return Texts(store, *scored, facts)


class Contender:
    """The starter model in float32 with one adapter, or (`FULL`) with all its parameters to be trained.

    Args:
        method: a key of `METHODS`, or `FULL`.
        seed: of the random start that some methods have.
        file: written by `save`; the adapter starts from there.
    """

    def __init__(self, method: str, seed: int = 0, file: Path | None = None) -> None:
        whole = method == FULL
        source = file if whole and file is not None else "starter"
        self.model: Any = wkv.load_model(source, dtype=torch.float32).train()
        self.adapter: Any = None
        torch.manual_seed(seed)
        if not whole and file is not None:
            self.adapter = tuning.load(file, self.model, name="trained")
        elif not whole:
            self.adapter = tuning.create(method, self.model, rank=METHODS[method], targets=TARGETS)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return dict(self.model.named_parameters()) if self.adapter is None else self.adapter.named_parameters()

    def save(self, path: Path) -> None:
        """A file for `Contender(..., file=path)`."""
        if self.adapter is None:
            wkv.save_model(self.model, path)
        else:
            self.adapter.save(path)


def train(method: str, seed: int, rate: float, plan: Plan, texts: Texts, folder: Path) -> dict[str, Any]:
    """One run, kept in files after each of `plan.looks`, and its bits per byte of the validation texts at the end."""
    contender = Contender(method, seed)
    parameters = list(contender.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    schedule, budget = Schedule(rate, FINAL * rate, plan.warmup), Budget(plan.rows * plan.context, steps=plan.steps)
    sampler = UniformWindows(texts.store, plan.context, plan.rows, seed)
    losses, first = [], None
    started = time.process_time()
    for step in range(plan.steps):
        batch = sampler.next_batch()
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, budget.progress(step, 0, schedule))
        optimizer.zero_grad()
        hidden, _ = contender.model.forward_features(batch.inputs)
        loss = head_loss(hidden, contender.model.head, batch.targets, l2wrap=0)
        loss.backward()
        first = first or first_gradient(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in plan.looks:
            contender.save(folder / kept_name(method, seed, rate, step + 1))
    diverged = not math.isfinite(losses[-1])
    return {
        "method": method, "seed": seed, "rate": rate,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "first_gradient": first, "losses": [round(loss, 4) for loss in losses],
        "validation": None if diverged else bits_per_byte(contender.model, texts.validation), "diverged": diverged,
        "seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def kept_name(method: str, seed: int, rate: float, step: int) -> str:
    """Of the file of a contender after a step."""
    return f"{method}-{seed}-{rate:g}-{step}.safetensors"


def first_gradient(parameters: list[nn.Parameter]) -> dict[str, float]:
    """Norm of the gradient, and the share of parameters whose gradient is exactly zero."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = sum(parameter.numel() for parameter in parameters)
    alive = sum(int(gradient.count_nonzero()) for gradient in gradients)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    return {"norm": norm, "zero_share": 1 - alive / total}


def update_ranks(method: str, file: Path) -> dict[str, Any]:
    """What training did to the weights: ranks of each layer's change dW, in float64.

    Returns:
        for each kind of layer the median over blocks of the numerical rank (singular values above 1e-5 of the
        largest; float32 leaves noise near 1e-7 of it) and of exp(entropy) of the squared singular values' shares.
    """
    adapter = Contender(method, file=file).adapter
    found: dict[str, list[tuple[int, float]]] = {}
    for path, side in adapter.sides.items():
        weight = adapter.model.get_submodule(path).base.weight.detach().double()
        with torch.no_grad():
            change = side.double().merged_weight(weight) - weight
        values = torch.linalg.svdvals(change)
        shares = values.square() / values.square().sum()
        effective = math.exp(float(-(shares * shares.clamp_min(1e-300).log()).sum()))
        found.setdefault(path.split(".", 2)[2], []).append((int((values > 1e-5 * values[0]).sum()), effective))
    return {
        kind: {"rank": sorted(r for r, _ in pairs)[len(pairs) // 2], "ranks": [r for r, _ in pairs],
               "effective": round(sorted(e for _, e in pairs)[len(pairs) // 2], 1)}
        for kind, pairs in found.items()
    }  # fmt: skip
