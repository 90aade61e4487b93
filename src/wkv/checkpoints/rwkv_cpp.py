"""Reading the .bin files of rwkv.cpp ("ggmf", versions 100 and 101) and undoing that format's transforms.

Layout, little endian: int32 magic, version, V, C, L, data type; then per tensor int32 dimension count, key length and
data type, int32 dimensions (fastest first, so reversed), the key, the values. Changes against the official names:
decays are stored as they enter the recurrence, the bonus of RWKV-5.0 as its exponential, low-rank factors transposed,
the six token-shift vectors of RWKV-7 in one tensor, vectors per head with a trailing 1.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, Stored, printable
from wkv.errors import CheckpointError
from wkv.quantization.ggml_blocks import BLOCK, BLOCK_TYPES, dequantize, num_bytes

_KINDS = {0: "float32", 1: "float16", 2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_VERSIONS = (100, 101)
_MAX_KEY, _MAX_DIMENSIONS = 256, 4

# Smallest stored decay and smallest distance of it from 1, where float32 has rounded to 0 or 1.
_TINY, _HALF_ULP = 1e-38, 2.0**-25
_TRANSPOSED_6 = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
_TRANSPOSED_7 = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")


def open_rwkv_cpp(path: Path) -> Archive:
    """The tensors of a .bin file under their official names; values are decoded when asked for.

    Raises:
        CheckpointError: if the file is cut, damaged, or of a version that cannot be read.
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data, path)
    _magic, version, vocab, hidden, layers, kind = reader.integers(6, "header")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path}: an rwkv.cpp file of version {version}, expected 100 or 101")
    if version == 100 and kind not in (0, 1):
        raise CheckpointError(f"{path}: quantised by rwkv.cpp before its block layout changed; quantise it again")
    raw: dict[str, Stored] = {}
    for key, stored in reader.tensors():
        if key in raw:
            raise CheckpointError(f"{path}: {printable(key)} occurs twice")
        raw[key] = stored
    tensors = dict(item for key, stored in raw.items() for item in _official(key, stored, _generation(raw)))
    archive = Archive(str(path), "rwkv.cpp", tensors, file_bytes=len(data))
    _check_header(archive, vocab, hidden, layers)
    return archive


