"""binidx: byte for byte the official writer's files, and clear errors for damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wkv.data import Document, TokenStore, read_binidx, write_binidx
from wkv.errors import DataError
from wkv.tokenizers import WorldTokenizer

GOLDEN = Path(__file__).parents[1] / "golden/rwkv_training"
EXPECTED = json.loads((GOLDEN / "data_and_schedule.json").read_text())


def test_the_official_files_are_written_byte_for_byte(tmp_path: Path) -> None:
    store = TokenStore.from_documents([Document("", text) for text in EXPECTED["docs"]], WorldTokenizer())
    write_binidx(tmp_path / "tiny", (store.document(i) for i in range(len(store))))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"tiny{suffix}").read_bytes() == (GOLDEN / f"tiny{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.bin", "tiny.idx"]
    assert read_binidx(tmp_path / "tiny").fingerprint == store.fingerprint


@pytest.mark.parametrize("name", ["tiny", "tiny.bin", "tiny.idx"])
def test_the_official_files_are_read(name: str) -> None:
    store = read_binidx(GOLDEN / name)
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert store.loss_mask is None
    assert [store.document(i).tolist() for i in range(len(store))] == EXPECTED["doc_token_ids"]
    assert store.lengths.tolist() == EXPECTED["sizes"]


@given(
    documents=st.lists(st.lists(st.integers(0, 127), max_size=5), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str) -> None:
    path = tmp_path_factory.mktemp("binidx") / "x.y"
    write_binidx(path, documents, dtype)
    store = read_binidx(path)
    assert store.tokens.dtype == np.dtype(dtype)
    assert [store.document(i).tolist() for i in range(len(store))] == documents


def test_documents_of_several_items(tmp_path: Path) -> None:
    write_binidx(tmp_path / "x", [[1, 2], [3], [4, 5]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[26:34] = struct.pack("<Q", 3)
    index[34 + 12 * 3 :] = struct.pack("<3q", 0, 2, 3)
    (tmp_path / "x.idx").write_bytes(index)
    store = read_binidx(tmp_path / "x")
    assert [store.document(i).tolist() for i in range(len(store))] == [[1, 2, 3], [4, 5]]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for documents, dtype, message in (
        ([[1], [65536]], "uint16", "document 1 has ids 65536 to 65536, which do not fit uint16"),
        ([[-1]], "uint16", "do not fit"),
        ([], "uint16", "there is no document"),
        ([[0.5]], "uint16", "must be a list of ids"),
        ([[[1]]], "uint16", "must be a list of ids"),
        ([[1]], "float32", "no tokens of type 'float32'; use one of"),
        ([[1]], "uint32", "no tokens of type"),
    ):
        with pytest.raises(DataError, match=message):
            write_binidx(tmp_path / "x", documents, dtype)
    with pytest.raises(DataError, match="cannot be written: No such file"):
        write_binidx(tmp_path / "missing" / "x", [[1]])
    with pytest.raises(DataError, match="path of a binidx pair is empty"):
        write_binidx("", [[1]])
    assert not list(tmp_path.iterdir())


def damaged(folder: Path, place: int, new: bytes, name: str = "tiny.idx") -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"tiny{suffix}", folder)
    data = bytearray((folder / name).read_bytes())
    data[place : place + len(new)] = new
    (folder / name).write_bytes(data)
    return folder / "tiny"


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (0, b"GGUF", "no index of a binidx pair"),
        (9, b"\x02", "binidx version 2, expected 1"),
        (17, b"\x06", r"floating-point numbers \(code 6\)"),
        (17, b"\x07", r"floating-point numbers \(code 7\)"),
        (17, b"\x09", r"of an unknown type \(code 9\)"),
        (17, b"\x04", "sizes and offsets of items contradict each other"),
        (18, b"\xff" * 8, "truncated or damaged"),
        (26, b"\x06", "truncated or damaged"),
        (34, b"\x05", "contradict each other"),
        (34, b"\xff\xff\xff\xff", "contradict each other"),
        (50, b"\x02", "contradict each other"),
        (46, b"\x09", "44 bytes, its index counts 23 tokens of 2"),
        (82, b"\x01", "do not rise from 0 to 4"),
        (90, b"\x03", "do not rise from 0 to 4"),
        (114, b"\x03", "do not rise from 0 to 4"),
    ],
)
def test_damaged_indices(tmp_path: Path, place: int, new: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_binidx(damaged(tmp_path, place, new))


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tiny\.idx: cannot be read"):
        read_binidx(tmp_path / "tiny")
    path = damaged(tmp_path, 0, b"")
    for suffix in (".bin", ".idx"):
        whole = path.with_suffix(suffix).read_bytes()
        for length in range(len(whole)):
            path.with_suffix(suffix).write_bytes(whole[:length])
            with pytest.raises(DataError, match=rf"tiny\{suffix}: "):
                read_binidx(path)
        path.with_suffix(suffix).write_bytes(whole)
    (tmp_path / "tiny.bin").unlink()
    with pytest.raises(DataError, match=r"tiny\.bin: cannot be read"):
        read_binidx(path)


@given(place=st.integers(0, 121), value=st.integers(0, 255))
def test_no_damaged_byte_gives_anything_but_an_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = damaged(tmp_path_factory.mktemp("fuzz"), place, bytes([value]))
    try:
        store = read_binidx(path)
    except DataError:
        return
    assert store.tokens.tobytes() == (GOLDEN / "tiny.bin").read_bytes()
