"""A line of tokens with further entries between them, wherever a number of real tokens has been read.

The entries, p at the end of every chunk of M real tokens of a document, stand for the state of a recurrence at that
place. Attention sees them like tokens: its own books about masks, resets and caches then cover them, too. The count
of an attention cache includes them; `tokens_read` takes them out again.

Shape letters: B batch, T time, K pieces (a piece ends where a chunk does, or with the T tokens), S = K p entries,
L = T + S, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.layers.segments import Segments
from wkv.layers.timeline import Timeline
from wkv.state import LayerState

# (what it reads at every token, each [B, T, H, N], state, timeline) -> y [B, T, H, N], new slots.
Remember = Callable[[list[Tensor], LayerState, Timeline], tuple[Tensor, LayerState]]


def tokens_read(count_B: Tensor, period: int, entries: int) -> Tensor:
    """How many of the tokens that a cache has counted were no entries: int64 [B] -> [B]."""
    return count_B // (period + entries) * period + count_B % (period + entries)


class Chunks(NamedTuple):
    """Where the chunks of every row end, and the line in which entries follow them.

    Attributes:
        piece: int64 [B, T], of each token; it ends with the chunk that the token belongs to.
        starts: int64 [B, K + 1], where pieces begin; the last column is where the last of them ends.
        order: int64 [B, L], what stands in the line: token i, or T + entry.
        tokens: Timeline of the tokens.
        line: Timeline of the line; entries of incomplete chunks do not exist.
    """

    piece: Tensor
    starts: Tensor
    order: Tensor
    tokens: Timeline
    line: Timeline

    @staticmethod
    def build(count_B: Tensor, timeline: Timeline, length: int, period: int, entries: int) -> Chunks:
        """Chunks of M tokens with p entries after each, for T tokens after `count` tokens and entries."""
        segments = Segments.build(count_B % (period + entries), timeline, length, period)
        piece_BT = segments.number[:, :-1].contiguous()
        batch, pieces, device = len(piece_BT), int(piece_BT.max()) + 1, piece_BT.device
        edges = torch.arange(pieces + 1, device=device).expand(batch, -1).contiguous()
        starts = torch.searchsorted(piece_BT, edges)
        before_BS = entries * edges[:, :-1, None] + torch.arange(entries, device=device)
        token_places = torch.arange(length, device=device) + entries * piece_BT
        entry_places = (starts[:, 1:, None] + before_BS).flatten(1)
        order = torch.cat([token_places, entry_places], 1).argsort(1)
        real = torch.ones_like(piece_BT, dtype=torch.bool) if timeline.mask is None else timeline.mask
        complete_BK = F.pad(segments.complete, (0, 1))[:, :pieces]  # the last of all is not
        mask = torch.cat([real, complete_BK.repeat_interleave(entries, 1)], 1).gather(1, order)
        reset = None
        if timeline.reset is not None:
            never = torch.zeros_like(entry_places, dtype=torch.bool)
            reset = torch.cat([timeline.reset, never], 1).gather(1, order)
        return Chunks(piece_BT, starts, order, timeline, Timeline(mask, reset))

    def merge(self, tokens_BTHN: Tensor, entries_BSHN: Tensor) -> Tensor:
        """Both in the order of the line [B, L, H, N], in the type of the tokens."""
        return pick(torch.cat([tokens_BTHN, entries_BSHN.to(tokens_BTHN.dtype)], 1), self.order)

    def tokens_of(self, line_BLHN: Tensor) -> Tensor:
        """What stands at the tokens [B, T, H, N]."""
        return pick(line_BLHN, self.order.argsort(1)[:, : self.piece.shape[1]])

    def remember(
        self, remember: Remember, inputs: Sequence[Tensor], state: LayerState
    ) -> tuple[Tensor, LayerState, Tensor]:
        """Run a recurrence piece by piece.

        Rows may end their pieces at different tokens: what is missing to the longest does not exist.

        Args:
            remember: the recurrence; its state is the slot "wkv".
            inputs: what it reads at every token, each [B, T, H, N].
            state: before the first token.

        Returns:
            y [B, T, H, N], new slots, and the states at the ends of all pieces [B, K, H, N, N].
        """
        outputs, ends, slots = [], [], state
        steps_BK = self.starts.diff(dim=1)
        widths = steps_BK.amax(0).tolist()
        for piece, width in enumerate(widths):
            offset = torch.arange(width, device=self.piece.device)
            index = (self.starts[:, piece, None] + offset).clamp(max=self.piece.shape[1] - 1)
            timeline = self._part(index, offset < steps_BK[:, piece, None])
            y_BWHN, slots = remember([pick(x, index) for x in inputs], {**state, **slots}, timeline)
            outputs.append(y_BWHN)
            ends.append(slots["wkv"])
        first_K = torch.tensor([sum(widths[:piece]) for piece in range(len(widths))], device=self.piece.device)
        place = torch.arange(self.piece.shape[1], device=self.piece.device) - self.starts.gather(1, self.piece)
        return pick(torch.cat(outputs, 1), first_K[self.piece] + place), slots, torch.stack(ends, 1)

    def _part(self, index: Tensor, exists: Tensor) -> Timeline:
        mask, reset = self.tokens.mask, self.tokens.reset
        if mask is not None:
            exists = exists & mask.gather(1, index)
        return Timeline(exists, None if reset is None else reset.gather(1, index) & exists)


def pick(x_BLHN: Tensor, index_BT: Tensor) -> Tensor:
    """Entries along the second dimension, of each row its own."""
    return x_BLHN.gather(1, index_BT[..., None, None].expand(-1, -1, *x_BLHN.shape[2:]))
