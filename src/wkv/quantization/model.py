"""Whole models in 8 or 4 bits: which layer becomes what, and the way back.

A quantised model is a model of the same class: its large matrices are `QuantizedLinear` and `QuantizedEmbedding`
layers, everything else is shared with the model it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.head import TiedHead
from wkv.layers.language_model import LanguageModel
from wkv.layers.meta import without_values
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear, quantize_linear
from wkv.quantization.policy import FLOATS, INTEGERS, Policy, default_policy, group_of

Quantized = QuantizedLinear | QuantizedEmbedding
Progress = Callable[[int, int, str], None]

# float16 ends at 65504; and what is this much changed by it (relative to the tensor's norm) was too small for it.
_FLOAT16_MAX, _FLOAT16_LOSS = 60000.0, 1e-3


class FloatLinear(nn.Linear):
    """A linear layer whose weights have another floating type than its input, which decides the output's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the type of x."""
        return F.linear(x, self.weight.to(x.dtype))


class FloatEmbedding(nn.Embedding):
    """An embedding table in another floating type than the activations.

    Args:
        rows, columns: V, C.
        dtype: type of the result.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__(rows, columns, device="meta")
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [...] -> rows [..., C]."""
        return super().forward(tokens).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> FloatEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)
        return self


@dataclass(frozen=True)
class Part:
    """What becomes of one parameter.

    Args:
        name: its official name.
        group: see `Policy`.
        kind: how it is stored; "keep" if nothing changes.
        note: why this is not what the policy says, or "".
    """

    name: str
    group: str
    kind: str
    note: str = ""


def quantize_model(
    model: LanguageModel, bits: int = 8, policy: Policy | None = None, progress: Progress | None = None
) -> LanguageModel:
    """A model with weights of 8 or 4 bits. `model` stays as it is; parameters that do not change are shared with it.

    Args:
        model: any language model of this library, in floating point.
        bits: 8 or 4: the default policy of that many bits.
        policy: a policy of your own instead; see `default_policy` and `Policy.changed`.
        progress: called as progress(done, total, name) before each parameter.

    Returns:
        A model of the same class, for inference: gradients flow through the quantised layers but not to them.

    Raises:
        WkvError: if the model is quantised already, has no values, or has weights that are not finite.
    """
    parts = plan(model, policy or default_policy(bits, activation_dtype(model)))
    result = skeleton(model)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layers: dict[str, Quantized] = {}
    for done, part in enumerate(parts):
        if progress is not None:
            progress(done, len(parts), part.name)
        if part.kind in INTEGERS:
            layers[part.name] = _quantized(model, part)
            del values[part.name]
        elif part.kind in FLOATS:
            values[part.name] = values[part.name].to(FLOATS[part.kind])
    for name, tensor in values.items():
        set_parameter(result, name, tensor)
    install(result, layers)
    return result.train(model.training)


def plan(model: LanguageModel, policy: Policy) -> list[Part]:
    """What `policy` does to every parameter of `model`, in the model's order.

    Raises:
        WkvError: if the model is quantised already or has no values.
    """
    if is_quantized(model):
        raise WkvError("the model is quantised already; start from the one in floating point")
    _check_thawed(model)
    if any(not adapter.is_merged for adapter in model.adapters.values()):
        raise WkvError("the model carries an adapter; merge or remove it first")
    kinds = policy.to_dict()
    parts = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise WkvError(f"{name} has no values (it is on the meta device); load or initialise the model first")
        group = group_of(name)
        note = _obstacle(model, name) if kinds[group] in INTEGERS else ""
        part = Part(name, group, "keep", note) if note else _part(name, parameter.detach(), group, kinds[group])
        parts.append(part)
    return parts


def _obstacle(model: LanguageModel, name: str) -> str:
    """Why a matrix cannot be stored in integers, or ""."""
    if name == "emb.weight" and isinstance(model.head, TiedHead):
        return "the head is the same matrix"
    layer = model.get_submodule(name.rpartition(".")[0])
    return "its layer has a bias" if isinstance(layer, nn.Linear) and layer.bias is not None else ""


