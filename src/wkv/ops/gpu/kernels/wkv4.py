"""WKV-4 on the GPU, parallel over channels and chunks: the forward pass, and what both passes and Bi-WKV share.

Sums of terms x exp(key), with a decay of exp(gap) per token, are kept as x exp(m + count gap): count is a number of
tokens, so that no token rounds the exponent, and either the old sums or the new term get the weight 1. With sums
(num, den) before token t,

    z_t = den + exp(u + k_t)      y_t = (num + exp(u + k_t) v_t) / z_t

and behind it num, den and their derivatives by gap (num', den') are

    num <- exp(gap) num + exp(k_t) v_t      den <- exp(gap) den + exp(k_t)      num' <- exp(gap) (num' + num)

Backward, with p_t = dy_t / z_t, the gradients N and D of num and den behind token t are sums of the same form of the
terms (p, -p y) of later tokens, and

    dlog_w = sum_t p_t (num' - y_t den')                            du = sum_t exp(u + k_t) p_t (v_t - y_t)
    dk_t = exp(k_t) (N v_t + D) + exp(u + k_t) p_t (v_t - y_t)      dv_t = exp(k_t) N + exp(u + k_t) p_t

Each pass takes three kernels: every chunk's own sums; a chain over the chunks; the tokens of every chunk, from the sums
at its border. One thread has one channel and loads GROUP tokens at once, so that their reads overlap.

A token that does not exist has the key LOWEST and counts 0 tokens. A chunk with a reset counts fewer than 0 tokens.

Layout: tokens [B, T, C]; at borders [B, chunks, planes, C], the planes being m, num, den and what a kernel adds.
"""

# ruff: noqa: RUF005 - Triton knows no starred expressions in tuples
# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks

EMPTY = tl.constexpr(-1e30)  # the logarithm of nothing
LOWEST = tl.constexpr(-1e38)  # below every exponent of sums, even empty ones that have decayed
WIPED = tl.constexpr(-1e9)  # more tokens than any sequence has, subtracted from a count
# Gradients' exponents follow those of the sums, so that old and new are alike up to rounding: without slack the sums
# would be scaled, and rounded, at almost every token.
SLACK = tl.constexpr(2.0)


@triton.jit
def place(CHUNKS, C, ITEMS, BLOCK: tl.constexpr):
    """Batch row, chunk and channel of every thread, all [BLOCK], and whether there is one; neighbours share a chunk."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = item // C
    return (row // CHUNKS).to(tl.int64), row % CHUNKS, item % C, item < ITEMS


@triton.jit
def load_row(x, at, inside):
    """[BLOCK] in float32."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, at, row, inside):
    """[BLOCK], rounded to the type of x."""
    tl.store(x + at, blocks.cast(row, x.dtype.element_ty), mask=inside)


@triton.jit
def load_gap(log_w, c, inside):
    """Log-decay without infinities, which would meet a count of 0."""
    return tl.maximum(load_row(log_w, c, inside), EMPTY)


