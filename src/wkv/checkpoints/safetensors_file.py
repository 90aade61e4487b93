"""Reading .safetensors files through the `safetensors` package, which checks the header against the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wkv.checkpoints.archive import Archive, Stored, type_name
from wkv.errors import CheckpointError

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_safetensors(path: Path) -> Archive:
    """The names, shapes and types of a .safetensors file; values are read from the map when asked for.

    Raises:
        CheckpointError: if the header is damaged or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".st":
        what = "the .st layout of web-rwkv, which changes names and transposes matrices"
        raise CheckpointError(f"{path}: {what}; wkv cannot read it yet, load the official .pth it was made from")
    try:
        file = safe_open(path, framework="pt")
        tensors = {key: _stored(file, key, path) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(file.metadata() or {})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    if not tensors:
        raise CheckpointError(f"{path}: a safetensors file without tensors")
    return Archive(str(path), "safetensors", tensors, metadata=metadata, file_bytes=path.stat().st_size)


def _stored(file: Any, key: str, path: Path) -> Stored:
    part = file.get_slice(key)
    name = str(part.get_dtype())
    dtype = _TYPES.get(name)
    kind = type_name(dtype) if dtype is not None else name
    return Stored(tuple(part.get_shape()), dtype, kind, str(path), lambda: file.get_tensor(key))
