"""LoRA of matrices that are no linear layer: the low-rank maps of RWKV-6 and 7, such as `att.w1` and `att.g2`.

Their modules read them as attributes. While sides are mounted, a module has a class of its own in which those
attributes are properties: W, or W + s B A if an adapter is active. The parameter itself stays registered under its
official name. (peft's `target_parameters` computes the same, but moves the parameters into nested wrappers, and its
files name a tensor by the depth of its wrapper: they do not say which parameter it is for.)

Shape letters: O rows, I columns, R rank; a parameter with three dimensions is a stack of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.tuning.mounting import base_parameters, choose_layers, linear_layers
from wkv.tuning.peft_side import never_narrow


class ParameterSide(nn.Module):
    """s B A beside one parameter, zero at first; A starts like peft's, uniform within 1 / sqrt(I).

    Args:
        weight: the parameter [..., O, I].
        rank: R.
        scale: s.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scale = scale
        bound = columns**-0.5
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, columns).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(*stack, rows, rank))
        self.to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W + s B A in the type of W, added up in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            return (wide(weight) + self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParameterSide:
        super()._apply(never_narrow(fn), recurse)
        return self


# ---------------------------------------------------------------- targets


def split_targets(model: LanguageModel, targets: str | Sequence[str] | None) -> tuple[list[str] | None, list[str]]:
    """Those of `targets` that name linear layers, and the official names of the raw parameters that others name.

    A name of raw parameters is the end of their official name, such as "w1" or "att.w1", or a pattern for all of it.

    Raises:
        WkvError: for a name that is neither, or a parameter that is no matrix.
    """
    if targets is None:
        return None, []
    known = _raw_parameters(model)
    layers: list[str] = []
    chosen: set[str] = set()
    for name in [targets] if isinstance(targets, str) else list(targets):
        found = [path for path in known if f".{path}".endswith(f".{name}") or fnmatchcase(path, name)]
        if _names_layers(model, name):
            layers.append(name)
        elif found:
            chosen.update(found)
        else:
            there = sorted({path.split(".", 2)[2] for path in (*linear_layers(model), *known)})
            raise WkvError(f"targets: {model.name} has neither layer nor matrix {name!r}; there are {', '.join(there)}")
    for path in sorted(chosen):
        shape = known[path].shape
        if len(shape) not in (2, 3) or 1 in shape[-2:]:
            raise WkvError(f"targets: LoRA is for matrices, and {path} is {list(shape)}; leave it out")
    return layers, [path for path in known if path in chosen]


def _names_layers(model: LanguageModel, name: str) -> bool:
    try:
        return bool(choose_layers(model, name))
    except WkvError:
        return False


def _raw_parameters(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Official name -> parameter of the blocks that belongs to no layer, norm or embedding."""
    return {
        name: parameter
        for name, parameter in base_parameters(model)
        if name.startswith("blocks.") and not name.endswith((".weight", ".bias"))
    }


# ---------------------------------------------------------------- mounting


class RawSides:
    """The sides that one adapter has beside raw parameters.

    Args:
        model: what it is for.
        name: of the adapter.
        paths: official names of the parameters.
        rank, scale: R, s.

    Attributes:
        sides: official name -> side.
    """

    def __init__(self, model: LanguageModel, name: str, paths: Sequence[str], rank: int, scale: float) -> None:
        self.model, self.name = model, name
        self.sides: dict[str, ParameterSide] = {}
        self._groups: dict[str, nn.ModuleDict] = {}  # path of a module -> name of its parameter -> side
        for path in paths:
            place, _, leaf = path.rpartition(".")
            side = ParameterSide(model.get_submodule(place)._parameters[leaf], rank, scale)  # type: ignore[arg-type]
            self.sides[path] = side
            self._groups.setdefault(place, nn.ModuleDict())[leaf] = side
        self._aside: dict[str, Tensor] = {}  # the parameters while merged ones are in the model
        self._aside_sides: dict[str, nn.ModuleDict] = {}  # and the sides of all adapters

    def mount(self) -> None:
        """Put the sides into their modules, inactive."""
        for module, own in self._modules():
            if "sides" not in module._modules:
                module.sides, module.active_side = nn.ModuleDict(), None
            module.sides[self.name] = own
            _choose_class(module)

    def unmount(self) -> None:
        """Take them out. A module without sides is what it was before the first."""
        for module, _ in self._modules():
            del module.sides[self.name]
            if not module.sides:
                del module.sides, module.active_side
            _choose_class(module)

    def set_active(self, active: bool) -> None:
        """Let them have an effect, or none."""
        for module, _ in self._modules():
            module.active_side = self.name if active else None

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + s B A in the place of W, and all sides aside."""
        for place, (module, own) in zip(self._groups, self._modules(), strict=True):
            for leaf, side in own.items():
                weight = module._parameters[leaf]
                self._aside[f"{place}.{leaf}"] = weight
                module._parameters[leaf] = nn.Parameter(side(weight), requires_grad=False)
            self._aside_sides[place] = module.sides
            del module.sides
            _choose_class(module)

    def unmerge(self) -> None:
        """Undo `merge`: the modules have the parameters and sides from before."""
        for place, (module, own) in zip(self._groups, self._modules(), strict=True):
            for leaf in own:
                module._parameters[leaf] = self._aside.pop(f"{place}.{leaf}")
            module.sides = self._aside_sides.pop(place)
            _choose_class(module)

    def _modules(self) -> Iterator[tuple[Any, nn.ModuleDict]]:
        for place, own in self._groups.items():
            yield self.model.get_submodule(place), own


def _choose_class(module: Any) -> None:
    """Give a module the class that its sides need: its own, or one that reads parameters through them."""
    plain = getattr(type(module), "_without_sides", type(module))
    leaves = {leaf for own in module._modules.get("sides", {}).values() for leaf in own}
    if not leaves:
        module.__class__ = plain
        return
    members = {leaf: property(_reader(leaf)) for leaf in sorted(leaves)}
    module.__class__ = type(
        plain.__name__, (plain,), {**members, "_without_sides": plain, "__module__": plain.__module__}
    )


def _reader(leaf: str) -> Callable[[Any], Tensor]:
    def read(module: Any) -> Tensor:
        weight: Tensor = module._parameters[leaf]
        own = module.sides[module.active_side] if module.active_side is not None else {}
        changed: Tensor = own[leaf](weight) if leaf in own else weight
        return changed

    return read
