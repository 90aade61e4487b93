"""The loss against its formula: value, L2Wrap gradient, masks, gradient scaling."""

from __future__ import annotations

import pytest
import torch

from wkv.errors import WkvError
from wkv.training import next_token_loss


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64).to(dtype)
    return logits.requires_grad_(), torch.randint(11, (3, 5), generator=generator)


def direct_gradient(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, l2wrap: float
) -> torch.Tensor:
    """(softmax - one_hot) / count on the positions that count, plus L2Wrap everywhere."""
    gradient = torch.softmax(logits.detach(), -1)
    counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            gradient[b, t, targets[b, t]] -= 1
            gradient[b, t] *= int(counts[b, t]) / int(counts.sum())
            best = int(logits[b, t].argmax())
            gradient[b, t, best] += logits[b, t, best].detach() * l2wrap / targets.numel()
    return gradient


def test_value_is_the_mean_negative_log_probability() -> None:
    logits, targets = example()
    expected = -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    assert torch.allclose(next_token_loss(logits, targets), expected, rtol=1e-14, atol=0)
    assert next_token_loss(logits, targets, l2wrap=0) == next_token_loss(logits, targets, l2wrap=5.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, -3.5])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 2.0])
def test_gradient_equals_the_formula_and_follows_the_incoming_gradient(
    masked: bool, scale: float, l2wrap: float
) -> None:
    logits, targets = example()
    mask = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    (next_token_loss(logits, targets, mask, l2wrap) * scale).backward()
    torch.testing.assert_close(
        logits.grad, scale * direct_gradient(logits, targets, mask, l2wrap), rtol=1e-12, atol=1e-15
    )


def test_l2wrap_pulls_the_first_of_equal_largest_logits() -> None:
    logits = torch.zeros(1, 1, 6, dtype=torch.float64)
    logits[0, 0, [2, 4]] = 3.0
    logits.requires_grad_()
    targets = torch.zeros(1, 1, dtype=torch.int64)
    (with_wrap,) = torch.autograd.grad(next_token_loss(logits, targets, l2wrap=1.0), logits)
    (without,) = torch.autograd.grad(next_token_loss(logits, targets, l2wrap=0.0), logits)
    assert torch.allclose(with_wrap - without, torch.tensor([[[0, 0, 3.0, 0, 0, 0]]], dtype=torch.float64))


def test_gradients_of_halves_add_up_to_that_of_the_whole() -> None:
    logits, targets = example()
    (whole,) = torch.autograd.grad(next_token_loss(logits[:2], targets[:2]), logits)
    halves = sum(
        torch.autograd.grad(next_token_loss(logits[i : i + 1], targets[i : i + 1]) / 2, logits)[0] for i in (0, 1)
    )
    torch.testing.assert_close(halves, whole, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits, targets = example(dtype)
    loss = next_token_loss(logits, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_no_gradient_needed() -> None:
    logits, targets = example()
    assert not next_token_loss(logits.detach(), targets).requires_grad


def test_errors_say_what_was_found() -> None:
    logits, targets = example()
    with pytest.raises(WkvError, match=r"logits \[B, T, V\].*\[3, 4\]"):
        next_token_loss(logits, targets[:, :4])
    with pytest.raises(WkvError, match=r"int64 targets.*int32"):
        next_token_loss(logits, targets.int())
    with pytest.raises(WkvError, match=r"mask must be bool \[3, 5\]"):
        next_token_loss(logits, targets, torch.ones(3, 5))
    with pytest.raises(WkvError, match="no position"):
        next_token_loss(logits, targets, torch.zeros(3, 5, dtype=torch.bool))
