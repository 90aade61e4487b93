"""RWKV-4 "Dove" (arXiv 2305.13048; RWKV-LM `RWKV-v4neo/src/model.py`), the models named Pile, Raven and World.

Notable features:
- the memory is an exponentially decayed, key-weighted average of values, channel by channel: one numerator and one
  denominator per channel, no heads;
- decay and bonus are constants of each channel; the bonus counts the current token only;
- token shift: every projection reads a learned mixture of the current and the previous token;
- the sigmoid receptance gates the average before the output projection;
- the channel mix is a squared-ReLU network with its own sigmoid receptance gate.

Shape letters: B batch, T time, C channels, A attention channels, F ffn width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers import initialisation as init
from wkv.layers.channel_mix import TimeMixedChannelMix, mixtures
from wkv.layers.config import LanguageModelConfig
from wkv.layers.language_model import Block, LanguageModel
from wkv.layers.meta import without_values
from wkv.layers.norms import wide
from wkv.layers.timeline import Timeline
from wkv.ops.wkv4 import EMPTY, wkv4
from wkv.registry import register_model
from wkv.state import LayerState, State


@dataclasses.dataclass(kw_only=True)
class RWKV4Config(LanguageModelConfig):
    """Sizes of an RWKV-4 model; ffn_size is 4 C by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ffn_size = self.ffn_size or 4 * self.hidden_size


