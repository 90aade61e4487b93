"""The upscaled memories of `wkv.tuning.kernel_state` as modules: what they read, and where they start.

Shape letters: B batch, T time, H heads, N head size, M kernel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wkv.layers.norms import wide
from wkv.layers.timeline import Timeline
from wkv.ops import wkv7
from wkv.state import LayerState, State
from wkv.tuning.decorrelation import DecorrelatedMatrix, Decorrelation
from wkv.tuning.kernel_features import KernelFeatures
from wkv.tuning.state_slots import Whole

SLOT = "kernel"


class KernelMemory(nn.Module):
    """The upscaled memory of one layer.

    Args:
        features: of the layer.
        mode: "residual" or "replace".
        rule: trains S~_0 as W R; None: as it is.

    Attributes:
        start: S~_0 [H, M, M], a `Whole` or a `DecorrelatedMatrix`; zero at first.
    """

    def __init__(self, features: KernelFeatures, mode: str, rule: Decorrelation | None) -> None:
        super().__init__()
        self.features, self.mode = features, mode
        heads, size = features.mean.shape
        zero = features.mean.new_zeros(heads, size, size)
        self.start: Any = Whole(zero) if rule is None else DecorrelatedMatrix(zero, rule)

    def read(
        self, y_BTHN: Tensor, inputs: tuple[Tensor, ...], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """What `TimeMix.side_memory` is: outputs of the heads [B, T, H, N] with this memory, and the slot."""
        with torch.autocast(y_BTHN.device.type, enabled=False):
            mapped = self.features.literal if self.mode == "replace" else self.features.residual
            r, log_w, k, v, a, b = mapped(tuple(wide(x) for x in inputs))
            read_BTHM, kernel = wkv7(r, log_w, k, v, a, b, state[SLOT], mask=timeline.mask, reset=timeline.reset)
            if timeline.mask is not None:  # unspecified there
                read_BTHM = read_BTHM.masked_fill(~timeline.mask[:, :, None, None], 0)
            if isinstance(self.start, DecorrelatedMatrix):
                read_BTHM = self.start(read_BTHM)
            added_BTHN = torch.einsum("hnm,bthm->bthn", self.features.readout.to(read_BTHM.dtype), read_BTHM)
        return added_BTHN if self.mode == "replace" else y_BTHN + added_BTHN, {SLOT: kernel}

    def first(self) -> Tensor:
        """The slot of one sequence before its first token: S~_0, or the empty product [H, M, M]."""
        if isinstance(self.start, DecorrelatedMatrix):
            heads, size = self.features.mean.shape
            return torch.eye(size, dtype=self.features.mean.dtype, device=self.features.mean.device).repeat(heads, 1, 1)
        value: Tensor = self.start()
        return value

    @torch.no_grad()
    def value(self) -> Tensor:
        """S~_0 [H, M, M], detached."""
        folded = self.start.folded() if isinstance(self.start, DecorrelatedMatrix) else self.start.value.clone()
        found: Tensor = folded
        return found


class KernelStates(nn.Module):
    """The upscaled memories of all layers: `model.initial_state`, which gives every layer its slot "kernel".

    Parameters and constants are float32 (float64 after `.double()`), whatever the type of the model.

    Args:
        layers: one memory per layer.
        past: state of one sequence that the model's own slots start from; None: the empty past.
    """

    def __init__(self, layers: list[KernelMemory], past: State | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.past = past

    def forward(self, empty: State) -> State:
        """The state before the first token: of the batch size, on the device and in the types of `empty`."""
        past = empty.layers if self.past is None else self.past.layers
        return State(empty.model, [self._layer(*each) for each in zip(self.layers, empty.layers, past, strict=True)])

    @staticmethod
    def _layer(memory: Any, empty: LayerState, past: LayerState) -> LayerState:
        found = {name: past[name].to(x.device, x.dtype).expand_as(x).clone() for name, x in empty.items()}
        wkv, first = empty["wkv"], memory.first()
        found[SLOT] = first.to(wkv.device, wkv.dtype).expand(len(wkv), -1, -1, -1).clone()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> KernelStates:
        def kept(tensor: Tensor) -> Tensor:  # `model.half()` and the like never round a state
            moved: Tensor = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype not in (torch.float32, torch.float64)
            return tensor.to(moved.device) if narrow else moved

        super()._apply(kept, recurse)
        return self
