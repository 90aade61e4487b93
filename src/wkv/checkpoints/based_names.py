"""BASED as it was released (`hazyresearch/based-*`, the names of HazyResearch/based): found, named, and written back.

The files tell every size but three: a key matrix of H f rows does not say how many heads it has, and no tensor has the
size of the window. For the layouts of the released models they are known (the presets); for others they must be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, Shape, Stored, printable
from wkv.checkpoints.official import split_key
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.registry import entry

# Released name -> our names of its rows, one after the other.
_FRAME: dict[str, tuple[str, ...]] = {
    "embeddings.word_embeddings.weight": ("emb.weight",),
    "ln_f.weight": ("ln_out.weight",),
}
_EVERY: dict[str, tuple[str, ...]] = {
    "norm1.weight": ("ln1.weight",), "norm2.weight": ("ln2.weight",),
    "mlp.fc1.weight": ("ffn.up.weight", "ffn.gate.weight"), "mlp.fc2.weight": ("ffn.down.weight",),
}  # fmt: skip
_MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "convolution": {
        "mixer.in_proj.weight": ("att.value.weight", "att.gate.weight"),
        "mixer.in_proj.bias": ("att.value.bias", "att.gate.bias"),
        "mixer.conv.conv.weight": ("att.conv.weight",),
        "mixer.out_proj.weight": ("att.output.weight",), "mixer.out_proj.bias": ("att.output.bias",),
    },
    "linear": {
        "mixer.proj_q.weight": ("att.query.weight",), "mixer.proj_k.weight": ("att.key.weight",),
        "mixer.proj_v.weight": ("att.value.weight",), "mixer.out_proj.weight": ("att.output.weight",),
    },
    "window": {
        "mixer.Wqkv.weight": ("att.query.weight", "att.key.weight", "att.value.weight"),
        "mixer.out_proj.weight": ("att.output.weight",),
    },
}  # fmt: skip
_LAYER = {key: names for table in (_EVERY, *_MIXERS.values()) for key, names in table.items()}
_MARKS = {"mixer.Wqkv.weight": "window", "mixer.proj_q.weight": "linear"}

_PREFIX = re.compile(r"^(model\.)?transformer\.")
_KEY = re.compile(r"^layers\.(0|[1-9]\d{0,5})\.(.+)$", re.DOTALL)
_MIXER_KEY = re.compile(r"layers\.\d+\.mixer\.(in_proj|conv|proj_[qkv]|Wqkv)\.")
_HEAD = re.compile(r"^(model\.)?lm_head\.weight$")
# Left by training, or buffers that the official forward pass does not use.
_UNUSED = re.compile(r"metrics|^decay\.decay$")
# Fields that no tensor tells -> the kinds of layers that need them.
_UNTOLD = {"head_size": ("linear", "window"), "feature_size": ("linear",), "window": ("window",)}


class Place(NamedTuple):
    """Where the values of a parameter stand in a released file: part `part` of `parts` of the rows of `key`."""

    key: str
    part: int
    parts: int


def is_released(keys: Iterable[str]) -> bool:
    """Whether keys are those of a released BASED model."""
    return any(_MIXER_KEY.match(_PREFIX.sub("", key)) for key in keys if _PREFIX.match(key))


def places(keys: Iterable[str]) -> dict[str, Place]:
    """Our name of every parameter in a file with these keys, and where its values are.

    A key that has no place in the model keeps its name; unused buffers and the head, which is the embedding, are left
    out.
    """
    found: dict[str, Place] = {}
    for key in keys:
        short = _PREFIX.sub("", key)
        if _UNUSED.search(short) or _HEAD.search(key):
            continue
        match = _KEY.match(short)
        names = _LAYER.get(match[2]) if match else _FRAME.get(short)
        own = [f"blocks.{match[1]}.{name}" if match else name for name in names or ()]
        if not own or own[0] in found:
            own = [key]
        found |= {name: Place(key, part, len(own)) for part, name in enumerate(own)}
    return found


def from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, of tensors by the released names (values, gradients, ...); they share memory."""
    return {name: _rows(tensors[place.key], place) for name, place in places(tensors).items()}


