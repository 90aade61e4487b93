"""Adapter files of the Bone family as other programs write them.

| format    | written by                        | parameter                | tensors                               |
|-----------|-----------------------------------|--------------------------|---------------------------------------|
| bone      | JL-er/Bone, RWKV-PEFT until 2025  | bone                     | bone-col, bone-row [., r, r];         |
|           |                                   |                          | first bone-col [O, r]; miss [r, O]    |
|           |                                   | bone_A and bone_B        | bone-ab [I / r, r, r]                 |
| disha     | RWKV-PEFT, 2025                   | disha                    | miss [r, O], bone-row [I / r, r, r]   |
| peft-bone | peft 0.14 to 0.18, `BoneConfig`   | bone_block               | miss [r, O], bone-col [O / r, r, r]   |
| peft-miss | peft since 0.17, `MissConfig`     | miss_block               | the same, and miss-mini [r, m]        |

Keys are `<prefix><layer>.<parameter>`; the prefix of peft is "base_model.model.".

"bone", "bat" and "disha" have changed their meaning over time, and shapes agree where a layer has as many inputs as
outputs. So a variant is taken from what decides it (shapes, `adapter_config.json`, the caller) and never guessed.

Shape letters: O outputs, I inputs, r rank, m mini rank.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, Stored, listing, printable
from wkv.checkpoints.files import open_archive
from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing
from wkv.tuning.bone import GUIDED, VARIANTS, check_variant, parameter_shapes
from wkv.tuning.files import read_peft_config

# format -> variant -> our parameter -> name in the file
FORMATS: dict[str, dict[str, dict[str, str]]] = {
    "bone": {
        "bone-col": {"B": "bone"},
        "bone-row": {"B": "bone"},
        "bone-ab": {"A": "bone_A", "B": "bone_B"},
        "miss": {"D": "bone"},
    },
    "disha": {"bone-row": {"B": "disha"}, "miss": {"D": "disha"}},
    "peft-bone": {"bone-col": {"B": "bone_block"}, "miss": {"D": "bone_block"}},
    "peft-miss": {
        "bone-col": {"B": "miss_block"},
        "miss": {"D": "miss_block"},
        "miss-mini": {"D": "miss_block"},
    },
}
_FORMAT_OF = {name: f for f, variants in FORMATS.items() for names in variants.values() for name in names.values()}

_CONFIG, _WEIGHTS, _PEFT_PREFIX = "adapter_config.json", "adapter_model", "base_model.model."
_RWKV_LAYER = re.compile(r"blocks\.\d+\.")

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Origin:
    """How a file was written.

    Args:
        format: one of `FORMATS`.
        prefix: in front of the layers' names.
        flat: whether the blocks of bone-col are stored as one matrix [O, r].
        config: content of `adapter_config.json`, if there was one.
    """

    format: str
    prefix: str = ""
    flat: bool = False
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class BoneFile:
    """An adapter of the Bone family in no particular format.

    Args:
        variant: one of `wkv.tuning.bone.VARIANTS`.
        layers: path of the layer -> parameter (A, B, D) -> tensor, in the type of the file.
        options: what `wkv.tuning.create` needs: `rank`, and `mini_rank` for miss-mini.
        others: everything else in the file under its key, such as norms that were trained along.
        origin: how it was written; None for a new one.
    """

    variant: str
    layers: dict[str, dict[str, Tensor]]
    options: dict[str, int]
    others: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None


class _Entry(NamedTuple):
    key: str
    prefix: str
    layer: str
    name: str  # of the parameter, in the file
    stored: Stored


# ---------------------------------------------------------------- reading


def read_bone(path: str | os.PathLike[str], variant: str | None = None, shapes: Shapes | None = None) -> BoneFile:
    """Read an adapter that JL-er/Bone, RWKV-PEFT or peft wrote.

    Args:
        path: a .pth, .bin or .safetensors file, or a folder of peft.
        variant: what the adapter is, where the file leaves it open.
        shapes: path of the layer -> (O, I) in the model it is for. Decides the variant where it can, and is checked.

    Returns:
        the adapter. Prefixes are taken off layers that are called as ours ("blocks.0.att.key"); other names are kept.

    Raises:
        CheckpointError: if the file cannot be read, holds no such adapter, leaves its variant open, or contradicts
            the variant, its configuration or `shapes`.
        WkvError: for an unknown variant.
    """
    if variant is not None:
        check_variant(variant)
    archive, config = _open(Path(path))
    entries, others = _entries(archive)
    form = _common(archive, entries, [_FORMAT_OF[entry.name] for entry in entries], "format")
    prefix = _common(archive, entries, [entry.prefix for entry in entries], "prefix")
    found = _decide(archive, entries, form, _told(archive, config, variant), shapes or {})
    options = _options(archive, entries, found, config)
    layers = _layers(archive, entries, form, found, options["rank"])
    flat = found == "bone-col" and _common(archive, entries, [len(e.stored.shape) for e in entries], "layout") == 2
    rest = {key: stored.read().clone() for key, stored in others.items()}
    return BoneFile(found, layers, options, rest, Origin(form, prefix, flat, config))


def _open(path: Path) -> tuple[Archive, dict[str, Any] | None]:
    """The tensors, and the configuration beside them."""
    files = sorted(path.glob(f"{_WEIGHTS}.*"), reverse=True) if path.is_dir() else []  # .safetensors before .bin
    weights = files[0] if files else path
    config = weights.with_name(_CONFIG)
    if not weights.name.startswith(f"{_WEIGHTS}.") or not config.is_file():
        return open_archive(weights), None
    return open_archive(weights), read_peft_config(config)


def _entries(archive: Archive) -> tuple[list[_Entry], dict[str, Stored]]:
    """The adapter's tensors, and the others."""
    entries, others = [], {}
    for key, stored in archive.tensors.items():
        layer, _, name = key.rpartition(".")
        if not layer or name not in _FORMAT_OF:
            others[key] = stored
            continue
        if stored.dtype is None:
            raise archive.error(f"{printable(key)} has type {stored.kind}, expected floating numbers")
        prefix, layer = _without_prefix(layer)
        entries.append(_Entry(key, prefix, layer, name, stored))
    if not entries:
        keys = listing(printable(key) for key in archive.tensors) or "nothing"
        raise archive.error(f"no adapter of the Bone family: no key ends in {', '.join(_FORMAT_OF)} (found {keys})")
    return entries, others


