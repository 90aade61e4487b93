"""RWKV-6 "Finch" (arXiv 2404.05892; RWKV-LM `RWKV-v5/src/model.py`, `x060`).

Notable features:
- RWKV-5.2 whose decay depends on the token: a low-rank map of the shifted input moves the decay of each channel;
- the token shift depends on the token too: one low-rank map makes the five mixtures for w, k, v, r and g;
- matrix-valued state, bonus, group norm over heads and SiLU gate are those of RWKV-5.2;
- mixtures are stored the other way round than in RWKV-4 and 5: `time_maa` is the share of the previous token.

Shape letters: B batch, T time, H heads, N head size, A = H * N attention channels, C channels, F ffn width,
M rank of the token shift.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.channel_mix import GatedChannelMix
from wkv.layers.config import MultiHeadConfig
from wkv.layers.language_model import Block, MatrixStateModel
from wkv.layers.low_rank import times
from wkv.layers.norms import HeadNorm, wide
from wkv.layers.timeline import Timeline
from wkv.ops import wkv6
from wkv.registry import register_model
from wkv.state import LayerState

# From this width on the published models have low-rank maps twice as wide.
WIDE_MODEL = 4096


@dataclasses.dataclass(kw_only=True)
class RWKV6Config(MultiHeadConfig):
    """Sizes of an RWKV-6 model; ffn_size is 3.5 C, rounded down to a multiple of 32, by default.

    Args:
        shift_rank: inner width of each of the five token-shift maps (Dm); 32, or 64 from C = 4096 on.
        decay_rank: inner width of the decay map (Dd); 64, or 128 from C = 4096 on.
    """

    shift_rank: int | None = None
    decay_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = 2 if self.hidden_size >= WIDE_MODEL else 1
        self.ffn_size = self.ffn_size or max(32, 7 * self.hidden_size // 2 // 32 * 32)
        self.shift_rank = self.shift_rank or 32 * factor
        self.decay_rank = self.decay_rank or 64 * factor


class TimeMix(nn.Module):
    """The matrix memory of one layer."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        assert config.attention_size is not None
        assert config.shift_rank is not None
        assert config.decay_rank is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.num_heads, self.head_size = config.num_heads, config.head_size
        hidden, width = config.hidden_size, config.attention_size

        self.time_maa_x, self.time_maa_w, self.time_maa_k = (init.blank(1, 1, hidden) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (init.blank(1, 1, hidden) for _ in range(3))
        self.time_maa_w1 = init.blank(hidden, 5 * config.shift_rank)
        self.time_maa_w2 = init.blank(5, config.shift_rank, hidden)
        self.time_decay = init.blank(1, 1, width)
        self.time_decay_w1 = init.blank(hidden, config.decay_rank)
        self.time_decay_w2 = init.blank(config.decay_rank, width)
        self.time_faaaa = init.blank(self.num_heads, self.head_size)

        self.receptance = nn.Linear(hidden, width, bias=False)
        self.key = nn.Linear(hidden, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.output = nn.Linear(width, hidden, bias=False)
        self.ln_x = HeadNorm(self.num_heads, width, config.head_norm_eps)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        shifted_BTC, att_shift = timeline.shift(z_BTC, state["att_shift"])
        xw, xk, xv, xr, xg = self.mixtures(z_BTC, shifted_BTC - z_BTC)
        heads = (*z_BTC.shape[:2], self.num_heads, self.head_size)
        r_BTHN = wide(self.receptance(xr)).view(heads)
        k_BTHN = wide(self.key(xk)).view(heads)
        v_BTHN = wide(self.value(xv)).view(heads)
        w_BTA = wide(self.time_decay) + wide(times(torch.tanh(times(xw, self.time_decay_w1)), self.time_decay_w2))
        log_w_BTHN = -torch.exp(w_BTA).view(heads)
        y_BTHN, wkv = wkv6(
            r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, wide(self.time_faaaa), state["wkv"],
            mask=timeline.mask, reset=timeline.reset,
        )  # fmt: skip
        y_BTA = self.ln_x(y_BTHN) * F.silu(self.gate(xg))
        return self.output(y_BTA.to(z_BTC.dtype)), carry, {"att_shift": att_shift, "wkv": wkv}

    def mixtures(self, z_BTC: Tensor, d_BTC: Tensor) -> list[Tensor]:
        """The inputs of decay, key, value, receptance and gate [B, T, C], given z and d = previous z - z."""
        hidden_BTM = torch.tanh(times(torch.addcmul(z_BTC, d_BTC, self.time_maa_x), self.time_maa_w1))
        hidden_5BTM = hidden_BTM.unflatten(-1, (5, -1)).flatten(0, 1).transpose(0, 1)
        moved_5BTC = times(hidden_5BTM, self.time_maa_w2).unflatten(1, z_BTC.shape[:2])
        shares = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return [z_BTC + d_BTC * (share + moved) for share, moved in zip(shares, moved_5BTC, strict=True)]

    def reset_parameters(self) -> None:
        """Official initial values: at first neither token shift nor decay depends on the token."""
        ramp, line = init.ramp(self.time_maa_x.shape[-1]), init.unit_ramp(self.time_decay.numel())
        rho, eta = init.depth(self.layer, self.num_layers)
        values = {
            "time_maa_x": 1 - ramp**eta,
            "time_maa_w": 1 - ramp**eta,
            "time_maa_k": 1 - ramp**eta,
            "time_maa_v": 1 - (ramp**eta + 0.3 * rho),
            "time_maa_r": 1 - ramp ** (0.5 * eta),
            "time_maa_g": 1 - ramp ** (0.5 * eta),
            "time_decay": -6 + 5 * line ** (0.7 + 1.3 * rho),
            "time_faaaa": rho * (1 - line) + 0.1 * init.zigzag(line.numel()),
        }
        for name, value in values.items():
            init.fill_(getattr(self, name), value)
        for name in ("time_maa", "time_decay"):
            nn.init.zeros_(getattr(self, f"{name}_w1"))
            nn.init.uniform_(getattr(self, f"{name}_w2"), -0.01, 0.01)
        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1, "output": 0.0}
        for name, gain in gains.items():
            init.orthogonal_(getattr(self, name).weight, gain)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)


