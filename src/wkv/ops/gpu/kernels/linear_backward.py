"""The gradients of r, k, log_w and u of WKV-6 and WKV-5, one chunk at a time; see linear.py for the forward pass.

With dS the gradient of the state at the end of the chunk, and X as there, on each level

    dX = B X,    B_ij = dy_i . v_j for a query i and a key j, B_ij = dy_j . v_i for a key i and a query j

and dr, dk are the sums over levels of dX times the decay in X, and of dy S and v dS times theirs.

A log-decay g_m has a part in each product of a query and a key, state or gradient whose path crosses token m. The
exponent in a query's X on a level is the sum over its own half up to itself, so X_i dX_i, the sum of all products that
it is in, belongs to the gradient of each g_m there with m < i; likewise that of a key to those with m > j. Hence

    dg_m = sum over levels of sum_i [m lies on i's way to the middle] X_i . dX_i
           + sum_{i > m} q_i . dq_i + sum_{j < m} k_j . dk_j + exp(sum of g) sum_v S_v dS_v

per channel, where the second line has the paths that leave the chunk at its start, at its end, and at both. The sums
over tokens are products with matrices of 0 and 1. Only products that cross m are added, and nothing is taken away: what
is lost to rounding is a part of the terms of dg_m itself. The well-known dg_m = sum_{t > m} r_t . dr_t -
sum_{t >= m} k_t . dk_t subtracts two sums that share all products beside m, and those are all but the whole of either
where decays are strong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks
from wkv.ops.gpu.kernels.linear import (
    LOWEST,
    exists_at,
    exponents,
    is_cut,
    is_second,
    load_log_w,
    load_rows,
    meet,
    of_sibling,
    resets_at,
    store_rows,
)


@triton.jit
def crossing(rows, level):
    """[L, L], 1.0 where row m lies on the way of row i to the middle of i's block."""
    start = (rows >> level) << level
    second = is_second(rows, level)
    above = tl.where(second, start - 1, rows)
    below = tl.where(second, rows, start + (1 << level))
    return ((rows[:, None] > above[None, :]) & (rows[:, None] < below[None, :])).to(tl.float32)


