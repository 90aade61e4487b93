"""Normalisations computed in float32 whatever the type of the parameters.

Shape letters: B batch, T time, H heads, N head size, C = H * N channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class LayerNorm(nn.LayerNorm):
    """Layer norm over channels with weight and bias, computed in float32, returned in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = wide(self.weight), wide(self.bias)
            return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """Group norm with one group per head, then weight and bias per channel (`ln_x` in the checkpoints).

    Official eps is 64e-5 for every head size: the trainers divide by 8 first and add 1e-5, which is the same.

    Args:
        num_heads: H.
        channels: C = H * N.
        eps: added to the variance.
    """

    def __init__(self, num_heads: int, channels: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, y_BTHN: Tensor) -> Tensor:
        """y [B, T, H, N] -> [B, T, C], in float32 (float64 if y or the weights are)."""
        with torch.autocast(y_BTHN.device.type, enabled=False):
            y = F.layer_norm(wide(y_BTHN), y_BTHN.shape[-1:], eps=self.eps).flatten(-2)
            return torch.addcmul(wide(self.bias), y, wide(self.weight))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over channels, computed in float32, returned in the type of the input.

    Args:
        channels: C.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)
