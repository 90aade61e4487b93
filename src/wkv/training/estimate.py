"""What a run would take: parameters, memory and time, from two real steps. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.training.corpus_cache import is_built
from wkv.training.loop import Trainer
from wkv.training.recipe import Recipe
from wkv.training.run import cpu_threads, prepare, read_corpus, rich_console
from wkv.training.sharding import local
from wkv.training.source import ChooseTokenizer, Corpus, sample_corpus

SAMPLE = 2_000_000  # characters read of a corpus that has no cache yet
LONGEST_TOKEN = 40  # characters: as many per token are enough for any sampler


@dataclass
class Group:
    """Parameters that the optimizer treats alike: how many values, factor on the learning rate, weight decay."""

    values: int
    factor: float
    weight_decay: float


@dataclass
class Estimate:
    """What `estimate` finds; memory in bytes, of this process.

    Args:
        model: registered name.
        parameters: stored values, trainable or not.
        groups: the trainable ones, as the optimizer sees them.
        weights, gradients, optimizer, average: memory of the parameters and of what belongs to them.
        activations: what one batch keeps for its backward pass.
        corpus_tokens: training tokens; None if their cache is still to be made.
        tokens_per_step, steps, tokens: of the run; steps and tokens of a budget of seconds are estimates.
        step_seconds, seconds: of one step and of all.
        device, precision: where it was measured, and of which matrix products.
    """

    model: str
    parameters: int
    groups: list[Group]
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    corpus_tokens: int | None
    tokens_per_step: int
    steps: int
    tokens: int
    step_seconds: float
    seconds: float
    device: str
    precision: str

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def estimate(recipe: Recipe, console: Any = None) -> Estimate:
    """Make two steps as `recipe` says and tell what the whole run takes.

    A text whose cache is not there yet is not tokenised: its beginning stands for it.

    Args:
        recipe: from `load_recipe`.
        console: a rich Console; standard output by default.

    Raises:
        WkvError: whatever would end the run before its third step.
    """
    folder = Path(recipe.out or "run") / ".dry-run"  # there is none: nothing of another run is taken over
    with cpu_threads(recipe.train.threads):
        trainer, corpus = prepare(recipe, folder, console or rich_console(), _read)
        activations = _count_activations(trainer)
        trainer.step()
        before = trainer.position.seconds
        trainer.step()
    trainer.team.leave()
    return _estimate(recipe, trainer, corpus, activations, trainer.position.seconds - before)


def _read(recipe: Recipe, choose: ChooseTokenizer, console: Any) -> Corpus:
    data = recipe.data
    if data.cache is None or is_built(Path(data.cache)):
        return read_corpus(recipe, choose, console)
    length = recipe.train.context_length
    return sample_corpus(data, choose, SAMPLE + LONGEST_TOKEN * length, length)


def _estimate(recipe: Recipe, trainer: Trainer, corpus: Corpus, activations: int, step_seconds: float) -> Estimate:
    plan, model = trainer.recipe, trainer.plain_model
    sampled = recipe.data.cache is not None and not is_built(Path(recipe.data.cache))
    per_step = trainer.budget.tokens_per_step
    steps = _steps(trainer, step_seconds)
    trained = _num_bytes(trainer.parameters)
    return Estimate(
        model=model.name,
        parameters=model.num_parameters,
        groups=[
            Group(sum(p.numel() for p in group["params"]), group["factor"], group["weight_decay"])
            for group in trainer.plain_optimizer.param_groups
        ],
        weights=_num_bytes(model.parameters()),
        gradients=trained,
        optimizer=sum(_num_bytes(state.values()) for state in trainer.plain_optimizer.state.values()),
        average=trained if plan.ema is not None else 0,
        activations=activations,
        corpus_tokens=None if sampled else corpus.store.num_tokens,
        tokens_per_step=per_step,
        steps=steps,
        tokens=steps * per_step,
        step_seconds=step_seconds,
        seconds=plan.seconds if plan.seconds is not None else steps * step_seconds,
        device=trainer.accelerator.device.type,
        precision=trainer.precision,
    )


def _steps(trainer: Trainer, step_seconds: float) -> int:
    budget = trainer.budget
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return math.ceil(budget.tokens / budget.tokens_per_step)
    return math.ceil((budget.seconds or 0) / step_seconds)


def _num_bytes(tensors: Iterable[Any]) -> int:
    return sum(local(x).numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _count_activations(trainer: Trainer) -> int:
    """Bytes that a step's forward passes keep, of its largest batch, without the parameters."""
    own = {local(parameter).untyped_storage().data_ptr() for parameter in trainer.plain_model.parameters()}
    kept: dict[int, int] = {}
    largest = 0

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def unpack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, sum(kept.values()))
        kept.clear()  # a backward pass has begun
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        trainer.step()
    return largest
