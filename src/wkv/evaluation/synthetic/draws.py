"""Random draws for all rows at once.

Shape letters: B rows, K draws of a row, N things to choose from, P places of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distinct(rows: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """int64 [B, K]: `count` different numbers below `size` in every row, each ordered choice equally likely."""
    if size < 4 * count:
        return torch.rand(rows, size, generator=generator).argsort(dim=1, stable=True)[:, :count]
    # Later copies of a number are drawn anew until there are none. No number is treated differently from another, so
    # all ordered choices stay equally likely, and memory does not grow with `size`.
    numbers_BK = torch.randint(size, (rows, count), generator=generator)
    again = torch.arange(rows)
    while len(again):
        repeated = first_places(numbers_BK[again]) != torch.arange(count)
        some = repeated.any(1)
        again, repeated = again[some], repeated[some]
        fresh = torch.randint(size, repeated.shape, generator=generator)
        numbers_BK[again] = torch.where(repeated, fresh, numbers_BK[again])
    return numbers_BK


def weighted_distinct(rows: int, count: int, weights_N: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B, K]: `count` different indices in every row, drawn one after the other by weight, without replacement.

    Of independent exponential waiting times with the weights as rates the shortest ones are such a draw.
    """
    # From uniform numbers, because torch draws exponential ones differently on different machines.
    uniform_BN = torch.rand(rows, len(weights_N), dtype=torch.float64, generator=generator)
    times_BN = -torch.log1p(-uniform_BN) / weights_N
    return times_BN.topk(count, dim=1, largest=False).indices


def first_places(ids_BP: Tensor) -> Tensor:
    """int64 [B, P]: for every place of a row the first place that holds the same number."""
    sorted_BP, order_BP = ids_BP.sort(dim=1, stable=True)
    starts = torch.ones_like(sorted_BP, dtype=torch.bool)
    starts[:, 1:] = sorted_BP[:, 1:] != sorted_BP[:, :-1]
    places = torch.arange(ids_BP.shape[1]).expand_as(ids_BP)
    start_BP = places.masked_fill(~starts, 0).cummax(1).values
    return torch.empty_like(order_BP).scatter_(1, order_BP, order_BP.gather(1, start_BP))


def pick(allowed_BN: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B]: in every row one of the allowed indices, each equally likely. Every row must allow one."""
    scores = torch.rand(allowed_BN.shape, generator=generator)
    return scores.masked_fill(~allowed_BN, -1.0).argmax(1)
