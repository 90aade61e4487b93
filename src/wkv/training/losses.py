"""The language-model loss: token cross-entropy with the L2Wrap gradient (RWKV-LM, `RWKV-v7/train_temp`).

Shape letters: B batch, T time, V vocabulary, P = B * T positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wkv.errors import WkvError


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy and L2Wrap share one gradient tensor [P, V]."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, targets_P1: Tensor, mask_P1: Tensor | None, l2wrap: float) -> Tensor:
        log_p_PV = F.log_softmax(logits_PV, -1)
        losses_P1 = -log_p_PV.gather(1, targets_P1)
        # Where several logits are largest, max gives the first.
        ctx.save_for_backward(log_p_PV, targets_P1, mask_P1, *logits_PV.max(1, keepdim=True))
        ctx.l2wrap = l2wrap
        return (losses_P1 if mask_P1 is None else losses_P1[mask_P1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        log_p_PV, targets_P1, mask_P1, largest_P1, index_P1 = ctx.saved_tensors
        count = targets_P1.numel()
        weights_P1 = (grad / count).expand_as(largest_P1) if mask_P1 is None else grad * mask_P1 / mask_P1.sum()
        grad_PV = log_p_PV.exp().mul_(weights_P1).scatter_add_(1, targets_P1, -weights_P1)
        if ctx.l2wrap:
            grad_PV.scatter_add_(1, index_P1, largest_P1 * (grad * ctx.l2wrap / count))
        return grad_PV, None, None, None


def next_token_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None, l2wrap: float = 1e-4) -> Tensor:
    """Mean cross-entropy per token in nats, in float32 (float64 if the logits are).

    L2Wrap leaves the value alone and adds to the gradient, at the largest logit of every position (the first of equal
    ones), `largest_logit * l2wrap / (B * T)`: the largest logit is drawn towards 0. It follows the incoming gradient,
    so loss scaling and gradient accumulation stay right.

    Args:
        logits: [B, T, V].
        targets: int64 [B, T].
        mask: bool [B, T]; only True positions count in the mean. L2Wrap covers every position.
        l2wrap: strength; 0 switches it off.

    Raises:
        WkvError: if shapes or types do not fit, or if no position counts.
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2] or targets.dtype != torch.int64:
        found = f"logits {list(logits.shape)}, targets {targets.dtype} {list(targets.shape)}"
        raise WkvError(f"next_token_loss needs logits [B, T, V] and int64 targets [B, T], found {found}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        check_mask(mask, targets)
        if not mask.any():
            raise WkvError("mask leaves no position to compute a loss from")
        mask = mask.reshape(-1, 1)
    loss: Tensor = _NextTokenLoss.apply(logits.flatten(0, 1), targets.reshape(-1, 1), mask, l2wrap)
    return loss


def check_mask(mask: Tensor, targets: Tensor) -> None:
    """Raise `WkvError` unless `mask` is bool with the shape of `targets`."""
    if mask.dtype != torch.bool or mask.shape != targets.shape:
        raise WkvError(f"mask must be bool {list(targets.shape)}, found {mask.dtype} {list(mask.shape)}")
