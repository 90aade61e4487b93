"""WKV-7 in chunks of L tokens, forward: matrix products for tensor cores, any log-decay <= 0.

Per head and chunk, with g the log-decays, G_i their sum up to and including token i, X_i without token i, S the state
[N_value, N_key] at the start of the chunk, and u_i = S_{i-1} a_i what the removal key reads (U its rows, [L, N_value]):

    Aqk_ij = r_i . (k_j exp(G_i - G_j))    Aqb_ij = r_i . (b_j exp(G_i - G_j))    for j <= i
    Aak_ij = a_i . (k_j exp(X_i - G_j))    Aab_ij = a_i . (b_j exp(X_i - G_j))    for j < i
    U = W (Aak V + (A exp(X)) S^T)         with W = (I - Aab)^-1
    Y = Aqk V + Aqb U + (R exp(G)) S^T
    S_next = S diag(exp(G_L)) + V^T (K exp(G_L - G)) + U^T (B exp(G_L - G))

so three kernels do: `prepare`, all chunks at once, the matrices, W Aak V and W (A exp(X)); `states`, chunk after chunk,
U and S; `outputs`, all chunks at once, Y. The products that make the matrices take exp(G_i - c) and exp(c - G_j) with c
the sum over the first half of the chunk. Where the decays of a chunk are too strong for that (never those of a model),
`prepare` leaves the chunk to another run of itself, EXACT, in which every exponent is a short sum of log-decays.

A token that does not exist has r = k = v = a = b = g = 0. A reset starts a new segment of the chunk: pairs of tokens
meet within a segment only, the first segment alone sees S, and the last alone S_next.

Shape letters: B batch, T time, H heads, N head size, M value channels of one program, L chunk length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels.blocks import cast, dot

FLOOR = tl.constexpr(-35.0)  # a decay of exp(-35) is zero beside rounding
LIMIT = tl.constexpr(44.0)  # of a half chunk's log-decays, for exp(LIMIT)^2 to fit into float32


@triton.jit
def place(chunk, T, H, NT, L: tl.constexpr, N: tl.constexpr):
    """Sequence, head, first token, and offset of its row in [B, T, H, N], of a chunk in [B, NT, H]."""
    h = chunk % H
    b = (chunk // H) // NT
    start = ((chunk // H) % NT) * L
    base = ((b * T + start).to(tl.int64) * H + h) * N
    return b, h, start, base


@triton.jit
def timeline(mask, reset, b, start, T, L: tl.constexpr):
    """Which tokens of a chunk exist, and the number of resets up to each."""
    t = start + tl.arange(0, L)
    exists = t < T
    segment = tl.zeros([L], tl.int32)
    if reset is not None:
        flags = tl.load(reset + b.to(tl.int64) * T + t, mask=exists, other=0)
        segment = tl.cumsum((flags != 0).to(tl.int32), 0)
    if mask is not None:
        exists = exists & (tl.load(mask + b.to(tl.int64) * T + t, mask=exists, other=0) != 0)
    return exists, segment


@triton.jit
def rows(x, base, exists, H, first, L: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """M channels of the tokens of a chunk, from channel `first` on: float32 [L, M], zero where there is no token."""
    offsets = tl.arange(0, L)[:, None] * (H * N) + (first + tl.arange(0, M))[None, :]
    return tl.load(x + base + offsets, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def put_rows(x, base, value, inside, H, first, L: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Store what `rows` loads; `inside` [L] are the tokens of the sequence, whether they exist or not."""
    offsets = tl.arange(0, L)[:, None] * (H * N) + (first + tl.arange(0, M))[None, :]
    tl.store(x + base + offsets, cast(value, x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def tile(x, index, first, R: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets of an R x C part of matrix `index` of x [n, rows, STRIDE]; `first` is the offset of its corner."""
    inner = tl.arange(0, R)[:, None] * STRIDE + tl.arange(0, C)[None, :]
    return x + index + first + inner


@triton.jit
def put_tile(x, index, first, value, R: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr):
    """Store a tile."""
    tl.store(tile(x, index, first, R, C, STRIDE), cast(value, x.dtype.element_ty))


@triton.jit
def inverse(A, L: tl.constexpr, OPERANDS: tl.constexpr):
    """(I - A)^-1 of a strictly lower A [L, L]: from inverses of blocks on the diagonal to those of twice the size.

    With the blocks' inverses W11 and W22 the new one has W21 = W22 A21 W11. Unlike products of powers of A this never
    subtracts large numbers.
    """
    t = tl.arange(0, L)
    W = tl.where(t[:, None] == t[None, :], 1.0, tl.where(below(t, 1), A, 0.0))
    for step in tl.static_range(1, 6):
        if 2**step < L:
            W += dot(dot(W, tl.where(below(t, 2**step), A, 0.0), OPERANDS), W, OPERANDS)
    return W


@triton.jit
def below(t, SIZE: tl.constexpr):
    """Where the lower left quarters of the diagonal blocks of twice SIZE are."""
    same = (t // (2 * SIZE))[:, None] == (t // (2 * SIZE))[None, :]
    return same & ((t // SIZE)[:, None] > (t // SIZE)[None, :])


@triton.jit
def pairs(segment, L: tl.constexpr):
    """Pairs (i, j) of one segment with j <= i, and with j < i."""
    t = tl.arange(0, L)
    same = segment[:, None] == segment[None, :]
    return same & (t[:, None] >= t[None, :]), same & (t[:, None] > t[None, :])


@triton.jit
def row(x, base, mask, b, t, T, H, j, N: tl.constexpr):
    """Token j of a chunk, float32 [N], zero where there is none; t is the number of the chunk's first token."""
    exists = t + j < T
    if mask is not None:
        exists = exists & (tl.load(mask + b.to(tl.int64) * T + t + j, mask=exists, other=0) != 0)
    return tl.load(x + base + j * (H * N) + tl.arange(0, N), mask=exists, other=0.0).to(tl.float32)


@triton.jit
def earlier(E, g, j, L: tl.constexpr):
    """From sums E [L, N] of log-decays over (j + 1, i] to those over (j, i], for all i; g [N] is that of token j + 1.

    Called with j + 1 for j, the sums over (j, i - 1].
    """
    return tl.where(tl.arange(0, L)[:, None] > j, E + g[None, :], 0.0)


@triton.jit
def exact_matrices(
    r, a, k_in, b_in, w_in, base, mask, sequence, start, T, H, L: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Aqk, Aqb, Aak, Aab without their triangles' masks, key by key."""
    Aqk = tl.zeros([L, L], tl.float32)
    Aqb = tl.zeros([L, L], tl.float32)
    Aak = tl.zeros([L, L], tl.float32)
    Aab = tl.zeros([L, L], tl.float32)
    E = tl.zeros([L, N], tl.float32)
    X = tl.zeros([L, N], tl.float32)
    g = tl.zeros([N], tl.float32)
    for back in range(L):
        j = L - 1 - back
        E = earlier(E, g, j, L)
        X = earlier(X, g, j + 1, L)
        g = tl.maximum(row(w_in, base, mask, sequence, start, T, H, j, N), FLOOR)
        k = row(k_in, base, mask, sequence, start, T, H, j, N)[None, :]
        b = row(b_in, base, mask, sequence, start, T, H, j, N)[None, :]
        here = (tl.arange(0, L) == j)[None, :]
        read = r * tl.exp(E)
        removed = a * tl.exp(X)
        Aqk = tl.where(here, tl.sum(read * k, 1)[:, None], Aqk)
        Aqb = tl.where(here, tl.sum(read * b, 1)[:, None], Aqb)
        Aak = tl.where(here, tl.sum(removed * k, 1)[:, None], Aak)
        Aab = tl.where(here, tl.sum(removed * b, 1)[:, None], Aab)
    return Aqk, Aqb, Aak, Aab


@triton.jit
def prepare(
    r_in, w_in, k_in, v_in, a_in, b_in, mask, reset,
    strong, Aqk_out, Aqb_out, Aak_out, W_out, UA_out, UV_out,
    T, H, NT,
    L: tl.constexpr, N: tl.constexpr, OPERANDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The matrices of one chunk, UA = W (A exp(X)) [L, N] and UV = W Aak V [L, N].

    strong [chunks]: written by the run without EXACT: 1 where the decays are too strong for it. Aak_out and W_out are
    for the backward pass, and None without one.
    """
    chunk = tl.program_id(0)
    if EXACT:  # noqa: SIM102 (a constant and a value)
        if tl.load(strong + chunk) == 0:
            return
    b, _, start, base = place(chunk, T, H, NT, L, N)
    exists, segment = timeline(mask, reset, b, start, T, L)
    g = tl.maximum(rows(w_in, base, exists, H, 0, L, N, N), FLOOR)
    G = tl.cumsum(g, 0)
    X = G - g
    t = tl.arange(0, L)[:, None]
    c = tl.sum(tl.where(t < L // 2, g, 0.0), 0)
    if not EXACT:
        most = tl.max(tl.maximum(-c, c - tl.sum(g, 0)), 0)
        tl.store(strong + chunk, (most > LIMIT).to(tl.int8))
        if most > LIMIT:
            return
    upto, before = pairs(segment, L)
    square, oblong = chunk.to(tl.int64) * (L * L), chunk.to(tl.int64) * (L * N)
    if EXACT:
        r = rows(r_in, base, exists, H, 0, L, N, N)
        a = rows(a_in, base, exists, H, 0, L, N, N)
        Aqk, Aqb, Aak, Aab = exact_matrices(r, a, k_in, b_in, w_in, base, mask, b, start, T, H, L, N)
        put_tile(Aqk_out, square, 0, tl.where(upto, Aqk, 0.0), L, L, L)
        put_tile(Aqb_out, square, 0, tl.where(upto, Aqb, 0.0), L, L, L)
    else:
        far = tl.exp(c[None, :] - G)
        k = tl.trans(rows(k_in, base, exists, H, 0, L, N, N) * far)
        b_ = tl.trans(rows(b_in, base, exists, H, 0, L, N, N) * far)
        read = rows(r_in, base, exists, H, 0, L, N, N) * tl.exp(G - c[None, :])
        put_tile(Aqk_out, square, 0, tl.where(upto, dot(read, k, OPERANDS), 0.0), L, L, L)
        put_tile(Aqb_out, square, 0, tl.where(upto, dot(read, b_, OPERANDS), 0.0), L, L, L)
        removed = rows(a_in, base, exists, H, 0, L, N, N) * tl.exp(X - c[None, :])
        Aak = dot(removed, k, OPERANDS)
        Aab = dot(removed, b_, OPERANDS)
    Aak = tl.where(before, Aak, 0.0)
    # An inverse in bfloat16 would lose digits at each of its steps.
    W = inverse(tl.where(before, Aab, 0.0), L, "tf32" if OPERANDS == "bf16" else OPERANDS)
    if Aak_out is not None:
        put_tile(Aak_out, square, 0, Aak, L, L, L)
        put_tile(W_out, square, 0, W, L, L, L)
    UV = dot(W, dot(Aak, rows(v_in, base, exists, H, 0, L, N, N), OPERANDS), OPERANDS)
    put_tile(UV_out, oblong, 0, UV, L, N, N)
    reach = tl.where((segment == 0)[:, None], rows(a_in, base, exists, H, 0, L, N, N) * tl.exp(X), 0.0)
    put_tile(UA_out, oblong, 0, dot(W, reach, OPERANDS), L, N, N)


@triton.jit
def end_of(w_in, base, exists, segment, H, L: tl.constexpr, N: tl.constexpr):
    """exp(G_L - G) [L, N], zero but for the last segment, and exp(G_L) [N], zero behind a reset."""
    g = tl.maximum(rows(w_in, base, exists, H, 0, L, N, N), FLOOR)
    last = tl.max(segment, 0)
    tail = tl.exp(tl.cumsum(g, 0, reverse=True) - g)
    whole = tl.exp(tl.sum(g, 0))
    return tl.where((segment == last)[:, None], tail, 0.0), tl.where(last == 0, whole, 0.0)


@triton.jit
def states(
    w_in, k_in, v_in, b_in, mask, reset, state, UA_in, UV_in,
    starts, U_out, final,
    T, H, NT,
    L: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """M rows of the state of one head, chunk after chunk: U, the state at every start, and the final one."""
    bh = tl.program_id(0)
    m = tl.program_id(1) * M
    b, h = bh // H, bh % H
    corner = bh.to(tl.int64) * (N * N)
    S = tl.zeros([M, N], tl.float32)
    if state is not None:
        S = tl.load(tile(state, corner, m * N, M, N, N)).to(tl.float32)
    for i in range(NT):
        chunk = (b * NT + i) * H + h
        _, _, start, base = place(chunk, T, H, NT, L, N)
        exists, segment = timeline(mask, reset, b, start, T, L)
        put_tile(starts, chunk.to(tl.int64) * (N * N), m * N, S, M, N, N)
        tail, whole = end_of(w_in, base, exists, segment, H, L, N)
        oblong = chunk.to(tl.int64) * (L * N)
        UA = tl.load(tile(UA_in, oblong, 0, L, N, N)).to(tl.float32)
        U = dot(UA, tl.trans(S), OPERANDS) + tl.load(tile(UV_in, oblong, m, L, M, N)).to(tl.float32)
        put_tile(U_out, oblong, m, U, L, M, N)
        v = rows(v_in, base, exists, H, m, L, N, M)
        S = S * whole[None, :]
        S += dot(tl.trans(v), rows(k_in, base, exists, H, 0, L, N, N) * tail, OPERANDS)
        S += dot(tl.trans(U), rows(b_in, base, exists, H, 0, L, N, N) * tail, OPERANDS)
    put_tile(final, corner, m * N, S, M, N, N)


@triton.jit
def outputs(
    r_in, w_in, v_in, mask, reset, Aqk_in, Aqb_in, U_in, starts, y,
    T, H, NT,
    L: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """M channels of y of one chunk."""
    chunk = tl.program_id(0)
    m = tl.program_id(1) * M
    b, _, start, base = place(chunk, T, H, NT, L, N)
    exists, segment = timeline(mask, reset, b, start, T, L)
    square, oblong = chunk.to(tl.int64) * (L * L), chunk.to(tl.int64) * (L * N)
    G = tl.cumsum(tl.maximum(rows(w_in, base, exists, H, 0, L, N, N), FLOOR), 0)
    read = tl.where((segment == 0)[:, None], rows(r_in, base, exists, H, 0, L, N, N) * tl.exp(G), 0.0)
    S = tl.load(tile(starts, chunk.to(tl.int64) * (N * N), m * N, M, N, N)).to(tl.float32)
    Y = dot(read, tl.trans(S), OPERANDS)
    Y += dot(tl.load(tile(Aqk_in, square, 0, L, L, L)), rows(v_in, base, exists, H, m, L, N, M), OPERANDS)
    Y += dot(tl.load(tile(Aqb_in, square, 0, L, L, L)), tl.load(tile(U_in, oblong, m, L, M, N)), OPERANDS)
    put_rows(y, base, Y, start + tl.arange(0, L) < T, H, m, L, N, M)


@triton.jit
def recurrent(
    r_in, w_in, k_in, v_in, a_in, b_in, mask, reset, state, y, final,
    T, H, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The equation, token by token, for M rows of the state of one head."""
    bh = tl.program_id(0)
    m = tl.program_id(1) * M
    b, h = (bh // H).to(tl.int64), bh % H
    corner = bh.to(tl.int64) * (N * N)
    S = tl.zeros([M, N], tl.float32)
    if state is not None:
        S = tl.load(tile(state, corner, m * N, M, N, N)).to(tl.float32)
    keys, values = tl.arange(0, N), m + tl.arange(0, M)
    for t in range(T):
        base = ((b * T + t) * H + h) * N
        exists = True
        if mask is not None:
            exists = tl.load(mask + b * T + t) != 0
        if reset is not None:
            S = tl.where(tl.load(reset + b * T + t) != 0, 0.0, S)
        decay = tl.exp(tl.load(w_in + base + keys, mask=exists, other=0.0).to(tl.float32))
        r = tl.load(r_in + base + keys, mask=exists, other=0.0).to(tl.float32)
        k = tl.load(k_in + base + keys, mask=exists, other=0.0).to(tl.float32)
        a = tl.load(a_in + base + keys, mask=exists, other=0.0).to(tl.float32)
        removal = tl.load(b_in + base + keys, mask=exists, other=0.0).to(tl.float32)
        v = tl.load(v_in + base + values, mask=exists, other=0.0).to(tl.float32)
        removed = tl.sum(S * a[None, :], 1)
        S = S * decay[None, :] + removed[:, None] * removal[None, :] + v[:, None] * k[None, :]
        tl.store(y + base + values, cast(tl.sum(S * r[None, :], 1), y.dtype.element_ty))
    put_tile(final, corner, m * N, S, M, N, N)
