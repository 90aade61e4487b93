"""The tensor types of ggml: float32 values to bytes and back, bit for bit as ggml computes it.

A block holds 32 values of one row (256 for the K-quants). `d` is its scale and `m` its minimum, both half precision.
Arithmetic is float32; codes are computed with the scale before it is rounded to half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wkv.errors import WkvError
from wkv.quantization import k_quants as k

BLOCK = 32
Array = NDArray[Any]

# Values handled at a time, so that temporary arrays stay small.
_SLAB = 1 << 18

# The inverse of a smaller number is infinite in float32.
_SMALLEST = np.float32(3e-39)

_D, _M = ("d", "<f2"), ("m", "<f2")
_HIGH, _NIBBLES = ("qh", "<u4"), ("qs", "u1", (16,))
_F32, _F16, _BF16 = (np.dtype([("x", kind)]) for kind in ("<f4", "<f2", "<u2"))
_Q4_0, _Q4_1 = np.dtype([_D, _NIBBLES]), np.dtype([_D, _M, _NIBBLES])
_Q5_0, _Q5_1 = np.dtype([_D, _HIGH, _NIBBLES]), np.dtype([_D, _M, _HIGH, _NIBBLES])
_Q8_0 = np.dtype([_D, ("qs", "i1", (BLOCK,))])


class BlockType(NamedTuple):
    """How one type stores values.

    Args:
        values: number of values in a block.
        layout: the fields of a block in memory.
        decode: [n] blocks -> [n, values] float32.
        encode: [n, values] float32 -> [n] blocks; None for types that can only be read.
    """

    values: int
    layout: np.dtype[Any]
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array] | None


# ---------------------------------------------------------------- blocks -> values


def _nibbles(blocks: Array) -> Array:
    """Codes 0..15: the low halves of the 16 bytes, then the high halves."""
    return np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)


def _fifth_bits(blocks: Array) -> Array:
    """Codes 0..31: bit j of `qh` is the fifth bit of code j."""
    high = (blocks["qh"][:, None] >> np.arange(BLOCK, dtype=np.uint32)) & 1
    return _nibbles(blocks) | (high.astype(np.uint8) << 4)


def _scaled(blocks: Array, codes: Array, offset: int) -> Array:
    return blocks["d"].astype(np.float32)[:, None] * (codes.astype(np.float32) - offset)


def _affine(blocks: Array, codes: Array) -> Array:
    scale, minimum = (blocks[name].astype(np.float32)[:, None] for name in "dm")
    return scale * codes.astype(np.float32) + minimum


def _decode_bf16(blocks: Array) -> Array:
    return (blocks["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


# ---------------------------------------------------------------- values -> blocks


def _inverse(d: Array) -> Array:
    """1 / d, 0 where d is 0 or so small that the inverse overflows."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > _SMALLEST)


def _encode_q8_0(x: Array) -> Array:
    blocks = np.empty(len(x), _Q8_0)
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    codes = x * _inverse(d)
    whole = np.trunc(codes)  # half away from zero
    blocks["d"] = d[:, 0]
    blocks["qs"] = whole + np.trunc(2 * (codes - whole))
    return blocks


def _pack_nibbles(codes: Array) -> Array:
    return (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)


def _pack_fifth_bits(codes: Array) -> Array:
    high = (codes >> 4).astype(np.uint32) << np.arange(BLOCK, dtype=np.uint32)
    return np.bitwise_or.reduce(high, axis=1)


