"""Kernel upscaling of RWKV-7's state, after "State-based Test-Time Scaling" (arXiv 2504.05097).

The paper names the ingredients: support vectors u_1 .. u_M, features phi(z) = (K(z, u_1), .., K(z, u_M)), a state of
M x M per head, and a fixed projection Q back to the head size N. There is no released code and the details are not
public, so both forms below are our reconstruction. Trained is the initial state S~_0 alone.

- "residual" (the default): y_t = y_t of the model + Q S~_t r~_t, where S~_t = S~_{t-1} A~_t is never written to. It
  starts at S~_0 = 0, which changes nothing, y is affine in S~_0, and S~ cannot grow: see `KernelFeatures.residual`.
- "replace": phi takes the place of every vector of the recurrence, y_t = Q S~_t phi(r_t). That is the literal reading;
  untrained it changes all outputs, and S~ may grow without bound.

With `dbp`, S~_0 = W R is trained by decorrelated backpropagation: the slot then carries A~_1 .. A~_t, of which x_t is
read, and y_t gets Q W R x_t.

The state of a model with such an adapter has the slot "kernel" [B, H, M, M] in every layer.

Shape letters: B batch, T time, H heads, N head size, M kernel size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.models.rwkv7 import RWKV7Config, TimeMix
from wkv.state import State, check_compatible
from wkv.tuning.adapter import Adapter
from wkv.tuning.decorrelation import DecorrelatedMatrix, Decorrelation
from wkv.tuning.kernel_features import (
    KERNELS,
    SUPPORTS,
    KernelFeatures,
    Tokens,
    choose_support,
    removal_directions,
    unit_vectors,
)
from wkv.tuning.kernel_memory import KernelMemory, KernelStates
from wkv.tuning.options import check_options, check_rank
from wkv.tuning.state import check_start, empty_state
from wkv.tuning.state_slots import Whole

MODES = ("residual", "replace")
DIRECTIONS = 1024  # random ones per head, whose mean feature is subtracted where there are no tokens


class KernelStateAdapter(Adapter):
    """An upscaled kernel state beside the state of each head of RWKV-7 or RWKV-7a (our reconstruction).

    Unlike a tuned state it costs something at inference, a second recurrence of size M, and it cannot be merged, except
    where it is a plain tuned state in other words: support "identity" with the linear kernel. With `dbp` that is plain
    state tuning by decorrelated backpropagation.

    A tuned state the model came with is put aside while the adapter is active.

    Options:
        size: M, at least N; 2 N by default, N for support "identity".
        mode: "residual" or "replace", see the module.
        support: "random" (unit vectors), "kmeans" (cluster centres of the removal directions kk of `batches`), or
            "identity" (M = N).
        kernel: "gaussian" or "linear" (phi(z) = U z, for tests and comparisons).
        centre: subtract the mean feature, over the kk of `batches` or else over random directions; "gaussian" in mode
            "residual" only. Without it, features of different keys are nearly parallel.
        sharpness: c in gamma = c / (2 median |u_i - u_j|^2).
        dbp: True, or the fields of `Decorrelation` as a mapping: train S~_0 as W R; in mode "residual", one process.
            Call `fold` after training.
        seed: of support vectors.
        batches: tokens int64 [B, T] of the task, or `wkv.data.Batch`; 2000 tokens or more. Not kept.
        init: state of one sequence from which the model's own slots start, such as `model.tuned_state`; not trained.

    Attributes:
        states: the module that is trained.
    """

    kind = "state"

    @classmethod
    def build(
        cls, model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
    ) -> KernelStateAdapter:
        """See `Adapter`.

        Raises:
            WkvError: for another model than RWKV-7, options that do not fit together, or a model with a tuned state if
                `init` does not say where to start.
        """
        check_options(method, options, cls.__init__, skip=5)
        if not restoring:
            check_start(model, options.get("init"))
        return cls(model, method, name, restoring, **options)

    def __init__(
        self,
        model: LanguageModel,
        method: str,
        name: str,
        restoring: bool = False,
        size: int | None = None,
        mode: str = "residual",
        support: str = "random",
        kernel: str = "gaussian",
        centre: bool = True,
        sharpness: float = 4.0,
        dbp: bool | Mapping[str, Any] = False,
        seed: int = 0,
        batches: Tokens | None = None,
        init: State | None = None,
    ) -> None:
        config = _rwkv7_config(model)
        plain = {
            "size": _check_size(size, config.head_size, support),
            **{"mode": mode, "support": support, "kernel": kernel, "centre": centre, "sharpness": sharpness},
            **{"dbp": dict(dbp) if isinstance(dbp, Mapping) else dbp, "seed": seed},
        }
        _check_choices(plain)
        rule = _rule(dbp)
        super().__init__(model, method, name, plain)
        if restoring:
            layers = _memories(model, {**plain, "support": _without_tokens(support)}, rule, None)
        else:
            _check_new(plain, batches)
            layers = _memories(model, plain, rule, batches)
        past = None if init is None else _checked_past(init, model)
        self.states = KernelStates(layers, past).to(model.ln_out.weight.device)
        if model.ln_out.weight.dtype == torch.float64:
            self.states.double()
        self._aside: State | None = None

    def mount(self) -> None:
        """See `Adapter`: an inactive state has no place in the model."""

    def unmount(self) -> None:
        """See `Adapter`."""

    def set_active(self, active: bool) -> None:
        """See `Adapter`."""
        if active:
            self._aside, self.model.tuned_state = self.model.tuned_state, None
        self._connect(active)
        if not active:
            self.model.tuned_state, self._aside = self._aside, None

    def _connect(self, on: bool) -> None:
        """Put the memories into the time mixes, and the slot into the model's states; or take them out."""
        states = self.states.to(self.model.ln_out.weight.device)
        for block, memory in zip(self.model.blocks, states.layers, strict=True):
            block.att.side_memory = memory.read if on else None
        self.model.set_initial_state(states if on else None)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Adapter`."""
        return dict(self.states.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter`: S~_0, or W and R; the constants of the features; and the past it starts from."""
        for start in self._decorrelated():
            start.settle()
        past = {} if self.states.past is None else _named(self.states.past)
        return {**super().tensors(), **dict(self.states.named_buffers()), **past}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Adapter`."""
        past = {name: value for name, value in tensors.items() if name.startswith("past.")}
        if past:
            empty = empty_state(self.model)
            found = [
                {k: past.get(f"past.{i}.{k}", x[0])[None] for k, x in layer.items()}
                for i, layer in enumerate(empty.layers)
            ]
            self.states.past = _checked_past(State(empty.model, found), self.model)
        super().load_tensors(tensors)

    @property
    def mergeable(self) -> bool:
        """Whether it is a plain tuned state in other words."""
        return bool(self.options["support"] == "identity" and self.options["kernel"] == "linear")

    @torch.no_grad()
    def merge(self) -> None:
        """See `Adapter`: `model.tuned_state` becomes S_0 + S~_0, where that does the same.

        Raises:
            WkvError: if it does not, or if it is merged already.
        """
        if not self.mergeable:
            raise WkvError(
                f"the kernel state {self.name!r} cannot be merged: it has a memory of {self.options['size']} x "
                f"{self.options['size']} beside each head's own. Use it unmerged, or create it with "
                'support="identity", kernel="linear"'
            )
        if self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is merged already")
        self.activate()
        self._connect(False)
        self.model.tuned_state = self._plain()
        self.is_merged = True

    def unmerge(self) -> None:
        """See `Adapter`."""
        if not self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is not merged")
        self.model.tuned_state = None
        self._connect(True)
        self.is_merged = False

    def _plain(self) -> State:
        weight = self.model.ln_out.weight
        state = (self.states.past or empty_state(self.model)).to(weight.device, wide(weight).dtype)
        kept = self.options["mode"] == "residual"
        for layer, memory in zip(state.layers, self._memories(), strict=True):
            layer["wkv"] = (layer["wkv"] if kept else 0) + memory.value().to(layer["wkv"])[None]
        return state

    def _memories(self) -> list[KernelMemory]:
        return [memory for memory in self.states.layers if isinstance(memory, KernelMemory)]

    def _decorrelated(self) -> list[DecorrelatedMatrix]:
        return [memory.start for memory in self._memories() if isinstance(memory.start, DecorrelatedMatrix)]

    def decorrelation_loss(self) -> float | None:
        """Of the rule at the last step of R, mean over heads; None before that, or without `dbp`."""
        losses = [start.loss.mean() for start in self._decorrelated() if start.loss is not None]
        return float(torch.stack(losses).mean()) if losses else None

    def fold(self) -> None:
        """End training with `dbp`: S~_0 = W R becomes one matrix, as if it had been trained without.

        Parameters are others then, so optimisers must be made anew.
        """
        for memory in self._memories():
            memory.start = Whole(memory.value())
        self.options["dbp"] = False
        self._let_learn(self.is_active)
        if self.is_active and not self.is_merged:
            self._connect(True)


