"""Readers of tables, one row at a time: JSON lines, Parquet files, data sets of the package `datasets`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wkv.data.document import Document
from wkv.data.rows import Fields, row_document
from wkv.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256  # read at a time


def read_jsonl(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    """One document per line of JSON; blank lines are passed over. Documents are called "name:line".

    Raises:
        DataError: naming the line that is not UTF-8, not JSON or of no use, or the file if it is empty or unreadable.
    """
    found = False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if row := line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").strip():
                    found, where = True, f"{path}, line {number}"
                    yield row_document(_parse(row, where), f"{name}:{number}", fields, where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise DataError(f"{path}: the file is empty; remove it or put rows into it")


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one object") from error


def read_parquet(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    """One document per row of a Parquet file, called "name:row"; only the columns of `fields` are read.

    Raises:
        DataError: if pyarrow is not installed, or the file is foreign, damaged or empty, or a row is of no use.
    """
    arrow, parquet = _package("pyarrow", "Parquet files"), _package("pyarrow.parquet", "Parquet files")
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            columns = [column for column in fields.columns if column in table.schema_arrow.names]
            for batch in table.iter_batches(_PARQUET_ROWS, columns=columns or None):
                for row in batch.to_pylist():
                    number += 1
                    yield row_document(row, f"{name}:{number}", fields, f"{path}, row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a Parquet file ({_first_line(error)})") from error
    if not number:
        raise DataError(f"{path}: the file has no rows; remove it or put rows into it")


def read_dataset(source: str, fields: Fields) -> Iterator[Document]:
    """One document per row of "hf:NAME" or "hf:NAME:SPLIT", called "NAME:row". Rows are streamed, not downloaded first.

    Raises:
        DataError: if `datasets` is not installed, the data set cannot be found, has no rows, or a row is of no use.
    """
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f'{source}: expected "hf:NAME" or "hf:NAME:SPLIT"')
    datasets = _package("datasets", "data sets of Hugging Face")
    number = 0
    try:
        for row in datasets.load_dataset(name, split=split or "train", streaming=True):
            number += 1
            yield row_document(row, f"{name}:{number}", fields, f"{source}, row {number}")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source}: cannot be loaded ({_first_line(error)}); check name, split and network") from error
    if not number:
        raise DataError(f"{source}: this split has no rows")


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"reading {purpose} needs the package {package}: pip install {package}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
