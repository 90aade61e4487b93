"""What a source holds, whatever its format: names, shapes and types first, values only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wkv.errors import CheckpointError

Shape = tuple[int, ...]

# The types a model can compute in. Anything else (integers, fp8) is reported, never converted.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The kind of a tensor that is made up because the file leaves it out.
NOT_STORED = "not stored"


@dataclass(frozen=True)
class Stored:
    """One tensor of a source.

    Args:
        shape: its shape as `read` returns it.
        dtype: its type as `read` returns it; None if it is not one of `FLOATS`.
        kind: how the values are stored, for people: "bfloat16", "Q5_1", "int64".
        origin: the file it is in.
        read: fetches the values; the tensor may share memory with the source.
    """

    shape: Shape
    dtype: torch.dtype | None
    kind: str
    origin: str
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of the values as `read` returns them; 0 if they have no type of `FLOATS`."""
        return 0 if self.dtype is None else self.numel * self.dtype.itemsize

    def then(self, function: Callable[[Tensor], Tensor], shape: Shape | None = None) -> Stored:
        """The tensor after `function`, which is called when the values are read; `shape` if it changes."""
        return Stored(shape or self.shape, self.dtype, self.kind, self.origin, lambda: function(self.read()))


@dataclass
class Archive:
    """Everything a source holds.

    Args:
        label: what error messages call the source.
        format: "safetensors", "pth", "gguf", "rwkv.cpp" or "state dict".
        tensors: key -> tensor, keys as stored.
        extras: keys whose values are not tensors -> the name of their type.
        metadata: text the file carries beside the tensors.
        file_bytes: size of all files (of all tensors, for a state dict).
        notes: remarks for `inspect`.
    """

    label: str
    format: str
    tensors: dict[str, Stored]
    extras: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def error(self, message: str) -> CheckpointError:
        """An error about this source."""
        return CheckpointError(f"{self.label}: {message}")


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def printable(key: str) -> str:
    """A key for an error message of one line: control characters escaped, very long keys cut."""
    text = key if key.isprintable() else repr(key)
    return text if len(text) <= 120 else f"{text[:117]}..."


def listing(items: Iterable[str], limit: int = 4) -> str:
    """ "a, b, c, d and 12 more"."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def from_mapping(content: Mapping[Any, Any], label: str, format: str) -> Archive:
    """An archive of the tensors of a dictionary; their memory is shared until they are read and copied.

    Raises:
        CheckpointError: if a key is not text, or a tensor is sparse, quantised or without data.
    """
    archive = Archive(label, format, {})
    for key, value in content.items():
        if not isinstance(key, str):
            raise archive.error(f"key {key!r} is {type(key).__name__}, expected text such as emb.weight")
        if not isinstance(value, Tensor):
            archive.extras[key] = type(value).__name__
            continue
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = "without data (meta)" if value.is_meta else "sparse or quantised"
            raise archive.error(f"{printable(key)} is a tensor {what}, expected a dense one")
        dtype = value.dtype if value.dtype in FLOATS else None
        read = value.detach
        archive.tensors[key] = Stored(tuple(value.shape), dtype, type_name(value.dtype), label, read)
    archive.file_bytes = sum(t.numel() * t.element_size() for t in content.values() if isinstance(t, Tensor))
    return archive


def merge(archives: Sequence[Archive], label: str) -> Archive:
    """One archive of all shards.

    Raises:
        CheckpointError: if two shards hold the same key, or describe different models.
    """
    if len(archives) == 1:
        return archives[0]
    merged = Archive(label, " + ".join(dict.fromkeys(part.format for part in archives)), {})
    for part in archives:
        for key, stored in part.tensors.items():
            if key in merged.tensors:
                both = f"{merged.tensors[key].origin} and {stored.origin}"
                raise merged.error(
                    f"{printable(key)} is in {both}; pass one checkpoint, or only the shards that belong together"
                )
            merged.tensors[key] = stored
        if len({archive.metadata["wkv"] for archive in (part, merged) if "wkv" in archive.metadata}) > 1:
            raise merged.error(f"the metadata of {part.label} differs from that of the other shards")
        merged.metadata.update(part.metadata)
        merged.extras.update(part.extras)
        merged.notes.extend(part.notes)
        merged.file_bytes += part.file_bytes
    return merged
