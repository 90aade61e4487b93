"""Which files a source stands for, and what format each of them has. Formats are told by content, never by suffix."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wkv import starter
from wkv.checkpoints.archive import Archive, from_mapping, listing, merge
from wkv.checkpoints.torch_file import open_torch, unwrap
from wkv.errors import CheckpointError

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".gguf", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
ACCEPTED = ".safetensors, .pth, .gguf, a folder of shards, or an rwkv.cpp .bin"
_SHARD = re.compile(r"^(?P<name>.*)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})(?P<suffix>\.\w+)$")

# First bytes of files that are not checkpoints we read -> what they are and what to do.
_FOREIGN_FILES = {
    b"lmgg": "a ggml file of llama.cpp's early days, not an RWKV checkpoint",
    b"tjgg": "a ggjt file of llama.cpp's early days, not an RWKV checkpoint",
    b"version https://git-lfs": "a git-lfs pointer, not the checkpoint itself; fetch it with `git lfs pull`",
    b"<": "a web page or XML, not a checkpoint; was the download refused?",
    b"{": "JSON text, not a checkpoint; pass the folder it is in or a weights file",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x80": "a pickle, or the file format of PyTorch before 1.6, which wkv does not open; load it with "
             "torch.load(..., weights_only=True) where it comes from and save it again",
}  # fmt: skip


def open_archive(source: Source) -> Archive:
    """Everything `source` holds: a file, a folder, a list of shard files, or a state dict.

    Raises:
        CheckpointError: if nothing is there, or it is not a checkpoint that can be read.
    """
    if isinstance(source, Mapping):
        content, notes = unwrap(source, "the state dict")
        archive = from_mapping(content, "the state dict", "state dict")
        archive.notes.extend(notes)
        return archive
    paths = _paths(source)
    label = str(source) if isinstance(source, str | os.PathLike) else listing([str(path) for path in paths], 1)
    archives = []
    for path in paths:
        try:
            archives.append(_open_file(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return merge(archives, label)


def locate(source: str | os.PathLike[str]) -> Path:
    """The path that `source` stands for: the text "starter" is the name of the model in the package, the rest paths.

    Raises:
        CheckpointError: if a file or folder "starter" in the current folder could be meant as well.
    """
    if source != starter.NAME:
        return Path(source)
    if os.path.lexists(source):
        raise CheckpointError(
            f"{source!r} is the model that comes with wkv, and also a file or folder in the current folder; "
            f'pass "./{source}" for that one, wkv.starter.path() or {str(starter.path())!r} for the model of wkv'
        )
    return starter.path()


def _paths(source: Any) -> list[Path]:
    if isinstance(source, str | os.PathLike):
        path = locate(source)
        if not str(source):
            raise CheckpointError("the path of the checkpoint is empty")
        if path.is_dir():
            return _complete(_files_of_folder(path))
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: neither a file nor a folder")
        return _files_of_index(path) if path.name.endswith(".index.json") else _complete([path])
    if not isinstance(source, Sequence) or not all(isinstance(item, str | os.PathLike) for item in source):
        raise CheckpointError(f"a checkpoint is {ACCEPTED} or a state dict; found {type(source).__name__}")
    if not source:
        raise CheckpointError("the list of shards is empty")
    paths = [Path(item) for item in source]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
    return _complete(paths)


def _files_of_folder(folder: Path) -> list[Path]:
    """The index's shards, else numbered shards, else all files of the first suffix that occurs."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: holds several indices, {listing(p.name for p in indices)}; pass one of them")
    if indices:
        return _files_of_index(indices[0])
    for suffix in SUFFIXES:
        files = sorted(path for path in folder.iterdir() if path.suffix == suffix and path.is_file())
        if files:
            return [path for path in files if _SHARD.match(path.name)] or files
    raise CheckpointError(f"{folder}: a folder without weights; expected files ending in {', '.join(SUFFIXES)}")


def _files_of_index(index: Path) -> list[Path]:
    """The files an index names; they must be beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index}: not an index of shards, which needs an object 'weight_map'") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard {name!r}, expected a file name in the same folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name}, which is not there")
    if not names:
        raise CheckpointError(f"{index}: names no shards")
    return [index.parent / name for name in names]


def _complete(paths: list[Path]) -> list[Path]:
    """`paths`, if numbered shards among them are all there and of one checkpoint."""
    matches = [match for path in paths if (match := _SHARD.match(path.name))]
    families = {(m["name"], m["total"], m["suffix"]) for m in matches}
    if len(families) > 1:
        names = listing(sorted(f"{name}-*-of-{total}{suffix}" for name, total, suffix in families))
        raise CheckpointError(f"{paths[0].parent}: shards of several checkpoints, {names}; pass the files of one")
    found = {int(match["number"]) for match in matches}
    for match in matches[:1]:
        missing = next((n for n in range(1, int(match["total"]) + 1) if n not in found), None)
        if missing is not None:
            name = f"{match['name']}-{missing:0{len(match['number'])}d}-of-{match['total']}{match['suffix']}"
            raise CheckpointError(f"{paths[0]}: one of {match['total']} shards, {name} is missing; pass them all")
    return paths


def _open_file(path: Path) -> Archive:
    # Imported when a file asks for them: one format is used, and each has its own tables and libraries.
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start.startswith(b"PK\x03\x04"):
        return open_torch(path)
    if start.startswith(b"GGUF"):
        from wkv.checkpoints.gguf import open_gguf

        return open_gguf(path)
    if start.startswith(b"fmgg"):
        from wkv.checkpoints.rwkv_cpp import open_rwkv_cpp

        return open_rwkv_cpp(path)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[5:8] == b"\0\0\0"):
        from wkv.checkpoints.safetensors_file import open_safetensors

        return open_safetensors(path)
    for magic, what in _FOREIGN_FILES.items():
        if start.lstrip().startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    raise CheckpointError(f"{path}: not a checkpoint (it starts with {start[:8]!r}); expected {ACCEPTED}")
