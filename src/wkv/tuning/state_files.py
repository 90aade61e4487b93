"""Tuned states in the layouts of other programs, and in 8 bits.

- "rwkv": what RWKV-LM and RWKV-PEFT write: a .pth (or .safetensors) file with `blocks.{i}.att.time_state`
  [H, N_value, N_key], whatever the version, and for the method "fullstate" `blocks.{i}.att.ts_state` and
  `blocks.{i}.ffn.ts_state` [C].
- "runner": what RWKV-Runner and its kin mount: the same .pth with one `time_state` per layer and nothing else.
- "int8": ours, a quarter of the size: codes and one scale per head, `blocks.{i}.att.time_state.scale` [H].
- The `rwkv` package of PyPI has no file but a list of tensors per sequence, see `to_rwkv_pip`; Runner makes it from the
  file. There RWKV-5 and 6 keep [H, N_key, N_value], RWKV-7 and our states [H, N_value, N_key].

Shape letters: H heads, N head size, C channels, A attention channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wkv.checkpoints import detect
from wkv.checkpoints.archive import Archive, Stored, listing, printable
from wkv.checkpoints.files import Source, open_archive
from wkv.checkpoints.loading import parse_dtype
from wkv.checkpoints.official import TITLES, is_tuned_key, official_keys, split_key
from wkv.checkpoints.recognise import Checkpoint, without_prefixes
from wkv.checkpoints.tuned import tuned_state, tuned_tensors
from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel
from wkv.state import State, check_compatible
from wkv.tuning.mounting import base_parameters
from wkv.tuning.state import empty_state

LAYOUTS = {"rwkv": (".pth", ".safetensors"), "runner": (".pth",), "int8": (".safetensors",)}
ENTRY = "wkv_tuned_state"  # metadata of our .safetensors files: which model the state is for
SCALE = ".scale"
_ORDER = {"wkv": ("att_shift", "wkv", "ffn_shift"), "num": ("att_shift", "num", "den", "max", "ffn_shift")}
_KEY_FIRST = ("rwkv5_0", "rwkv5_1", "rwkv5", "rwkv6")
_ADVICE = "load the model it was tuned on"
# Metadata of files that hold states in other ways -> how to read them.
_OTHERS = {
    "wkv_state": "written by State.save; read it with wkv.State.load",
    "wkv_adapter": "an adapter of this library; mount it with wkv.tuning.load",
}


def import_state(source: Source, model: LanguageModel, *, ignore_weights: bool = False) -> State:
    """Read a tuned state in any layout that `export_state` writes.

    Keys may begin with "model." or another prefix of trainers.

    Args:
        source: a .pth or .safetensors file, or a state dict.
        model: the model the state is for.
        ignore_weights: whether the file may also hold weights of the model, which are left alone.

    Returns:
        the state of one sequence, float32, on the model's device; what the file does not hold is empty.

    Raises:
        CheckpointError: for other keys, numbers of layers or heads, head sizes or versions, or values not finite.
    """
    archive = open_archive(source)
    for entry, advice in _OTHERS.items():
        if entry in archive.metadata:
            raise archive.error(advice)
    _check_version(archive, model)
    tensors = without_prefixes(archive)
    _decode(archive, tensors)
    tuned = {key: tensors.pop(key) for key in list(tensors) if is_tuned_key(key)}
    _check_others(archive, tensors, model, ignore_weights)
    if not tuned:
        raise archive.error("no tuned state in it: expected keys such as blocks.0.att.time_state")
    empty = empty_state(model)
    _check_sizes(archive, tuned, empty)
    state = tuned_state(Checkpoint(archive, model.name, {}, {}, tuned), empty)
    for number, layer in enumerate(state.layers):
        for name, value in layer.items():
            if not torch.isfinite(value).all():
                raise archive.error(f"layer {number}: {name} holds values that are not finite")
    return state.to(model.ln_out.weight.device)


def _check_version(archive: Archive, model: LanguageModel) -> None:
    """Our files say which model they are for; those of others do not."""
    for entry in (ENTRY, "wkv"):
        if entry not in archive.metadata:
            continue
        try:
            name = json.loads(archive.metadata[entry])["model"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise archive.error(f"its metadata {entry!r} is damaged ({error})") from error
        if name != model.name:
            title, own = TITLES.get(name, printable(str(name))), TITLES.get(model.name, model.name)
            raise archive.error(f"holds a state of {title}, expected {own}; {_ADVICE}")


def _check_others(archive: Archive, others: dict[str, Stored], model: LanguageModel, ignore_weights: bool) -> None:
    """Weights of this model may be there if asked for, and nothing else at all."""
    official = official_keys(model.name, model.config.to_dict())
    known = {*official, *(name for name, _ in base_parameters(model))}
    unknown = [printable(key) for key in (*others, *archive.extras) if key not in known]
    if unknown and any(key.endswith("head.weight") for key in others):
        version = detect.model_name({key: stored.shape for key, stored in others.items()})
        if version != model.name:
            title, own = TITLES.get(version, version), TITLES.get(model.name, model.name)
            raise archive.error(f"holds {title}, expected a state of {own}; {_ADVICE}")
    if unknown:
        raise archive.error(f"unexpected {listing(unknown)}; expected a tuned state of {model.name}")
    if others and not ignore_weights:
        found = listing(printable(key) for key in others)
        raise archive.error(f"holds weights beside the state ({found}); pass ignore_weights=True to leave them alone")


def _check_sizes(archive: Archive, tuned: dict[str, Stored], empty: State) -> None:
    """Layers, heads and head size of the matrices, said in the words of the field."""
    matrices = [key for key in tuned if key.endswith("time_state")]
    if matrices and "wkv" not in empty.layers[0]:
        raise archive.error(f"holds states of RWKV-5, 6 or 7; {empty.model} keeps others. {_ADVICE.capitalize()}")
    layers = {number for number, _ in map(split_key, tuned)}  # type: ignore[misc]
    if layers != set(range(len(empty.layers))):
        found = f"layers {min(layers)} to {max(layers)}" if len(layers) > 1 else f"layer {min(layers)}"
        count = f"{len(layers)} layers ({found})"
        raise archive.error(f"holds states of {count}, expected {len(empty.layers)} layers; {_ADVICE}")
    for key in matrices:
        stored, (_, heads, size, _) = tuned[key], empty.layers[0]["wkv"].shape
        if len(stored.shape) != 3 or stored.shape[1] != stored.shape[2]:
            raise archive.error(f"{key} has shape {list(stored.shape)}, expected {[heads, size, size]}")
        if stored.shape != (heads, size, size):
            found = f"{stored.shape[0]} heads of size {stored.shape[1]}"
            raise archive.error(f"{key} has {found}, expected {heads} of size {size}; {_ADVICE}")


def _decode(archive: Archive, tensors: dict[str, Stored]) -> None:
    """Put float32 matrices in the place of 8-bit codes and their scales."""
    for key in [key for key in tensors if key.endswith(f".time_state{SCALE}")]:
        scale, name = tensors.pop(key), key.removesuffix(SCALE)
        codes = tensors.get(name)
        expected = (codes.shape[:1] if codes else None, torch.float32)
        if codes is None or codes.kind not in ("int8", "I8") or (scale.shape, scale.dtype) != expected:
            found = "nothing" if codes is None else f"{codes.kind} {list(codes.shape)}"
            pair = f"{key} is {scale.kind} {list(scale.shape)}, and {name} {found}"
            raise archive.error(f"{pair}; expected float32 [H] and int8 [H, N, N]")

        def read(codes: Stored = codes, scale: Stored = scale) -> Tensor:
            return codes.read().float() * scale.read().float()[:, None, None]

        tensors[name] = Stored(codes.shape, torch.float32, "int8", codes.origin, read)


def export_state(
    state: State,
    path: str | os.PathLike[str],
    layout: str = "rwkv",
    dtype: torch.dtype | str = torch.float32,
) -> None:
    """Write the tuned state of one sequence for other programs; the file appears only when it is complete.

    Args:
        state: such as `adapter.initial.state()` or `model.tuned_state`.
        path: .pth or .safetensors.
        layout: "rwkv", "runner" or "int8", see above.
        dtype: of the values; with "int8" those that are not codes.

    Raises:
        WkvError: for an unknown layout, suffix or type, and states that the layout cannot hold.
        CheckpointError: if the file cannot be written.
    """
    path, float_type = Path(path), parse_dtype(dtype)
    if layout not in LAYOUTS:
        raise WkvError(f"layout {layout!r} is unknown; one of {', '.join(LAYOUTS)}")
    if path.suffix not in LAYOUTS[layout]:
        raise WkvError(f"{path}: a file of layout {layout!r} ends in {' or '.join(LAYOUTS[layout])}")
    if state.batch_size != 1:
        raise WkvError(
            f"a file holds the state of one sequence, found {state.batch_size}; choose with state.select(row)"
        )
    tensors = {key: value.detach().cpu() for key, value in tuned_tensors(state).items()}
    shifts = [key for key in tensors if key.endswith("ts_state")]
    if layout == "runner" and shifts:
        raise WkvError(
            f"layout 'runner' starts token shift at zero, but the state has {listing(shifts, 1)}; write layout 'rwkv', "
            "or tune with method 'state' from an empty past"
        )
    encoded = _encoded(tensors) if layout == "int8" else {}
    plain = {key: value.to(float_type, copy=True) for key, value in tensors.items() if key not in encoded}
    _write(path, {**plain, **encoded}, state.model)


def _encoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit codes in place of the matrices, and one scale per head; errors are at most half a scale."""
    encoded = {}
    for key, value_HVK in tensors.items():
        if not key.endswith("time_state"):
            continue
        scale_H = value_HVK.float().abs().amax((1, 2)) / 127
        inverse_H = torch.where(scale_H > 0, 1 / scale_H, 0)
        encoded[key] = torch.round(value_HVK.float() * inverse_H[:, None, None]).to(torch.int8)
        encoded[key + SCALE] = scale_H
    return encoded


