"""Products with weights in 8, 6 and 4 bits: the codes are read as `wkv.quantization.packed` stores them.

A program makes some outputs of all tokens at hand over a part of the inputs; the parts are added up afterwards. One
token is multiplied and added, more are matrix products.

Shape letters: M tokens, N outputs, K inputs, V vectors of 64 bytes: 16 outputs of 4 inputs each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels.blocks import cast, dot


@triton.jit
def times(acc, x, w_V16, token, columns, M, K, TOKENS: tl.constexpr, OPERANDS: tl.constexpr):
    """acc and the products of w [V, 16, 4] with the inputs `columns`: [V, 1, 4] of one token, else [1, V 4]."""
    if TOKENS == 1:
        x_V4 = tl.load(x + columns, columns < K, 0.0).to(tl.float32)
        acc += w_V16 * x_V4
    else:
        seen = (token < M)[:, None] & (columns < K)
        x_MK = tl.load(x + token[:, None] * K + columns, seen, 0.0)
        w_KN = tl.reshape(tl.permute(w_V16, (0, 2, 1)), (w_V16.shape[0] * 4, 16))
        acc += dot(x_MK, w_KN, OPERANDS)
    return acc


@triton.jit
def tiled(
    x,
    data,
    halves,
    scale,
    y,
    M,
    N,
    K,
    blocks,
    part,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """y [parts, M, N] of 16 outputs: `part` of the `blocks` of 64 inputs, VECTORS vectors at a time."""
    PER: tl.constexpr = 16 if BITS == 8 else 8  # vectors of a block
    BYTES: tl.constexpr = 1024 if BITS == 8 else (832 if BITS == 6 else 576)
    tile, split = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    start = tile.to(tl.int64) * blocks * BYTES
    place_V = tl.arange(0, VECTORS)[:, None, None]
    row_16 = tl.arange(0, 16)[None, :, None]
    inner_4 = tl.arange(0, 4)[None, None, :]
    if TOKENS == 1:
        acc = tl.zeros((VECTORS, 16, 4), tl.float32)
        inner, place = inner_4, place_V
    else:
        acc = tl.zeros((TOKENS, 16), tl.float32)
        both = tl.arange(0, VECTORS * 4)[None, :]
        inner, place = both % 4, both // 4
    last = tl.minimum((split + 1) * part, blocks)
    for block in range(split * part, last, VECTORS // PER):
        vector_V = block * PER + place_V
        # A byte of 4 or 6 bits has the codes of two inputs, 4 apart.
        columns = (block * PER + place) * (64 // PER) + inner
        at_V = start + (vector_V // PER) * BYTES
        seen_V = vector_V < last * PER
        lane = row_16 * 4 + inner_4
        if BITS == 8:
            codes = tl.load(data + at_V + (vector_V % PER) * 64 + lane, seen_V, 128)
            acc = times(acc, x, codes.to(tl.float32) - 128, token, columns, M, K, TOKENS, OPERANDS)
        else:
            codes = tl.load(data + at_V + 64 + (vector_V % PER) * 64 + lane, seen_V, 0).to(tl.int32)
            half = tl.load(halves + at_V // 2 + (vector_V % PER) // 4 * 16 + row_16, seen_V, 0.0).to(tl.float32)
            low, high = codes & 15, codes >> 4
            middle: tl.constexpr = 32 if BITS == 6 else 8
            if BITS == 6:
                bits = tl.load(data + at_V + 576 + (vector_V % PER) // 2 * 64 + lane, seen_V, 0).to(tl.int32)
                bits = bits >> (vector_V % 2 * 4)
                low, high = low | (bits & 3) << 4, high | (bits >> 2 & 3) << 4
            low_V16, high_V16 = (low - middle).to(tl.float32) * half, (high - middle).to(tl.float32) * half
            acc = times(acc, x, low_V16, token, columns, M, K, TOKENS, OPERANDS)
            acc = times(acc, x, high_V16, token, columns + 4, M, K, TOKENS, OPERANDS)
    row = tile * 16 + tl.arange(0, 16)
    if TOKENS == 1:
        acc = tl.sum(tl.sum(acc, 2), 0)[None, :]
    if BITS == 8:
        acc *= tl.load(scale + row)[None, :]
    store(y, acc, split, token, row, M, N, TOKENS)


@triton.jit
def store(y, acc_MN, split, token, row, M, N, TOKENS: tl.constexpr):
    """One part of y."""
    seen = (token < M)[:, None] & (row < N)[None, :]
    at = (split * M + token)[:, None].to(tl.int64) * N + row[None, :]
    tl.store(y + at, cast(acc_MN, y.dtype.element_ty), seen)


@triton.jit
def row_of(place):
    """The output at a place of 64 in the sparse order."""
    return place % 16 // 4 * 16 + place // 16 * 4 + place % 4


@triton.jit
def sparse(
    x,
    data,
    halves,
    scale,
    y,
    M,
    N,
    K,
    rows,
    part,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """y [parts, M, N] of 64 (8 bits) or 128 outputs: `part` inputs. Those that are 0 in all tokens are not read.

    `rows`: N as stored.
    """
    unit, split = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, 64)
    row = row_of(place)
    if TOKENS == 1:
        low_acc = tl.zeros((INPUTS, 64), tl.float32)
        high_acc = tl.zeros((INPUTS, 64), tl.float32)
    else:
        low_acc = tl.zeros((TOKENS, 64), tl.float32)
        high_acc = tl.zeros((TOKENS, 64), tl.float32)
    last = tl.minimum((split + 1) * part, K)
    for first in range(split * part, last, INPUTS):
        column = first + tl.arange(0, INPUTS)
        seen = (token < M)[:, None] & (column < last)[None, :]
        x_MK = tl.load(x + token[:, None] * K + column[None, :], seen, 0.0)
        needed = (tl.max((x_MK != 0).to(tl.int32), 0) != 0)[:, None]
        if BITS == 8:
            at = column[:, None].to(tl.int64) * rows + unit * 64 + place[None, :]
            w = tl.load(data + at, needed, 128).to(tl.float32) - 128
            low_acc = add(low_acc, x_MK, w, TOKENS, OPERANDS)
        else:
            # INPUTS is a group of 32: 2 bytes of scale and 16 bytes of codes for every output.
            group = tl.cast(first // 32, tl.int64) * 18 * rows
            at = group + 2 * rows + (column % 32)[:, None] * (rows // 2) + unit * 64 + place[None, :]
            codes = tl.load(data + at, needed, 0).to(tl.int32)
            half = halves + group // 2 + unit * 128 + row[None, :]
            low = ((codes & 15) - 8).to(tl.float32) * tl.load(half).to(tl.float32)
            high = ((codes >> 4) - 8).to(tl.float32) * tl.load(half + 64).to(tl.float32)
            low_acc = add(low_acc, x_MK, low, TOKENS, OPERANDS)
            high_acc = add(high_acc, x_MK, high, TOKENS, OPERANDS)
    if TOKENS == 1:
        low_acc = tl.sum(low_acc, 0)[None, :]
        high_acc = tl.sum(high_acc, 0)[None, :]
    if BITS == 8:
        row += unit * 64
        store(y, low_acc * tl.load(scale + row)[None, :], split, token, row, M, N, TOKENS)
    else:
        row += unit * 128
        store(y, low_acc, split, token, row, M, N, TOKENS)
        store(y, high_acc, split, token, row + 64, M, N, TOKENS)


@triton.jit
def add(acc, x_MK, w_KN, TOKENS: tl.constexpr, OPERANDS: tl.constexpr):
    """acc and x w: of one token without the sum over its inputs, [K, N]."""
    if TOKENS == 1:
        acc += tl.sum(x_MK, 0).to(tl.float32)[:, None] * w_KN
    else:
        acc += dot(x_MK, w_KN, OPERANDS)
    return acc
