"""A head without a matrix of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TiedHead(nn.Module):
    """logits = h E^T with the embedding's matrix E, which stays the embedding's parameter.

    Args:
        embedding: of V tokens and C channels.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # Not as a submodule: its parameter would then have two names, in files and for the optimiser.
        self.__dict__["embedding"] = embedding

    @property
    def weight(self) -> Tensor:
        """E [V, C]."""
        weight: Tensor = self.__dict__["embedding"].weight
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden values [..., C] -> logits [..., V]."""
        return F.linear(hidden, self.weight)
