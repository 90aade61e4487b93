"""State tuning: the initial state of every layer is trained, the weights are frozen (RWKV-LM `RWKV-v5`, RWKV-PEFT).

Method "state" trains what the time mixes remember, such as the matrices S_0 of RWKV-5 to 7; "fullstate" trains the
token-shift states as well: what the first token finds as the token before it, behind ln1 and ln2. The result is a
`State` of one sequence: inference starts from it and costs nothing more.

RWKV-4 remembers quotients, num / den, under a common factor exp(max). Trained is num alone. The empty past, den = 0 and
max = -1e30, would multiply num by exp(-1e30) = 0 and leave it without a gradient. So den = 0 and max = 0 take its
place: with num = 0 that is the same past under another normaliser, and logits change by rounding only. While den is 0
the first token divides num by exp(u + k): small keys magnify it, and below -87 float32 has no room for exp(u + k).
A prompt brings its own den and max, which stay fixed: prefer to start RWKV-4 from one.

Which slot is trained by what is in `wkv.tuning.state_slots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.inference.prompts import find_tokenizer
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.state import LayerState, State, check_compatible
from wkv.tuning.adapter import Adapter
from wkv.tuning.options import check_options, check_rank
from wkv.tuning.state_slots import Builder, Fixed, LowRank

METHODS = ("state", "fullstate")


class InitialState(nn.Module):
    """The tuned initial state of a model: `model.initial_state`, through which `model.init_state` passes its zeros.

    It starts as the empty past, or as `init`, and knows the slots of the model by name alone, so models with other
    states are tuned too. Parameters are float32 (float64 after `.double()`), whatever the type of the model.

    Args:
        model: whose states it is for; not changed.
        method: "state" or "fullstate".
        rank: matrix slots are products of this rank; None trains every value.
        init: state of one sequence to start from, such as `model(prompt).state`. What is not trained keeps its values:
            with the state of a prompt the model goes on behind the prompt, whatever the method.
        layers: numbers of the layers that are trained; None means all. The others stay empty, or as in `init`.
        seed: of the random factors of a low rank.

    Raises:
        WkvError: for an unknown method, a rank or layers the model does not have, or a state that does not fit.
    """

    def __init__(
        self,
        model: LanguageModel,
        method: str = "state",
        *,
        rank: int | None = None,
        init: State | None = None,
        layers: Iterable[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise WkvError(f"method {method!r} is unknown; one of {', '.join(METHODS)}")
        self.method = method
        self._empty = empty_state(model)
        start = self._empty if init is None else _checked(init, self._empty)
        chosen = chosen_layers(layers, len(start.layers))
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in start.layers)
        build = Builder(method, None if rank is None else check_rank(rank), torch.Generator().manual_seed(seed))
        for number, values in enumerate(start.layers):
            places: Any = self.layers[number]
            for name, value in values.items():
                module = build.slot(name, value[0].clone(), number in chosen, init is not None)
                if module is not None:
                    places[name] = module
        if not any(True for _ in self.parameters()):
            raise WkvError(f"{model.name} has no state of constant size to tune; use an adapter of its weights")
        if rank is not None and not any(isinstance(module, LowRank) for module in self.modules()):
            raise WkvError(f"rank is for matrix states, and {model.name} has none; leave it out")
        self.to(model.ln_out.weight.device)

    def forward(self, zero: State) -> State:
        """The tuned state for the sequences of `zero`: on its device, in its types, differentiable.

        Args:
            zero: the state before the first token, of any batch size.

        Raises:
            WkvError: if it is of another model.
        """
        check_compatible(zero, self._empty)
        return State(zero.model, [_filled(*pair) for pair in zip(self.layers, zero.layers, strict=True)])

    @torch.no_grad()
    def state(self) -> State:
        """The tuned state of one sequence, detached, in the type of the parameters."""
        parameter = next(self.parameters())
        wanted = torch.float64 if parameter.dtype == torch.float64 else None
        found: State = self(self._empty.to(parameter.device, wanted))
        return found

    def hold(self, layer: int, slot: str, value: Tensor) -> None:
        """Give a slot that is not trained a value, in place of the empty one.

        Raises:
            WkvError: if the model has no such slot, or it has another shape or is trained.
        """
        known = self._empty.layers[layer].get(slot) if 0 <= layer < len(self.layers) else None
        grows = int(slot.endswith("cache"))
        if known is None or known.shape[1 + grows :] != value.shape[grows:]:
            expected = "no such slot" if known is None else f"shape {list(known.shape[1:])}"
            raise WkvError(f"layer {layer}, {slot}: found {list(value.shape)}, but {self._empty.model} has {expected}")
        places: Any = self.layers[layer]
        if slot in places and not isinstance(places[slot], Fixed):
            raise WkvError(f"layer {layer}, {slot} is trained by method {self.method!r} and cannot be held")
        value = wide(value) if known.is_floating_point() else value.to(known.dtype)
        places[slot] = Fixed(value.to(next(self.parameters()).device))

    def _apply(self, fn: Any, recurse: bool = True) -> InitialState:
        # `model.half()` and the like move the state but never round it.
        def kept(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype not in (torch.float32, torch.float64)
            return tensor.to(moved.device) if narrow else moved

        super()._apply(kept, recurse)
        return self


def _filled(places: Any, zeros: LayerState) -> LayerState:
    """A layer's state with memory of its own for every sequence: whoever reads on from it may write to it."""
    filled = dict(zeros)
    for name, place in places.items():
        value, zero = place(), zeros[name]
        value = value.to(zero.device, zero.dtype).expand(len(zero), *value.shape)  # a cache may be longer than its zero
        filled[name] = value.clone(memory_format=torch.contiguous_format)
    return filled


