"""Hybrid: attention heads, RWKV-7 state heads and heads between them in one layer (after WuNeng, arXiv 2504.19191).

Only the abstract and a summary by others were at hand: the equations are our reconstruction, and experimental.

Notable features:
- nothing is replaced. A transformer keeps all its attention heads and gets state heads; an RWKV-7 keeps its time mix
  and gets a small attention path (as PrimeRWKV does, by its model card), in all layers or in some;
- middle heads combine an attention head and a state head: by a linear map, by a gate, by their mean, or by letting the
  state head move the query of the attention head, so that what is remembered says where to look;
- state tokens (optional): at the end of every M tokens the state itself becomes a key and a value, so that attention
  can look back at states as it does at tokens;
- every new part has an output matrix of its own that starts from zeros: any transformer and any RWKV-7 can become a
  hybrid, and its logits are the same at first.

Shape letters: B batch, T time, H attention heads, E state heads, N head size, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.attention import empty_cache
from wkv.layers.language_model import Block, LanguageModel
from wkv.layers.meta import without_values
from wkv.layers.norms import LayerNorm, RMSNorm
from wkv.layers.timeline import Timeline
from wkv.models import rwkv7, transformer
from wkv.models.hybrid_config import HybridConfig
from wkv.models.hybrid_heads import InfusedAttention, StateHeads, project, remember
from wkv.models.hybrid_meeting import Meeting
from wkv.models.rwkv7 import RWKV7, Vectors
from wkv.models.transformer import SwiGLU, Transformer
from wkv.registry import register_model
from wkv.state import LayerState, State

BASES = {"transformer": Transformer, "rwkv7": RWKV7}
ADDED = (".att.state_heads.", ".att.infused.", ".att.meeting.")


class HybridAttention(transformer.Attention):
    """The attention of a transformer with state heads and middle heads beside it."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__(config.attention_config(), layer)
        self.state_heads = StateHeads(config, layer)
        self.meeting = Meeting(config)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        vectors, ends = self.state_heads.vectors(z_BTC), None
        chunks = self.meeting.chunks(state, timeline, z_BTC.shape[1])
        if chunks is None:
            y_BTEN, slots = remember(list(vectors), state, timeline)
        else:
            y_BTEN, slots, S_BKENN = chunks.remember(remember, vectors, state)
            ends = chunks, S_BKENN
        y_BTEN = y_BTEN * self.head_size**-0.5
        a_BTHN, part, cache = self.meeting(project(self, z_BTC), y_BTEN, ends, state, timeline)
        # Products of their own: in one over all heads the base's sums would be rounded in another order.
        out_BTC = self.output(a_BTHN.flatten(-2)) + self.state_heads(y_BTEN)
        return out_BTC if part is None else out_BTC + part, carry, {**slots, **cache}

    def reset_parameters(self) -> None:
        """The transformer's values, and those of what is added."""
        super().reset_parameters()
        self.reset_added()

    def reset_added(self) -> None:
        """What is added is silent at first."""
        self.state_heads.reset_parameters()
        self.meeting.reset_parameters()


class HybridTimeMix(rwkv7.TimeMix):
    """The time mix of RWKV-7 with a small attention path and middle heads beside it."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.infused = InfusedAttention(config.attention_config(), layer, config.gate_rank)
        self.meeting = Meeting(config)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry with the first layer's values, new state."""
        out_BTC, carry, slots = super().forward(z_BTC, carry, state, timeline)
        y_BTEN, ends = slots.pop("read") * self.head_size**-0.5, None
        if "ends" in slots:
            chunks = self.meeting.chunks(state, timeline, z_BTC.shape[1])
            assert chunks is not None
            ends = chunks, slots.pop("ends")
        a_BTHN, part, cache = self.meeting(self.infused.project(z_BTC), y_BTEN, ends, state, timeline)
        out_BTC = out_BTC + self.infused.gated(z_BTC, a_BTHN)
        return out_BTC if part is None else out_BTC + part, carry, {**slots, **cache}

    def remember(self, vectors: Vectors, state: LayerState, timeline: Timeline) -> tuple[Tensor, LayerState]:
        """As there; the slots have what was read, too, and with state tokens the states at the ends of chunks."""
        chunks = self.meeting.chunks(state, timeline, vectors.r.shape[1])
        if chunks is None:
            y_BTEN, slots = super().remember(vectors, state, timeline)
            return y_BTEN, {**slots, "read": y_BTEN}

        def piece(inputs: list[Tensor], before: LayerState, part: Timeline) -> tuple[Tensor, LayerState]:
            return super(HybridTimeMix, self).remember(Vectors(*inputs), before, part)

        y_BTEN, slots, S_BKENN = chunks.remember(piece, vectors, state)
        return y_BTEN, {**slots, "read": y_BTEN, "ends": S_BKENN}

    def reset_parameters(self) -> None:
        """RWKV-7's values, and those of what is added."""
        super().reset_parameters()
        self.reset_added()

    def reset_added(self) -> None:
        """What is added is silent at first."""
        self.infused.reset_parameters()
        self.meeting.reset_parameters()


