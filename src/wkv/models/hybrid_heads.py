"""The heads of `wkv.models.hybrid`: state heads, an attention path for RWKV-7, middle heads.

Our reconstruction, as that file says.

Shape letters: B batch, T time, H attention heads, G heads of keys and values, E state heads, M middle heads,
A = H N, N head size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.low_rank import times
from wkv.layers.norms import RMSNorm, wide
from wkv.layers.timeline import Timeline
from wkv.models.hybrid_config import HybridConfig
from wkv.models.rwkv7 import LOG_DECAY_SCALE, Vectors
from wkv.models.transformer import Attention, TransformerConfig
from wkv.ops import wkv7
from wkv.state import LayerState

TINY = 1e-6  # eps of norms without weights

Look = Callable[[Tensor], Tensor]


class StateHeads(nn.Module):
    """RWKV-7 heads without token shift, norm and gate, beside the attention heads of a transformer."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        assert config.state_heads is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.head_size, self.a_scale = config.head_size, config.a_scale
        hidden, width = config.hidden_size, config.state_heads * config.head_size
        self.receptance, self.key, self.value = (nn.Linear(hidden, width, bias=False) for _ in range(3))
        self.w0, self.w1, self.w2 = init.low_rank_map(hidden, config.decay_rank, width)
        self.a0, self.a1, self.a2 = init.low_rank_map(hidden, config.iclr_rank, width)
        self.norm = RMSNorm(width, config.norm_eps) if config.branch_norm else nn.Identity()
        self.output = nn.Linear(width, hidden, bias=False)

    def vectors(self, z_BTC: Tensor) -> Vectors:
        """Normed input [B, T, C] -> what the heads read at every token, each [B, T, E, N]."""
        split = (-1, self.head_size)
        r, k, v = (linear(z_BTC).unflatten(-1, split) for linear in (self.receptance, self.key, self.value))
        moved = times(torch.tanh(times(z_BTC, self.w1)), self.w2)
        log_w = (LOG_DECAY_SCALE * torch.sigmoid(wide(self.w0) + wide(moved))).unflatten(-1, split)
        iclr = self.a_scale * torch.sigmoid(self.a0 + times(times(z_BTC, self.a1), self.a2)).unflatten(-1, split)
        kk = F.normalize(wide(k), dim=-1, eps=1e-12)
        # What fades and is removed is as much as is written: the state needs no norm.
        k = k * (1 - log_w.exp() + wide(iclr)).to(k.dtype)
        return Vectors(r, log_w, k, v, kk, iclr)

    def forward(self, y_BTEN: Tensor) -> Tensor:
        """What the heads have read [B, T, E, N] -> their part of the output [B, T, C]."""
        part_BTC: Tensor = self.output(self.norm(y_BTEN.flatten(-2)))
        return part_BTC

    def reset_parameters(self) -> None:
        """Vectors of unit size, decays from slow to fast over the channels, and an output of zeros."""
        rho, _ = init.depth(self.layer, self.num_layers)
        init.fill_(self.w0, -5.5 + 6 * init.unit_ramp(self.w0.shape[-1]) ** (1 + rho**0.3))
        nn.init.zeros_(self.a0)
        for first, second in ((self.w1, self.w2), (self.a1, self.a2)):
            nn.init.zeros_(first)
            nn.init.orthogonal_(second, init.tall_gain(second, 0.1))
        for linear in (self.receptance, self.key, self.value):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        reset_norm(self.norm)
        nn.init.zeros_(self.output.weight)


def remember(inputs: list[Tensor], state: LayerState, timeline: Timeline) -> tuple[Tensor, LayerState]:
    """The recurrence of `StateHeads` on its vectors."""
    r, log_w, k, v, kk, iclr = inputs
    flags = {"mask": timeline.mask, "reset": timeline.reset}
    y_BTEN, wkv = wkv7(r, log_w, k, v, -kk, kk * iclr, state["wkv"], **flags)
    return y_BTEN, {"wkv": wkv}


