"""Adapters in files: one safetensors file with the adapter's tensors, samples of its base, and a JSON header.

The header's entry `wkv_adapter` has `method`, `options`, `model` (the registered name), `config` (the base's sizes) and
`version`. Tensors of the adapter have keys such as "blocks.0.att.key.B"; samples of the base begin with "base:".
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing

ENTRY, BASE = "wkv_adapter", "base:"
_FIELDS = {"method": str, "options": dict, "model": str, "config": dict}


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Args:
        method: canonical name of the method.
        options: it was created with.
        model: registered name of the base model.
        config: the base's sizes.
        tensors: the adapter's.
        base: samples of the base's weights, see `wkv.tuning.fingerprint`.
    """

    method: str
    options: dict[str, Any]
    model: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base: dict[str, Tensor]


def write_adapter(path: str | os.PathLike[str], file: AdapterFile) -> None:
    """Write an adapter file; it appears only when it is complete.

    Raises:
        CheckpointError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from wkv import __version__

    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: an adapter file ends in .safetensors")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {path.parent}")
    header = {"method": file.method, "options": file.options, "model": file.model, "config": file.config}
    tensors = {**file.tensors, **{BASE + name: value for name, value in file.base.items()}}
    own = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    text = json.dumps({**header, "version": __version__})
    try:
        with replacing([path]) as [temporary]:
            save_file(own, temporary, {ENTRY: text})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read a file written by `write_adapter`.

    Raises:
        CheckpointError: if it is missing, truncated, or no adapter file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not an adapter file, or a truncated one ({error})") from error
    if ENTRY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file that is no adapter of this library; wkv.tuning.import_adapter reads those of "
            "peft and RWKV-PEFT"
        )
    header = _header(path, metadata[ENTRY])
    own = {key: value for key, value in tensors.items() if not key.startswith(BASE)}
    base = {key.removeprefix(BASE): value for key, value in tensors.items() if key.startswith(BASE)}
    return AdapterFile(header["method"], header["options"], header["model"], header["config"], own, base)


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether `read_adapter` would read it."""
    try:
        read_adapter(path)
    except CheckpointError:
        return False
    return True


def _header(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        wrong = [key for key, kind in _FIELDS.items() if not isinstance(header[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error})") from error
    if wrong:
        raise CheckpointError(f"{path}: its header is damaged ({wrong[0]} is {type(header[wrong[0]]).__name__})")
    found: dict[str, Any] = header
    return found


def read_peft_config(path: Path) -> dict[str, Any]:
    """An `adapter_config.json` of peft.

    Raises:
        CheckpointError: if it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor], what: str) -> None:
    """Give `target`'s tensors the values of `source`'s.

    Raises:
        WkvError: if names or shapes differ.
    """
    missing, unknown = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    if missing or unknown:
        name = (missing or unknown)[0]
        raise WkvError(f"{what} {'lacks' if missing else 'has the unknown tensor'} {name}; it is for another model")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            shapes = f"{list(source[name].shape)}, expected {list(tensor.shape)}"
            raise WkvError(f"{what}: {name} has shape {shapes}; it is for another model or rank")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
