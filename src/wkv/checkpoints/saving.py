"""`save_model`: our own one-file format, and the layouts that other RWKV programs read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints.gguf_saving import Recipe, recipe, save_gguf
from wkv.checkpoints.loading import parse_dtype
from wkv.checkpoints.official import has_official_layout
from wkv.checkpoints.tuned import own_slots, tuned_tensors
from wkv.errors import WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel

_SUFFIXES = {"wkv": (".safetensors",), "official": (".pth", ".pt", ".safetensors"), "gguf": (".gguf",)}
_LATER = ("hf",)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_model(
    model: LanguageModel,
    path: str | os.PathLike[str],
    format: str = "wkv",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    quantization: str | None = None,
    head_quantization: str | None = None,
) -> None:
    """Write a model to one file, or to shards. The files appear only when all of them are complete.

    Args:
        model: a model of this library.
        path: where to; `format="wkv"` writes .safetensors, `"official"` .pth or .safetensors by the suffix, `"gguf"`
            .gguf.
        format: "wkv" keeps the configuration and the tokenizer beside the weights; "official" has the names, shapes
            and nothing else, for other RWKV programs; "gguf" is for llama.cpp and holds RWKV-6 and RWKV-7, with the
            tokenizer. Weights of `quantize_model` stay as they are in "wkv" files and become floating point in others.
        dtype: type to convert to; the model's own by default. A GGUF file keeps vectors and low-rank matrices in
            float32 whatever the type.
        max_shard_size: bytes, or text such as "2GB": larger .safetensors files are split into numbered shards with
            an index `<name>.safetensors.index.json`.
        quantization: for GGUF, what the large matrices become instead: "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1",
            "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", or "Q4_K_M" and "Q5_K_M", whose head is Q6_K.
        head_quantization: for GGUF, another type for the head.

    Raises:
        WkvError: for an unknown format or suffix, or if a file cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    _check_format(format, path)
    _check_model(model)
    if format != "wkv":
        model = _plain(model)
    dtype, limit = parse_dtype(dtype), _shard_limit(max_shard_size, path)
    if format == "official" and not has_official_layout(model.name):
        raise WkvError(f"format 'official' is not written for {model.name}; save it with format 'wkv'")
    a_scale = getattr(model.config, "a_scale", 1)
    if format != "wkv" and a_scale != 1:
        raise WkvError(f"{format} files cannot hold a_scale {a_scale:g}; save it with format 'wkv'")
    chosen = _gguf_recipe(model, format, dtype, quantization, head_quantization)
    try:
        if chosen is not None:
            save_gguf(model, path, chosen)
        else:
            _save_tensors(model, path, format, dtype, limit)
    except (OSError, RuntimeError) as error:
        if isinstance(error, WkvError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WkvError(f"{path}: could not be written ({reason})") from error


def _gguf_recipe(
    model: LanguageModel, format: str, dtype: torch.dtype | None, quantization: str | None, head: str | None
) -> Recipe | None:
    """The types of a GGUF file; None for other formats."""
    if format != "gguf":
        if quantization is not None or head is not None:
            raise WkvError(f"quantization is for format 'gguf', not for {format!r}")
        return None
    if dtype is not None and quantization is not None:
        raise WkvError(f"give dtype or quantization, not both (found {dtype} and {quantization})")
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return recipe(quantization, head, dtype or own)


def _save_tensors(model: LanguageModel, path: Path, format: str, dtype: torch.dtype | None, limit: int | None) -> None:
    tensors = _tensors(model, dtype)
    metadata = {"wkv": json.dumps(_description(model))} if format == "wkv" else {}
    if path.suffix == ".safetensors":
        _write_safetensors(path, tensors, metadata, limit)
        return
    with replacing([path]) as [temporary], open(temporary, "wb") as file:
        torch.save(tensors, file)


def _check_format(format: str, path: Path) -> None:
    known = ", ".join(_SUFFIXES)
    if format in _LATER:
        raise WkvError(f"format {format!r} is not available yet; one of {known}")
    if format not in _SUFFIXES:
        raise WkvError(f"format {format!r} is unknown; one of {known}")
    if path.suffix not in _SUFFIXES[format]:
        raise WkvError(f"{path}: a file of format {format!r} ends in {' or '.join(_SUFFIXES[format])}")
    if path.is_dir():
        raise WkvError(f"{path}: is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise WkvError(f"{path}: the folder {path.parent} does not exist")


def _shard_limit(size: int | str | None, path: Path) -> int | None:
    if size is None:
        return None
    if path.suffix != ".safetensors":
        raise WkvError(f"{path}: only .safetensors files can be split into shards")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)?\s*", str(size))
    limit = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if limit < 1:
        raise WkvError(f"max_shard_size must be a number of bytes or text such as '2GB', found {size!r}")
    return limit


def _plain(model: LanguageModel) -> LanguageModel:
    """The model in floating point: other programs do not know our quantised weights."""
    from wkv.quantization.model import dequantize_model, is_quantized

    return dequantize_model(model) if is_quantized(model) else model


def _description(model: LanguageModel) -> dict[str, Any]:
    from wkv import __version__
    from wkv.quantization.files import describe

    tokenizer = model.tokenizer.to_dict() if model.tokenizer is not None else None
    text = {"model": model.name, "config": model.config.to_dict(), "tokenizer": tokenizer, "version": __version__}
    quantized = describe(model)
    return {**text, "quantization": quantized} if quantized else text


def _check_model(model: LanguageModel) -> None:
    from wkv.quantization.frozen import is_frozen

    if not isinstance(model, LanguageModel):
        raise WkvError(f"save_model takes a model of this library, found {type(model).__name__}")
    unmerged = next((adapter for adapter in model.adapters.values() if not adapter.is_merged), None)
    if unmerged is not None:
        raise WkvError(
            f"the model carries the adapter {unmerged.name!r}: merge it into the model, remove it, or save the adapter "
            "alone with its own method save"
        )
    if is_frozen(model):
        raise WkvError("the model's base is frozen in blocks: save the adapter alone, or thaw(model)")


def _tensors(model: LanguageModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory with each other, under their official names."""
    from wkv.quantization.files import stored_tensors

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    tuned = {} if model.tuned_state is None else tuned_tensors(model.tuned_state, own_slots(model))
    for key, value in {**stored_tensors(model), **tuned}.items():
        if value.is_meta:
            raise WkvError(f"{key} has no values (it is on the meta device); load or initialise the model first")
        kept = key.endswith(".weight.scale") or not value.is_floating_point()
        tensor = value.detach().to("cpu", None if kept else dtype).contiguous()
        # torch.save writes whole storages, safetensors refuses shared ones.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], limit: int | None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = _shards(tensors, limit)
    names = [path.name]
    if len(shards) > 1:
        names = [f"{path.stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    index = [f"{path.name}.index.json"] if len(shards) > 1 else []
    with replacing([path.with_name(name) for name in names + index]) as temporaries:
        try:
            for temporary, keys in zip(temporaries, shards, strict=False):
                save_file({key: tensors[key] for key in keys}, temporary, metadata)
        except SafetensorError as error:
            raise WkvError(f"{path}: could not be written ({error})") from error
        if index:
            places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            size = sum(tensor.nbytes for tensor in tensors.values())
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1)
            temporaries[-1].write_text(text, encoding="utf-8")


def _shards(tensors: dict[str, Tensor], limit: int | None) -> list[list[str]]:
    """Keys of each shard: filled in order, none above `limit` bytes unless one tensor alone is."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards
