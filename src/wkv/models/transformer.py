"""A plain pre-norm transformer behind the interface of the recurrent models: the baseline of every comparison.

Notable features:
- causal softmax attention over all earlier tokens; the state is its cache of keys and values, which grows with them;
- rotary position embedding over whole heads (arXiv 2104.09864), or none;
- RMS norms before each part (arXiv 1910.07467), no biases, no norm after the embedding;
- a SwiGLU network (arXiv 2002.05202) whose inner width is 8/3 C, rounded up to a multiple of 32;
- embedding and head can be one matrix.

This is the arrangement of the Llama models (arXiv 2302.13971) with grouped keys and values as an option
(arXiv 2305.13245), not a reader of their checkpoints.

Shape letters: B batch, T time, H heads, K heads of keys and values, N head size, C channels, F ffn width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.attention import attend, empty_cache, positions, rotate
from wkv.layers.config import MultiHeadConfig, at_least, flag, one_of, option, positive
from wkv.layers.language_model import Block, LanguageModel
from wkv.layers.norms import RMSNorm
from wkv.layers.timeline import Timeline
from wkv.registry import register_model
from wkv.state import LayerState


@dataclasses.dataclass(kw_only=True)
class TransformerConfig(MultiHeadConfig):
    """Sizes of a transformer.

    Args:
        key_value_heads: K, a divisor of H; H by default.
        positions: "rotary" or "none".
        rotary_base: wavelengths run from 2 pi to 2 pi rotary_base tokens.
        window: earlier tokens that every layer can see; None: all.
        tied_head: the head is the embedding's matrix.
    """

    key_value_heads: int | None = None
    positions: str = option("rotary", one_of("rotary", "none"))
    rotary_base: float = option(10000.0, positive)
    window: int | None = option(None, at_least(1))
    tied_head: bool = option(False, flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ffn_size = self.ffn_size or 32 * -(-8 * self.hidden_size // 96)
        self.key_value_heads = self.key_value_heads or self.num_heads
        if self.num_heads % self.key_value_heads:
            raise WkvError(f"key_value_heads {self.key_value_heads} does not divide the {self.num_heads} heads")
        if self.positions == "rotary" and self.head_size % 2:
            raise WkvError(f"rotary positions turn pairs of channels, found head_size {self.head_size}")


class Attention(nn.Module):
    """Causal softmax attention of one layer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        assert config.attention_size is not None
        assert config.key_value_heads is not None
        self.layer, self.num_layers = layer, config.num_layers
        self.head_size, self.window = config.head_size, config.window
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        hidden, narrow = config.hidden_size, config.key_value_heads * config.head_size
        self.query = nn.Linear(hidden, config.attention_size, bias=False)
        self.key = nn.Linear(hidden, narrow, bias=False)
        self.value = nn.Linear(hidden, narrow, bias=False)
        self.output = nn.Linear(config.attention_size, hidden, bias=False)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        split = (-1, self.head_size)
        q_BTHN, k_BTKN, v_BTKN = (x(z_BTC).unflatten(-1, split) for x in (self.query, self.key, self.value))
        if self.rotary_base is not None:
            place_BT = positions(state["count"], timeline, z_BTC.shape[1])
            q_BTHN, k_BTKN = (rotate(x, place_BT, self.rotary_base) for x in (q_BTHN, k_BTKN))
        y_BTHN, slots = attend(q_BTHN, k_BTKN, v_BTKN, state, timeline, self.window)
        return self.output(y_BTHN.flatten(-2)), carry, slots

    def reset_parameters(self) -> None:
        """N(0, 0.02^2); the output narrower with depth, as in GPT-2."""
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02 / (2 * self.num_layers) ** 0.5)


class SwiGLU(nn.Module):
    """out = W_o (silu(W_g x) * W_u x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.ffn_size is not None
        self.num_layers = config.num_layers
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Normed input [B, T, C] -> output [B, T, C]; there is no state."""
        return self.down(F.silu(self.gate(z_BTC)) * self.up(z_BTC)), {}

    def reset_parameters(self) -> None:
        """N(0, 0.02^2); the output narrower with depth, as in GPT-2."""
        for linear in (self.gate, self.up):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=0.02 / (2 * self.num_layers) ** 0.5)


@register_model("transformer", TransformerConfig)
class Transformer(LanguageModel):
    """Transformer language model."""

    name = "transformer"
    norm = RMSNorm

    def build_block(self, config: Any, layer: int) -> Block:
        """Attention and SwiGLU network of one layer."""
        return Block(config, layer, Attention(config, layer), SwiGLU(config), RMSNorm)

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """An empty cache."""
        config: Any = self.config
        return empty_cache(batch_size, config.key_value_heads, config.head_size, shift)

    def reset_parameters(self) -> None:
        """As the frame does, but with an embedding and head of N(0, 0.02^2)."""
        super().reset_parameters()
        for module in (self.emb, self.head):
            nn.init.normal_(module.weight, std=0.02)
