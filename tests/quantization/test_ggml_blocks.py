"""The tensor types of ggml, byte for byte against ggml's own output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from wkv.errors import WkvError
from wkv.quantization import ggml_blocks
from wkv.quantization.ggml_blocks import BLOCK_TYPES, dequantize, num_bytes, quantize, writable

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "ggml_quants" / "ggml_blocks.safetensors")
VALUES = GOLDEN["x"]
KINDS = [kind for kind in BLOCK_TYPES if kind != "F32"]
QUANTIZED = [kind for kind in writable() if BLOCK_TYPES[kind].values > 1]
# Relative error on normal data: measured, and 5 % for the sample (the bytes are ggml's, see above).
ERRORS = {
    "Q8_0": 0.0056, "Q6_K": 0.019, "Q5_K": 0.038, "Q5_1": 0.040, "Q5_0": 0.045, "Q4_K": 0.075, "Q4_1": 0.082,
    "Q4_0": 0.090,
}  # fmt: skip


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_exactly(kind: str) -> None:
    data, wanted = GOLDEN[f"{kind}.bytes"], GOLDEN[f"{kind}.deq"]
    assert data.size == num_bytes(kind, wanted.size)
    assert same_bits(dequantize(kind, data), wanted)
    assert same_bits(dequantize(kind, data.tobytes()), wanted.reshape(-1))


@pytest.mark.parametrize("kind", [kind for kind in writable() if kind != "F32"])
def test_quantized_byte_for_byte(kind: str) -> None:
    found = quantize(kind, VALUES)
    assert found.dtype == np.uint8
    assert np.array_equal(found, GOLDEN[f"{kind}.bytes"])


def test_float32_stays() -> None:
    assert quantize("F32", VALUES).tobytes() == VALUES.tobytes()
    assert same_bits(dequantize("F32", quantize("F32", VALUES)), VALUES)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_error_on_normal_data(kind: str) -> None:
    x = np.random.default_rng(5).standard_normal((256, 512)).astype(np.float32)
    error = np.linalg.norm(dequantize(kind, quantize(kind, x)) - x) / np.linalg.norm(x)
    assert error < ERRORS[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("slab", [256, 768, 1 << 18])
def test_slabs_do_not_matter(kind: str, slab: int, monkeypatch) -> None:
    whole = quantize(kind, VALUES)
    monkeypatch.setattr(ggml_blocks, "_SLAB", slab)
    assert np.array_equal(quantize(kind, VALUES), whole)
    assert same_bits(dequantize(kind, whole), GOLDEN[f"{kind}.deq"])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_constant_and_zero_rows(kind: str) -> None:
    rows = np.repeat(np.array([[0.0], [1.0], [-1.0], [3e-20], [1e-40], [-2e-38]], np.float32), 256, axis=1)
    found = dequantize(kind, quantize(kind, rows))
    assert np.array_equal(found[0], np.zeros(256, np.float32))
    np.testing.assert_allclose(found[1:3], rows[1:3], rtol=0.02)
    np.testing.assert_allclose(found[3:], 0, atol=1e-7)  # too small for half-precision scales


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_codeword_is_its_own_image(kind: str) -> None:
    """Types without a search: what was decoded once encodes to the same values, to one rounding of the scale."""
    if kind.endswith("K"):
        return
    once = dequantize(kind, quantize(kind, VALUES[:1]))
    twice = dequantize(kind, quantize(kind, once))
    np.testing.assert_allclose(twice, once, rtol=2e-3, atol=2e-3 * float(np.abs(once).max()))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_large_values(kind: str) -> None:
    x = np.random.default_rng(5).standard_normal((4, 256)).astype(np.float32)
    np.testing.assert_allclose(dequantize(kind, quantize(kind, x * 2**14)), 2**14 * dequantize(kind, quantize(kind, x)))


def test_shapes_and_types_of_arguments() -> None:
    assert quantize("Q8_0", VALUES.reshape(3, 2, 512)).shape == (3, 2, 544)
    assert dequantize("Q8_0", np.zeros((3, 2, 68), np.uint8)).shape == (3, 2, 64)
    assert quantize("Q4_0", VALUES.astype(np.float64)[:, ::-1]).shape == (6, 288)
    assert quantize("Q8_0", np.zeros((0, 64), np.float32)).shape == (0, 68)


def test_bf16_keeps_nan_and_rounds_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x7F800001, 0x7F800000, 0x3F808001], np.uint32)
    found = quantize("BF16", bits.view(np.float32)).view(np.uint16)
    assert found.tolist() == [0x3F80, 0x3F82, 0x7FC0, 0x7F80, 0x3F81]


@pytest.mark.parametrize(("kind", "values", "word"), [
    ("Q9_9", VALUES, "unknown block type 'Q9_9'; one of F32"),
    ("Q2_K", VALUES, "can be read but not written; one of F32"),
    ("Q8_0", VALUES[:, :48], "multiple of 32, found shape [6, 48]"),
    ("Q4_K", VALUES[:, :128], "multiple of 256"),
    ("Q4_0", VALUES * np.nan, "not all finite"),
    ("Q6_K", np.full((1, 256), np.inf), "not all finite"),
    ("Q8_0", np.full((1, 32), 1e8), "too large for Q8_0"),
    ("Q4_K", np.full((1, 256), -3e8), "too large for Q4_K"),
    ("F16", np.full(4, 1e5), "too large for F16"),
])  # fmt: skip
def test_what_cannot_be_quantized(kind: str, values: np.ndarray, word: str) -> None:
    with pytest.raises(WkvError) as caught:
        quantize(kind, values)
    assert word in str(caught.value)


def test_what_cannot_be_dequantized() -> None:
    with pytest.raises(WkvError, match=r"blocks of 34 bytes, found \[35\] bytes"):
        dequantize("Q8_0", bytes(35))
    with pytest.raises(WkvError, match="unknown block type"):
        dequantize("IQ1_S", bytes(50))
