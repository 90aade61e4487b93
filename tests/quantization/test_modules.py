"""Layers with quantised weights, with and without the native library."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.quantization.helpers import relative
from wkv import native
from wkv.errors import WkvError
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear, empty_linear, quantize_linear
from wkv.quantization.packed import Kind

CASES = [("int8", False), ("int8", True), ("int6", False), ("int4", False), ("int4", True)]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the native library, and as if there were none."""
    if request.param and not native.available():
        pytest.skip(f"native kernels: {native.unavailable()}")
    if not request.param:
        monkeypatch.setattr(native, "available", lambda: False)
    return bool(request.param)


def linear(kind: Kind, sparse: bool, inputs: int = 70, outputs: int = 90) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(5)
    plain = nn.Linear(inputs, outputs, bias=False)
    return plain, quantize_linear(plain, kind, sparse)


@pytest.mark.parametrize(("kind", "sparse"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernels")
def test_product(kind: Kind, sparse: bool, dtype: torch.dtype) -> None:
    _, layer = linear(kind, sparse)
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[..., ::3] = 0
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 90)
    assert relative(y, x.double() @ layer.dequantize().double().T) < (2e-4 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("kind", "sparse"), CASES)
@pytest.mark.usefixtures("kernels")
def test_gradients_flow_to_the_input_alone(kind: Kind, sparse: bool) -> None:
    _, layer = linear(kind, sparse)
    x = torch.randn(4, 70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, layer.dequantize().sum(0).expand(4, -1)) < 1e-5
    assert not list(layer.parameters())


def test_type_and_copies() -> None:
    _, layer = linear("int8", False)
    data, scale = layer.data, layer.scale
    half = copy.deepcopy(layer).half()
    assert half.scale.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(half.dequantize(), layer.dequantize())  # scales are not rounded on the way
    assert layer.half().data.dtype == torch.uint8
    assert torch.equal(layer.data, data)
    assert scale is not None
    assert layer.num_weights == 90 * 70
    assert "int8" in repr(layer)
    empty = empty_linear("int4", True, (90, 70))
    assert empty.data.is_meta
    assert empty.data.shape == linear("int4", True)[1].data.shape


def test_embedding() -> None:
    torch.manual_seed(1)
    table = torch.randn(11, 6)
    table[4] = 0
    layer = QuantizedEmbedding.from_weight(table)
    ids = torch.tensor([[1, 4], [10, 1]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert float((layer.dequantize() - table).abs().max()) <= float(table.abs().max()) / 253
    assert layer.bfloat16()(ids).dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert layer.num_weights == 66


def test_errors() -> None:
    with pytest.raises(WkvError, match="bias"):
        quantize_linear(nn.Linear(4, 4), "int8")
    with pytest.raises(WkvError, match="70"):
        linear("int8", False)[1](torch.zeros(1, 69))
    with pytest.raises(WkvError, match="codes"):
        QuantizedEmbedding(torch.zeros(3, 3), torch.zeros(3), torch.float32)
