"""Reading GGUF files of RWKV-6 and RWKV-7, as llama.cpp's converter and quantizer or `save_model` write them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, Stored, listing, printable, type_name
from wkv.checkpoints.gguf_file import GGUFFile, Value, shown
from wkv.checkpoints.gguf_names import FILE_TYPES, FRAME, LAYER, OLD_LAYER, SIZES, UNUSED, Name
from wkv.checkpoints.gguf_vocabulary import read_vocabulary
from wkv.quantization.ggml_blocks import dequantize

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RELATIVES = {
    "arwkv7": "ARWKV-7 (RWKV-7 attention in a Qwen2 body)",
    "rwkv6qwen2": "RWKV-6 attention in a Qwen2 body",
}
_MAX_LAYERS = 10_000


def open_gguf(path: Path) -> Archive:
    """The tensors of a GGUF file under their official names; values are decoded when asked for.

    Raises:
        CheckpointError: if the file is truncated, damaged, of another architecture or inconsistent.
    """
    file = GGUFFile(path)
    arch = _architecture(file)
    head_size = _integer(file, f"{arch}.wkv.head_size")
    tensors = dict(_translated(file, arch, head_size))
    archive = Archive(str(path), "gguf", tensors, file_bytes=file.num_bytes, notes=_notes(file))
    _check_sizes(file, arch, archive)
    rows = tensors["emb.weight"].shape[0] if "emb.weight" in tensors else 0
    tokenizer, note = read_vocabulary(file, rows)
    archive.notes.extend(note)
    archive.metadata["gguf"] = json.dumps({"fields": _fields(file, arch, tensors), "tokenizer": tokenizer})
    return archive


def _architecture(file: GGUFFile) -> str:
    arch = file.metadata.get("general.architecture", Value("str", None)).value
    if not isinstance(arch, str):
        raise file.error("a GGUF file of no architecture (general.architecture)")
    if arch not in LAYER:
        what = _RELATIVES.get(arch, f"architecture {printable(arch)!r}")
        raise file.error(f"a GGUF file of {what}, expected one of {', '.join(LAYER)}")
    if _integer(file, "split.count", 1) != 1:
        raise file.error("one part of a split GGUF file; join the parts first (llama-gguf-split --merge)")
    return arch


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A metadata value that must be a whole number."""
    found = file.metadata.get(key)
    if found is None:
        if default is None:
            raise file.error(f"its metadata have no {key}")
        return default
    if found.type not in ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64") or not 0 <= found.value < 2**31:
        raise file.error(f"its metadata say {key} = {shown(found)}, expected a whole number (u32)")
    return int(found.value)


def _names(arch: str, num_layers: int) -> dict[str, tuple[str, Name]]:
    """Full GGUF name -> (prefix of the official names, entry of the table)."""
    names = {name.gguf: ("", name) for name in FRAME}
    for layer in range(num_layers):
        for name in (*LAYER[arch], *OLD_LAYER[arch]):
            names[f"blk.{layer}.{name.gguf}"] = (f"blocks.{layer}.", name)
    return names


