"""What attention heads of `wkv.models.hybrid` look at, and where they meet the states.

Our reconstruction, as that file says.

Shape letters: B batch, T time, H attention heads, G heads of keys and values, E state heads, M middle heads,
N head size, C channels, K pieces (see `wkv.layers.state_tokens`), p state tokens per chunk and head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.layers import initialisation as init
from wkv.layers.attention import attend, positions, rotate
from wkv.layers.state_tokens import Chunks, tokens_read
from wkv.layers.timeline import Timeline
from wkv.models.hybrid_config import HybridConfig
from wkv.models.hybrid_heads import TINY, MiddleHeads
from wkv.state import LayerState

FAR = -8.0  # initial bias of the scores of state tokens


class StateTokens(nn.Module):
    """The states at chunk ends as keys u^T S and values S w for attention heads, which look back at them.

    A key head reads the states of one state head, in turn. Keys and values are RMS-normed, since states are not
    bounded, and the scores of each attention head have a bias that starts low: at first the model hardly looks.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        assert config.state_heads is not None
        assert config.key_value_heads is not None
        assert config.attention_heads is not None
        shape = (config.probes, config.key_value_heads, config.head_size)
        self.key_probe, self.value_probe = init.blank(*shape), init.blank(*shape)
        self.bias = init.blank(config.attention_heads)
        self.heads = [head % config.state_heads for head in range(config.key_value_heads)]

    def forward(self, S_BKENN: Tensor) -> tuple[Tensor, Tensor]:
        """States at the ends of chunks -> keys and values [B, K p, G, N], in the type of the states."""
        with torch.autocast(S_BKENN.device.type, enabled=False):
            S_BKGNN = S_BKENN[:, :, self.heads]
            u, w = (x.to(S_BKGNN.dtype) for x in (self.key_probe, self.value_probe))
            keys = torch.einsum("pgv,bkgvn->bkpgn", u, S_BKGNN)
            values = torch.einsum("bkgvn,pgn->bkpgv", S_BKGNN, w)
            size = keys.shape[-1:]
            return tuple(F.rms_norm(x, size, eps=TINY).flatten(1, 2) for x in (keys, values))  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Random probes of unit length."""
        for probe in (self.key_probe, self.value_probe):
            nn.init.normal_(probe, std=probe.shape[-1] ** -0.5)
        nn.init.constant_(self.bias, FAR)


@dataclasses.dataclass(frozen=True)
class View:
    """What the attention heads of one layer can look at.

    Args:
        k, v: keys (positions applied) and values [B, T, G, N].
        state: the slots of the cache.
        timeline: of the tokens.
        window: earlier tokens that can be seen; None: all.
        turn: applies positions to queries.
        groups: attention heads for each head of keys.
        chunks, keys, values, bias: state tokens [B, K p, G, N] and the bias [H] of their scores, or None.
    """

    k: Tensor
    v: Tensor
    state: LayerState
    timeline: Timeline
    window: int | None
    turn: Callable[[Tensor], Tensor]
    groups: int
    chunks: Chunks | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None

    def look(self, q_BTHN: Tensor) -> tuple[Tensor, LayerState]:
        """Queries, positions not applied -> what the heads find [B, T, H, N], the new cache."""
        q_BTHN = self.turn(q_BTHN)
        if self.chunks is None:
            return attend(q_BTHN, self.k, self.v, self.state, self.timeline, self.window)
        assert self.keys is not None
        assert self.values is not None
        assert self.bias is not None
        # One channel more holds the bias: it is 1 in the keys of state tokens, 0 in those of tokens.
        size = q_BTHN.shape[-1]
        bias_BTH1 = (self.bias.to(q_BTHN.dtype) * size**0.5)[:, None].expand(*q_BTHN.shape[:-1], 1)
        q_BTHN = torch.cat([q_BTHN, bias_BTH1], -1)
        none = q_BTHN.new_zeros(len(q_BTHN), self.keys.shape[1], *q_BTHN.shape[2:])  # state tokens ask nothing
        merge = self.chunks.merge
        k, v = merge(F.pad(self.k, (0, 1)), F.pad(self.keys, (0, 1), value=1.0)), merge(self.v, self.values)
        y, slots = attend(merge(q_BTHN, none), k, v, self.state, self.chunks.line, scale=size**-0.5)
        return self.chunks.tokens_of(y), slots

    def look_again(self, q_BTMN: Tensor) -> Tensor:
        """Other queries of the first M heads, positions not applied -> what they find; the cache stays as it is."""
        middle = q_BTMN.shape[2]
        heads = torch.arange(middle, device=q_BTMN.device) // self.groups

        def own(x_BLGN: Tensor | None) -> Any:
            return None if x_BLGN is None else x_BLGN[:, :, heads]

        view = dataclasses.replace(
            self, k=own(self.k), v=own(self.v), keys=own(self.keys), values=own(self.values), groups=1,
            state={**self.state, **{slot: own(self.state[slot]) for slot in ("key_cache", "value_cache")}},
            bias=None if self.bias is None else self.bias[:middle],
        )  # fmt: skip
        return view.look(q_BTMN)[0]


def turner(place_BT: Tensor | None, base: float | None) -> Callable[[Tensor], Tensor]:
    """Applies rotary positions, or none."""
    if place_BT is None or base is None:
        return lambda x_BTHN: x_BTHN
    return lambda x_BTHN: rotate(x_BTHN, place_BT, base)


class Meeting(nn.Module):
    """Where attention heads meet the states: state tokens that they look at, middle heads that combine both."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.window, self.period, self.probes = config.window, config.state_window, config.probes
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        if config.state_window:
            self.tokens = StateTokens(config)
        if config.middle_heads:
            self.middle = MiddleHeads(config)

    def chunks(self, state: LayerState, timeline: Timeline, length: int) -> Chunks | None:
        """Where states become tokens; None without them."""
        return Chunks.build(state["count"], timeline, length, self.period, self.probes) if self.period else None

    def forward(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        y_BTEN: Tensor,
        ends: tuple[Chunks, Tensor] | None,
        state: LayerState,
        timeline: Timeline,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """Attention, then the middle heads.

        Args:
            qkv: queries [B, T, H, N], keys and values; positions not applied.
            y_BTEN: what the state heads have read.
            ends: chunks, and the states at their ends [B, K, E, N, N]; None without state tokens.
            state, timeline: as everywhere.

        Returns:
            what the attention heads have found [B, T, H, N], the part of the middle heads [B, T, C], the new cache.
        """
        q, k, v = qkv
        place_BT = None
        if self.rotary_base is not None:
            count = state["count"]
            count = tokens_read(count, self.period, self.probes) if self.period else count
            place_BT = positions(count, timeline, q.shape[1])
        turn = turner(place_BT, self.rotary_base)
        view = View(turn(k), v, state, timeline, self.window, turn, q.shape[2] // k.shape[2])
        if ends is not None:
            keys, values = self.tokens(ends[1])
            view = dataclasses.replace(view, chunks=ends[0], keys=keys, values=values, bias=self.tokens.bias)
        a_BTHN, slots = view.look(q)
        part = self.middle(a_BTHN, y_BTEN, q, view.look_again) if hasattr(self, "middle") else None
        return a_BTHN, part, slots

    def reset_parameters(self) -> None:
        """Of what there is."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
