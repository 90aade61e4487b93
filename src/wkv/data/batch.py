"""`Batch`, what a training step works on, and `Sampler`, what every source of batches offers.

Shape letters: B rows, T tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from wkv.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and what follows each of them.

    Args:
        inputs: int64 [B, T].
        targets: int64 [B, T], the token after each input.
        loss_mask: bool [B, T] or None; the loss counts only True targets.
        reset: bool [B, T] or None; the model forgets everything before a True input (the first of a document).
        mask: bool [B, T] or None; a False input is padding and does not exist.

    Raises:
        DataError: if shapes or types do not fit.
    """

    inputs: Tensor
    targets: Tensor
    loss_mask: Tensor | None = None
    reset: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.inputs.shape
        for name, value in vars(self).items():
            dtype = torch.int64 if name in ("inputs", "targets") else torch.bool
            if value is not None and (value.dtype != dtype or value.shape != shape or value.ndim != 2):
                found = f"{value.dtype} {list(value.shape)}"
                raise DataError(f"{name} of a batch must be {dtype} like the inputs {list(shape)}, found {found}")

    @classmethod
    def from_windows(cls, windows_BT1: Tensor) -> Batch:
        """Inputs and targets of int64 windows [B, T + 1], such as those of `RandomWindows`."""
        return cls(windows_BT1[:, :-1], windows_BT1[:, 1:])

    @property
    def num_targets(self) -> int:
        """How many targets the loss counts."""
        return self.targets.numel() if self.loss_mask is None else int(self.loss_mask.sum())

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items() if value is not None})


@runtime_checkable
class Sampler(Protocol):
    """A source of batches without end.

    Samplers are made with `rank` and `world_size` where several processes train together: each then gets its share,
    and one batch of every process makes up the batch of one process with `world_size` times as many rows: row b of
    rank r is its row `b * world_size + r`.
    """

    def next_batch(self) -> Batch:
        """The next batch of this rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence of batches, the same on every rank, and what it belongs to."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            DataError: if it was taken on other tokens or with other settings.
        """
        ...