def _translated(file: GGUFFile, arch: str, head_size: int) -> Iterator[tuple[str, Stored]]:
    num_layers = _integer(file, f"{arch}.block_count")
    if not 1 <= num_layers <= min(_MAX_LAYERS, len(file.tensors)):
        raise file.error(f"its metadata say {arch}.block_count = {num_layers}, but it has {len(file.tensors)} tensors")
    found = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if found < num_layers:
        raise file.error(f"its metadata say {arch}.block_count = {num_layers}, but it has tensors of {found} blocks")
    names = _names(arch, num_layers)
    unexpected = [printable(name) for name in file.tensors if name not in names]
    if unexpected:
        raise file.error(f"unexpected {listing(unexpected)}; {arch}.block_count is {num_layers}")
    rescale = _integer(file, f"{arch}.rescale_every_n_layers", 0)
    for gguf in file.tensors:
        if gguf in UNUSED[arch]:
            continue
        prefix, name = names[gguf]
        stored = _stored(file, gguf)
        if rescale and name.gguf in ("time_mix_output.weight", "channel_mix_value.weight"):
            stored = _rescaled(stored, int(prefix.split(".")[1]) // rescale)
        yield from _official(file, gguf, stored, prefix, name, head_size)


def _stored(file: GGUFFile, gguf: str) -> Stored:
    info = file.tensors[gguf]
    dtype = _PLAIN.get(info.kind, torch.float32)
    kind = type_name(dtype) if info.kind in _PLAIN else info.kind

    def read() -> Tensor:
        raw = file.raw(gguf)
        if info.kind in _PLAIN:
            return torch.from_numpy(raw.copy()).view(dtype).reshape(info.shape)
        values: Any = dequantize(info.kind, raw)
        return torch.from_numpy(values).reshape(info.shape)

    return Stored(info.shape, dtype, kind, str(file.path), read)


def _rescaled(stored: Stored, doublings: int) -> Stored:
    """Some RWKV-6 files keep matrices divided by 2 for every so many layers, against overflow in half precision."""
    return stored.then(lambda x: x.float() * 2.0**doublings) if doublings else stored


def _official(
    file: GGUFFile, gguf: str, stored: Stored, prefix: str, name: Name, head_size: int
) -> Iterator[tuple[str, Stored]]:
    """The official tensors that one tensor of the file stands for."""
    keys, shape = [prefix + key for key in name.official], stored.shape
    if name.form == "stack":
        if shape[0] != len(keys) or stored.numel != len(keys) * shape[-1]:
            raise file.error(f"{gguf} has shape {list(shape)}, expected [{len(keys)}, 1, 1, C]")
        for index, key in enumerate(keys):
            yield key, stored.then(functools.partial(_part, index=index), (1, 1, shape[-1]))
    elif name.form == "transposed":
        if len(shape) < 2:
            raise file.error(f"{gguf} has shape {list(shape)}, expected a matrix")
        yield keys[0], stored.then(lambda x: x.transpose(-1, -2), (*shape[:-2], shape[-1], shape[-2]))
    elif name.form == "heads":
        if head_size < 1 or stored.numel % head_size:
            raise file.error(f"{gguf} has shape {list(shape)}, which heads of {head_size} do not divide")
        heads = (stored.numel // head_size, head_size)
        yield keys[0], stored.then(lambda x: x.reshape(heads), heads)
    else:
        yield keys[0], stored


def _part(x: Tensor, index: int) -> Tensor:
    return x[index].reshape(1, 1, -1)


def _check_sizes(file: GGUFFile, arch: str, archive: Archive) -> None:
    """The metadata and the shapes must tell the same."""
    for required in ("embedding_length", "attention.layer_norm_epsilon"):
        if f"{arch}.{required}" not in file.metadata:
            raise file.error(f"its metadata have no {arch}.{required}")
    for key, (tensor, axis) in SIZES.items():
        if f"{arch}.{key}" not in file.metadata or tensor not in archive.tensors:
            continue
        said, shape = _integer(file, f"{arch}.{key}"), archive.tensors[tensor].shape
        if len(shape) > axis and shape[axis] != said:
            raise file.error(f"its metadata say {arch}.{key} = {said}, but {tensor} has shape {list(shape)}")


def _fields(file: GGUFFile, arch: str, tensors: dict[str, Stored]) -> dict[str, Any]:
    """Configuration that the shapes do not tell."""
    key = f"{arch}.attention.layer_norm_epsilon"
    eps = file.metadata[key]
    if eps.type not in ("f32", "f64") or not math.isfinite(eps.value) or eps.value <= 0:
        raise file.error(f"its metadata say {key} = {shown(eps)}, expected a small number")
    # 1e-5 rather than the 9.999999747e-06 that float32 makes of it.
    fields: dict[str, Any] = {"norm_eps": float(str(np.float32(eps.value)))}
    rank = _integer(file, f"{arch}.attention.value_residual_mix_lora_rank", 0)
    width = tensors["emb.weight"].shape[-1] if "emb.weight" in tensors else 0
    if arch == "rwkv7" and "blocks.1.att.v1" not in tensors and 1 <= rank <= width:
        fields["value_rank"] = rank
    return fields


def _notes(file: GGUFFile) -> list[str]:
    """What the metadata say for people."""
    facts = [f"GGUF version {file.version}"]
    name = file.metadata.get("general.name")
    if name is not None and name.type == "str":
        facts.append(f"name {printable(name.value)!r}")
    number = file.metadata.get("general.file_type")
    if number is not None and number.type == "u32":
        facts.append(f"file type {FILE_TYPES.get(number.value, number.value)}")
    return [", ".join(facts)]