def _part(name: str, value: Tensor, group: str, kind: str) -> Part:
    if group == "vectors" and name.endswith(".weight") and value.squeeze().ndim == 2:
        return Part(name, group, "keep", "a matrix of no known group")
    if kind in FLOATS and value.dtype == FLOATS[kind]:
        return Part(name, group, "keep")
    if kind == "float16" and not _survives_float16(value):
        return Part(name, group, "keep", "float16 cannot hold its values")
    return Part(name, group, kind)


def _survives_float16(value: Tensor) -> bool:
    wide = value.double()
    if not bool(wide.abs().max() <= _FLOAT16_MAX):
        return False
    return bool((wide.half().double() - wide).norm() <= _FLOAT16_LOSS * wide.norm())


def _quantized(model: LanguageModel, part: Part) -> Quantized:
    layer: Any = model.get_submodule(part.name.removesuffix(".weight"))
    try:
        if isinstance(layer, nn.Embedding):
            if not bool(layer.weight.isfinite().all()):
                raise WkvError("a matrix with infinite or NaN weights cannot be quantised")
            made = QuantizedEmbedding.from_weight(layer.weight)
            made.dtype = activation_dtype(model)
            return made
        squared = part.name.endswith("ffn.value.weight")  # its inputs are mostly zeros
        linear = quantize_linear(layer, part.kind, sparse=squared and part.kind != "int6")  # type: ignore[arg-type]
        return linear.to(layer.weight.device)
    except WkvError as error:
        raise WkvError(f"{part.name}: {error}") from error


# ---------------------------------------------------------------- building models


def skeleton(model: LanguageModel) -> LanguageModel:
    """A model of the same class and settings, without values."""
    with without_values():
        result = type(model)(model.config)
    result.tokenizer, result.tuned_state = model.tokenizer, model.tuned_state
    result.gradient_checkpointing = model.gradient_checkpointing
    return result


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter this tensor (not a copy)."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_parameter(leaf, nn.Parameter(value))


def install(model: LanguageModel, layers: Mapping[str, Quantized]) -> None:
    """Put quantised layers in their places, and let layers of another type than the activations convert.

    Args:
        model: its other parameters already have their final types.
        layers: official name of the weight -> layer.
    """
    for name, layer in layers.items():
        _replace(model, name.removesuffix(".weight"), layer)
    dtype = activation_dtype(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            module.dtype = dtype
        elif type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype != dtype:
            _replace(model, path, _mixed(module, dtype))


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _mixed(module: Any, dtype: torch.dtype) -> nn.Module:
    layer: nn.Module
    if isinstance(module, nn.Embedding):
        layer = FloatEmbedding(module.num_embeddings, module.embedding_dim, dtype)
    else:
        layer = FloatLinear(module.in_features, module.out_features, bias=False, device="meta")
    layer.register_parameter("weight", module.weight)
    return layer


def dequantize_model(model: LanguageModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """The plain floating-point model that a quantised one stands for.

    Args:
        model: a quantised model (any other gives a copy of its structure that shares all values of type `dtype`).
        dtype: of all parameters; that of the activations by default.
    """
    _check_thawed(model)
    dtype = dtype or activation_dtype(model)
    result = skeleton(model)
    layers = quantized_layers(model)
    for name, _ in list(result.named_parameters()):
        value = layers[name].dequantize() if name in layers else model.get_parameter(name).detach()
        set_parameter(result, name, value.to(dtype))
    return result.train(model.training)


def _check_thawed(model: LanguageModel) -> None:
    from wkv.quantization.frozen import is_frozen

    if is_frozen(model):
        raise WkvError("the model's base is frozen in blocks; call thaw(model) first, or start from the original")


# ---------------------------------------------------------------- facts


def quantized_layers(model: LanguageModel) -> dict[str, Quantized]:
    """Official name of the weight -> quantised layer."""
    types = (QuantizedLinear, QuantizedEmbedding)
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, types)}


def is_quantized(model: LanguageModel) -> bool:
    """Whether any layer is quantised."""
    return bool(quantized_layers(model))


def activation_dtype(model: LanguageModel) -> torch.dtype:
    """The type activations have: that of the norms, which are never quantised."""
    return model.ln_out.weight.dtype


def resident_bytes(model: LanguageModel) -> int:
    """Memory of all weights, scales included; shared memory counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
