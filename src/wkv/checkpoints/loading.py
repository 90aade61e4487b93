"""`load_model`: any checkpoint, told what it is by its contents alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wkv.checkpoints.archive import FLOATS, Stored, type_name
from wkv.checkpoints.files import Source, open_archive
from wkv.checkpoints.recognise import Checkpoint, build, compare, recognise
from wkv.checkpoints.tuned import tuned_state
from wkv.errors import TokenizerError, WkvError
from wkv.layers.language_model import LanguageModel


def load_model(
    source: Source, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, **overrides: Any
) -> LanguageModel:
    """Load any checkpoint; version and sizes are read from its keys and shapes.

    Args:
        source: a .pth, .safetensors or .gguf file, a folder of shards, an rwkv.cpp .bin file, a list of shard files,
            a state dict (whose tensors are copied), or "starter", the model that comes with the package ("./starter"
            is a file of that name).
        dtype: type of all parameters; by default the type of the file's large matrices, for all parameters (float32
            if they are ggml blocks). What `quantize_model` made keeps the types of the file by default and stays in
            the mapped file; int8 and int4 weights do so with any dtype.
        device: where to put them; the CPU by default.
        overrides: configuration fields that no file tells: norm_eps, head_norm_eps.

    Returns:
        The model in evaluation mode, its parameters trainable. `model.tokenizer` is the tokenizer if the file has
        one; `model.tuned_state` the initial state (batch of 1) if state tuning stored one in the file, else None.

    Raises:
        CheckpointError: if the file is truncated, foreign or inconsistent, or an override contradicts it.
        WkvError: for an unknown override, type or device.
    """
    from wkv.quantization.files import claim_quantized, install_stored

    dtype, device = parse_dtype(dtype), _device(device)
    checkpoint = recognise(open_archive(source))
    quantized = claim_quantized(checkpoint)
    model = build(checkpoint, overrides)
    problems = compare(checkpoint, model)
    if problems:
        raise checkpoint.archive.error(f"recognised as {checkpoint.title}, but {problems}")
    place = functools.partial(_materialise, dtype=dtype or checkpoint.dtype, device=device)
    shapes = {key: value.shape for key, value in model.state_dict().items() if key not in quantized}
    empty = model.init_state(1, device, dtype or checkpoint.dtype) if checkpoint.tuned else None
    tuned = None if empty is None else tuned_state(checkpoint, empty)
    tokenizer = read_tokenizer(checkpoint)
    if quantized:
        place = functools.partial(_mapped, dtype=dtype, device=device)
    values = {key: place(checkpoint.tensors[key], shape) for key, shape in shapes.items()}
    model.load_state_dict(values, strict=not quantized, assign=True)
    if quantized:
        install_stored(model, quantized, device)
    model.tokenizer = tokenizer
    model.tuned_state = tuned
    return model.eval()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type, given as torch's or by name ("bfloat16").

    Raises:
        WkvError: for any other.
    """
    names = {type_name(known): known for known in FLOATS}
    found = names.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and found not in FLOATS:
        raise WkvError(f"dtype {dtype!r} is not one of {', '.join(names)}")
    return found if isinstance(found, torch.dtype) else None


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise WkvError(f"device {device!r} cannot be used: {reason}") from error


def _materialise(stored: Stored, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with memory of its own."""
    result = torch.empty(shape, dtype=dtype, device=device)
    return result.copy_(stored.read().reshape(shape))


def _mapped(stored: Stored, shape: torch.Size, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """As `_materialise`, but in the memory of the mapped file (copied when written to) where nothing is converted."""
    return stored.read().reshape(shape).to(device, dtype)


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer stored beside the weights, or None.

    Raises:
        CheckpointError: if its description cannot be read.
    """
    if checkpoint.tokenizer is None:
        return None
    from wkv import tokenizers

    try:
        return tokenizers.from_dict(checkpoint.tokenizer)
    except TokenizerError as error:
        raise checkpoint.archive.error(f"its tokenizer cannot be read: {error}") from error
