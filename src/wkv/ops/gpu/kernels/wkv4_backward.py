"""The backward pass of WKV-4 on the GPU; the algebra and the layout are in `kernels.wkv4`."""

# ruff: noqa: RUF005 - Triton knows no starred expressions in tuples
# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import wkv4
from wkv.ops.gpu.kernels.wkv4 import EMPTY, LOWEST, SLACK, WIPED


@triton.jit
def backward_sums(
    log_w, u, k, v, mask, reset, states, dy, d_num, d_den, marks, back, partial, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per chunk: its part of dlog_w and du, the sums of N and D over its tokens, and the state before every group.

    partial [B, chunks, 2, C]; back: planes m, N, D at the chunk's left border, count; marks [B, groups, 3, C].
    """
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = wkv4.load_gap(log_w, c, inside), wkv4.load_row(u, c, inside)
    start = (b * CHUNKS + n) * 5 * C + c
    m, num, den = wkv4.load_sums(states, start, C, inside)
    slope_num, slope_den = wkv4.load_row(states, start + 3 * C, inside), wkv4.load_row(states, start + 4 * C, inside)
    back_m, back_at, back_num, back_den = wkv4.empty(BLOCK)
    count = back_at
    d_log_w, du = back_at, back_at
    tokens = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        resets = wkv4.load_resets(reset, at, exists, GROUP)
        if dy is not None:
            slopes = wkv4.load_rows(dy, at * C + c, left, C, inside, GROUP)
        mark = ((b * CHUNKS + n) * (CHUNK // GROUP) + first // GROUP) * 3 * C + c
        wkv4.store_sums(marks, mark, C, inside, m, count, num, den, gap)
        for i in tl.static_range(GROUP):
            one = exists[i].to(tl.float32)
            if reset is not None:
                m, count, num, den = wkv4.wipe(resets[i], m, count, num, den)
                slope_num, slope_den = tl.where(resets[i], 0.0, slope_num), tl.where(resets[i], 0.0, slope_den)
                tokens += tl.where(resets[i], WIPED, 0.0)
            if dy is not None:
                y, z, old, own, higher = wkv4.read(m, count, num, den, gap, bonus, keys[i], values[i], exists[i])
                q, rest = wkv4.read_exponent(m, count, gap, bonus, keys[i], higher)
                p = slopes[i] / z
                d_log_w += tl.where(exists[i], p * old * (slope_num - y * slope_den), 0.0)
                du += tl.where(exists[i], p * own * (values[i] - y), 0.0)
                reached = exists[i] & (tokens >= 0)
                p = tl.where(reached, p - p * rest, 0.0)
                key, py = tl.where(reached, -q, LOWEST), tl.where(reached, p * y, 0.0)
                back_m, back_at, back_num, back_den, _, _ = wkv4.add(
                    back_m, back_at, back_num, back_den, gap, key, tl.maximum(tokens, 0.0), p, -py, SLACK
                )
            tokens += one
            slope_num, slope_den = slope_num + one * num, slope_den + one * den
            m, count, num, den, old, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
            slope_num, slope_den = old * slope_num, old * slope_den
    _, factor = wkv4.settle(m, count, gap)
    last = inside & (n == CHUNKS - 1)
    if d_num is not None:
        d_log_w += tl.where(last, wkv4.load_row(d_num, b * C + c, last) * slope_num * factor, 0.0)
    if d_den is not None:
        d_log_w += tl.where(last, wkv4.load_row(d_den, b * C + c, last) * slope_den * factor, 0.0)
    to = (b * CHUNKS + n) * 4 * C + c
    wkv4.store_sums(back, to, C, inside, back_m, back_at, back_num, back_den, gap)
    tl.store(back + to + 3 * C, tokens, mask=inside)
    to = (b * CHUNKS + n) * 2 * C + c
    tl.store(partial + to, d_log_w, mask=inside)
    tl.store(partial + to + C, du, mask=inside)


@triton.jit
def backward_chain(
    log_w, start_num, start_den, start_top, end_top, d_num, d_den, back, d_start, STEPS, C, ITEMS,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the sums in `back` into N and D behind every chunk; d_start [B, 3, C] if there is an initial state."""
    b, _n, c, inside = wkv4.place(1, C, ITEMS, BLOCK)
    gap = wkv4.load_gap(log_w, c, inside)
    m, count, num, den = wkv4.empty(BLOCK)
    if d_num is not None or d_den is not None:
        m = -wkv4.load_row(end_top, b * C + c, inside)
    if d_num is not None:
        num = wkv4.load_row(d_num, b * C + c, inside)
    if d_den is not None:
        den = wkv4.load_row(d_den, b * C + c, inside)
    for first in range(0, STEPS + 1, GROUP):
        left = STEPS + 1 - first
        at = (b * (STEPS + 1) + left - 1) * 4 * C + c
        planes = ()
        for plane in tl.static_range(4):
            planes = planes + (wkv4.load_rows(back, at + plane * C, left, -4 * C, inside, GROUP),)
        for i in tl.static_range(GROUP):
            here = inside & (i < left)
            wkv4.store_sums(back, at - i * 4 * C, C, here, m, count, num, den, gap)
            m, count, num, den = wkv4.wipe(planes[3][i] < 0, m, count, num, den)
            tokens = tl.maximum(planes[3][i], 0.0)
            key = tl.where(i < left, planes[0][i], LOWEST)
            m, count, num, den, _, _ = wkv4.add(
                m, count + tokens, num, den, gap, key, 0.0, planes[1][i], planes[2][i], SLACK
            )
    if start_num is not None:
        top = wkv4.load_row(start_top, b * C + c, inside)
        # Where nothing reads the initial state it may hold anything.
        unread = m + count * gap < 0.9 * EMPTY
        scale = tl.exp((m + top) + count * gap)
        num, den = tl.where(unread, 0.0, num * scale), tl.where(unread, 0.0, den * scale)
        d_top = num * wkv4.load_row(start_num, b * C + c, inside) + den * wkv4.load_row(start_den, b * C + c, inside)
        to = b * 3 * C + c
        tl.store(d_start + to, num, mask=inside)
        tl.store(d_start + to + C, den, mask=inside)
        tl.store(d_start + to + 2 * C, tl.where(unread, 0.0, d_top), mask=inside)


@triton.jit
def backward_tokens(
    log_w, u, k, v, mask, reset, marks, dy, back, dk, dv, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of every chunk's tokens, group by group from its end."""
    b, n, c, inside = wkv4.place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = wkv4.load_gap(log_w, c, inside), wkv4.load_row(u, c, inside)
    back_m, back_num, back_den = wkv4.load_sums(back, (b * CHUNKS + n) * 4 * C + c, C, inside)
    back_count = tl.full([BLOCK], 0.0, tl.float32)
    groups = (SPAN + GROUP - 1) // GROUP
    for behind in range(0, groups):
        g = groups - 1 - behind
        at, left = b * T + n * CHUNK + g * GROUP, T - n * CHUNK - g * GROUP
        keys, values, exists = wkv4.load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        resets = wkv4.load_resets(reset, at, exists, GROUP)
        kept = ()
        if dy is not None:
            slopes = wkv4.load_rows(dy, at * C + c, left, C, inside, GROUP)
            mark = ((b * CHUNKS + n) * (CHUNK // GROUP) + g) * 3 * C + c
            m, num, den = wkv4.load_sums(marks, mark, C, inside)
            count = tl.full([BLOCK], 0.0, tl.float32)
            for i in tl.static_range(GROUP):
                if reset is not None:
                    m, count, num, den = wkv4.wipe(resets[i], m, count, num, den)
                y, z, _, own, higher = wkv4.read(m, count, num, den, gap, bonus, keys[i], values[i], exists[i])
                q, rest = wkv4.read_exponent(m, count, gap, bonus, keys[i], higher)
                p = slopes[i] / z
                key, direct = tl.where(exists[i], -q, LOWEST), tl.where(exists[i], p * own, 0.0)
                p, y = tl.where(exists[i], p - p * rest, 0.0), tl.where(exists[i], y, 0.0)
                kept = kept + ((key, p, y, direct),)
                one = exists[i].to(tl.float32)
                m, count, num, den, _, _ = wkv4.add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
        for i in tl.static_range(GROUP - 1, -1, -1):
            weight = tl.exp((keys[i] + back_m) + back_count * gap)
            by_key, by_value = weight * (back_num * values[i] + back_den), weight * back_num
            one = exists[i].to(tl.float32)
            if dy is not None:
                key, p, y, direct = kept[i]
                by_key, by_value = by_key + direct * (values[i] - y), by_value + direct
                back_m, back_count, back_num, back_den, _, _ = wkv4.add(
                    back_m, back_count + one, back_num, back_den, gap, key, 0.0, p, -p * y, SLACK
                )
            else:
                back_count += one
            here, to = inside & (i < left), (at + i) * C + c
            wkv4.store_row(dk, to, tl.where(exists[i], by_key, 0.0), here)
            wkv4.store_row(dv, to, tl.where(exists[i], by_value, 0.0), here)
            if reset is not None:
                back_m, back_count, back_num, back_den = wkv4.wipe(resets[i], back_m, back_count, back_num, back_den)
