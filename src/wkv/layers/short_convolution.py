"""Causal convolution of every channel by itself, over a few tokens of the same document.

Shape letters: B batch, T time, K channels, S tokens that the convolution sees (the current one is the last).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.timeline import Timeline


class ShortConvolution(nn.Module):
    """y_t = sum over i < S of w_i x_{t - S + 1 + i}, plus a bias if wanted; zeros stand before a document.

    Args:
        channels: K.
        size: S, at least 2.
        bias: whether there is one.
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = init.blank(channels, 1, size)  # as torch's convolutions have it
        self.bias = init.blank(channels) if bias else None

    def forward(self, x_BTK: Tensor, carried_BSK: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """One input, and what came before.

        Args:
            x_BTK: inputs.
            carried_BSK: the last S - 1 inputs of earlier calls, the newest last.
            timeline: tokens that do not exist are passed over; a reset puts zeros before its token.

        Returns:
            y [B, T, K] (unspecified where the token does not exist), and what to carry on [B, S - 1, K].
        """
        weight_SK = self.weight.squeeze(1).T
        y_BTK = x_BTK * weight_SK[-1]
        earlier_BTK, carried = x_BTK, []
        for back in range(1, self.size):  # shifting k times gives the k-th token before
            earlier_BTK, last_BK = timeline.shift(earlier_BTK, carried_BSK[:, -back])
            carried.append(last_BK)
            y_BTK = torch.addcmul(y_BTK, earlier_BTK, weight_SK[-1 - back])
        return y_BTK if self.bias is None else y_BTK + self.bias, torch.stack(carried[::-1], 1)

    def empty(self, batch_size: int, shift: Tensor) -> Tensor:
        """What is carried before the first token: zeros [B, S - 1, K] like `shift`."""
        return shift.new_zeros(batch_size, self.size - 1, len(self.weight))

    def reset_parameters(self) -> None:
        """Uniform in +-S^-1/2: torch's values for such a convolution."""
        bound = self.size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
