"""A token cache: a corpus tokenised once, in files that are mapped into memory.

A folder with
    tokens.bin     ids back to back, uint16 for vocabularies of up to 65536 entries, else uint32; little endian;
    starts.bin     int64, where each document begins;
    loss_mask.bin  one byte per token, only where some tokens do not count in the loss;
    cache.json     format version, tokenizer, counts, and size and checksum of every file.
It is made under another name and gets its own when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from wkv.data.document import Document
from wkv.data.encoding import Encoded
from wkv.data.parallel import encode_all
from wkv.data.store import TokenStore, token_dtype
from wkv.errors import DataError
from wkv.tokenizers import Tokenizer

FORMAT, VERSION = "wkv token cache", 1
TOKENS, STARTS, LOSS_MASK, META = "tokens.bin", "starts.bin", "loss_mask.bin", "cache.json"
_PIECE = 1 << 22  # bytes read, or mask values written, at a time

Progress = Callable[[int, int], None]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that give the same ids: a hash of their description."""
    description = json.dumps([tokenizer.to_dict(), tokenizer.vocab_size], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()[:32]


def build_cache(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenise a corpus into `folder` and open it.

    Documents keep their order, and the files do not depend on `workers`. In a script, guard the call with
    `if __name__ == "__main__":`, as for every use of several processes.

    Args:
        documents: read one after the other, as from `iter_documents`.
        folder: must not exist yet, or be empty.
        workers: processes that tokenise; 1: this one does. None: this one begins, and after 64 million characters one
            per core goes on.
        progress: called after every few documents with how many documents and tokens are done.

    Raises:
        DataError: if the folder is in use, there is no text, a worker dies, or writing fails (a full disk); whatever
            happens, a folder of that name exists only with a whole cache in it.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is in use; choose another folder, or delete it to build the cache anew")
    temporary = target.absolute().with_name(f".{secrets.token_hex(4)}.{target.absolute().name}")
    try:
        temporary.mkdir(parents=True)
        chunks = contextlib.closing(encode_all(documents, tokenizer, workers))
        with _Writer(temporary, tokenizer) as writer, chunks as pieces:
            for encoded in pieces:
                writer.add(encoded)
                if progress is not None:
                    progress(writer.num_documents, writer.num_tokens)
        writer.finish()
        if target.exists():
            target.rmdir()  # the name of an empty folder can be taken over only by some systems
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_cache(target, tokenizer, verify=False)


def open_cache(folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None, verify: bool = True) -> TokenStore:
    """Open a token cache; its files stay mapped.

    Args:
        tokenizer: refuse a cache that was made with another one.
        verify: compare checksums, which reads the files once; sizes are always compared.

    Raises:
        DataError: if there is no cache, it is damaged, truncated or of another version, or of another tokenizer.
    """
    path = Path(folder)
    meta = _read_meta(path)
    if tokenizer is not None:
        _check_tokenizer(path, meta, tokenizer)
    for name, expected in meta["files"].items():
        _check_file(path / name, expected, verify)
    tokens = _map(path / TOKENS, np.dtype(meta["dtype"]), meta["tokens"])
    starts = _map(path / STARTS, np.dtype("<i8"), meta["documents"])
    mask = _map(path / LOSS_MASK, np.dtype(np.bool_), meta["tokens"]) if LOSS_MASK in meta["files"] else None
    try:
        return TokenStore(tokens, starts, mask)
    except DataError as error:
        raise DataError(f"{path}: the cache is damaged ({error}); build it anew") from error


class _Writer:
    """Writes the files of a cache as documents come in."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._files: dict[str, _File] = {}
        self._open = contextlib.ExitStack()
        self.num_documents = self.num_tokens = 0

    def __enter__(self) -> _Writer:
        self._create(TOKENS)
        self._create(STARTS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def add(self, encoded: list[Encoded]) -> None:
        """Some documents, in the order of the corpus."""
        for ids, counts in encoded:
            if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
                found = f"id {ids.max()}, but its vocabulary has {self._tokenizer.vocab_size} entries"
                raise DataError(f"document {self.num_documents}: the tokenizer gives {found}")
            self._files[STARTS].write(np.array([self.num_tokens], "<i8"))
            self._files[TOKENS].write(ids.astype(self._dtype))
            self._add_mask(len(ids), counts)
            self.num_documents += 1
            self.num_tokens += len(ids)

    def finish(self) -> None:
        """Describe what was written; only now is it a cache."""
        if not self.num_tokens:
            raise DataError("there is no text to train on: the corpus has no tokens")
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "tokenizer_kind": str(self._tokenizer.to_dict().get("kind")),
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "files": {name: {"bytes": file.size, "crc32": file.checksum} for name, file in self._files.items()},
        }
        (self._folder / META).write_text(json.dumps(meta, indent=2) + "\n")

    def _create(self, name: str) -> None:
        self._files[name] = _File(self._folder / name)
        self._open.callback(self._files[name].close)

    def _add_mask(self, length: int, counts: NDArray[np.bool_] | None) -> None:
        """The file begins with the first document that does not count as a whole; what was before does."""
        if LOSS_MASK not in self._files:
            if counts is None:
                return
            self._create(LOSS_MASK)
            for begin in range(0, self.num_tokens, _PIECE):
                self._files[LOSS_MASK].write(np.ones(min(_PIECE, self.num_tokens - begin), np.bool_))
        self._files[LOSS_MASK].write(np.ones(length, np.bool_) if counts is None else counts)


class _File:
    """A file being written, with its size and checksum so far."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self.size = self.checksum = 0

    def write(self, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._file.write(data)
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)

    def close(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        raise DataError(f"{folder}: no token cache (there is no {META} in it); make one with build_cache")
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); build the cache anew") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path}: not the description of a token cache")
    if meta.get("version") != VERSION:
        found = f"version {meta.get('version')!r}, this library reads version {VERSION}"
        raise DataError(f"{path}: {found}; build the cache anew")
    if not _is_sound(meta):
        raise DataError(f"{path}: damaged (values are missing or contradict each other); build the cache anew")
    return meta


def _is_sound(meta: dict[str, Any]) -> bool:
    """Whether counts, types and file sizes agree."""
    tokens, documents, dtype, files = (meta.get(key) for key in ("tokens", "documents", "dtype", "files"))
    if dtype not in ("uint16", "uint32") or not isinstance(files, dict) or not _count(tokens) or not _count(documents):
        return False
    sizes = {TOKENS: tokens * np.dtype(dtype).itemsize, STARTS: 8 * documents, LOSS_MASK: tokens}
    if not {TOKENS, STARTS} <= set(files) <= set(sizes):
        return False
    return all(isinstance(file, dict) and file.get("bytes") == sizes[name] for name, file in files.items())


def _count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_tokenizer(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    if meta.get("tokenizer") != tokenizer_fingerprint(tokenizer):
        found = f"{meta.get('tokenizer_kind')!r} tokenizer of {meta.get('vocab_size')} entries"
        given = f"{tokenizer.to_dict().get('kind')!r} tokenizer of {tokenizer.vocab_size}"
        raise DataError(f"{folder} was made with a {found}, not with this {given}; use that one or build it anew")


def _check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    checksum = 0
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DataError(
                f"{path}: {size} bytes, expected {expected['bytes']}; it is truncated, build the cache anew"
            )
        with path.open("rb") as file:
            for piece in _pieces(file) if verify else ():
                checksum = zlib.crc32(piece, checksum)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); build the cache anew") from error
    if verify and checksum != expected.get("crc32"):
        raise DataError(f"{path}: damaged (its checksum has changed); build the cache anew")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    try:
        return np.memmap(path, dtype.newbyteorder("<"), "r", shape=(count,))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped into memory ({error})") from error
