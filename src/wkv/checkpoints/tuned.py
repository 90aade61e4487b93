"""The tuned initial state beside a model's weights: official names from and to a `State` of one sequence."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from wkv.checkpoints.archive import Stored
from wkv.checkpoints.official import TUNED_SLOTS, tuned_slot
from wkv.checkpoints.recognise import Checkpoint, fits
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
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
    names = {str(tuned_slot(name)): name for name in (key.split(".", 2)[2] for key in sorted(tuned))}
    for layer, values in enumerate(state.layers):
        for slot in names.keys() & values.keys():
            key = f"blocks.{layer}.{names[slot]}"
            values[slot] = _tensor(checkpoint, key, tuned.pop(key, None), values[slot])
    for key in tuned:
        beyond = int(key.split(".", 2)[1]) >= len(state.layers)
        why = f"the model has {len(state.layers)} layers" if beyond else f"{checkpoint.title} has no such state"
        raise checkpoint.archive.error(f"unexpected {key}: {why}")
    return state


def _tensor(checkpoint: Checkpoint, key: str, stored: Stored | None, blank: Tensor) -> Tensor:
    error = checkpoint.archive.error
    if stored is None:
        raise error(f"missing {key}: other layers have a tuned state, this one has none")
    shape = tuple(blank.shape)
    if key.endswith("cache") and len(stored.shape) == len(shape) - 1:  # of any length
        shape = (1, *stored.shape[:1], *shape[2:])
    if (stored.dtype is None and blank.is_floating_point()) or not fits(stored.shape, shape):
        found = f"shape {list(stored.shape)} and type {stored.kind}"
        raise error(f"{key} has {found}, expected floating numbers {list(blank.shape[1:])}")
    return blank.new_empty(shape).copy_(stored.read().reshape(shape))


def own_slots(model: LanguageModel) -> set[str]:
    """The slots of a model's state, without what tuning has added."""
    blank = torch.empty(0)
    layers = range(model.config.num_layers)
    return {slot for layer in layers for slot in model.init_layer_state(1, blank, blank, layer)}


def tuned_tensors(state: State, own: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a state of one sequence under their names in files; token shift only where some layer has it.

    Args:
        state: of one sequence.
        own: slots that may be written although nobody else has a name for them.

    Raises:
        WkvError: if the state holds others, such as an upscaled memory.
    """
    known = {*TUNED_SLOTS.values(), *own}
    foreign = sorted({slot for layer in state.layers for slot in layer if slot not in known})
    if foreign:
        raise WkvError(
            f"the tuned state of {state.model} holds {', '.join(foreign)}, for which checkpoints have no names; write "
            "it with State.save(path), and the model with model.tuned_state = None"
        )
    names = {slot: name for name, slot in TUNED_SLOTS.items()}
    tensors = {}
    for slot in dict.fromkeys(slot for layer in state.layers for slot in layer):
        values = {i: layer[slot][0] for i, layer in enumerate(state.layers) if slot in layer}
        if not slot.endswith("shift") or any(bool(value.any()) for value in values.values()):
            name = names.get(slot, f"state.{slot}")
            tensors.update({f"blocks.{layer}.{name}": value for layer, value in values.items()})
    return tensors
