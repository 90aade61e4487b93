"""The gradients of a step do not depend on how its tokens are divided into batches, segments and pieces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from wkv.data import Batch
from wkv.training import next_token_loss
from wkv.training.objective import GradientStep, Objective, StepLoss, count_tokens, with_shorter_context
from wkv.training.sections import TrainRecipe

from .helpers import tiny_model

B, T = 4, 12


def batch(flags: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(256, (B, T), generator=generator) for _ in range(2))
    if not flags:
        return Batch(inputs, targets)
    counts = torch.rand(B, T, generator=generator) < torch.tensor([[0.1], [0.9], [0.5], [0.0]])
    mask = torch.arange(T) < torch.tensor([[T], [9], [T], [3]])
    return Batch(inputs, targets, counts, torch.rand(B, T, generator=generator) < 0.2, mask)


def rows(whole: Batch, chosen: slice) -> Batch:
    return Batch(*(None if x is None else x[chosen] for x in vars(whole).values()))


def columns(whole: Batch, chosen: slice) -> Batch:
    return Batch(*(None if x is None else x[:, chosen] for x in vars(whole).values()))


def gradients(batches: list[Batch], carry: bool = False, **options: Any) -> tuple[StepLoss, list[torch.Tensor]]:
    model = tiny_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    plain = Objective(model, options.pop("l2wrap", 0.3))
    recipe = dataclasses.replace(TrainRecipe(steps=1, l2wrap=plain.l2wrap), **options)
    step = GradientStep(recipe, plain, plain, Accelerator(cpu=True))
    found = step(batches, model.init_state(batches[0].inputs.shape[0]) if carry else None)
    return found, collected(model)


def collected(model: Any) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-13)
    assert found[0].targets == expected[0].targets


def test_the_loss_is_that_of_the_whole_logits() -> None:
    found, grads = gradients([batch(True)])
    model = tiny_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    data = batch(True)
    logits = model(data.inputs, mask=data.mask, reset=data.reset).logits
    assert data.mask is not None
    assert data.loss_mask is not None
    there = data.mask.nonzero(as_tuple=True)  # tokens that do not exist have no part in L2Wrap
    loss = next_token_loss(logits[there][None], data.targets[there][None], data.loss_mask[there][None], 0.3)
    loss.backward()
    assert_same((found, grads), (StepLoss(loss.detach(), None, found.targets), collected(model)))


@pytest.mark.parametrize("flags", [False, True])
def test_accumulated_batches_equal_one_of_all_their_rows(flags: bool) -> None:
    """Weighted by the targets that count, not by batches: row 3 has none, row 1 many."""
    whole = batch(flags)
    parts = [rows(whole, slice(i, i + 1)) for i in range(B)]
    assert_same(gradients(parts), gradients([whole]))


@pytest.mark.parametrize("flags", [False, True])
def test_segments_of_accumulated_batches_too(flags: bool) -> None:
    whole = batch(flags)
    parts = [rows(whole, slice(0, 2)), rows(whole, slice(2, 4))]
    expected = gradients([whole])
    assert_same(gradients(parts, segment=5, segment_mode="exact"), expected)
    assert_same(gradients(parts, segment=5, through=3), expected)


def test_a_carried_state_goes_from_batch_to_batch() -> None:
    whole = batch(True)
    whole = dataclasses.replace(whole, mask=None)
    halves = [columns(whole, slice(0, 5)), columns(whole, slice(5, T))]
    found, expected = gradients(halves, carry=True)[0], gradients([whole], carry=True)[0]
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert found.state is not None
    assert expected.state is not None
    for a, b in zip(found.state.layers, expected.state.layers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any(x.requires_grad for layer in found.state.layers for x in layer.values())
    assert gradients([whole])[0].state is None


def test_a_step_without_targets_has_no_gradient_but_moves_the_state() -> None:
    nothing = dataclasses.replace(batch(), loss_mask=torch.zeros(B, T, dtype=torch.bool))
    found, grads = gradients([nothing, nothing], carry=True)
    assert (float(found.loss), found.targets) == (0.0, 0)
    assert not any(g.any() for g in grads)
    expected = gradients([batch(), batch()], carry=True)[0]
    assert found.state is not None
    assert expected.state is not None
    torch.testing.assert_close(found.state.layers[1]["wkv"], expected.state.layers[1]["wkv"])
    some = gradients([nothing, batch()])
    torch.testing.assert_close(some[0].loss, gradients([batch()])[0].loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("flags", [False, True])
def test_a_shorter_context_is_that_of_separate_rows(flags: bool) -> None:
    whole = batch(flags)
    pieces = [columns(whole, slice(i, i + 5)) for i in range(0, T, 5)]
    assert_same(gradients([with_shorter_context(whole, 5)]), gradients(pieces))
    assert with_shorter_context(whole, T) is whole


def test_padding_is_no_token() -> None:
    assert count_tokens(batch()) == B * T
    assert count_tokens(batch(True)) == T + 9 + T + 3
