"""Small models for the tests of quantised models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import wkv
from tests import small
from wkv.layers.language_model import LanguageModel

LANGUAGE_MODELS = ("rwkv4", "rwkv5_0", "rwkv5_1", "rwkv5", "rwkv6", "rwkv7", "rwkv7a")


def small_model(name: str = "rwkv7", seed: int = 0, **sizes: Any) -> LanguageModel:
    """A model whose every parameter counts, in evaluation mode, with a byte tokenizer."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 257, "hidden_size": 64, "num_layers": 2, **sizes}
    fields = {**small.options(name, 32), **fields}
    model = wkv.create_model(name, **fields).eval()
    for parameter in model.parameters():
        if parameter.squeeze().ndim >= 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.tokenizer = wkv.tokenizers.ByteTokenizer()
    return model


def tokens(batch: int = 2, length: int = 9, vocab_size: int = 257) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
