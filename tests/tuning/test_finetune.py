"""Adapters in the training loop: what learns, what is saved, exact resume, and the command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import wkv
from tests import small
from tests.training.helpers import write_corpus
from tests.training.test_kill import leaves
from wkv import tuning
from wkv.data.sampling import RowSampler
from wkv.errors import RecipeError, WkvError
from wkv.training import parse_recipe, resume_recipe, train
from wkv.training.checkpoint import latest_checkpoint, load_training
from wkv.training.log import read_log

from .helpers import options, pairs, tiny

STEPS = 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, of which some are held out."""
    return write_corpus(tmp_path_factory.mktemp("texts"), files=24, words=12)


def base_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of a tiny model over bytes."""
    path = folder / f"{name}.safetensors"
    torch.manual_seed(5)
    model = wkv.create_model(name, vocab_size=256, hidden_size=32, num_layers=1, **small.options(name, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim > 1:
                parameter.normal_(std=0.2)
    wkv.save_model(model.to(dtype), path)
    return path


def recipe_values(source: Path, start: Path, method: str | None, **train_options: Any) -> dict[str, Any]:
    tuned = {k: v for k, v in options(method).items() if k in ("rank", "mini_rank")} if method else {}
    return {
        "data": {"source": str(source), "tokenizer": "bytes", "order": "padded"},
        "train": {
            "start_from": str(start), "steps": STEPS, "context_length": 16, "batch_size": 2, "learning_rate": 1e-2,
            "warmup_steps": 1, "weight_decay": 0.0, "eval_every": 2, "eval_bytes": 60, "checkpoint_every": 100,
            **train_options,
        },
        "tuning": {"method": method, **tuned},
    }  # fmt: skip


def interrupt_after(patch: pytest.MonkeyPatch, batches: int) -> None:
    """Ctrl-C while batch number `batches` is drawn."""
    drawn, draw = [0], RowSampler.next_batch

    def next_batch(self: RowSampler) -> Any:
        drawn[0] += 1
        if drawn[0] == batches:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self)

    patch.setattr(RowSampler, "next_batch", next_batch)


def same_files(a: Path, b: Path) -> None:
    """The same adapter, optimizer, and log."""
    ours, theirs = (tuning.files.read_adapter(run / "adapter.safetensors") for run in (a, b))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in ours.tensors)
    states = [leaves(load_training(latest_checkpoint(run) or run)) for run in (a, b)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        found = states[1][key]
        assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, key
    rows = [[{**row, "seconds": 0} for row in read_log(run / "log.csv")] for run in (a, b)]
    assert rows[0] == rows[1]


# Recipes do not say the configs of other methods of peft.
@pytest.mark.parametrize(("method", "name"), [pair for pair in pairs() if pair[0] != "peft"])
def test_a_resumed_run_is_an_uninterrupted_one(
    method: str, name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wkv.training.loop.draw_loss_curve", lambda *paths: None)
    start = base_model(tmp_path, name)
    content = start.read_bytes()
    values = recipe_values(texts, start, method, ema=0.8 if method in ("miss", "lora", "state") else None)
    whole = train(parse_recipe(values), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        # LoRA-GA has drawn batches of its own before the first step.
        interrupt_after(patch, 3 + 4 * (method == "lora-ga"))
        broken = train(parse_recipe(values), tmp_path / "parts")
    assert not broken.finished
    assert 0 < broken.steps < STEPS
    parts = train(resume_recipe(tmp_path / "parts"), tmp_path / "parts", resume=True)
    assert parts.bits_per_byte == whole.bits_per_byte
    same_files(tmp_path / "parts", tmp_path / "whole")
    assert start.read_bytes() == content
    assert not (tmp_path / "whole" / "model.safetensors").exists()
    assert whole.model == str(tmp_path / "whole" / "adapter.safetensors")
    losses = [row["loss"] for row in read_log(tmp_path / "whole" / "log.csv") if "loss" in row]
    assert losses[-1] != losses[0]
    adapter = tuning.load(whole.model, wkv.load_model(start))
    assert whole.parameters == adapter.num_parameters


@pytest.mark.parametrize("base", ["bfloat16", "nf4", "fp4", "int8-block", "int8-row"])
def test_frozen_bases(base: str, texts: Path, tmp_path: Path) -> None:
    values = recipe_values(texts, base_model(tmp_path, "rwkv7"), "bone-row", steps=3)
    values["tuning"]["base"] = base
    result = train(parse_recipe(values), tmp_path / "run")
    adapter = tuning.load(result.model, wkv.load_model(tmp_path / "rwkv7.safetensors"))
    assert any(bool(p.abs().max() > 0) for p in adapter.named_parameters().values())
    adapter.verify()


def test_lora_plus_has_two_rates(texts: Path, tmp_path: Path) -> None:
    from wkv.training.optimizer import parameter_groups

    model = tiny("rwkv7")
    tuning.create("lora-plus", model, rank=4, learning_rate_ratio=8.0)
    groups = {group["factor"]: group["names"] for group in parameter_groups(model, 0.1)}
    assert set(groups) == {1.0, 8.0}
    assert all("lora_B" in name for name in groups[8.0])
    assert all("lora_A" in name for name in groups[1.0])


def test_an_adapter_goes_on_from_a_file(texts: Path, tmp_path: Path) -> None:
    start = base_model(tmp_path, "rwkv7")
    first = train(parse_recipe(recipe_values(texts, start, "miss")), tmp_path / "first")
    values = recipe_values(texts, start, None)
    values["tuning"] = {"adapter": first.model}
    second = train(parse_recipe(values), tmp_path / "second")
    losses = [[r["loss"] for r in read_log(Path(run.out) / "log.csv") if "loss" in r] for run in (first, second)]
    assert losses[1][0] < losses[0][0]
    assert tuning.load(second.model, wkv.load_model(start)).method == "miss"


def test_answers_alone_are_scored(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"number {i}?" * 3, "response": "yes"} for i in range(20)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe_values(chats, base_model(tmp_path, "rwkv7"), "bone-row", eval_bytes=None, context_length=64)
    result = train(parse_recipe(values), tmp_path / "run")
    assert result.held_out_bytes == len(" yes")
    assert result.bits_per_byte is not None
    assert result.bits_per_byte > 0


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("tuning", {"method": "bone"}, "tuning.method: 'bone' is the guided form"),
        ("tuning", {"method": None}, "tuning.rank goes with tuning.method"),
        ("tuning", {"adapter": "a.safetensors"}, "tuning.method: the adapter of tuning.adapter has a method"),
        ("tuning", {"base": "int3"}, "tuning.base must be one of float32, bfloat16, nf4"),
        ("tuning", {"rank": 0}, "tuning.rank must be an integer of at least 1"),
        ("tuning", {"ranks": 3}, "tuning.ranks: there is no such key; did you mean rank"),
        ("train", {"start_from": None}, "trains an adapter of a model; name the model in train.start_from"),
        ("train", {"epochs": 2}, "give one of train.steps, train.tokens, train.seconds and train.epochs, found"),
    ],
)
def test_recipes_that_cannot_be(section: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, tmp_path / "m.safetensors", "bone-row")
    values[section] |= change
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        parse_recipe(values)


def test_states_are_not_reset(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, tmp_path / "m.safetensors", "state")
    values["data"]["order"] = "packed"
    with pytest.raises(RecipeError, match=r'state trains the state .*, data\.order "packed" resets it'):
        parse_recipe(values)


def test_options_a_method_does_not_have(texts: Path, tmp_path: Path) -> None:
    values = recipe_values(texts, base_model(tmp_path, "rwkv7"), "bone-row")
    values["tuning"]["alpha"] = 3.0
    with pytest.raises(WkvError, match="bone-row has no option 'alpha'"):
        train(parse_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_epochs(texts: Path, tmp_path: Path) -> None:
    from wkv.data import load_documents
    from wkv.training.run import read_corpus, rich_console, with_steps

    values = recipe_values(texts, base_model(tmp_path, "rwkv7"), "bone-row", steps=None, epochs=2.0)
    recipe = parse_recipe(values)
    corpus = read_corpus(recipe, lambda documents: wkv.tokenizers.load("bytes"), rich_console(quiet=True))
    documents = len(load_documents(str(texts))) - 1  # every 20th is held out
    assert with_steps(recipe, corpus.store).steps == documents  # of two rows, each document twice
    packed = parse_recipe({**values, "data": {**values["data"], "order": "packed"}})
    assert with_steps(packed, corpus.store).steps == -(-2 * corpus.store.num_tokens // 32)
    result = train(recipe, tmp_path / "run")
    assert result.steps == documents
    patient = with_steps(parse_recipe({**values, "train": {**values["train"], "warmup_steps": 99}}), corpus.store)
    assert patient.warmup_steps == documents // 5
