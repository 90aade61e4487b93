"""WKV-7 in chunks, backward; names as in wkv7.py, dX for the gradient of X, dS for that of the state at a chunk's end.

`states_backward`, chunk after chunk from the last one:

    dU = Aqb^T dY + (B exp(G_L - G)) dS^T
    dS_previous = dS diag(exp(G_L)) + dY^T (R exp(G)) + dU^T W (A exp(X))

`gradients`, all chunks at once, with dZ = W^T dU:

    dAqk = dY V^T, dAqb = dY U^T, dAak = dZ V^T, dAab = dZ U^T    within their triangles
    dV = Aqk^T dY + (K exp(G_L - G)) dS^T + Aak^T dZ
    dR_i = exp(G_i) (dY S)_i + sum_j exp(G_i - G_j) (dAqk_ij k_j + dAqb_ij b_j)
    dA_i = exp(X_i) (dZ S)_i + sum_j exp(X_i - G_j) (dAak_ij k_j + dAab_ij b_j)
    dK_j = exp(G_L - G_j) (V dS)_j + sum_i exp(G_i - G_j) dAqk_ij r_i + exp(X_i - G_j) dAak_ij a_i
    dB_j = exp(G_L - G_j) (U dS)_j + sum_i exp(G_i - G_j) dAqb_ij r_i + exp(X_i - G_j) dAab_ij a_i

A log-decay g_t is in G_i for t <= i, in X_i for t < i, and in G_L:

    dG_i = r_i dR_i - k_i dK_i - b_i dB_i,    dX_i = a_i dA_i,    dG_L = colsum(S_next dS)
    dg_t = sum_{i >= t} dG_i + sum_{i > t} dX_i + dG_L

A pair of tokens on the same side of t adds to this once and takes away the same: where operands are rounded, dG and dX
are made of the rounded ones, with which both are equal, and nothing but the rounding of what is left remains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels.blocks import dot, operand
from wkv.ops.gpu.kernels.wkv7 import FLOOR, earlier, end_of, pairs, place, put_rows, put_tile, row, rows, tile, timeline


@triton.jit
def states_backward(
    r_in, w_in, b_in, dy, mask, reset, d_final, Aqb_in, UA_in,
    d_ends, dU_out, d_state,
    T, H, NT,
    L: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """M rows of the gradient of the state of one head: at the end of every chunk, and of the initial state; and dU."""
    bh = tl.program_id(0)
    m = tl.program_id(1) * M
    b, h = bh // H, bh % H
    corner = bh.to(tl.int64) * (N * N)
    dS = tl.zeros([M, N], tl.float32)
    if d_final is not None:
        dS = tl.load(tile(d_final, corner, m * N, M, N, N)).to(tl.float32)
    for back in range(NT):
        chunk = (b * NT + NT - 1 - back) * H + h
        _, _, start, base = place(chunk, T, H, NT, L, N)
        exists, segment = timeline(mask, reset, b, start, T, L)
        put_tile(d_ends, chunk.to(tl.int64) * (N * N), m * N, dS, M, N, N)
        tail, whole = end_of(w_in, base, exists, segment, H, L, N)
        square, oblong = chunk.to(tl.int64) * (L * L), chunk.to(tl.int64) * (L * N)
        dY = rows(dy, base, exists, H, m, L, N, M)
        dU = dot(tl.trans(tl.load(tile(Aqb_in, square, 0, L, L, L))), dY, OPERANDS)
        dU += dot(rows(b_in, base, exists, H, 0, L, N, N) * tail, tl.trans(dS), OPERANDS)
        put_tile(dU_out, oblong, m, dU, L, M, N)
        G = tl.cumsum(tl.maximum(rows(w_in, base, exists, H, 0, L, N, N), FLOOR), 0)
        read = tl.where((segment == 0)[:, None], rows(r_in, base, exists, H, 0, L, N, N) * tl.exp(G), 0.0)
        dS = dS * whole[None, :] + dot(tl.trans(dY), read, OPERANDS)
        dS += dot(tl.trans(dU), tl.load(tile(UA_in, oblong, 0, L, N, N)), OPERANDS)
    put_tile(d_state, corner, m * N, dS, M, N, N)


@triton.jit
def exact_reads(
    r, dAqk, dAqb, k_in, b_in, w_in, base, mask, sequence, start, T, H, L: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """What pairs of a read and an earlier token give dR, dK and dB, key by key, by short sums of log-decays."""
    dR = tl.zeros([L, N], tl.float32)
    dK = tl.zeros([L, N], tl.float32)
    dB = tl.zeros([L, N], tl.float32)
    E = tl.zeros([L, N], tl.float32)
    g = tl.zeros([N], tl.float32)
    t = tl.arange(0, L)
    for back in range(L):
        j = L - 1 - back
        E = earlier(E, g, j, L)
        g = tl.maximum(row(w_in, base, mask, sequence, start, T, H, j, N), FLOOR)
        k = row(k_in, base, mask, sequence, start, T, H, j, N)[None, :]
        b = row(b_in, base, mask, sequence, start, T, H, j, N)[None, :]
        here = (t == j)[None, :]
        qk = tl.sum(tl.where(here, dAqk, 0.0), 1)[:, None]
        qb = tl.sum(tl.where(here, dAqb, 0.0), 1)[:, None]
        near = tl.exp(E)
        dR += near * (qk * k + qb * b)
        mine = (t == j)[:, None]
        dK += tl.where(mine, tl.sum(near * r * qk, 0)[None, :], 0.0)
        dB += tl.where(mine, tl.sum(near * r * qb, 0)[None, :], 0.0)
    return dR, dK, dB


@triton.jit
def exact_removals(
    a, dAak, dAab, k_in, b_in, w_in, base, mask, sequence, start, T, H, L: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The same for pairs of a removal and an earlier token: dA, dK and dB."""
    dA = tl.zeros([L, N], tl.float32)
    dK = tl.zeros([L, N], tl.float32)
    dB = tl.zeros([L, N], tl.float32)
    X = tl.zeros([L, N], tl.float32)
    g = tl.zeros([N], tl.float32)
    t = tl.arange(0, L)
    for back in range(L):
        j = L - 1 - back
        X = earlier(X, g, j + 1, L)
        g = tl.maximum(row(w_in, base, mask, sequence, start, T, H, j, N), FLOOR)
        k = row(k_in, base, mask, sequence, start, T, H, j, N)[None, :]
        b = row(b_in, base, mask, sequence, start, T, H, j, N)[None, :]
        here = (t == j)[None, :]
        ak = tl.sum(tl.where(here, dAak, 0.0), 1)[:, None]
        ab = tl.sum(tl.where(here, dAab, 0.0), 1)[:, None]
        far = tl.exp(X)
        dA += far * (ak * k + ab * b)
        mine = (t == j)[:, None]
        dK += tl.where(mine, tl.sum(far * a * ak, 0)[None, :], 0.0)
        dB += tl.where(mine, tl.sum(far * a * ab, 0)[None, :], 0.0)
    return dA, dK, dB


