"""RRWKV: RWKV-4 that looks back through mediums (after arXiv 2306.05176, which its author withdrew).

Only summaries of "RRWKV: Capturing Long-range Dependencies in RWKV" were at hand, without an equation or a number:
the block is our reconstruction, and experimental.

Notable features:
- the tokens are cut into segments of p. A complete segment leaves a medium behind: the mean of what a sub-layer read
  there (squeeze), each channel gated by a small network that sees all of them (excite);
- every later token reads the mediums before it: the last one, their mean, or a mean weighted by keys, as in WKV-4 but
  without decay, so that nothing is ever forgotten ("retrospect");
- what it reads is a third term of the token shift, in the time mix, the channel mix or both. Coefficients of zeros make
  the model RWKV-4 exactly, so that any RWKV-4 can become one;
- training is parallel over the sequence, and the state is of constant size: a token knows of its own segment only that
  it is incomplete.

Shape letters: B batch, T time, C channels, K mediums that T tokens can complete at most, R width of the excite network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.channel_mix import TimeMixedChannelMix
from wkv.layers.config import one_of, option
from wkv.layers.language_model import Block
from wkv.layers.norms import wide
from wkv.layers.segments import Segments
from wkv.layers.timeline import Timeline
from wkv.models import rwkv4
from wkv.models.rwkv4 import RWKV4, RWKV4Config, descendant
from wkv.ops.wkv4 import EMPTY, wkv4
from wkv.registry import register_model
from wkv.state import LayerState

EMPTY_POOL = {"pool_num": 0.0, "pool_den": 0.0, "pool_max": EMPTY}


@dataclasses.dataclass(kw_only=True)
class RRWKVConfig(RWKV4Config):
    """Sizes and options of an RRWKV.

    Args:
        medium_period: p, tokens per segment; 32 by default. The square root of the training length is a good choice.
        reduction: the excite network is C / reduction wide.
        aggregate: what a token reads of the mediums before it: "last", "mean" or "wkv", the mean weighted by keys.
        where: which sub-layers read mediums: "time", "channel" or "both".
    """

    medium_period: int | None = None
    reduction: int = 4
    aggregate: str = option("wkv", one_of("last", "mean", "wkv"))
    where: str = option("both", one_of("time", "channel", "both"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.medium_period = self.medium_period or 32


class Mediums(nn.Module):
    """Makes and reads the mediums of one sub-layer.

    Args:
        config: of the model.
        side: what the names of its state begin with, "att" or "ffn".
        readers: letters of the projections that read mediums.
    """

    def __init__(self, config: RRWKVConfig, side: str, readers: str) -> None:
        super().__init__()
        assert config.medium_period is not None
        self.period, self.aggregate, self.side, self.readers = config.medium_period, config.aggregate, side, readers
        hidden = config.hidden_size
        for letter in readers:
            setattr(self, f"mix_{letter}", init.blank(1, 1, hidden))
        self.reduce = nn.Linear(hidden, max(1, hidden // config.reduction))
        self.excite = nn.Linear(self.reduce.out_features, hidden)
        if self.aggregate == "wkv":
            self.key = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, inputs: list[Tensor], z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """The token-shifted inputs of the projections, and what they are made of -> with mediums; the new state."""
        own = {name.removeprefix(f"{self.side}_"): x for name, x in state.items() if name.startswith(self.side)}
        segments = self.segments(own["count"], carry, timeline, z_BTC.shape[1])
        reading_BTC, slots = self.reading(z_BTC, own, segments)
        shares = (getattr(self, f"mix_{letter}") for letter in self.readers)
        inputs = [torch.addcmul(x, reading_BTC, share) for x, share in zip(inputs, shares, strict=True)]
        return inputs, {f"{self.side}_{name}": x for name, x in slots.items()}

    def segments(self, count_B: Tensor, carry: dict[str, Tensor], timeline: Timeline, length: int) -> Segments:
        """Those in `carry` if an earlier layer has put them there: all count alike."""
        if "number" in carry:
            return Segments(**{name: carry[name] for name in Segments._fields})
        return Segments.build(count_B, timeline, length, self.period)

    def reading(self, z_BTC: Tensor, own: LayerState, segments: Segments) -> tuple[Tensor, LayerState]:
        """What every token reads of the mediums before it [B, T, C], and the new state."""
        sums_BKC, rest_BC = self.squeeze(z_BTC, own["sum"], segments)
        medium_BKC = self.gated(sums_BKC / self.period, z_BTC.dtype)
        if self.aggregate == "last":
            line_BKC, slots = torch.cat([own["medium"][:, None], medium_BKC], 1), {}
            slots["medium"] = read(line_BKC, segments.number[:, -1:], segments.visible[:, -1:]).squeeze(1)
        else:
            line_BKC, slots = self.pool(medium_BKC, z_BTC.dtype, own, segments)
        reading_BTC = read(line_BKC, segments.number[:, :-1], segments.visible[:, :-1])
        # Each slot has memory of its own, as files want it.
        return reading_BTC.to(z_BTC.dtype), {"sum": rest_BC, "count": segments.rest.clone(), **slots}

    def squeeze(self, z_BTC: Tensor, carried_BC: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Sums over complete segments [B, K, C] (anything where there is none), and over the incomplete one [B, C]."""
        batch, most = segments.complete.shape
        first_BC = carried_BC.masked_fill(~segments.joins[:, None], 0)
        start_BKC = F.pad(first_BC[:, None], (0, 0, 0, most))
        added_BTC = wide(z_BTC).to(first_BC.dtype).masked_fill(~segments.counts[..., None], 0)
        index_BT = row_starts(batch, most + 1, z_BTC.device) + segments.number[:, :-1]
        sums = start_BKC.flatten(0, 1).index_add(0, index_BT.flatten(), added_BTC.flatten(0, 1))
        sums_BKC = sums.view(batch, most + 1, -1)
        everywhere = torch.ones_like(segments.visible[:, -1:])
        return sums_BKC[:, :-1], read(sums_BKC, segments.number[:, -1:], everywhere).squeeze(1)

    def gated(self, mean_BKC: Tensor, dtype: torch.dtype) -> Tensor:
        """The mediums, in the type of the means: the network alone runs in `dtype`."""
        gate_BKC = torch.sigmoid(self.excite(torch.relu(self.reduce(mean_BKC.to(dtype)))))
        return gate_BKC.to(mean_BKC.dtype) * mean_BKC

    def pool(
        self, medium_BKC: Tensor, dtype: torch.dtype, own: LayerState, segments: Segments
    ) -> tuple[Tensor, LayerState]:
        """Averages of all mediums so far: of the carried ones, and after each new one [B, K + 1, C]; the new state.

        WKV-4 without decay, and with a bonus of 0, which lets the current medium count like the earlier ones.
        """
        key_BKC = torch.zeros_like(medium_BKC)
        if self.aggregate == "wkv":
            key_BKC = self.key(medium_BKC.to(dtype)).to(medium_BKC.dtype)
        before = own["pool_num"], own["pool_den"], own["pool_max"]
        zero_C = torch.zeros_like(key_BKC[0, 0])
        average_BKC, after = wkv4(
            zero_C, zero_C, key_BKC, medium_BKC, before, mask=segments.complete, reset=segments.reset
        )
        empty_BC = before[1] == 0
        carried_BC = before[0].masked_fill(empty_BC, 0) / before[1].masked_fill(empty_BC, 1)
        line_BKC = torch.cat([carried_BC[:, None].to(average_BKC.dtype), average_BKC], 1)
        return line_BKC, normalised(after, key_BKC, before[2], segments)

    def reset_parameters(self) -> None:
        """Nothing is read yet; gates near one half that differ a little; with keys of zeros, means are plain."""
        for letter in self.readers:
            nn.init.zeros_(getattr(self, f"mix_{letter}"))
        init.orthogonal_(self.reduce.weight, 1.0)
        nn.init.normal_(self.excite.weight, std=0.01)
        nn.init.zeros_(self.reduce.bias)
        nn.init.zeros_(self.excite.bias)
        if self.aggregate == "wkv":
            nn.init.zeros_(self.key.weight)


