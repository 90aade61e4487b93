"""Four-bit round trips to compare: float matrix in, the matrix its codes stand for out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wkv.quantization.ggml_blocks import dequantize, quantize
from wkv.quantization.packed import quantize as quantize_packed

RoundTrip = Callable[[Tensor], Tensor]


def symmetric(weight: Tensor) -> Tensor:
    """`wkv.quantization`'s int4: groups of 32, one half-precision scale: 4.5 bits."""
    return quantize_packed(weight, "int4").dequantize()


def with_minimum(group: int) -> RoundTrip:
    """Groups with half-precision scale and minimum, both fitted by least squares: 4 + 32 / group bits."""

    def round_trip(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        best_error, best = torch.full_like(low, torch.inf), groups
        for shrink in torch.linspace(0.78, 1.02, 25).tolist():
            middle, half = (high + low) / 2, (high - low) / 2 * shrink
            values = _fit(groups, middle - half, 2 * half / 15)
            error = (values - groups).square().sum(-1, keepdim=True)
            best = torch.where(error < best_error, values, best)
            best_error = torch.minimum(error, best_error)
        return best.flatten(1)

    return round_trip


def _fit(groups: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Round to 16 values, then the best scale and minimum for these codes, then round once more."""
    for _ in range(2):
        inverse = torch.where(step != 0, 1 / step, 0)
        codes = torch.round((groups - low) * inverse).clamp_(0, 15)
        centred = codes - codes.mean(-1, keepdim=True)
        energy = centred.square().sum(-1, keepdim=True)
        step = torch.where(energy > 0, (centred * groups).sum(-1, keepdim=True) / energy, 0)
        low = groups.mean(-1, keepdim=True) - step * codes.mean(-1, keepdim=True)
        step, low = step.half().float(), low.half().float()
    return codes * step + low


def ggml(kind: str) -> RoundTrip:
    """A block type of ggml; rows are padded with zeros to whole blocks (llama.cpp would fall back to another type)."""

    def round_trip(weight: Tensor) -> Tensor:
        block = 256 if kind.endswith("_K") else 32
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % block))
        values = torch.from_numpy(dequantize(kind, quantize(kind, padded.numpy())))
        return values[:, : weight.shape[1]].contiguous()

    return round_trip


FOUR_BIT: dict[str, tuple[float, RoundTrip]] = {
    "symmetric, groups of 32 (ours)": (4.5, symmetric),
    "with minimum, groups of 64": (4.5, with_minimum(64)),
    "with minimum, groups of 32": (5.0, with_minimum(32)),
    "Q4_0": (4.5, ggml("Q4_0")),
    "Q4_1": (5.0, ggml("Q4_1")),
    "Q4_K": (4.5, ggml("Q4_K")),
}
