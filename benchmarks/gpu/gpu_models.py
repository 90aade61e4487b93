"""RWKV-7 models with random weights, made where they run: official initial values of large models take minutes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import wkv
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import LayerNorm

TINY = {"num_layers": 2, "hidden_size": 32, "head_size": 16, "vocab_size": 64}


def random_model(device: torch.device, dtype: torch.dtype, preset: str | None = None, **sizes: Any) -> LanguageModel:
    """A model of a preset or of given sizes, see `fill`."""
    with torch.device("meta"):
        model = wkv.create_model("rwkv7", preset, **sizes)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random values everywhere, none of them zero: matrices keep the size of their inputs, norms start as usual."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LayerNorm):
                parameter.fill_(float(name == "weight"))
            elif parameter.squeeze().ndim == 2 and name != "r_k":
                # Linear layers have [outputs, inputs], low-rank maps [inputs, outputs].
                parameter.normal_(std=parameter.shape[-1 if name == "weight" else 0] ** -0.5)
            else:
                parameter.uniform_(0.1, 0.9)
