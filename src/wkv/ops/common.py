"""What the operators share: argument checks, compute types, masks and resets.

Shape letters: B batch, T time, H heads, N head size (keys), C channels, L chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv.errors import WkvError


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any argument is float64, else float32: no recurrence runs in half precision."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_same_shape(operator: str, **tensors: Tensor) -> None:
    """All tensors must be floating point, on one device and [B, T, H, N] of one shape."""
    (first_name, first), *rest = tensors.items()
    if first.ndim < 3:
        raise WkvError(f"{operator}: {first_name} must be [B, T, ...], found {tuple(first.shape)}")
    for name, tensor in rest:
        if tensor.shape != first.shape:
            raise WkvError(
                f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)} like {first_name}"
            )
    for name, tensor in tensors.items():
        check_floating(operator, name, tensor, first.device)


def check_floating(operator: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """`tensor` must be floating point and on `device`."""
    if not tensor.dtype.is_floating_point:
        raise WkvError(f"{operator}: {name} must be a floating-point tensor, found {tensor.dtype}")
    if tensor.device != device:
        raise WkvError(f"{operator}: {name} is on {tensor.device}, the other arguments are on {device}")


def check_shape(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """`tensor` must have exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise WkvError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_flags(operator: str, name: str, flags: Tensor | None, like: Tensor) -> None:
    """`mask` and `reset` must be bool [B, T] on the device of `like` [B, T, ...]."""
    if flags is None:
        return
    if flags.dtype != torch.bool:
        raise WkvError(f"{operator}: {name} must be bool, found {flags.dtype}; write `{name}.bool()`")
    check_shape(operator, name, flags, tuple(like.shape[:2]))
    if flags.device != like.device:
        raise WkvError(f"{operator}: {name} is on {flags.device}, the other arguments are on {like.device}")


def effective_reset(mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """A token that does not exist resets nothing."""
    return reset & mask if mask is not None and reset is not None else reset
