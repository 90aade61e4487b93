"""RWKV-5 "Eagle" (arXiv 2404.05892; RWKV-LM `RWKV-v5/src/model.py`, previews in `RWKV-v4neo`).

Notable features:
- a matrix-valued state per head: a linear attention whose keys decay at a constant rate, with a bonus for the
  current token; receptance, key and value have no activation and no 1/sqrt(N);
- a group norm over each head, then a SiLU gate, before the output projection;
- token shift and channel mix are those of RWKV-4.

Three versions share this file. 5.2 is the published one; the previews differ in decay, bonus and gate alone:

    |            | 5.0 `rwkv5_0`               | 5.1 `rwkv5_1`      | 5.2 `rwkv5`          |
    | decay      | time_decay [H]              | time_decay [H]     | time_decay [H, N]    |
    | bonus      | exp(time_first), [H]        | time_faaaa [H]     | time_faaaa [H, N]    |
    | gate       | none                        | SiLU               | SiLU                 |

Shape letters: B batch, T time, H heads, N head size, A = H * N attention channels, C channels, F ffn width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.channel_mix import TimeMixedChannelMix
from wkv.layers.config import MultiHeadConfig
from wkv.layers.language_model import Block, MatrixStateModel
from wkv.layers.norms import HeadNorm, wide
from wkv.layers.timeline import Timeline
from wkv.ops import wkv5
from wkv.registry import register_model
from wkv.state import LayerState

Mix = Callable[[Tensor], Tensor]


@dataclasses.dataclass(kw_only=True)
class RWKV5Config(MultiHeadConfig):
    """Sizes of an RWKV-5 model; ffn_size is 3.5 C, rounded down to a multiple of 32, by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ffn_size = self.ffn_size or max(32, 7 * self.hidden_size // 2 // 32 * 32)


class TimeMix(nn.Module):
    """The matrix memory of one layer, as in 5.2."""

    # Scales of the initial orthogonal matrices.
    gains: ClassVar[dict[str, float]] = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1, "output": 0.0}

    def __init__(self, config: RWKV5Config, layer: int) -> None:
        super().__init__()
        assert config.attention_size is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.num_heads, self.head_size = config.num_heads, config.head_size
        hidden, width = config.hidden_size, config.attention_size
        self.build_decay_and_bonus()
        self.time_mix_k = init.blank(1, 1, hidden)
        self.time_mix_v = init.blank(1, 1, hidden)
        self.time_mix_r = init.blank(1, 1, hidden)
        self.receptance = nn.Linear(hidden, width, bias=False)
        self.key = nn.Linear(hidden, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.build_gate(hidden, width)
        self.output = nn.Linear(width, hidden, bias=False)
        self.ln_x = HeadNorm(self.num_heads, width, config.head_norm_eps)

    def build_decay_and_bonus(self) -> None:
        """Decay and bonus per channel."""
        self.time_decay = init.blank(self.num_heads, self.head_size)
        self.time_faaaa = init.blank(self.num_heads, self.head_size)

    def build_gate(self, hidden: int, width: int) -> None:
        """The output gate."""
        self.time_mix_g = init.blank(1, 1, hidden)
        self.gate = nn.Linear(hidden, width, bias=False)

    def decay_and_bonus(self) -> tuple[Tensor, Tensor]:
        """Log-decay and bonus [H, N], in float32."""
        return -torch.exp(wide(self.time_decay)), wide(self.time_faaaa)

    def gated(self, y_BTA: Tensor, mix: Mix) -> Tensor:
        """The normed output, gated."""
        return y_BTA * F.silu(self.gate(mix(self.time_mix_g)))

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        shifted_BTC, att_shift = timeline.shift(z_BTC, state["att_shift"])

        def mix(share: Tensor) -> Tensor:  # the share of the current token; the previous one has the rest
            return torch.addcmul(shifted_BTC, z_BTC - shifted_BTC, share)

        heads = (*z_BTC.shape[:2], self.num_heads, self.head_size)
        r_BTHN = wide(self.receptance(mix(self.time_mix_r))).view(heads)
        k_BTHN = wide(self.key(mix(self.time_mix_k))).view(heads)
        v_BTHN = wide(self.value(mix(self.time_mix_v))).view(heads)
        log_w_HN, u_HN = self.decay_and_bonus()
        y_BTHN, wkv = wkv5(
            r_BTHN, log_w_HN, k_BTHN, v_BTHN, u_HN, state["wkv"], mask=timeline.mask, reset=timeline.reset
        )
        y_BTA = self.gated(self.ln_x(y_BTHN), mix)
        return self.output(y_BTA.to(z_BTC.dtype)), carry, {"att_shift": att_shift, "wkv": wkv}

    def reset_parameters(self) -> None:
        """Official initial values."""
        ramp = init.ramp(self.time_mix_k.shape[-1])
        rho, eta = init.depth(self.layer, self.num_layers)
        shares = {"k": ramp**eta, "v": ramp**eta + 0.3 * rho, "r": ramp ** (0.5 * eta), "g": ramp ** (0.5 * eta)}
        for name, share in shares.items():
            if hasattr(self, f"time_mix_{name}"):
                init.fill_(getattr(self, f"time_mix_{name}"), share)
        self.reset_decay_and_bonus(rho)
        for name, gain in self.gains.items():
            if hasattr(self, name):
                init.orthogonal_(getattr(self, name).weight, gain)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)

    def reset_decay_and_bonus(self, rho: float) -> None:
        """Ramps over all channels; `rho` runs 0 -> 1 from the first to the last layer."""
        line = init.unit_ramp(self.time_decay.numel())
        init.fill_(self.time_decay, -6 + 5 * line ** (0.7 + 1.3 * rho))
        init.fill_(self.time_faaaa, rho * (1 - line) + 0.1 * init.zigzag(line.numel()))


