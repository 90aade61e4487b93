"""BASED: Taylor linear attention, attention in a small window, and short convolutions (arXiv 2402.18668).

Notable features:
- most layers only look at the last three tokens, through a gated convolution;
- a few layers are linear attention to all earlier tokens, with the exponential of softmax to second order: weights
  1 + s + s^2 / 2, always positive, and a state whose size grows with the square of the feature size, not with time;
- a few layers are exact softmax attention to the last `window` tokens;
- the two dials between recall and memory are `feature_size` and `window`;
- RMS norms before each part, a gated network after each mixer, embedding and head are one matrix, no positions but the
  rotary ones of the windows;
- for comparisons: full attention in any layer, no gated network, and the plainer convolution of the synthetic tasks.

Names follow the library; `wkv.checkpoints.based_names` translates those of the released checkpoints. Source:
HazyResearch/based `based/models/`; for the synthetic tasks HazyResearch/zoology `zoology/mixers/base_conv.py`.

Shape letters: B batch, T time, H heads, f feature size, N value size, C channels, K width of a convolution.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.attention import empty_cache
from wkv.layers.config import MultiHeadConfig, at_least, flag, indices, one_of, option
from wkv.layers.language_model import Block, LanguageModel
from wkv.layers.norms import RMSNorm
from wkv.layers.short_convolution import ShortConvolution
from wkv.layers.timeline import Timeline
from wkv.models.transformer import Attention, SwiGLU, TransformerConfig
from wkv.ops import taylor_attention
from wkv.ops.taylor import feature_count
from wkv.registry import register_model
from wkv.state import LayerState

Mixed = tuple[Tensor, dict[str, Tensor], LayerState]  # output [B, T, C], carry, new slots of the state

PRESETS: dict[str, dict[str, Any]] = {
    "360m": {
        "vocab_size": 50264, "hidden_size": 1024, "num_layers": 27, "head_size": 64, "feature_size": 16, "window": 128,
        "linear_layers": [1, 6, 11, 16, 21], "window_layers": [2, 7, 12, 17, 22],
    },
    "1b": {
        "vocab_size": 50264, "hidden_size": 1792, "num_layers": 36, "head_size": 112, "feature_size": 16, "window": 128,
        "linear_layers": [1, 6, 11, 16, 21, 27, 33], "window_layers": [2, 7, 12, 17, 22, 28, 34],
    },
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class BasedConfig(MultiHeadConfig):
    """Sizes of a BASED model, and which layer is what. A layer in none of the three lists is a convolution.

    The rule of the released 360M model: linear attention in layers 1, 6, 11, ..., window attention right after each,
    and no such pair where there is no layer for its second half. Ours for small models: the first linear attention is
    there in any case, so 1 layer is [linear], 2 are [convolution, linear], 3 are [convolution, linear, window]. Layers
    that another list names are left out of a list that the rule fills.

    Args:
        linear_layers: layers of Taylor linear attention; by the rule.
        window_layers: layers of attention in a window; by the rule.
        attention_layers: layers of attention to all earlier tokens; none. Their state grows with the tokens.
        feature_size: f, size of a query or key of linear attention.
        window: earlier tokens that window attention sees besides the token itself, 128 by default. A released
            `window_size` of W means W // 2 here.
        rotary: whether window and full attention have rotary positions.
        conv_form: "gated", the convolution of the language models, or "zoology", that of the synthetic tasks.
        conv_size: tokens that a convolution sees.
        conv_expansion: K / C of the gated form; the released `expand_proj` is twice this.
        ffn_size: inner width of the gated network, 2 C rounded up to a multiple of 256 by default; 0: none at all.
        tied_head: the head is the embedding's matrix.
    """

    linear_layers: list[int] | None = option(None, indices)  # noqa: RUF009 (a field, not a list)
    window_layers: list[int] | None = option(None, indices)  # noqa: RUF009
    attention_layers: list[int] = option([], indices)  # noqa: RUF009
    feature_size: int = 16
    window: int | None = None
    rotary: bool = option(True, flag)
    conv_form: str = option("gated", one_of("gated", "zoology"))
    conv_size: int = option(3, at_least(2))
    conv_expansion: int = 2
    ffn_size: int | None = option(None, at_least(0))
    tied_head: bool = option(True, flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_size is None:
            self.ffn_size = 256 * -(-2 * self.hidden_size // 256)
        self.window = self.window or 128
        self._fill_layers()
        if self.rotary and self.head_size % 2 and {"window", "attention"}.intersection(self.layout):
            raise WkvError(f"rotary positions turn pairs of channels, found head_size {self.head_size}")

    def _fill_layers(self) -> None:
        given = {*(self.linear_layers or ()), *(self.window_layers or ()), *self.attention_layers}
        pairs = range(min(1, self.num_layers - 1), max(2, self.num_layers - 1), 5)
        if self.linear_layers is None:
            self.linear_layers = [x for x in pairs if x < self.num_layers and x not in given]
        if self.window_layers is None:
            self.window_layers = [x + 1 for x in pairs if x + 1 < self.num_layers and x + 1 not in given]
        named = sorted([*self.linear_layers, *self.window_layers, *self.attention_layers])
        if named and named[-1] >= self.num_layers:
            raise WkvError(f"there is no layer {named[-1]} among the layers 0 to {self.num_layers - 1}")
        twice = next((x for x in named if named.count(x) > 1), None)
        if twice is not None:
            raise WkvError(f"layer {twice} is in more than one of linear_layers, window_layers and attention_layers")

    @property
    def layout(self) -> list[str]:
        """What each layer is: "convolution", "linear", "window" or "attention"."""
        kinds = ["convolution"] * self.num_layers
        lists = {"linear": self.linear_layers, "window": self.window_layers, "attention": self.attention_layers}
        for kind, layers in lists.items():
            for layer in layers or ():
                kinds[layer] = kind
        return kinds


class LinearAttention(nn.Module):
    """Attention with weights 1 + s + s^2 / 2, s = q . k / sqrt(f), divided by their sum: the operator's state is all
    that is kept. No positions, no gate."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        assert config.attention_size is not None
        self.num_heads, self.num_layers = config.num_heads, config.num_layers
        features = config.num_heads * config.feature_size
        self.query = nn.Linear(config.hidden_size, features, bias=False)
        self.key = nn.Linear(config.hidden_size, features, bias=False)
        self.value = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.output = nn.Linear(config.attention_size, config.hidden_size, bias=False)

    def forward(self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline) -> Mixed:
        """Normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        split = (self.num_heads, -1)
        q_BTHf, k_BTHf, v_BTHN = (x(z_BTC).unflatten(-1, split) for x in (self.query, self.key, self.value))
        y_BTHN, (kv, z) = taylor_attention(
            q_BTHf, k_BTHf, v_BTHN, (state["kv"], state["z"]), mask=timeline.mask, reset=timeline.reset
        )
        return self.output(y_BTHN.flatten(-2)), carry, {"kv": kv, "z": z}

    def reset_parameters(self) -> None:
        """N(0, 0.02^2); the output narrower with depth, as in GPT-2."""
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02 / (2 * self.num_layers) ** 0.5)


class GatedConvolution(nn.Module):
    """out = W_o (silu(conv(W_v x + b_v)) * (W_g x + b_g)) + b_o, the BaseConv of the language models."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.num_layers, width = config.num_layers, config.conv_expansion * config.hidden_size
        self.value = nn.Linear(config.hidden_size, width)
        self.gate = nn.Linear(config.hidden_size, width)
        self.conv = ShortConvolution(width, config.conv_size)
        self.output = nn.Linear(width, config.hidden_size)

    def forward(self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline) -> Mixed:
        """Normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        mixed_BTK, carried = self.conv(self.value(z_BTC), state["conv_shift"], timeline)
        return self.output(F.silu(mixed_BTK) * self.gate(z_BTC)), carry, {"conv_shift": carried}

    def reset_parameters(self) -> None:
        """N(0, 0.02^2), the output narrower with depth, as in GPT-2; biases 0; the convolution as torch has it."""
        self.conv.reset_parameters()
        for linear, scale in ((self.value, 1.0), (self.gate, 1.0), (self.output, (2 * self.num_layers) ** -0.5)):
            nn.init.normal_(linear.weight, std=0.02 * scale)
            nn.init.zeros_(linear.bias)


class PlainConvolution(nn.Module):
    """out = conv(x) * (W_g x + b_g) + x, the BaseConv of the synthetic tasks: one matrix, and no activation."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.conv = ShortConvolution(config.hidden_size, config.conv_size, bias=True)

    def forward(self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline) -> Mixed:
        """Normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        mixed_BTC, carried = self.conv(z_BTC, state["conv_shift"], timeline)
        return torch.addcmul(z_BTC, mixed_BTC, self.gate(z_BTC)), carry, {"conv_shift": carried}

    def reset_parameters(self) -> None:
        """N(0, 0.02^2), bias 0; the convolution as torch has it."""
        self.conv.reset_parameters()
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)


class NoNetwork(nn.Module):
    """In place of the gated network where there is none: adds nothing."""

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, C] -> zeros; there is no state."""
        return torch.zeros_like(z_BTC), {}

    def reset_parameters(self) -> None:
        """There are none."""


