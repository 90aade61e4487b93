"""Experiment trackers (TensorBoard, Weights & Biases, trackio), all through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wkv.errors import RecipeError

PROJECT = "wkv"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed: accelerate would leave them out without a word.

    Raises:
        RecipeError: naming the package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"train.trackers: {name} is not installed: pip install {name}")


def start_trackers(accelerator: Any, run: Path, recipe: Mapping[str, Any]) -> None:
    """Open the trackers that `accelerator` was made with, and send them the recipe."""
    options = {"wandb": {"name": run.name, "dir": str(run)}, "trackio": {"name": run.name}}
    accelerator.init_trackers(PROJECT, dict(_flat(recipe)), options)


def stop_trackers(accelerator: Any) -> None:
    """Let the trackers finish."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Nested values under names such as train.steps; what trackers cannot hold becomes text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float) else str(value)
