"""int8, int6 and int4 matrices: codes, scales, both orders, and their errors."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.helpers import relative
from wkv.errors import WkvError
from wkv.quantization.ggml_blocks import dequantize, quantize
from wkv.quantization.packed import GROUP, Kind, Packed, padded_shape
from wkv.quantization.packed import quantize as quantize_packed

SHAPES = [(1, 1), (16, 64), (17, 65), (64, 32), (130, 100), (256, 192)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "sparse"), [("int8", False), ("int8", True), ("int6", False), ("int4", False), ("int4", True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_orders_hold_the_same_values(shape: tuple[int, int], kind: Kind, sparse: bool) -> None:
    weight = normal(*shape)
    packed = quantize_packed(weight, kind, sparse)
    plain = quantize_packed(weight, kind)
    assert packed.dequantize().shape == shape
    assert torch.equal(packed.dequantize(), plain.dequantize())
    rows, columns = padded_shape(kind, sparse, shape)
    scales = 4 * rows if kind == "int8" else rows * columns // GROUP * 2
    assert packed.num_bytes == rows * columns * int(kind[3:]) // 8 + scales


def test_int8_is_within_half_a_step_of_the_row() -> None:
    weight = normal(40, 70) * torch.logspace(-6, 3, 40)[:, None]
    error = (quantize_packed(weight, "int8").dequantize() - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool((error <= 0.5001 * step).all())


@pytest.mark.parametrize(("kind", "steps"), [("int6", 28), ("int4", 6.6)])
def test_groups_are_within_a_step(kind: Kind, steps: float) -> None:
    weight = normal(32, 128)
    error = (quantize_packed(weight, kind).dequantize() - weight).abs().unflatten(1, (-1, GROUP))
    largest = weight.abs().unflatten(1, (-1, GROUP)).amax(-1, keepdim=True)
    assert bool((error <= largest / steps).all())


def test_errors_on_normal_weights_are_those_of_the_documentation() -> None:
    weight = normal(256, 768)
    kinds: tuple[Kind, ...] = ("int4", "int6", "int8")
    int4, int6, int8 = (relative(quantize_packed(weight, kind).dequantize(), weight) for kind in kinds)
    ggml = relative(torch.from_numpy(dequantize("Q4_0", quantize("Q4_0", weight.numpy()))), weight)
    assert 0.079 < int4 < 0.082
    assert int4 < 0.95 * ggml
    assert 0.016 < int6 < 0.020
    assert int8 < 0.008


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_what_fits_the_codes_comes_back_exactly(kind: Kind) -> None:
    top = {"int8": 127, "int6": 31, "int4": 7}[kind]
    codes = torch.arange(64 * 64).view(64, 64) % (2 * top + 1) - top
    weight = codes.float() * 0.25
    if kind != "int8":
        weight[:, ::32] = -0.25 * (top + 1)  # the end of the range, which sets the scale
    else:
        weight[:, 0] = top * 0.25
    assert torch.equal(quantize_packed(weight, kind).dequantize(), weight)


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_zero_rows_and_half_precision_inputs(kind: Kind) -> None:
    weight = normal(20, 70)
    weight[3] = 0
    assert not quantize_packed(weight, kind).dequantize()[3].any()
    half = weight.bfloat16()
    assert torch.equal(quantize_packed(half, kind).dequantize(), quantize_packed(half.float(), kind).dequantize())


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(0, 4)],
    ids=["vector", "cube", "integers", "empty"],
)
def test_what_is_no_matrix(weight: torch.Tensor) -> None:
    with pytest.raises(WkvError, match="floating-point matrices"):
        quantize_packed(weight, "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    weight = normal(8, 8)
    weight[2, 3] = value
    with pytest.raises(WkvError, match="NaN"):
        quantize_packed(weight, "int4")


def test_there_is_no_sparse_order_for_int6() -> None:
    with pytest.raises(WkvError, match="no sparse order"):
        quantize_packed(normal(16, 64), "int6", sparse=True)


def test_data_that_do_not_fit() -> None:
    packed = quantize_packed(normal(16, 64), "int8")
    with pytest.raises(WkvError, match="needs 1024 bytes"):
        Packed("int8", False, (16, 64), packed.data[1:], packed.scale)
    with pytest.raises(WkvError, match="scales"):
        Packed("int8", False, (16, 64), packed.data, None)
    with pytest.raises(WkvError, match="scales"):
        Packed("int4", False, (16, 64), quantize_packed(normal(16, 64), "int4").data, packed.scale)
