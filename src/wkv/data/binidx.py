"""binidx, the format of the official trainer (RWKV-LM `binidx.py`, `make_data.py`; Megatron's indexed data sets).

Two files, little endian:
    NAME.bin: token ids back to back, nothing else; by convention every document ends with id 0;
    NAME.idx: magic "MMIDIDX\\0\\0", version uint64 = 1, code of the token type uint8, number of items n uint64, number
        of document bounds m uint64; then tokens per item int32 [n], byte offset of every item int64 [n], and the
        items at which documents begin, with the end, int64 [m]. The official writer makes every document one item.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wkv.data.store import TokenStore
from wkv.errors import DataError
from wkv.files import replacing

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)  # their width differs between the tables in circulation, and ids are no fractions
_LONGEST = (1 << 31) - 1  # tokens of one item


def read_binidx(path: str | os.PathLike[str]) -> TokenStore:
    """Open a binidx pair. The tokens stay in the mapped file.

    Args:
        path: NAME, NAME.bin or NAME.idx.

    Raises:
        DataError: if a file is missing, truncated, foreign or inconsistent; it names the file.
    """
    tokens_path, index_path = _pair(path)
    dtype, sizes, pointers, bounds = _parse_index(_map_index(index_path), index_path)
    ends = np.cumsum(sizes, dtype=np.int64)
    if (sizes < 0).any() or not np.array_equal(pointers, (ends - sizes) * dtype.itemsize):
        raise DataError(f"{index_path}: sizes and offsets of items contradict each other; the file is damaged")
    if bounds[0] != 0 or bounds[-1] != len(sizes) or (bounds[1:] < bounds[:-1]).any():
        raise DataError(f"{index_path}: the bounds of documents do not rise from 0 to {len(sizes)}; it is damaged")
    tokens = _map_tokens(tokens_path, dtype, int(ends[-1]))
    return TokenStore(tokens, np.concatenate([[0], ends])[bounds[:-1]])


def write_binidx(path: str | os.PathLike[str], documents: Iterable[ArrayLike], dtype: str = "uint16") -> None:
    """Write a binidx pair, byte for byte as the official writer does. Both files appear when they are complete.

    Args:
        path: NAME, NAME.bin or NAME.idx.
        documents: the ids of each document, with the end-of-text id at its end if it is to have one.
        dtype: of the tokens: "uint16" for vocabularies of up to 65536 entries, else "int32".

    Raises:
        DataError: if there is no document, an id does not fit `dtype`, or the files cannot be written.
    """
    tokens_path, index_path = _pair(path)
    codes = {np.dtype(name).name: code for code, name in _DTYPES.items()}
    if dtype not in codes:
        raise DataError(f"binidx has no tokens of type {dtype!r}; use one of {', '.join(codes)}")
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        with replacing([tokens_path, index_path]) as [tokens_file, index_file]:
            sizes = _write_tokens(tokens_file, documents, kind)
            index_file.write_bytes(_index(sizes, codes[dtype], kind.itemsize))
    except OSError as error:
        raise DataError(f"{tokens_path} cannot be written: {error.strerror or error}") from error


def _pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    name = Path(path)
    if not name.name:
        raise DataError("the path of a binidx pair is empty; give NAME, NAME.bin or NAME.idx")
    stem = name.with_suffix("") if name.suffix in (".bin", ".idx") else name
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")


def _map_index(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a binidx pair is NAME.bin and NAME.idx") from error


def _parse_index(data: NDArray[np.uint8], path: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(type of the tokens, sizes [n], pointers [n], bounds [m])."""
    header = data[: _HEADER.size].tobytes()
    if not header.startswith(_MAGIC):
        raise DataError(f"{path}: no index of a binidx pair (it begins with {header[:9]!r})")
    if len(header) < _HEADER.size:
        raise DataError(f"{path}: the file is cut off after {len(data)} bytes; copy it again")
    _, version, code, items, count = _HEADER.unpack(header)
    if version != _VERSION:
        raise DataError(f"{path}: binidx version {version}, expected {_VERSION}")
    if code not in _DTYPES:
        found = "floating-point numbers" if code in _FLOATS else "of an unknown type"
        raise DataError(f"{path}: tokens are {found} (code {code}); write them as uint16 (8) or int32 (4)")
    expected = _HEADER.size + 12 * items + 8 * count
    if len(data) != expected:
        found = f"{len(data)} bytes, {items} items and {count} bounds need {expected}"
        raise DataError(f"{path}: {found}; the file is truncated or damaged")
    if not items or count < 2:
        raise DataError(f"{path}: the index holds no document")
    places = _HEADER.size, _HEADER.size + 4 * items, _HEADER.size + 12 * items
    sizes = np.frombuffer(data, "<i4", items, places[0])
    return (
        np.dtype(_DTYPES[code]), sizes,
        np.frombuffer(data, "<i8", items, places[1]), np.frombuffer(data, "<i8", count, places[2]),
    )  # fmt: skip


def _map_tokens(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            found = f"{size} bytes, its index counts {count} tokens of {dtype.itemsize}"
            raise DataError(f"{path}: {found}; one of the two is truncated or belongs to another pair")
        return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a binidx pair is NAME.bin and NAME.idx") from error


def _write_tokens(path: Path, documents: Iterable[ArrayLike], dtype: np.dtype[Any]) -> array[int]:
    """Write all documents; returns the tokens of each."""
    sizes = array("i")
    limits = np.iinfo(dtype)
    with path.open("wb") as file:
        for number, document in enumerate(documents):
            ids = np.asarray(document) if np.size(document) else np.empty(0, dtype)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) > _LONGEST:
                raise DataError(f"document {number} must be a list of ids, found {ids.dtype} {list(ids.shape)}")
            if len(ids) and not limits.min <= ids.min() <= ids.max() <= limits.max:
                raise DataError(f"document {number} has ids {ids.min()} to {ids.max()}, which do not fit {dtype.name}")
            file.write(ids.astype(dtype).tobytes())
            sizes.append(len(ids))
    if not sizes:
        raise DataError("there is no document to write")
    return sizes


def _index(sizes: array[int], code: int, itemsize: int) -> bytes:
    lengths = np.array(sizes, "<i4")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    bounds = np.arange(len(lengths) + 1, dtype="<i8")
    header = _HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(bounds))
    return header + lengths.tobytes() + pointers.astype("<i8").tobytes() + bounds.tobytes()
