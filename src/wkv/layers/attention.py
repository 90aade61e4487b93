"""Softmax attention with an exact recurrent form: what may still be looked at is the state.

The products are torch's `scaled_dot_product_attention`. What is ours is the bookkeeping: tokens that do not exist,
packed documents, windows, and a cache of keys and values whose newest token stands last.

Shape letters: B batch, T time, S cached tokens, L = S + T, H heads, N head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.layers.timeline import Timeline
from wkv.state import LayerState

QUERIES = 512  # at a time where a mask is needed: bounds its memory


def empty_cache(batch_size: int, heads: int, head_size: int, shift: Tensor) -> LayerState:
    """The slots of one attention layer before the first token: keys and values [B, 0, H, N], tokens read [B].

    Args:
        heads: of keys and values.
        shift: a tensor of the type and on the device of activations.
    """
    cache = shift.new_zeros(batch_size, 0, heads, head_size)
    count = torch.zeros(batch_size, dtype=torch.int64, device=shift.device)
    return {"key_cache": cache, "value_cache": cache.clone(), "count": count}


def positions(count_B: Tensor, timeline: Timeline, length: int) -> Tensor:
    """For every token the number of tokens of its document that came before it, int64 [B, T].

    Args:
        count_B: tokens of the document that were read earlier.
        timeline: which tokens exist, and where documents begin.
        length: T.
    """
    if timeline.mask is None:
        order_BT = torch.arange(length, device=count_B.device).expand(len(count_B), -1)
    else:
        order_BT = timeline.mask.cumsum(1) - timeline.mask.long()
    first_B1 = -count_B[:, None]
    if timeline.reset is None:
        return order_BT - first_B1
    return order_BT - torch.where(timeline.reset, order_BT, first_B1).cummax(1).values


def rotate(x_BTHN: Tensor, positions_BT: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) over whole heads, pairs (i, i + N/2).

    Args:
        x_BTHN: queries or keys; N even.
        positions_BT: from `positions`.
        base: wavelengths run from 2 pi to 2 pi base.
    """
    half = x_BTHN.shape[-1] // 2
    # Angles in float64: a float32 product of position and frequency is off by 1e-3 after 16k tokens.
    frequency = base ** (-torch.arange(half, dtype=torch.float64, device=x_BTHN.device) / half)
    angle = positions_BT[:, :, None, None] * frequency
    cos, sin = angle.cos().to(x_BTHN.dtype), angle.sin().to(x_BTHN.dtype)
    a, b = x_BTHN[..., :half], x_BTHN[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    state: LayerState,
    timeline: Timeline,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, LayerState]:
    """Causal softmax attention to the tokens of the same document, those of earlier calls included.

    Args:
        q_BTHN: queries, positions applied; a multiple of as many heads as there are keys.
        k_BTHN, v_BTHN: keys (positions applied) and values.
        state: the slots of `empty_cache`.
        timeline: tokens that do not exist are neither keys nor counted; a reset hides everything before it.
        window: earlier tokens that can be seen besides the token itself; None: all.
        scale: of the scores; N^-1/2 by default.

    Returns:
        y [B, T, H, N] in the type of the values (unspecified and finite where the token does not exist), new slots.
    """
    line = _Line.build(k_BTHN, v_BTHN, state, timeline)
    q_BTHN = q_BTHN.to(line.v.dtype)
    if line.order is not None:
        q_BTHN = _gather(q_BTHN, line.order)
    if line.trivial and (window is None or window >= q_BTHN.shape[1] - 1):
        y_BTHN = _product(q_BTHN, line.k, line.v, scale, causal=True)
    else:
        y_BTHN = _in_blocks(q_BTHN, line, window, scale)
    if line.order is not None:
        y_BTHN = _gather(y_BTHN, line.order.argsort(dim=1))
    return y_BTHN, line.cache(state, window, timeline)


