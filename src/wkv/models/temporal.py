"""Multiple temporal perspectives: RWKV-4 that reads the text in several ways at once (arXiv 2402.02625; TemporalRNNs).

Notable features:
- P perspectives share every matrix, decay and bonus, and have token-shift coefficients and states of their own. So a
  perspective differs from the others in how it mixes neighbouring tokens, and in what it remembers thereby;
- a gate, a softmax over perspectives that reads their mean, mixes their logits token by token. The head is linear,
  so it is the hidden values that are mixed here, and the head runs once;
- a trained RWKV-4 becomes such a model by copying its coefficients P times: well under 0.1 % more parameters;
- exact copies would stay copies, as each would get the same update. A little noise on the coefficients
  (`init_jitter`) lets them part.

The perspectives are folded into the batch: row b of the tokens is rows b P to b P + P - 1 in all layers.

Shape letters: B batch, P perspectives, R = B * P rows, T time, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers import initialisation as init
from wkv.layers.channel_mix import TimeMixedChannelMix, mixtures
from wkv.layers.config import between, flag, option
from wkv.layers.language_model import Block
from wkv.layers.norms import wide
from wkv.layers.timeline import Timeline
from wkv.models import rwkv4
from wkv.models.rwkv4 import RWKV4, RWKV4Config, descendant
from wkv.registry import register_model
from wkv.state import LayerState, State


@dataclasses.dataclass(kw_only=True)
class TemporalConfig(RWKV4Config):
    """Sizes and options of an RWKV-4 with several temporal perspectives.

    Args:
        perspectives: P.
        init_jitter: standard deviation of the noise on initial token-shift coefficients; 0 makes exact copies.
        ffn_pre: the first layer has a second channel mix in place of the time mix ("RWKV-ffnPre").
    """

    perspectives: int = 4
    init_jitter: float = option(0.02, between(0, 1))
    ffn_pre: bool = option(False, flag)


class TimeMix(rwkv4.TimeMix):
    """That of RWKV-4 with token-shift coefficients [P, 1, 1, C]."""

    def __init__(self, config: TemporalConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (shares(config) for _ in "kvr")

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key, value and receptance read, each [R, T, C], and the new token-shift state."""
        shifted_BTC, att_shift = timeline.shift(z_BTC, state["att_shift"])
        own = (per_row(share, z_BTC) for share in (self.time_mix_k, self.time_mix_v, self.time_mix_r))
        return mixtures(z_BTC, shifted_BTC, *own), {"att_shift": att_shift}