def to_released(model: LanguageModel) -> dict[str, Tensor]:
    """The state dict of a model under the released names; the official classes add `lm_head.weight` by themselves.

    Raises:
        WkvError: for another model, or options that the official classes do not have.
    """
    if model.name != "based":
        raise WkvError(f"only a BASED model has these names, found {model.name!r}")
    config: Any = model.config
    wanted = {"attention_layers": [], "conv_form": "gated", "tied_head": True}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise WkvError(f"released files have {key} = {value!r}, found {getattr(config, key)!r}")
    if not config.ffn_size:
        raise WkvError("released files have a gated network in each layer, found ffn_size = 0")
    tables = [("transformer.", "", _FRAME)]
    for layer, kind in enumerate(config.layout):
        tables.append((f"transformer.layers.{layer}.", f"blocks.{layer}.", {**_EVERY, **_MIXERS[kind]}))
    values = model.state_dict()
    return {
        prefix + key: torch.cat([values[own + name] for name in names])
        for prefix, own, table in tables
        for key, names in table.items()
    }


def read_released(archive: Archive) -> tuple[dict[str, Stored], dict[str, Any], list[str]]:
    """The tensors of a released file by our names, the configuration they tell, and the fields nothing tells.

    Raises:
        CheckpointError: if the shapes do not make a model.
    """
    tensors = {name: _stored(archive, place) for name, place in places(archive.tensors).items()}
    for key in filter(_HEAD.search, archive.tensors):
        if "emb.weight" in tensors:
            tensors["emb.weight"] = _with_head(archive, tensors["emb.weight"], key)
    kinds = _kinds(archive)
    fields = _fields(archive, {name: stored.shape for name, stored in tensors.items()}, kinds)
    known = _known(fields)
    untold = [key for key, need in _UNTOLD.items() if key not in known and any(kinds[f"{x}_layers"] for x in need)]
    return tensors, {**fields, **known}, untold


def _kinds(archive: Archive) -> dict[str, list[int]]:
    """The fields that say which layer is what."""
    found: dict[str, set[int]] = {kind: set() for kind in _MARKS.values()}
    for key in archive.tensors:
        match = _KEY.match(_PREFIX.sub("", key))
        if match and match[2] in _MARKS:
            found[_MARKS[match[2]]].add(int(match[1]))
    return {f"{kind}_layers": sorted(layers) for kind, layers in found.items()}


def _fields(archive: Archive, shapes: Mapping[str, Shape], kinds: Mapping[str, list[int]]) -> dict[str, Any]:
    """All that shapes tell, read from one tensor each: others that contradict it will not fit the model."""

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
            raise archive.error(f"recognised as based, but {name}, which should tell a size of it, {found}")
        return shapes[name][axis]

    layers = {split[0] for name in shapes if (split := split_key(name))}
    gap = next((layer for layer in range(len(layers)) if layer not in layers), None)
    if gap is not None:
        raise archive.error(f"layer {gap} is missing (no key begins with transformer.layers.{gap}.)")
    fields: dict[str, Any] = {**kinds, "num_layers": len(layers), "ffn_size": size("blocks.0.ffn.up.weight", 0)}
    fields |= {field: size("emb.weight", axis) for axis, field in enumerate(("vocab_size", "hidden_size"))}
    attention = sorted({layer for some in kinds.values() for layer in some})
    for layer in attention[:1]:
        fields["attention_size"] = size(f"blocks.{layer}.att.value.weight", 0)
    for layer in sorted(layers.difference(attention))[:1]:
        fields["conv_size"] = size(f"blocks.{layer}.att.conv.weight", 2)
        fields["conv_expansion"] = max(1, size(f"blocks.{layer}.att.conv.weight", 0) // max(1, fields["hidden_size"]))
    return fields


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a released model beside its tensors; nothing of others."""
    for preset in entry("based").presets.values():
        if all(fields[key] == preset[key] for key in ("hidden_size", "num_layers", "linear_layers", "window_layers")):
            return {key: preset[key] for key in _UNTOLD}
    return {}


def _stored(archive: Archive, place: Place) -> Stored:
    stored = archive.tensors[place.key]
    if place.parts == 1:
        return stored
    rows = stored.shape[0] if stored.shape else 0
    if rows == 0 or rows % place.parts:
        found = f"{printable(place.key)} has shape {list(stored.shape)}"
        raise archive.error(f"{found}, expected rows for {place.parts} equal parts")
    return stored.then(lambda x: _rows(x, place), (rows // place.parts, *stored.shape[1:]))


def _rows(x: Tensor, place: Place) -> Tensor:
    return x.chunk(place.parts)[place.part]


def _with_head(archive: Archive, embedding: Stored, key: str) -> Stored:
    """The embedding, which must turn out to be the head as well when it is read."""
    head = archive.tensors[key]

    def check(x: Tensor) -> Tensor:
        if not torch.equal(x, head.read()):
            raise archive.error(f"{printable(key)} is not the embedding, which is the head of a BASED model")
        return x

    return embedding.then(check)