def _memories(
    model: LanguageModel, options: dict[str, Any], rule: Decorrelation | None, batches: Tokens | None
) -> list[KernelMemory]:
    """The memories of all layers, S~_0 = 0."""
    generator = torch.Generator().manual_seed(options["seed"])
    config = _rwkv7_config(model)
    heads, size, head_size = config.num_heads, options["size"], config.head_size
    seen: list[Tensor | None] = [None] * config.num_layers
    if batches is not None:
        seen = list(removal_directions(model, batches, generator))
    centred = options["centre"] and options["kernel"] == "gaussian" and options["mode"] == "residual"
    layers = []
    for directions in seen:
        support = choose_support(options["support"], heads, size, head_size, directions, generator)
        if directions is None:
            directions = unit_vectors(heads, DIRECTIONS, head_size, generator)
        features = KernelFeatures(support, directions if centred else None, options["kernel"], options["sharpness"])
        layers.append(KernelMemory(features, options["mode"], rule))
    return layers


def _rwkv7_config(model: LanguageModel) -> RWKV7Config:
    config = model.config
    if not isinstance(config, RWKV7Config) or not all(isinstance(block.att, TimeMix) for block in model.blocks):
        raise WkvError(f"kernel states are for RWKV-7 and RWKV-7a, found {model.name}; use method state")
    return config


