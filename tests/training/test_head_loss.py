"""The chunked head and loss against `next_token_loss(head(hidden))`: values, gradients, masks, types, parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.quantization.modules import QuantizedLinear
from wkv.quantization.packed import quantize
from wkv.training.head_loss import head_loss
from wkv.training.losses import next_token_loss

B, T, C, V = 3, 7, 12, 19


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values, a weight and targets."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (B, T), generator=generator)


def some_mask() -> Tensor:
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1] = False
    return mask


class SoftCap(nn.Module):
    """A head whose graph keeps its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.down, self.up, self.frozen = nn.Linear(C, 5), nn.Linear(5, V), nn.Linear(C, V)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.down(x)) + self.frozen(x))


def close(found: Tensor | None, expected: Tensor | None, bar: float = 1e-12) -> None:
    """Largest difference relative to the largest value."""
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= bar * expected.abs().max()


@pytest.mark.parametrize("chunk", [None, 1, 4, 21, 100])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_equals_the_loss_of_all_logits(chunk: Any, l2wrap: float, masked: bool, dtype: torch.dtype, bar: float) -> None:
    hidden, weight, targets = example(dtype)
    mask = some_mask() if masked else None
    expected = next_token_loss(hidden @ weight.T, targets, mask, l2wrap)
    found = head_loss(hidden, weight, targets, mask, l2wrap, chunk=chunk)
    close(found, expected, bar)
    wanted = torch.autograd.grad(-3.5 * expected, (hidden, weight))
    for actual, gradient in zip(torch.autograd.grad(-3.5 * found, (hidden, weight)), wanted, strict=True):
        close(actual, gradient, bar)


def test_the_first_of_equal_largest_logits_is_pulled() -> None:
    hidden, weight, targets = (x[:1, :1] if x.ndim > 2 else x for x in example())
    weight = weight.detach().clone()
    weight[5] = weight[11] = hidden.detach()[0, 0] * 3
    weight.requires_grad_()
    found, expected = (
        torch.autograd.grad(loss, (hidden, weight))
        for loss in (
            head_loss(hidden, weight, targets[:1, :1], l2wrap=1.0),
            next_token_loss(hidden @ weight.T, targets[:1, :1], l2wrap=1.0),
        )
    )
    for actual, gradient in zip(found, expected, strict=True):
        close(actual, gradient)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("as_module", [False, True])
def test_what_is_frozen_costs_no_gradient(frozen: tuple[int, ...], as_module: bool) -> None:
    hidden, weight, targets = example()
    leaves = [hidden, weight]
    for i in frozen:
        leaves[i].requires_grad_(False)
    head: Any = weight
    if as_module:
        head = nn.Linear(C, V, bias=False, dtype=torch.float64)
        head.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        leaves[1] = head.weight
    loss = head_loss(hidden, head, targets, chunk=4)
    assert loss.requires_grad == (len(frozen) < 2)
    learning = [x for i, x in enumerate(leaves) if i not in frozen]
    if learning:
        expected = torch.autograd.grad(next_token_loss(hidden @ leaves[1].T, targets), learning)
        loss.backward()
        for x, gradient in zip(learning, expected, strict=True):
            close(x.grad, gradient)
    assert all(leaves[i].grad is None for i in frozen)


@torch.no_grad()
def test_without_gradients_only_the_value() -> None:
    hidden, weight, targets = example()
    loss = head_loss(hidden, weight, targets)
    assert not loss.requires_grad
    close(loss, next_token_loss(hidden @ weight.T, targets))


@pytest.mark.parametrize("masked", [False, True])
def test_any_module_can_be_the_head(masked: bool) -> None:
    hidden, _, targets = example()
    mask = some_mask() if masked else None
    head = SoftCap().double()
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad and p is not head.unused)]
    expected = torch.autograd.grad(next_token_loss(head(hidden), targets, mask), leaves)
    head_loss(hidden, head, targets, mask, chunk=4).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        close(leaf.grad, gradient)
    assert head.frozen.weight.grad is None


def test_a_biased_linear_layer_is_a_module() -> None:
    hidden, _, targets = example()
    head = nn.Linear(C, V, dtype=torch.float64)
    expected = torch.autograd.grad(next_token_loss(head(hidden), targets), (hidden, head.weight, head.bias))
    head_loss(hidden, head, targets, chunk=4).backward()
    for leaf, gradient in zip((hidden, head.weight, head.bias), expected, strict=True):
        close(leaf.grad, gradient)


def test_a_quantised_head_passes_gradients_on() -> None:
    hidden, weight, targets = example(torch.float32)
    head = QuantizedLinear(quantize(weight.detach(), "int8"))
    expected = next_token_loss(head(hidden), targets)
    (wanted,) = torch.autograd.grad(expected, hidden)
    found = head_loss(hidden, head, targets, chunk=4)
    close(found, expected, 1e-6)
    close(torch.autograd.grad(found, hidden)[0], wanted, 1e-6)


