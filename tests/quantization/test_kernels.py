"""The native products of quantised weights, to the last digit: what the codes and the fixed-point inputs stand for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.quantization.modules import QuantizedLinear, multiply
from wkv.quantization.packed import Kind, quantize

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.unavailable()}")

ORDERS: list[tuple[Kind, bool]] = [("int8", False), ("int8", True), ("int6", False), ("int4", False), ("int4", True)]
FLOAT_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has."""
    try:
        with native.use_instruction_set(request.param):
            yield request.param
    except WkvError as error:
        pytest.skip(str(error))


def fixed_point(x: Tensor) -> Tensor:
    """Inputs as the kernels round them: 15 bits of the largest value of each row; float64."""
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 32512) / largest, 0)
    return torch.round(x * inverse).double() * (largest / 32512).double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def in_blocks(weight: Tensor) -> Tensor:
    """[N, K] -> [N / 16, K, 16], padded with zeros."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % 16))
    return padded.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


@pytest.mark.parametrize(("kind", "sparse"), ORDERS)
@pytest.mark.parametrize("shape", [(768, 768), (70, 96), (16, 64), (130, 1000), (1, 1)])
def test_integer_products(instruction_set: str, kind: Kind, sparse: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(quantize(torch.randn(shape), kind, sparse))
    for rows in (1, 2, 3, 7, 13, 64, 65):
        x = torch.randn(rows, shape[1]).relu()  # zeros that the sparse order skips
        expected = fixed_point(x) @ layer.dequantize().double().T
        assert relative_error(multiply(layer, x), expected) < 2e-6, rows


@pytest.mark.parametrize("dtype", FLOAT_FORMATS, ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_float_products(instruction_set: str, dtype: torch.dtype, columns: bool) -> None:
    torch.manual_seed(0)
    matmul = native.function("wkv_matmul", "iiipppiipi")
    for outputs, inputs in ((70, 96), (33, 17), (64, 800), (1, 1)):
        weight = torch.randn(outputs, inputs).to(dtype)
        stored = in_blocks(weight) if columns else weight
        for rows in (1, 2, 5, 8, 13, 40):
            padded = stored.numel() // inputs
            x, y = torch.randn(rows, inputs), torch.full((rows, padded), torch.nan)
            code = FLOAT_FORMATS[dtype] + 3 * columns
            args = (stored.data_ptr(), None, x.data_ptr(), inputs, rows, y.data_ptr(), 1)
            assert matmul(code, padded, inputs, *args) == 0
            assert relative_error(y[:, :outputs], x.double() @ weight.double().T) < 5e-6


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    rows=st.integers(1, 20),
    order=st.sampled_from(ORDERS),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_size(
    shape: tuple[int, int], rows: int, order: tuple[Kind, bool], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = QuantizedLinear(quantize(torch.randn(shape), *order))
    x = torch.randn(rows, shape[1]) * scale * (torch.rand(rows, shape[1]) > 0.5)
    expected = fixed_point(x) @ layer.dequantize().double().T
    found = multiply(layer, x)
    assert float((found.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize(("kind", "sparse"), ORDERS)
def test_threads_and_batches_change_nothing(kind: Kind, sparse: bool) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(quantize(torch.randn(300, 200), kind, sparse))
    x, before = torch.randn(9, 200), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(layer, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = torch.cat([multiply(layer, row[None]) for row in x])
    assert relative_error(alone, results[0].double()) < 1e-6


def test_inputs_that_are_not_finite_are_not_hidden() -> None:
    layer = QuantizedLinear(quantize(torch.randn(16, 64), "int8"))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 64)
        x[0, 3] = bad
        y = multiply(layer, x)
        assert y[0].isnan().all()
        assert y[1].isfinite().all()


def test_the_torch_form_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(quantize(torch.randn(40, 70), "int4"))
    x = torch.randn(3, 70, requires_grad=True)
    found = layer(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert relative_error(gradient, layer.dequantize().double().sum(0).expand(3, -1)) < 1e-6
    monkeypatch.setattr(native, "available", lambda: False)
    assert relative_error(layer(x), found.double()) < 1e-4