def empty_state(model: LanguageModel) -> State:
    """The state of one sequence before its first token that the model has without any tuning, in float32 on the CPU."""
    blank, layers = torch.empty(0), range(model.config.num_layers)
    return State(model.name, [model.init_layer_state(1, blank, blank, layer) for layer in layers])


def _checked(init: State, empty: State) -> State:
    """`init` on the CPU, in float32 (float64 if it is), if it is a finite state of one sequence of this model."""
    check_compatible(init, empty)
    if init.batch_size != 1:
        found = f"a state of {init.batch_size} sequences"
        raise WkvError(f"init must be the state of one sequence, found {found}; choose one with state.select(row)")
    for number, layer in enumerate(init.layers):
        for name, value in layer.items():
            if not torch.isfinite(value).all():
                raise WkvError(f"layer {number} of init: {name} holds values that are not finite")
    return init.detach().to("cpu")


def chosen_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    """Sorted numbers of layers; all of `count` for None.

    Raises:
        WkvError: if there are none, or one does not exist.
    """
    if layers is not None and not isinstance(layers, Iterable):
        raise WkvError(f"layers: found {layers!r}, expected a list of numbers")
    chosen = range(count) if layers is None else list(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise WkvError(f"layers: found {layer!r}, expected numbers from 0 to {count - 1}")
    if not chosen:
        raise WkvError("layers: name at least one layer to train")
    return sorted(set(chosen))


def check_start(model: LanguageModel, init: State | None) -> None:
    """Refuse to tune from an empty past, unasked, a model that has a tuned state."""
    if model.tuned_state is not None and init is None:
        raise WkvError(
            "the model has a tuned state already: pass init=model.tuned_state to start from it, or set "
            "model.tuned_state = None to start from an empty past"
        )


class StateAdapter(Adapter):
    """A tuned initial state as an adapter. Merged, it is the model's `tuned_state`, from which generation starts.

    A tuned state the model came with is put aside while the adapter is active.

    Options:
        rank, layers, seed, init: see `InitialState`.
        prompt: text (with the model's tokenizer) or ids; the state after them is where to start, in place of `init`.

    Attributes:
        initial: the module that is trained.
    """

    kind = "state"

    @classmethod
    def build(
        cls, model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
    ) -> StateAdapter:
        """See `Adapter`.

        Raises:
            WkvError: as `InitialState`; or if the model has a tuned state and nothing says where to start.
        """
        given = dict(check_options(method, options, cls.__init__, skip=4))
        prompt = given.get("prompt")
        if restoring:
            given["prompt"] = None
        elif prompt is None:
            check_start(model, given.get("init"))
        made = cls(model, method, name, **given)
        if restoring:
            made.options["prompt"] = prompt
        return made

    def __init__(
        self,
        model: LanguageModel,
        method: str,
        name: str,
        rank: int | None = None,
        layers: Sequence[int] | None = None,
        seed: int = 0,
        init: State | None = None,
        prompt: str | Sequence[int] | None = None,
    ) -> None:
        if prompt is not None and init is not None:
            raise WkvError("give init or prompt, not both")
        if not (prompt is None or isinstance(prompt, str)):
            prompt = [int(token) for token in prompt]
        chosen = None if layers is None else chosen_layers(layers, model.config.num_layers)
        super().__init__(model, method, name, {"rank": rank, "layers": chosen, "seed": seed, "prompt": prompt})
        if prompt is not None:
            init = prompt_state(model, prompt)
        self.initial = InitialState(model, method, rank=rank, init=init, layers=chosen, seed=seed)
        self._aside: State | None = None

    def mount(self) -> None:
        """See `Adapter`: an inactive state has no place in the model."""

    def unmount(self) -> None:
        """See `Adapter`."""

    def set_active(self, active: bool) -> None:
        """See `Adapter`."""
        if active:
            self._aside, self.model.tuned_state = self.model.tuned_state, None
            self.model.set_initial_state(self.initial.to(self.model.ln_out.weight.device))
        else:
            self.model.set_initial_state(None)
            self.model.tuned_state, self._aside = self._aside, None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Adapter`."""
        return dict(self.initial.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter`: the parameters, and what a state to start from has fixed."""
        return {**super().tensors(), **dict(self.initial.named_buffers())}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Adapter`."""
        for key in tensors.keys() - self.named_parameters().keys():
            parts = key.split(".")
            if len(parts) == 4 and parts[0] == "layers" and parts[1].isdecimal() and parts[3] == "value":
                self.initial.hold(int(parts[1]), parts[2], tensors[key])
        super().load_tensors(tensors)

    def merge(self) -> None:
        """See `Adapter`.

        Raises:
            WkvError: if it is merged already.
        """
        if self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is merged already")
        self.activate()
        self.model.set_initial_state(None)
        self.model.tuned_state = self.initial.state()
        self.is_merged = True

    def unmerge(self) -> None:
        """See `Adapter`."""
        if not self.is_merged:
            raise WkvError(f"the adapter {self.name!r} is not merged")
        self.model.tuned_state = None
        self.model.set_initial_state(self.initial)
        self.is_merged = False


@torch.no_grad()
def prompt_state(model: LanguageModel, prompt: str | Sequence[int]) -> State:
    """The state of one sequence after a prompt, to start tuning from.

    Args:
        model: reads it from an empty past.
        prompt: text, for the model's own tokenizer or the one its vocabulary size tells, or ids.

    Raises:
        WkvError: if the prompt is empty, or there is no tokenizer for it.
    """
    ids = find_tokenizer(model, None).encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise WkvError("the prompt is empty")
    weight = model.ln_out.weight
    tokens = torch.tensor([ids], dtype=torch.long, device=weight.device)
    state: State = model(tokens, empty_state(model).to(weight.device, weight.dtype)).state
    return state