@triton.jit
def reading(
    UA_in, UV_in, starts, oblong, corner, m, L: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERANDS: tl.constexpr
):
    """M rows of the state [M, N] at a chunk's start, and M channels of U [L, M]."""
    S = tl.load(tile(starts, corner, m * N, M, N, N))
    U = dot(tl.load(tile(UA_in, oblong, 0, L, N, N)), tl.trans(S), OPERANDS)
    return S, U + tl.load(tile(UV_in, oblong, m, L, M, N)).to(tl.float32)


@triton.jit
def gradients(
    r_in, w_in, k_in, v_in, a_in, b_in, dy, mask, reset,
    strong, Aqk_in, Aak_in, W_in, UA_in, UV_in, dU_in, starts, d_ends,
    dr, dw, dk, dv, da, db,
    T, H, NT,
    L: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERANDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradients of all inputs of one chunk.

    Three rounds over the value channels, M at a time, of which each needs few matrices at once: reads (dR), removals
    (dA), and what reaches the end of the chunk (dV, and the rest of dK and dB).
    """
    chunk = tl.program_id(0)
    if (tl.load(strong + chunk) != 0) != EXACT:
        return
    sequence, _, start, base = place(chunk, T, H, NT, L, N)
    exists, segment = timeline(mask, reset, sequence, start, T, L)
    inside = start + tl.arange(0, L) < T
    there = exists[:, None]
    opening = (segment == 0)[:, None]
    upto, before = pairs(segment, L)
    square, oblong = chunk.to(tl.int64) * (L * L), chunk.to(tl.int64) * (L * N)
    corner = chunk.to(tl.int64) * (N * N)
    g = tl.maximum(rows(w_in, base, exists, H, 0, L, N, N), FLOOR)
    G = tl.cumsum(g, 0)
    c = tl.sum(tl.where(tl.arange(0, L)[:, None] < L // 2, g, 0.0), 0)[None, :]

    dR = tl.zeros([L, N], tl.float32)
    dAqk = tl.zeros([L, L], tl.float32)
    dAqb = tl.zeros([L, L], tl.float32)
    for m in range(0, N, M):
        S, U = reading(UA_in, UV_in, starts, oblong, corner, m, L, N, M, OPERANDS)
        dY = rows(dy, base, exists, H, m, L, N, M)
        dR += dot(dY, S, OPERANDS)
        dAqk += dot(dY, tl.trans(rows(v_in, base, exists, H, m, L, N, M)), OPERANDS)
        dAqb += dot(dY, tl.trans(U), OPERANDS)
    dR = tl.where(opening, tl.exp(G) * dR, 0.0)
    dAqk = tl.where(upto, dAqk, 0.0)
    dAqb = tl.where(upto, dAqb, 0.0)
    r = rows(r_in, base, exists, H, 0, L, N, N)
    k = rows(k_in, base, exists, H, 0, L, N, N)
    b = rows(b_in, base, exists, H, 0, L, N, N)
    dG = r * dR
    if EXACT:
        more, dK, dB = exact_reads(r, dAqk, dAqb, k_in, b_in, w_in, base, mask, sequence, start, T, H, L, N)
        dR += more
        dG += r * more - k * dK - b * dB
    else:
        near, back = tl.exp(G - c), tl.exp(c - G)
        read = operand(r * near, OPERANDS)
        k_back, b_back = operand(k * back, OPERANDS), operand(b * back, OPERANDS)
        more = dot(dAqk, k_back, OPERANDS) + dot(dAqb, b_back, OPERANDS)
        dK = dot(tl.trans(dAqk), read, OPERANDS)
        dB = dot(tl.trans(dAqb), read, OPERANDS)
        dG += read * more - k_back * dK - b_back * dB
        dR += near * more
        dK *= back
        dB *= back
    put_rows(dr, base, tl.where(there, dR, 0.0), inside, H, 0, L, N, N)

    dA = tl.zeros([L, N], tl.float32)
    dAak = tl.zeros([L, L], tl.float32)
    dAab = tl.zeros([L, L], tl.float32)
    for m in range(0, N, M):
        S, U = reading(UA_in, UV_in, starts, oblong, corner, m, L, N, M, OPERANDS)
        dZ = dot(tl.trans(tl.load(tile(W_in, square, 0, L, L, L))), tl.load(tile(dU_in, oblong, m, L, M, N)), OPERANDS)
        dA += dot(dZ, S, OPERANDS)
        dAak += dot(dZ, tl.trans(rows(v_in, base, exists, H, m, L, N, M)), OPERANDS)
        dAab += dot(dZ, tl.trans(U), OPERANDS)
    X = G - g
    dA = tl.where(opening, tl.exp(X) * dA, 0.0)
    dAak = tl.where(before, dAak, 0.0)
    dAab = tl.where(before, dAab, 0.0)
    a = rows(a_in, base, exists, H, 0, L, N, N)
    dX = a * dA
    k = rows(k_in, base, exists, H, 0, L, N, N)
    b = rows(b_in, base, exists, H, 0, L, N, N)
    if EXACT:
        more, more_K, more_B = exact_removals(a, dAak, dAab, k_in, b_in, w_in, base, mask, sequence, start, T, H, L, N)
        dA += more
        dX += a * more
        dG -= k * more_K + b * more_B
    else:
        far, back = tl.exp(X - c), tl.exp(c - G)
        removed = operand(a * far, OPERANDS)
        k_back, b_back = operand(k * back, OPERANDS), operand(b * back, OPERANDS)
        more = dot(dAak, k_back, OPERANDS) + dot(dAab, b_back, OPERANDS)
        more_K = dot(tl.trans(dAak), removed, OPERANDS)
        more_B = dot(tl.trans(dAab), removed, OPERANDS)
        dX += removed * more
        dG -= k_back * more_K + b_back * more_B
        dA += far * more
        more_K *= back
        more_B *= back
    dK += more_K
    dB += more_B
    put_rows(da, base, tl.where(there, dA, 0.0), inside, H, 0, L, N, N)

    dK_end = tl.zeros([L, N], tl.float32)
    dB_end = tl.zeros([L, N], tl.float32)
    dG_L = tl.zeros([N], tl.float32)
    tail, whole = end_of(w_in, base, exists, segment, H, L, N)
    for m in range(0, N, M):
        S, U = reading(UA_in, UV_in, starts, oblong, corner, m, L, N, M, OPERANDS)
        dS = tl.load(tile(d_ends, corner, m * N, M, N, N))
        dG_L += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        dK_end += dot(rows(v_in, base, exists, H, m, L, N, M), dS, OPERANDS)
        dB_end += dot(U, dS, OPERANDS)
        dV = dot(rows(k_in, base, exists, H, 0, L, N, N) * tail, tl.trans(dS), OPERANDS)
        dV += dot(tl.trans(tl.load(tile(Aqk_in, square, 0, L, L, L))), rows(dy, base, exists, H, m, L, N, M), OPERANDS)
        dZ = dot(tl.trans(tl.load(tile(W_in, square, 0, L, L, L))), tl.load(tile(dU_in, oblong, m, L, M, N)), OPERANDS)
        dV += dot(tl.trans(tl.load(tile(Aak_in, square, 0, L, L, L))), dZ, OPERANDS)
        put_rows(dv, base, tl.where(there, dV, 0.0), inside, H, m, L, N, M)
    k = rows(k_in, base, exists, H, 0, L, N, N)
    b = rows(b_in, base, exists, H, 0, L, N, N)
    dK_end *= tail
    dB_end *= tail
    to_end = k * dK_end + b * dB_end
    dG_L = whole * dG_L + tl.sum(to_end, 0)
    dG -= to_end
    dK += dK_end
    dB += dB_end
    put_rows(dk, base, tl.where(there, dK, 0.0), inside, H, 0, L, N, N)
    put_rows(db, base, tl.where(there, dB, 0.0), inside, H, 0, L, N, N)
    # Sums over the later tokens of the same segment, which `upto` transposed has.
    dg = dot(tl.trans(tl.where(upto, 1.0, 0.0)), dG + dX, "tf32x3") - dX
    dg += tl.where((segment == tl.max(segment, 0))[:, None], dG_L[None, :], 0.0)
    forgets = rows(w_in, base, exists, H, 0, L, N, N) < FLOOR
    put_rows(dw, base, tl.where(there & (forgets == 0), dg, 0.0), inside, H, 0, L, N, N)
