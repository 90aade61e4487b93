"""One linear layer with adapters beside it.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError


class Side(nn.Module, ABC):
    """What one adapter adds to one linear layer. Its parameters are float32, whatever the layer's own type is."""

    @abstractmethod
    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """x [..., I] -> y [..., O] of the adapted layer, in the type of `base(x)`."""

    @abstractmethod
    def merged_weight(self, weight: Tensor) -> Tensor:
        """The one weight that does the same: float32 [O, I] of the frozen layer -> float32 [O, I].

        Neither `weight` nor the adapter changes.
        """


def layer_weight(layer: Any) -> Tensor:
    """The weight of a linear layer in float32 [O, I], of a quantised one what its codes stand for."""
    weight = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
    found: Tensor = weight.detach().float()
    return found


class AdaptedLinear(nn.Module):
    """A frozen linear layer, and the sides of all adapters that are mounted on it; at most one of them is active.

    Args:
        base: the layer: `nn.Linear`, or one with quantised weights.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
        self.base = base
        self.sides = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        result: Tensor = self.base(x) if self.active is None else self.sides[self.active](x, self.base)
        return result

    @torch.no_grad()
    def merged(self, name: str) -> nn.Linear:
        """A plain layer that does what side `name` does: added up in float32, rounded once to the layer's type.

        Raises:
            WkvError: if the layer's weights are quantised.
        """
        if not isinstance(self.base, nn.Linear):
            raise WkvError(
                f"weights in {type(self.base).__name__} cannot take up an adapter; use it unmerged, or merge it into "
                "the model in floating point"
            )
        side: Any = self.sides[name]
        weight = side.merged_weight(layer_weight(self.base)).to(self.base.weight.dtype)
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer
