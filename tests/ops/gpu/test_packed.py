"""The Triton products with weights in 8, 6 and 4 bits against float64, alone, in layers and in whole models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import wkv
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import relative_rms
from tests.ops.native_helpers import poisoned_memory
from wkv import ops
from wkv.ops.gpu import packed
from wkv.quantization.model import dequantize_model, quantize_model
from wkv.quantization.modules import QuantizedLinear
from wkv.quantization.packed import Kind, quantize

pytestmark = needs_triton

CASES: list[tuple[Kind, bool]] = [("int8", False), ("int8", True), ("int6", False), ("int4", False), ("int4", True)]
# float16 inputs are rounded to nothing less; bfloat16 ones have 8 bits, and so have the weights then.
BARS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}


def layer(kind: Kind, sparse: bool, outputs: int = 90, inputs: int = 70) -> QuantizedLinear:
    torch.manual_seed(3)
    return QuantizedLinear(quantize(torch.randn(outputs, inputs), kind, sparse)).to(DEVICE)


def rows(count: int, inputs: int = 70, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs, a third of them zero in all rows and some more in the first."""
    torch.manual_seed(4)
    x = torch.randn(count, inputs)
    x[:, ::3] = 0
    x[0, :40] = 0
    return x.to(DEVICE, dtype)


def exact(x: Tensor, made: QuantizedLinear) -> Tensor:
    return x.double() @ made.dequantize().double().T


@pytest.fixture
def forced() -> Iterator[None]:
    with ops.use_backend("triton"):
        yield


@pytest.mark.parametrize(("kind", "sparse"), CASES)
@pytest.mark.parametrize("dtype", list(BARS))
@pytest.mark.usefixtures("forced")
def test_products(kind: Kind, sparse: bool, dtype: torch.dtype) -> None:
    made = layer(kind, sparse)
    for count in (1, 3):
        x = rows(count, dtype=dtype)
        with poisoned_memory():
            y = made(x)
        assert y.dtype == dtype
        assert relative_rms(y, exact(x, made)) < BARS[dtype]


@pytest.mark.parametrize(("kind", "sparse"), CASES)
@pytest.mark.usefixtures("forced")
def test_long_rows_are_divided(kind: Kind, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "VECTORS", 32)
    made = layer(kind, sparse, 20, 600)
    for count in (1, 18):
        x = rows(count, 600)
        with poisoned_memory():
            y = made(x)
        assert relative_rms(y, exact(x, made)) < BARS[torch.float32]


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck(sparse: bool) -> None:
    made = layer("int8", sparse, 20, 300)
    checks = ("test_schema", "test_faketensor")
    for count in (1, 2):
        given = (rows(count, 300, torch.bfloat16), made.data, made.scale, 8, sparse, 20)
        torch.library.opcheck(packed.product, given, test_utils=checks)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.usefixtures("forced")
def test_shapes_and_strides(sparse: bool) -> None:
    made = layer("int8", sparse)
    x = rows(6).view(2, 3, 70)
    y = made(x)
    assert y.shape == (2, 3, 90)
    assert torch.equal(made(x.transpose(0, 1)), y.transpose(0, 1))
    assert made(x[:0]).shape == (0, 3, 90)
    assert made(x[0, 0]).shape == (90,)


@pytest.mark.parametrize(("kind", "sparse"), CASES)
@pytest.mark.usefixtures("forced")
def test_zeros_and_nan(kind: Kind, sparse: bool) -> None:
    made = layer(kind, sparse, 33, 64)
    x = torch.zeros(2, 64, device=DEVICE)
    assert not made(x[:1]).any()
    x[1, 5] = torch.nan
    y = made(x)
    assert not y[0].any()
    assert bool(y[1].isnan().all())
    assert bool(made(x[1:]).isnan().all())


@pytest.mark.usefixtures("forced")
def test_gradients_flow_to_the_input() -> None:
    made = layer("int4", False)
    x = rows(2).requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None
    assert relative_rms(x.grad, made.dequantize().sum(0).expand(2, -1)) < 1e-5


def test_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens; in the interpreter only where it is asked for; types that the kernels know."""
    calls = []
    product = packed.product
    monkeypatch.setattr(packed, "product", lambda *given: calls.append(given[0].shape) or product(*given))
    made = layer("int8", False, 16, 64)
    made(rows(2, 64))
    assert bool(calls) == (DEVICE.type == "cuda")
    calls.clear()
    with ops.use_backend("triton"):
        made(rows(packed.MOST + 1, 64))
        made(rows(2, 64, torch.float64))
        assert not calls
        made(rows(2, 64))
    assert calls == [(2, 64)]
    with ops.use_backend("reference"):
        made(rows(2, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_models(bits: int) -> None:
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", vocab_size=32, num_layers=1, hidden_size=64, head_size=16)
    quantized = quantize_model(model, bits).to(DEVICE)
    tokens = torch.randint(32, (1, 3), device=DEVICE)
    with torch.no_grad():
        expected = dequantize_model(quantized)(tokens)[0]
        with ops.use_backend("triton"):
            logits = quantized(tokens)[0]
    assert relative_rms(logits, expected) < 1e-4
