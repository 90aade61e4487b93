"""`inspect`: what a file is, without reading its weights."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from wkv.checkpoints.archive import NOT_STORED, Archive, Stored, type_name
from wkv.checkpoints.files import Source, open_archive
from wkv.checkpoints.loading import read_tokenizer
from wkv.checkpoints.official import TITLES
from wkv.checkpoints.recognise import Checkpoint, Problems, build, compare, recognise
from wkv.errors import CheckpointError


@dataclasses.dataclass(kw_only=True)
class CheckpointInfo:
    """What `inspect` finds.

    Args:
        source: path, or "the state dict".
        format: "safetensors", "wkv" (safetensors written by this library), "pth", "gguf", "rwkv.cpp", "state" (a saved
            `State`) or "state dict".
        dtype: type the parameters have once loaded.
        model: registered name, such as "rwkv7".
        title: its name for people, such as "RWKV-7".
        config: all sizes; for a state its layers and sequences.
        num_parameters: number of stored values that belong to the model.
        dtypes: how values are stored ("bfloat16", "Q5_1") -> number of tensors.
        kind_bytes: for files with int8 or int4 weights, how values are stored -> bytes of these tensors.
        file_bytes: size of all files.
        state_bytes: memory of one sequence while the model runs.
        tokenizer: kind of the tokenizer in the file, or None.
        missing, unexpected, misfits: what keeps the file from being loaded.
        notes: what `load_model` converts or fills in.
    """

    source: str
    format: str
    model: str
    title: str
    dtype: str
    config: dict[str, Any]
    num_parameters: int
    dtypes: dict[str, int]
    file_bytes: int
    state_bytes: int
    kind_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misfits: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def loadable(self) -> bool:
        """Whether `load_model` (or `State.load`) takes it."""
        return not (self.missing or self.unexpected or self.misfits)

    @property
    def verdict(self) -> str:
        """One line: what it is and whether it can be loaded."""
        if self.format == "state":
            batch, layers = self.config["batch_size"], self.config["num_layers"]
            return f"a saved {self.title} state of {batch} sequence{'s' * (batch != 1)}, {layers} layers"
        size = f"{self.config['num_layers']} layers x {self.config['hidden_size']}"
        problems = Problems(self.missing, self.unexpected, self.misfits)
        outcome = f"cannot be loaded, {problems}" if problems else "can be loaded"
        return f"{self.title}, {size}, {self.num_parameters:,} parameters, {self.dtype}: {outcome}"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, for JSON."""
        return {"verdict": self.verdict, "loadable": self.loadable, **dataclasses.asdict(self)}


def inspect(source: Source) -> CheckpointInfo:
    """Say what a checkpoint is from its keys, shapes and types; values stay on disk.

    Args:
        source: anything `load_model` takes, or a file written by `State.save`.

    Raises:
        CheckpointError: if it cannot be read or is not one of ours. Missing or unexpected keys are reported instead.
    """
    archive = open_archive(source)
    from wkv.quantization.files import claim_quantized

    if "wkv_state" in archive.metadata and isinstance(source, str | os.PathLike):
        return _state_info(archive, source)
    checkpoint = recognise(archive)
    quantized = claim_quantized(checkpoint)
    model = build(checkpoint)
    problems = compare(checkpoint, model)
    try:
        read_tokenizer(checkpoint)
    except CheckpointError as error:
        problems.misfits.append(str(error).removeprefix(f"{archive.label}: "))
    known = model.state_dict()
    stored = {key: tensor for key, tensor in checkpoint.tensors.items() if tensor.kind != NOT_STORED}
    dtypes = Counter(tensor.kind for tensor in stored.values())
    return CheckpointInfo(
        source=archive.label,
        format="wkv" if "wkv" in archive.metadata else archive.format,
        model=checkpoint.name,
        title=checkpoint.title,
        dtype=type_name(checkpoint.dtype),
        config=model.config.to_dict(),
        num_parameters=sum(tensor.numel for key, tensor in stored.items() if key in known),
        dtypes=dict(dtypes.most_common()),
        kind_bytes=_bytes_by_kind(stored.values()) if quantized else {},
        file_bytes=archive.file_bytes,
        state_bytes=model.init_state(1, device="meta", dtype=checkpoint.dtype).num_bytes,
        tokenizer=str(checkpoint.tokenizer.get("kind")) if checkpoint.tokenizer else None,
        missing=problems.missing,
        unexpected=problems.unexpected,
        misfits=problems.misfits,
        notes=_notes(checkpoint, dtypes, bool(quantized)),
    )


def _bytes_by_kind(tensors: Iterable[Stored]) -> dict[str, int]:
    """Bytes of all tensors of each kind, scales included."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.kind] += tensor.num_bytes
    return dict(sizes.most_common())


def _notes(checkpoint: Checkpoint, dtypes: Counter[str], quantized: bool) -> list[str]:
    notes = list(checkpoint.notes)
    if quantized:
        notes.append("quantised: int8 and int4 weights are used as they lie in the file, others keep their own types")
    elif len(dtypes) > 1:
        notes.append(f"stored in several types; all becomes {type_name(checkpoint.dtype)} unless a dtype is asked for")
    if not checkpoint.archive.metadata.keys() & {"wkv", "gguf"}:
        notes.append("eps of the norms: official values, such files do not store them")
    if checkpoint.tuned:
        notes.append("holds a tuned initial state, which load_model keeps as model.tuned_state")
    return notes


def _state_info(archive: Archive, path: str | os.PathLike[str]) -> CheckpointInfo:
    from wkv.state import State

    state = State.load(path)
    name = str(json.loads(archive.metadata["wkv_state"])["model"])
    return CheckpointInfo(
        source=archive.label,
        format="state",
        model=name,
        title=TITLES.get(name, name),
        dtype=type_name(state.layers[0][next(iter(state.layers[0]))].dtype),
        config={"num_layers": len(state.layers), "batch_size": state.batch_size},
        num_parameters=sum(tensor.numel for tensor in archive.tensors.values()),
        dtypes=dict(Counter(tensor.kind for tensor in archive.tensors.values()).most_common()),
        file_bytes=archive.file_bytes,
        state_bytes=state.num_bytes // state.batch_size,
    )