def _without_prefix(layer: str) -> tuple[str, str]:
    """("base_model.model.model.", "blocks.0.att.key"); names of other models are kept, but for peft's own prefix."""
    inner = layer.removeprefix(_PEFT_PREFIX)
    bare = inner.removeprefix("model.")
    inner = bare if _RWKV_LAYER.match(bare) else inner
    return layer.removesuffix(inner), inner


def _common(archive: Archive, entries: list[_Entry], values: list[Any], what: str) -> Any:
    """The one value that all entries have."""
    for entry, value in zip(entries, values, strict=True):
        if value != values[0]:
            pair = f"{printable(entries[0].key)} and {printable(entry.key)}"
            raise archive.error(f"{pair} are of different adapters: their {what} differs; store them in two files")
    return values[0]


def _told(archive: Archive, config: dict[str, Any] | None, variant: str | None) -> set[str]:
    """The variants that caller and configuration leave."""
    if config is None:
        return set(VARIANTS) if variant is None else {variant}
    kind = config.get("peft_type")
    if kind not in ("BONE", "MISS"):
        raise archive.error(f"{_CONFIG} describes an adapter of type {kind!r}, expected BONE or MISS")
    init = config.get("init_weights", True)
    known = {"bat": "bone-col", "mini": "miss-mini", True: "miss", False: "miss"}
    if not isinstance(init, bool | str) or init not in known:
        raise archive.error(f"{_CONFIG} has init_weights {init!r}, expected true, false, 'bat' or 'mini'")
    if variant not in (None, known[init]):
        raise archive.error(f"{_CONFIG} says init_weights {init!r}, which is {known[init]}, not {variant}")
    return {known[init]}


def _decide(archive: Archive, entries: list[_Entry], form: str, left: set[str], shapes: Shapes) -> str:
    """The only variant that all shapes allow."""
    for entry in entries:
        sizes = shapes.get(entry.layer)
        possible = {v for v in left if _stored_as(form, v, entry) and (sizes is None or _fits(v, entry, sizes))}
        if not possible:
            where = "" if sizes is None else f" on a layer with {sizes[0]} outputs and {sizes[1]} inputs"
            tried = " or ".join(v for v in VARIANTS if v in left)
            shape = list(entry.stored.shape)
            raise archive.error(f"{printable(entry.key)} has shape {shape}, which is not {tried} in this format{where}")
        left = possible
    if len(left) > 1:
        choices = " or ".join(v for v in VARIANTS if v in left)
        raise archive.error(
            f"shapes such as {list(entries[0].stored.shape)} can be {choices}; pass variant= to say which"
        )
    return left.pop()


def _stored_as(form: str, variant: str, entry: _Entry) -> bool:
    """Whether the format keeps the variant in such a tensor."""
    if entry.name not in FORMATS[form].get(variant, {}).values():
        return False
    shape = entry.stored.shape
    if 0 in shape:
        return False
    if variant not in GUIDED:
        return len(shape) == 2
    if len(shape) == 2:
        return (form, variant) == ("bone", "bone-col") and shape[0] % shape[1] == 0
    return len(shape) == 3 and shape[1] == shape[2]


