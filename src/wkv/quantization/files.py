"""Quantised models in files: format "wkv" keeps the codes as uint8 under the official name of the weight.

The header's description has an entry `quantization`: name -> {"kind", "sparse", "shape"}. Linear weights are flat, in
the order of `packed`; embeddings [V, C]. int8 has float32 scales under `<name>.scale`; those of int6 and int4 are among
their codes. Codes and scales of a loaded model lie in the mapped file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wkv.checkpoints.archive import Archive, Stored, printable
from wkv.errors import CheckpointError
from wkv.layers.language_model import LanguageModel
from wkv.quantization.model import Quantized, install, quantized_layers
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear
from wkv.quantization.packed import Packed, num_bytes, padded_shape
from wkv.quantization.policy import INTEGERS, group_of

if TYPE_CHECKING:
    from wkv.checkpoints.recognise import Checkpoint

_FIELDS = {"kind", "sparse", "shape"}


@dataclass(frozen=True)
class StoredCodes(Stored):
    """A quantised weight of a file; `read` brings it to float32.

    Args:
        sparse: see `Packed`.
        codes, scale: what is in the file.
    """

    sparse: bool
    codes: Stored
    scale: Stored | None

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales in the file."""
        return self.codes.numel + (0 if self.scale is None else self.scale.num_bytes)

    def layer(self, name: str, device: torch.device) -> Quantized:
        """The layer of weight `name`; on the CPU its memory is that of the mapped file."""
        codes = self.codes.read().to(device)
        scale = None if self.scale is None else self.scale.read().to(device)
        if _is_table(name):
            assert scale is not None
            return QuantizedEmbedding(codes.view(torch.int8), scale, torch.float32)
        rows, columns = self.shape
        return QuantizedLinear(Packed(self.kind, self.sparse, (rows, columns), codes, scale))  # type: ignore[arg-type]


# ---------------------------------------------------------------- writing


def describe(model: LanguageModel) -> dict[str, Any]:
    """The header's entry: name -> kind, order and shape of every quantised weight."""
    described: dict[str, Any] = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, QuantizedEmbedding):
            described[name] = {"kind": "int8", "sparse": False, "shape": list(layer.codes.shape)}
        else:
            described[name] = {"kind": layer.kind, "sparse": layer.sparse, "shape": list(layer.shape)}
    return described


def stored_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """`model.state_dict()` with codes and scales under their names in the file."""
    tensors = dict(model.state_dict())
    for name, layer in quantized_layers(model).items():
        module = name.removesuffix(".weight")
        for buffer in ("data", "codes", "scale"):
            tensors.pop(f"{module}.{buffer}", None)
        tensors[name] = layer.codes.view(torch.uint8) if isinstance(layer, QuantizedEmbedding) else layer.data
        if layer.scale is not None:
            tensors[f"{name}.scale"] = layer.scale
    return tensors


# ---------------------------------------------------------------- reading


def claim_quantized(checkpoint: Checkpoint) -> dict[str, StoredCodes]:
    """Give the quantised weights of `checkpoint` their logical shapes, and take their scales out of its tensors.

    Raises:
        CheckpointError: if the description does not fit the tensors.
    """
    described = json.loads(checkpoint.archive.metadata.get("wkv", "{}")).get("quantization", {})
    archive, tensors = checkpoint.archive, checkpoint.tensors
    if not isinstance(described, dict):
        raise _bad(archive, f"its entry 'quantization' is {type(described).__name__}, expected an object")
    norm = tensors.get("ln_out.weight")
    dtype = norm.dtype if norm is not None else None
    found = {name: _claim(archive, tensors, name, entry, dtype) for name, entry in described.items()}
    for name, stored in found.items():
        tensors[name] = stored
        if stored.scale is not None:
            del tensors[f"{name}.scale"]
    return found


def _claim(
    archive: Archive, tensors: Mapping[str, Stored], name: str, entry: Any, dtype: torch.dtype | None
) -> StoredCodes:
    kind, sparse, shape = _fields(archive, name, entry)
    label = printable(name)
    group = group_of(name)
    if (
        group in ("vectors", "low_rank")
        or (group == "emb" and kind != "int8")
        or (sparse and (group != "ffn_value" or kind == "int6"))
    ):
        raise _bad(archive, f"{label} cannot be stored as {kind}{' in sparse order' if sparse else ''}")
    codes, scale = tensors.get(name), tensors.get(f"{name}.scale")
    if codes is None:
        raise archive.error(f"missing {label}, which its metadata 'wkv' says is {kind}")
    table = _is_table(name)
    rows, columns = shape if table else padded_shape(kind, sparse, shape)  # type: ignore[arg-type]
    size = (rows, columns) if table else (num_bytes(kind, rows, columns),)
    _check(archive, label, codes, "U8", size)
    if kind == "int8":
        if scale is None:
            raise archive.error(f"missing {label}.scale: int8 weights have a scale for every row")
        _check(archive, f"{label}.scale", scale, "float32", (rows,))
    elif scale is not None:
        raise archive.error(f"unexpected {label}.scale: the scales of {kind} weights are among their codes")
    return StoredCodes(shape, dtype, kind, codes.origin, codes.read, sparse, codes, scale)


def _fields(archive: Archive, name: str, entry: Any) -> tuple[str, bool, tuple[int, int]]:
    """Kind, order and shape of one entry."""
    label = printable(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(archive, f"its entry for {label} needs exactly the fields {', '.join(sorted(_FIELDS))}")
    kind, sparse, shape = entry["kind"], entry["sparse"], entry["shape"]
    if kind not in INTEGERS:
        raise _bad(archive, f"{label} is of the unknown kind {printable(str(kind))}, expected {' or '.join(INTEGERS)}")
    if not isinstance(sparse, bool):
        raise _bad(archive, f"'sparse' of {label} is {printable(str(sparse))}, expected true or false")
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**40 for size in sizes):
        raise _bad(archive, f"the shape of {label} is {printable(str(shape))}, expected two positive integers")
    return kind, sparse, (sizes[0], sizes[1])


def _check(archive: Archive, label: str, stored: Stored, kind: str, shape: tuple[int, ...]) -> None:
    if stored.kind != kind or stored.shape != shape:
        found, expected = f"{stored.kind} {list(stored.shape)}", f"{kind} {list(shape)}"
        raise archive.error(f"{label} is {found}, but its metadata 'wkv' makes it {expected}")


def _bad(archive: Archive, problem: str) -> CheckpointError:
    return archive.error(f"its metadata 'wkv' does not describe quantised weights: {problem}")


def _is_table(name: str) -> bool:
    """Whether rows are looked up: the embedding, and the token matrices of RWKV-7a."""
    return name.endswith("emb.weight")


def install_stored(model: LanguageModel, stored: Mapping[str, StoredCodes], device: torch.device) -> None:
    """Put the quantised layers of a file into `model`, whose other parameters are loaded."""
    install(model, {name: codes.layer(name, device) for name, codes in stored.items()})
