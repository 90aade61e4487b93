"""Recipes of conversations: templates, and what becomes of those that are longer than a row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from wkv.data import WholeDocuments
from wkv.errors import DataError, RecipeError
from wkv.tokenizers import ByteTokenizer
from wkv.training import estimate, parse_recipe, train
from wkv.training.corpus_cache import cached_corpus
from wkv.training.sections import DataRecipe, FieldNames
from wkv.training.source import Corpus, load_corpus

from .helpers import recipe_values

LONG = 60  # "word " * LONG is longer than a row of 100 tokens


def write_chats(path: Path, count: int = 44) -> str:
    """Two turns each; the first answer of number 7 is long, of number 11 the last one."""
    with path.open("w") as file:
        for i in range(count):
            talk = [f"{i} and one?", "word " * (LONG if i == 7 else 1), "And?", "word " * (LONG if i == 11 else 1)]
            roles = ("human", "gpt") * 2
            rows = [{"from": role, "value": text} for role, text in zip(roles, talk, strict=True)]
            file.write(json.dumps({"conversations": rows}) + "\n")
    return str(path)


def read(data: DataRecipe, length: int | None = 100) -> Corpus:
    return load_corpus(data, lambda documents: ByteTokenizer(), length)


def texts(corpus: Corpus) -> list[str]:
    store = corpus.store
    return [ByteTokenizer().decode(store.document(i).tolist()) for i in range(len(store))]


def test_templates_and_columns(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "Sort.", "context": "b a", "response": "a b"}\n' * 2)
    data = DataRecipe(str(source), FieldNames(input="context"), held_out_fraction=0.0, template="instruction")
    expected = "Instruction: Sort.\n\nInput: b a\n\nResponse: a b\n\nInstruction:"
    assert texts(read(data)) == [expected] * 2
    data = DataRecipe(str(source), held_out_fraction=0.0, think="fake")
    assert texts(read(data))[0] == "User: Sort.\n\nAssistant: <think>\n</think>\na b\n\nUser:"


def test_every_rule(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats.jsonl")
    for order in ("padded", "whole"):
        with pytest.raises(
            DataError, match=r"chats\.jsonl:8: it has 3\d\d tokens, and 101 fit \(context_length \+ 1\)"
        ):
            read(DataRecipe(source, order=order))
    assert read(DataRecipe(source, order="packed")).note == ""
    with pytest.raises(DataError, match=r"chats\.jsonl:8"):
        read(DataRecipe(source, order="packed", too_long="error"))
    for rule, note, kept in (("drop", "2 left out", 40), ("left", "1 shortened and 1 left out", 41),
                             ("right", "2 shortened", 42)):  # fmt: skip
        corpus = read(DataRecipe(source, order="padded", too_long=rule))
        assert corpus.note == f"{note} of 42 documents, to fit into 101 tokens"
        assert len(corpus.store) == kept
        assert max(map(len, texts(corpus))) <= 101
    assert "User: And?\n\nAssistant: word\n\nUser:" in texts(read(DataRecipe(source, order="padded", too_long="left")))


def test_a_cache_is_of_one_length_and_template(tmp_path: Path) -> None:
    data: dict[str, Any] = {"source": write_chats(tmp_path / "chats.jsonl"), "cache": str(tmp_path / "cache")}
    data |= {"order": "whole", "too_long": "left"}

    def cached(length: int = 100, **changes: Any) -> Corpus:
        return cached_corpus(DataRecipe(**{**data, **changes}), lambda documents: ByteTokenizer(), None, length)

    expected = read(DataRecipe(**data))
    for found in (cached(), cached()):
        assert (texts(found), found.note) == (texts(expected), expected.note)
    with pytest.raises(
        DataError, match=r"data.too_long 'left \(context_length 100\)', .* 'left \(context_length 90\)'"
    ):
        cached(90)
    with pytest.raises(DataError, match=r"the recipe says None"):
        cached(order="random", too_long=None)
    with pytest.raises(DataError, match=r"data.template 'chat', the recipe says 'question'"):
        cached(template="question")


def test_recipes_say_what_cannot_be(tmp_path: Path) -> None:
    for change, message in (
        ({"template": "raven"}, "data.template: template must be one of chat, question, instruction"),
        ({"think": "deep"}, "data.template: think must be one of none, fake, empty, on"),
        ({"too_long": "middle"}, "data.too_long must be one of error, drop, left, right"),
        ({"template": "question", "think": "on"}, "data.template: the template 'question' knows no thoughts"),
        ({"fields": {"input": " "}}, "data.fields.input must be the name of a column"),
    ):
        values = recipe_values(tmp_path)
        values["data"] |= change
        with pytest.raises(RecipeError, match=message):
            parse_recipe(values)


def test_a_run_tells_what_was_left_out_and_counts_epochs_in_rows(tmp_path: Path) -> None:
    values = recipe_values(Path(write_chats(tmp_path / "chats.jsonl")), steps=None, epochs=2, context_length=100)
    values["train"] |= {"batch_size": 4, "warmup_steps": 0}
    values["data"] |= {"order": "whole", "too_long": "left"}
    recipe = parse_recipe(values)
    rows = WholeDocuments(read(recipe.data).store, 100, 1, recipe.train.seed).num_rows
    assert estimate(recipe, Console(quiet=True)).steps == -(-2 * rows // 4)
    output = io.StringIO()
    result = train(recipe, tmp_path / "run", console=Console(file=output, width=200))
    assert result.steps == -(-2 * rows // 4)
    assert "1 shortened and 1 left out of 42 documents, to fit into 101 tokens" in output.getvalue()


def test_a_run_tells_what_its_rows_cut(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "a plain text that is too long"}\n' * 30)
    values = recipe_values(source, steps=2, warmup_steps=0, context_length=20)
    values["data"] |= {"order": "padded"}
    output = io.StringIO()
    train(parse_recipe(values), tmp_path / "run", console=Console(file=output, width=200))
    assert "29 documents are longer than a row and lose their end" in output.getvalue()