class ChannelMix(TimeMixedChannelMix):
    """That of RWKV-4 with token-shift coefficients [P, 1, 1, C]."""

    def __init__(self, config: TemporalConfig, layer: int) -> None:
        super().__init__(*rwkv4.channel_mix_sizes(config, layer))
        self.time_mix_k, self.time_mix_r = (shares(config) for _ in "kr")

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key and receptance read, each [R, T, C], and the new state."""
        shifted_BTC, ffn_shift = timeline.shift(z_BTC, state["ffn_shift"])
        own = (per_row(share, z_BTC) for share in (self.time_mix_k, self.time_mix_r))
        return mixtures(z_BTC, shifted_BTC, *own), {"ffn_shift": ffn_shift}


def shares(config: TemporalConfig) -> nn.Parameter:
    """Blank shares of the current token, [P, 1, 1, C] as in the official files."""
    return init.blank(config.perspectives, 1, 1, config.hidden_size)


def per_row(share_P11C: Tensor, z_RTC: Tensor) -> Tensor:
    """The share of every row's perspective, [R, 1, C]."""
    return share_P11C.squeeze(1).repeat(len(z_RTC) // len(share_P11C), 1, 1)


class PreMix(ChannelMix):
    """A channel mix that takes the place of a time mix, token-shift state included."""

    def forward(  # type: ignore[override]
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [R, T, C] -> output [R, T, C], carry as it was, new state."""
        out_BTC, slots = super().forward(z_BTC, carry, {"ffn_shift": state["att_shift"]}, timeline)
        return out_BTC, carry, {"att_shift": slots["ffn_shift"]}


class PerspectiveBlock(Block):
    """A block that folds the perspectives of its state, and the timeline, into the batch."""

    def __init__(self, config: TemporalConfig, layer: int) -> None:
        pre = config.ffn_pre and layer == 0
        att = PreMix(config, layer) if pre else TimeMix(config, layer)
        super().__init__(config, layer, att, ChannelMix(config, layer))
        self.perspectives = config.perspectives
        if pre:
            self.ffnPre = self._modules.pop("att")
            # Not as a submodule: its parameters would then have two names.
            self.__dict__["att"] = self.ffnPre

    def forward(
        self, x_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """x [R, T, C] and a state [B, P, ...] -> x, carry and the layer's new state [B, P, ...]."""
        flat = {name: x.flatten(0, 1) for name, x in state.items()}
        x_BTC, carry, new = super().forward(x_BTC, carry, flat, folded(timeline, self.perspectives))
        return x_BTC, carry, {name: x.unflatten(0, (-1, self.perspectives)) for name, x in new.items()}


def folded(timeline: Timeline, perspectives: int) -> Timeline:
    """The same order of tokens in every perspective."""
    fields = (timeline.mask, timeline.reset, timeline.previous, timeline.last)
    return Timeline(*(None if x is None else x.repeat_interleave(perspectives, 0) for x in fields))


@register_model("temporal", TemporalConfig)
class Temporal(RWKV4):
    """RWKV-4 language model with several temporal perspectives."""

    name = "temporal"

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__(config)
        # The gate over perspectives, by its official name.
        self.convert3 = nn.Linear(config.hidden_size, config.perspectives, bias=False)
        if not self.convert3.weight.is_meta:
            self.reset_added()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """RWKV-4's values, and those of what is added."""
        super().reset_parameters()
        if hasattr(self, "convert3"):  # the frame does this once before there is a gate
            self.reset_added()

    @torch.no_grad()
    def reset_added(self) -> None:
        """Noise on the token-shift coefficients, which RWKV-4's values made equal, and a small random gate."""
        config: Any = self.config
        for name, parameter in self.named_parameters():
            if "time_mix_" in name and config.init_jitter:
                parameter.add_(config.init_jitter * torch.randn_like(parameter))
        nn.init.normal_(self.convert3.weight, std=0.01)

    def build_block(self, config: Any, layer: int) -> Block:
        """The block of one layer; the first may have a channel mix in place of the time mix."""
        return PerspectiveBlock(config, layer)

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """RWKV-4's state for every perspective, each slot [B, P, ...]."""
        config: Any = self.config
        slots = super().init_layer_state(batch_size, shift, wide, layer)
        if config.ffn_pre and layer == 0:
            slots = {name: slots[name] for name in ("att_shift", "ffn_shift")}
        return {name: x[:, None].repeat(1, config.perspectives, 1) for name, x in slots.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> what the first layer reads [R, T, C], the same for all perspectives."""
        config: Any = self.config
        return super().embed(tokens).repeat_interleave(config.perspectives, 0)

    def forward_features(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, without the head: the mixture of the perspectives' hidden values [B, T, C], and the state.

        The paper mixes logits, sum_p alpha_p (W_head h_p), which is the same as W_head (sum_p alpha_p h_p).
        """
        hidden_RTC, state = super().forward_features(tokens, state, mask, reset)
        return self.blend(hidden_RTC), state

    def blend(self, hidden_RTC: Tensor) -> Tensor:
        """Hidden values of the perspectives [R, T, C] -> their mixture [B, T, C], weighed in float32."""
        config: Any = self.config
        hidden_BPTC = hidden_RTC.unflatten(0, (-1, config.perspectives))
        alpha_BTP = torch.softmax(wide(self.convert3(hidden_BPTC.mean(1))), -1)
        mixture_BTC = (alpha_BTP.transpose(1, 2).unsqueeze(-1) * wide(hidden_BPTC)).sum(1)
        return mixture_BTC.to(hidden_RTC.dtype)

    @classmethod
    def from_base(cls, base: RWKV4, **options: Any) -> Temporal:
        """The upgrade of a trained RWKV-4: its weights (copied), its coefficients P times, a new gate.

        It computes what the base does. But perspectives that are exact copies stay copies in training: give
        `init_jitter`, such as 0.02, when the model will be trained; it then computes nearly what the base does.

        Args:
            base: an RWKV-4 in floating point without adapters; its type and device are kept.
            options: `perspectives`, `init_jitter` (0 here).

        Raises:
            WkvError: for another model, or another option.
        """
        if "ffn_pre" in options:
            raise WkvError("from_base has no option 'ffn_pre': RWKV-4 has a time mix in every layer")
        return descendant(cls, TemporalConfig, base, {"init_jitter": 0.0, **options})


def perspective_parameters(model: Temporal) -> dict[str, nn.Parameter]:
    """What belongs to the perspectives: the token-shift coefficients, and the gate.

    Raises:
        WkvError: for another model.
    """
    if not isinstance(model, Temporal):
        raise WkvError(
            f"only a temporal model has perspectives, found {getattr(model, 'name', type(model).__name__)!r}"
        )
    return {name: x for name, x in model.named_parameters() if "time_mix_" in name or name == "convert3.weight"}


def train_perspectives(model: Temporal) -> float:
    """Freeze everything else (`requires_grad`); returns the share of all parameters that still train.

    Raises:
        WkvError: for another model.
    """
    own = perspective_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return sum(parameter.numel() for parameter in own.values()) / model.num_parameters
