"""Adapters of other programs: read onto a model, and written for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wkv.checkpoints.official import TUNED_SLOTS
from wkv.errors import CheckpointError, WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import Adapter
from wkv.tuning.create import create, mount_file
from wkv.tuning.files import copy_tensors
from wkv.tuning.mounting import linear_layers, require_language_model


def import_adapter(
    path: str | os.PathLike[str],
    model: LanguageModel,
    name: str | None = None,
    method: str | None = None,
    ignore_others: bool = False,
) -> Adapter:
    """Mount an adapter that another program wrote, active.

    Understood are: folders of peft (LoRA and its family, MiSS, Bone); Bone, DiSHA and MiSS files of RWKV-PEFT and
    JL-er/Bone; tuned states of RWKV-PEFT, RWKV-LM and RWKV-Runner. None of them says which base it belongs to: that is
    for you to know.

    Args:
        path: the file or folder.
        model: the base it was trained on.
        name: of the adapter on the model; by default the file's name.
        method: canonical name of the Bone variant, where the file leaves it open.
        ignore_others: leave out parameters that were trained along with a Bone adapter, in place of an error.

    Raises:
        CheckpointError: if the file cannot be read or understood.
        WkvError: if it does not fit the model.
    """
    model, path = require_language_model(model), Path(path)
    name = name or path.stem.replace(".", "-")
    kind = _kind(path)
    if kind == "state":
        return _import_state(path, model, name)
    if kind == "bone":
        return _import_bone(path, model, name, method, ignore_others)
    from wkv.tuning.peft_files import read_peft

    return mount_file(read_peft(path, model), model, name, str(path))


def _kind(path: Path) -> str:
    """ "state", "bone" or "peft", by the names of the tensors."""
    from wkv.checkpoints.files import open_archive
    from wkv.tuning.bone_files import FORMATS

    source = path
    if path.is_dir():
        found = [path / f"adapter_model{suffix}" for suffix in (".safetensors", ".bin")]
        source = next((file for file in found if file.is_file()), path)
    archive = open_archive(source)
    leaves = {key.rpartition(".")[2] for key in archive.tensors}
    bone = {n for variants in FORMATS.values() for names in variants.values() for n in names.values()}
    if leaves & bone:
        return "bone"
    if any(key.endswith(f".{slot}") for key in archive.tensors for slot in TUNED_SLOTS):
        return "state"
    if path.is_dir():
        return "peft"
    raise CheckpointError(
        f"{path}: no adapter that is known here: neither Bone or MiSS, nor a tuned state, nor a folder of peft with "
        "its adapter_config.json"
    )


def _import_state(path: Path, model: LanguageModel, name: str) -> Adapter:
    from wkv.tuning.state_files import import_state

    state = import_state(path, model)
    shifts = any(bool(layer[slot].any()) for layer in state.layers for slot in layer if slot.endswith("shift"))
    return create("fullstate" if shifts else "state", model, name, init=state)


def _import_bone(path: Path, model: LanguageModel, name: str, method: str | None, ignore_others: bool) -> Adapter:
    from wkv.tuning.bone_files import read_bone

    layers: dict[str, Any] = linear_layers(model)
    shapes = {key: (int(layer.out_features), int(layer.in_features)) for key, layer in layers.items()}
    file = read_bone(path, method, shapes)
    if file.others and not ignore_others:
        raise WkvError(
            f"{path} also holds {len(file.others)} other trained parameters, such as {min(file.others)}: load them "
            "into the model first, then pass ignore_others=True"
        )
    adapter = create(file.variant, model, name, targets=list(file.layers), **file.options)
    tensors = {f"{layer}.{key}": value for layer, values in file.layers.items() for key, value in values.items()}
    try:
        copy_tensors(tensors, adapter.tensors(), str(path))
    except WkvError:
        adapter.remove()
        raise
    return adapter


def export_adapter(adapter: Adapter, path: str | os.PathLike[str], format: str | None = None) -> None:
    """Write an adapter for another program.

    Args:
        adapter: a mounted one.
        path: a file, or for peft a folder.
        format: "peft" (LoRA family), "bone", "disha", "peft-bone" or "peft-miss" (Bone family, see
            `wkv.tuning.bone_files`), "rwkv" or "runner" (states, see `wkv.tuning.state_files`). By default the one of
            the method that today's programs read: "peft", "peft-miss" or "bone", "rwkv".

    Raises:
        WkvError: if the method has no such format, or the file cannot be written.
    """
    from wkv.tuning.bone import VARIANTS

    if adapter.method in VARIANTS:
        from wkv.tuning.bone_files import BoneFile, write_bone

        layers: dict[str, dict[str, Any]] = {}
        for key, tensor in adapter.tensors().items():
            layer, _, parameter = key.rpartition(".")
            layers.setdefault(layer, {})[parameter] = tensor
        options = {key: adapter.options[key] for key in ("rank", "mini_rank") if adapter.options[key] is not None}
        default = "bone" if adapter.method in ("bone-row", "bone-ab") else "peft-miss"
        write_bone(path, BoneFile(adapter.method, layers, options), format or default)
    elif adapter.method in ("state", "fullstate"):
        from wkv.tuning.state import StateAdapter
        from wkv.tuning.state_files import export_state

        assert isinstance(adapter, StateAdapter)
        export_state(adapter.initial.state(), path, format or "rwkv")
    elif adapter.kind == "weights" and format in (None, "peft"):
        from wkv.tuning.peft_files import write_peft

        write_peft(path, adapter)  # type: ignore[arg-type]
    else:
        raise WkvError(f"no other program reads {adapter.method} as {format or 'a file'}; use the method save")
