"""A run that is killed 20 times, at any moment and inside saves, ends as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import wkv
from wkv.training.checkpoint import Position, latest_checkpoint, load_training
from wkv.training.log import read_log

from .helpers import recipe_values, write_corpus

SCRIPT = Path(__file__).with_name("killed.py")


def rows(run: Path) -> list[tuple[float, ...]]:
    """Everything in the log that does not depend on the clock."""
    return [tuple(v for k, v in row.items() if k != "seconds") for row in read_log(run / "log.csv")]


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and number in nested containers, without clocks."""
    value = vars(value) if isinstance(value, Position) else value
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in leaves(inner, f"{name}.{key}").items()}
    return {} if name.endswith("seconds") else {name: value}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    values = recipe_values(
        write_corpus(tmp_path / "corpus"), steps=100, checkpoint_every=3, eval_every=7, ema=0.9, accumulate=2,
        context_length=16, segment=10, segment_mode="exact", guard=2, spike=5.0, keep_last=2, keep_best=True,
        schedule="wsd",
    )  # fmt: skip
    values["data"]["order"] = "stream"
    OmegaConf.save(OmegaConf.create(values), tmp_path / "recipe.yaml")
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path / "recipe.yaml"), str(tmp_path), "11"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [attempt["end"] for attempt in attempts] == ["killed"] * 20 + ["exit 0"], done.stdout + done.stderr
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert rows(parts) == rows(whole)
    assert len([row for row in read_log(parts / "log.csv") if "loss" in row]) == 100
    for name in ("model.safetensors", "best.safetensors"):
        found, expected = (dict(wkv.load_model(run / name).named_parameters()) for run in (parts, whole))
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    found, expected = (leaves(load_training(latest_checkpoint(run) or run)) for run in (parts, whole))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
