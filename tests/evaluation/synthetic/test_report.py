"""Summaries, tables and pictures of given runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wkv.evaluation.synthetic.plot import plot
from wkv.evaluation.synthetic.report import contender_rows, markdown, summary


def row(contender: str, rate: float, seed: int, validation: float, *accuracies: float, **more: Any) -> dict[str, Any]:
    scores = {"sequence_accuracy": 0.0, "last_accuracy": 0.5, "loss": 1.0}
    lengths = [12 * 2**place for place in range(len(accuracies))]
    return {
        "task": "parity", "chance": 0.5, "case": "", "width": None, "contender": contender, "model": contender,
        "options": {}, "parameters": 100, "state_bytes": 64, "settings": {"learning_rate": rate}, "seed": seed,
        "steps": 100 + seed, "seconds": 10.0, "stopped_early": False,
        "curve": [{"step": 50, "accuracy": validation / 2}, {"step": 100, "accuracy": validation}],
        "validation": {"accuracy": validation, "loss": 1.0, **more.pop("found", {})},
        "test_parts": [{"length": length} for length in lengths],
        "tests": [
            {"label": str(length), "length": length, "accuracy": accuracy, "state_bytes": 64, **scores}
            for length, accuracy in zip(lengths, accuracies, strict=True)
        ],
        **more,
    }  # fmt: skip


def test_the_learning_rate_is_chosen_on_validation_samples_and_seeds_are_averaged() -> None:
    rows = [
        row("a", 0.1, 0, 0.7, 0.9), row("a", 0.1, 1, 0.7, 0.9),
        row("a", 0.2, 0, 0.9, 0.6), row("a", 0.2, 1, 0.8, 0.8),
    ]  # fmt: skip
    [entry] = summary(rows)["cases"][0]["entries"]
    assert entry["learning_rate"] == 0.2
    assert entry["validation_accuracy_by_rate"] == {"0.1": 0.7, "0.2": pytest.approx(0.85)}
    assert entry["accuracy"]["mean"] == pytest.approx(0.7)
    assert entry["accuracy"]["deviation"] == pytest.approx(0.02**0.5)
    assert entry["accuracy"]["values"] == [0.6, 0.8]
    assert (entry["seeds"], entry["steps"]) == ([0, 1], 100.5)


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    rows = [row("a", 0.1, 0, 1.0, 0.9, found={"loss": 0.3}), row("a", 0.2, 0, 1.0, 0.9, found={"loss": 0.1})]
    assert summary(rows)["cases"][0]["entries"][0]["learning_rate"] == 0.2


def test_of_several_lengths_the_first_counts_of_several_kinds_the_mean() -> None:
    by_length = row("a", 0.1, 0, 0.7, 0.9, 0.5)
    result = summary([by_length])
    assert result["cases"][0]["entries"][0]["accuracy"]["mean"] == 0.9
    assert result["score"] == "test samples of length 12"
    kinds = {**by_length, "test_parts": [{"length": None}, {"length": None}]}
    result = summary([kinds])
    assert result["cases"][0]["entries"][0]["accuracy"]["mean"] == pytest.approx(0.7)
    assert result["score"] == "mean of 2 kinds of test samples"


def test_the_page_and_the_picture(tmp_path: Path) -> None:
    rows = [row(name, 0.1, seed, 0.7, 0.9, 0.5, 0.4) for name in ("a", "b") for seed in (0, 1)]
    rows += [row("a", 0.1, 0, 0.7, 0.9, 0.5, 0.4, width=width, case="K=4") for width in (16, 32)]
    result = {**summary(rows), "preset": "quick"}
    page = markdown(result)
    assert "| a | 0.900 ± 0.000 | 0.000 ± 0.000 | 0.500 ± 0.000 | 64 | 100 | 0.1 | 100 | 10.0 | 10.1 | 2 |" in page
    assert "| a, d=16 | 0.900 | 0.500 | 0.400 |" in page
    assert "## K=4" in page
    assert "A blind guess reaches 0.500" in page
    assert contender_rows(result["cases"][0])[1][0] == "b"
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
