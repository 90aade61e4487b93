"""The tuned initial state beside a model's weights: official names from and to a `State` of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from wkv.checkpoints.archive import Stored
from wkv.checkpoints.official import TUNED_SLOTS
from wkv.checkpoints.recognise import Checkpoint, fits
from wkv.errors import WkvError
from wkv.state import State


def tuned_state(checkpoint: Checkpoint, empty: State) -> State:
    """The tuned initial state of a file; what was not tuned is as in `empty`.

    Args:
        checkpoint: its `tuned` tensors.
        empty: the model's state of one sequence before the first token; tells types and device.

    Raises:
        CheckpointError: if layers are missing or too many, or a tensor does not fit.
    """
    tuned = dict(checkpoint.tuned)
    state = State(empty.model, empty.layers)
    names = sorted({key.split(".", 2)[2] for key in tuned})
    for layer, values in enumerate(state.layers):
        for name in names:
            key, slot = f"blocks.{layer}.{name}", TUNED_SLOTS[name]
            values[slot] = _tensor(checkpoint, key, tuned.pop(key, None), values.get(slot))
    for key in tuned:
        raise checkpoint.archive.error(f"unexpected {key}: the model has {len(state.layers)} layers")
    return state


def _tensor(checkpoint: Checkpoint, key: str, stored: Stored | None, blank: Tensor | None) -> Tensor:
    error = checkpoint.archive.error
    if stored is None:
        raise error(f"missing {key}: other layers have a tuned state, this one has none")
    if blank is None:
        raise error(f"unexpected {key}: {checkpoint.title} has no such state")
    if stored.dtype is None or not fits(stored.shape, tuple(blank.shape)):
        found = f"shape {list(stored.shape)} and type {stored.kind}"
        raise error(f"{key} has {found}, expected floating numbers {list(blank.shape[1:])}")
    return torch.empty_like(blank).copy_(stored.read().reshape(blank.shape))


def tuned_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state of one sequence under their official names; token shift only where some layer has it.

    Raises:
        WkvError: if the state holds what has no official name, such as that of an upscaled memory.
    """
    tensors = {}
    for name, slot in TUNED_SLOTS.items():
        values = [layer[slot][0] for layer in state.layers if slot in layer]
        if not slot.endswith("shift") or any(bool(value.any()) for value in values):
            tensors.update({f"blocks.{layer}.{name}": value for layer, value in enumerate(values)})
    nameless = sorted({slot for layer in state.layers for slot in layer if slot not in TUNED_SLOTS.values()})
    if nameless or len(tensors) % len(state.layers):
        raise WkvError(
            f"the tuned state of {state.model} holds {', '.join(nameless) or 'other states in some layers'}, for which "
            "checkpoints have no names; write it with State.save(path), and the model with model.tuned_state = None"
        )
    return tensors
