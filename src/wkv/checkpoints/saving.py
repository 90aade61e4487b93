"""`save_model`: our own one-file format, and the official layouts that other RWKV programs read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints.loading import parse_dtype
from wkv.errors import WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel

_SUFFIXES = {"wkv": (".safetensors",), "official": (".pth", ".pt", ".safetensors")}
_LATER = ("hf", "gguf")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_model(
    model: LanguageModel,
    path: str | os.PathLike[str],
    format: str = "wkv",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model to one file, or to shards. The files appear only when all of them are complete.

    Args:
        model: a model of this library.
        path: where to; `format="wkv"` writes .safetensors, `"official"` .pth or .safetensors by the suffix.
        format: "wkv" keeps the configuration and the tokenizer beside the weights; "official" has the names, shapes
            and nothing else, for other RWKV programs.
        dtype: type to convert to; the model's own by default.
        max_shard_size: bytes, or text such as "2GB": larger .safetensors files are split into numbered shards with
            an index `<name>.safetensors.index.json`.

    Raises:
        WkvError: for an unknown format or suffix, or if a file cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    _check_format(format, path)
    dtype, limit = parse_dtype(dtype), _shard_limit(max_shard_size, path)
    tensors = _tensors(model, dtype)
    metadata = {"wkv": json.dumps(_description(model))} if format == "wkv" else {}
    try:
        if path.suffix == ".safetensors":
            _write_safetensors(path, tensors, metadata, limit)
        else:
            with replacing([path]) as [temporary], open(temporary, "wb") as file:
                torch.save(tensors, file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, WkvError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WkvError(f"{path}: could not be written ({reason})") from error


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


def _description(model: LanguageModel) -> dict[str, Any]:
    from wkv import __version__

    tokenizer = model.tokenizer.to_dict() if model.tokenizer is not None else None
    return {"model": model.name, "config": model.config.to_dict(), "tokenizer": tokenizer, "version": __version__}


def _tensors(model: LanguageModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory with each other, under their official names."""
    if not isinstance(model, LanguageModel):
        raise WkvError(f"save_model takes a model of this library, found {type(model).__name__}")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in {**model.state_dict(), **_tuned_state(model)}.items():
        if value.is_meta:
            raise WkvError(f"{key} has no values (it is on the meta device); load or initialise the model first")
        tensor = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        # torch.save writes whole storages, safetensors refuses shared ones.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _tuned_state(model: LanguageModel) -> dict[str, Tensor]:
    """What `load_model` found as tuned initial state, under the names it came from."""
    state = model.tuned_state
    if state is None:
        return {}
    tensors = {}
    for layer, values in enumerate(state.layers):
        prefix = f"blocks.{layer}."
        if "wkv" in values:
            tensors[prefix + "att.time_state"] = values["wkv"][0]
        for slot, name in (("att_shift", "att.ts_state"), ("ffn_shift", "ffn.ts_state")):
            if any(bool(other[slot].any()) for other in state.layers):
                tensors[prefix + name] = values[slot][0]
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
