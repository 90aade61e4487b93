"""An exponential moving average of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wkv.training.sharding import divided_like, local


class Ema:
    """After every step the average moves by `1 - decay` of the way to the parameters, and faster at first.

    The decay of step n (from 1 on) is `min(decay, (1 + n) / (10 + n))`, so that initial values are soon forgotten.

    Args:
        model: its trainable parameters are averaged, where they are and in their type; of divided ones, this process's
            part.
        decay: in (0, 1), such as 0.999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: local(p.detach()).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self._averages.values()), [local(p) for p in self._parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averages for parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Go on with the averages of a model's parameters by name, after `steps` updates."""
        self.steps = steps
        for name, average in self._averages.items():
            average.copy_(local(divided_like(averages[name], self._parameters[name])))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            part = local(parameter)
            if part is parameter:
                parameter.data, self._averages[name] = self._averages[name], parameter.data
            else:  # FSDP2 knows where its parts are: values change places instead
                before = part.clone()
                part.copy_(self._averages[name])
                self._averages[name].copy_(before)