@triton.jit
def differentiate(
    r,
    log_w,
    k,
    v,
    u,
    dy,
    starts,
    ends,
    dr,
    dlog_w,
    dk,
    du,
    mask,
    reset,
    T,
    H,
    L: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    LEVELS,
    CONSTANT: tl.constexpr,
    OPERANDS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dr, dk and dlog_w of one chunk and K keys, and its part of du, [B, chunks, H, N]; of a CONSTANT dlog_w too."""
    chunks = tl.cdiv(T, L)
    program = tl.program_id(0).to(tl.int64)
    at, block = program // (N // K), program % (N // K)
    bh, chunk = at // chunks, at % chunks
    b, h = bh // H, bh % H
    rows, cols = tl.arange(0, L), block * K + tl.arange(0, K)
    start = chunk * L
    exists = exists_at(mask, b, start, rows, T, L)
    resets = resets_at(reset, b, start, rows, exists, T)

    d_bonus = tl.zeros([L], tl.float32)
    d_scores = tl.zeros([L, L], tl.float32)
    for part in range(N // V):
        values = part * V + tl.arange(0, V)
        dy_LV = load_rows(dy, b, h, start, rows, values, exists, T, H, N)
        v_LV = load_rows(v, b, h, start, rows, values, exists, T, H, N)
        d_bonus += tl.sum(dy_LV * v_LV, 1)
        d_scores += tl.where(
            rows[:, None] > rows[None, :],
            blocks.dot(dy_LV, tl.trans(v_LV), OPERANDS),
            blocks.dot(v_LV, tl.trans(dy_LV), OPERANDS),
        )
    if OPERANDS == "bf16":
        d_scores = d_scores.to(tl.bfloat16)  # as it will be in products
    nothing = tl.zeros([L, L], d_scores.dtype)

    g = load_log_w(log_w, b, h, start, rows, cols, exists, T, H, N, CONSTANT)
    total = exponents(g, resets)
    to_r = tl.full([L, K], 1.0, tl.float32)  # the decays in queries and in keys
    to_k = tl.full([L, K], 1.0, tl.float32)
    dr_LK = tl.zeros([L, K], tl.float32)
    dk_LK = tl.zeros([L, K], tl.float32)
    dg = tl.zeros([L, K], tl.float32)
    for level in range(LEVELS):
        second = is_second(rows, level)
        # Loaded again on each level: registers are what this kernel lacks.
        X = load_rows(r, b, h, start, rows, cols, exists & second & ~resets, T, H, N)
        X += load_rows(k, b, h, start, rows, cols, exists & ~second, T, H, N)
        second = second[:, None]
        decay = tl.where(second, to_r, to_k)
        X *= decay
        dX = blocks.dot(tl.where(meet(rows, level), d_scores, nothing), X, OPERANDS)
        dg += blocks.dot(crossing(rows, level), X * dX, SUMS)
        dX *= decay
        dr_LK += tl.where(second, dX, 0.0)
        dk_LK += tl.where(second, 0.0, dX)
        other = of_sibling(total, level)
        decay = tl.exp2(other)
        to_r = tl.where(second, to_r * decay, to_r)
        to_k = tl.where(second, to_k, to_k * decay)
        total += other

    dq_end = tl.zeros([L, K], tl.float32)
    dk_end = tl.zeros([L, K], tl.float32)
    d_total = tl.zeros([K], tl.float32)
    for part in range(N // V):
        values = part * V + tl.arange(0, V)
        tile = at * N * N + values[:, None] * N + cols[None, :]
        S = tl.load(starts + tile).to(tl.float32)
        dS = tl.load(ends + tile).to(tl.float32)
        d_total += tl.sum(S * dS, 0)
        dq_end += blocks.dot(load_rows(dy, b, h, start, rows, values, exists, T, H, N), S, OPERANDS)
        dk_end += blocks.dot(load_rows(v, b, h, start, rows, values, exists, T, H, N), dS, OPERANDS)
    dq_end *= to_r
    dk_end *= to_k
    d_total *= tl.exp2(tl.min(total, 0))  # of the tokens that there are
    if reset is not None:  # nothing of states that may be infinite
        dq_end = tl.where(is_cut(resets, False)[:, None], 0.0, dq_end)
        dk_end = tl.where(is_cut(resets, True)[:, None], 0.0, dk_end)
        d_total = tl.where(tl.max(resets.to(tl.int32), 0) > 0, 0.0, d_total)
    r_LK = load_rows(r, b, h, start, rows, cols, exists, T, H, N)
    k_LK = load_rows(k, b, h, start, rows, cols, exists, T, H, N)
    d_bonus = d_bonus[:, None]
    tl.store(du + ((b * chunks + chunk) * H + h) * N + cols, tl.sum(r_LK * k_LK * d_bonus, 0))
    u_K = tl.load(u + h * N + cols).to(tl.float32)[None, :]
    dr_LK = tl.where(resets[:, None], 0.0, dr_LK) + dq_end + u_K * k_LK * d_bonus
    dk_LK += dk_end + u_K * r_LK * d_bonus
    store_rows(dr, tl.where(exists[:, None], dr_LK, 0.0), b, h, start, rows, cols, T, H, N)
    store_rows(dk, tl.where(exists[:, None], dk_LK, 0.0), b, h, start, rows, cols, T, H, N)
    dg += blocks.dot((rows[:, None] < rows[None, :]).to(tl.float32), r_LK * dq_end, SUMS)
    dg += blocks.dot((rows[:, None] > rows[None, :]).to(tl.float32), k_LK * dk_end, SUMS)
    g = load_log_w(log_w, b, h, start, rows, cols, exists, T, H, N, CONSTANT)
    moves = (exists & ~resets)[:, None] & (g >= LOWEST)
    dg = tl.where(moves, dg + d_total[None, :], 0.0)
    if CONSTANT:
        tl.store(dlog_w + ((b * chunks + chunk) * H + h) * N + cols, tl.sum(dg, 0))
    else:
        store_rows(dlog_w, dg, b, h, start, rows, cols, T, H, N)
