"""`wkv eval` from end to end, on models that learn nothing in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from wkv.cli import app
from wkv.errors import WkvError
from wkv.evaluation.synthetic import comparison

SMALL = [
    "vocab_size=32", "length=16", "pairs=2", "train.steps=3", "train.batch_size=4", "train.validation_samples=8",
    "train.test_samples=8", "--quick",
]  # fmt: skip


def wkv(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def text(result: Result) -> str:
    """The output of a command that succeeded, without line breaks in tables."""
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = text(wkv("mqar", *SMALL, "--models", "rwkv4,rwkv7:head_size=8,label=narrow heads", "--seeds", "0,1"))
    assert "narrow heads lr=0.005 seed=1" in output
    assert "3 steps in" in output
    assert "written to runs/eval-mqar: result.json, report.md, plot.png" in output
    for name in ("result.json", "report.md", "plot.png"):
        assert (tmp_path / "runs/eval-mqar" / name).stat().st_size > 500
    assert "known from an earlier start" in text(wkv("mqar", *SMALL, "--models", "rwkv4"))


def test_options_reach_the_runs(tmp_path: Path) -> None:
    options = ["--models", "rwkv4", "--learning-rates", "1e-3,2e-3", "--widths", "16", "--lengths", "16,20"]
    text(wkv("mqar", *SMALL, *options, "--channel-mix", "--untied-head", "--init", "0.5", "--out", tmp_path))
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [run["settings"]["learning_rate"] for run in runs] == [1e-3, 2e-3]
    assert {run["width"] for run in runs} == {16}
    assert [test["length"] for test in runs[0]["tests"]] == [16, 20]
    assert runs[0]["frame"] == {"channel_mix": True, "tied_head": False, "embedding_std": 0.5}


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = comparison.train_run
    left = iter([original])

    def interrupted(*arguments: object) -> object:
        return next(left, _press)(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(comparison, "train_run", interrupted)
    stopped = wkv("mqar", *SMALL, "--models", "rwkv4,rwkv7", "--out", tmp_path)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.output
    monkeypatch.setattr(comparison, "train_run", original)
    output = text(wkv("mqar", *SMALL, "--models", "rwkv4,rwkv7", "--out", tmp_path))
    assert output.count("known from an earlier start") == 1


def _press(*arguments: object) -> object:
    raise KeyboardInterrupt


def test_the_list() -> None:
    output = text(wkv("--list"))
    for word in ("mqar", "running_parity", "rwkv7", "quick", "zoology"):
        assert word in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a task before any KEY=VALUE; one of .*mqar"),
        (["pairs=4"], "needs a task"),
        (["chess"], "task 'chess' is unknown; one of .*mqar"),
        (["mqar", "pairs"], "expected KEY=VALUE, found 'pairs'"),
        (["mqar", "--models", "gpt5"], "model 'gpt5' is unknown"),
        (["mqar", "--seeds", "one"], "--seeds is a list of numbers"),
        (["mqar", "--widths", "1.5"], "--widths is a list of numbers"),
        (["mqar", "--preset", "slow"], "preset 'slow' is unknown"),
        (["mqar", "train.steps=none"], "either steps or epochs"),
    ],
)
def test_one_clear_error(arguments: list[str], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        text(wkv(*arguments))
