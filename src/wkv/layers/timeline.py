"""Which token follows which: token shift and final states under masks and resets.

Shape letters: B batch, T time, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timeline:
    """The order of the real tokens of a batch, worked out once per forward pass.

    Args:
        mask: bool [B, T] or None; a False token does not exist.
        reset: bool [B, T] or None; the model forgets everything before a True token.
        previous: int64 [B, T] or None (every token is real): where in `[state, token 0, token 1, ...]`
            the real token before each token stands.
        last: int64 [B] or None: where in that list the last real token stands (0: there is none).
    """

    mask: Tensor | None = None
    reset: Tensor | None = None
    previous: Tensor | None = None
    last: Tensor | None = None

    @staticmethod
    def build(mask: Tensor | None, reset: Tensor | None) -> Timeline:
        """Work out `previous` and `last` from bool [B, T] flags."""
        if mask is None:
            return Timeline(reset=reset)
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device).expand_as(mask)
        latest = torch.where(mask, positions, 0).cummax(1).values
        previous = torch.cat([torch.zeros_like(latest[:, :1]), latest[:, :-1]], 1)
        return Timeline(mask, None if reset is None else reset & mask, previous, latest[:, -1])

    def shift(self, x_BTC: Tensor, carried_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Token shift.

        Args:
            x_BTC: the input of a sub-layer.
            carried_BC: the same input at the last real token of the previous segment (zeros at the start).

        Returns:
            the input at the real token before each token [B, T, C], and the value to carry on [B, C].
        """
        carried_BC = carried_BC.to(x_BTC.dtype)
        if self.previous is None or self.last is None:
            shifted_BTC = torch.cat([carried_BC[:, None], x_BTC[:, :-1]], 1)
            last_BC = x_BTC[:, -1]
        else:
            line = torch.cat([carried_BC[:, None], x_BTC], 1)
            shifted_BTC = line.gather(1, self.previous[..., None].expand_as(x_BTC))
            last_BC = line.gather(1, self.last[:, None, None].expand(-1, 1, line.shape[-1])).squeeze(1)
        if self.reset is not None:
            shifted_BTC = shifted_BTC.masked_fill(self.reset[..., None], 0)
        return shifted_BTC, last_BC