@register_model("hybrid", HybridConfig)
class Hybrid(LanguageModel):
    """Hybrid language model (our reconstruction)."""

    name = "hybrid"
    learning_rate_factors = {"w0": 2.0}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        self.norm = LayerNorm if config.base == "rwkv7" else RMSNorm  # type: ignore[misc]
        super().__init__(config)

    def build_block(self, config: Any, layer: int) -> Block:
        """The base's block, its attention or time mix extended if the layer is one of `layers`."""
        att: nn.Module
        if config.base == "rwkv7":
            att = HybridTimeMix(config, layer) if layer in config.layers else rwkv7.TimeMix(config, layer)
            return Block(config, layer, att, rwkv7.ChannelMix(config, layer))
        extended = layer in config.layers
        att = HybridAttention(config, layer) if extended else transformer.Attention(config.attention_config(), layer)
        return Block(config, layer, att, SwiGLU(config.attention_config(config.ffn_size)), RMSNorm)

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """The base's empty state, and that of the other heads; keys have one channel more with state tokens."""
        config: Any = self.config
        extended, size = layer in config.layers, config.head_size
        slots: LayerState = {}
        if config.base == "rwkv7":
            slots = {name: shift.new_zeros(batch_size, config.hidden_size) for name in ("att_shift", "ffn_shift")}
        if config.base == "rwkv7" or extended:
            slots["wkv"] = wide.new_zeros(batch_size, config.state_heads, size, size)
        if config.base == "transformer" or extended:
            slots |= empty_cache(batch_size, config.key_value_heads, size, shift)
            if config.state_window and extended:
                slots["key_cache"] = shift.new_zeros(batch_size, 0, config.key_value_heads, size + 1)
        return slots

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The base's values, and those of what is added."""
        super().reset_parameters()
        config: Any = self.config
        if config.base == "transformer":
            for module in (self.emb, self.head):
                nn.init.normal_(module.weight, std=0.02)

    @torch.no_grad()
    def reset_added(self) -> None:
        """Initial values of what the base does not have."""
        for block in self.blocks:
            if isinstance(block.att, HybridAttention | HybridTimeMix):
                block.att.reset_added()

    @classmethod
    def from_base(cls, base: LanguageModel, /, **options: Any) -> Hybrid:
        """A hybrid that computes what a transformer or an RWKV-7 computes: its weights (copied), and silent heads.

        With `state_window` a transformer, or the attention path, sees state tokens from the start, though hardly:
        the logits of a transformer are then those of the base only nearly.

        Args:
            base: a transformer or an RWKV-7 in floating point without adapters; its type and device are kept.
            options: fields of `HybridConfig` that the base does not have.

        Raises:
            WkvError: for another model, or another option.
        """
        config = config_of(base, options)
        with without_values():
            model = cls(config)
        values, like = base.state_dict(), base.ln_out.weight
        blanks = model.state_dict()
        if base.adapters or values.keys() != {key for key in blanks if not is_added(key)}:
            raise WkvError("the base is quantised or carries an adapter: dequantise it, or merge the adapter, first")
        for key, blank in blanks.items():
            # Initial values are drawn in float32.
            new = values.get(key, torch.empty(blank.shape, device=like.device))
            values[key] = new.detach().clone()
        model.load_state_dict(values, assign=True)
        model.reset_added()
        model.to(like.dtype)
        model.tokenizer, model.tuned_state = base.tokenizer, _as_state_of(model, base.tuned_state)
        return model.train(base.training)


def config_of(base: LanguageModel, options: dict[str, Any]) -> HybridConfig:
    """The configuration of what `base` becomes."""
    name = next((name for name, known in BASES.items() if type(base) is known), None)
    if name is None:
        raise WkvError(
            f"from_base takes a transformer or an RWKV-7, found {getattr(base, 'name', type(base).__name__)!r}"
        )
    sizes = base.config.to_dict()
    own = {field.name for field in dataclasses.fields(HybridConfig)} - sizes.keys() - {"base", "tied_head", "growth"}
    for option_name in options.keys() - own:
        raise WkvError(f"from_base has no option {option_name!r}; one of {', '.join(sorted(own))}")
    return HybridConfig(base=name, **sizes, **options)


def is_added(key: str) -> bool:
    """Whether a parameter is of a part that the base does not have."""
    return any(part in key for part in ADDED)


def _as_state_of(model: Hybrid, state: State | None) -> State | None:
    """A state of the base as one of the hybrid; what the base does not have is empty."""
    if state is None:
        return None
    empty = model.init_state(state.batch_size)
    layers = [{**fresh, **old} for fresh, old in zip(empty.layers, state.layers, strict=True)]
    if model.config.base == "transformer" and model.config.state_window:  # type: ignore[attr-defined]
        raise WkvError(
            "the base starts from a tuned state, whose cache cannot have state tokens; leave out state_window"
        )
    return State(model.name, layers)


def added_parameters(model: Hybrid) -> dict[str, nn.Parameter]:
    """The parameters that the base does not have.

    Raises:
        WkvError: for another model.
    """
    if not isinstance(model, Hybrid):
        raise WkvError(f"only a hybrid has added parts, found {getattr(model, 'name', type(model).__name__)!r}")
    return {name: parameter for name, parameter in model.named_parameters() if is_added(name)}


def added_share(model: Hybrid) -> float:
    """How many values were added, for each of the base."""
    added = sum(parameter.numel() for parameter in added_parameters(model).values())
    return added / (model.num_parameters - added)


def train_added(model: Hybrid) -> float:
    """Freeze the base (`requires_grad`), the usual first stage; returns the share of all parameters that train."""
    own = added_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return sum(parameter.numel() for parameter in own.values()) / model.num_parameters
