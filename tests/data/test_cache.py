"""The token cache: the same however it is made, whole or not there, and verified when it is opened."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.inference.helpers import PieceTokenizer
from wkv.data import (
    Document,
    TokenStore,
    build_cache,
    conversation,
    encode_document,
    open_cache,
    parallel,
    tokenizer_fingerprint,
)
from wkv.errors import DataError
from wkv.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

TALK = conversation([("user", "Who are you?"), ("assistant", "A model.")])
CORPUS = [Document("a", "größer " * 20), Document("b", ""), TALK, Document("c", "the end")]


def same(a: TokenStore, b: TokenStore) -> bool:
    masks = (a.loss_mask is None) == (b.loss_mask is None) and np.array_equal(a.loss_mask, b.loss_mask)
    return masks and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts)


@pytest.mark.parametrize("corpus", [CORPUS, CORPUS[:2], [TALK]])
def test_a_cache_holds_what_memory_would(tmp_path: Path, corpus: list[Document]) -> None:
    tokenizer = WorldTokenizer()
    seen: list[tuple[int, int]] = []
    built = build_cache(iter(corpus), tokenizer, tmp_path / "c", progress=lambda *done: seen.append(done))
    expected = TokenStore.from_documents(corpus, tokenizer)
    opened = open_cache(tmp_path / "c", tokenizer)
    assert same(built, expected)
    assert same(opened, expected)
    assert isinstance(opened.tokens, np.memmap)
    assert opened.tokens.dtype == np.uint16
    assert opened.fingerprint == expected.fingerprint
    assert seen[-1] == (len(corpus), expected.num_tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "nothing else is left"


def test_workers_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_MOST", 3)
    corpus = [Document(str(i), f"text number {i} " * (i % 7)) for i in range(40)] + CORPUS
    tokenizer = BPETokenizer.train(["text number one two three"] * 3, 280)
    alone = build_cache(corpus, tokenizer, tmp_path / "one", workers=1)
    together = build_cache(corpus, tokenizer, tmp_path / "two", workers=2)
    assert same(alone, together)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_no_workers_for_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_encode_elsewhere", lambda chunks, tokenizer, workers: iter([workers, *chunks]))
    monkeypatch.setattr(parallel, "_cores", lambda: 7)
    monkeypatch.setattr(parallel, "_CHUNK", 1)
    monkeypatch.setattr(parallel, "_ALONE", 3)
    here = [[encode_document(document, ByteTokenizer())] for document in CORPUS[::2]]
    found = list(parallel.encode_all([*CORPUS[::2], CORPUS[0], CORPUS[3]], ByteTokenizer(), None))
    assert str(found) == str([*here, [encode_document(CORPUS[0], ByteTokenizer())], 7, [CORPUS[3]]])
    monkeypatch.setattr(parallel, "_cores", lambda: 1)
    assert len(list(parallel.encode_all(CORPUS * 2, ByteTokenizer(), None))) == 6


def test_wide_ids_for_a_big_vocabulary(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        """Bytes, from id 65,537 on."""

        vocab_size = 65536 + 257

        def encode(self, text: str | bytes) -> list[int]:
            return [value + 65537 for value in super().encode(text)]

    store = build_cache([Document("", "a")], Wide(), tmp_path / "c")
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [65537 + 97]
    Wide.vocab_size = 65537
    with pytest.raises(DataError, match="document 0: the tokenizer gives id 65634, but its vocabulary has 65537"):
        build_cache([Document("", "a")], Wide(), tmp_path / "d")


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    bpe, other = (BPETokenizer.train(["low lower lowest"] * 3, size) for size in (260, 262))
    assert tokenizer_fingerprint(bpe) == tokenizer_fingerprint(BPETokenizer(bpe.to_dict()["json"]))
    build_cache(CORPUS, bpe, tmp_path / "c")
    wrong: list[Tokenizer] = [other, WorldTokenizer(), ByteTokenizer()]
    for tokenizer in wrong:
        with pytest.raises(DataError, match=r"c was made with a 'bpe' tokenizer of 260 entries, not with this"):
            open_cache(tmp_path / "c", tokenizer)


def broken_off(error: BaseException) -> Iterator[Document]:
    yield from CORPUS
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("line 7"), RuntimeError("bug")])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        build_cache(broken_off(error), ByteTokenizer(), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DataError, match="c cannot be written: File too large; nothing is left of it"):
            build_cache([Document("", "text" * 5000)], ByteTokenizer(), tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_start_worker", os._exit)  # given a dictionary: fails, and ends the process
    with pytest.raises(DataError, match="a process that tokenises has ended by itself"):
        build_cache(CORPUS, ByteTokenizer(), tmp_path / "c", workers=1 + 1)
    with pytest.raises(DataError, match=r"cannot be sent to other processes .* use workers=1"):
        build_cache(CORPUS, PieceTokenizer(), tmp_path / "c", workers=2)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_built(tmp_path: Path) -> None:
    for corpus in ([], [Document("", "")]):
        with pytest.raises(DataError, match="there is no text"):
            build_cache(corpus, ByteTokenizer(), tmp_path / "c")
    for workers in (0, -1, True, 2.5):
        with pytest.raises(DataError, match="workers must be a positive integer"):
            build_cache(CORPUS, ByteTokenizer(), tmp_path / "c", workers=workers)  # type: ignore[arg-type]
    (tmp_path / "c").mkdir()
    build_cache(CORPUS, ByteTokenizer(), tmp_path / "c")  # an empty folder is free
    with pytest.raises(DataError, match="c is in use; choose another folder"):
        build_cache(CORPUS, ByteTokenizer(), tmp_path / "c")


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token cache \(there is no cache\.json in it\)"):
        open_cache(tmp_path)
    build_cache(CORPUS, ByteTokenizer(), tmp_path / "c")
    path = tmp_path / "c" / "cache.json"
    meta = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "version 2, this library reads version 1"),
        ({"format": "other"}, "not the description of a token cache"),
        ({"dtype": "float16"}, "values are missing or contradict"),
        ({"tokens": True}, "contradict"),
        ({"documents": 3}, "contradict"),
        ({"files": {}}, "contradict"),
        ({"files": {**meta["files"], "../else": {"bytes": 1}}}, "contradict"),
        ({"files": dict.fromkeys(meta["files"], 3)}, "contradict"),
    ):
        path.write_text(json.dumps(meta | change))
        with pytest.raises(DataError, match=message):
            open_cache(tmp_path / "c")
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"cache\.json: damaged"):
        open_cache(tmp_path / "c")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "c"
    build_cache(CORPUS, ByteTokenizer(), folder)
    return folder


def test_missing_and_truncated_files(whole: Path, tmp_path: Path) -> None:
    for name in ("tokens.bin", "starts.bin", "loss_mask.bin"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        with (folder / name).open("r+b") as file:
            file.truncate((whole / name).stat().st_size - 1)
        with pytest.raises(DataError, match=rf"{name}: \d+ bytes, expected \d+; it is truncated"):
            open_cache(folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            open_cache(folder)


@given(data=st.data(), name=st.sampled_from(["tokens.bin", "starts.bin", "loss_mask.bin", "cache.json"]))
def test_a_changed_byte_is_found(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(whole, folder)
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    if name == "cache.json":  # also holds what nothing depends on, such as spaces
        try:
            assert same(open_cache(folder, ByteTokenizer()), TokenStore.from_documents(CORPUS, ByteTokenizer()))
        except DataError:
            return
    else:
        with pytest.raises(DataError, match=f"{name}: damaged"):
            open_cache(folder)