class TimeMix51(TimeMix):
    """5.1: one decay and one bonus per head, the same for all its channels."""

    gains: ClassVar[dict[str, float]] = {"receptance": 1.0, "key": 1.0, "value": 1.0, "gate": 1.0, "output": 0.0}

    def build_decay_and_bonus(self) -> None:
        """Decay and bonus per head."""
        self.time_decay = init.blank(self.num_heads)
        self.time_faaaa = init.blank(self.num_heads)

    def decay_and_bonus(self) -> tuple[Tensor, Tensor]:
        """Log-decay and bonus [H, N], in float32."""
        return self.per_channel(-torch.exp(wide(self.time_decay))), self.per_channel(wide(self.time_faaaa))

    def per_channel(self, per_head: Tensor) -> Tensor:
        """[H] -> [H, N]."""
        return per_head[:, None].expand(self.num_heads, self.head_size)

    def reset_decay_and_bonus(self, rho: float) -> None:
        """Ramps over the heads, without zigzag."""
        line = init.unit_ramp(self.num_heads)
        init.fill_(self.time_decay, -6 + 5 * line ** (0.7 + 1.3 * rho))
        init.fill_(self.time_faaaa, rho * (1 - line))


class TimeMix50(TimeMix51):
    """5.0: the logarithm of the bonus is stored, and nothing is gated."""

    def build_decay_and_bonus(self) -> None:
        """Decay and logarithm of the bonus per head."""
        self.time_decay = init.blank(self.num_heads)
        self.time_first = init.blank(self.num_heads)

    def build_gate(self, hidden: int, width: int) -> None:
        """No gate."""

    def decay_and_bonus(self) -> tuple[Tensor, Tensor]:
        """Log-decay and bonus [H, N], in float32."""
        log_w_H, u_H = -torch.exp(wide(self.time_decay)), torch.exp(wide(self.time_first))
        return self.per_channel(log_w_H), self.per_channel(u_H)

    def gated(self, y_BTA: Tensor, mix: Mix) -> Tensor:
        """The normed output as it is."""
        return y_BTA

    def reset_decay_and_bonus(self, rho: float) -> None:
        """Decay ramps over the heads; the bonus starts at exp(-3) everywhere."""
        init.fill_(self.time_decay, -6 + 5 * init.unit_ramp(self.num_heads) ** (0.7 + 1.3 * rho))
        nn.init.constant_(self.time_first, -3.0)


PRESETS = {
    "0.4b": {"num_layers": 24, "hidden_size": 1024, "vocab_size": 65536},
    "1.5b": {"num_layers": 24, "hidden_size": 2048, "vocab_size": 65536},
    "3b": {"num_layers": 32, "hidden_size": 2560, "vocab_size": 65536},
    "7b": {"num_layers": 32, "hidden_size": 4096, "vocab_size": 65536},
}


@register_model("rwkv5", RWKV5Config, PRESETS)
class RWKV5(MatrixStateModel):
    """RWKV-5.2 language model."""

    name = "rwkv5"
    # The trainer tests the names in this order: a mixture is never taken for a decay.
    learning_rate_factors = {"time_mix": 1.0, "time_decay": 2.0, "time_faaaa": 1.0, "time_first": 3.0}  # noqa: RUF012
    time_mix: ClassVar[type[TimeMix]] = TimeMix

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix and channel mix of one layer."""
        hidden, ffn = config.hidden_size, config.ffn_size
        channel_mix = TimeMixedChannelMix(hidden, ffn, layer, config.num_layers, self.channel_mix_gain(hidden, ffn))
        return Block(config, layer, self.time_mix(config, layer), channel_mix)

    @staticmethod
    def channel_mix_gain(hidden_size: int, ffn_size: int) -> float:
        """Scale of the channel mix's initial key matrix."""
        return 1.0


class _Preview(RWKV5):
    """What the two previews share: the initialisation rules of the RWKV-4 trainer."""

    @staticmethod
    def channel_mix_gain(hidden_size: int, ffn_size: int) -> float:
        """Tall matrices are scaled up."""
        return math.sqrt(max(1.0, ffn_size / hidden_size))


@register_model("rwkv5_1", RWKV5Config)
class RWKV51(_Preview):
    """RWKV-5.1 language model."""

    name = "rwkv5_1"
    time_mix = TimeMix51


@register_model("rwkv5_0", RWKV5Config)
class RWKV50(_Preview):
    """RWKV-5.0 language model."""

    name = "rwkv5_0"
    time_mix = TimeMix50
