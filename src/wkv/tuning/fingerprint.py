"""Which base model an adapter belongs to, told by samples of its weights.

A hash of everything would read gigabytes, and differ between the same weights in float32 and in bfloat16. Instead a
few values of every parameter are kept, and must be equal after rounding to the type that has fewer bits. A fine-tuned
copy of the same base differs in some of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.mounting import base_parameters

VALUES = 16  # per parameter

Samples = dict[str, Tensor]


def fingerprint(model: LanguageModel) -> Samples:
    """Official name -> evenly spaced values of each parameter, in its own type.

    Weights that are quantised have no part: the same base may be quantised in many ways.
    """
    return {name: _sample(parameter) for name, parameter in base_parameters(model)}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel()), dtype=torch.float64).round().long()
    return flat[places.to(flat.device)].cpu().clone()


def check_same_base(expected: Mapping[str, Tensor], model: LanguageModel, what: str) -> None:
    """Refuse an adapter of another model.

    Args:
        expected: the fingerprint that the adapter carries.
        model: what it is to be mounted on.
        what: how the error calls the adapter.

    Raises:
        WkvError: naming the first parameter that differs.
    """
    found = fingerprint(model)
    common = [name for name in expected if name in found]
    if not common:
        raise WkvError(f"{what} was made for a model with other parameters than this {model.name}; load its own base")
    for name in common:
        if not _same(expected[name], found[name]):
            raise WkvError(
                f"{what} was made for another base: {name} differs. Load the checkpoint it was trained on, or pass "
                "check_base=False if you know that it fits"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal after rounding to the coarser of the two types."""
    if a.shape != b.shape:
        return False
    return bool(torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype)))