def _write(path: Path, tensors: dict[str, Tensor], model: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not path.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {path.parent}")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    try:
        with replacing([path]) as [temporary]:
            if path.suffix == ".safetensors":
                save_file(tensors, temporary, {ENTRY: json.dumps({"model": model})})
            else:
                with open(temporary, "wb") as file:
                    torch.save(tensors, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def to_rwkv_pip(state: State) -> list[Tensor]:
    """The state of one sequence as the list that the `rwkv` package takes and returns.

    Three tensors per layer, token shift [C], matrices, token shift [C]; for RWKV-4 five, with num, den and max [A].

    Raises:
        WkvError: if it is not the state of one sequence, or of a model that package does not know.
    """
    if state.batch_size != 1:
        raise WkvError(f"expected the state of one sequence, found {state.batch_size}; choose with state.select(row)")
    order = _order(state)
    turned = state.model in _KEY_FIRST
    rows = [layer[name][0].detach() for layer in state.layers for name in order]
    return [(row.mT if turned and row.ndim == 3 else row).clone(memory_format=torch.contiguous_format) for row in rows]


def from_rwkv_pip(tensors: Sequence[Tensor], model: LanguageModel) -> State:
    """The state of one sequence from a list of the `rwkv` package.

    Args:
        tensors: as `to_rwkv_pip` returns them, in any floating type.
        model: of the version and sizes the list is for: the list itself does not tell key-first matrices from
            value-first ones.

    Returns:
        the state, float32, on the model's device.

    Raises:
        WkvError: if number or shapes do not fit the model.
    """
    empty = empty_state(model)
    order, device = _order(empty), model.ln_out.weight.device
    if len(tensors) != len(order) * len(empty.layers):
        expected = f"{len(order)} for each of {len(empty.layers)} layers"
        raise WkvError(f"found {len(tensors)} tensors, expected {expected}; {_ADVICE}")
    rows = [row.mT if model.name in _KEY_FIRST and row.ndim == 3 else row for row in tensors]
    chunks = [rows[i : i + len(order)] for i in range(0, len(rows), len(order))]
    layers = [{name: row[None].float().to(device) for name, row in zip(order, chunk, strict=True)} for chunk in chunks]
    state = State(model.name, layers)
    check_compatible(state, empty)
    return state


def _order(state: State) -> tuple[str, ...]:
    """Names of a layer's slots in the order of the `rwkv` package."""
    for order in _ORDER.values():
        if set(order) == state.layers[0].keys():
            return order
    raise WkvError(f"the rwkv package knows no states of {state.model}, which are {', '.join(state.layers[0])}")