def _fits(variant: str, entry: _Entry, sizes: tuple[int, int]) -> bool:
    shape = entry.stored.shape
    if variant == "miss-mini" and shape[1] == sizes[0]:
        return False  # as many columns as outputs: that is miss
    try:
        expected = parameter_shapes(variant, *sizes, **_ranks(variant, shape))
    except WkvError:
        return False
    blocks = (shape[0] // shape[1], shape[1], shape[1])
    return (blocks if variant in GUIDED and len(shape) == 2 else shape) in expected.values()


def _ranks(variant: str, shape: tuple[int, ...]) -> dict[str, int]:
    if variant in GUIDED:
        return {"rank": shape[-1]}
    return {"rank": shape[0], "mini_rank": shape[1]} if variant == "miss-mini" else {"rank": shape[0]}


def _options(archive: Archive, entries: list[_Entry], variant: str, config: dict[str, Any] | None) -> dict[str, int]:
    """The rank that all layers and the configuration agree on."""
    options = _ranks(variant, entries[0].stored.shape)
    for entry in entries:
        found = _ranks(variant, entry.stored.shape)
        if found != options:
            others = f"{printable(entry.key)} has {found}, {printable(entries[0].key)} has {options}"
            raise archive.error(f"{others}; one adapter has one rank")
    for name, key in (("rank", "r"), ("mini_rank", "mini_r")):
        told = options.get(name) if config is None else config.get(key, options.get(name))
        if name in options and told != options[name]:
            raise archive.error(f"{_CONFIG} says {key} {told!r}, but {printable(entries[0].key)} has {options[name]}")
    return options


def _layers(
    archive: Archive, entries: list[_Entry], form: str, variant: str, rank: int
) -> dict[str, dict[str, Tensor]]:
    ours = {name: parameter for parameter, name in FORMATS[form][variant].items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        tensor = entry.stored.read().clone()
        layers.setdefault(entry.layer, {})[ours[entry.name]] = (
            tensor.view(-1, rank, rank) if variant in GUIDED else tensor
        )
    for layer, parameters in layers.items():
        if (
            len({tensor.shape for tensor in parameters.values()}) > 1
            or parameters.keys() != FORMATS[form][variant].keys()
        ):
            raise archive.error(f"{printable(layer)} needs {' and '.join(ours)} of one shape")
    return layers


# ---------------------------------------------------------------- writing


def write_bone(path: str | os.PathLike[str], adapter: BoneFile, format: str | None = None) -> None:
    """Write an adapter for other programs. What `read_bone` read comes out with the same keys, shapes and bits.

    Args:
        path: for "bone" and "disha" a file, .pth or .safetensors; for the formats of peft a folder, made if need be.
        adapter: what to write; cast tensors beforehand if the program wants another type.
        format: one of `FORMATS`; that of the origin by default.

    Raises:
        CheckpointError: if it cannot be written.
        WkvError: if the format does not know the variant, or none is given.
    """
    origin = adapter.origin if adapter.origin is not None and format in (None, adapter.origin.format) else None
    form = format or (origin.format if origin else None)
    if form is None or form not in FORMATS or adapter.variant not in FORMATS[form]:
        able = [name for name, variants in FORMATS.items() if adapter.variant in variants]
        advice = f"choose {' or '.join(able)}" if able else "no other program stores it"
        raise WkvError(f"format {form!r} cannot hold {adapter.variant}; {advice}")
    peft = form.startswith("peft-")
    origin = origin or Origin(form, _PEFT_PREFIX if peft else "")
    tensors = {**_named(adapter, origin), **adapter.others}
    path = Path(path)
    try:
        if peft:
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(origin.config or _new_config(adapter, form), indent=2)
            with replacing([path / f"{_WEIGHTS}.safetensors", path / _CONFIG]) as [weights, config]:
                _save(weights, tensors)
                config.write_text(text + "\n", encoding="utf-8")
        else:
            with replacing([path]) as [weights]:
                _save(weights, tensors)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _named(adapter: BoneFile, origin: Origin) -> dict[str, Tensor]:
    names, named = FORMATS[origin.format][adapter.variant], {}
    for layer, parameters in adapter.layers.items():
        for parameter, name in names.items():
            tensor = parameters[parameter].detach()
            named[f"{origin.prefix}{layer}.{name}"] = tensor.flatten(0, 1) if origin.flat else tensor
    return named


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(own, path, {"format": "pt"})
    elif path.suffix in (".pth", ".pt"):
        torch.save(own, path)
    else:
        raise WkvError(f"the file must end in .pth or .safetensors, found {path.suffix or 'no suffix'}")


def _new_config(adapter: BoneFile, form: str) -> dict[str, Any]:
    """The least that peft needs to load the folder."""
    init = {"bone-col": "bat", "miss-mini": "mini", "miss": True}[adapter.variant]
    config = {"peft_type": form.removeprefix("peft-").upper(), "r": adapter.options["rank"], "init_weights": init}
    if adapter.variant == "miss-mini":
        config["mini_r"] = adapter.options["mini_rank"]
    return {**config, "target_modules": list(adapter.layers), "bias": "none", "inference_mode": True}
