"""RWKV-7 "Goose" (arXiv 2503.14456; RWKV-LM `RWKV-v7/train_temp/src/model.py`).

Notable features:
- a matrix-valued state per head, updated by a generalised delta rule: what is stored under one key is removed before
  a new value is written, with a decay, a removal strength and a write strength of their own per channel and token;
- the in-context learning rate `a` (iclr) and the decay `w` come from low-rank maps of the token-shifted input;
- from the second layer on, values are mixed with the first layer's values (value residual);
- the bonus of the current token is added after the group norm over heads;
- the channel mix is a plain squared-ReLU network without receptance gate.

Shape letters: B batch, T time, H heads, N head size, A = H * N attention channels, C channels, F ffn width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.channel_mix import squared_relu
from wkv.layers.config import MultiHeadConfig, between, option
from wkv.layers.language_model import Block, MatrixStateModel
from wkv.layers.low_rank import times
from wkv.layers.norms import HeadNorm, wide
from wkv.layers.timeline import Timeline
from wkv.ops import wkv7
from wkv.ops.gpu import stages
from wkv.registry import register_model
from wkv.state import LayerState

# The strongest decay is exp(-exp(-1/2)) = 0.545 per token.
LOG_DECAY_SCALE = -math.exp(-0.5)

# (y, `Vectors`, state, timeline) -> what takes the place of y [B, T, H, N], and further slots.
SideMemory = Callable[[Tensor, tuple[Tensor, ...], LayerState, Timeline], tuple[Tensor, LayerState]]

GROWTH_STEPS = ({"heads"}, {"param_tokens"}, {"layers", "index"})


def growth_steps(value: object) -> str | None:
    """The check of `RWKV7Config.growth`."""
    steps: list[Any] = value if isinstance(value, list) else [None]
    fits = all(
        isinstance(step, dict) and set(step) in GROWTH_STEPS and all(type(n) is int and n > 0 for n in step.values())
        for step in steps
    )
    return None if fits else "a list of growth steps such as {'heads': 2}"


@dataclasses.dataclass(kw_only=True)
class RWKV7Config(MultiHeadConfig):
    """Sizes of an RWKV-7 model; ranks of None follow the official rule for new trainings.

    Args:
        decay_rank, iclr_rank, value_rank, gate_rank: inner widths of the low-rank maps (Dw, Da, Dv, Dg).
        a_scale: largest in-context learning rate, in (0, 2]. All published models have 1. With 2 a state can flip its
            sign, which tracking states needs (parity, permutations), and it can grow without bound.
        growth: what `wkv.models.growth` has added since the model was made, oldest first: {"heads": 2},
            {"param_tokens": 64}, {"layers": 1, "index": 3}.
    """

    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    a_scale: float = option(1.0, between(0, 2, open_low=True))
    growth: list[dict[str, int]] = option([], growth_steps)  # noqa: RUF009 (a field, not a list)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.attention_size is not None
        root = math.sqrt(self.hidden_size)
        self.ffn_size = self.ffn_size or 4 * self.hidden_size
        self.decay_rank = self.decay_rank or low_rank(2.5 * root)
        self.iclr_rank = self.iclr_rank or low_rank(2.5 * root)
        self.value_rank = self.value_rank or low_rank(1.7 * root)
        self.gate_rank = self.gate_rank or low_rank(5 * root)


def low_rank(width: float) -> int:
    """The official rounding of a low-rank width: to a multiple of 32, at least 32."""
    return max(32, 32 * round(width / 32))


class Vectors(NamedTuple):
    """What the heads read at every token, all [B, T, H, N]: kk is the removal key, iclr the in-context rate."""

    r: Tensor
    log_w: Tensor
    k: Tensor
    v: Tensor
    kk: Tensor
    iclr: Tensor


def lerp(z_BTC: Tensor, shifted_BTC: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """From the input towards the one before it, for each coefficient vector."""
    d_BTC = shifted_BTC - z_BTC
    return tuple(torch.addcmul(z_BTC, d_BTC, x) for x in mixes)


class FusedVectors(Vectors):
    """Those of `wkv.ops.gpu.stages`: `removal`, which is -kk and kk * iclr, is there already."""

    removal: tuple[Tensor, Tensor]


class TimeMix(nn.Module):
    """The delta-rule memory of one layer.

    Inside `wkv.ops.gpu.stages.fused` its elementwise stages run fused; the torch form beside each is what they mean.
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        assert config.attention_size is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.num_heads, self.head_size, self.a_scale = config.num_heads, config.head_size, config.a_scale
        hidden, width = config.hidden_size, config.attention_size

        self.x_r, self.x_w, self.x_k = (init.blank(1, 1, hidden) for _ in range(3))
        self.x_v, self.x_a, self.x_g = (init.blank(1, 1, hidden) for _ in range(3))
        self.w0, self.w1, self.w2 = init.low_rank_map(hidden, config.decay_rank, width)
        self.a0, self.a1, self.a2 = init.low_rank_map(hidden, config.iclr_rank, width)
        self.v0, self.v1, self.v2 = init.low_rank_map(hidden, config.value_rank, width)
        _, self.g1, self.g2 = init.low_rank_map(hidden, config.gate_rank, width)
        self.k_k, self.k_a = init.blank(1, 1, width), init.blank(1, 1, width)
        self.r_k = init.blank(self.num_heads, self.head_size)

        self.receptance = nn.Linear(hidden, width, bias=False)
        self.key = nn.Linear(hidden, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.output = nn.Linear(width, hidden, bias=False)
        self.ln_x = HeadNorm(self.num_heads, width, config.head_norm_eps)
        self.side_memory: SideMemory | None = None  # a memory beside that of each head, see `wkv.tuning`

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry with the first layer's values, new state."""
        shifted_BTC, att_shift = timeline.shift(z_BTC, state["att_shift"])
        vectors, gate_BTA, carry = self.vectors(z_BTC, shifted_BTC, carry)
        y_BTHN, slots = self.remember(vectors, state, timeline)
        out_BTC = self.output(self.read(y_BTHN, vectors, gate_BTA))
        return out_BTC, carry, {"att_shift": att_shift, **slots}

    def vectors(
        self, z_BTC: Tensor, shifted_BTC: Tensor, carry: dict[str, Tensor]
    ) -> tuple[Vectors, Tensor, dict[str, Tensor]]:
        """The input and the one before it [B, T, C] -> vectors, gate [B, T, A], carry with the first layer's values."""
        fused, mixes = self.fused(z_BTC), (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = (stages.mix if fused else lerp)(z_BTC, shifted_BTC, mixes)
        r_BTA, k_BTA, v_BTA = self.receptance(xr), self.key(xk), self.value(xv)
        moved_BTA = times(torch.tanh(times(xw, self.w1)), self.w2)
        log_w_BTA = LOG_DECAY_SCALE * torch.sigmoid(wide(self.w0) + wide(moved_BTA))
        iclr_BTA = self.a_scale * torch.sigmoid(self.a0 + times(times(xa, self.a1), self.a2))
        gate_BTA = times(torch.sigmoid(times(xg, self.g1)), self.g2)
        if self.layer == 0:
            carry = {**carry, "first_value": v_BTA}
        else:
            share_BTA = torch.sigmoid(self.v0 + times(times(xv, self.v1), self.v2))
            v_BTA = v_BTA + (carry["first_value"] - v_BTA) * share_BTA

        heads = (*z_BTC.shape[:2], self.num_heads, self.head_size)
        r, log_w, v, iclr = (x.view(heads) for x in (r_BTA, log_w_BTA, v_BTA, iclr_BTA))
        if fused:
            kk, a, b, k = stages.keys(k_BTA, iclr_BTA, self.k_k, self.k_a, self.head_size)
            vectors = FusedVectors(r, log_w, k, v, kk, iclr)
            vectors.removal = a, b
            return vectors, gate_BTA, carry
        # The removal direction is unit length per head, and made from the key before the key is changed.
        kk_BTHN = F.normalize(wide(k_BTA * self.k_k).view(heads), dim=-1, eps=1e-12)
        k_BTA = k_BTA * torch.addcmul(1 - self.k_a, iclr_BTA, self.k_a)
        return Vectors(r, log_w, k_BTA.view(heads), v, kk_BTHN, iclr), gate_BTA, carry

    def remember(self, vectors: Vectors, state: LayerState, timeline: Timeline) -> tuple[Tensor, LayerState]:
        """What the heads read from the updated memory [B, T, H, N], and the slots of that memory."""
        r, log_w, k, v, kk, iclr = vectors
        flags = {"mask": timeline.mask, "reset": timeline.reset}
        a, b = vectors.removal if isinstance(vectors, FusedVectors) else (-kk, kk * iclr)
        y_BTHN, wkv = wkv7(r, log_w, k, v, a, b, state["wkv"], **flags)
        if self.side_memory is None:
            return y_BTHN, {"wkv": wkv}
        y_BTHN, more = self.side_memory(y_BTHN, vectors, state, timeline)
        return y_BTHN, {"wkv": wkv, **more}

    def read(self, y_BTHN: Tensor, vectors: Vectors, gate_BTA: Tensor) -> Tensor:
        """What the memory gave [B, T, H, N], normed per head, with the bonus of the current token, gated [B, T, A]."""
        r, _, k, v, _, _ = vectors
        if self.fused(y_BTHN):
            norm = self.ln_x
            return stages.reading(y_BTHN, r, k, v, gate_BTA, self.r_k, norm.weight, norm.bias, norm.eps)
        bonus_BTH1 = (r * k * self.r_k).sum(-1, keepdim=True)
        y_BTA = self.ln_x(y_BTHN) + (bonus_BTH1 * v).flatten(-2)
        return (y_BTA * gate_BTA).to(gate_BTA.dtype)

    def fused(self, x: Tensor) -> bool:
        """Whether to call `wkv.ops.gpu.stages`; not where an adapter stands in the place of the norm."""
        return stages.active(x, self.head_size) and isinstance(self.ln_x, HeadNorm)

    def reset_parameters(self) -> None:
        """Official initial values."""
        hidden, width = self.x_r.shape[-1], self.k_k.shape[-1]
        rho, eta = init.depth(self.layer, self.num_layers)
        ramp, line = init.ramp(hidden), init.unit_ramp(width) - 0.5
        within_head = torch.arange(width, dtype=torch.float64) % self.head_size
        half = max((self.head_size - 1) / 2, 0.5)
        s = (within_head - (self.head_size - 1) / 2) / half
        zigzag = s * s.abs()
        decay_speed = -6 + 6 * init.unit_ramp(width) ** (1 + rho**0.3)
        values = {
            "x_r": 1 - ramp ** (0.2 * eta),
            "x_w": 1 - ramp ** (0.9 * eta),
            "x_k": 1 - ramp ** (0.7 * eta),
            "x_v": 1 - ramp ** (0.7 * eta),
            "x_a": 1 - ramp ** (0.9 * eta),
            "x_g": 1 - ramp ** (0.2 * eta),
            "w0": decay_speed + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * line,
            "v0": 0.73 - 0.4 * line,
            "k_k": 0.71 - 0.1 * line,
            "k_a": torch.full((width,), 1.02),
            "r_k": torch.full((width,), -0.04),
        }
        for name, value in values.items():
            init.fill_(getattr(self, name), value)
        for name in "wavg":
            nn.init.zeros_(getattr(self, f"{name}1"))
            up = getattr(self, f"{name}2")
            nn.init.orthogonal_(up, init.tall_gain(up, 0.1))
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.output, 0.0)):
            init.orthogonal_(linear.weight, gain)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)