class ChannelMix(GatedChannelMix):
    """The gated squared-ReLU network on mixtures stored as shares of the previous token."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        assert config.ffn_size is not None
        super().__init__(config.hidden_size, config.ffn_size)
        self.layer, self.num_layers = layer, config.num_layers
        self.time_maa_k = init.blank(1, 1, config.hidden_size)
        self.time_maa_r = init.blank(1, 1, config.hidden_size)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C] and new state."""
        shifted_BTC, ffn_shift = timeline.shift(z_BTC, state["ffn_shift"])
        d_BTC = shifted_BTC - z_BTC
        xk_BTC, xr_BTC = (torch.addcmul(z_BTC, d_BTC, share) for share in (self.time_maa_k, self.time_maa_r))
        return self.mix(xk_BTC, xr_BTC), {"ffn_shift": ffn_shift}

    def reset_parameters(self) -> None:
        """Official initial values."""
        _, eta = init.depth(self.layer, self.num_layers)
        share = 1 - init.ramp(self.time_maa_k.shape[-1]) ** (eta**3)
        init.fill_(self.time_maa_k, share)
        init.fill_(self.time_maa_r, share)
        self.reset_matrices(key_gain=1.0)


PRESETS = {
    "1.6b": {"num_layers": 24, "hidden_size": 2048, "vocab_size": 65536},
    "3b": {"num_layers": 32, "hidden_size": 2560, "vocab_size": 65536},
    "7b": {"num_layers": 32, "hidden_size": 4096, "vocab_size": 65536},
}


@register_model("rwkv6", RWKV6Config, PRESETS)
class RWKV6(MatrixStateModel):
    """RWKV-6 language model."""

    name = "rwkv6"
    # The trainer tests the names in this order: the low-rank maps of the decay are not decays.
    learning_rate_factors = {  # noqa: RUF012
        "_w1": 1.0, "_w2": 1.0, "time_maa": 1.0, "time_decay": 2.0, "time_faaaa": 1.0,
    }  # fmt: skip

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix and channel mix of one layer."""
        return Block(config, layer, TimeMix(config, layer), ChannelMix(config, layer))