def build_mixer(config: BasedConfig, layer: int) -> nn.Module:
    """The part of a layer in which tokens meet."""
    kind = config.layout[layer]
    if kind == "linear":
        return LinearAttention(config)
    if kind == "convolution":
        return GatedConvolution(config) if config.conv_form == "gated" else PlainConvolution(config)
    softmax = TransformerConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_layers=config.num_layers,
        attention_size=config.attention_size, head_size=config.head_size,
        positions="rotary" if config.rotary else "none", window=config.window if kind == "window" else None,
    )  # fmt: skip
    return Attention(softmax, layer)


@register_model("based", BasedConfig, PRESETS)
class Based(LanguageModel):
    """BASED language model."""

    name = "based"
    norm = RMSNorm

    def build_block(self, config: Any, layer: int) -> Block:
        """Mixer and gated network of one layer; without a network there is no norm before it either."""
        network = SwiGLU(config) if config.ffn_size else NoNetwork()
        block = Block(config, layer, build_mixer(config, layer), network, RMSNorm)
        if not config.ffn_size:
            block.add_module("ln2", nn.Identity())
        return block

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """What the mixer of the layer remembers before the first token."""
        config: Any = self.config
        kind, heads, size = config.layout[layer], config.num_heads, config.head_size
        if kind == "linear":
            features = feature_count(config.feature_size)
            kv = wide.new_zeros(batch_size, heads, size, features)
            return {"kv": kv, "z": wide.new_zeros(batch_size, heads, features)}
        if kind == "convolution":
            return {"conv_shift": self.blocks[layer].att.conv.empty(batch_size, shift)}
        return empty_cache(batch_size, heads, size, shift)

    def reset_parameters(self) -> None:
        """As the frame does, but with an embedding and head of N(0, 0.02^2)."""
        super().reset_parameters()
        for module in (self.emb, self.head):
            nn.init.normal_(module.weight, std=0.02)
