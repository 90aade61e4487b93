"""Tiny models with odd sizes, their official state dicts, and a writer of rwkv.cpp files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wkv
from wkv.quantization.ggml_blocks import BLOCK_TYPES, dequantize

NAMES = ("rwkv4", "rwkv5", "rwkv5_0", "rwkv5_1", "rwkv6", "rwkv7", "rwkv7a", "temporal")
GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"

_RANKS = {
    "rwkv6": {"shift_rank": 3, "decay_rank": 5},
    "rwkv7": {"decay_rank": 3, "iclr_rank": 5, "value_rank": 2, "gate_rank": 7},
    "rwkv7a": {"decay_rank": 3, "iclr_rank": 5, "value_rank": 2, "gate_rank": 7, "embed_rank": 3},
    "temporal": {"perspectives": 3},
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model whose sizes all differ and follow no default rule; every value is random."""
    torch.manual_seed(len(name))
    heads = {} if name in ("rwkv4", "temporal") else {"head_size": 4}
    sizes = {"vocab_size": 11, "hidden_size": 12, "num_layers": 3, "attention_size": 8, "ffn_size": 22}
    model = wkv.create_model(name, **{**sizes, **heads, **_RANKS.get(name, {}), **overrides})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def official(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> dict[str, Tensor]:
    """The official state dict of `tiny`."""
    return {key: value.clone() for key, value in tiny(name, dtype, **overrides).state_dict().items()}


def logits(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the model says to fixed tokens, computed in `dtype`."""
    tokens = torch.arange(14).reshape(2, 7) * 5 % model.config.vocab_size
    with torch.no_grad():
        return model.to(dtype)(tokens).logits


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    """Parameters equal bit for bit, in order, trainable, contiguous and in memory of their own."""
    state = dict(found.named_parameters())
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
        assert state[key].requires_grad, key
        assert state[key].is_contiguous(), key
    storages = {parameter.untyped_storage().data_ptr() for parameter in state.values()}
    assert len(storages) == len(state)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in state.values())
    assert not found.training


def write_rwkv_cpp(
    path: Path, name: str, weights: dict[str, Tensor], kind: str = "float32", version: int = 101
) -> dict[str, Tensor]:
    """Write `weights` in rwkv.cpp's format; returns the values a reader must find.

    Matrices become `kind`; of a quantised kind, random blocks are written, whatever the values were.
    """
    number = {"float32": 0, "float16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}[kind]
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    parts = [struct.pack("<6i", 0x67676D66, version, *weights["emb.weight"].shape, layers, number)]
    expected = dict(weights)
    for key, value in weights.items():
        stored_key, stored = to_rwkv_cpp(name, key, weights)
        if stored is None:
            continue
        matrix = key.endswith((".weight", *(f".{x}{n}" for x in "wavg" for n in "12"))) and value.ndim == 2
        quantised = matrix and number > 1 and key.split(".")[-2] in ("receptance", "key", "value", "output", "gate")
        data, here = stored.float().numpy(), 0
        if quantised:
            data, here = random_blocks(kind, stored.shape), number
            expected[key] = torch.from_numpy(dequantize(kind, data)).reshape(stored.shape)
        elif matrix and number == 1:
            data, here = data.astype("<f2"), 1
            expected[key] = value.half().float()
        text = stored_key.encode()
        shape = tuple(stored.shape)
        parts.append(struct.pack(f"<3i{len(shape)}i", len(shape), len(text), here, *shape[::-1]) + text)
        parts.append(np.ascontiguousarray(data).tobytes())
    path.write_bytes(b"".join(parts))
    return expected


def random_blocks(kind: str, shape: torch.Size) -> Any:
    layout = BLOCK_TYPES[kind].layout
    rng = np.random.default_rng(7)
    data = np.frombuffer(rng.bytes(layout.itemsize * (shape.numel() // 32)), layout).copy()
    for scale in {"d", "m"} & set(layout.names or ()):
        data[scale] = rng.normal(size=len(data)) / 50
    return data


def to_rwkv_cpp(name: str, key: str, weights: dict[str, Tensor]) -> tuple[str, Tensor | None]:
    """Key and value as that format stores them."""
    value, short = weights[key].double(), key.rpartition("att.")[2]
    if name == "rwkv4" and short == "time_decay":
        return key, -value.exp()
    if name.startswith("rwkv5") and short in ("time_decay", "time_first", "time_faaaa"):
        value = {"time_decay": (-value.exp()).exp(), "time_first": value.exp(), "time_faaaa": value}[short]
        return key, value.unsqueeze(-1) if value.ndim == 2 else value.reshape(-1, 1, 1)
    if name == "rwkv6" and short in ("time_decay", "time_faaaa"):
        shape = weights[key.replace("time_decay", "time_faaaa")].shape
        return key, value.reshape(*shape, 1)
    if "time_m" in short or "ffn.time_m" in key:
        value = value.squeeze()
    if name == "rwkv6" and short.endswith(("w1", "w2")):
        return key, value.transpose(-1, -2).contiguous()
    if name.startswith("rwkv7"):
        if short == "x_r":
            prefix = key.removesuffix("x_r")
            return prefix + "x_rwkvag", torch.cat([weights[f"{prefix}x_{letter}"] for letter in "rwkvag"])
        if short.startswith("x_"):
            return key, None
        if len(short) == 2 and short[1] in "12":
            return key, value.transpose(-1, -2).contiguous()
    return key, value
