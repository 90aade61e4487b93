"""Whole runs: learning, exact resume, safe checkpoints, folders, divergence."""

from __future__ import annotations

import io
import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import wkv
from wkv.data import Batch, UniformWindows
from wkv.errors import CheckpointError, DataError, RecipeError, WkvError
from wkv.evaluation import bits_per_byte
from wkv.training import Recipe, Result, parse_recipe, read_result, resume_recipe, train
from wkv.training.checkpoint import latest_checkpoint, load_training
from wkv.training.log import COLUMNS, read_log
from wkv.training.loop import resolve_precision

from .helpers import recipe_values, tiny_recipe, write_corpus


def run(recipe: Recipe, out: Path, resume: bool = False) -> Result:
    return train(recipe, out, resume, Console(file=io.StringIO()))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Press Ctrl-C while batch number `batches` is being drawn."""
    original, drawn = UniformWindows.next_batch, []

    def next_batch(self: UniformWindows) -> Batch:
        drawn.append(None)
        if len(drawn) == batches:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(UniformWindows, "next_batch", next_batch)


def parameters(path: str | Path) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in wkv.load_model(path).named_parameters()}


def losses(out: Path) -> list[tuple[float, ...]]:
    """Everything in the log that does not depend on the clock."""
    return [tuple(v for k, v in row.items() if k != "seconds") for row in read_log(out / "log.csv")]


def test_a_run_learns_and_leaves_a_complete_folder(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    result = run(tiny_recipe(corpus, steps=60, warmup_steps=5), tmp_path / "run")
    rows = read_log(tmp_path / "run/log.csv")
    steps = [row["loss"] for row in rows if "loss" in row]
    assert len(steps) == result.steps == 60
    assert sum(steps[-5:]) / 5 < 0.6 * steps[0]
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [10, 20, 30, 40, 50, 60]
    assert rows[0]["tokens"] == 4 * 24
    assert (tmp_path / "run/log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert result == read_result(tmp_path / "run")
    model = wkv.load_model(result.model)
    assert model.tokenizer.encode("ab") == [97, 98]
    held_out = [(corpus / "19.txt").read_text()]
    assert bits_per_byte(model, held_out) == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert result.bits_per_byte is not None
    assert result.bits_per_byte < 4
    assert result.held_out_bytes == len(held_out[0])


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        first = run(recipe, tmp_path / "parts")
    assert not first.finished
    assert first.steps == 13
    assert first.bits_per_byte is None
    assert read_result(tmp_path / "parts") is None
    assert wkv.load_model(first.model) is not None
    second = run(resume_recipe(tmp_path / "parts"), tmp_path / "parts", resume=True)
    assert second.finished
    assert second.steps == 20
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = parameters(tmp_path / "whole/model.safetensors"), parameters(second.model)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    states = [load_training(Path(latest_checkpoint(tmp_path / name) or "")) for name in ("whole", "parts")]
    moments = [[v for s in state["optimizer"]["state"].values() for v in s.values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the log after that checkpoint are written again, a torn last line does no harm."""
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"), checkpoint_every=5)
    run(recipe, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    original = UniformWindows.next_batch
    count = iter(range(100))
    monkeypatch.setattr(UniformWindows, "next_batch", lambda self: original(self) if next(count) < 8 else die())
    with pytest.raises(Killed):
        run(recipe, tmp_path / "parts")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000005"]
    with (tmp_path / "parts/log.csv").open("a") as file:
        file.write("9,86")
    run(recipe, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    run(recipe, tmp_path / "whole")
    monkeypatch.setattr(UniformWindows, "next_batch", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe, tmp_path / "parts")
    monkeypatch.undo()
    run(recipe, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("place", ["model", "training", "rename"])
def test_a_save_that_fails_leaves_the_old_checkpoint_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from wkv.training import checkpoint

    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    run(recipe, tmp_path / "whole")
    before = checkpoint.save_checkpoint

    def failing(*args: Any) -> Path:
        if args[1] < 20:
            return before(*args)
        with monkeypatch.context() as patch:
            target = {"model": (wkv, "save_model"), "training": (torch, "save"), "rename": (checkpoint.os, "replace")}
            patch.setattr(*target[place], _no_space)
            return before(*args)

    monkeypatch.setattr("wkv.training.loop.save_checkpoint", failing)
    with pytest.raises(CheckpointError, match=r"step-00000020.*cannot be written.*No space left"):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000010"]
    assert parameters(tmp_path / "run/model.safetensors").keys()
    assert run(recipe, tmp_path / "run", resume=True).steps == 20
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def _no_space(*args: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_budget_of_seconds_ends_and_carries_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"), steps=None, seconds=1.0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        first = run(recipe, tmp_path / "run")
    assert 0 < first.seconds < 1
    second = run(recipe, tmp_path / "run", resume=True)
    assert second.finished
    assert second.seconds >= 1
    rows = [row for row in read_log(tmp_path / "run/log.csv") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, second.steps + 1))
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(rows))


def test_a_finished_run_can_be_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    run(recipe, tmp_path / "run")
    longer = resume_recipe(tmp_path / "run", ["train.steps=25"])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        run(longer, tmp_path / "run", resume=True)
    assert read_result(tmp_path / "run") is None
    assert run(longer, tmp_path / "run", resume=True).steps == 25
    assert (
        resume_recipe(tmp_path / "run", ["model.hidden_size=32", "train.learning_rate=5e-3"]) is not None
    )  # no change
    with pytest.raises(RecipeError, match=r"train\.learning_rate cannot change"):
        resume_recipe(tmp_path / "run", ["train.learning_rate=1"])


@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": True}, {"schedule": "exponential"}, {"precision": "auto"}]
)
def test_options_train(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tiny_recipe(write_corpus(tmp_path / "corpus"), **change), tmp_path / "run")
    rows = [row["loss"] for row in read_log(tmp_path / "run/log.csv") if "loss" in row]
    assert rows[-1] < rows[0]


def test_bfloat16_training_keeps_and_measures_a_float32_model(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    scores = {}
    for precision in ("fp32", "bf16"):
        result = run(tiny_recipe(corpus, precision=precision), tmp_path / precision)
        model = wkv.load_model(result.model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert bits_per_byte(model, [(corpus / "19.txt").read_text()]) == pytest.approx(result.bits_per_byte, rel=1e-6)
        scores[precision] = result.bits_per_byte
    assert scores["bf16"] != scores["fp32"]
    assert scores["bf16"] == pytest.approx(scores["fp32"], rel=0.03)


def test_auto_precision_depends_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert resolve_precision("auto") == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert [resolve_precision(name) for name in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]


def test_threads_are_those_of_the_recipe_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), set()
    original = UniformWindows.next_batch
    monkeypatch.setattr(
        UniformWindows, "next_batch", lambda self: (seen.add(torch.get_num_threads()), original(self))[1]
    )
    run(tiny_recipe(write_corpus(tmp_path / "corpus"), steps=5, threads=before + 1), tmp_path / "run")
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_trained_vocabulary_is_kept_and_saved_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_values(write_corpus(tmp_path / "corpus"), steps=5)
    values["data"] |= {"tokenizer": "bpe", "vocab_size": 280}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        run(parse_recipe(values), tmp_path / "run")
    monkeypatch.setattr(wkv.tokenizers.BPETokenizer, "train", _no_space)  # must not be trained again
    result = run(resume_recipe(tmp_path / "run"), tmp_path / "run", resume=True)
    model = wkv.load_model(result.model)
    assert model.tokenizer.vocab_size == model.config.vocab_size == 280
    assert model.tokenizer.decode(model.tokenizer.encode("the union")) == "the union"


def test_folders_in_use_are_refused_and_untouched(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(WkvError, match=r"is not empty.*--resume"):
        run(recipe, out)
    with pytest.raises(WkvError, match="holds no run to resume"):
        run(recipe, out, resume=True)
    with pytest.raises(RecipeError, match="holds no run to resume"):
        resume_recipe(out)
    with pytest.raises(WkvError, match="is a file"):
        run(recipe, out / "mine.txt")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_bad_text_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    short = write_corpus(tmp_path / "short", files=1, words=5)
    for recipe in (tiny_recipe(tmp_path / "missing"), tiny_recipe(short, context_length=500)):
        with pytest.raises(DataError):
            run(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wkv.training import objective

    calls = iter(range(100))
    original = objective.head_loss
    poison = lambda *args, **options: original(*args, **options) * (float("nan") if next(calls) == 14 else 1.0)  # noqa: E731
    monkeypatch.setattr(objective, "head_loss", poison)
    with pytest.raises(WkvError, match=r"diverged at step 14: loss nan.*train\.learning_rate"):
        run(tiny_recipe(write_corpus(tmp_path / "corpus")), tmp_path / "run")
    assert (latest_checkpoint(tmp_path / "run") or Path()).name == "step-00000010"


def test_damaged_training_state(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus"))
    run(recipe, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000020/training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"training\.pt: not the training state"):
        run(resume_recipe(tmp_path / "run", ["train.steps=30"]), tmp_path / "run", resume=True)