@triton.jit
def load_rows(x, at, left, C, inside, GROUP: tl.constexpr):
    """GROUP rows, of which `left` are there; the others are 0."""
    rows = ()
    for i in tl.static_range(GROUP):
        rows = rows + (tl.load(x + at + i * C, mask=inside & (i < left), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_exists(mask, at, left, GROUP: tl.constexpr):
    """Which of GROUP tokens exist."""
    flags = ()
    for i in tl.static_range(GROUP):
        flag = i < left
        if mask is not None:
            flag = flag & (tl.load(mask + at + i, mask=flag, other=0) != 0)
        flags = flags + (flag,)
    return flags


@triton.jit
def load_resets(reset, at, exists, GROUP: tl.constexpr):
    """Which of GROUP tokens empty the sums before them; nothing without `reset`."""
    flags = ()
    if reset is not None:
        for i in tl.static_range(GROUP):
            flags = flags + (exists[i] & (tl.load(reset + at + i, mask=exists[i], other=0) != 0),)
    return flags


@triton.jit
def load_tokens(k, v, mask, at, left, C, c, inside, GROUP: tl.constexpr):
    """Keys and values of GROUP tokens, and whether they exist; `at` is the number of the first one in [B, T]."""
    keys, values = load_rows(k, at * C + c, left, C, inside, GROUP), load_rows(v, at * C + c, left, C, inside, GROUP)
    exists = load_exists(mask, at, left, GROUP)
    real_keys, real_values = (), ()
    for i in tl.static_range(GROUP):
        real_keys = real_keys + (tl.where(exists[i], keys[i], LOWEST),)
        real_values = real_values + (tl.where(exists[i], values[i], 0.0),)
    return real_keys, real_values, exists


@triton.jit
def empty(BLOCK: tl.constexpr):
    """m, count, num, den of no tokens."""
    zero = tl.full([BLOCK], 0.0, tl.float32)
    return zero + EMPTY, zero, zero, zero


@triton.jit
def wipe(flag, m, count, num, den):
    """Empty sums where `flag`, whatever they held."""
    m, count = tl.where(flag, EMPTY, m), tl.where(flag, 0.0, count)
    return m, count, tl.where(flag, 0.0, num), tl.where(flag, 0.0, den)


@triton.jit
def add(m, count, num, den, gap, key, at, x, y, LEAST: tl.constexpr):
    """Sums (num, den) exp(m + count gap) and a term (x, y) exp(key + at gap), and the weights of both.

    The term's exponent becomes that of the sums where it is larger by more than LEAST.
    """
    above = (key - m) + (at - count) * gap
    higher = above > LEAST
    weight = tl.exp(tl.where(higher, -above, above))
    old, new = tl.where(higher, weight, 1.0), tl.where(higher, 1.0, weight)
    m, count = tl.where(higher, key, m), tl.where(higher, at, count)
    return m, count, old * num + new * x, old * den + new * y, old, new


@triton.jit
def read(m, count, num, den, gap, u, key, value, exists):
    """What a token reads: y, z exp(-q), the weights exp(m + count gap - q), exp(u + k - q), and whether q is u + k."""
    above = (key - m) + (u - count * gap)
    higher = above > 0
    weight = tl.exp(tl.where(higher, -above, above))
    old, own = tl.where(higher, weight, 1.0), tl.where(higher, 1.0, weight)
    z = tl.where(exists, old * den + own, 1.0)
    return (old * num + own * value) / z, z, old, own, higher


@triton.jit
def read_exponent(m, count, gap, u, key, higher):
    """q as `read` chose it, rounded, and what was rounded off."""
    q = tl.where(higher, key + u, m + count * gap)
    return q, tl.where(higher, (key - q) + u, (m - q) + count * gap)


@triton.jit
def settle(m, count, gap):
    """m + count gap, rounded, and the factor that this leaves to the sums."""
    whole = m + count * gap
    return whole, tl.where(count > 0, (m - whole) + count * gap, 0.0) + 1.0


@triton.jit
def store_sums(x, at, C, inside, m, count, num, den, gap):
    """Planes m, num, den; returns the factor of `settle`."""
    whole, factor = settle(m, count, gap)
    tl.store(x + at, whole, mask=inside)
    tl.store(x + at + C, num * factor, mask=inside)
    tl.store(x + at + 2 * C, den * factor, mask=inside)
    return factor


@triton.jit
def load_sums(x, at, C, inside):
    """m, num, den from their planes."""
    return load_row(x, at, inside), load_row(x, at + C, inside), load_row(x, at + 2 * C, inside)


@triton.jit
def load_start(num, den, top, at, inside, BLOCK: tl.constexpr):
    """m, count, num, den of the initial state."""
    if num is None:
        m, count, start_num, start_den = empty(BLOCK)
    else:
        m, count = load_row(top, at, inside), tl.full([BLOCK], 0.0, tl.float32)
        start_num, start_den = load_row(num, at, inside), load_row(den, at, inside)
    return m, count, start_num, start_den


@triton.jit
def chunk_sums(
    log_w, k, v, mask, reset, sums, T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over the tokens of every chunk but the last: planes m, num, den, count (PLANES 6: num', den')."""
    b, n, c, inside = place(CHUNKS, C, ITEMS, BLOCK)
    gap = load_gap(log_w, c, inside)
    m, count, num, den = empty(BLOCK)
    slope_num, slope_den = num, den
    tokens = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        resets = load_resets(reset, at, exists, GROUP)
        for i in tl.static_range(GROUP):
            one = exists[i].to(tl.float32)
            if reset is not None:
                m, count, num, den = wipe(resets[i], m, count, num, den)
                slope_num, slope_den = tl.where(resets[i], 0.0, slope_num), tl.where(resets[i], 0.0, slope_den)
                tokens += tl.where(resets[i], WIPED, 0.0)
            tokens += one
            slope_num, slope_den = slope_num + one * num, slope_den + one * den
            m, count, num, den, old, _ = add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
            slope_num, slope_den = old * slope_num, old * slope_den
    to = (b * CHUNKS + n) * PLANES * C + c
    factor = store_sums(sums, to, C, inside, m, count, num, den, gap)
    tl.store(sums + to + 3 * C, tokens, mask=inside)
    if PLANES == 6:
        tl.store(sums + to + 4 * C, slope_num * factor, mask=inside)
        tl.store(sums + to + 5 * C, slope_den * factor, mask=inside)


@triton.jit
def chain(
    log_w, sums, start_num, start_den, start_top, states, STEPS, C, ITEMS,
    GROUP: tl.constexpr, PLANES: tl.constexpr, LEAST: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The states before STEPS + 1 chunks, from the sums of the first STEPS: planes m, num, den (PLANES 6: num', den').

    REVERSE: those behind STEPS + 1 chunks, from the sums of the last STEPS.
    """
    b, _n, c, inside = place(1, C, ITEMS, BLOCK)
    gap = load_gap(log_w, c, inside)
    m, count, num, den = load_start(start_num, start_den, start_top, b * C + c, inside, BLOCK)
    slope_num, slope_den = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, STEPS + 1, GROUP):
        left = STEPS - first
        at, stride = b * STEPS + first, PLANES * C
        if REVERSE:
            at, stride = b * STEPS + left - 1, -PLANES * C
        planes = ()
        for plane in tl.static_range(PLANES):
            row = (at * PLANES + plane) * C + c
            planes = planes + (load_rows(sums, row, left, stride, inside, GROUP),)
        for i in tl.static_range(GROUP):
            to, here = b * (STEPS + 1) + first + i, inside & (i <= left)
            if REVERSE:
                to = b * (STEPS + 1) + left - i
            to = to * (PLANES - 1) * C + c
            factor = store_sums(states, to, C, here, m, count, num, den, gap)
            if PLANES == 6:
                tl.store(states + to + 3 * C, slope_num * factor, mask=here)
                tl.store(states + to + 4 * C, slope_den * factor, mask=here)
            wiped, tokens = planes[3][i] < 0, tl.maximum(planes[3][i], 0.0)
            m, count, num, den = wipe(wiped, m, count, num, den)
            slope_num, slope_den = tl.where(wiped, 0.0, slope_num), tl.where(wiped, 0.0, slope_den)
            slope_num, slope_den = slope_num + tokens * num, slope_den + tokens * den
            key = tl.where(i < left, planes[0][i], LOWEST)
            m, count, num, den, old, new = add(
                m, count + tokens, num, den, gap, key, 0.0, planes[1][i], planes[2][i], LEAST
            )
            if PLANES == 6:
                slope_num = old * slope_num + new * planes[4][i]
                slope_den = old * slope_den + new * planes[5][i]


@triton.jit
def outputs(
    log_w, u, k, v, mask, reset, start_num, start_den, start_top, states, y, end_num, end_den, end_top,
    T, C, CHUNKS, SPAN, ITEMS,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of every chunk's tokens and the final state, from `states` or, without it, the initial state."""
    b, n, c, inside = place(CHUNKS, C, ITEMS, BLOCK)
    gap, bonus = load_gap(log_w, c, inside), load_row(u, c, inside)
    if states is None:
        m, count, num, den = load_start(start_num, start_den, start_top, b * C + c, inside, BLOCK)
    else:
        m, num, den = load_sums(states, (b * CHUNKS + n) * PLANES * C + c, C, inside)
        count = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, SPAN, GROUP):
        at, left = b * T + n * CHUNK + first, T - n * CHUNK - first
        keys, values, exists = load_tokens(k, v, mask, at, left, C, c, inside, GROUP)
        resets = load_resets(reset, at, exists, GROUP)
        for i in tl.static_range(GROUP):
            if reset is not None:
                m, count, num, den = wipe(resets[i], m, count, num, den)
            out, _, _, _, _ = read(m, count, num, den, gap, bonus, keys[i], values[i], exists[i])
            store_row(y, (at + i) * C + c, tl.where(exists[i], out, 0.0), inside & (i < left))
            one = exists[i].to(tl.float32)
            m, count, num, den, _, _ = add(m, count + one, num, den, gap, keys[i], 0.0, values[i], one, 0.0)
    last, to = inside & (n == CHUNKS - 1), b * C + c
    whole, factor = settle(m, count, gap)
    tl.store(end_top + to, whole, mask=last)
    tl.store(end_num + to, num * factor, mask=last)
    tl.store(end_den + to, den * factor, mask=last)
