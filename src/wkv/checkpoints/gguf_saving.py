"""Writing RWKV-6 and RWKV-7 models as GGUF files, tensor by tensor, for llama.cpp and what builds on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wkv.checkpoints.gguf_file import NewTensor, Value, write_gguf
from wkv.checkpoints.gguf_names import FILE_TYPES, FRAME, LAYER, UNUSED, Name
from wkv.checkpoints.gguf_vocabulary import write_vocabulary
from wkv.checkpoints.official import TITLES
from wkv.errors import WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel
from wkv.quantization.ggml_blocks import BLOCK_TYPES, quantize

# Values converted at a time.
_SLAB = 1 << 22
_CONTEXT_LENGTH = 1048576
_HEAD_NORM_EPS = 64e-5
_WORLD_SIZE = 65536


class Recipe(NamedTuple):
    """What the large matrices become: all but the head, the head, and the number that files keep for it."""

    body: str
    head: str
    file_type: int


_MIXED = {"Q4_K": ("Q4_K", 14), "Q5_K": ("Q5_K", 16), "Q4_K_M": ("Q4_K", 15), "Q5_K_M": ("Q5_K", 17)}
_SAME = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K")
RECIPES = {
    **{kind: Recipe(kind, kind, number) for number, kind in FILE_TYPES.items() if kind in _SAME},
    **{name: Recipe(kind, "Q6_K" if name.endswith("M") else kind, number) for name, (kind, number) in _MIXED.items()},
}
# Rows that are no multiple of 256 take the nearest type with blocks of 32, as in llama-quantize.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_OF_DTYPE = {torch.float16: "F16", torch.bfloat16: "BF16"}


def recipe(quantization: str | None, head_quantization: str | None, dtype: torch.dtype) -> Recipe:
    """The types to write: as named, else as the type of the model (float64 becomes F32).

    Raises:
        WkvError: for an unknown name.
    """
    name = quantization or _OF_DTYPE.get(dtype, "F32")
    if name not in RECIPES:
        raise WkvError(f"quantization {name!r} is unknown; one of {', '.join(RECIPES)}")
    found = RECIPES[name]
    if head_quantization is None:
        return found
    if head_quantization not in RECIPES or head_quantization.endswith("_M"):
        known = ", ".join(kind for kind in RECIPES if not kind.endswith("_M"))
        raise WkvError(f"head_quantization {head_quantization!r} is unknown; one of {known}")
    return found._replace(head=RECIPES[head_quantization].body)


def save_gguf(model: LanguageModel, path: Path, chosen: Recipe) -> None:
    """Write a model.

    Args:
        model: an RWKV-6 or RWKV-7.
        path: appears when the file is complete.
        chosen: types of the matrices; everything else is stored in float32.

    Raises:
        WkvError: if the format cannot hold the model.
    """
    _check(model)
    arch = model.name
    tensors = list(_tensors(model.state_dict(), arch, model.config.num_layers, chosen))
    metadata = {**_metadata(model, chosen), **_vocabulary(model)}
    with replacing([path]) as [temporary], open(temporary, "wb") as file:
        write_gguf(file, metadata, tensors)


def _check(model: LanguageModel) -> None:
    if model.name not in LAYER:
        raise WkvError(f"GGUF has RWKV-6 and RWKV-7 only, not {TITLES.get(model.name, model.name)}")
    config: Any = model.config
    if config.attention_size != config.hidden_size:
        sizes = f"attention_size {config.attention_size}, hidden_size {config.hidden_size}"
        raise WkvError(f"GGUF has one width for attention and residual stream, this model has {sizes}")
    if config.head_norm_eps != _HEAD_NORM_EPS:
        raise WkvError(f"GGUF has head_norm_eps {_HEAD_NORM_EPS} fixed, this model has {config.head_norm_eps}")
    if model.tuned_state is not None:
        raise WkvError(
            "GGUF cannot hold the tuned initial state of this model; "
            "save it with model.tuned_state.save(path), then set model.tuned_state = None"
        )


def _metadata(model: LanguageModel, chosen: Recipe) -> dict[str, Value]:
    config: Any = model.config
    title = f"{TITLES[model.name]} {config.num_layers}x{config.hidden_size}"
    sizes: dict[str, int] = {
        "context_length": _CONTEXT_LENGTH, "embedding_length": config.hidden_size, "block_count": config.num_layers,
        "wkv.head_size": config.head_size, "feed_forward_length": config.ffn_size,
        "attention.head_count": 0,  # llama.cpp wants it and does not use it
        **_ranks(config, model.name),
    }  # fmt: skip
    return {
        "general.architecture": Value("str", model.name),
        "general.name": Value("str", title),
        **{f"{model.name}.{key}": Value("u32", number) for key, number in sizes.items()},
        f"{model.name}.attention.layer_norm_epsilon": Value("f32", config.norm_eps),
        "general.file_type": Value("u32", chosen.file_type),
        "general.quantization_version": Value("u32", 2),
    }


def _ranks(config: Any, arch: str) -> dict[str, int]:
    if arch == "rwkv6":
        return {
            "rescale_every_n_layers": 0,
            "time_mix_extra_dim": config.shift_rank,
            "time_decay_extra_dim": config.decay_rank,
        }
    names = {"decay": "decay", "iclr": "iclr", "value_residual_mix": "value", "gate": "gate"}
    return {f"attention.{gguf}_lora_rank": getattr(config, f"{own}_rank") for gguf, own in names.items()}


def _vocabulary(model: LanguageModel) -> dict[str, Value]:
    """The model's own tokenizer; without one, a vocabulary of 65536 is World, as everywhere in wkv."""
    from wkv.tokenizers import WorldTokenizer

    tokenizer, size = model.tokenizer, model.config.vocab_size
    if tokenizer is None and size == _WORLD_SIZE:
        tokenizer = WorldTokenizer()
    return write_vocabulary(tokenizer, size, model.name)


