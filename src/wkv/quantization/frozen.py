"""Frozen bases for fine-tuning: the large matrices of a model in blocks of 4 or 8 bits, without bitsandbytes.

>>> base = wkv.quantization.frozen.freeze_base(model, "nf4")
>>> adapter = wkv.tuning.create("miss", base)

Where `quantize_model` makes models that read text fast, this makes models under which adapters learn (QLoRA, arXiv
2305.14314): a frozen matrix computes exactly what a plain layer with the dequantised weights does, in the type of the
activations, and so do its gradients. It is dequantised for each product, in the forward and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.quantization.blockwise import BlockKind, Blocks, quantize_blocks
from wkv.quantization.model import _replace, activation_dtype, is_quantized, set_parameter, skeleton
from wkv.quantization.modules import moved
from wkv.quantization.policy import group_of

_GROUPS = ("att", "ffn_key", "ffn_value", "ffn_receptance")


class FrozenLinear(nn.Module):
    """y = x W^T with W in blocks; frozen, gradients flow to x.

    Args:
        blocks: W [O, I].
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor | None
    nested_absmax: Tensor | None

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.kind, self.block_size, self.shape = blocks.kind, blocks.block_size, blocks.shape
        self.out_features, self.in_features = blocks.shape
        self.register_buffer("codes", blocks.codes)
        self.register_buffer("absmax", blocks.absmax)
        self.register_buffer("offset", blocks.offset)
        self.register_buffer("nested_absmax", blocks.nested_absmax)

    @property
    def blocks(self) -> Blocks:
        """The weights as stored."""
        tensors = (self.codes, self.absmax, self.offset, self.nested_absmax)
        return Blocks(self.kind, self.block_size, self.shape, *tensors)

    @property
    def num_weights(self) -> int:
        """O I."""
        return self.out_features * self.in_features

    def dequantize(self) -> Tensor:
        """W in float32 [O, I]."""
        return self.blocks.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the type of x; under autocast in its type, as `nn.Linear`."""
        if x.shape[-1] != self.in_features:
            raise WkvError(f"expected [..., {self.in_features}], found {list(x.shape)}")
        result: Tensor = _Product.apply(x.to(_product_type(x)), self.blocks, False)
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = moved(buffer, fn)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        double = ", double" if self.offset is not None else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.kind}, block_size={self.block_size}{double}"


class _Product(torch.autograd.Function):
    """x W^T, or x W. The gradient of one is the other, so nothing but the codes is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks, transposed: bool) -> Tensor:
        ctx.blocks, ctx.transposed = blocks, transposed
        weight = blocks.dequantize(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.matmul(x, weight) if transposed else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(grads[0], ctx.blocks, not ctx.transposed), None, None


def _product_type(x: Tensor) -> torch.dtype:
    """The type of products with `x`: autocast's where it applies."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def freeze_linear(layer: nn.Linear, kind: BlockKind, block_size: int = 64, double: bool = False) -> FrozenLinear:
    """The layer with its weights in blocks; arguments as those of `quantize_blocks`.

    Raises:
        WkvError: for a layer with a bias, an unknown kind or size, or weights that are not finite.
    """
    if layer.bias is not None:
        raise WkvError("layers with a bias cannot be frozen in blocks")
    return FrozenLinear(quantize_blocks(layer.weight, kind, block_size, double))


# ---------------------------------------------------------------- models


def freeze_base(
    model: LanguageModel,
    kind: BlockKind = "nf4",
    block_size: int = 64,
    double: bool = False,
    targets: str | Sequence[str] | None = None,
) -> LanguageModel:
    """A model whose large matrices are frozen in blocks. `model` stays as it is.

    Args:
        model: any language model of this library, in floating point and without adapters.
        kind: "nf4", "fp4", "int8-block" or "int8-row".
        block_size: weights of one scale: a power of two, at least 16; int8-row has one scale for each row.
        double: quantise the scales as well; for nf4 and fp4.
        targets: which of the matrices of time mix and channel mix, named as for adapters: "key" (every layer so
            called), "att.key", "att", "blocks.3", or patterns such as "blocks.[0-3].att.*". None: all of them.
            Embedding, head, norms, vectors and low-rank maps stay as they are.

    Returns:
        A model of the same class. Its other parameters share their memory with those of `model`: what trains them
        changes both. Tokenizer and tuned state are carried over.

    Raises:
        WkvError: if the model is quantised or frozen already, has adapters or no values, if a target names nothing, for
            an unknown kind or size, or for weights that are not finite.
    """
    _check_plain(model)
    result = skeleton(model)
    names = [name for name, _ in result.named_parameters()]
    if names != [name for name, _ in model.named_parameters()]:
        raise WkvError("the model has other parameters than its class; remove adapters before its base is frozen")
    chosen = _chosen(names, targets)
    for name in names:
        parameter, path = model.get_parameter(name), name.removesuffix(".weight")
        if path in chosen:
            _replace(result, path, _frozen(model, path, kind, block_size, double))
        else:
            set_parameter(result, name, parameter.detach())
            result.get_parameter(name).requires_grad_(parameter.requires_grad)
    return result.train(model.training)


def _check_plain(model: LanguageModel) -> None:
    if not isinstance(model, LanguageModel):
        raise WkvError(f"freeze_base takes a model of this library, found {type(model).__name__}")
    if is_frozen(model) or is_quantized(model):
        state = "frozen" if is_frozen(model) else "quantised"
        raise WkvError(f"the model is {state} already; start from the one in floating point")
    if any(not adapter.is_merged for adapter in model.adapters.values()):
        raise WkvError("the model carries an adapter; merge or remove it first")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise WkvError(f"{name} has no values (it is on the meta device); load or initialise the model first")


def _chosen(names: Sequence[str], targets: str | Sequence[str] | None) -> set[str]:
    """Paths of the layers to freeze, out of the names of all parameters."""
    matrices = [name.removesuffix(".weight") for name in names if group_of(name) in _GROUPS]
    if targets is None:
        return set(matrices)
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = [path for path in matrices if f".{target}." in f".{path}." or fnmatchcase(path, target)]
        if not found:
            known = ", ".join(sorted({path.split(".", 2)[2] for path in matrices}))
            raise WkvError(f"targets: no large matrix is called {target!r}; there are {known}")
        chosen.update(found)
    if not chosen:
        raise WkvError("targets: name at least one matrix")
    return chosen


def _frozen(model: LanguageModel, path: str, kind: BlockKind, block_size: int, double: bool) -> FrozenLinear:
    layer: Any = model.get_submodule(path)
    try:
        return freeze_linear(layer, kind, block_size, double).train(layer.training)
    except WkvError as error:
        raise WkvError(f"{path}: {error}") from error


def thaw(model: LanguageModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """The plain floating-point model that a frozen one stands for.

    Args:
        model: a frozen model (any other gives a copy of its structure that shares all values of type `dtype`).
        dtype: of all parameters; that of the activations by default.
    """
    dtype = dtype or activation_dtype(model)
    result = skeleton(model)
    layers = frozen_layers(model)
    for name, _ in list(result.named_parameters()):
        layer = layers.get(name)
        value = model.get_parameter(name).detach().to(dtype) if layer is None else layer.blocks.dequantize(dtype)
        set_parameter(result, name, value)
    return result.train(model.training)


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """Official name of the weight -> frozen layer."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def is_frozen(model: nn.Module) -> bool:
    """Whether any matrix is frozen in blocks."""
    return bool(frozen_layers(model))