class TimeMix(nn.Module):
    """The decayed average of values of one layer."""

    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        assert config.attention_size is not None
        self.layer, self.num_layers = layer, config.num_layers
        hidden, width = config.hidden_size, config.attention_size

        self.time_decay = init.blank(width)
        self.time_first = init.blank(width)
        self.time_mix_k = init.blank(1, 1, hidden)
        self.time_mix_v = init.blank(1, 1, hidden)
        self.time_mix_r = init.blank(1, 1, hidden)
        self.key = nn.Linear(hidden, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.receptance = nn.Linear(hidden, width, bias=False)
        self.output = nn.Linear(width, hidden, bias=False)

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry as it was, new state."""
        (xk, xv, xr), slots = self.mixed(z_BTC, carry, state, timeline)
        r_BTA = torch.sigmoid(self.receptance(xr))
        k_BTA, v_BTA = wide(self.key(xk)), wide(self.value(xv))
        log_w_A = -torch.exp(wide(self.time_decay))
        y_BTA, (num, den, top) = wkv4(
            log_w_A, wide(self.time_first), k_BTA, v_BTA, (state["num"], state["den"], state["max"]),
            mask=timeline.mask, reset=timeline.reset,
        )  # fmt: skip
        out_BTC = self.output((r_BTA * y_BTA).to(r_BTA.dtype))
        return out_BTC, carry, {**slots, "num": num, "den": den, "max": top}

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key, value and receptance read, each [B, T, C], and the new states of all but the average."""
        shifted_BTC, att_shift = timeline.shift(z_BTC, state["att_shift"])
        shares = self.time_mix_k, self.time_mix_v, self.time_mix_r
        return mixtures(z_BTC, shifted_BTC, *shares), {"att_shift": att_shift}

    def reset_parameters(self) -> None:
        """Official initial values: key, receptance and output start at zero."""
        hidden, width = self.time_mix_k.shape[-1], self.time_decay.shape[0]
        rho, eta = init.depth(self.layer, self.num_layers)
        ramp = init.ramp(hidden)
        init.fill_(self.time_decay, -5 + 8 * init.unit_ramp(width) ** (0.7 + 1.3 * rho))
        init.fill_(self.time_first, math.log(0.3) + 0.5 * init.zigzag(width))
        self.time_mix_k.copy_(ramp**eta)
        self.time_mix_v.copy_(ramp**eta + 0.3 * rho)
        self.time_mix_r.copy_(ramp ** (0.5 * eta))
        init.orthogonal_(self.value.weight, init.tall_gain(self.value.weight))
        for linear in (self.key, self.receptance, self.output):
            init.orthogonal_(linear.weight, 0.0)


def channel_mix_sizes(config: RWKV4Config, layer: int) -> tuple[int, int, int, int, float]:
    """The arguments of this version's channel mix."""
    hidden, ffn = config.hidden_size, config.ffn_size
    assert ffn is not None
    return hidden, ffn, layer, config.num_layers, math.sqrt(max(1.0, ffn / hidden))


PRESETS = {
    name: {"num_layers": layers, "hidden_size": hidden, "vocab_size": 50277}
    for name, layers, hidden in (
        ("169m", 12, 768),
        ("430m", 24, 1024),
        ("1.5b", 24, 2048),
        ("3b", 32, 2560),
        ("7b", 32, 4096),
        ("14b", 40, 5120),
    )
}


@register_model("rwkv4", RWKV4Config, PRESETS)
class RWKV4(LanguageModel):
    """RWKV-4 language model."""

    name = "rwkv4"
    learning_rate_factors = {"time_decay": 2.0, "time_first": 3.0}  # noqa: RUF012

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix and channel mix of one layer."""
        mix = TimeMixedChannelMix(*channel_mix_sizes(config, layer))
        return Block(config, layer, TimeMix(config, layer), mix)

    def reset_added(self) -> None:
        """Initial values of what a descendant of RWKV-4 adds to it."""

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """Empty averages and zero token-shift states of one layer."""
        hidden, width = self.config.hidden_size, self.config.attention_size
        assert width is not None
        return {
            "att_shift": shift.new_zeros(batch_size, hidden),
            "num": wide.new_zeros(batch_size, width),
            "den": wide.new_zeros(batch_size, width),
            "max": wide.new_full((batch_size, width), EMPTY),
            "ffn_shift": shift.new_zeros(batch_size, hidden),
        }


Descendant = TypeVar("Descendant", bound=RWKV4)


def descendant(model_class: type[Descendant], config_class: type[Any], base: RWKV4, options: Any) -> Descendant:
    """A model that extends RWKV-4, with the weights of a trained one (copied, repeated where it has several).

    What the base lacks gets initial values from `model.reset_added()`.

    Args:
        model_class, config_class: of the descendant.
        base: an RWKV-4 in floating point without adapters; its type, device, tokenizer and mode are kept.
        options: configuration fields that RWKV-4 does not have.

    Raises:
        WkvError: for another model, or an unknown option.
    """
    if type(base) is not RWKV4:
        raise WkvError(f"from_base takes an RWKV-4, found {getattr(base, 'name', type(base).__name__)!r}")
    own = {field.name for field in dataclasses.fields(config_class)} - base.config.to_dict().keys()
    for name in options.keys() - own:
        raise WkvError(f"from_base has no option {name!r}; one of {', '.join(sorted(own))}")
    with without_values():
        model = model_class(config_class(**base.config.to_dict(), **options))
    values = base.state_dict()
    if base.adapters or not values.keys() <= model.state_dict().keys():
        raise WkvError("the base is quantised or carries an adapter: dequantise it, or merge the adapter, first")
    like = base.ln_out.weight
    for key, blank in model.state_dict().items():
        # Initial values are drawn in float32.
        new = values.get(key, torch.empty(blank.shape, device=like.device))
        values[key] = new.detach().expand(blank.shape).clone()
    model.load_state_dict(values, assign=True)
    with torch.no_grad():
        model.reset_added()
    model.to(like.dtype)
    model.tokenizer, model.tuned_state = base.tokenizer, _as_state_of(model, base.tuned_state)
    return model.train(base.training)


def _as_state_of(model: LanguageModel, state: State | None) -> State | None:
    """A state of RWKV-4 as one of its descendant: repeated where that has several, empty where RWKV-4 has none."""
    if state is None:
        return None
    empty = model.init_state(state.batch_size)
    layers = [
        {name: _repeated(old[name], x) if name in old else x for name, x in new.items()}
        for new, old in zip(empty.layers, state.layers, strict=True)
    ]
    return State(model.name, layers)


def _repeated(old: Tensor, like: Tensor) -> Tensor:
    return (old if old.ndim == like.ndim else old.unsqueeze(1)).expand_as(like).clone()
