"""Tiny models, and the options with which every method goes on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wkv
from tests import small
from wkv import tuning
from wkv.data import Batch
from wkv.layers.language_model import LanguageModel

VOCABULARY = 64
# Start with decompositions or divisions: the model changes by rounding.
RECURRENT = [name for name in wkv.list_models() if name != "transformer"]
QUOTIENTS = ("rwkv4", "temporal", "rrwkv")  # a tuned state has another normaliser of the same empty past
ROUNDED = ("pissa", "olora", "lora-ga")


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model in which every parameter matters."""
    torch.manual_seed(seed)
    model = wkv.create_model(name, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, **small.options(name, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def tokens(rows: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    """Random ids [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 2) -> list[Batch]:
    """What LoRA-GA takes its gradient from."""
    found = [tokens(2, 13, seed=20 + i) for i in range(count)]
    return [Batch(x[:, :-1], x[:, 1:]) for x in found]


def options(method: str) -> dict[str, Any]:
    """Small sizes."""
    if method in ("state", "fullstate"):
        return {}
    if method == "state-kernel":
        return {"size": 24}
    if method == "peft":
        return {"config": {"peft_type": "HIRA", "r": 4}}
    extra = {"miss-mini": {"mini_rank": 8}, "lora-ga": {"batches": batches()}}
    return {"rank": 4, **extra.get(method, {})}


def pairs() -> list[tuple[str, str]]:
    """Every method with every model that it is for."""
    only = {"state-kernel": ["rwkv7", "rwkv7a"], **dict.fromkeys(("state", "fullstate"), RECURRENT)}
    return [(m, n) for n in wkv.list_models() for m in tuning.METHODS if n in only.get(m, wkv.list_models())]


def disturb(adapter: tuning.Adapter, seed: int = 3, size: float = 0.05) -> None:
    """Random changes of the adapter, as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