class InfusedAttention(Attention):
    """A small attention path beside an RWKV-7 layer: norms of queries and keys, a gate per channel and token."""

    def __init__(self, config: TransformerConfig, layer: int, gate_rank: int | None) -> None:
        super().__init__(config, layer)
        self.q_norm, self.k_norm = (RMSNorm(config.head_size, config.norm_eps) for _ in "qk")
        self.g0, self.g1, self.g2 = init.low_rank_map(config.hidden_size, gate_rank, self.output.in_features)

    def project(self, z_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input [B, T, C] -> queries [B, T, H, N], keys and values [B, T, G, N]."""
        q_BTHN, k_BTGN, v_BTGN = project(self, z_BTC)
        return self.q_norm(q_BTHN), self.k_norm(k_BTGN), v_BTGN

    def gated(self, z_BTC: Tensor, y_BTHN: Tensor) -> Tensor:
        """What the heads have found [B, T, H, N] -> their part of the output [B, T, C]."""
        gate_BTA = torch.sigmoid(self.g0 + times(times(z_BTC, self.g1), self.g2))
        part_BTC: Tensor = self.output(y_BTHN.flatten(-2) * gate_BTA)
        return part_BTC

    def reset_parameters(self) -> None:
        """As in a transformer, gates of one half, and an output of zeros."""
        super().reset_parameters()
        for parameter in (self.g0, self.g1, self.output.weight):
            nn.init.zeros_(parameter)
        nn.init.orthogonal_(self.g2, init.tall_gain(self.g2, 0.1))
        for norm in (self.q_norm, self.k_norm):
            reset_norm(norm)


def project(attention: Attention, z_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, N], keys and values [B, T, G, N], positions not applied."""
    split = (-1, attention.head_size)
    q, k, v = (x(z_BTC).unflatten(-1, split) for x in (attention.query, attention.key, attention.value))
    return q, k, v


class MiddleHeads(nn.Module):
    """Heads that combine what one attention head and one state head have found: A_j and Y_j for j < M.

    By `fusion`: "concat" [A; Y] U; "additive" attention again, with queries moved by Y P; "additive_output"
    A + l Y P; "gated" g A + (1 - g) rms(Y) with g = sigmoid([A; Y] U + b); "mean" (rms(A) c + rms(Y) d) / 2.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        assert config.middle_heads is not None
        self.fusion, self.count, size = config.fusion, config.middle_heads, config.head_size
        if self.fusion in ("concat", "gated"):
            self.join = init.blank(self.count, 2 * size, size)
        if self.fusion in ("additive", "additive_output"):
            self.steer = init.blank(self.count, size, size)
        if self.fusion == "additive_output":
            self.amount = init.blank(self.count, 1)
        if self.fusion == "gated":
            self.bias = init.blank(self.count, size)
        if self.fusion == "mean":
            self.attention_scale, self.state_scale = (init.blank(self.count, size) for _ in range(2))
        width = self.count * size
        self.norm = RMSNorm(width, config.norm_eps) if config.branch_norm else nn.Identity()
        self.output = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, a_BTHN: Tensor, y_BTEN: Tensor, q_BTHN: Tensor, look: Look) -> Tensor:
        """What attention and state heads have found, and the queries -> a part of the output [B, T, C].

        `look` takes other queries of the first M heads, and returns what those find.
        """
        a, y, q = (x[:, :, : self.count] for x in (a_BTHN, y_BTEN, q_BTHN))
        m_BTMN = look(q + per_head(y, self.steer)) if self.fusion == "additive" else getattr(self, self.fusion)(a, y)
        part_BTC: Tensor = self.output(self.norm(m_BTMN.flatten(-2)))
        return part_BTC

    def concat(self, a: Tensor, y: Tensor) -> Tensor:
        """A linear map of both, [B, T, M, N] each."""
        return per_head(torch.cat([a, y], -1), self.join)

    def additive_output(self, a: Tensor, y: Tensor) -> Tensor:
        """The attention head, and some of the state head."""
        return a + self.amount.to(a.dtype) * per_head(y, self.steer)

    def gated(self, a: Tensor, y: Tensor) -> Tensor:
        """One or the other, channel by channel."""
        gate = torch.sigmoid(per_head(torch.cat([a, y], -1), self.join) + self.bias.to(a.dtype))
        return gate * a + (1 - gate) * normed(y)

    def mean(self, a: Tensor, y: Tensor) -> Tensor:
        """Both alike, as the parallel heads of Hymba (arXiv 2411.13676) meet."""
        return (normed(a) * self.attention_scale.to(a.dtype) + normed(y) * self.state_scale.to(a.dtype)) / 2

    def reset_parameters(self) -> None:
        """An output of zeros; before it attention heads, or a random mixture of both ("concat", "mean")."""
        for name in ("attention_scale", "state_scale", "amount"):
            if hasattr(self, name):
                nn.init.ones_(getattr(self, name))
        if self.fusion == "concat":
            nn.init.normal_(self.join, std=self.join.shape[1] ** -0.5)
        if self.fusion == "gated":
            nn.init.zeros_(self.join)
            nn.init.constant_(self.bias, 2.0)
        if self.fusion == "additive":
            nn.init.zeros_(self.steer)
        if self.fusion == "additive_output":
            nn.init.normal_(self.steer, std=self.steer.shape[1] ** -0.5)
        reset_norm(self.norm)
        nn.init.zeros_(self.output.weight)


def per_head(x_BTMI: Tensor, matrix_MIN: Tensor) -> Tensor:
    """A matrix of its own for each head."""
    return torch.einsum("btmi,min->btmn", x_BTMI, matrix_MIN.to(x_BTMI.dtype))


def normed(x: Tensor) -> Tensor:
    """Root mean square 1 over each head, computed in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(wide(x), x.shape[-1:], eps=TINY).to(x.dtype)


def reset_norm(norm: nn.Module) -> None:
    """Ones, if it has weights."""
    if isinstance(norm, RMSNorm):
        norm.reset_parameters()
