"""Small tasks whose answers are easy to learn and to check, and small models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import wkv
from wkv.layers.language_model import LanguageModel


@dataclass
class FakeSamples:
    inputs: Tensor
    labels: Tensor
    mask: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Echo:
    """Say the token that stands there; asked at odd positions."""

    name, vocab_size, chance = "echo", 8, 0.125

    def __init__(self, length: int = 6) -> None:
        self.options = {"length": length}

    def sample(self, n: int, seed: int, split: str = "train", length: int | None = None) -> FakeSamples:
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        inputs = torch.randint(self.vocab_size, (n, length or self.options["length"]), generator=generator)
        labels = inputs.clone()
        labels[:, ::2] = -100
        return FakeSamples(inputs, labels)


def tiny(name: str = "rwkv4", seed: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_layers": 2}
    sizes |= {} if name == "rwkv4" else {"head_size": 8}
    return wkv.create_model(name, **{**sizes, **options})