def _tensors(weights: Mapping[str, Tensor], arch: str, num_layers: int, chosen: Recipe) -> Iterator[NewTensor]:
    for name in FRAME:
        yield _tensor(name.gguf, name, "", weights, chosen.head if name.gguf == "output.weight" else chosen.body)
    for layer in range(num_layers):
        for name in LAYER[arch]:
            gguf, source = f"blk.{layer}.{name.gguf}", name
            if gguf in UNUSED[arch]:  # v0 is written as a copy of a0
                source = name._replace(official=tuple(key.replace(".v", ".a") for key in name.official))
            yield _tensor(gguf, source, f"blocks.{layer}.", weights, chosen.body)


def _tensor(gguf: str, name: Name, prefix: str, weights: Mapping[str, Tensor], kind: str) -> NewTensor:
    keys = [prefix + key for key in name.official]
    absent = next((key for key in keys if key not in weights), None)
    if absent is not None:
        raise WkvError(
            f"the model has no {absent}; a GGUF file is made from a model whose matrices are not yet quantized"
        )
    parts = [weights[key] for key in keys]
    if any(part.is_meta for part in parts):
        raise WkvError(f"{keys[0]} has no values (it is on the meta device); load or initialise the model first")
    value = _arranged(parts, name.form)
    kind = _fitting(kind, value.shape[-1]) if name.form == "matrix" else "F32"
    return NewTensor(gguf, tuple(value.shape), kind, _chunks(gguf, value, kind))


def _arranged(parts: list[Tensor], form: str) -> Tensor:
    """The tensor in the shape that the file has."""
    if form == "stack":
        return torch.stack([part.detach().reshape(1, 1, -1) for part in parts])
    value = parts[0].detach()
    if form == "transposed":
        return value.transpose(-1, -2)
    shapes: dict[str, tuple[int, ...]] = {"vector": (-1,), "heads": (-1,), "mix": (1, 1, -1)}
    return value.reshape(shapes.get(form, tuple(value.shape)))


def _fitting(kind: str, row: int) -> str:
    """`kind`, or what takes its place for rows that it does not divide."""
    if row % BLOCK_TYPES[kind].values:
        kind = _FALLBACK.get(kind, "F16")
    return kind if row % BLOCK_TYPES[kind].values == 0 else "F16"


def _chunks(gguf: str, value: Tensor, kind: str) -> Callable[[], Iterator[bytes]]:
    """Makes the bytes of a tensor, some rows at a time."""

    def chunks() -> Iterator[bytes]:
        rows = value.reshape(-1, value.shape[-1])
        step = max(1, _SLAB // rows.shape[1])
        for start in range(0, len(rows), step):
            part: Any = rows[start : start + step].to("cpu", torch.float32).numpy()
            try:
                yield np.ascontiguousarray(quantize(kind, part)).tobytes()
            except WkvError as error:
                raise WkvError(f"{gguf}: {error}") from error

    return chunks
