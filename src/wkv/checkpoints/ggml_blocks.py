"""The block quantisation types of ggml: bytes -> float32, exactly as ggml computes it.

A block holds 32 values of one row. `d` is its scale and `m` its minimum, both half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
Array = NDArray[Any]

_D, _M = ("d", "<f2"), ("m", "<f2")
_HIGH, _NIBBLES = ("qh", "<u4"), ("qs", "u1", (16,))


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


# type -> (layout of one block, its values)
BLOCK_TYPES: dict[str, tuple[np.dtype[Any], Callable[[Array], Array]]] = {
    "Q4_0": (np.dtype([_D, _NIBBLES]), lambda b: _scaled(b, _nibbles(b), 8)),
    "Q4_1": (np.dtype([_D, _M, _NIBBLES]), lambda b: _affine(b, _nibbles(b))),
    "Q5_0": (np.dtype([_D, _HIGH, _NIBBLES]), lambda b: _scaled(b, _fifth_bits(b), 16)),
    "Q5_1": (np.dtype([_D, _M, _HIGH, _NIBBLES]), lambda b: _affine(b, _fifth_bits(b))),
    "Q8_0": (np.dtype([_D, ("qs", "i1", (BLOCK,))]), lambda b: _scaled(b, b["qs"], 0)),
}


def num_bytes(kind: str, numel: int) -> int:
    """Bytes that `numel` values (a multiple of 32) take in type `kind`."""
    return numel // BLOCK * BLOCK_TYPES[kind][0].itemsize


def dequantise(kind: str, data: bytes | Array) -> Array:
    """The float32 values of whole blocks, flat."""
    layout, values = BLOCK_TYPES[kind]
    result: Array = values(np.frombuffer(data, layout)).astype(np.float32, copy=False).reshape(-1)
    return result
