"""RWKV-7a: RWKV-7 with DeepEmbed (RWKV-LM `RWKV-v7/rwkv_v7a_demo.py`; there is no paper).

Notable features:
- the time mix is that of RWKV-7, taken from there as it is;
- every layer has a table with one small square matrix per token of the vocabulary: the matrix of the current token
  gates the channel mix. The table is large but only one row per token is read, so it can live outside fast memory;
- the same matrix has a second, shared part: a linear map of the token's normed embedding;
- what is gated depends on the layer-normed input without token shift.

Shape letters: B batch, T time, C channels, F ffn width, R side of the token matrices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.channel_mix import squared_relu
from wkv.layers.language_model import Block
from wkv.layers.low_rank import times
from wkv.layers.timeline import Timeline
from wkv.models.rwkv7 import PRESETS as RWKV7_PRESETS
from wkv.models.rwkv7 import RWKV7, RWKV7Config, TimeMix
from wkv.registry import register_model
from wkv.state import LayerState


@dataclasses.dataclass(kw_only=True)
class RWKV7aConfig(RWKV7Config):
    """Sizes of an RWKV-7a model.

    Args:
        embed_rank: side R of the token matrices; a row of the table holds R * R values.
    """

    embed_rank: int = 32


class ChannelMix(nn.Module):
    """out = W_v (relu(W_k x_k)^2 * gate), gate = z s1 E(token) s2 + s0."""

    def __init__(self, config: RWKV7aConfig, layer: int) -> None:
        super().__init__()
        assert config.ffn_size is not None
        self.layer, self.num_layers, self.rank = layer, config.num_layers, config.embed_rank
        hidden, ffn, rank = config.hidden_size, config.ffn_size, config.embed_rank
        self.x_k = init.blank(1, 1, hidden)
        self.key = nn.Linear(hidden, ffn, bias=False)
        self.value = nn.Linear(ffn, hidden, bias=False)
        self.s_emb = nn.Embedding(config.vocab_size, rank * rank)
        self.s_emb_x = nn.Linear(hidden, rank * rank, bias=False)
        self.s0 = init.blank(1, 1, ffn)
        self.s1 = init.blank(hidden, rank)
        self.s2 = init.blank(rank, ffn)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C] and new state."""
        shifted_BTC, ffn_shift = timeline.shift(z_BTC, state["ffn_shift"])
        h_BTF = squared_relu(self.key(torch.addcmul(z_BTC, shifted_BTC - z_BTC, self.x_k)))
        matrix_BTRR = self.s_emb(carry["tokens"]) + self.s_emb_x(carry["token_embedding"])
        matrix_BTRR = matrix_BTRR.unflatten(-1, (self.rank, self.rank))
        gate_BTR = (times(z_BTC, self.s1).unsqueeze(-2) @ matrix_BTRR).squeeze(-2)
        gate_BTF = times(gate_BTR, self.s2) + self.s0
        return self.value(h_BTF * gate_BTF), {"ffn_shift": ffn_shift}

    def reset_parameters(self) -> None:
        """RWKV-7's values, and a gate of 1: a new model computes what RWKV-7 does.

        No initial values of the gate are published. These are ours: s1 is zero like the first factor of every
        low-rank map of RWKV-7, s2 and s_emb_x are scaled like their second factors and matrices.
        """
        _, eta = init.depth(self.layer, self.num_layers)
        init.fill_(self.x_k, 1 - init.ramp(self.x_k.shape[-1]) ** (eta**4))
        init.orthogonal_(self.key.weight, 1.0)
        init.orthogonal_(self.value.weight, 0.0)
        nn.init.uniform_(self.s_emb.weight, -1e-4, 1e-4)
        init.orthogonal_(self.s_emb_x.weight, 1.0)
        nn.init.ones_(self.s0)
        nn.init.zeros_(self.s1)
        init.orthogonal_(self.s2, init.tall_gain(self.s2, 0.1))


@register_model("rwkv7a", RWKV7aConfig, {"0.1b": RWKV7_PRESETS["0.1b"]})
class RWKV7a(RWKV7):
    """RWKV-7a language model: RWKV-7 with DeepEmbed."""

    name = "rwkv7a"

    def start_carry(self, tokens_BT: Tensor, x_BTC: Tensor) -> dict[str, Tensor]:
        """The tokens and their embeddings after ln0, which every layer's gate reads."""
        return {"tokens": tokens_BT, "token_embedding": x_BTC}

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix of RWKV-7 and the gated channel mix of one layer."""
        return Block(config, layer, TimeMix(config, layer), ChannelMix(config, layer))
