"""`Adapter`: something small that is trained in place of a model, mounted on it, saved, merged and taken off again."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.files import AdapterFile, copy_tensors, write_adapter
from wkv.tuning.fingerprint import Samples, fingerprint
from wkv.tuning.mounting import adapted, base_parameters, choose_layers, replace
from wkv.tuning.options import check_options
from wkv.tuning.side import AdaptedLinear, Side

# Largest difference of merged from adapted logits, relative to the largest logit. Merged weights are rounded once to
# the type of the base, which is all the difference in 16 bits.
BARS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Adapter(ABC):
    """One adapter on one model. `wkv.tuning.create` and `wkv.tuning.load` make them.

    A model can carry several; of each kind at most one is active, and only active ones have an effect.

    Attributes:
        method: canonical name of the method, such as "bone-row".
        name: of this adapter among those of the model.
        model: what it is mounted on.
        options: what it was created with, as plain values.
        base: samples of the weights it belongs to.
        is_merged: whether `merge` has put its effect into the model's own values.
    """

    kind: ClassVar[str]  # "weights" or "state"

    def __init__(self, model: LanguageModel, method: str, name: str, options: dict[str, Any]) -> None:
        self.model, self.method, self.name, self.options = model, method, name, options
        self.base: Samples = fingerprint(model)
        self.is_merged = False

    # ---- what a method defines ----

    @classmethod
    @abstractmethod
    def build(
        cls, model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
    ) -> Adapter:
        """An adapter that is not mounted yet; refuses unknown options.

        Args:
            restoring: whether `load_tensors` will give it its values, so that a costly start can be left out.
        """

    @abstractmethod
    def mount(self) -> None:
        """Put the adapter into the model, inactive."""

    @abstractmethod
    def unmount(self) -> None:
        """Take it out."""

    @abstractmethod
    def set_active(self, active: bool) -> None:
        """Let it have an effect, or none."""

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the names of the file."""

    @abstractmethod
    def merge(self) -> None:
        """Put its effect into the model's own values; the model is then a plain one until `unmerge`."""

    @abstractmethod
    def unmerge(self) -> None:
        """Undo `merge`: the base has its own values again, bit for bit, and the adapter is active."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: the parameters, and constants that belong to them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of a file."""
        copy_tensors(tensors, self.tensors(), f"the {self.method} adapter")

    def parameter_rule(self, name: str, parameter: nn.Parameter) -> tuple[float, bool]:
        """(factor on the learning rate, whether weight decay applies) of a parameter of the model or the adapter."""
        return 1.0, False

    # ---- what all have in common ----

    @property
    def num_parameters(self) -> int:
        """How many values are trained."""
        return sum(parameter.numel() for parameter in self.named_parameters().values())

    @property
    def mergeable(self) -> bool:
        """Whether `merge` can put its effect into values that the model has."""
        return True

    @property
    def is_active(self) -> bool:
        """Whether it has an effect."""
        return self.model.active_adapters.get(self.kind) == self.name

    def activate(self) -> None:
        """Let this adapter, and no other of its kind, have an effect."""
        active = active_adapter(self.model, self.kind)
        if active is self:
            return
        if active is not None:
            active.deactivate()
        self.set_active(True)
        self.model.active_adapters[self.kind] = self.name
        self._let_learn(True)

    def deactivate(self) -> None:
        """Let the model do what it does without this adapter."""
        if self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is merged into the model; call unmerge() first")
        if self.is_active:
            self.set_active(False)
            del self.model.active_adapters[self.kind]
            self._let_learn(False)

    def remove(self) -> None:
        """Take the adapter off the model. The last one leaves it as it was, with trainable parameters."""
        self.deactivate()
        self.unmount()
        del self.model.adapters[self.name]
        if not self.model.adapters:
            for _, parameter in base_parameters(self.model):
                parameter.requires_grad_(parameter.is_floating_point())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file with the adapter, its options and what identifies the base.

        Raises:
            CheckpointError: if it cannot be written.
        """
        config = self.model.config.to_dict()
        write_adapter(path, AdapterFile(self.method, self.options, self.model.name, config, self.tensors(), self.base))

    @torch.no_grad()
    def verify(self, tokens: Tensor | None = None) -> float:
        """Compare the logits of the merged model with those of the adapted one; the adapter ends as it was.

        Args:
            tokens: int64 [B, T]; by default some drawn with a fixed seed.

        Returns:
            the largest difference, relative to the largest logit.

        Raises:
            WkvError: if it is more than rounding to the model's type explains.
        """
        if tokens is None:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(self.model.config.vocab_size, (2, 48), generator=generator)
        tokens = tokens.to(self.model.ln_out.weight.device)
        was_merged, training = self.is_merged, self.model.training
        self.model.eval()
        try:
            error = _difference(self._logits(tokens, not was_merged), self._logits(tokens, was_merged))
        finally:
            self._bring(was_merged)
            self.model.train(training)
        bar = BARS[self.model.ln_out.weight.dtype]
        if not error <= bar:
            raise WkvError(f"merging {self.name!r} changes logits by {error:.1e} of the largest, more than {bar:.0e}")
        return error

    def _logits(self, tokens: Tensor, merged: bool) -> Tensor:
        self._bring(merged)
        state = self.model.tuned_state
        if state is not None and self.kind == "state" and merged:  # a plain forward pass starts from an empty past
            rows = [0] * tokens.shape[0]
            return self.model(tokens, state.select(rows)).logits.double()
        return self.model(tokens).logits.double()

    def _bring(self, merged: bool) -> None:
        if merged and not self.is_merged:
            self.merge()
        elif self.is_merged and not merged:
            self.unmerge()

    def _let_learn(self, learns: bool) -> None:
        for parameter in self.named_parameters().values():
            parameter.requires_grad_(learns)

    def __repr__(self) -> str:
        state = "merged" if self.is_merged else "active" if self.is_active else "inactive"
        count = f"{self.num_parameters:,} parameters"
        return f"{type(self).__name__}({self.method!r}, {self.name!r}, {count}, {state} on {self.model.name})"


class WeightAdapter(Adapter):
    """An adapter of linear layers: every target layer has a `Side`.

    Attributes:
        sides: path of the layer -> side, in the order of the model.
    """

    kind = "weights"

    def __init__(
        self, model: LanguageModel, method: str, name: str, options: dict[str, Any], targets: str | Sequence[str] | None
    ) -> None:
        super().__init__(model, method, name, options)
        self.paths = choose_layers(model, targets)
        self.sides: dict[str, Side] = {}
        self._aside: dict[str, AdaptedLinear] = {}  # the adapted layers while merged ones are in the model

    @classmethod
    def build(
        cls, model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
    ) -> WeightAdapter:
        """See `Adapter`; the options are the arguments of the subclass behind `name`."""
        return cls(model, method, name, **check_options(method, options, cls.__init__, skip=4))

    @abstractmethod
    def build_side(self, path: str, layer: Any) -> Side:
        """The side of one layer."""

    def mount(self) -> None:
        """See `Adapter`."""
        for path in self.paths:  # all of them first: an error leaves the model as it was
            layer: Any = self.model.get_submodule(path)
            try:
                side = self.build_side(path, layer.base if isinstance(layer, AdaptedLinear) else layer)
            except WkvError as error:
                raise WkvError(f"{path}: {error}") from error
            self.sides[path] = side.to(self.model.ln_out.weight.device)
        for path, side in self.sides.items():
            adapted(self.model, path).sides[self.name] = side

    def unmount(self) -> None:
        """See `Adapter`."""
        for path in self.paths:
            layer = adapted(self.model, path)
            del layer.sides[self.name]
            if not layer.sides:
                replace(self.model, path, layer.base)

    def set_active(self, active: bool) -> None:
        """See `Adapter`."""
        for path in self.paths:
            adapted(self.model, path).active = self.name if active else None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Adapter`."""
        named = ((path, side.named_parameters()) for path, side in self.sides.items())
        return {f"{path}.{name}": parameter for path, parameters in named for name, parameter in parameters}

    def merge(self) -> None:
        """See `Adapter`. The base's own weights are kept beside the merged ones.

        Raises:
            WkvError: if it is merged already, if another adapter is, or if the base is quantised.
        """
        check_unmerged(self.model)
        self.activate()
        merged = {}
        for path in self.paths:
            try:
                merged[path] = adapted(self.model, path).merged(self.name)
            except WkvError as error:
                raise WkvError(f"{path}: {error}") from error
        for path, layer in merged.items():
            self._aside[path] = adapted(self.model, path)
            replace(self.model, path, layer.train(self._aside[path].training))
        self.is_merged = True

    def unmerge(self) -> None:
        """See `Adapter`."""
        if not self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is not merged")
        for path, layer in self._aside.items():
            replace(self.model, path, layer)
        self._aside.clear()
        self.is_merged = False


def active_adapter(model: LanguageModel, kind: str) -> Adapter | None:
    """The adapter of a kind ("weights", "state") that has an effect on the model, if there is one."""
    name = model.active_adapters.get(kind)
    found: Adapter | None = None if name is None else model.adapters[name]
    return found


def check_unmerged(model: LanguageModel) -> None:
    """Raise `WkvError` if the weights of an adapter are merged into the model."""
    merged = next((a for a in model.adapters.values() if a.is_merged and a.kind == WeightAdapter.kind), None)
    if merged is not None:
        raise WkvError(f"the adapter {merged.name!r} is merged into the model; call unmerge() first")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
