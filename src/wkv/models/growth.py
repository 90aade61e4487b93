"""Growth: larger RWKV-7 and Meta-State models that compute exactly what the smaller one computes.

Our reconstruction of the progressive scaling that arXiv 2504.08247 names, and what can be grown so that nothing
changes at that moment. What is new gets official initial values, as a model of the new part alone would; the matrices
through which it would speak, W_o and W_v, get zeros there:

- heads: rows of every map into the time mix, and zero columns of W_o. Old heads do not notice: each has its own
  state and its own group of the norm;
- parameter tokens: rows of the channel mix's W_k, and zero columns of its W_v;
- layers: both matrices zero, so that the residual stream passes through.

Channels of a head cannot be added: the removal key is scaled to length 1 and the group norm averages over the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.meta import without_values
from wkv.models.rwkv7 import RWKV7, RWKV7Config, TimeMix
from wkv.state import State

Model = TypeVar("Model", bound=RWKV7)

# Matrices through which new heads, parameter tokens and layers speak.
_OUTPUTS = ("att.output.weight", "ffn.value.weight")


def add_heads(model: Model, heads: int) -> Model:
    """A copy with more heads in the time mix of every layer, each with a state of its own.

    The width of the residual stream stays: attention_size grows by heads x head_size. `meta_heads` stay as they are.

    Args:
        model: an RWKV-7, RWKV-7a or Meta-State model, left as it is.
        heads: how many to add.

    Returns:
        a new model of the same class, type and device; its logits are the old ones.

    Raises:
        WkvError: for another model, or one that is quantised or carries an adapter.
    """
    config = _checked(model, "heads", heads)
    width = heads * config.head_size
    changed = _with_step(config, {"heads": heads}, attention_size=config.attention_size + width)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(RWKV7Config)}
    part = RWKV7Config(**{**fields, "attention_size": width})
    return _assembled(model, changed, _fresh(config, lambda layer: nn.ModuleDict({"att": TimeMix(part, layer)})))


def add_param_tokens(model: Model, tokens: int) -> Model:
    """A copy with a wider channel mix in every layer: ffn_size grows by `tokens`. See `add_heads`.

    Raises:
        WkvError: as there, and for Meta-State models of mode "pure", which have no parameter tokens.
    """
    config = _checked(model, "tokens", tokens)
    if getattr(config, "mode", None) == "pure":
        raise WkvError("a model of mode 'pure' has no parameter tokens, so none can be added")
    changed = _with_step(config, {"param_tokens": tokens}, ffn_size=config.ffn_size + tokens)
    part, mix = dataclasses.replace(config, ffn_size=tokens), type(model.blocks[0].ffn)
    return _assembled(model, changed, _fresh(config, lambda layer: nn.ModuleDict({"ffn": mix(part, layer)})))


def add_layers(model: Model, layers: int, index: int | None = None) -> Model:
    """A copy with further layers. See `add_heads`.

    Args:
        model: as there.
        layers: how many to add.
        index: of the first new layer, from 1 on; behind the last layer by default.

    Raises:
        WkvError: as there; for index 0, since the first layer's values are mixed into those of all others; and for
            Meta-State models of mode "pure", whose channel mix has no matrix that could be zero.
    """
    config = _checked(model, "layers", layers)
    index = config.num_layers if index is None else index
    if getattr(config, "mode", None) == "pure":
        raise WkvError("a new layer of mode 'pure' would change what the model computes: its channel mix has no W_v")
    if type(index) is int and index == 0:
        raise WkvError("no layer can be put before the first: its values are mixed into those of all other layers")
    if type(index) is not int or not 0 < index <= config.num_layers:
        raise WkvError(f"index must be an integer from 1 to {config.num_layers}, found {index!r}")
    changed = _with_step(config, {"layers": layers, "index": index}, num_layers=config.num_layers + layers)
    new = range(index, index + layers)
    return _assembled(model, changed, _fresh(changed, lambda layer: model.build_block(changed, layer), new))


def grow(
    model: Model, attention_size: int | None = None, ffn_size: int | None = None, num_layers: int | None = None,
    head_size: int | None = None,
) -> Model:  # fmt: skip
    """A copy grown to some sizes, by the three functions above; layers are put behind the last.

    Raises:
        WkvError: for sizes below the model's, for any other `head_size`, and as above.
    """
    config: Any = model.config
    if head_size not in (None, config.head_size):
        raise WkvError("head_size cannot grow: the norms over a head's channels would change; add heads instead")
    sizes = {"attention_size": attention_size, "ffn_size": ffn_size, "num_layers": num_layers}
    more = {name: 0 if size is None else size - getattr(config, name) for name, size in sizes.items()}
    for name, count in more.items():
        if count < 0 or (name == "attention_size" and count % config.head_size):
            raise WkvError(f"{name} cannot grow from {getattr(config, name)} to {sizes[name]}")
    steps = (
        (add_heads, more["attention_size"] // config.head_size),
        (add_param_tokens, more["ffn_size"]),
        (add_layers, more["num_layers"]),
    )
    for step, count in steps:
        model = step(model, count) if count else model
    return model


def grow_state(state: State, old: RWKV7, new: RWKV7) -> State:
    """The state of `old` as one of `new`, grown from it, which reads on from there as `old` would.

    Raises:
        WkvError: if `new` was not grown from `old`.
    """
    empty = new.init_state(state.batch_size, state.device, state.layers[0]["att_shift"].dtype)
    layers = []
    for layer, slots in zip(_origins(old, new), empty.layers, strict=True):
        known = {} if layer is None else state.layers[layer]
        layers.append({name: _padded(known[name], slot) if known else slot for name, slot in slots.items()})
    return State(new.name, layers)


@torch.no_grad()
def grow_optimizer_state(
    old_optimizer: torch.optim.Optimizer, old: RWKV7, new_optimizer: torch.optim.Optimizer, new: RWKV7
) -> None:
    """Hand the moments of an optimizer over to that of the grown model.

    Old entries keep their moments, new ones start at 0. A tensor has one count of steps, which old and new entries
    share; tensors of new layers start to count at 0.

    Args:
        old_optimizer: of `old`, of the Adam kind: its state has the shapes of the parameters.
        old: a model.
        new_optimizer: of `new`, not yet used.
        new: grown from `old`.

    Raises:
        WkvError: if `new` was not grown from `old`.
    """
    parameters = dict(old.named_parameters())
    names = _origin_names(old, new)
    for name, parameter in new.named_parameters():
        source = parameters.get(names[name] or "")
        if source is None or source not in old_optimizer.state:
            continue
        new_optimizer.state[parameter] = {
            key: _padded(value, torch.zeros_like(parameter, dtype=value.dtype))
            if _like(value, source)
            else _copy(value)
            for key, value in old_optimizer.state[source].items()
        }


# ---- what all have in common ----


def _checked(model: RWKV7, what: str, count: int) -> Any:
    """The configuration of a model that can grow by `count`."""
    if not isinstance(model, RWKV7):
        raise WkvError(f"only RWKV-7 and models made from it can grow, found {getattr(model, 'name', model)!r}")
    if type(count) is not int or count < 1:
        raise WkvError(f"{what} must be a positive integer, found {count!r}")
    with without_values():
        plain = type(model)(model.config)
    if model.adapters or model.state_dict().keys() != plain.state_dict().keys():
        raise WkvError("the model is quantised or carries an adapter: dequantise it, or merge the adapter, first")
    if model.initial_state is not None:
        raise WkvError("the model starts from a state that is being tuned; end that first")
    return model.config


def _with_step(config: Any, step: dict[str, int], **sizes: int) -> Any:
    return dataclasses.replace(config, growth=[*config.growth, step], **sizes)


@torch.no_grad()
def _fresh(config: Any, part: Callable[[int], Any], layers: range | None = None) -> dict[str, Tensor]:
    """Official initial values of a part of some layers (of all by default), silent: the outputs are zero."""
    values = {}
    for layer in layers or range(config.num_layers):
        module = part(layer)
        for child in module.children():
            child.reset_parameters()
        values.update({f"blocks.{layer}.{key}": value for key, value in module.state_dict().items()})
    for key, value in values.items():
        if key.endswith(_OUTPUTS):
            value.zero_()
    return values


def _assembled(model: Model, config: Any, fresh: dict[str, Tensor]) -> Model:
    """A model of the class of `model` with its values, behind which come the fresh ones."""
    with without_values():
        new = type(model)(config)
    values, like, names = model.state_dict(), model.ln_out.weight, _origin_names(model, new)
    result = {}
    for key, empty in new.state_dict().items():
        old = values.get(names[key] or "")
        if old is None:
            result[key] = fresh[key].to(like)
            continue
        axis = next((i for i, size in enumerate(old.shape) if size != empty.shape[i]), None)
        result[key] = old.detach().clone() if axis is None else torch.cat([old.detach(), fresh[key].to(old)], axis)
    new.load_state_dict(result, assign=True)
    new.tokenizer, new.gradient_checkpointing = model.tokenizer, model.gradient_checkpointing
    if model.tuned_state is not None:
        new.tuned_state = grow_state(model.tuned_state, model, new)
    return new.train(model.training)


def _origins(old: RWKV7, new: RWKV7) -> list[int | None]:
    """For every layer of `new` the one of `old` that it was, or None if it was added."""
    before, after = (list(getattr(model.config, "growth", [])) for model in (old, new))
    if type(old) is not type(new) or after[: len(before)] != before:
        raise WkvError(f"a model with the growth {after} was not grown from one with {before}")
    layers: list[int | None] = list(range(old.config.num_layers))
    for step in after[len(before) :]:
        if "layers" in step:
            layers[step["index"] : step["index"]] = [None] * step["layers"]
    if len(layers) != new.config.num_layers:
        raise WkvError(f"a model of {new.config.num_layers} layers was not grown from one of {old.config.num_layers}")
    return layers


def _origin_names(old: RWKV7, new: RWKV7) -> dict[str, str | None]:
    """Key of `new` -> key of `old`, or None for a layer that was added."""
    origins = _origins(old, new)
    names: dict[str, str | None] = {}
    for key in new.state_dict():
        names[key] = key
        if key.startswith("blocks."):
            _, layer, rest = key.split(".", 2)
            origin = origins[int(layer)]
            names[key] = None if origin is None else f"blocks.{origin}.{rest}"
    return names


def _padded(small: Tensor, zeros: Tensor) -> Tensor:
    """A copy of `small`, with zeros behind it up to the shape of `zeros`."""
    result = zeros.clone()
    result[tuple(slice(size) for size in small.shape)] = small
    return result


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
