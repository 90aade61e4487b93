"""Layers of the library peft as sides of our layers.

peft replaces a layer by one of its own that holds the adapter and calls the layer it replaced. Here every adapter has
layers of peft to itself, and what such a layer takes for the replaced one is a `Start`: a stand-in that calls the
model's layer. So weights of any kind work, adapters do not share the settings that peft keeps per layer, and the
initialisations that change a weight in peft (PiSSA, OLoRA, LoRA-GA) leave the model's own alone:

    W x - s B_0 A_0 x + s B A x    in place of    W_res x + s B A x,  W_res = W - s B_0 A_0

with the factors A_0, B_0 that the adapter starts from. That needs no second copy of W, and no rounding of W_res.

Shape letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.tuning.side import Side

NAME = "default"  # of the one adapter in each layer of peft
_PARTS = {"lora_magnitude_vector": "magnitude"}  # names of parts of those layers, where files have another


def import_peft() -> Any:
    """The library peft; importing it takes seconds, so nothing does before it is needed.

    Raises:
        WkvError: if it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise WkvError(f'adapters of the LoRA family need peft: pip install "wkv[tune]" ({error})') from error
    return peft


def make_layer(config: Any, weight: Tensor, gradient: Tensor | None = None) -> Any:
    """The layer of peft in place of a linear layer without bias.

    Args:
        config: `peft.PeftConfig`; its target modules do not matter.
        weight: float32 [O, I]; it does not change.
        gradient: float32 [O, I], for LoRA-GA.

    Raises:
        WkvError: if peft refuses the layer or the config.
    """
    peft = import_peft()
    config = copy.deepcopy(config)
    config.target_modules = {"layer"}
    plain, place = plain_linear(weight.clone()), nn.Module()
    if gradient is not None:
        plain._peft_loraga_grad = gradient
    place.layer = plain
    try:
        peft.inject_adapter_in_model(config, place, adapter_name=NAME)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WkvError(f"peft: {error}") from error
    return place.layer


def plain_linear(weight: Tensor) -> Any:
    """A frozen layer with this weight [O, I]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Start(nn.Module):
    """What a layer of peft takes for the layer it replaces: the model's, less what the adapter starts from.

    Args:
        layer: the model's. It is no submodule of this one, so that its weight does not count twice.
        initial: A_0 float32 [R, I] and B_0 float32 [O, R], or None for adapters that start from nothing.
        scale: s.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None
    bias = None

    def __init__(self, layer: Any, initial: tuple[Tensor, Tensor] | None, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, scale
        self.layer = (layer,)
        for name, value in zip(("initial_A", "initial_B"), initial or (None, None), strict=True):
            self.register_buffer(name, value)

    @property
    def weight(self) -> Tensor:
        """The model's weight [O, I], for what peft computes from it; of quantised layers what the codes stand for."""
        (layer,) = self.layer
        weight: Tensor = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.detach()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]; in float32 if something is subtracted."""
        y: Tensor = self.layer[0](x)
        if y._is_view():  # some layers of peft add to it in place, which a view made inside of an operator forbids
            y = y.clone()
        if self.initial_A is None or self.initial_B is None:
            return y
        # The same steps as those of the trained factors, so that equal factors cancel.
        return y - F.linear(F.linear(x.to(self.initial_A.dtype), self.initial_A), self.initial_B) * self.scale

    def residual(self, weight: Tensor) -> Tensor:
        """W_res [O, I] of a weight W; always a copy."""
        if self.initial_A is None or self.initial_B is None:
            return weight.clone()
        return weight - self.scale * (self.initial_B @ self.initial_A)


class PeftSide(Side):
    """A layer of peft as the side of a layer.

    Args:
        layer: made by `make_layer`; it belongs to the side from then on.
        base: the model's layer.
        subtract: take what the layer starts with off the base: its low-rank factors are a part of the weight.

    Attributes:
        trained: name -> parameter of those that peft trains; some methods have fixed ones as well.
    """

    def __init__(self, layer: Any, base: Any, subtract: bool = False) -> None:
        super().__init__()
        initial, scale = None, 0.0
        if subtract:
            factors = (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
            initial = (factors[0].detach().clone(), factors[1].detach().clone())
            scale = float(layer.scaling[NAME])
        self.start = Start(base, initial, scale)
        layer.base_layer = self.start
        # Its parts are modules of the side and its parameters those of the side. The layer itself must not be one:
        # then they would have two names, and the model's weight a third.
        self._layer = (layer,)
        for name, part in layer.named_children():
            if name != "base_layer" and (any(True for _ in part.children()) or any(True for _ in part.parameters())):
                self.add_module(name, part)
        self.trained = {name: value for name, value in self.named_parameters() if value.requires_grad}

    @property
    def layer(self) -> Any:
        """The layer of peft."""
        return self._layer[0]

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """See `Side`."""
        if self.start.layer[0] is not base:
            self.start.layer = (base,)
        y: Tensor = self.layer(x)
        return y if self.start.initial_A is None else y.to(_product_type(x))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """See `Side`: what peft's own merging makes of a copy."""
        plain = plain_linear(self.start.residual(weight))
        layer = copy.deepcopy(self.layer, {id(self.start): plain})  # the copy has `plain` where the layer has `start`
        layer.merge()
        merged: Tensor = plain.weight.detach()
        return merged

    def train(self, mode: bool = True) -> PeftSide:
        """As any module; the layer of peft is none of the submodules and hears of it here."""
        super().train(mode)
        self.layer.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PeftSide:
        super()._apply(never_narrow(fn), recurse)
        return self


def readable(name: str) -> str:
    """A parameter's name without what peft needs to tell several adapters apart: lora_A.default.weight -> lora_A."""
    parts = [_PARTS.get(part, part) for part in name.removesuffix(".weight").split(".") if part != NAME]
    return ".".join(parts)


def never_narrow(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `Module._apply` such that `model.half()` and the like move values of 32 bits but do not round them."""

    def kept(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrow = moved.is_floating_point() and moved.dtype not in (torch.float32, torch.float64)
        return tensor.to(moved.device) if narrow else moved

    return kept


def _product_type(x: Tensor) -> torch.dtype:
    """The type that a linear layer gives for `x`: autocast's where it applies."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
