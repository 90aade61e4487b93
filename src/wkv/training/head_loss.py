"""The head and the language-model loss as one function: the logits of all positions never exist at once.

A few positions at a time are multiplied with the head, and their logits [P, V] are turned into their own gradient in
place. The gradients of the hidden values and of the head are complete at the end of the forward pass; the backward pass
only scales them.

Shape letters: B batch, T time, C channels, V vocabulary, P positions (of one chunk, in helpers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wkv.errors import WkvError
from wkv.layers.head import TiedHead
from wkv.layers.norms import wide
from wkv.training.losses import check_mask

# Values in the buffer of logits: 64 MiB of float32 on the CPU; elsewhere few, large launches.
BUFFER, BUFFER_ELSEWHERE = {"cpu": 1 << 24}, 1 << 27
LARGEST_VOCABULARY = 1 << 16  # assumed of a head that does not tell


def head_loss(
    hidden: Tensor,
    head: Tensor | nn.Module,
    targets: Tensor,
    mask: Tensor | None = None,
    l2wrap: float = 1e-4,
    *,
    chunk: int | None = None,
    normalizer: float | Tensor | None = None,
    positions: float | None = None,
    exists: Tensor | None = None,
) -> Tensor:
    """`next_token_loss(head(hidden), targets, mask, l2wrap)` without ever holding all logits.

    The losses and the sums over chunks of a weight's gradient are float32 (float64 if the hidden values are). Under
    autocast the products run in its type. What is frozen in the head costs no gradient.

    Args:
        hidden: [B, T, C], after the last norm (`model.forward_features`).
        head: weight [V, C], or a module that turns [P, C] into logits [P, V].
        targets: int64 [B, T], each in [0, V) where it counts and anything, such as -100, where it does not.
        mask: bool [B, T]; only True positions count. L2Wrap covers every position.
        l2wrap: strength of the L2Wrap gradient, see `next_token_loss`; 0 switches it off.
        chunk: positions whose logits exist at once; None chooses by V and device.
        normalizer: what the sum of the losses is divided by; None is the number of positions that count. For a part of
            a larger batch give that of the whole batch: the parts then add up to its loss and its gradients.
        positions: what L2Wrap is divided by, in the same way; None is B * T.
        exists: bool [B, T], the mask the model was given. What it returned for False tokens is unspecified: they are
            left out as if the batch did not hold them, also from L2Wrap and from B * T.

    Returns:
        The loss in nats per token. Where no position counts it is 0, and so is its gradient; but a part of a larger
        batch (`normalizer`) keeps its L2Wrap.

    Raises:
        WkvError: if shapes, types or numbers do not fit.
    """
    _check(hidden, head, targets, mask)
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise WkvError(f"chunk must be a positive integer, found {chunk!r}")
    _check_positive(normalizer=normalizer, positions=positions)
    if exists is not None:
        check_mask(exists, targets)
        hidden, targets = hidden[exists][None], targets[exists][None]
        mask = None if mask is None else mask[exists][None]
        if not targets.numel():
            return wide(hidden).sum()  # 0, and part of the graph
    divisor, scale = _normalizers(targets, mask, normalizer)
    wrap = l2wrap / (positions or targets.numel())
    # A plain linear layer is its weight; the gradients of any other module are left to autograd.
    if isinstance(head, TiedHead) or (type(head) is nn.Linear and head.bias is None):
        head = head.weight
    module = None if isinstance(head, Tensor) else head
    parameters = [head] if isinstance(head, Tensor) else [p for p in head.parameters() if p.requires_grad]
    plan = _Plan(module, chunk, divisor, scale, wrap, torch.is_grad_enabled())
    mask_P1 = None if mask is None else mask.reshape(-1, 1)
    loss: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), targets.reshape(-1, 1), mask_P1, plan, *parameters)
    return loss


def _normalizers(
    targets: Tensor, mask: Tensor | None, given: float | Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    """What everything is divided by, and what L2Wrap is multiplied by so that this does not change it (or 0)."""
    if given is not None:
        return given, given
    if mask is None:
        return targets.numel(), targets.numel()
    count = mask.sum()
    return count.clamp(min=1), count


class _Plan(NamedTuple):
    module: nn.Module | None  # None: the only parameter is the weight [V, C]
    chunk: int | None
    normalizer: float | Tensor
    scale: float | Tensor
    wrap: float  # strength of L2Wrap per position
    learns: bool


class _HeadLoss(torch.autograd.Function):
    """Gradients are summed as they are and divided at the end: float16 has no room for 1 / (B T)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PC: Tensor, targets_P1: Tensor, mask_P1: Tensor | None, plan: _Plan, *parameters: Tensor
    ) -> Tensor:
        learns = [plan.learns and x.requires_grad for x in (hidden_PC, *parameters)]
        head: _WeightHead | _ModuleHead
        if plan.module is None:
            head = _WeightHead(parameters[0], hidden_PC, learns)
        else:
            head = _ModuleHead(plan.module, parameters, learns)
        total = wide(hidden_PC.new_zeros(()))
        d_hidden_PC = torch.empty_like(hidden_PC) if learns[0] else None
        chunk = plan.chunk or _chunk_size(head.vocab_size, hidden_PC.device)
        for start in range(0, len(hidden_PC), chunk):
            rows = slice(start, start + chunk)
            logits_PV = head.logits(hidden_PC[rows])
            total += _differentiate(logits_PV, targets_P1[rows], None if mask_P1 is None else mask_P1[rows], plan)
            if any(learns):
                head.backward(logits_PV, None if d_hidden_PC is None else d_hidden_PC[rows])
            del logits_PV  # before the next ones are made
        ctx.save_for_backward(d_hidden_PC, *head.gradients)
        ctx.normalizer, ctx.types = plan.normalizer, [x.dtype for x in (hidden_PC, *parameters)]
        return total / plan.normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.normalizer
        gradients = zip(ctx.saved_tensors, ctx.types, strict=True)
        d_hidden, *rest = (None if x is None else (wide(x) * scale).to(dtype) for x, dtype in gradients)
        return d_hidden, None, None, None, *rest


