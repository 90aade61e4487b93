"""From `data` sections to tokens, held-out texts and batches; caches; and what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wkv.data import (
    Document,
    MagicPrimeWindows,
    PackedDocuments,
    PaddedDocuments,
    StreamingDocuments,
    TokenStore,
    UniformWindows,
    WholeDocuments,
    build_cache,
    load_documents,
    write_binidx,
)
from wkv.errors import DataError, RecipeError
from wkv.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer
from wkv.training.corpus_cache import cached_corpus
from wkv.training.sections import DataRecipe, FieldNames, TrainRecipe
from wkv.training.source import Corpus, HoldOut, UnbrokenStream, create_sampler, load_corpus

from .helpers import write_corpus


def choose(documents: Iterable[Document] | None) -> Tokenizer:
    return ByteTokenizer()


def text_recipe(folder: Path, **options: Any) -> DataRecipe:
    return DataRecipe(**{"source": str(write_corpus(folder / "corpus")), **options})


def same(found: Corpus, expected: Corpus) -> None:
    assert found.store.fingerprint == expected.store.fingerprint
    assert found.held_out == expected.held_out
    assert found.held_out_bytes == expected.held_out_bytes
    assert found.num_bytes == expected.num_bytes


@pytest.mark.parametrize(
    ("order", "reset", "kind"),
    [
        ("random", True, UniformWindows), ("prime", True, MagicPrimeWindows), ("packed", True, PackedDocuments),
        ("padded", True, PaddedDocuments), ("stream", True, StreamingDocuments), ("stream", False, UnbrokenStream),
        ("packed", False, PackedDocuments), ("whole", True, WholeDocuments),
    ],
)  # fmt: skip
def test_orders(tmp_path: Path, order: str, reset: bool, kind: type) -> None:
    data = text_recipe(tmp_path, order=order, reset=reset)
    sampler = create_sampler(load_corpus(data, choose).store, data, TrainRecipe(context_length=300, batch_size=4), 1, 2)
    batch = sampler.next_batch()
    assert type(sampler) is kind
    assert batch.inputs.shape[0] == 2  # of 4 over two processes
    assert (batch.reset is not None) == (reset and order in ("packed", "stream", "whole"))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"held_out_every": 7}, {"held_out_every": 30, "held_out_fraction": 0.2}, {"held_out_fraction": 0.0},
        {"held_out": "extra.txt"},
    ],
)  # fmt: skip
def test_documents_are_held_out_alike_in_memory_as_they_come_and_in_a_cache(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "extra.txt").write_text("held out")
    if "held_out" in options:
        options = {"held_out": str(tmp_path / "extra.txt")}
    recipe = text_recipe(tmp_path, **options)
    expected = load_corpus(recipe, choose)
    streamed = HoldOut(recipe)
    store = TokenStore.from_documents(streamed.training(), ByteTokenizer())
    same(Corpus(store, streamed.texts, ByteTokenizer(), streamed.num_bytes), expected)
    assert bool(expected.held_out) == (recipe.held_out_fraction > 0)
    cached = dataclasses.replace(recipe, cache=str(tmp_path / "cache"))
    seen: list[int] = []
    same(cached_corpus(cached, choose, lambda documents, tokens: seen.append(tokens)), expected)
    assert seen[-1] == expected.store.num_tokens
    same(cached_corpus(cached, choose), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path, cache=str(tmp_path / "cache"))
    cached_corpus(recipe, choose)
    with pytest.raises(DataError, match=r"cache was made with data\.held_out_every 20, the recipe says 5"):
        cached_corpus(dataclasses.replace(recipe, held_out_every=5), choose)
    with pytest.raises(DataError, match="was made with a 'bytes' tokenizer of 256 entries"):
        cached_corpus(recipe, lambda _: WorldTokenizer())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine holds something other than a corpus"):
        cached_corpus(dataclasses.replace(recipe, cache=str(mine)), choose)
    assert (mine / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["corpus.json", "held_out.jsonl", "tokens/tokens.bin", "tokens/cache.json"])
@pytest.mark.parametrize("damage", ["cut", "change", "remove"])
def test_a_damaged_cache_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    recipe = text_recipe(tmp_path, cache=str(tmp_path / "cache"))
    cached_corpus(recipe, choose)
    path = tmp_path / "cache" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x01" + content[1:])
    with pytest.raises(DataError, match="cache"):
        cached_corpus(recipe, choose)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path, cache=str(tmp_path / "cache"))
    with (tmp_path / "corpus/21.txt").open("wb") as file:
        file.write(b"good\xff")
    with pytest.raises(DataError, match=r"21\.txt: not UTF-8 text \(byte 4"):
        cached_corpus(recipe, choose)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "corpus/21.txt").write_text("good")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="cannot be written: No space left"):
        cached_corpus(recipe, choose)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_rows_with_fields_of_their_own_and_errors_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(40)) + '{"title": "none"}\n')
    recipe = DataRecipe(source=str(path), fields=FieldNames(text="body"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 41: no field"):
        load_corpus(recipe, choose)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert load_corpus(recipe, choose).held_out == ["text 19", "text 39"]


def binidx(folder: Path, documents: int = 10) -> str:
    ids = [[*f"document {i} ".encode(), 0] for i in range(documents)]
    write_binidx(folder / "tokens", ids)
    return str(folder / "tokens")


def test_binidx_holds_out_its_last_documents_as_text(tmp_path: Path) -> None:
    source = binidx(tmp_path)
    corpus = load_corpus(DataRecipe(source=source, held_out_fraction=0.2), lambda _: WorldTokenizer())
    assert len(corpus.store) == 8
    assert len(corpus.held_out) == 2
    assert corpus.num_bytes is None
    whole = load_corpus(DataRecipe(source=source + ".bin", held_out_fraction=0.0), choose)
    assert (len(whole.store), whole.held_out) == (10, [])
    write_binidx(tmp_path / "one", [[1, 2, 3]])
    with pytest.raises(DataError, match="one document leaves nothing to hold out"):
        load_corpus(DataRecipe(source=str(tmp_path / "one")), choose)
    with pytest.raises(RecipeError, match=r"data\.cache is for text"):
        load_corpus(DataRecipe(source=source, cache=str(tmp_path / "cache")), choose)
    with pytest.raises(RecipeError, match=r"data\.cache is for text"):
        cached_corpus(DataRecipe(source=source, cache=str(tmp_path / "cache")), choose)


def test_tokens_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    write_binidx(tmp_path / "other", [[1, 2], [3, 300], [4]])
    with pytest.raises(DataError, match=r"id 300 in document 1 \(token 3\) is outside the vocabulary of 256"):
        load_corpus(DataRecipe(source=str(tmp_path / "other")), choose)


def test_a_token_cache_is_a_source(tmp_path: Path) -> None:
    documents = load_documents(write_corpus(tmp_path / "corpus"))
    build_cache(documents, ByteTokenizer(), tmp_path / "tokens")
    corpus = load_corpus(DataRecipe(source=str(tmp_path / "tokens")), choose)
    assert corpus.held_out == [documents[-1].text.encode()]
    assert np.array_equal(corpus.store.document(0), list(documents[0].text.encode()))
    with pytest.raises(DataError, match="was made with a 'bytes' tokenizer"):
        load_corpus(DataRecipe(source=str(tmp_path / "tokens")), lambda _: WorldTokenizer())
