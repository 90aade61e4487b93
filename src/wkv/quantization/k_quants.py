"""The K-quants of ggml, blocks of 256 values with 6- or 8-bit scales for each 16 or 32 of them, and IQ4_NL.

Layouts and quantizers follow ggml's reference C code (no importance matrix). The searches run over many blocks at a
time with the values of a block along the first axis, so that numpy adds them one after the other, in float32, as the
C code does: the bytes come out the same.

Shape letters: n blocks, S sub-blocks of a block, L values of a sub-block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SUPER = 256

_D, _DMIN = ("d", "<f2"), ("dmin", "<f2")
Q2_K = np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), _D, _DMIN])
Q3_K = np.dtype([("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), _D])
Q4_K = np.dtype([_D, _DMIN, ("scales", "u1", (12,)), ("qs", "u1", (128,))])
Q5_K = np.dtype([_D, _DMIN, ("scales", "u1", (12,)), ("qh", "u1", (32,)), ("qs", "u1", (128,))])
Q6_K = np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), _D])
IQ4_NL = np.dtype([_D, ("qs", "u1", (16,))])

_IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # fmt: skip

# Below this magnitude a group of Q6_K counts as all zero.
_GROUP_EPS = np.float32(1e-15)
# Smaller values count as zero in the search of Q4_K and Q5_K: squares and inverses of them leave float32.
_TINY = np.float32(1e-30)


def _float(half: Array) -> Array:
    return half.astype(np.float32)


# ---------------------------------------------------------------- blocks -> values


def _two_bits(blocks: Array) -> Array:
    """Low 2-bit codes of Q2_K and Q3_K, [n, 16, 16]: half h, shift j, part p make sub-block 8h + 2j + p."""
    bytes_nhpl = blocks["qs"].reshape(-1, 2, 1, 2, 16)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1, 1)
    return ((bytes_nhpl >> shifts) & 3).reshape(-1, 16, 16)


def decode_q2_k(blocks: Array) -> Array:
    """[n] blocks -> [n, 256] float32."""
    scale = _float(blocks["d"])[:, None] * (blocks["scales"] & 15).astype(np.float32)
    minimum = _float(blocks["dmin"])[:, None] * (blocks["scales"] >> 4).astype(np.float32)
    return (scale[..., None] * _two_bits(blocks).astype(np.float32) - minimum[..., None]).reshape(-1, SUPER)


def decode_q3_k(blocks: Array) -> Array:
    """[n] blocks -> [n, 256] float32."""
    packed = blocks["scales"]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = _float(blocks["d"])[:, None] * ((low | (high << 4)).astype(np.float32) - 32)
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high_bit = ((blocks["hmask"][:, None, :] >> bits) & 1).reshape(-1, 16, 16)
    codes = _two_bits(blocks).astype(np.float32) - 4 * (1 - high_bit.astype(np.float32))
    return (scale[..., None] * codes).reshape(-1, SUPER)


def _unpack_6_bit(packed: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima in the 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minima


def _pack_6_bit(scales: Array, minima: Array) -> Array:
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], axis=1)


def _sub_block_nibbles(blocks: Array) -> Array:
    """[n, 8, 32]: the low halves of 32 bytes are one sub-block, the high halves the next."""
    chunks = blocks["qs"].reshape(-1, 4, 32)
    return np.stack([chunks & 15, chunks >> 4], axis=2).reshape(-1, 8, 32)


def _affine(blocks: Array, codes: Array) -> Array:
    scales, minima = _unpack_6_bit(blocks["scales"])
    scale = _float(blocks["d"])[:, None] * scales.astype(np.float32)
    minimum = _float(blocks["dmin"])[:, None] * minima.astype(np.float32)
    return (scale[..., None] * codes.astype(np.float32) - minimum[..., None]).reshape(-1, SUPER)


def decode_q4_k(blocks: Array) -> Array:
    """[n] blocks -> [n, 256] float32."""
    return _affine(blocks, _sub_block_nibbles(blocks))


def decode_q5_k(blocks: Array) -> Array:
    """[n] blocks -> [n, 256] float32."""
    high = (blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    return _affine(blocks, _sub_block_nibbles(blocks) | (high << 4))


def decode_q6_k(blocks: Array) -> Array:
    """[n] blocks -> [n, 256] float32."""
    low, high = blocks["ql"].reshape(-1, 2, 2, 32), blocks["qh"].reshape(-1, 2, 1, 32)
    nibbles = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    codes = (nibbles | (((high >> shifts) & 3) << 4)).astype(np.float32) - 32
    scale = _float(blocks["d"])[:, None] * blocks["scales"].astype(np.float32)
    return (scale[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, SUPER)


def decode_iq4_nl(blocks: Array) -> Array:
    """[n] blocks -> [n, 32] float32."""
    codes = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)
    return _float(blocks["d"])[:, None] * _IQ4_NL_VALUES[codes]


# ---------------------------------------------------------------- values -> blocks


def _rounded(values: Array, low: int, high: int) -> Array:
    """Nearest integers (half to even) within bounds, as float32."""
    return np.clip(np.rint(values), low, high)


def _divide(a: Array, b: Array) -> Array:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


@np.errstate(over="ignore", invalid="ignore")
def _search_affine(x_Ln: Array, top: int, first: float, steps: int) -> tuple[Array, Array, Array]:
    """Scale s, minimum m >= 0 and codes q of every column that make sum v (s q - m - x)^2 small.

    The inverse scales (top + first + 0.1 k) / (max - min), k = 0 .. steps, are tried. Whenever one wins, its fitted
    minimum replaces the one that the next ones subtract: that is what the C code does. A sum that overflows loses
    against the other candidates.
    """
    weight = np.sqrt((x_Ln * x_Ln).sum(0) / np.float32(len(x_Ln))) + np.abs(x_Ln)
    low, high = np.minimum(x_Ln.min(0), 0), x_Ln.max(0)
    sum_w, sum_x = weight.sum(0), (weight * x_Ln).sum(0)
    span = high - low
    inverse = _divide(np.full_like(span, top), span)
    scale = _divide(np.ones_like(span), inverse)
    codes = _rounded(inverse * (x_Ln - low), 0, top)
    best = (weight * (scale * codes + low - x_Ln) ** 2).sum(0)
    for step in range(steps + 1):
        factor = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        # The range shrinks with the minimum that won last.
        q = _rounded(_divide(np.full_like(span, factor), high - low) * (x_Ln - low), 0, top)
        s, m = _fit_affine(weight, q, x_Ln, sum_w, sum_x)
        error = (weight * (s * q + m - x_Ln) ** 2).sum(0)
        wins = (error < best) & np.isfinite(s) & (span > 0)
        best, scale, low = np.where(wins, error, best), np.where(wins, s, scale), np.where(wins, m, low)
        np.copyto(codes, q, where=wins)
    return np.where(span > 0, scale, 0).astype(np.float32), -low, np.where(span > 0, codes, 0)


def _fit_affine(weight: Array, q: Array, x: Array, sum_w: Array, sum_x: Array) -> tuple[Array, Array]:
    """Weighted least squares of x by s q + m with m <= 0; s is NaN where all codes are equal."""
    wq = weight * q
    sum_q, sum_qq, sum_xq = wq.sum(0), (wq * q).sum(0), (wq * x).sum(0)
    determinant = sum_w * sum_qq - sum_q * sum_q
    usable = determinant > 0
    determinant = np.where(usable, determinant, np.float32(1))
    s = (sum_w * sum_xq - sum_x * sum_q) / determinant
    m = (sum_qq * sum_x - sum_q * sum_xq) / determinant
    s = np.where(m > 0, _divide(sum_xq, sum_qq), s)
    return np.where(usable, s, np.float32(np.nan)), np.minimum(m, 0)


def _encode_affine(values: Array, blocks: Array, top: int, first: float, steps: int) -> Array:
    """Fill d, dmin and the packed scales of Q4_K or Q5_K blocks; returns the codes [n, 8, 32]."""
    x_Ln = np.ascontiguousarray(np.where(np.abs(values) < _TINY, np.float32(0), values).reshape(-1, 32).T)
    scale, minimum, codes = _search_affine(x_Ln, top, first, steps)
    packed = []
    for name, per_sub_block in (("d", scale.reshape(-1, 8)), ("dmin", minimum.reshape(-1, 8))):
        largest = per_sub_block.max(1, keepdims=True).clip(0)
        inverse = _divide(np.full_like(largest, 63), largest)
        blocks[name] = (largest / np.float32(63))[:, 0].astype(np.float16)
        packed.append(_rounded(inverse * per_sub_block, 0, 63).astype(np.uint8))
    blocks["scales"] = _pack_6_bit(packed[0], packed[1])
    s = (_float(blocks["d"])[:, None] * packed[0].astype(np.float32)).reshape(-1)
    m = (_float(blocks["dmin"])[:, None] * packed[1].astype(np.float32)).reshape(-1)
    codes = np.where(s != 0, _rounded(_divide(x_Ln + m, s), 0, top), codes)
    return np.ascontiguousarray(codes.T).astype(np.uint8).reshape(-1, 8, 32)


def _pair_nibbles(codes: Array) -> Array:
    """[n, 8, 32] codes 0..15 -> [n, 128] bytes, two neighbouring sub-blocks in the halves of 32 bytes."""
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def encode_q4_k(values: Array) -> Array:
    """[n, 256] float32 -> [n] blocks."""
    blocks = np.zeros(len(values), Q4_K)
    blocks["qs"] = _pair_nibbles(_encode_affine(values, blocks, 15, -1.0, 20))
    return blocks


def encode_q5_k(values: Array) -> Array:
    """[n, 256] float32 -> [n] blocks."""
    blocks = np.zeros(len(values), Q5_K)
    codes = _encode_affine(values, blocks, 31, -0.5, 15)
    blocks["qs"] = _pair_nibbles(codes & 15)
    high = (codes >> 4) << np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    blocks["qh"] = np.bitwise_or.reduce(high, axis=1)
    return blocks


@np.errstate(over="ignore", invalid="ignore")
def _search_scaled(x_Ln: Array) -> tuple[Array, Array]:
    """Scale s and codes q in -32..31 of every column that make sum x^2 (s q - x)^2 small; codes are 0..63."""
    extreme = np.take_along_axis(x_Ln, np.abs(x_Ln).argmax(0)[None], 0)[0]
    empty = np.abs(extreme) < _GROUP_EPS
    extreme = np.where(empty, np.float32(1), extreme)
    weight = x_Ln * x_Ln
    scale = best = codes = np.zeros(0, np.float32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(32) + np.float32(0.1) * np.float32(step)) / extreme
        q = _rounded(inverse * x_Ln, -32, 31)
        sum_xq, sum_qq = (weight * x_Ln * q).sum(0), (weight * q * q).sum(0)
        s = _divide(sum_xq, sum_qq)
        if step == 0:
            scale, best, codes = s, s * sum_xq, q
            continue
        wins = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale, best = np.where(wins, s, scale), np.where(wins, s * sum_xq, best)
        np.copyto(codes, q, where=wins)
    return np.where(empty, 0, scale).astype(np.float32), np.where(empty, 0, codes + 32)


def encode_q6_k(values: Array) -> Array:
    """[n, 256] float32 -> [n] blocks."""
    blocks = np.zeros(len(values), Q6_K)
    x_Ln = np.ascontiguousarray(values.reshape(-1, 16).T)
    scale, codes = _search_scaled(x_Ln)
    scale_nS = scale.reshape(-1, 16)
    largest = np.take_along_axis(scale_nS, np.abs(scale_nS).argmax(1)[:, None], 1)
    empty = np.abs(largest) < _GROUP_EPS
    inverse = np.where(empty, np.float32(0), np.float32(-128) / np.where(empty, np.float32(1), largest))
    blocks["d"] = _divide(np.ones_like(inverse), inverse)[:, 0].astype(np.float16)
    blocks["scales"] = np.minimum(np.rint(inverse * scale_nS), 127).astype(np.int8)
    s = (_float(blocks["d"])[:, None] * blocks["scales"].astype(np.float32)).reshape(-1)
    codes = np.where(s != 0, _rounded(_divide(x_Ln, s), -32, 31) + 32, codes)
    codes = np.ascontiguousarray(codes.T).astype(np.uint8).reshape(-1, SUPER)
    codes[empty[:, 0]] = 0
    _pack_6_bit_codes(blocks, codes.reshape(-1, 2, 4, 32))
    return blocks


def _pack_6_bit_codes(blocks: Array, codes: Array) -> None:
    """Codes [n, 2, 4, 32] into the low nibbles `ql` and the high pairs of bits `qh` of Q6_K."""
    low = (codes[:, :, :2] & 15) | ((codes[:, :, 2:] & 15) << 4)
    blocks["ql"] = low.reshape(-1, 128)
    high = (codes >> 4) << np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    blocks["qh"] = np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)