def _differentiate(logits_PV: Tensor, targets_P1: Tensor, mask_P1: Tensor | None, plan: _Plan) -> Tensor:
    """Turn logits into their gradient, in place; returns the sum of the losses that count."""
    if mask_P1 is not None:
        targets_P1 = targets_P1.masked_fill(~mask_P1, 0)
    _check_range(targets_P1, logits_PV.shape[1])
    # Where several logits are largest, max gives the first.
    largest_P1, index_P1 = logits_PV.max(1, keepdim=True)
    ahead_P1 = largest_P1 - logits_PV.gather(1, targets_P1)
    sums_P1 = logits_PV.sub_(largest_P1).exp_().sum(1, keepdim=True)
    losses_P1 = ahead_P1 + sums_P1.log()
    logits_PV.div_(sums_P1).scatter_add_(1, targets_P1, torch.full_like(sums_P1, -1))
    if mask_P1 is not None:
        logits_PV.mul_(mask_P1)
        losses_P1 = losses_P1.masked_fill(~mask_P1, 0)
    if plan.wrap:
        logits_PV.scatter_add_(1, index_P1, largest_P1 * plan.scale * plan.wrap)
    return losses_P1.sum()


class _WeightHead:
    """Products with a weight [V, C], and their gradients by hand."""

    def __init__(self, weight_VC: Tensor, hidden_PC: Tensor, learns: Sequence[bool]) -> None:
        # As autocast does it, but once for all chunks.
        self.dtype = _product_type(hidden_PC)
        self.weight_VC, self.vocab_size = weight_VC.to(self.dtype), weight_VC.shape[0]
        self.gradients = [torch.zeros_like(wide(weight_VC)) if learns[1] else None]

    def logits(self, hidden_PC: Tensor) -> Tensor:
        """A new tensor [P, V], at least float32."""
        self.hidden_PC = hidden_PC.to(self.dtype)
        return wide(self.hidden_PC @ self.weight_VC.T)

    def backward(self, d_logits_PV: Tensor, d_hidden_PC: Tensor | None) -> None:
        """Write the gradient of the last hidden values, add that of the weight to `gradients`."""
        d_logits_PV = d_logits_PV.to(self.dtype)
        if d_hidden_PC is not None:
            d_hidden_PC.copy_(d_logits_PV @ self.weight_VC)
        (sum_VC,) = self.gradients
        if sum_VC is not None and sum_VC.dtype == self.dtype:
            sum_VC.addmm_(d_logits_PV.T, self.hidden_PC)
        elif sum_VC is not None:
            sum_VC += d_logits_PV.T @ self.hidden_PC


