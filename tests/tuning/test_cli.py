"""`wkv finetune`, `merge`, and `--adapter` of `generate` and `chat`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import wkv
from wkv import tuning
from wkv.cli import app
from wkv.errors import RecipeError, WkvError
from wkv.tokenizers import ByteTokenizer

from .helpers import disturb

QUICK = ["train.epochs=1", "train.context_length=64", "train.batch_size=2", "train.warmup_steps=0"]


def command(*words: str, text: str | None = None) -> str:
    done = CliRunner().invoke(app, list(words), input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model over bytes, conversations, and a run of `wkv finetune` with each kind of adapter."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(3)
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=2, head_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim > 1:
                parameter.normal_(std=0.2)
    model.tokenizer = ByteTokenizer()
    wkv.save_model(model, folder / "model.safetensors")
    rows = [{"prompt": f"What is {i}?", "response": "It is a number. " * (1 + 9 * (i == 2))} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("bone-row", "state"):
        output = command(
            "finetune", str(folder / "model.safetensors"), "--data", str(folder / "chats.jsonl"), "--method", method,
            "--out", str(folder / method), *(["--rank", "8"] if method == "bone-row" else []), *QUICK,
        )  # fmt: skip
        assert "1 left out of 23 documents, to fit into 65 tokens" in output
        assert f"--adapter {folder / method / 'best.safetensors'}" in output
    return folder


@pytest.mark.parametrize("method", ["bone-row", "state"])
def test_adapters_change_what_is_generated(folder: Path, method: str) -> None:
    base, adapter = str(folder / "model.safetensors"), folder / method / "adapter.safetensors"
    model = wkv.load_model(base)
    mounted = tuning.load(adapter, model)
    disturb(mounted, size=5.0 if method == "state" else 0.3)  # what a state does fades over the prompt
    mounted.save(folder / f"{method}.safetensors")
    options = ["--max-tokens", "12", "--temperature", "0", "--no-stream"]
    expected = wkv.generate(model, "What", 12, wkv.Sampler(temperature=0)).text
    tuned = command("generate", base, "What", *options, "--adapter", str(folder / f"{method}.safetensors"))
    assert tuned == f"{expected}\n"
    assert tuned != command("generate", base, "What", *options)
    talk = ["chat", base, "--temperature", "0", "--max-tokens", "8"]
    tuned = command(*talk, "--adapter", str(folder / f"{method}.safetensors"), text="What is 3?\n")
    assert tuned.startswith("Assistant: ")
    assert tuned != command(*talk, text="What is 3?\n")


@pytest.mark.parametrize("method", ["bone-row", "state"])
def test_merging(folder: Path, method: str, tmp_path: Path) -> None:
    base, adapter = folder / "model.safetensors", folder / method / "adapter.safetensors"
    out = tmp_path / "merged.safetensors"
    command("merge", str(base), str(adapter), str(out))
    model = wkv.load_model(base)
    tuning.load(adapter, model)
    prompt, sampler = [1, 2, 3], wkv.Sampler(temperature=0)
    found = wkv.generate(wkv.load_model(out), prompt, 20, sampler, stop_ids=())
    assert found.tokens == wkv.generate(model, prompt, 20, sampler, stop_ids=()).tokens
    with pytest.raises(WkvError, match="is there already"):
        command("merge", str(base), str(adapter), str(out))
    with pytest.raises(WkvError, match="a model file ends in"):
        command("merge", str(base), str(adapter), str(tmp_path / "merged.txt"))
    with pytest.raises(WkvError, match="is an adapter of a model with"):
        command("merge", "starter", str(adapter), str(tmp_path / "other.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged.safetensors"]


def test_what_cannot_be_asked(folder: Path) -> None:
    for words, message in (
        ((), "--data: name the conversations"),
        (("--data", "x.jsonl", "--method", "bone"), "'bone' is the guided form"),
        (("--resume",), "a resumed run keeps its model and data"),
        (("--data", "x.jsonl", "--base", "int2"), "tuning.base must be one of"),
    ):
        with pytest.raises(WkvError, match=message):
            command("finetune", *words)
    with pytest.raises(RecipeError, match="holds no run to resume"):
        command("finetune", "--out", str(folder / "nowhere"), "--resume")


def test_methods_are_listed() -> None:
    output = command("finetune", "--methods")
    assert all(name in output for name in tuning.METHODS)
