"""ROSA, the memory of RWKV-8 (RWKV-LM, RWKV-v8): the longest repeated suffix says what comes next. Experimental.

Symbols are integers of 0 or more. For every channel by itself: find the longest suffix of the queries q_0 .. q_t that
stands among the keys before token t, the latest one of them; if it ends at token j, the result is the value v_{j+1}.
With q = k = v = x that predicts the next symbol of x, as a suffix automaton does.

What is carried from token to token is the length of the match that ends at every key: length[t, j] is 0 where q_t and
k_j differ, else 1 + length[t-1, j-1]. That is one vector step per token, O(t) for each channel on any device, where an
automaton needs O(1) but goes symbol by symbol.

Shape letters: B batch, T time, C channels, S earlier tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.errors import WkvError
from wkv.ops import common

NOTHING = -1  # a key that no query equals, and the result where nothing matches


class RosaState(NamedTuple):
    """What came before; it grows with every token.

    Args:
        keys, values: int64 [B, S, C]; keys of tokens that do not exist or are forgotten are -1.
        lengths: int64 [B, S, C], of the matches of the newest query's suffix that end at each key.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


def rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RosaState | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, RosaState]:
    """Find the longest suffix of the queries among the keys, and what followed it among the values.

    Args:
        q, k, v: symbols of 0 or more, int64 [B, T, C].
        state: of earlier tokens; None means there are none.
        mask: bool [B, T]; a False token does not exist, and finds nothing.
        reset: bool [B, T]; everything before a True token is forgotten.

    Returns:
        the values that were found [B, T, C], -1 where nothing matches; the lengths of the matches [B, T, C], 0 there;
        and the state. It has T tokens more, of which those that do not exist come first.

    Raises:
        WkvError: if shapes, types or devices do not fit together, T is 0, or a symbol is negative.
    """
    _check(q, k, v, state, mask, reset)
    batch, time, channels = q.shape
    earlier = state or RosaState(*(q.new_empty(batch, 0, channels) for _ in range(3)))
    size = earlier.keys.shape[1]
    keys, values = torch.cat([earlier.keys, k], 1), torch.cat([earlier.values, v], 1)
    lengths, queries = F.pad(earlier.lengths, (0, 0, 0, time)), F.pad(q, (0, 0, size, 0))
    flags = None if reset is None else F.pad(reset if mask is None else reset & mask, (size, 0))
    order = None
    if mask is not None:  # neighbours must be neighbours: tokens that do not exist go to the old end
        exists = F.pad(mask, (size, 0), value=True)
        order = exists.to(torch.uint8).argsort(dim=1, stable=True)
        keys = keys.masked_fill(~exists[..., None], NOTHING)
        keys, values, lengths, queries = (_taken(x, order) for x in (keys, values, lengths, queries))
        flags = None if flags is None else flags.gather(1, order)
    found, matched = torch.full_like(queries, NOTHING), torch.zeros_like(queries)
    first = None if mask is None else size + time - mask.sum(1)
    for t in range(size, size + time):
        here_B11 = None if first is None else (first <= t)[:, None, None]
        if flags is not None:
            keys[:, :t].masked_fill_(flags[:, t, None, None], NOTHING)
        if t == 0:
            continue
        before = lengths[:, :t]
        row = torch.where(keys[:, :t] == queries[:, t, None], F.pad(before[:, :-1], (0, 0, 1, 0)) + 1, 0)
        row = row if here_B11 is None else torch.where(here_B11, row, before)
        lengths[:, :t] = row
        # The longest, and of those the latest.
        best = (row * t + torch.arange(t, device=q.device)[:, None]).argmax(1, keepdim=True)
        length, value = row.gather(1, best), values.gather(1, best + 1)
        here = length > 0 if here_B11 is None else (length > 0) & here_B11
        found[:, t], matched[:, t] = (
            torch.where(here, x, none).squeeze(1) for x, none in ((value, NOTHING), (length, 0))
        )
    if order is not None:
        found, matched = (torch.empty_like(x).scatter_(1, _wide(order, x), x) for x in (found, matched))
    return found[:, size:], matched[:, size:], RosaState(keys, values, lengths)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens in another order."""
    return x.gather(1, _wide(order, x))


def _wide(order: Tensor, x: Tensor) -> Tensor:
    return order[..., None].expand_as(x)


def _check(q: Tensor, k: Tensor, v: Tensor, state: RosaState | None, mask: Tensor | None, reset: Tensor | None) -> None:
    if q.ndim != 3 or q.numel() == 0:
        raise WkvError(f"rosa: q must be [B, T, C] with at least one token, found {tuple(q.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        common.check_shape("rosa", name, x, tuple(q.shape))
        if x.dtype != torch.int64 or x.device != q.device:
            raise WkvError(f"rosa: {name} must be int64 on {q.device}, found {x.dtype} on {x.device}")
        if bool((x < 0).any()):
            raise WkvError(f"rosa: symbols of {name} must be 0 or more, found {int(x.min())}")
    if state is not None:
        size = state.keys.shape[1] if state.keys.ndim == 3 else 0
        for name, x in state._asdict().items():
            common.check_shape("rosa", f"state.{name}", x, (q.shape[0], size, q.shape[2]))
            if x.dtype != torch.int64 or x.device != q.device:
                raise WkvError(f"rosa: state.{name} must be int64 on {q.device}, found {x.dtype} on {x.device}")
    common.check_flags("rosa", "mask", mask, q)
    common.check_flags("rosa", "reset", reset, q)
