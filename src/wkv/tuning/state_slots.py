"""How the slots of a state are tuned: which method trains which, and the modules that hold them.

Shape letters: H heads, N head size, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.norms import wide
from wkv.ops.wkv4 import EMPTY


class Rule(NamedTuple):
    """How one kind of slot is tuned.

    Args:
        methods: that train it; none if it cannot be trained.
        start: value that takes the place of an empty one in a tuned layer; None leaves it as it is.
        matrix: whether a slot of two or more dimensions is one matrix or several, which can have a low rank.
    """

    methods: tuple[str, ...]
    start: float | None = None
    matrix: bool = True


# End of a slot's name -> rule; the first that fits counts. Slots that are not floating point are never trained.
RULES = {
    "shift": Rule(("fullstate",), matrix=False),
    # What rrwkv knows of whole segments, the normaliser of linear attention, and caches of attention.
    **dict.fromkeys(("pool_num", "pool_den", "pool_max", "sum", "medium", "z", "cache"), Rule(())),
    "den": Rule((), start=0.0),
    "max": Rule((), start=0.0),
    "num": Rule(("state", "fullstate"), matrix=False),
    "": Rule(("state", "fullstate")),
}


class Whole(nn.Module):
    """A slot with a parameter for every value."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        """The slot of one sequence."""
        return self.value


class LowRank(nn.Module):
    """A matrix slot as left right^T per head: [..., N_value, R] and [..., N_key, R].

    Where the start has no component, left is zero and right random, so that the product starts as it should and the
    gradient reaches left. The scale of right lets an Adam step of left change the product as much as it would change a
    `Whole`.

    Args:
        value: the start; the best approximation of rank R is taken.
        rank: R.
        generator: draws the random part.
    """

    def __init__(self, value: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        if rank > min(value.shape[-2:]):
            raise WkvError(f"rank must be at most {min(value.shape[-2:])}, the side of the matrices, found {rank}")
        u, s, vh = torch.linalg.svd(value.double(), full_matrices=False)
        s, scale = s[..., None, :rank], s[..., None, :rank].sqrt()
        random = torch.randn(*value.shape[:-2], value.shape[-1], rank, generator=generator, dtype=torch.float64)
        there = s > 1e-7 * s.amax(-1, keepdim=True)
        self.left = nn.Parameter((u[..., :rank] * scale * there).to(value))
        right = torch.where(there, vh.mT[..., :rank] * scale, random.to(value.device) * rank**-0.5)
        self.right = nn.Parameter(right.to(value))

    def forward(self) -> Tensor:
        """The slot of one sequence [..., N_value, N_key]."""
        with torch.autocast(self.left.device.type, enabled=False):
            return self.left @ self.right.mT


class Fixed(nn.Module):
    """A slot that has a value and is not trained."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """The slot of one sequence."""
        return self.value


class Builder(NamedTuple):
    """Makes the module of each slot.

    Args:
        method: "state" or "fullstate".
        rank: of matrix slots; None trains every value.
        generator: draws the random factors of a low rank.
    """

    method: str
    rank: int | None
    generator: torch.Generator

    def slot(self, name: str, value: Tensor, tuned: bool, given: bool) -> nn.Module | None:
        """The module of a slot, or None if it stays as the model's own empty state has it.

        Args:
            name: of the slot.
            value: of one sequence.
            tuned: whether its layer is trained.
            given: whether the value is that of a state to start from.
        """
        rule = next(rule for end, rule in RULES.items() if name.endswith(end))
        if not value.is_floating_point():
            return Fixed(value) if given else None
        if tuned and rule.start is not None:
            value = torch.where(value > EMPTY / 2, value, rule.start)
        if not tuned or self.method not in rule.methods:
            return Fixed(wide(value)) if given or (tuned and rule.start is not None) else None
        if self.rank is not None and rule.matrix and value.ndim > 1:
            return LowRank(wide(value), self.rank, self.generator)
        return Whole(wide(value))
