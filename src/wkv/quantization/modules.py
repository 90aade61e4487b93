"""Layers with quantised weights, in place of `nn.Linear` and `nn.Embedding`.

Shape letters: V vocabulary, C channels, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv import native
from wkv.errors import WkvError
from wkv.ops.gpu import packed as gpu
from wkv.quantization.packed import Kind, Packed, num_bytes, padded_shape, quantize


def moved(buffer: Tensor, fn: Any) -> Tensor:
    """What `fn` makes of codes or scales, on another device perhaps, but never rounded to another type."""
    result: Tensor = fn(buffer)
    return result if result.dtype == buffer.dtype else buffer.to(result.device)


class QuantizedLinear(nn.Module):
    """y = x W^T with W in 8, 6 or 4 bits; frozen, gradients flow to x.

    On the CPU the native kernels multiply the codes themselves (inputs rounded to 15 bits, relative to their largest
    value), and on a GPU those in Triton, for up to 64 tokens. Otherwise W is brought to a floating-point type first: on
    a GPU that of x, elsewhere float32.

    Args:
        packed: the weights.
    """

    data: Tensor
    scale: Tensor | None

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.kind, self.sparse, self.shape = packed.kind, packed.sparse, packed.shape
        self.out_features, self.in_features = packed.shape
        self.register_buffer("data", packed.data)
        self.register_buffer("scale", packed.scale)

    @property
    def packed(self) -> Packed:
        """The weights as stored."""
        return Packed(self.kind, self.sparse, self.shape, self.data, self.scale)

    @property
    def num_weights(self) -> int:
        """N K."""
        return self.out_features * self.in_features

    def dequantize(self) -> Tensor:
        """W in float32 [N, K]."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the type of x."""
        if x.shape[-1] != self.in_features:
            raise WkvError(f"expected [..., {self.in_features}], found {list(x.shape)}")
        result: Tensor = _Product.apply(x, self)
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = moved(buffer, fn)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return multiply(layer, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return in_floating_point(dy, ctx.layer.dequantize().T), None


def multiply(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """x [..., K] -> x W^T [..., N] in the type of x."""
    packed = layer.packed
    if gpu.fits(x, layer.in_features):
        flat = x.reshape(-1, layer.in_features)
        y = gpu.product(flat, packed.data, packed.scale, packed.bits, packed.sparse, layer.out_features)
        return y.view(*x.shape[:-1], layer.out_features)
    if x.device.type != "cpu" or not native.available():
        return in_floating_point(x, packed.dequantize())
    rows, columns = packed.padded
    flat = x.detach().reshape(-1, layer.in_features).float().contiguous()
    y = torch.empty(flat.shape[0], rows)
    status = native.function("wkv_matmul", "iiipppiipi")(
        packed.format, rows, columns, packed.data.data_ptr(), None if packed.scale is None else packed.scale.data_ptr(),
        flat.data_ptr(), layer.in_features, flat.shape[0], y.data_ptr(), native.num_threads(),
    )  # fmt: skip
    if status != 0:
        raise MemoryError("the native kernels could not allocate their work space")
    return y[:, : layer.out_features].to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def in_floating_point(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] -> x W^T [..., N] in the type of x, W in float32 [N, K]; on a GPU the product is of that type, too."""
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cpu":
            return F.linear(x.float(), weight).to(x.dtype)
        return F.linear(x, weight.to(x.dtype))


class QuantizedEmbedding(nn.Module):
    """An embedding table in int8 with one scale per token; only the rows of the tokens at hand are read.

    Args:
        codes: int8 [V, C].
        scale: float32 [V].
        dtype: type of the result.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        if codes.dtype != torch.int8 or codes.ndim != 2 or scale.shape != codes.shape[:1]:
            raise WkvError(f"an int8 embedding needs codes [V, C] and scales [V], found {codes.shape}, {scale.shape}")
        self.num_embeddings, self.embedding_dim = codes.shape
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @staticmethod
    def from_weight(weight: Tensor) -> QuantizedEmbedding:
        """Quantise a table [V, C]."""
        scale = weight.detach().float().abs().amax(1) / 127
        inverse = torch.where(scale > 0, 1 / scale, 0)
        codes = torch.round(weight.detach().float() * inverse[:, None]).to(torch.int8)
        return QuantizedEmbedding(codes, scale, weight.dtype)

    @property
    def num_weights(self) -> int:
        """V C."""
        return self.codes.numel()

    def dequantize(self) -> Tensor:
        """The table in float32 [V, C]."""
        return self.codes.float() * self.scale[:, None]

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [...] -> rows [..., C]."""
        return (self.codes[tokens].float() * self.scale[tokens][..., None]).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        self.codes, self.scale = moved(self.codes, fn), moved(self.scale, fn)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


def empty_linear(kind: Kind, sparse: bool, shape: tuple[int, int]) -> QuantizedLinear:
    """A layer without values on the meta device, about to be loaded."""
    rows, columns = padded_shape(kind, sparse, shape)
    data = torch.empty(num_bytes(kind, rows, columns), dtype=torch.uint8, device="meta")
    scale = torch.empty(rows, device="meta") if kind == "int8" else None
    return QuantizedLinear(Packed(kind, sparse, shape, data, scale))


def quantize_linear(layer: nn.Linear, kind: Kind, sparse: bool = False) -> QuantizedLinear:
    """The layer with quantised weights.

    Raises:
        WkvError: for a layer with a bias, or weights that are not finite.
    """
    if layer.bias is not None:
        raise WkvError("layers with a bias cannot be quantised")
    return QuantizedLinear(quantize(layer.weight, kind, sparse))
