"""Kernels of Taylor attention: sums over segments, and the two directions in which tokens of a segment meet.

A sequence is cut into segments of SEG tokens, and these into blocks of L. With W_tj = 1 + s + s^2 / 2, s = c x_t . x_j:

    forward     Y_t = sum_{j <= t} W_tj (v_j, 1) + S phi(q_t)         y = Y[:N] / (Y[N] + eps), S the state at the start
    backward    dV_j = sum_{t >= j} W_tj d_t + dS phi(k_j)            d = dy / (Y[N] + eps), dS of the state at the end
                dq_t = c sum_{j <= t} G_tj (1 + s_tj) k_j + phi'(q_t)^T S^T (d_t, e_t)     e = -d . y
                dk_j = c sum_{t >= j} G_tj (1 + s_tj) q_t + phi'(k_j)^T dS^T (v_j, 1)      G_tj = (d_t, e_t) . (v_j, 1)

where sums stay inside the segment. So `mix` makes Y and dV, `gradients` makes dq and dk: they differ in direction and
in what stands for the values. States come from `segment_sums`, of (v, 1) phi(k)^T for S and of (d, e) phi(q)^T for dS,
and `running` adds these up over the segments, from the first to the last or back. Every program owns what it writes.

A state is [N + 1, EP]: a row for each value, then z; EP is the number of features E in whole tiles of EB. Feature e is
the product of two entries of x, or of one and 1, times a weight. Entries are picked by a product with a matrix of one 1
per column, exact in any operand type that holds x: what a GPU does much faster than gathering. z and denominators are
sums in float32 throughout.

With resets `parts` [B, T] counts those up to each token: two tokens meet if their counts are equal, a token meets the
state at a border of its segment if its count is that of the border.

Shape letters: B batch, T time, H heads, F size of a query or key (P padded), E features, N values (NP padded).
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks


@triton.jit
def feature(e, scale, F: tl.constexpr):
    """Of the features e: which two entries of x they multiply (-1 for the number 1), and their weights."""
    E: tl.constexpr = 1 + F + F * (F + 1) // 2
    p = e - (1 + F)
    # The row of an upper triangle in which its p-th entry stands; row i starts at i F - i (i - 1) / 2. The root may be
    # rounded across a border.
    room = tl.maximum((2 * F + 1) * (2 * F + 1) - 8 * p, 0).to(tl.float32)
    i = ((2 * F + 1 - tl.sqrt(room)) * 0.5).to(tl.int32)
    i += tl.where((i + 1) * F - (i + 1) * i // 2 <= p, 1, 0)
    i -= tl.where(i * F - i * (i - 1) // 2 > p, 1, 0)
    square = (e > F) & (e < E)
    left = tl.where(square, i, e - 1)
    right = tl.where(square, p - (i * F - i * (i - 1) // 2) + i, -1)
    weight = tl.where(left == right, scale * 0.7071067811865476, scale)
    weight = tl.where(e <= F, tl.sqrt(scale), weight)
    return left, right, tl.where(e == 0, 1.0, tl.where(e < E, weight, 0.0))


@triton.jit
def factors(x, e, scale, F: tl.constexpr, P: tl.constexpr, OPERANDS: tl.constexpr):
    """phi(x) of x [L, P] as two factors [L, EB] and weights [EB], and what has picked the factors, [P, EB] each."""
    left, right, weight = feature(e, scale, F)
    rows = tl.arange(0, P)[:, None]
    pick_left = tl.where(rows == left[None, :], 1.0, 0.0)
    pick_right = tl.where(rows == right[None, :], 1.0, 0.0)
    a = blocks.dot(x, pick_left, OPERANDS) + tl.where(left < 0, 1.0, 0.0)[None, :]
    b = blocks.dot(x, pick_right, OPERANDS) + tl.where(right < 0, 1.0, 0.0)[None, :]
    return a, b, weight, pick_left, pick_right


@triton.jit
def load_rows(tensor, start, exists, head, H, first, WIDTH: tl.constexpr, PAD: tl.constexpr, L: tl.constexpr):
    """tensor [B T, H, WIDTH] from token `start` and column `first` on, [L, PAD] float32; zeros where nothing exists."""
    column = first + tl.arange(0, PAD)
    offsets = tl.arange(0, L)[:, None] * (H * WIDTH) + column[None, :]
    there = exists[:, None] & (column < WIDTH)[None, :]
    return tl.load(tensor + (start * H + head) * WIDTH + offsets, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_numbers(tensor, start, exists, head, H, L: tl.constexpr):
    """Numbers of tensor [B T, H] (None: ones) from token `start` on, [L]; zeros where nothing exists."""
    if tensor is None:
        found = tl.where(exists, 1.0, 0.0)
    else:
        found = tl.load(tensor + start * H + head + tl.arange(0, L) * H, mask=exists, other=0.0)
    return found


@triton.jit
def existing(mask, row, t, T):
    """Whether the tokens t of row `row` exist."""
    exists = t < T
    if mask is not None:
        exists = tl.load(mask + row * T + t, mask=exists, other=0) != 0
    return exists


@triton.jit
def border(parts, row, segment, T, SEG: tl.constexpr, END: tl.constexpr):
    """How many resets there are up to the start or the end of a segment."""
    if END:
        found = tl.load(parts + row * T + tl.minimum((segment + 1) * SEG, T) - 1)
    else:
        t = segment * SEG - 1
        found = tl.load(parts + row * T + tl.maximum(t, 0), mask=t >= 0, other=0)
    return found


@triton.jit
def meeting_border(exists, parts, row, t, segment, T, SEG: tl.constexpr, END: tl.constexpr):
    """Which of the existing tokens t no reset parts from the border of their segment."""
    if parts is not None:
        own = tl.load(parts + row * T + t, mask=t < T, other=-1)
        exists = exists & (own == border(parts, row, segment, T, SEG, END))
    return exists


@triton.jit
def meeting_pairs(exists, parts, row, t, j, T, LATER: tl.constexpr):
    """[L, L]: whether token t meets token j, of which `exists` tells: one not behind it, or with LATER not before."""
    meets = (j[None, :] >= t[:, None]) if LATER else (j[None, :] <= t[:, None])
    meets = meets & exists[None, :]
    if parts is not None:
        own = tl.load(parts + row * T + t, mask=t < T, other=-1)
        other = tl.load(parts + row * T + j, mask=j < T, other=-1)
        meets = meets & (own[:, None] == other[None, :])
    return meets


@triton.jit
def mix(
    x,
    others,
    values,
    mask,
    parts,
    states,
    units,
    out,
    inverse,
    scale,
    eps,
    T,
    H,
    cells,
    F: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NB: tl.constexpr,
    EP: tl.constexpr,
    EB: tl.constexpr,
    L: tl.constexpr,
    SEG: tl.constexpr,
    LATER: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """out_t = sum_j W_tj values_j + S phi(x_t), over j <= t (LATER: j >= t) of the segment.

    Where `inverse` [B, T, H] is given this is divided by the same sum for the number 1, and eps, whose inverse is
    written there (0 for a token that does not exist). A program makes L tokens and NB values of one head.
    """
    pid = tl.program_id(0).to(tl.int64)
    n0, pid, count = (pid % (NP // NB)).to(tl.int32) * NB, pid // (NP // NB), tl.cdiv(T, L)
    cell, t0 = pid // count, (pid % count).to(tl.int32) * L
    row, head, segment = cell // H, cell % H, t0 // SEG
    t, n = t0 + tl.arange(0, L), n0 + tl.arange(0, NB)
    exists = existing(mask, row, t, T)
    x_LP = load_rows(x, row * T + t0, exists, head, H, 0, F, P, L)
    meets = meeting_border(exists, parts, row, t, segment, T, SEG, LATER)

    sums = tl.zeros((L, NB), tl.float32)
    weights = tl.zeros((L,), tl.float32)
    state = segment.to(tl.int64) * cells + cell
    for e0 in range(0, EP, EB):
        e = e0 + tl.arange(0, EB)
        a, b, weight, _, _ = factors(x_LP, e, scale, F, P, OPERANDS)
        phi = a * b * weight[None, :]
        S_EN = tl.load(states + state * (N * EP) + e[:, None] + n[None, :] * EP, mask=(n < N)[None, :], other=0.0)
        sums += blocks.dot(phi, S_EN, OPERANDS)
        if inverse is not None:
            weights += tl.sum(phi * tl.load(units + state * EP + e)[None, :], 1)
    sums, weights = tl.where(meets[:, None], sums, 0.0), tl.where(meets, weights, 0.0)

    begin, end = t0, tl.minimum((segment + 1) * SEG, T)
    if not LATER:
        begin, end = segment * SEG, t0 + 1
    for j0 in range(begin, end, L):
        j = j0 + tl.arange(0, L)
        others_exist = existing(mask, row, j, T)
        x_j = load_rows(others, row * T + j0, others_exist, head, H, 0, F, P, L)
        s = scale * blocks.dot(x_LP, tl.trans(x_j), OPERANDS)
        W = tl.where(meeting_pairs(others_exist, parts, row, t, j, T, LATER), 1.0 + s + 0.5 * s * s, 0.0)
        sums += blocks.dot(W, load_rows(values, row * T + j0, others_exist, head, H, n0, N, NB, L), OPERANDS)
        weights += tl.sum(W, 1)

    if inverse is not None:
        weights = tl.where(exists, weights + eps, 1.0)
        sums /= weights[:, None]
        weights = tl.where(exists, 1.0 / weights, 0.0)
        tl.store(inverse + (row * T + t) * H + head, weights, mask=(t < T) & (n0 == 0))
    sums = tl.where(exists[:, None], sums, 0.0)
    place = out + ((row * T + t0) * H + head) * N + tl.arange(0, L)[:, None] * (H * N) + n[None, :]
    tl.store(place, blocks.cast(sums, out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def gradients(
    x,
    others,
    values,
    unit,
    other_values,
    other_unit,
    mask,
    parts,
    states,
    units,
    out,
    scale,
    T,
    H,
    cells,
    F: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    NB: tl.constexpr,
    EP: tl.constexpr,
    EB: tl.constexpr,
    L: tl.constexpr,
    SEG: tl.constexpr,
    LATER: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """The gradient of x_t: from the pairs with tokens j <= t (LATER: j >= t) of the segment, and from its state.

    `values` and `unit` belong to t, the `other` two to j. A program makes L tokens of one head, NB values
    at a time.
    """
    pid = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(T, L)
    cell, t0 = pid // count, (pid % count).to(tl.int32) * L
    row, head, segment = cell // H, cell % H, t0 // SEG
    t = t0 + tl.arange(0, L)
    exists = existing(mask, row, t, T)
    x_LP = load_rows(x, row * T + t0, exists, head, H, 0, F, P, L)
    own_unit = load_numbers(unit, row * T + t0, exists, head, H, L)
    meets = meeting_border(exists, parts, row, t, segment, T, SEG, LATER)

    by_state = tl.zeros((L, P), tl.float32)
    state = segment.to(tl.int64) * cells + cell
    for e0 in range(0, EP, EB):
        e = e0 + tl.arange(0, EB)
        a, b, weight, pick_a, pick_b = factors(x_LP, e, scale, F, P, OPERANDS)
        d_phi = own_unit[:, None] * tl.load(units + state * EP + e)[None, :]
        for n0 in range(0, NP, NB):
            n = n0 + tl.arange(0, NB)
            S_NE = tl.load(states + state * (N * EP) + n[:, None] * EP + e[None, :], mask=(n < N)[:, None], other=0.0)
            own = load_rows(values, row * T + t0, exists, head, H, n0, N, NB, L)
            d_phi += blocks.dot(own, S_NE, OPERANDS)
        d_phi *= weight[None, :]
        by_state += blocks.dot(d_phi * b, tl.trans(pick_a), OPERANDS) + blocks.dot(
            d_phi * a, tl.trans(pick_b), OPERANDS
        )

    by_pairs = tl.zeros((L, P), tl.float32)
    begin, end = t0, tl.minimum((segment + 1) * SEG, T)
    if not LATER:
        begin, end = segment * SEG, t0 + 1
    for j0 in range(begin, end, L):
        j = j0 + tl.arange(0, L)
        others_exist = existing(mask, row, j, T)
        start = row * T + j0
        x_j = load_rows(others, start, others_exist, head, H, 0, F, P, L)
        G = own_unit[:, None] * load_numbers(other_unit, start, others_exist, head, H, L)[None, :]
        for n0 in range(0, NP, NB):
            own = load_rows(values, row * T + t0, exists, head, H, n0, N, NB, L)
            given = load_rows(other_values, start, others_exist, head, H, n0, N, NB, L)
            G += blocks.dot(own, tl.trans(given), OPERANDS)
        slope = 1.0 + scale * blocks.dot(x_LP, tl.trans(x_j), OPERANDS)
        ds = tl.where(meeting_pairs(others_exist, parts, row, t, j, T, LATER), G * slope, 0.0)
        by_pairs += blocks.dot(ds, x_j, OPERANDS)

    dx = tl.where(exists[:, None], scale * by_pairs, 0.0) + tl.where(meets[:, None], by_state, 0.0)
    f = tl.arange(0, P)
    place = out + ((row * T + t0) * H + head) * F + tl.arange(0, L)[:, None] * (H * F) + f[None, :]
    tl.store(place, blocks.cast(dx, out.dtype.element_ty), mask=(t < T)[:, None] & (f < F)[None, :])