def read(line_BKC: Tensor, place_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """The entry of every token's place [B, T, C]; zeros where it is not visible."""
    index = (row_starts(len(line_BKC), line_BKC.shape[1], line_BKC.device) + place_BT).flatten()
    found_BTC = line_BKC.flatten(0, 1).index_select(0, index).view(*place_BT.shape, -1)
    return found_BTC.masked_fill(~visible_BT[..., None], 0)


def row_starts(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, 1]: where each row begins once rows and columns are flattened."""
    return torch.arange(0, rows * columns, columns, device=device)[:, None]


def normalised(
    pool: tuple[Tensor, Tensor, Tensor], key_BKC: Tensor, carried_max_BC: Tensor, segments: Segments
) -> LayerState:
    """(num, den, max) of the last document with the true maximum of its keys, however the operator has scaled them."""
    num, den, scale = pool
    with torch.no_grad():
        top = key_BKC.masked_fill(~segments.latest[..., None], EMPTY).amax(1)
        top = torch.maximum(top, carried_max_BC.masked_fill(~segments.unbroken[:, None], EMPTY))
        # Where a reset came after the last medium, there is no maximum: EMPTY.
        factor = (scale - top).exp().masked_fill(~segments.visible[:, -1:], 0)
    return {"pool_num": num * factor, "pool_den": den * factor, "pool_max": top}


class TimeMix(rwkv4.TimeMix):
    """That of RWKV-4; key, value and receptance also read mediums."""

    def __init__(self, config: RRWKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mediums = Mediums(config, "att", "kvr")

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C], carry with the segments, new state."""
        segments = self.mediums.segments(state["att_count"], carry, timeline, z_BTC.shape[1])
        return super().forward(z_BTC, {**carry, **segments._asdict()}, state, timeline)

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key, value and receptance read, each [B, T, C], and the new states of all but the average."""
        inputs, slots = super().mixed(z_BTC, carry, state, timeline)
        inputs, more = self.mediums(inputs, z_BTC, carry, state, timeline)
        return inputs, {**slots, **more}


class ChannelMix(TimeMixedChannelMix):
    """That of RWKV-4; key and receptance also read mediums."""

    def __init__(self, config: RRWKVConfig, layer: int) -> None:
        super().__init__(*rwkv4.channel_mix_sizes(config, layer))
        self.mediums = Mediums(config, "ffn", "kr")

    def mixed(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[list[Tensor], LayerState]:
        """What key and receptance read, each [B, T, C], and the new states."""
        inputs, slots = super().mixed(z_BTC, carry, state, timeline)
        inputs, more = self.mediums(inputs, z_BTC, carry, state, timeline)
        return inputs, {**slots, **more}


@register_model("rrwkv", RRWKVConfig)
class RRWKV(RWKV4):
    """RRWKV language model (our reconstruction)."""

    name = "rrwkv"

    def build_block(self, config: Any, layer: int) -> Block:
        """RWKV-4's block, with mediums where the configuration wants them."""
        block = super().build_block(config, layer)
        if config.where != "channel":
            block.att = TimeMix(config, layer)
        if config.where != "time":
            block.ffn = ChannelMix(config, layer)
        return block

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """RWKV-4's values, and those of what is added."""
        super().reset_parameters()
        self.reset_added()

    def reset_added(self) -> None:
        """Mediums that are made, and that nothing reads yet."""
        for module in self.modules():
            if isinstance(module, Mediums):
                module.reset_parameters()

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """RWKV-4's empty state, an empty segment and no medium."""
        config: Any = self.config
        slots = super().init_layer_state(batch_size, shift, wide, layer)
        empty = {"sum": 0.0, "medium": 0.0} if config.aggregate == "last" else {"sum": 0.0, **EMPTY_POOL}
        for side, leaves_out in (("att", "channel"), ("ffn", "time")):
            if config.where != leaves_out:
                shape = batch_size, config.hidden_size
                slots |= {f"{side}_{name}": wide.new_full(shape, value) for name, value in empty.items()}
                slots[f"{side}_count"] = wide.new_zeros(batch_size, dtype=torch.int64)
        return slots

    @classmethod
    def from_base(cls, base: RWKV4, **options: Any) -> RRWKV:
        """An RRWKV that computes what a trained RWKV-4 computes: its weights (copied), and coefficients of zeros.

        Args:
            base: an RWKV-4 in floating point without adapters; its type and device are kept.
            options: `medium_period`, `reduction`, `aggregate`, `where`.

        Raises:
            WkvError: for another model, or another option.
        """
        return descendant(cls, RRWKVConfig, base, options)