def test_parts_with_a_common_normalizer_add_up() -> None:
    hidden, weight, targets = example()
    mask = some_mask()
    expected = next_token_loss(hidden @ weight.T, targets, mask, 0.5)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    total = torch.zeros((), dtype=torch.float64)
    for a, b in pairwise((0, 2, 3, T)):
        loss = head_loss(
            hidden[:, a:b], weight, targets[:, a:b], mask[:, a:b], 0.5, normalizer=int(mask.sum()), positions=B * T
        )
        loss.backward()
        total += loss.detach()
    close(total, expected.detach())
    close(hidden.grad, wanted[0])
    close(weight.grad, wanted[1])


def test_a_part_in_which_nothing_counts_keeps_only_its_l2wrap() -> None:
    hidden, weight, targets = example()
    mask = torch.zeros(B, T, dtype=torch.bool)
    for l2wrap, normalizer in ((0.5, None), (0.0, None), (0.0, 7)):
        loss = head_loss(hidden, weight, targets, mask, l2wrap, normalizer=normalizer)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0
        assert all((x == 0).all() for x in gradients)
    part = torch.autograd.grad(head_loss(hidden, weight, targets, mask, 0.5, normalizer=7), hidden)[0]
    best, index = (hidden @ weight.T).detach().max(-1, keepdim=True)
    close(part, best * 0.5 / (B * T) * weight.detach()[index.squeeze(-1)])


def test_targets_that_do_not_count_may_be_anything() -> None:
    hidden, weight, targets = example()
    mask = some_mask()
    expected = head_loss(hidden, weight, targets, mask)
    assert head_loss(hidden, weight, targets.masked_fill(~mask, -100), mask) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    hidden, weight, targets = example(dtype)
    loss = head_loss(hidden, weight, targets, chunk=4)
    assert loss.dtype == torch.float32
    close(loss, next_token_loss(hidden @ weight.T, targets), 1e-6)
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.autograd.grad(next_token_loss(wide_hidden @ wide_weight.T, targets), (wide_hidden, wide_weight))
    for found, gradient in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert found.dtype == dtype
        close(found.double(), gradient, 2e-2)


@pytest.mark.parametrize("as_module", [False, True])
def test_autocast(as_module: bool) -> None:
    hidden, weight, targets = example(torch.float32)
    head: Any = weight
    if as_module:
        head = nn.Sequential(nn.Linear(C, V, bias=False))
        head[0].weight = nn.Parameter(weight.detach())
        weight = head[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        expected = next_token_loss(hidden @ weight.T, targets)
        found = head_loss(hidden, head, targets, chunk=4)
    close(found, expected, 1e-6)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for actual, gradient in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        close(actual, gradient, 2e-2)


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = example(torch.float32)
    expected = next_token_loss((hidden * 1e4) @ weight.T, targets)
    close(head_loss(hidden * 1e4, weight, targets), expected, 1e-6)


def test_the_logits_of_all_positions_never_exist() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    hidden, weight, targets = torch.randn(2, 50, 4, requires_grad=True), torch.randn(30, 4), torch.zeros(2, 50).long()
    with Watch():
        head_loss(hidden, weight.requires_grad_(), targets, chunk=10).backward()
    assert max(sizes) == max(10 * 30, hidden.numel())


def test_errors_say_what_was_found() -> None:
    hidden, weight, targets = example(torch.float32)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((hidden[0], weight, targets), {}, r"hidden \[B, T, C\].*\[7, 12\]"),
        ((hidden, weight, targets.int()), {}, r"int64 targets.*int32"),
        ((hidden, weight[:, :3], targets), {}, r"head must be \[V, 12\].*\[19, 3\]"),
        ((hidden, weight.double(), targets), {}, "float32, head torch.float64"),
        ((hidden, lambda x: x, targets), {}, "weight .* or a module, found function"),
        ((hidden, weight, targets, torch.ones(B, T)), {}, r"mask must be bool \[3, 7\]"),
        ((hidden, weight, targets), {"chunk": 0}, "chunk must be a positive integer, found 0"),
        ((hidden, weight, targets), {"normalizer": 0}, "normalizer must be positive"),
        ((hidden, weight, targets), {"positions": -1}, "positions must be positive"),
        ((hidden, weight, targets - 100), {}, r"target -\d+ is outside the vocabulary \[0, 19\)"),
        ((hidden, weight, targets + V), {}, r"target \d+ is outside the vocabulary"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(WkvError, match=message):
            head_loss(*arguments, **options)


def test_tokens_that_do_not_exist_have_no_part() -> None:
    """Whatever the model returned for them, neither the loss nor L2Wrap sees it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, C, dtype=torch.float64), torch.randn(V, C, dtype=torch.float64)
    targets, exists = torch.randint(V, (B, T)), some_mask()
    counts = exists & (torch.rand(B, T) < 0.5)
    kept = hidden[exists][None].requires_grad_()
    expected = next_token_loss(kept @ weight.T, targets[exists][None], counts[exists][None], 0.5)
    (wanted,) = torch.autograd.grad(expected, kept)
    hidden = hidden.masked_fill(~exists[..., None], 1e30).requires_grad_()
    found = head_loss(hidden, weight, targets, counts, 0.5, exists=exists)
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[exists], wanted[0], rtol=1e-12, atol=1e-15)
    assert not gradient[~exists].any()
    nothing = head_loss(hidden, weight, targets, exists=torch.zeros_like(exists))
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, hidden)[0].any()
