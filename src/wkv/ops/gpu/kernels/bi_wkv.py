"""Bi-WKV (form "paper") on the GPU, with the sums and the three kernels per pass of `kernels.wkv4`.

Token t reads the sums L over the tokens to its left and R over those to its right, both of terms exp(k_i) (v_i, 1) with
a decay of exp(gap) per token in between:

    z_t = den_L + den_R + exp(u + k_t)      y_t = (num_L + num_R + exp(u + k_t) v_t) / z_t

Backward, with p_t = dy_t / z_t, the gradients of L are the sums N of (p, -p y) over the tokens to the right, those of R
the sums M over the tokens to the left:

    dv_t = exp(k_t) (N_num + M_num) + exp(u + k_t) p_t              du = sum_t exp(u + k_t) p_t (v_t - y_t)
    dk_t = exp(k_t) (v_t (N_num + M_num) + N_den + M_den) + exp(u + k_t) p_t (v_t - y_t)
    dlog_w = sum_t exp(gap) (num_L N_num + den_L N_den + num_R M_num + den_R M_den)

A kernel that needs L and R at every token of a chunk first runs R from the chunk's end and leaves it at the end of
every group of GROUP tokens in `marks`; a group's tokens are then held in registers.

Layout as in `kernels.wkv4`; marks [B, chunks, groups, planes, C].
"""

# ruff: noqa: RUF005 - Triton knows no starred expressions in tuples
# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import wkv4
from wkv.ops.gpu.kernels.wkv4 import LOWEST, SLACK

MARKS = tl.constexpr(10)  # planes: m, num, den of R, of L and of the chunk's own part of M; tokens so far