class _Reader:
    """Walks through the file; every length is checked against what is left of it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, size: int, what: str) -> int:
        """Offset of the next `size` bytes."""
        start = self.offset
        if size > len(self.data) - start:
            left = len(self.data) - start
            raise CheckpointError(f"{self.path}: truncated or damaged: {what} needs {size} bytes, {left} are left")
        self.offset += size
        return start

    def integers(self, count: int, what: str) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}i", self.data, self.take(4 * count, what))

    def tensors(self) -> Iterator[tuple[str, Stored]]:
        while self.offset < len(self.data):
            place = f"the tensor at byte {self.offset}"
            dimensions, key_length, number = self.integers(3, place)
            if not 1 <= dimensions <= _MAX_DIMENSIONS or not 1 <= key_length <= _MAX_KEY:
                found = f"{dimensions} dimensions and a key of {key_length} bytes"
                raise CheckpointError(f"{self.path}: damaged: {place} claims {found}")
            shape = self.integers(dimensions, place)[::-1]
            start = self.take(key_length, place)
            key = self.data[start : start + key_length].decode("utf-8", "backslashreplace")
            yield key, self.tensor(printable(key), shape, number)

    def tensor(self, key: str, shape: tuple[int, ...], number: int) -> Stored:
        if number not in _KINDS:
            known = ", ".join(_KINDS.values())
            raise CheckpointError(f"{self.path}: {key} has data type {number}, expected one of {known}")
        kind = _KINDS[number]
        if min(shape) < 1:
            raise CheckpointError(f"{self.path}: {key} has shape {list(shape)}")
        numel = 1
        for size in shape:
            numel *= size
        if kind in BLOCK_TYPES and shape[-1] % BLOCK:
            raise CheckpointError(f"{self.path}: {key} is {kind} with rows of {shape[-1]}, not a multiple of {BLOCK}")
        size = num_bytes(kind, numel) if kind in BLOCK_TYPES else numel * np.dtype(kind).itemsize
        start = self.take(size, key)
        dtype = torch.float16 if kind == "float16" else torch.float32

        def read() -> Tensor:
            values = self.data[start : start + size]
            array = dequantize(kind, values) if kind in BLOCK_TYPES else np.frombuffer(values, kind).copy()
            return torch.from_numpy(array).reshape(shape)

        return Stored(shape, dtype, kind, str(self.path), read)


def _check_header(archive: Archive, vocab: int, hidden: int, layers: int) -> None:
    for key in ("emb.weight", "head.weight"):
        if key in archive.tensors and archive.tensors[key].shape != (vocab, hidden):
            shape = list(archive.tensors[key].shape)
            raise archive.error(f"{key} is {shape}, but the header says [{vocab}, {hidden}]")
    found = {key.split(".")[1] for key in archive.tensors if key.startswith("blocks.")}
    if len(found) != layers:
        raise archive.error(f"tensors of {len(found)} layers, but the header says {layers}")


def _generation(keys: dict[str, Stored]) -> int:
    names = {key.rpartition("att.")[2] for key in keys}
    if "r_k" in names:
        return 7
    if any(name.startswith("time_maa") for name in names):
        return 6
    return 5 if any(name.startswith("ln_x") for name in names) else 4


def _official(key: str, stored: Stored, generation: int) -> Iterator[tuple[str, Stored]]:
    """The official tensors that one tensor of the file stands for."""
    prefix, _, name = key.rpartition("att.")
    name = name if prefix else ""
    if generation == 7 and name == "x_rwkvag":
        yield from _split(key, stored)
    elif (generation == 7 and name in _TRANSPOSED_7) or (generation == 6 and name in _TRANSPOSED_6):
        shape = (*stored.shape[:-2], *stored.shape[:-3:-1])
        yield key, stored.then(lambda x: x.transpose(-1, -2), shape)
    elif generation in (4, 5) and name == "time_decay":
        yield key, stored.then(_decay(stored.origin, key, generation))
    elif generation == 5 and name == "time_first":
        yield key, stored.then(_checked_log(stored.origin, key))
    elif generation == 6 and name == "time_decay":
        yield key, stored.then(lambda x: x.reshape(1, 1, -1), (1, 1, stored.numel))
    else:
        yield key, stored


def _split(key: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    if stored.shape[0] != 6 or stored.numel != 6 * stored.shape[-1]:
        raise CheckpointError(f"{stored.origin}: {key} has shape {list(stored.shape)}, expected [6, 1, C]")
    for index, letter in enumerate("rwkvag"):
        part = stored.then(lambda x, i=index: x[i].reshape(1, 1, -1), (1, 1, stored.shape[-1]))  # type: ignore[misc]
        yield key.replace("x_rwkvag", f"x_{letter}"), part


def _decay(origin: str, key: str, generation: int) -> Callable[[Tensor], Tensor]:
    """Official time_decay from -exp(time_decay) (RWKV-4) or exp(-exp(time_decay)) (RWKV-5)."""

    def undo(x: Tensor) -> Tensor:
        x = x.double()
        inside = (x <= 0) if generation == 4 else (x >= 0) & (x <= 1)
        if not inside.all():
            expected = "negative values" if generation == 4 else "values between 0 and 1"
            raise CheckpointError(f"{origin}: {key} holds {x[~inside][0].item():.3g}, expected {expected}")
        rate = -x if generation == 4 else -x.clamp(min=_TINY).log()
        return rate.clamp(min=_TINY if generation == 4 else _HALF_ULP).log().float()

    return undo


def _checked_log(origin: str, key: str) -> Callable[[Tensor], Tensor]:
    def undo(x: Tensor) -> Tensor:
        if not (x > 0).all():
            raise CheckpointError(f"{origin}: {key} holds values that are not positive, expected exp(time_first)")
        return x.double().log().float()

    return undo
