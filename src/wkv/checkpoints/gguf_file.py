"""The GGUF container (versions 2 and 3, little endian): metadata, tensor descriptions, aligned data.

Layout: magic "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries; the entries (key, u32 type,
value); the descriptions (name, u32 number of dimensions, u64 dimensions fastest first, u32 type, u64 offset); padding;
the data, every tensor padded to the alignment. A string is a u64 length and UTF-8.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wkv.checkpoints.archive import printable
from wkv.errors import CheckpointError
from wkv.quantization.ggml_blocks import BLOCK_TYPES, num_bytes

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

# Numbers of tensor types. Those that are no key of BLOCK_TYPES cannot be read; they are here to be named.
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
    6: ("f32", "f"), 7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_NUMBERS = {name: number for number, (name, _) in _SCALARS.items()} | {"str": _STRING}
_NUMBER_OF_TYPE = {name: number for number, name in TENSOR_TYPES.items()}

# More than any real file has; keeps a damaged count from filling the memory.
_MAX_ENTRIES, _MAX_STRINGS, _MAX_TENSORS, _MAX_KEY, _MAX_NAME, _MAX_DIMENSIONS = 2**16, 2**22, 2**20, 2**16, 256, 4
_MAX_ALIGNMENT = 2**20


class Value(NamedTuple):
    """A metadata value: `type` is "u32", "f32", "str", ... or the type of an array's elements with "[]"."""

    type: str
    value: Any


