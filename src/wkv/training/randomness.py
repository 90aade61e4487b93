"""The random number generators of a step: where they are, and back to there."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: torch.device, before: list[Tensor] | None = None) -> list[Tensor]:
    """The random number generators that a forward pass on `device` may use; `before` itself if they did not move."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return before if before and all(map(torch.equal, states, before)) else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Bring back what `random_state` gave."""
    torch.set_rng_state(states[0])
    for each in states[1:]:
        torch.get_device_module(device).set_rng_state(each, device)
