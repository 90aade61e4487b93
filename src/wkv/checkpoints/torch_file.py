"""Reading .pth files: `torch.load` restricted to tensors, memory-mapped, after the zip archive itself was checked."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, from_mapping, listing, printable
from wkv.errors import CheckpointError

_MODEL_KEY = re.compile(r"(^|\.)(emb\.weight$|blocks\.\d+\.)")
_FORBIDDEN = re.compile(r"(?:GLOBAL|class|global) ([\w.]+)")


def open_torch(path: Path) -> Archive:
    """The tensors of a .pth file, memory-mapped; nothing but tensors and plain containers is ever unpickled.

    Raises:
        CheckpointError: if the archive is damaged, holds code, or holds no model.
    """
    _check_zip(path)
    content, notes = unwrap(_load(path), str(path))
    archive = from_mapping(content, str(path), "pth")
    _check_sizes(content, archive, path.stat().st_size)
    archive.file_bytes = path.stat().st_size
    archive.notes.extend(notes)
    return archive


def _check_zip(path: Path) -> None:
    """Raise unless the zip archive is complete, uncompressed, and its pickle is undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickles = [member for member in members if member.filename.endswith("/data.pkl")]
            compressed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise CheckpointError(f"{path}: a compiled model (TorchScript), not a checkpoint")
            if len(pickles) != 1 or compressed:
                raise CheckpointError(f"{path}: a zip archive, but not one written by torch.save")
            if pickles[0].CRC:  # torch can be told to write no checksums
                archive.read(pickles[0])
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, EOFError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: a truncated or damaged .pth file ({error})") from error


def _load(path: Path) -> Any:
    name = str(path)  # mmap takes no Path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read raises anyway
            return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        if found is None:
            raise CheckpointError(f"{path}: a damaged .pth file, its pickle cannot be read") from error
        raise CheckpointError(
            f"{path}: holds Python objects ({found[1]}), not only tensors. wkv runs no code from checkpoints: "
            "save a plain dictionary of tensors where the file comes from"
        ) from error
    except Exception as error:  # a damaged pickle can end in any error
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition("  (Could")[0][:200]
        raise CheckpointError(f"{path}: a damaged .pth file ({reason})") from error


def _check_sizes(content: Mapping[Any, Any], archive: Archive, file_bytes: int) -> None:
    """Strides of zero make huge tensors of small files: no file may grow when it is read, but for tied weights."""
    for key, value in content.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            shape = list(value.shape)
            raise archive.error(f"{printable(key)} has shape {shape}, more values than the file stores for it")
    if archive.file_bytes > 2 * file_bytes:
        total = f"{archive.file_bytes:,} bytes of tensors in a file of {file_bytes:,}"
        raise archive.error(f"{total}: its tensors share memory, which no RWKV checkpoint does")


def unwrap(content: Any, label: str) -> tuple[Mapping[Any, Any], list[str]]:
    """The state dict inside wrappers such as {"model": state_dict, "epoch": 3}, and a note on where it was.

    Raises:
        CheckpointError: if there is none, or more than one.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{label}: holds {type(content).__name__}, expected a dictionary of tensors")
    found = [] if _is_state_dict(content) else list(_state_dicts(content, ()))
    if len(found) > 1:
        places = listing(f"'{place}'" for place, _ in found)
        raise CheckpointError(f"{label}: holds several models, at {places}; pass one of them as a state dict")
    if not found and any(isinstance(value, Tensor) for value in content.values()):
        return content, []
    if not found:
        keys = listing(printable(str(key)) for key in content) or "nothing"
        raise CheckpointError(f"{label}: no tensors of an RWKV model in it (found {keys})")
    place, inner = found[0]
    return inner, [f"the weights are inside its entry '{place}'"]


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and _MODEL_KEY.search(key) for key in content)


def _state_dicts(content: Mapping[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, value in content.items():
        if not isinstance(value, Mapping):
            continue
        here = (*place, str(name))
        if _is_state_dict(value):
            yield ".".join(here), value
        elif len(here) < 3:
            yield from _state_dicts(value, here)