def _symmetric_codes(x: Array, half: int) -> tuple[Array, Array]:
    """Scale and codes 0..2 half - 1: the value of largest magnitude, sign included, becomes code 0."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    d = extreme / np.float32(-half)
    codes = np.trunc(x * _inverse(d) + np.float32(half + 0.5))
    return d[:, 0], np.minimum(codes, 2 * half - 1).astype(np.uint8)


def _affine_codes(x: Array, top: int) -> tuple[Array, Array, Array]:
    """Scale, minimum and codes 0..top."""
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5))
    return d[:, 0], low[:, 0], np.minimum(codes, top).astype(np.uint8)


def _symmetric(layout: np.dtype[Any], half: int) -> Callable[[Array], Array]:
    def encode(x: Array) -> Array:
        blocks = np.empty(len(x), layout)
        blocks["d"], codes = _symmetric_codes(x, half)
        return _with_codes(blocks, codes)

    return encode


def _with_minimum(layout: np.dtype[Any], top: int) -> Callable[[Array], Array]:
    def encode(x: Array) -> Array:
        blocks = np.empty(len(x), layout)
        blocks["d"], blocks["m"], codes = _affine_codes(x, top)
        return _with_codes(blocks, codes)

    return encode


def _with_codes(blocks: Array, codes: Array) -> Array:
    blocks["qs"] = _pack_nibbles(codes)
    if "qh" in (blocks.dtype.names or ()):
        blocks["qh"] = _pack_fifth_bits(codes)
    return blocks


def _encode_plain(layout: np.dtype[Any]) -> Callable[[Array], Array]:
    return lambda x: x.astype(layout["x"]).view(layout)[:, 0]


def _encode_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # half to even
    quiet = (bits >> 16) | 64
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16).view(_BF16)[:, 0]


BLOCK_TYPES: dict[str, BlockType] = {
    "F32": BlockType(1, _F32, lambda b: b["x"][:, None], _encode_plain(_F32)),
    "F16": BlockType(1, _F16, lambda b: b["x"].astype(np.float32)[:, None], _encode_plain(_F16)),
    "BF16": BlockType(1, _BF16, _decode_bf16, _encode_bf16),
    "Q4_0": BlockType(BLOCK, _Q4_0, lambda b: _scaled(b, _nibbles(b), 8), _symmetric(_Q4_0, 8)),
    "Q4_1": BlockType(BLOCK, _Q4_1, lambda b: _affine(b, _nibbles(b)), _with_minimum(_Q4_1, 15)),
    "Q5_0": BlockType(BLOCK, _Q5_0, lambda b: _scaled(b, _fifth_bits(b), 16), _symmetric(_Q5_0, 16)),
    "Q5_1": BlockType(BLOCK, _Q5_1, lambda b: _affine(b, _fifth_bits(b)), _with_minimum(_Q5_1, 31)),
    "Q8_0": BlockType(BLOCK, _Q8_0, lambda b: _scaled(b, b["qs"], 0), _encode_q8_0),
    "Q2_K": BlockType(k.SUPER, k.Q2_K, k.decode_q2_k, None),
    "Q3_K": BlockType(k.SUPER, k.Q3_K, k.decode_q3_k, None),
    "Q4_K": BlockType(k.SUPER, k.Q4_K, k.decode_q4_k, k.encode_q4_k),
    "Q5_K": BlockType(k.SUPER, k.Q5_K, k.decode_q5_k, k.encode_q5_k),
    "Q6_K": BlockType(k.SUPER, k.Q6_K, k.decode_q6_k, k.encode_q6_k),
    "IQ4_NL": BlockType(BLOCK, k.IQ4_NL, k.decode_iq4_nl, None),
}


def num_bytes(kind: str, numel: int) -> int:
    """Bytes that `numel` values (a multiple of the block) take in type `kind`."""
    block = BLOCK_TYPES[kind]
    return numel // block.values * block.layout.itemsize


def dequantize(kind: str, data: bytes | Array) -> Array:
    """The float32 values of whole blocks.

    Args:
        kind: a key of `BLOCK_TYPES`.
        data: bytes, or an array [..., bytes of a row].

    Returns:
        Values [..., values of a row], flat for bytes.

    Raises:
        WkvError: for an unknown type, or if the rows are not whole blocks.
    """
    block = _block_type(kind)
    raw = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    raw = np.ascontiguousarray(raw).view(np.uint8)
    if raw.ndim == 0 or raw.shape[-1] % block.layout.itemsize:
        found = f"{list(raw.shape)} bytes"
        raise WkvError(f"{kind} data come in blocks of {block.layout.itemsize} bytes, found {found}")
    blocks = raw.reshape(-1).view(block.layout)
    out = np.empty((len(blocks), block.values), np.float32)
    step = _SLAB // block.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = block.decode(blocks[start : start + step])
    return out.reshape(*raw.shape[:-1], raw.shape[-1] // block.layout.itemsize * block.values)


def quantize(kind: str, values: Array) -> Array:
    """The bytes of `values` in type `kind`, as ggml's reference code (no importance matrix) writes them.

    Args:
        kind: a key of `BLOCK_TYPES` that can be written.
        values: [..., row], rows whole blocks; converted to float32.

    Returns:
        uint8 [..., bytes of a row].

    Raises:
        WkvError: for another type, rows that are not whole blocks, or values that the type cannot hold.
    """
    block = _block_type(kind)
    if block.encode is None:
        raise WkvError(f"{kind} can be read but not written; one of {', '.join(writable())}")
    values = np.asarray(values)
    if values.ndim == 0 or values.shape[-1] % block.values:
        raise WkvError(f"{kind} needs rows that are a multiple of {block.values}, found shape {list(values.shape)}")
    flat = values.reshape(-1, block.values)
    out = np.empty(len(flat), block.layout)
    step = _SLAB // block.values
    for start in range(0, len(flat), step):
        out[start : start + step] = _encode(kind, block.encode, flat[start : start + step])
    row = values.shape[-1] // block.values * block.layout.itemsize
    return out.view(np.uint8).reshape(*values.shape[:-1], row)


def writable() -> list[str]:
    """The types that `quantize` can write."""
    return [kind for kind, block in BLOCK_TYPES.items() if block.encode is not None]


def _block_type(kind: str) -> BlockType:
    if kind not in BLOCK_TYPES:
        raise WkvError(f"unknown block type {kind!r}; one of {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[kind]


def _encode(kind: str, encode: Callable[[Array], Array], values: Array) -> Array:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, np.float32)
    if kind not in ("F32", "F16", "BF16") and not np.isfinite(values).all():
        raise WkvError(f"the values are not all finite, so they have no {kind} form")
    try:
        with np.errstate(over="raise"):
            return encode(values)
    except FloatingPointError as error:
        largest = float(np.abs(values).max())
        problem = f"values up to {largest:.3g} are too large for {kind}"
        raise WkvError(f"{problem}, which keeps numbers in half precision") from error