@triton.jit
def chunk_sums(
    log_w, k, v, mask, left_sums, right_sums, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over the tokens of every chunk as L behind it (but for the last chunk) and R before it (but the first).

    Planes m, num, den, count.
    """
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap = wkv4.load_gap(log_w, c, inside)
    m, count, num, den = wkv4.empty(BLOCK)
    right_m, right_at, right_num, right_den = m, count, num, den
    tokens = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        for i in tl.static_range(GROUP):
            one = exists[i].to(tl.float32)
            right_m, right_at, right_num, right_den, _, _ = wkv4.add(
                right_m, right_at, right_num, right_den, gap, keys[i], tokens, values[i], one, 0.0
            )
            m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
            tokens += one
    to = (b * (CHUNKS - 1) + n) * 4 * C + c
    store_chunk(left_sums, to, C, inside & (n < CHUNKS - 1), m, count, num, den, gap, tokens)
    store_chunk(right_sums, to - 4 * C, C, inside & (n > 0), right_m, right_at, right_num, right_den, gap, tokens)


@triton.jit
def store_chunk(x, at, C, inside, m, count, num, den, gap, tokens):
    """Planes m, num, den, and the number of tokens."""
    wkv4.store_sums(x, at, C, inside, m, count, num, den, gap)
    tl.store(x + at + 3 * C, tokens, mask=inside)


@triton.jit
def read(left_m, left_count, left_num, left_den, right, gap, u, key, value, exists):
    """What a token reads: y, q, z exp(-q), and the weights of L, R and its own term, times exp(-q)."""
    right_m, right_count, right_num, right_den = right
    q = tl.maximum(tl.maximum(left_m + left_count * gap, right_m + right_count * gap), key + u)
    by_left, by_right = tl.exp((left_m - q) + left_count * gap), tl.exp((right_m - q) + right_count * gap)
    own = tl.exp((key - q) + u)
    z = tl.where(exists, by_left * left_den + by_right * right_den + own, 1.0)
    return (by_left * left_num + by_right * right_num + own * value) / z, q, z, by_left, by_right, own


@triton.jit
def mark_right(
    k, v, mask, rights, marks, T, C, SPAN, b, n, c, inside, gap, border, mark,
    PLANES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """R at the end of every group of chunk n into the first planes of `marks`, from R behind the chunk."""
    m, num, den = wkv4.load_sums(rights, border, C, inside)
    count = tl.full(m.shape, 0.0, tl.float32)
    groups = (SPAN + GROUP - 1) // GROUP
    for behind in range(0, groups):
        g = groups - 1 - behind
        wkv4.store_sums(marks, mark + g * PLANES * C, C, inside, m, count, num, den, gap)
        at, left = b * T + n * CHUNK + g * GROUP, T - n * CHUNK - g * GROUP
        # Nobody asks for R before the first group.
        left = tl.where(g > 0, left, 0)
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        for i in tl.static_range(GROUP - 1, -1, -1):
            one = exists[i].to(tl.float32)
            m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)


@triton.jit
def group_right(marks, to, keys, values, exists, gap, C, inside, GROUP: tl.constexpr):
    """R (m, count, num, den) behind every token of a group, the last one first."""
    m, num, den = wkv4.load_sums(marks, to, C, inside)
    count = tl.full(m.shape, 0.0, tl.float32)
    rights = ()
    for i in tl.static_range(GROUP - 1, -1, -1):
        rights = rights + ((m, count, num, den),)
        one = exists[i].to(tl.float32)
        m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
    return rights


@triton.jit
def outputs(
    log_w, u, k, v, mask, lefts, rights, marks, y, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of every chunk's tokens, from L before the chunk and R behind it. marks [B, chunks, groups, 3, C]."""
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = wkv4.load_gap(log_w, c, inside), wkv4.load_row(u, c, inside)
    border, mark = (b * CHUNKS + n) * 3 * C + c, (b * CHUNKS + n) * (CHUNK // GROUP) * 3 * C + c
    mark_right(k, v, mask, rights, marks, T, C, SPAN, b, n, c, inside, gap, border, mark, 3, CHUNK, GROUP)
    tl.debug_barrier()
    m, num, den = wkv4.load_sums(lefts, border, C, inside)
    count = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        behind = group_right(marks, mark + first // GROUP * 3 * C, keys, values, exists, gap, C, inside, GROUP)
        for i in tl.static_range(GROUP):
            out, _, _, _, _, _ = read(
                m, count, num, den, behind[GROUP - 1 - i], gap, bonus, keys[i], values[i], exists[i]
            )
            wkv4.store_row(y, (at + i) * C + c, tl.where(exists[i], out, 0.0), inside & (i < left))
            one = exists[i].to(tl.float32)
            m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)


@triton.jit
def backward_sums(
    log_w, u, k, v, mask, lefts, rights, dy, marks, by_left_sums, by_right_sums, partial, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per chunk: its part of du, its own sums as N before it and M behind it, and all marks.

    partial [B, chunks, 2, C]: du, dlog_w; the sums' planes are m, num, den, count.
    """
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = wkv4.load_gap(log_w, c, inside), wkv4.load_row(u, c, inside)
    border, marks_at = (b * CHUNKS + n) * 3 * C + c, (b * CHUNKS + n) * (CHUNK // GROUP) * MARKS * C + c
    mark_right(k, v, mask, rights, marks, T, C, SPAN, b, n, c, inside, gap, border, marks_at, MARKS, CHUNK, GROUP)
    tl.debug_barrier()
    m, num, den = wkv4.load_sums(lefts, border, C, inside)
    right_m, right_count, right_num, right_den = wkv4.empty(BLOCK)
    left_m, left_at, left_num, left_den = right_m, right_count, right_num, right_den
    count, du = left_at, left_at
    tokens = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        slopes = wkv4.load_rows(dy, at * C + c, left, C, inside, GROUP)
        mark = marks_at + first // GROUP * MARKS * C
        wkv4.store_sums(marks, mark + 3 * C, C, inside, m, count, num, den, gap)
        wkv4.store_sums(marks, mark + 6 * C, C, inside, right_m, right_count, right_num, right_den, gap)
        tl.store(marks + mark + 9 * C, tokens, mask=inside)
        behind = group_right(marks, mark, keys, values, exists, gap, C, inside, GROUP)
        for i in tl.static_range(GROUP):
            one = exists[i].to(tl.float32)
            y, q, z, _, _, own = read(
                m, count, num, den, behind[GROUP - 1 - i], gap, bonus, keys[i], values[i], exists[i]
            )
            p = slopes[i] / z
            du += tl.where(exists[i], p * own * (values[i] - y), 0.0)
            p, py, key = (
                tl.where(exists[i], p, 0.0),
                tl.where(exists[i], -p * y, 0.0),
                tl.where(exists[i], -q, LOWEST),
            )
            left_m, left_at, left_num, left_den, _, _ = wkv4.add(
                left_m, left_at, left_num, left_den, gap, key, tokens, p, py, SLACK
            )
            right_m, right_count, right_num, right_den, _, _ = wkv4.add(
                right_m, right_count + one, right_num, right_den, gap, key, 0.0, p, py, SLACK
            )
            m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
            tokens += one
    to = (b * (CHUNKS - 1) + n) * 4 * C + c
    store_chunk(
        by_right_sums, to, C, inside & (n < CHUNKS - 1), right_m, right_count, right_num, right_den, gap, tokens
    )
    store_chunk(by_left_sums, to - 4 * C, C, inside & (n > 0), left_m, left_at, left_num, left_den, gap, tokens)
    tl.store(partial + (b * CHUNKS + n) * 2 * C + c, du, mask=inside)


@triton.jit
def backward_tokens(
    log_w, u, k, v, mask, marks, dy, to_left, to_right, dk, dv, partial, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk, dv and the chunk's part of dlog_w, group by group from its end, from N behind the chunk and M before it."""
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = wkv4.load_gap(log_w, c, inside), wkv4.load_row(u, c, inside)
    border = (b * CHUNKS + n) * 3 * C + c
    back_m, back_num, back_den = wkv4.load_sums(to_left, border, C, inside)
    start_m, start_num, start_den = wkv4.load_sums(to_right, border, C, inside)
    back_count = tl.full([BLOCK], 0.0, tl.float32)
    d_log_w = back_count
    groups = (SPAN + GROUP - 1) // GROUP
    for done in range(0, groups):
        g = groups - 1 - done
        at, left = b * T + n * CHUNK + g * GROUP, T - n * CHUNK - g * GROUP
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        slopes = wkv4.load_rows(dy, at * C + c, left, C, inside, GROUP)
        mark = ((b * CHUNKS + n) * (CHUNK // GROUP) + g) * MARKS * C + c
        behind = group_right(marks, mark, keys, values, exists, gap, C, inside, GROUP)
        m, num, den = wkv4.load_sums(marks, mark + 3 * C, C, inside)
        count = tl.full([BLOCK], 0.0, tl.float32)
        own_m, own_num, own_den = wkv4.load_sums(marks, mark + 6 * C, C, inside)
        before = wkv4.load_row(marks, mark + 9 * C, inside)
        right_m, right_count, right_num, right_den, _, _ = wkv4.add(
            start_m, before, start_num, start_den, gap, own_m, 0.0, own_num, own_den, SLACK
        )
        kept = ()
        for i in tl.static_range(GROUP):
            one = exists[i].to(tl.float32)
            y, q, z, _, _, own = read(
                m, count, num, den, behind[GROUP - 1 - i], gap, bonus, keys[i], values[i], exists[i]
            )
            r_m, r_count, r_num, r_den = behind[GROUP - 1 - i]
            weight = tl.exp((r_m + right_m) + (r_count + right_count + 1.0) * gap)
            d_log_w += tl.where(exists[i], weight * (r_num * right_num + r_den * right_den), 0.0)
            p = slopes[i] / z
            direct, key = tl.where(exists[i], p * own, 0.0), tl.where(exists[i], -q, LOWEST)
            p, py = tl.where(exists[i], p, 0.0), tl.where(exists[i], -p * y, 0.0)
            weight = tl.exp((keys[i] + right_m) + right_count * gap)
            by_key = weight * (right_num * values[i] + right_den) + direct * (values[i] - y)
            kept = kept + ((key, p, py, by_key, weight * right_num + direct, m, count, num, den),)
            right_m, right_count, right_num, right_den, _, _ = wkv4.add(
                right_m, right_count + one, right_num, right_den, gap, key, 0.0, p, py, SLACK
            )
            m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
        for i in tl.static_range(GROUP - 1, -1, -1):
            key, p, py, by_key, by_value, m, count, num, den = kept[i]
            weight = tl.exp((m + back_m) + (count + back_count + 1.0) * gap)
            d_log_w += tl.where(exists[i], weight * (num * back_num + den * back_den), 0.0)
            weight = tl.exp((keys[i] + back_m) + back_count * gap)
            by_key, by_value = by_key + weight * (back_num * values[i] + back_den), by_value + weight * back_num
            back_m, back_count, back_num, back_den, _, _ = wkv4.add(
                back_m, back_count + exists[i].to(tl.float32), back_num, back_den, gap, key, 0.0, p, py, SLACK
            )
            here, to = inside & (i < left), (at + i) * C + c
            wkv4.store_row(dk, to, tl.where(exists[i], by_key, 0.0), here)
            wkv4.store_row(dv, to, tl.where(exists[i], by_value, 0.0), here)
    tl.store(partial + ((b * CHUNKS + n) * 2 + 1) * C + c, d_log_w, mask=inside)
