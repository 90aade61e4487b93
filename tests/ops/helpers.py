"""What the operator tests share: golden vectors and error measures."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden(system: str, name: str) -> dict[str, Tensor]:
    """The tensors of `tests/golden/<system>/<name>.safetensors`."""
    return load_file(GOLDEN / system / f"{name}.safetensors")


def max_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, computed in float64; the plain maximum where expected is zero."""
    expected = expected.detach().double()
    error = (actual.detach().double() - expected).abs().max().item()
    return error / (expected.abs().max().item() or 1.0)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected), computed in float64."""
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
