"""`wkv quantize`, and the other verbs on its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import wkv
from tests.quantization.helpers import small_model
from wkv.cli import app
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, WkvError)
    return str(result.exception)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    wkv.save_model(small_model(), tmp_path / "model.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("bits", [8, 4])
def test_file_and_report(bits: int, source: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "small.safetensors", tmp_path / "report.json"
    options = ("--text", tmp_path / "text.txt", "--tokens", 300, "--ablation", "--report", report)
    result = call("quantize", source, target, "--bits", bits, *options)
    assert result.exit_code == 0, result.exception
    for words in ("on disk", "bits per byte", "ffn_value", "RMS logit change", "low_rank float16"):
        assert words in result.stdout
    found = json.loads(report.read_text())
    assert found["file_bytes"] == {"before": source.stat().st_size, "after": target.stat().st_size}
    assert found["file_bytes"]["after"] < 0.5 * found["file_bytes"]["before"]
    after = bits_per_byte(wkv.load_model(target), [TEXT[:300]])
    assert math.isclose(found["quality"]["others"]["all"]["bits_per_byte"], after, rel_tol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["model.safetensors", "report.json", "small.safetensors", "text.txt"]
    )


def test_other_verbs_take_the_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    assert call("quantize", source, target, "--bits", 4, "--no-quality").exit_code == 0
    information = call("info", target)
    assert information.exit_code == 0
    assert "int4 (12 tensors" in " ".join(information.stdout.split())
    generated = call("generate", target, "abc", "--max-tokens", 5, "--seed", 1)
    assert generated.exit_code == 0, generated.exception
    assert "model is quantised already" in refused("quantize", target, tmp_path / "again.safetensors")


def test_policy(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    changes = ("--policy", "head=float16", "--policy", "att=keep")
    assert call("quantize", source, target, "--no-quality", *changes).exit_code == 0
    assert wkv.checkpoints.inspect(target).dtypes["int8"] == 5  # emb, and key and value of two channel mixes


def test_gguf(source: Path, tmp_path: Path) -> None:
    result = call("quantize", source, tmp_path / "model.gguf", "--type", "Q4_0")
    assert result.exit_code == 0, result.exception
    assert "Q4_0" in wkv.checkpoints.inspect(tmp_path / "model.gguf").dtypes


def test_without_held_out_text(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the speeches are not installed
    result = call("quantize", source, tmp_path / "small.safetensors")
    assert result.exit_code == 0, result.exception
    assert "quality was not measured" in result.stdout


def test_errors_come_before_the_work(source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.safetensors"
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    cases = {
        "same file": (source, source),
        "exists already": (source, taken),
        "must end in": (source, tmp_path / "new.pth"),
        "no folder": (source, tmp_path / "nowhere" / "new.safetensors"),
        "no such file of held-out text": (source, new, "--text", tmp_path / "none.txt"),
        "no such file or folder": (tmp_path / "none.safetensors", new),
        "bits must be 8 or 4": (source, new, "--bits", 5),
        "GROUP=KIND": (source, new, "--policy", "head"),
        "unknown group": (source, new, "--policy", "heads=int8"),
        "head can be stored as": (source, new, "--policy", "head=int5"),
        "--type is for files": (source, new, "--type", "Q4_0"),
        "takes --type": (source, tmp_path / "new.gguf", "--policy", "head=int8"),
    }
    for words, arguments in cases.items():
        assert words in refused("quantize", *arguments)
    assert taken.read_bytes() == b"mine"
    assert not new.exists()


def test_a_failed_write_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    before = sorted(tmp_path.iterdir())
    assert "No space left" in refused("quantize", source, tmp_path / "small.safetensors", "--no-quality")
    assert sorted(tmp_path.iterdir()) == before
