"""Adapters of the LoRA family as folders of peft: `adapter_config.json` and `adapter_model.safetensors`.

Keys are "base_model.model.<layer>.lora_A.weight", "...lora_B.weight" and, for DoRA, "...lora_magnitude_vector". What
starts from a part of the weight (PiSSA, OLoRA, LoRA-GA) leaves as plain LoRA of twice the rank, which is exact:

    s B A - s B_0 A_0 = s [B, -B_0] [A; A_0]

Shape letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, listing, printable
from wkv.checkpoints.files import open_archive
from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel
from wkv.tuning.files import AdapterFile, read_peft_config
from wkv.tuning.lora import FROM_WEIGHT, PeftAdapter
from wkv.tuning.mounting import linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
_PREFIX = "base_model.model."
_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours -> peft's
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")

# Settings of a config that say nothing about what the tensors compute, and those that `read_peft` understands.
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
    "qalora_group_size",
)  # fmt: skip
_UNDERSTOOD = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
# Starts after which the frozen weight is the model's own.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


# ---------------------------------------------------------------- writing


def write_peft(path: str | os.PathLike[str], adapter: PeftAdapter) -> None:
    """Write an adapter as peft does. peft loads it on a model whose layers have the same names.

    Args:
        path: the folder; made if there is none.
        adapter: of a method of the LoRA family, on linear layers alone.

    Raises:
        CheckpointError: if it cannot be written.
        WkvError: if peft's files have no place for it.
    """
    if not isinstance(adapter, PeftAdapter):
        raise WkvError(f"folders of peft are written for the LoRA family, found {adapter.method}")
    if adapter.raw.sides:
        name = next(iter(adapter.raw.sides))
        raise WkvError(f"{name} is no layer, and files of peft do not say which parameter a tensor is for")
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in _outward(adapter).items()}
    text = json.dumps(_new_config(adapter), indent=2)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with replacing([path / f"{WEIGHTS}.safetensors", path / CONFIG]) as [weights, config]:
            save_file(tensors, weights, {"format": "pt"})
            config.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _outward(adapter: PeftAdapter) -> dict[str, Tensor]:
    """Key of the file -> tensor."""
    own = adapter.tensors()
    found: dict[str, Tensor] = {}
    for path in adapter.paths:
        parts = {name: own[f"{path}.{name}"] for name in _NAMES if f"{path}.{name}" in own}
        if adapter.method in FROM_WEIGHT:
            parts["lora_A"] = torch.cat([parts["lora_A"], own[f"{path}.initial_A"]])
            parts["lora_B"] = torch.cat([parts["lora_B"], -own[f"{path}.initial_B"]], 1)
        found |= {f"{_PREFIX}{path}.{_NAMES[name]}": value for name, value in parts.items()}
    return found


def _new_config(adapter: PeftAdapter) -> dict[str, Any]:
    """What peft needs to load the folder."""
    settings, twice = adapter.settings, 2 if adapter.method in FROM_WEIGHT else 1
    assert settings.alpha is not None
    return {
        "peft_type": "LORA",
        "r": settings.rank * twice,
        "lora_alpha": settings.alpha * twice,
        "lora_dropout": settings.dropout,
        "use_rslora": adapter.method == "rslora",
        "use_dora": adapter.method == "dora",
        "target_modules": adapter.paths,
        "bias": "none",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


# ---------------------------------------------------------------- reading


def read_peft(path: str | os.PathLike[str], model: LanguageModel) -> AdapterFile:
    """Read an adapter of the LoRA family that peft saved.

    Args:
        path: the folder, or the file with the weights in it.
        model: what it is for; its layers must be called as in the file, but for prefixes such as "base_model.model.".

    Returns:
        an adapter of method "lora", "rslora" or "dora", without samples of the base: peft keeps none.

    Raises:
        CheckpointError: if it cannot be read, or has something that these methods lack.
        WkvError: if it is for another model.
    """
    archive, config = _open(Path(path))
    method, options = _understood(config, archive)
    tensors: dict[str, Tensor] = {}
    paths: list[str] = []
    known = list(linear_layers(model))
    for key, stored in archive.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or stored.dtype is None:
            raise archive.error(f"{printable(key)} is no tensor of LoRA on a linear layer")
        layer = _layer(match[1], known, archive, model)
        tensors[f"{layer}.{match[2].replace('lora_magnitude_vector', 'magnitude')}"] = stored.read().float().clone()
        paths.append(layer)
    targets = [path for path in known if path in paths]
    _check_complete(tensors, targets, method, archive)
    return AdapterFile(method, {**options, "targets": targets}, model.name, model.config.to_dict(), tensors, {})


def _open(path: Path) -> tuple[Archive, dict[str, Any]]:
    """The tensors, and the configuration beside them."""
    files = sorted(path.glob(f"{WEIGHTS}.*"), reverse=True) if path.is_dir() else [path]  # .safetensors before .bin
    if not files:
        raise CheckpointError(f"{path}: no {WEIGHTS}.safetensors in this folder")
    return open_archive(files[0]), read_peft_config(files[0].with_name(CONFIG))


def _understood(config: dict[str, Any], archive: Archive) -> tuple[str, dict[str, Any]]:
    """Method and options that a configuration stands for."""
    if config.get("peft_type") != "LORA":
        raise archive.error(f"an adapter of peft_type {config.get('peft_type')!r}, expected LORA")
    neutral = {"bias": "none", "fan_in_fan_out": False}
    for key, value in config.items():
        if key not in _HARMLESS and key not in _UNDERSTOOD and value and value != neutral.get(key):
            raise archive.error(f"{CONFIG} sets {printable(key)}, which has no counterpart in this library")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise archive.error(
            f"it started from {start!r}, which changed weights that the file does not hold. In peft, save it with "
            "path_initial_model_for_weight_conversion: that makes plain LoRA of it"
        )
    rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    if rslora and dora:
        raise archive.error("DoRA with the scale of rsLoRA is no method here")
    options = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout", 0.0)}
    return "dora" if dora else "rslora" if rslora else "lora", options


def _layer(name: str, known: list[str], archive: Archive, model: LanguageModel) -> str:
    """The path in the model: what is in front of "blocks." does not matter."""
    path = name[name.find("blocks.") :] if "blocks." in name else name
    if path not in known:
        raise archive.error(f"it is for {printable(name)}; {model.name} has {listing(known)}")
    return path


def _check_complete(tensors: dict[str, Tensor], paths: list[str], method: str, archive: Archive) -> None:
    parts = ("lora_A", "lora_B", *(("magnitude",) if method == "dora" else ()))
    needed = {f"{path}.{part}" for path in paths for part in parts}
    if needed != tensors.keys():
        raise archive.error(f"{method} needs {', '.join(parts)} for each layer; look at {min(needed ^ tensors.keys())}")
