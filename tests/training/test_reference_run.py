"""A training run with the default operator in float32 follows the same run with the reference operator in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from wkv import ops
from wkv.training import Schedule, create_optimizer, next_token_loss, set_learning_rate

from .helpers import TEXT, tiny_model

STEPS, LENGTH, BATCH = 200, 32, 4


def batches() -> torch.Tensor:
    """Byte windows of random sentences, int64 [steps, B, T + 1]."""
    generator = torch.Generator().manual_seed(5)
    words = TEXT.split()
    stream = " ".join(words[i] for i in torch.randint(len(words), (3000,), generator=generator).tolist()).encode()
    starts = torch.randint(len(stream) - LENGTH, (STEPS, BATCH), generator=generator)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8).long()[starts[..., None] + torch.arange(LENGTH + 1)]


def losses_of_run(model: Any) -> list[float]:
    """Train by the official recipe; the loss at every step."""
    schedule = Schedule(2e-3, 2e-4, 10)
    optimizer = create_optimizer(model, schedule.initial, weight_decay=0.1)
    losses = []
    for step, batch in enumerate(batches()):
        set_learning_rate(optimizer, schedule.learning_rate(step, step / STEPS))
        loss = next_token_loss(model(batch[:, :-1]).logits, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_float32_run_follows_the_float64_reference_run_for_200_steps() -> None:
    model = tiny_model()
    wide = copy.deepcopy(model).double()
    found = losses_of_run(model)
    with ops.use_backend("reference"):
        expected = losses_of_run(wide)
    assert expected[-1] < 0.5 * expected[0]  # it does learn
    assert found == pytest.approx(expected, abs=1e-3)
