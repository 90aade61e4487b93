"""The ramps and matrices of the official initialisation, computed in float64.

Sources: RWKV-LM `RWKV-v4neo/src/model.py`, `RWKV-v5/src/model.py`, `RWKV-v7/train_temp/src/model.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def depth(layer: int, num_layers: int) -> tuple[float, float]:
    """(rho, eta): rho runs 0 -> 1 from the first to the last layer, eta runs 1 -> 1/L. A single layer has rho 0."""
    rho = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return rho, 1.0 - layer / num_layers


def ramp(channels: int) -> Tensor:
    """c / C for c = 0 .. C-1."""
    return torch.arange(channels, dtype=torch.float64) / channels


def unit_ramp(channels: int) -> Tensor:
    """c / (C-1) for c = 0 .. C-1, from 0 to 1 (0 for a single channel)."""
    return torch.arange(channels, dtype=torch.float64) / max(channels - 1, 1)


def zigzag(channels: int) -> Tensor:
    """((c+1) mod 3) - 1: the pattern 0, 1, -1, ... added to the bonus."""
    return (torch.arange(channels, dtype=torch.float64) + 1) % 3 - 1


def blank(*shape: int) -> nn.Parameter:
    """A parameter whose value comes later, from `reset_parameters` or from a file."""
    return nn.Parameter(torch.empty(shape))


def low_rank_map(inputs: int, rank: int | None, outputs: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Blank bias [1, 1, outputs] and factors [inputs, rank], [rank, outputs], used as bias + f(x @ first) @ second."""
    assert rank is not None
    return blank(1, 1, outputs), blank(inputs, rank), blank(rank, outputs)


def fill_(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to `values`, given flat or in any shape of as many values."""
    parameter.copy_(values.reshape(parameter.shape))


def orthogonal_(matrix: Tensor, gain: float) -> None:
    """Fill a [out, in] matrix with orthogonal rows or columns, scaled by `gain` (0 gives zeros)."""
    if gain == 0:
        nn.init.zeros_(matrix)
    else:
        nn.init.orthogonal_(matrix, gain)


def tall_gain(matrix: Tensor, gain: float = 1.0) -> float:
    """`gain`, times sqrt(rows / columns) for a matrix [rows, columns] with more rows than columns."""
    rows, columns = matrix.shape
    return gain * math.sqrt(max(1.0, rows / columns))
