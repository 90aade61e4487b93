"""Kernels of Taylor attention that have no pairs of tokens in them: states, and single steps. Algebra: see `taylor`."""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks, taylor


@triton.jit
def segment_sums(
    x,
    values,
    unit,
    mask,
    parts,
    sums,
    scale,
    T,
    H,
    segments,
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
    END: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """sums [segments, B H, N + 1, EP]: over tokens that meet the start (END: the end) of their segment, the products of
    (values, unit) and phi(x).

    A program sums EB features and NB values of one segment and head.
    """
    pid = tl.program_id(0).to(tl.int64)
    n0, pid = (pid % (NP // NB)).to(tl.int32) * NB, pid // (NP // NB)
    tile, segment, cell = pid % (EP // EB), pid // (EP // EB) % segments, pid // (EP // EB) // segments
    row, head = cell // H, cell % H
    e = (tile * EB).to(tl.int32) + tl.arange(0, EB)
    n = n0 + tl.arange(0, NB)
    begin = (segment * SEG).to(tl.int32)
    total = tl.zeros((NB, EB), tl.float32)
    total_unit = tl.zeros((EB,), tl.float32)
    for t0 in range(begin, tl.minimum(begin + SEG, T), L):
        t = t0 + tl.arange(0, L)
        meets = taylor.meeting_border(taylor.existing(mask, row, t, T), parts, row, t, segment, T, SEG, END)
        start = row * T + t0
        a, b, weight, _, _ = taylor.factors(
            taylor.load_rows(x, start, meets, head, H, 0, F, P, L), e, scale, F, P, OPERANDS
        )
        phi = a * b * weight[None, :]
        given = taylor.load_rows(values, start, meets, head, H, n0, N, NB, L)
        total += blocks.dot(tl.trans(given), phi, OPERANDS)
        total_unit += tl.sum(phi * taylor.load_numbers(unit, start, meets, head, H, L)[:, None], 0)
    out = sums + ((segment * cells + cell) * (N + 1)) * EP + e
    tl.store(out[None, :] + n[:, None] * EP, total, mask=(n < N)[:, None])
    if n0 == 0:
        tl.store(out + N * EP, total_unit)


@triton.jit
def running(
    sums,
    kv,
    z,
    parts,
    states,
    units,
    out_kv,
    out_z,
    T,
    H,
    segments,
    cells,
    N: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SEG: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state before each segment, from (kv, z), None for zeros, to (out_kv, out_z), and what each segment adds.

    Written to states [segments, B H, N, EP] and units [segments, B H, EP], rows 0 to N - 1 and z. With BACK from the
    last segment to the first: gradients of the states behind them.
    """
    ROWS: tl.constexpr = N + 1
    PROGRAMS: tl.constexpr = (ROWS * EP + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    cell = pid // PROGRAMS
    row = cell // H
    index = (pid % PROGRAMS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    n, e = index // EP, index % EP
    is_kv, is_z = (n < N) & (e < E), (n == N) & (e < E)
    state = tl.zeros((BLOCK,), tl.float32)
    if kv is not None:
        state = tl.load(kv + cell * (N * E) + n * E + e, mask=is_kv, other=0.0).to(tl.float32)
    if z is not None:
        state += tl.load(z + cell * E + e, mask=is_z, other=0.0).to(tl.float32)
    for number in range(segments):
        segment = tl.cast(segments - 1 - number if BACK else number, tl.int64)
        place = segment * cells + cell
        own = tl.load(sums + place * (ROWS * EP) + index, mask=index < ROWS * EP, other=0.0)
        tl.store(states + place * (N * EP) + index, blocks.cast(state, states.dtype.element_ty), mask=n < N)
        tl.store(units + place * EP + e, state, mask=n == N)
        if parts is not None:
            cut = taylor.border(parts, row, segment, T, SEG, False) != taylor.border(parts, row, segment, T, SEG, True)
            state = tl.where(cut, 0.0, state)
        state += own
    tl.store(out_kv + cell * (N * E) + n * E + e, state, mask=is_kv)
    tl.store(out_z + cell * E + e, state, mask=is_z)


@triton.jit
def divide(
    dy,
    y,
    inverse,
    mask,
    d,
    unit,
    count,
    H,
    N: tl.constexpr,
    NP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d = inverse dy, and unit = -d . y [B, T, H], the gradient of the denominator; count is B T H."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, NP)
    exists = taylor.existing(mask, 0, i // H, count // H)
    there = exists[:, None] & (n < N)[None, :]
    place = i[:, None] * N + n[None, :]
    d_RN = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    d_RN *= tl.load(inverse + i, mask=exists, other=0.0)[:, None]
    y_RN = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
    tl.store(unit + i, -tl.sum(d_RN * y_RN, 1), mask=i < count)
    tl.store(d + place, blocks.cast(d_RN, d.dtype.element_ty), mask=(i < count)[:, None] & (n < N)[None, :])


@triton.jit
def steps(
    q,
    k,
    v,
    kv,
    z,
    mask,
    reset,
    y,
    out_kv,
    out_z,
    scale,
    eps,
    T,
    H,
    F: tl.constexpr,
    N: tl.constexpr,
    NB: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """The recurrence itself, for few tokens: a program keeps NB rows of one state, and z, in registers."""
    PROGRAMS: tl.constexpr = (N + NB - 1) // NB
    pid = tl.program_id(0).to(tl.int64)
    cell, n = pid // PROGRAMS, (pid % PROGRAMS).to(tl.int32) * NB + tl.arange(0, NB)
    row, head, e = cell // H, cell % H, tl.arange(0, EP)
    left, right, weight = taylor.feature(e, scale, F)
    own = (n < N)[:, None] & (e < E)[None, :]
    kv_place = cell * (N * E) + n[:, None] * E + e[None, :]
    S, s = tl.zeros((NB, EP), tl.float32), tl.zeros((EP,), tl.float32)
    if kv is not None:
        S = tl.load(kv + kv_place, mask=own, other=0.0).to(tl.float32)
        s = tl.load(z + cell * E + e, mask=e < E, other=0.0).to(tl.float32)
    is_left, is_right = (left >= 0) & (e < E), (right >= 0) & (e < E)
    for t in range(T):
        token = row * T + t
        exists = token >= 0
        if mask is not None:
            exists = tl.load(mask + token) != 0
        if reset is not None:
            empty = tl.load(reset + token) != 0
            S, s = tl.where(empty, 0.0, S), tl.where(empty, 0.0, s)
        at = (token * H + head) * F
        phi_k = tl.load(k + at + left, mask=is_left & exists, other=1.0).to(tl.float32)
        phi_k *= tl.load(k + at + right, mask=is_right & exists, other=1.0).to(tl.float32)
        phi_k = tl.where(exists, phi_k * weight, 0.0)
        phi_q = tl.load(q + at + left, mask=is_left & exists, other=1.0).to(tl.float32)
        phi_q *= tl.load(q + at + right, mask=is_right & exists, other=1.0).to(tl.float32)
        phi_q *= weight
        v_N = tl.load(v + (token * H + head) * N + n, mask=(n < N) & exists, other=0.0).to(tl.float32)
        S += v_N[:, None] * phi_k[None, :]
        s += phi_k
        denominator = tl.where(exists, tl.sum(s * phi_q, 0) + eps, 1.0)
        found = tl.where(exists, tl.sum(S * phi_q[None, :], 1) / denominator, 0.0)
        tl.store(y + (token * H + head) * N + n, blocks.cast(found, y.dtype.element_ty), mask=n < N)
    tl.store(out_kv + kv_place, S, mask=own)
    if pid % PROGRAMS == 0:
        tl.store(out_z + cell * E + e, s, mask=e < E)
