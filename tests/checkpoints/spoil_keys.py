"""Bad state dicts: keys, shapes, types and layouts that no model has.

Every case is drawn from a seed. A `spoil_*` function writes one bad checkpoint into a folder and returns the source to
load and a word (or several, of which one is enough) that the error must contain.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints.helpers import NAMES, official

Spoiled = tuple[Any, str | tuple[str, str]]
Spoil = Callable[[random.Random, Path], Spoiled]


def write(rng: random.Random, folder: Path, weights: dict[str, Any]) -> Path:
    """Write a state dict as .pth or .safetensors."""
    tensors = all(isinstance(value, torch.Tensor) for value in weights.values())
    path = folder / rng.choice(["model.pth", "model.safetensors"] if tensors else ["model.pth"])
    if path.suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


def model(rng: random.Random) -> tuple[str, dict[str, torch.Tensor]]:
    name = rng.choice(NAMES)
    return name, official(name, rng.choice([torch.float32, torch.bfloat16]))


def any_key(rng: random.Random, weights: dict[str, Any]) -> str:
    return rng.choice([key for key in weights if key[:14] not in ("blocks.0.att.v",)])


def spoil_missing(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    del weights[key]
    return write(rng, folder, weights), key


def spoil_renamed(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    position = rng.randrange(len(key))
    other = key[:position] + rng.choice("xyzQ7_é \n") + key[position + 1 :]
    if other == key:
        return spoil_renamed(rng, folder)
    weights[other] = weights.pop(key)
    return write(rng, folder, weights), (key, other if other.isprintable() else repr(other))


def spoil_unexpected(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = rng.choice(["step", "blocks.0.att.extra", "blocks.1.ln3.weight", "x" * 500, "emb.bias", "blocks.01.ln1.bias"])
    weights[key] = torch.zeros(3)
    return write(rng, folder, weights), key[:100]


def spoil_value(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = rng.choice(["epoch", any_key(rng, weights)])
    return write(rng, folder, {**weights, key: rng.choice([3, None, 2.5, "text", [1, 2], {"a": 1}])}), key


def spoil_shape(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    value = weights[key]
    sizes = list(value.shape)
    axis = max(range(len(sizes)), key=sizes.__getitem__)
    kind = rng.randrange(4)
    if kind == 0:
        sizes[axis] += rng.choice([-1, 1, 7])
    elif kind == 1:
        sizes = [2, *sizes]
    elif kind == 2 and len({size for size in sizes if size > 1}) > 1:
        sizes = sizes[::-1]
    else:
        sizes[axis] *= 2
    weights[key] = torch.zeros(sizes, dtype=value.dtype)
    return write(rng, folder, weights), key


def spoil_type(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    kinds = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    weights[key] = torch.zeros(weights[key].shape, dtype=rng.choice(kinds))
    return write(rng, folder, weights), key


def spoil_layer(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    layer = rng.choice([0, 1])
    kept = {key: value for key, value in weights.items() if not key.startswith(f"blocks.{layer}.")}
    return write(rng, folder, kept), f"layer {layer} is missing"


def spoil_far_layer(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = f"blocks.{rng.choice([5, 999, 99999, 10**9])}.ln1.weight"
    weights[key] = torch.zeros(12)
    return write(rng, folder, weights), key


def spoil_all_of_one_kind(rng: random.Random, folder: Path) -> Spoiled:
    """A size that is wrong in the same way in every layer."""
    _, weights = model(rng)
    part = rng.choice(["ffn.key.weight", "att.output.weight", "ln1.weight"])
    for key in [key for key in weights if key.endswith(part)]:
        weights[key] = weights[key][..., :-1]
    return write(rng, folder, weights), part


def spoil_prefix(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    weights["_forward_module." + key] = weights[key] + 1
    return write(rng, folder, weights), key


def spoil_empty_dimension(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = any_key(rng, weights)
    sizes = [0] + [rng.choice([1, 10**6])] * (weights[key].ndim - 1)
    weights[key] = torch.zeros(sizes)
    return write(rng, folder, weights), key


def spoil_inflated(rng: random.Random, folder: Path) -> Spoiled:
    """Strides of zero: a small file whose tensors are huge."""
    _, weights = model(rng)
    key = any_key(rng, weights)
    weights[key] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(weights, folder / "model.pth")
    return folder / "model.pth", key


def spoil_shared(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    one = torch.zeros(10**4)
    torch.save({**weights, **{f"blocks.0.att.extra{n}": one for n in range(50)}}, folder / "model.pth")
    return folder / "model.pth", "model.pth: "


FOREIGN_KEYS = {
    "_strategy": "`rwkv` package", "_rescale_layer": "`rwkv` package", "blocks.0.qkv.q.weight": "RWKV-7b",
    "blocks.0.ffn.enn.weight": "RWKV-8", "blocks.0.rosa.q.weight": "ROSA", "head_q.weight": "headQK",
    "blocks.0.ffnPre.key.weight": "pre_ffn", "blocks.0.tiny_q.weight": "tiny attention",
    "blocks.0.att.qq.weight": "RWKV-4a", "blk.0.time_mix_w0.weight": "GGUF", "blocks.0.att.key.lora_A": "adapter",
    "rwkv.blocks.0.attention.key.weight": "transformers", "model.layers.0.attn.k_proj.weight": "Hugging Face",
    "model.embeddings.weight": "Hugging Face", "blocks.0.att.x_x": "fla", "blocks.0.att.time_mix_w1": "web-rwkv",
}  # fmt: skip


def spoil_foreign(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    key = rng.choice(list(FOREIGN_KEYS))
    value: Any = "cuda fp16i8" if key.startswith("_") else torch.zeros(4)
    source = write(rng, folder, {key: value, **weights} if rng.random() < 0.5 else {key: value, "emb": torch.zeros(3)})
    return source, FOREIGN_KEYS[key]


def spoil_variant(rng: random.Random, folder: Path) -> Spoiled:
    weights = {key: value for key, value in official("rwkv6").items() if "gate.weight" not in key}
    if rng.random() < 0.5:
        return write(rng, folder, weights), "x060b or x060c"
    low_rank = {f"blocks.{layer}.att.gate_w1": torch.zeros(12, 3) for layer in range(3)}
    return write(rng, folder, {**weights, **low_rank}), "x060a"


def spoil_transposed(rng: random.Random, folder: Path) -> Spoiled:
    weights = official(rng.choice(["rwkv7", "rwkv7a"]))
    swapped = {key: value.mT if key[-2:] in ("w1", "w2", "a1", "a2") else value for key, value in weights.items()}
    return write(rng, folder, swapped), "transposed"
