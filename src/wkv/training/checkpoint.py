"""Checkpoints of a training run: everything needed to go on exactly where it stopped, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel

MODEL, TRAINING = "model.safetensors", "training.pt"


@dataclass
class Position:
    """How far a run is: finished steps and the seconds they took."""

    step: int = 0
    seconds: float = 0.0


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place of `path`.

    Raises:
        CheckpointError: if the file cannot be written; whatever was at `path` is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing([path]) as [temporary]:
            write(temporary)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def save_checkpoint(
    run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, sampler: dict[str, Any], position: Position
) -> Path:
    """Write `run/checkpoints/step-N/` with the model and the state of the training, then drop older checkpoints.

    The folder gets its name when it is complete, so an interrupted save leaves the previous checkpoint in force.
    `run/model.safetensors` is always the model of the newest checkpoint.
    """
    from wkv import save_model

    final = run / "checkpoints" / f"step-{position.step:08d}"
    if final.is_dir():  # the same step of the same run
        return final
    temporary = final.with_name(f".{os.getpid()}.{final.name}")
    training = {
        "optimizer": optimizer.state_dict(),
        "sampler": sampler,
        "position": asdict(position),
        "rng": torch.get_rng_state(),
    }
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_model(model, temporary / MODEL)
        torch.save(training, temporary / TRAINING)
        os.replace(temporary, final)
    except (OSError, RuntimeError, WkvError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"{final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_file(run / MODEL, lambda path: _link(final / MODEL, path))
    for old in final.parent.iterdir():  # also what a killed process left behind
        if old != final and "step-" in old.name:
            shutil.rmtree(old)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, None if there is none."""
    return max(_checkpoints(run), default=None, key=lambda path: path.name)


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` stored beside the model: optimizer, sampler, rng and position.

    Raises:
        CheckpointError: if the file is missing, truncated or foreign.
    """
    path = checkpoint / TRAINING
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "position": Position(**state["position"])}
    except Exception as error:  # torch.load raises many types for damaged files
        raise CheckpointError(f"{path}: not the training state of a checkpoint ({error})") from error


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("step-*") if path.is_dir()]


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, or a copy of it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
