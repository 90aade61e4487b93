"""The squared-ReLU channel mix with a sigmoid receptance gate, shared by RWKV-4, 5 and 6.

Shape letters: B batch, T time, C channels, F ffn width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.timeline import Timeline
from wkv.state import LayerState


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

    def reset_matrices(self, key_gain: float) -> None:
        """Official initial values: the key orthogonal, value and receptance zero."""
        init.orthogonal_(self.key.weight, key_gain)
        init.orthogonal_(self.value.weight, 0.0)
        init.orthogonal_(self.receptance.weight, 0.0)


class TimeMixedChannelMix(GatedChannelMix):
    """The channel mix of RWKV-4 and 5: `time_mix` is the share of the current token, the previous one has the rest.

    Args:
        hidden_size: C.
        ffn_size: F.
        layer: index of the layer.
        num_layers: L.
        key_gain: initial scale of the key matrix.
    """

    def __init__(self, hidden_size: int, ffn_size: int, layer: int, num_layers: int, key_gain: float = 1.0) -> None:
        super().__init__(hidden_size, ffn_size)
        self.layer, self.num_layers, self.key_gain = layer, num_layers, key_gain
        self.time_mix_k = init.blank(1, 1, hidden_size)
        self.time_mix_r = init.blank(1, 1, hidden_size)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C] and new state."""
        (xk_BTC, xr_BTC), slots = self.mixed(z_BTC, carry, state, timeline)
        return self.mix(xk_BTC, xr_BTC), slots

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key and receptance read, each [B, T, C], and the new states."""
        shifted_BTC, ffn_shift = timeline.shift(z_BTC, state["ffn_shift"])
        return mixtures(z_BTC, shifted_BTC, self.time_mix_k, self.time_mix_r), {"ffn_shift": ffn_shift}

    def reset_parameters(self) -> None:
        """Official initial values."""
        _, eta = init.depth(self.layer, self.num_layers)
        self.time_mix_k.copy_(init.ramp(self.time_mix_k.shape[-1]) ** eta)
        self.time_mix_r.copy_(init.ramp(self.time_mix_r.shape[-1]) ** eta)
        self.reset_matrices(self.key_gain)


def mixtures(z_BTC: Tensor, shifted_BTC: Tensor, *shares: Tensor) -> list[Tensor]:
    """Per share [1, 1, C]: that much of the current token and the rest of the previous one."""
    d_BTC = z_BTC - shifted_BTC
    return [torch.addcmul(shifted_BTC, d_BTC, share) for share in shares]


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return torch.relu(x).square()
