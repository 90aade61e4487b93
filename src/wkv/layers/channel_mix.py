"""The squared-ReLU channel mix with a sigmoid receptance gate, shared by RWKV-4, 5 and 6.

Shape letters: B batch, T time, C channels, F ffn width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedChannelMix(nn.Module):
    """out = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2 (arXiv 2305.13048, section 3.2).

    Subclasses own the token shift: they hand over the two mixed inputs.

    Args:
        hidden_size: C.
        ffn_size: F.
    """

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, ffn_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(ffn_size, hidden_size, bias=False)

    def mix(self, xk_BTC: Tensor, xr_BTC: Tensor) -> Tensor:
        """The gated squared-ReLU network on the two mixed inputs [B, T, C]."""
        return torch.sigmoid(self.receptance(xr_BTC)) * self.value(squared_relu(self.key(xk_BTC)))


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return torch.relu(x).square()