class ChannelMix(nn.Module):
    """out = W_v relu(W_k x_k)^2."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        assert config.ffn_size is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.x_k = init.blank(1, 1, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C] and new state."""
        shifted_BTC, ffn_shift = timeline.shift(z_BTC, state["ffn_shift"])
        k_BTF = self.key(torch.addcmul(z_BTC, shifted_BTC - z_BTC, self.x_k))
        return self.value(squared_relu(k_BTF)), {"ffn_shift": ffn_shift}

    def reset_parameters(self) -> None:
        """Official initial values."""
        _, eta = init.depth(self.layer, self.num_layers)
        init.fill_(self.x_k, 1 - init.ramp(self.x_k.shape[-1]) ** (eta**4))
        init.orthogonal_(self.key.weight, 1.0)
        init.orthogonal_(self.value.weight, 0.0)


PRESETS = {
    "0.1b": {"num_layers": 12, "hidden_size": 768, "vocab_size": 65536,
             "decay_rank": 64, "iclr_rank": 64, "value_rank": 32, "gate_rank": 128},
    "0.4b": {"num_layers": 24, "hidden_size": 1024, "vocab_size": 65536,
             "decay_rank": 64, "iclr_rank": 64, "value_rank": 32, "gate_rank": 128},
    "1.5b": {"num_layers": 24, "hidden_size": 2048, "vocab_size": 65536,
             "decay_rank": 96, "iclr_rank": 96, "value_rank": 64, "gate_rank": 256},
    "2.9b": {"num_layers": 32, "hidden_size": 2560, "vocab_size": 65536,
             "decay_rank": 96, "iclr_rank": 96, "value_rank": 64, "gate_rank": 320},
    "7.2b": {"num_layers": 32, "hidden_size": 4096, "vocab_size": 65536,
             "decay_rank": 128, "iclr_rank": 128, "value_rank": 96, "gate_rank": 480},
}  # fmt: skip


@register_model("rwkv7", RWKV7Config, PRESETS)
class RWKV7(MatrixStateModel):
    """RWKV-7 language model."""

    name = "rwkv7"
    learning_rate_factors = {"att.w0": 2.0}  # noqa: RUF012

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix and channel mix of one layer."""
        return Block(config, layer, TimeMix(config, layer), ChannelMix(config, layer))
