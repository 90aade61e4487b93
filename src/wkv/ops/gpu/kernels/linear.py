"""WKV-6 and WKV-5 over chunks of L tokens, and what their gradients (linear_backward.py) share with them.

With S the state [N_value, N_key] at the start of a chunk, g the log-decays, and sums over tokens of the chunk,

    y_i    = S (r_i exp(sum_{m < i} g_m)) + sum_{j < i} A_ij v_j + A_ii v_i
    A_ij   = sum_c r_ic k_jc exp(sum_{j < m < i} g_mc)  for j < i,       A_ii = sum_c r_ic u_c k_ic
    S_next = S diag(exp(sum_m g_m)) + sum_j v_j (k_j exp(sum_{m > j} g_m))^T

A is cut by halving. On level l = 0, 1, ... the chunk falls into blocks of 2^(l+1) tokens, and the queries of each
second half meet the keys of its first half: each pair j < i on one level, that of the highest bit in which i and j
differ. Queries carry the decays from the middle of the block to them, keys those from them to the middle, so no
exponent is positive. A token is query or key on a level, never both: with X its scaled r or k, all pairs of a level are
entries of the symmetric X X^T, one product of matrices. To go up a level, queries pick up the total of the half before
theirs, and keys that of the half behind: every exponent is a sum of log-decays, never a difference, for any g <= 0.
After the last level the queries carry the decays from the start of the chunk, the keys those to its end, as the state
needs them.

Exponents are those of 2. Log-decays below LOWEST count as LOWEST, which float32 cannot tell from nothing in any sum, so
-inf never meets arithmetic. A reset is the decay CUT of its token, whose query reads nothing but its bonus. A token
that does not exist has r = k = v = g = 0.

The two directions are mirror images. Read backwards, a gradient of the state [N_value, N_key] takes up dy_i at r_i as
the state takes up v_j at k_j, and dv is read from it at k_j as y is from the state at r_i, with A transposed. So
`pass_states` and `mix` do both, with x = v or dy.

Shape letters: L tokens of a chunk, N channels of a head, K and V keys and values of a block of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-87.0)  # natural logarithm
CUT = tl.constexpr(-1000.0)  # logarithm to base 2 of 0


@triton.jit
def exists_at(mask, b, start, rows, T, L: tl.constexpr):
    """Which tokens of sequence b, `rows` of the chunk from `start`, there are."""
    t = start + rows
    exists = (rows >= 0) & (rows < L) & (t < T)
    if mask is not None:
        exists = exists & (tl.load(mask + b * T + t, mask=exists, other=0) != 0)
    return exists


@triton.jit
def resets_at(reset, b, start, rows, exists, T):
    """Before which of these tokens the state is emptied."""
    t = start + rows
    if reset is None:
        return exists & (t < 0)
    return exists & (tl.load(reset + b * T + t, mask=exists, other=0) != 0)


@triton.jit
def load_rows(x, b, h, start, rows, cols, exists, T, H, N: tl.constexpr):
    """Tokens start + rows and channels cols of x [B, T, H, N], float32; 0 where a token does not exist.

    b, h and start are int64, so that their place is; within a chunk 32 bits do.
    """
    at = x + ((b * T + start) * H + h) * N + rows[:, None] * (H * N) + cols[None, :]
    return tl.load(at, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, b, h, start, rows, cols, T, H, N: tl.constexpr):
    """The counterpart of `load_rows`, for tokens before T."""
    at = x + ((b * T + start) * H + h) * N + rows[:, None] * (H * N) + cols[None, :]
    tl.store(at, blocks.cast(value, x.dtype.element_ty), mask=(start + rows < T)[:, None])


@triton.jit
def load_log_w(log_w, b, h, start, rows, cols, exists, T, H, N: tl.constexpr, CONSTANT: tl.constexpr):
    """Natural log-decays [L, K] as given, of tokens that exist; 0 elsewhere."""
    if CONSTANT:  # [H, N]
        g = tl.load(log_w + h * N + cols).to(tl.float32)
        return tl.where(exists[:, None], g[None, :], 0.0)
    return load_rows(log_w, b, h, start, rows, cols, exists, T, H, N)


@triton.jit
def exponents(g, resets):
    """Log-decays as `load_log_w` returns them to finite exponents of 2."""
    return tl.where(resets[:, None], CUT, tl.maximum(g, LOWEST) * LOG2_E)


@triton.jit
def is_second(rows, level):
    """Which rows are queries on a level, the others being keys."""
    return ((rows >> level) & 1) == 1


@triton.jit
def meet(rows, level):
    """[L, L], where a query and a key of one block meet on a level."""
    half = rows >> level  # each level makes these anew: kept for all, entries of [L, L] would fill the registers
    return (half[:, None] ^ half[None, :]) == 1


@triton.jit
def of_sibling(total, level):
    """`total` [L, K] is the same in all 2^level rows of half a block: here, what it is in the block's other half."""
    rows = tl.arange(0, total.shape[0]) ^ (1 << level)
    return tl.gather(total, tl.broadcast_to(rows[:, None], total.shape), 0)


