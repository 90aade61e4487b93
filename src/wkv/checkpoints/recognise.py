"""From an archive to a model: which one it is, its configuration, and every tensor under the model's own name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints import detect
from wkv.checkpoints.archive import NOT_STORED, Archive, Stored, listing, printable
from wkv.checkpoints.based_names import is_released, read_released
from wkv.checkpoints.foreign import refuse_foreign, refuse_variants
from wkv.checkpoints.official import FIELDS, TITLES, is_tuned_key, official_keys
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.meta import without_values
from wkv.registry import create_config, entry

_PREFIX = re.compile(r"^((_forward_module|module|_orig_mod)\.|model\.(?=(emb|blocks|ln_out|head)\.))+")


@dataclass
class Checkpoint:
    """A recognised archive.

    Args:
        archive: what was read.
        name: registered name of the model.
        fields: configuration, as far as the file tells it.
        tensors: parameter name -> tensor.
        tuned: tensors of a tuned initial state, by their official names.
        tokenizer: description of the tokenizer, if the file has one.
        notes: what was converted or filled in.
        untold: fields without which there is no model, and which nothing in the file tells.
    """

    archive: Archive
    name: str
    fields: dict[str, Any]
    tensors: dict[str, Stored]
    tuned: dict[str, Stored] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model's name for people."""
        return TITLES.get(self.name, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds most of the values: that of the large matrices."""
        counts: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            if stored.dtype is not None:
                counts[stored.dtype] += stored.numel
        return counts.most_common(1)[0][0] if counts else torch.float32


def recognise(archive: Archive) -> Checkpoint:
    """Name the model and bring its tensors to the model's own names.

    Raises:
        CheckpointError: if it is no model, an unknown variant, or its shapes contradict each other.
    """
    if "wkv" in archive.metadata:
        return _from_description(archive)
    refuse_foreign(archive)
    if is_released(archive.tensors):
        tensors, fields, untold = read_released(archive)
        notes = [*archive.notes, "named as the released BASED models"]
        return Checkpoint(archive, "based", fields, tensors, notes=notes, untold=untold)
    tensors = without_prefixes(archive)
    tuned = {key: tensors.pop(key) for key in list(tensors) if is_tuned_key(key)}
    if tuned and not tensors:
        raise archive.error("a tuned state without its model; pass both files as a list: load_model([model, state])")
    if not any(key in tensors for key in ("emb.weight", "head.weight")):
        found = listing(printable(key) for key in (*tensors, *archive.extras))
        raise archive.error(f"not an RWKV model: expected keys such as emb.weight, found {found}")
    name = detect.model_name({key: stored.shape for key, stored in tensors.items()})
    refuse_variants(archive, name, tensors)
    checkpoint = Checkpoint(archive, name, {}, tensors, tuned, notes=list(archive.notes))
    _convert_bonus(checkpoint)
    _read_sizes(checkpoint)
    _add_gguf_fields(checkpoint)
    _fill_first_layer(checkpoint)
    return checkpoint


def without_prefixes(archive: Archive) -> dict[str, Stored]:
    """The tensors under their names without what trainers and wrappers put before them.

    Raises:
        CheckpointError: if two then have the same name.
    """
    tensors: dict[str, Stored] = {}
    for key, stored in archive.tensors.items():
        short = _PREFIX.sub("", key)
        if short in tensors:
            raise archive.error(f"{printable(short)} occurs twice, with and without a prefix such as _forward_module.")
        tensors[short] = stored
    return tensors


def _read_sizes(checkpoint: Checkpoint) -> None:
    shapes = {key: stored.shape for key, stored in checkpoint.tensors.items()}
    layers = detect.layer_count(checkpoint.archive, shapes)
    letters = detect.sizes(checkpoint.archive, checkpoint.name, shapes)
    checkpoint.fields = {FIELDS[letter]: value for letter, value in letters.items() if letter != "H"}
    checkpoint.fields["num_layers"] = layers
    if checkpoint.name == "temporal":
        checkpoint.fields["ffn_pre"] = any(key.startswith("blocks.0.ffnPre.") for key in shapes)


def _add_gguf_fields(checkpoint: Checkpoint) -> None:
    """GGUF metadata tell the eps of the norms and the tokenizer."""
    told = json.loads(checkpoint.archive.metadata.get("gguf", "{}"))
    checkpoint.fields = {**told.get("fields", {}), **checkpoint.fields}
    checkpoint.tokenizer = told.get("tokenizer")


def _convert_bonus(checkpoint: Checkpoint) -> None:
    """Files keep the bonus as its logarithm `time_first` or as its value `time_faaaa`, whatever their version."""
    if checkpoint.name not in ("rwkv5_0", "rwkv5_1", "rwkv5", "rwkv6"):
        return
    stored_name, own_name = "time_first", "time_faaaa"
    if checkpoint.name == "rwkv5_0":
        stored_name, own_name = own_name, stored_name
    tensors = checkpoint.tensors
    found = [key for key in tensors if key.endswith(f".att.{stored_name}")]
    for key in found:
        own = key.removesuffix(stored_name) + own_name
        if own not in tensors:
            tensors[own] = tensors.pop(key).then(_bonus(checkpoint.archive, key, own_name))
    if found:
        inverse = "exp" if own_name == "time_faaaa" else "log"
        checkpoint.notes.append(f"{stored_name} becomes {own_name} = {inverse}({stored_name})")


def _bonus(archive: Archive, key: str, own_name: str) -> Any:
    def convert(x: Tensor) -> Tensor:
        if own_name == "time_faaaa":
            return x.double().exp()  # rounded once, to the type that is loaded
        if not (x > 0).all():
            problem = "holds a bonus that is not positive, which RWKV-5.0 (bonus = exp(time_first)) cannot express"
            raise archive.error(f"{key} {problem}")
        return x.double().log()

    return convert


def _fill_first_layer(checkpoint: Checkpoint) -> None:
    """The first layer of RWKV-7 never reads its value-residual weights, and some files leave them out."""
    names = [f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")]
    if not checkpoint.name.startswith("rwkv7") or any(name in checkpoint.tensors for name in names):
        return
    hidden, width = checkpoint.fields.get("hidden_size"), checkpoint.fields.get("attention_size")
    rank = checkpoint.fields.setdefault("value_rank", 32)
    if hidden is None or width is None:
        return
    line = torch.linspace(-0.5, 0.5, width, dtype=torch.float64)
    values = (0.73 - 0.4 * line).reshape(1, 1, -1), torch.zeros(hidden, rank), torch.zeros(rank, width)
    for name, value in zip(names, values, strict=True):
        shape, label = tuple(value.shape), checkpoint.archive.label
        checkpoint.tensors[name] = Stored(shape, checkpoint.dtype, NOT_STORED, label, value.clone)
    checkpoint.notes.append("v0, v1, v2 of the first layer are not in the file; filled in (the model never reads them)")


def _from_description(archive: Archive) -> Checkpoint:
    """A file written by `save_model(..., format="wkv")` says itself what it is."""
    try:
        described = json.loads(archive.metadata["wkv"])
        name, fields, tokenizer = described["model"], dict(described["config"]), described["tokenizer"]
        entry(name)
        if tokenizer is not None and not isinstance(tokenizer, dict):
            raise TypeError(f"its tokenizer is {tokenizer!r}, expected a description or null")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise archive.error(f"its metadata 'wkv' does not describe a model ({error})") from error
    tensors = dict(archive.tensors)
    tuned = {key: tensors.pop(key) for key in list(tensors) if is_tuned_key(key)}
    # A damaged description must not make us build a model that the file cannot hold.
    limit = max(2, sum(stored.numel for stored in tensors.values()))
    for key, value in fields.items():
        if isinstance(value, int) and value > (len(tensors) if key == "num_layers" else limit):
            raise archive.error(f"its metadata 'wkv' says {key} = {value}, more than the file holds")
    return Checkpoint(archive, name, fields, tensors, tuned, tokenizer, list(archive.notes))


def build(checkpoint: Checkpoint, overrides: Mapping[str, Any] | None = None) -> LanguageModel:
    """The model without values (on the meta device).

    Args:
        checkpoint: what was recognised.
        overrides: configuration fields that no file tells, such as head_norm_eps.

    Raises:
        CheckpointError: if an override contradicts the file, or the file's sizes do not make a model.
        WkvError: for an unknown override.
    """
    error, overrides = checkpoint.archive.error, overrides or {}
    missing = [key for key in checkpoint.untold if key not in overrides]
    if missing:
        what = f"recognised as {checkpoint.title}, but no tensor tells its {', '.join(missing)}"
        raise error(f"{what}; give them, as in load_model(..., {missing[0]}=...)")
    told = {key: overrides[key] for key in checkpoint.untold}
    try:
        config = create_config(checkpoint.name, **checkpoint.fields, **told)
    except (WkvError, TypeError) as cause:
        missing = [key for key in official_keys(checkpoint.name, checkpoint.fields) if key not in checkpoint.tensors]
        rest = f"; missing {listing(missing)}" if missing else ""
        raise error(f"recognised as {checkpoint.title}, but its sizes do not make one: {cause}{rest}") from cause
    for key, value in overrides.items():
        if key in checkpoint.fields and not key.endswith("_eps") and checkpoint.fields[key] != value:
            raise error(f"{key} is {checkpoint.fields[key]!r} in the file, it cannot be {value!r}")
    if overrides:
        config = create_config(checkpoint.name, **{**checkpoint.fields, **overrides})
    with without_values():
        model: LanguageModel = entry(checkpoint.name).model_class(config)
    return model


@dataclass
class Problems:
    """What keeps a checkpoint from being loaded: keys, or sentences that begin with one."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misfits)

    def __str__(self) -> str:
        parts = [listing(self.misfits)] if self.misfits else []
        parts += [f"missing {listing(self.missing)}"] if self.missing else []
        parts += [f"unexpected {listing(self.unexpected)}"] if self.unexpected else []
        return "; ".join(parts)


def compare(checkpoint: Checkpoint, model: LanguageModel) -> Problems:
    """Hold the tensors against the parameters of the model."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = Problems(missing=[key for key in expected if key not in checkpoint.tensors])
    problems.unexpected = [printable(key) for key in checkpoint.tensors if key not in expected]
    problems.unexpected += [f"{printable(key)} ({kind})" for key, kind in checkpoint.archive.extras.items()]
    for key in checkpoint.tensors.keys() & expected.keys():
        stored = checkpoint.tensors[key]
        if not fits(stored.shape, expected[key]):
            problems.misfits.append(f"{key} has shape {list(stored.shape)}, expected {list(expected[key])}")
        elif stored.dtype is None:
            problems.misfits.append(f"{key} has type {stored.kind}, expected float32, bfloat16, float16 or float64")
    return problems


def fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor can be reshaped by adding or dropping dimensions of 1."""
    return [size for size in found if size != 1] == [size for size in expected if size != 1]
