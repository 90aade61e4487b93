"""Products with the factors of low-rank maps, which may be stored in another type than the activations have."""

from __future__ import annotations

from torch import Tensor


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x [..., I] times factor [I, R] in the type of x: quantised models keep their factors in 16 bits."""
    return x @ factor.to(x.dtype)