class _ModuleHead:
    """Any module; autograd differentiates one chunk at a time."""

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], learns: Sequence[bool]) -> None:
        self.module, self.parameters, self.learns = module, parameters, learns
        self.vocab_size = int(getattr(module, "out_features", LARGEST_VOCABULARY))
        self.gradients = [torch.zeros_like(wide(x)) if any(learns[1:]) else None for x in parameters]

    def logits(self, hidden_PC: Tensor) -> Tensor:
        """A new tensor [P, V], at least float32."""
        with torch.set_grad_enabled(any(self.learns)):
            self.hidden_PC = hidden_PC.detach().requires_grad_(self.learns[0])
            self.output_PV: Tensor = self.module(self.hidden_PC)
        # A copy, as the graph may need the output.
        return self.output_PV.detach().to(torch.promote_types(self.output_PV.dtype, torch.float32), copy=True)

    def backward(self, d_logits_PV: Tensor, d_hidden_PC: Tensor | None) -> None:
        """Write the gradient of the last hidden values, add those of the parameters to `gradients`."""
        wanted = [x for x, learns in zip((self.hidden_PC, *self.parameters), self.learns, strict=True) if learns]
        with torch.autocast(d_logits_PV.device.type, enabled=False):
            d_output_PV = d_logits_PV.to(self.output_PV.dtype)
            found = list(torch.autograd.grad(self.output_PV, wanted, d_output_PV, allow_unused=True))
        del self.output_PV
        if d_hidden_PC is not None:
            d_hidden_PC.copy_(found.pop(0))
        for total, part in zip(self.gradients, found, strict=True):
            if total is not None and part is not None:
                total += part


def _product_type(hidden: Tensor) -> torch.dtype:
    """The type of products with `hidden`: autocast's where it applies."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def _chunk_size(vocab_size: int, device: torch.device) -> int:
    return max(1, BUFFER.get(device.type, BUFFER_ELSEWHERE) // vocab_size)


def _check(hidden: Tensor, head: Tensor | nn.Module, targets: Tensor, mask: Tensor | None) -> None:
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2] or targets.dtype != torch.int64 or not targets.numel():
        found = f"hidden {list(hidden.shape)}, targets {targets.dtype} {list(targets.shape)}"
        raise WkvError(f"head_loss needs hidden [B, T, C] and int64 targets [B, T], found {found}")
    if mask is not None:
        check_mask(mask, targets)
    if isinstance(head, nn.Module):
        return
    if not isinstance(head, Tensor):
        raise WkvError(f"head must be a weight [V, C] or a module, found {type(head).__name__}")
    if head.ndim != 2 or head.shape[1] != hidden.shape[2]:
        raise WkvError(
            f"head must be [V, {hidden.shape[2]}] like hidden {list(hidden.shape)}, found {list(head.shape)}"
        )
    if head.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise WkvError(f"hidden is {hidden.dtype}, head {head.dtype}; convert one of them or use autocast")


def _check_positive(**numbers: float | Tensor | None) -> None:
    for name, value in numbers.items():
        if value is not None and not isinstance(value, Tensor) and not value > 0:
            raise WkvError(f"{name} must be positive, found {value!r}")


def _check_range(targets_P1: Tensor, vocab_size: int) -> None:
    if targets_P1.device.type == "cpu":
        low, high = (int(x) for x in targets_P1.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise WkvError(f"target {bad} is outside the vocabulary [0, {vocab_size}); mask what does not count")