class TensorInfo(NamedTuple):
    """Where a tensor is: its name, its shape in PyTorch's order, its type, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


class GGUFFile:
    """A GGUF file mapped into memory.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is truncated or damaged, or has tensors of a type that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise self.error("the file is empty")
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        reader = _Reader(self._data, path)
        self.version, num_tensors, num_entries = reader.header()
        for _ in range(num_entries):
            key, value = reader.entry()
            if key in self.metadata:
                raise self.error(f"the metadata key {printable(key)} occurs twice")
            self.metadata[key] = value
        described = [reader.description() for _ in range(num_tensors)]
        self._locate(described, reader.offset)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self._data)

    def error(self, message: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"{self.path}: {message}")

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, read-only, in the map: nothing is read before it is looked at."""
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.size, info.start)

    def _locate(self, described: Sequence[tuple[TensorInfo, int]], end: int) -> None:
        """Check that every tensor lies within the data area, aligned, apart from the others."""
        alignment = self._alignment()
        start = -(-end // alignment) * alignment
        for info, offset in described:
            name, place = printable(info.name), start + offset
            if info.name in self.tensors:
                raise self.error(f"the tensor {name} occurs twice")
            if offset % alignment:
                raise self.error(f"damaged: {name} begins at {offset}, which is no multiple of {alignment}")
            if place + info.size > len(self._data):
                left = max(0, len(self._data) - place)
                raise self.error(f"truncated or damaged: {name} needs {info.size} bytes, {left} are left")
            self.tensors[info.name] = info._replace(start=place)
        ordered = sorted(self.tensors.values(), key=lambda info: info.start)
        for before, after in itertools.pairwise(ordered):
            if before.start + before.size > after.start:
                raise self.error(f"damaged: {printable(before.name)} and {printable(after.name)} overlap")

    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment", Value("u32", ALIGNMENT))
        if found.type != "u32" or not 1 <= found.value <= _MAX_ALIGNMENT or found.value & (found.value - 1):
            raise self.error(f"damaged: general.alignment is {shown(found)}, expected a power of two")
        return int(found.value)


def shown(value: Value) -> str:
    """A metadata value for an error message, short."""
    return printable(str(value.value)) if value.type[-2:] != "[]" else f"an array of {value.type[:-2]}"


class _Reader:
    """Walks through the file; every length is checked against what is left of it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, size: int, what: str) -> int:
        """Offset of the next `size` bytes."""
        start = self.offset
        if size > len(self.data) - start:
            left = len(self.data) - start
            raise self.error(f"truncated or damaged: {what} needs {size} bytes, {left} are left")
        self.offset += size
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, limit: int, least: int, what: str) -> int:
        """A u64 that says how many things of at least `least` bytes follow."""
        found = int(self.number("Q", what))
        if found > limit or found * least > len(self.data) - self.offset:
            raise self.error(f"truncated or damaged: it claims {found} {what}, more than it holds")
        return found

    def string(self, limit: int, what: str) -> str:
        size = self.number("Q", what)
        if size > limit:
            raise self.error(f"damaged: {what} claims a length of {size} bytes")
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"damaged: {what} is not UTF-8 text") from error

    def header(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata entries."""
        start = self.take(4, "the header")
        if self.data[start : start + 4] != MAGIC:
            raise self.error(f"not a GGUF file: it starts with {self.data[start : start + 4]!r}")
        version = self.number("I", "the header")
        if version not in (2, 3):
            swapped = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
            raise self.error(f"a GGUF file of version {version}{swapped}, expected 2 or 3, little endian")
        tensors = self.count(_MAX_TENSORS, 24, "tensors")
        return version, tensors, self.count(_MAX_ENTRIES, 13, "metadata entries")

    def entry(self) -> tuple[str, Value]:
        """The next metadata entry."""
        key = self.string(_MAX_KEY, f"the metadata key at byte {self.offset}")
        what = f"the metadata value {printable(key)}"
        number = self.number("I", what)
        if number in _SCALARS:
            name, code = _SCALARS[number]
            return key, Value(name, self.number("B", what) != 0 if name == "bool" else self.number(code, what))
        if number == _STRING:
            return key, Value("str", self.string(len(self.data), what))
        if number == _ARRAY:
            return key, self.array(what)
        raise self.error(f"damaged: {what} has the unknown type {number}")

    def array(self, what: str) -> Value:
        """Strings as a list, numbers as a numpy array. Arrays of arrays are refused, as llama.cpp does."""
        number = self.number("I", what)
        if number == _STRING:
            count = self.count(_MAX_STRINGS, 8, f"strings in {what}")
            return Value("str[]", [self.string(len(self.data), what) for _ in range(count)])
        if number not in _SCALARS:
            kind = "arrays" if number == _ARRAY else f"the unknown type {number}"
            raise self.error(f"damaged: {what} is an array of {kind}")
        name, code = _SCALARS[number]
        layout = np.dtype(f"<{code}" if code != "?" else "u1")
        count = self.count(len(self.data), layout.itemsize, f"values in {what}")
        start = self.take(count * layout.itemsize, what)
        return Value(f"{name}[]", np.frombuffer(self.data, layout, count, start).copy())

    def description(self) -> tuple[TensorInfo, int]:
        """The next tensor, and its offset from the start of the data area."""
        name = self.string(_MAX_NAME, f"the tensor name at byte {self.offset}")
        what = f"the tensor {printable(name)}"
        dimensions = self.number("I", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"damaged: {what} claims {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(int(self.number("Q", what)) for _ in range(dimensions))[::-1]
        number, offset = self.number("I", what), int(self.number("Q", what))
        kind = TENSOR_TYPES.get(number, str(number))
        if kind not in BLOCK_TYPES:
            readable = ", ".join(BLOCK_TYPES)
            raise self.error(f"{what} has type {kind}, which wkv cannot read; expected one of {readable}")
        numel = 1
        for size in shape:
            numel *= size
        if not 1 <= numel <= 2**62 or shape[-1] % BLOCK_TYPES[kind].values:
            rows = f"rows of a multiple of {BLOCK_TYPES[kind].values}"
            raise self.error(f"damaged: {what} has shape {list(shape)} and type {kind}, expected {rows}")
        return TensorInfo(name, shape, kind, 0, num_bytes(kind, numel)), offset


class NewTensor(NamedTuple):
    """A tensor to be written: `chunks` makes its bytes, piece by piece, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    chunks: Callable[[], Iterable[bytes]]


def write_gguf(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> None:
    """Write a whole file, version 3, alignment 32.

    Args:
        file: open for writing, at its start.
        metadata: in the order in which it is written.
        tensors: in the order in which they are written.
    """
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), *_value(value)]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        header += [_string(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        header.append(struct.pack("<IQ", _NUMBER_OF_TYPE[tensor.kind], offset))
        offset += _padded(_size(tensor))
    text = b"".join(header)
    file.write(text + b"\0" * (_padded(len(text)) - len(text)))
    for tensor in tensors:
        size = sum(file.write(chunk) for chunk in tensor.chunks())
        if size != _size(tensor):
            raise RuntimeError(f"{tensor.name}: {size} bytes were written, {_size(tensor)} announced")
        file.write(b"\0" * (_padded(size) - size))


def _size(tensor: NewTensor) -> int:
    numel = 1
    for size in tensor.shape:
        numel *= size
    return num_bytes(tensor.kind, numel)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> Iterator[bytes]:
    kind = value.type.removesuffix("[]")
    number = _NUMBERS[kind]
    code = _SCALARS[number][1] if number in _SCALARS else ""
    if kind != value.type:
        yield struct.pack("<IIQ", _ARRAY, number, len(value.value))
        yield struct.pack(f"<{len(value.value)}{code}", *value.value) if code else b"".join(map(_string, value.value))
    else:
        yield struct.pack("<I", number)
        yield struct.pack(f"<{code}", value.value) if code else _string(value.value)
