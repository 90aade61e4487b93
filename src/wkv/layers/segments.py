"""Cutting the real tokens of a batch into segments of equal length, under masks and resets.

Shape letters: B batch, T time, K segments that T tokens can complete at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.layers.timeline import Timeline


class Segments(NamedTuple):
    """Which tokens make which medium (what a complete segment leaves behind), and who reads it, worked out by counting.

    Numbers count mediums within a row of the batch, from 0 on. The tensors with T + 1 columns say in the last one how
    things are after all tokens.

    Attributes:
        number: int64 [B, T + 1], of the medium that a token may help to make: as many are complete before it.
        counts: bool [B, T], whether it does: it is real, and no reset comes before the end of its segment or of time.
        visible: bool [B, T + 1], whether there is no reset between the last complete medium and the token.
        complete: bool [B, K], the mediums there are.
        reset: bool [B, K], whether there is a reset between a medium and the one before it.
        latest: bool [B, K], the mediums there are after the last reset of all.
        joins: bool [B], whether the sum carried from earlier tokens goes into the first medium.
        unbroken: bool [B], whether there is no reset.
        rest: int64 [B], tokens of the incomplete segment at the end.
    """

    number: Tensor
    counts: Tensor
    visible: Tensor
    complete: Tensor
    reset: Tensor
    latest: Tensor
    joins: Tensor
    unbroken: Tensor
    rest: Tensor

    @staticmethod
    def build(count_B: Tensor, timeline: Timeline, length: int, period: int) -> Segments:
        """Cut T tokens into segments of p, of which the first holds `count` tokens already."""
        blank = torch.zeros(len(count_B), length, dtype=torch.bool, device=count_B.device)
        real_BT = ~blank if timeline.mask is None else timeline.mask
        reset_BT = blank if timeline.reset is None else timeline.reset
        before_BT = real_BT.cumsum(1) - real_BT.long()
        document_BT = reset_BT.cumsum(1)
        start_BT = torch.where(reset_BT, before_BT, 0).cummax(1).values
        place_BT = before_BT - start_BT + torch.where(document_BT == 0, count_B[:, None], 0)
        full_BT = real_BT & ((place_BT + 1) % period == 0)
        # One column more: how things are after all tokens.
        number = F.pad(full_BT.cumsum(1), (1, 0))
        document = torch.cat([document_BT, document_BT[:, -1:]], 1)
        # The document of each medium, the incomplete one at the end included; column 0 stands for what is carried.
        most = length // period + 1
        owner = torch.zeros(len(count_B), most + 3, dtype=torch.int64, device=count_B.device)
        owner.scatter_(1, torch.where(full_BT, number[:, :-1] + 1, most + 2), document_BT)
        owner.scatter_(1, number[:, -1:] + 1, document[:, -1:])
        complete_BK = torch.arange(most, device=count_B.device) < number[:, -1:]
        return Segments(
            number=number,
            counts=real_BT & (owner.gather(1, number[:, :-1] + 1) == document_BT),
            visible=owner.gather(1, number) == document,
            complete=complete_BK,
            reset=complete_BK & (owner[:, 1 : most + 1] != owner[:, :most]),
            latest=complete_BK & (owner[:, 1 : most + 1] == document[:, -1:]),
            joins=owner[:, 1] == 0,
            unbroken=document[:, -1] == 0,
            rest=(place_BT[:, -1] + real_BT[:, -1]) % period,
        )