@triton.jit
def scores(q, k, total, LEVELS, OPERANDS: tl.constexpr):
    """A + A^T without its diagonal [L, L], and q and k [L, K] scaled to the start and the end of the chunk.

    `total` are the exponents of all tokens, the decays of blocks of one.
    """
    rows = tl.arange(0, q.shape[0])
    A = tl.zeros([q.shape[0], q.shape[0]], tl.float32)
    for level in range(LEVELS):
        second = is_second(rows, level)[:, None]
        X = tl.where(second, q, k)
        A = tl.where(meet(rows, level), blocks.dot(X, tl.trans(X), OPERANDS), A)
        other = of_sibling(total, level)
        decay = tl.exp2(other)
        q = tl.where(second, q * decay, q)
        k = tl.where(second, k, k * decay)
        total += other
    return A, q, k


@triton.jit
def pass_states(
    x,
    z,
    log_w,
    initial,
    borders,
    final,
    mask,
    reset,
    T,
    H,
    L: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CONSTANT: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """From chunk to chunk, for one sequence, one head and K keys.

    Forward, x = v and z = k: the states at the starts of all chunks to borders [B, H, chunks, N, N], and the last one.
    Backward, x = dy and z = r: the gradients of the states at the ends of all chunks, and of the initial one.
    """
    program = tl.program_id(0)
    bh = (program // (N // K)).to(tl.int64)
    b, h = bh // H, bh % H
    rows, values = tl.arange(0, L), tl.arange(0, N)
    cols = program % (N // K) * K + tl.arange(0, K)
    tile = values[:, None] * N + cols[None, :]
    S = tl.zeros([N, K], tl.float32)
    if initial is not None:
        S = tl.load(initial + bh * N * N + tile).to(tl.float32)
    chunks = tl.cdiv(T, L)
    for step in range(chunks):
        chunk = chunks - 1 - step if BACKWARD else step
        tl.store(borders + (bh * chunks + chunk) * N * N + tile, blocks.cast(S, borders.dtype.element_ty))
        start = tl.cast(chunk, tl.int64) * L
        exists = exists_at(mask, b, start, rows, T, L)
        resets = resets_at(reset, b, start, rows, exists, T)
        g = exponents(load_log_w(log_w, b, h, start, rows, cols, exists, T, H, N, CONSTANT), resets)
        # Sums without the token itself: the neighbours' log-decays, summed with their own place.
        near = rows - 1 if BACKWARD else rows + 1
        there = exists_at(mask, b, start, near, T, L)
        g_near = load_log_w(log_w, b, h, start, near, cols, there, T, H, N, CONSTANT)
        g_near = exponents(g_near, resets_at(reset, b, start, near, there, T))
        z_LK = load_rows(z, b, h, start, rows, cols, exists, T, H, N)
        if BACKWARD:
            z_LK = tl.where(resets[:, None], 0.0, z_LK)
        z_LK *= tl.exp2(tl.cumsum(g_near, 0, reverse=not BACKWARD))
        x_LN = load_rows(x, b, h, start, rows, values, exists, T, H, N)
        decay = tl.exp2(tl.sum(g, 0))[None, :]
        # Nothing is left of anything, be it infinite.
        S = tl.where(decay == 0, 0.0, S * decay) + blocks.dot(tl.trans(x_LN), z_LK, OPERANDS)
    tl.store(final + bh * N * N + tile, S)


@triton.jit
def mix(
    r,
    k,
    log_w,
    u,
    x,
    borders,
    out,
    mask,
    reset,
    T,
    H,
    L: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LEVELS,
    CONSTANT: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """One chunk of y from x = v and the state at its start, or of dv from x = dy and the state gradient at its end."""
    chunks = tl.cdiv(T, L)
    program = tl.program_id(0).to(tl.int64)
    bh, chunk = program // chunks, program % chunks
    b, h = bh // H, bh % H
    rows, values = tl.arange(0, L), tl.arange(0, N)
    start = chunk * L
    exists = exists_at(mask, b, start, rows, T, L)
    resets = resets_at(reset, b, start, rows, exists, T)
    A = tl.zeros([L, L], tl.float32)
    bonus = tl.zeros([L], tl.float32)
    out_LN = tl.zeros([L, N], tl.float32)
    for block in range(N // K):
        cols = block * K + tl.arange(0, K)
        g = exponents(load_log_w(log_w, b, h, start, rows, cols, exists, T, H, N, CONSTANT), resets)
        r_LK = load_rows(r, b, h, start, rows, cols, exists, T, H, N)
        k_LK = load_rows(k, b, h, start, rows, cols, exists, T, H, N)
        bonus += tl.sum(r_LK * k_LK * tl.load(u + h * N + cols).to(tl.float32)[None, :], 1)
        part, q_LK, k_LK = scores(tl.where(resets[:, None], 0.0, r_LK), k_LK, g, LEVELS, OPERANDS)
        A += part
        z_LK = k_LK if BACKWARD else q_LK
        S = tl.load(borders + program * N * N + values[:, None] * N + cols[None, :]).to(tl.float32)
        out_LN += blocks.dot(z_LK, tl.trans(S), OPERANDS)
    if reset is not None:  # nothing of a state that may be infinite
        out_LN = tl.where(is_cut(resets, BACKWARD)[:, None], 0.0, out_LN)
    before = rows[:, None] < rows[None, :] if BACKWARD else rows[:, None] > rows[None, :]
    x_LN = load_rows(x, b, h, start, rows, values, exists, T, H, N)
    out_LN += blocks.dot(tl.where(before, A, 0.0), x_LN, OPERANDS) + bonus[:, None] * x_LN
    store_rows(out, tl.where(exists[:, None], out_LN, 0.0), b, h, start, rows, values, T, H, N)


@triton.jit
def is_cut(resets, AFTER: tl.constexpr):
    """Which tokens have a reset of the chunk before them, or at them; or behind them."""
    count = tl.cumsum(resets.to(tl.int32), 0)
    return tl.sum(resets.to(tl.int32), 0) > count if AFTER else count > 0


@triton.jit
def recur(
    r,
    log_w,
    k,
    v,
    u,
    initial,
    y,
    final,
    mask,
    reset,
    T,
    H,
    N: tl.constexpr,
    V: tl.constexpr,
    CONSTANT: tl.constexpr,
):
    """The equation, token by token, for one sequence, one head and V values."""
    program = tl.program_id(0)
    bh = (program // (N // V)).to(tl.int64)
    b, h = bh // H, bh % H
    cols = tl.arange(0, N)
    values = program % (N // V) * V + tl.arange(0, V)
    tile = values[:, None] * N + cols[None, :]
    S = tl.zeros([V, N], tl.float32)
    if initial is not None:
        S = tl.load(initial + bh * N * N + tile).to(tl.float32)
    u_N = tl.load(u + h * N + cols).to(tl.float32)
    for t in range(T):
        at = ((b * T + t) * H + h) * N
        exists = True
        if mask is not None:
            exists = tl.load(mask + b * T + t) != 0
        if reset is not None:
            S = tl.where((tl.load(reset + b * T + t) != 0) & exists, 0.0, S)
        r_N = tl.load(r + at + cols, mask=exists, other=0.0).to(tl.float32)
        k_N = tl.load(k + at + cols, mask=exists, other=0.0).to(tl.float32)
        v_V = tl.load(v + at + values, mask=exists, other=0.0).to(tl.float32)
        if CONSTANT:
            g = tl.where(exists, tl.load(log_w + h * N + cols).to(tl.float32), 0.0)
        else:
            g = tl.load(log_w + at + cols, mask=exists, other=0.0).to(tl.float32)
        y_V = tl.sum(S * r_N[None, :], 1) + v_V * tl.sum(r_N * u_N * k_N)
        tl.store(y + at + values, blocks.cast(tl.where(exists, y_V, 0.0), y.dtype.element_ty))
        S = S * tl.exp(g)[None, :] + v_V[:, None] * k_N[None, :]
    tl.store(final + bh * N * N + tile, S)