@dataclass(frozen=True)
class _Line:
    """Cached and new tokens in one row, those that do not exist moved before the others.

    Args:
        k, v: [B, L, H, N].
        first_BT: place in the row where the document of each new token begins (negative: some have left the cache).
        order: int64 [B, T]; where the new tokens stood before they were moved, None if they were not.
        trivial: every token exists, in one document that begins with the first of them.
    """

    k: Tensor
    v: Tensor
    first_BT: Tensor
    order: Tensor | None
    trivial: bool

    @staticmethod
    def build(k_BTHN: Tensor, v_BTHN: Tensor, state: LayerState, timeline: Timeline) -> _Line:
        """Cached tokens, then new ones."""
        cached, length, mask, reset = state["key_cache"].shape[1], k_BTHN.shape[1], timeline.mask, timeline.reset
        total = cached + length
        k, v = (
            torch.cat([state[slot].to(x.dtype), x], 1) if cached else x
            for slot, x in (("key_cache", k_BTHN), ("value_cache", v_BTHN))
        )
        new, order = torch.full_like(state["count"], length), None
        if mask is not None:
            new, order = mask.sum(1), mask.long().argsort(dim=1, stable=True)
            # Cached tokens stand right before the first new one that exists.
            gap_B1 = (length - new)[:, None]
            places = torch.arange(total, device=k.device) - gap_B1
            moved = order.gather(1, (places - cached + gap_B1).clamp(min=0)) + cached
            index = torch.where(places < cached, places.clamp(min=0), moved)
            k, v = _gather(k, index), _gather(v, index)
            reset = None if reset is None else reset.gather(1, order)
        first_BT = (total - new - state["count"])[:, None].expand(-1, length)
        if reset is not None:
            own = torch.arange(cached, total, device=k.device)
            first_BT = torch.where(reset, own, first_BT).cummax(1).values
        return _Line(k, v, first_BT, order, not cached and mask is None and reset is None)

    def cache(self, state: LayerState, window: int | None, timeline: Timeline) -> LayerState:
        """What later tokens may look at, and how many tokens their document has had."""
        total = self.k.shape[1]
        count_B = total - self.first_BT[:, -1]
        keep = total if window is None else min(window, total)
        partly = timeline.mask is not None or timeline.reset is not None
        if partly:  # rows differ in length, or have become short
            keep = min(keep, int(count_B.max()))
        k, v = (x[:, total - keep :].to(state[s].dtype) for x, s in ((self.k, "key_cache"), (self.v, "value_cache")))
        if partly:
            exists = torch.arange(-keep, 0, device=k.device) >= -count_B[:, None]
            k, v = (torch.where(exists[..., None, None], x, 0) for x in (k, v))
        return {"key_cache": k, "value_cache": v, "count": count_B}


def _in_blocks(q_BTHN: Tensor, line: _Line, window: int | None, scale: float | None) -> Tensor:
    """Some queries at a time, with the keys they can see."""
    length, total = q_BTHN.shape[1], line.k.shape[1]
    cached = total - length
    block = QUERIES if window is None else max(window, 64)
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        low = 0 if window is None else max(0, cached + start - window)
        own = torch.arange(cached + start, cached + end, device=q_BTHN.device)[:, None]
        place = torch.arange(low, cached + end, device=q_BTHN.device)
        seen = (place <= own) & (place >= line.first_BT[:, start:end, None])
        if window is not None:
            seen = seen & (place >= own - window)
        seen = seen | (place == own)  # a token that does not exist sees itself: no row without keys
        keys, values = line.k[:, low : cached + end], line.v[:, low : cached + end]
        blocks.append(_product(q_BTHN[:, start:end], keys, values, scale, seen[:, None]))
    return torch.cat(blocks, 1)


def _product(
    q_BTHN: Tensor,
    k_BLHN: Tensor,
    v_BLHN: Tensor,
    scale: float | None,
    seen: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHN, k_BLHN.to(v_BLHN.dtype), v_BLHN))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _gather(x_BLHN: Tensor, index_BL: Tensor) -> Tensor:
    return x_BLHN.gather(1, index_BL[..., None, None].expand(-1, -1, *x_BLHN.shape[2:]))
