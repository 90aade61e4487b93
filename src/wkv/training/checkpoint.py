"""Checkpoints of a training run: everything needed to go on exactly where it stopped, written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing
from wkv.state import State

MODEL, EMA, TRAINING = "model.safetensors", "ema.safetensors", "training.pt"
ADAPTER = "adapter.safetensors"  # what is there in place of the model where an adapter is trained
BEST = "best.safetensors"
# What `training.pt` holds.
ENTRIES = ("optimizer", "sampler", "position", "best", "guard", "ema_steps", "carried", "rng")

Writer = Callable[[Path], None]


@dataclass
class Position:
    """How far a run is: finished steps, the seconds they took, and the tokens they read."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def write_file(path: Path, write: Writer) -> None:
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
    run: Path, step: int, files: Mapping[str, Writer], keep_last: int = 1, best_step: int | None = None
) -> Path:
    """Write `run/checkpoints/step-N/`, then drop older checkpoints.

    The folder gets its name when it is complete, so an interrupted save leaves the previous checkpoint in force.
    `run/model.safetensors` (or `run/adapter.safetensors`) is always the model of the newest checkpoint, and
    `run/best.safetensors` that of the best one; of a checkpoint with `ema.safetensors`, that is the model.

    Args:
        run: the run folder.
        step: N.
        files: names, and what writes each of them.
        keep_last: how many checkpoints stay, this one included.
        best_step: the one that stays besides, if there is one to keep.

    Raises:
        CheckpointError: if it cannot be written.
    """
    final = _folder(run, step)
    if not final.is_dir():  # otherwise it is the same step of the same run
        _write(final, files)
    publish(run, keep_last, best_step)
    return final


def publish(run: Path, keep_last: int, best_step: int | None = None) -> None:
    """Let the run folder show its newest and its best checkpoint, and drop those that are not kept.

    It completes what a killed process did not come to.
    """
    found = sorted(_checkpoints(run))
    if not found:
        return
    _show(found[-1], run / artifact(found[-1]))
    best = None if best_step is None else _folder(run, best_step)
    if best in found:
        _show(best, run / BEST)
    for old in found[-1].parent.iterdir():
        if old not in (*found[-keep_last:], best) and "step-" in old.name:
            _delete(old)


def artifact(folder: Path) -> str:
    """The name of what a checkpoint or run is about: its model, or its adapter."""
    return ADAPTER if (folder / ADAPTER).is_file() else MODEL


def clear_rubbish(run: Path) -> None:
    """Delete what a killed process left half-written in a run folder."""
    for path in run.iterdir() if run.is_dir() else ():
        if is_rubbish(path):
            path.unlink()


def is_rubbish(path: Path) -> bool:
    """Whether it is a file that was not finished, see `wkv.files.replacing`."""
    return path.is_file() and re.match(r"\.[0-9a-f]{8}\.", path.name) is not None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, None if there is none."""
    return max(_checkpoints(run), default=None, key=lambda path: path.name)


def write_training(state: dict[str, Any]) -> Writer:
    """What writes the state of a training run: plain values and tensors."""
    return lambda path: torch.save(state, path)


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What was stored beside the model, with `position` as a `Position`.

    Raises:
        CheckpointError: if the file is missing, truncated or foreign.
    """
    path = checkpoint / TRAINING
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in ENTRIES if name not in state]
        if missing:
            raise WkvError(f"it has no {missing[0]!r}; was it written by an older version?")
        return {**state, "position": Position(**state["position"])}
    except Exception as error:  # torch.load raises many types for damaged files
        raise CheckpointError(f"{path}: not the training state of a checkpoint ({error})") from error


def pack_state(state: State | None) -> dict[str, Any] | None:
    """A model's state as plain values and tensors on the CPU."""
    if state is None:
        return None
    on_cpu = state.detach().to("cpu")
    return {"model": on_cpu.model, "layers": on_cpu.layers}


def unpack_state(packed: Mapping[str, Any] | None, device: torch.device) -> State | None:
    """The state that `pack_state` packed."""
    return None if packed is None else State(packed["model"], packed["layers"]).to(device)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("step-*") if path.is_dir()]


def _write(final: Path, files: Mapping[str, Writer]) -> None:
    """Every file, on the disk, before the folder gets its name."""
    temporary = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            write(temporary / name)
            _settle(temporary / name)
        os.replace(temporary, final)
        _settle(final.parent)
    except (OSError, RuntimeError, WkvError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"{final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _delete(checkpoint: Path) -> None:
    """Take a checkpoint its name first: half of one is none."""
    hidden = checkpoint
    if not checkpoint.name.startswith("."):
        hidden = checkpoint.with_name(f".{secrets.token_hex(4)}.{checkpoint.name}")
        os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _settle(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _show(checkpoint: Path, path: Path) -> None:
    """Let `path` be the model of a checkpoint."""
    model = checkpoint / (EMA if (checkpoint / EMA).is_file() else artifact(checkpoint))
    if not (path.is_file() and os.path.samefile(model, path)):
        write_file(path, lambda temporary: _link(model, temporary))


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, or a copy of it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