def _check_size(size: int | None, head_size: int, support: str) -> int:
    found = (head_size if support == "identity" else 2 * head_size) if size is None else check_rank(size, "size")
    if found < head_size or (support == "identity" and found != head_size):
        expected = f"{head_size}" if support == "identity" else f"at least {head_size}"
        raise WkvError(f"size must be {expected} with support {support!r} and head size {head_size}, found {found}")
    return found


def _check_choices(options: dict[str, Any]) -> None:
    for key, known in (("mode", MODES), ("support", SUPPORTS), ("kernel", KERNELS)):
        if options[key] not in known:
            raise WkvError(f"{key} {options[key]!r} is unknown; one of {', '.join(known)}")
    sharpness = options["sharpness"]
    if isinstance(sharpness, bool) or not isinstance(sharpness, int | float) or not 0 < sharpness < float("inf"):
        raise WkvError(f"sharpness must be a positive number, found {sharpness!r}")
    if options["mode"] == "residual":
        return
    if options["dbp"]:
        raise WkvError('dbp is for mode "residual", in which outputs are linear in what is trained')
    if options["kernel"] == "linear" and options["support"] != "identity":
        raise WkvError('mode "replace" with a linear kernel needs support "identity": a decay must stay positive')


def _check_new(options: dict[str, Any], batches: Tokens | None) -> None:
    if options["support"] == "kmeans" and batches is None:
        raise WkvError('support "kmeans" needs tokens of the task: give batches')
    if options["mode"] == "replace":
        warnings.warn(
            'kernel state in mode "replace": all outputs of the untrained model change, and the state may grow without '
            'bound; "residual" is the stable form',
            stacklevel=6,
        )


def _without_tokens(support: str) -> str:
    """What takes the place of a support until its vectors are loaded."""
    return "random" if support == "kmeans" else support


def _checked_past(state: State, model: LanguageModel) -> State:
    empty = empty_state(model)
    check_compatible(state, empty, batch_size=1)
    if not all(bool(value.isfinite().all()) for layer in state.layers for value in layer.values()):
        raise WkvError("init holds values that are not finite")
    return state.detach().to("cpu")


def _rule(dbp: bool | Mapping[str, Any]) -> Decorrelation | None:
    if isinstance(dbp, bool):
        return Decorrelation() if dbp else None
    if not isinstance(dbp, Mapping):
        raise WkvError(f"dbp is True, False or a mapping of the fields of Decorrelation, found {dbp!r}")
    return Decorrelation(**check_options("dbp", dict(dbp), Decorrelation, skip=0))


def _named(state: State) -> dict[str, Tensor]:
    return {f"past.{i}.{slot}": x[0] for i, layer in enumerate(state.layers) for slot, x in layer.items()}
