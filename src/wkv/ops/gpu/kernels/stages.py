"""The elementwise stages around WKV-7 on the GPU: every one reads its inputs once and writes its results once.

Mixing, for each of six coefficient vectors x, with d = shifted - z and the gradients g of the results:

    out = z + d x          dz = sum g (1 - x)          dshifted = sum g x          dx = sum over tokens of g d

Keys, per token and head, with u = k k_k, n = max(|u|, EPS), m = (1 - k_a) + iclr k_a:

    kk = u / n             a = -kk             b = kk iclr             k' = k m

    g = dkk - da + db iclr                 du = g / n - kk (kk . g) / n, without the second term where |u| < EPS
    dk = du k_k + dk' m                    diclr = db kk + dk' k k_a
    dk_k = sum du k                        dk_a = sum dk' k (iclr - 1)

Reading, per token and head, with h = (y - mean) / sigma, sigma^2 = var + eps and the bonus s = sum over channels of
r k r_k:

    out = o gate           o = h weight + bias + s v

    p = dout gate          q = p weight        dy = (q - mean(q) - h mean(q h)) / sigma
    ds = p . v             dr = ds k r_k       dk = ds r r_k            dv = p s            dgate = dout o
    dweight = sum p h      dbias = sum p       dr_k = sum ds r k

A program has ROWS tokens and BLOCK channels, or ROWS tokens of one head. Sums over tokens are written per program,
[programs, vectors, channels], and added up in torch.

Layout: tokens [TOKENS, C], TOKENS = B T; vectors [C]; a head has N channels next to each other, C = H N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wkv.ops.gpu.kernels import blocks

EPS = tl.constexpr(1e-12)  # as F.normalize has it


@triton.jit
def read(x, at, inside):
    """In float32; 0 outside."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def read_gradient(x, at, inside):
    """The same; zeros for a result that nothing depends on."""
    value = tl.full(at.shape, 0.0, tl.float32)
    if x is not None:
        value = read(x, at, inside)
    return value


@triton.jit
def write(x, at, value, inside):
    """Rounded to the type of x."""
    tl.store(x + at, blocks.cast(value, x.dtype.element_ty), mask=inside)


@triton.jit
def channel_tile(TOKENS, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of tokens [ROWS, BLOCK] and which are there; channels [BLOCK] and which are there."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return t[:, None] * C + c[None, :], (t < TOKENS)[:, None] & (c < C)[None, :], c, c < C


@triton.jit
def mix_one(z, d, x, out, at, inside, c, known):
    """out = z + d x"""
    write(out, at, z + d * read(x, c, known)[None, :], inside)


@triton.jit
def mix(
    z, shifted, x0, x1, x2, x3, x4, x5, out0, out1, out2, out3, out4, out5, TOKENS, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside, c, known = channel_tile(TOKENS, C, ROWS, BLOCK)
    z = read(z, at, inside)
    d = read(shifted, at, inside) - z
    mix_one(z, d, x0, out0, at, inside, c, known)
    mix_one(z, d, x1, out1, at, inside, c, known)
    mix_one(z, d, x2, out2, at, inside, c, known)
    mix_one(z, d, x3, out3, at, inside, c, known)
    mix_one(z, d, x4, out4, at, inside, c, known)
    mix_one(z, d, x5, out5, at, inside, c, known)


@triton.jit
def unmix_one(d, x, gradient, dz, d_shifted, sums, at, inside, c, known):
    """dz and dshifted with one more gradient; the sum over tokens is written to `sums`."""
    total = tl.full(c.shape, 0.0, tl.float32)
    if gradient is not None:
        g = read(gradient, at, inside)
        moved = g * read(x, c, known)[None, :]
        dz, d_shifted = dz + (g - moved), d_shifted + moved
        total = tl.sum(g * d, 0)
    tl.store(sums + c, total, mask=known)
    return dz, d_shifted


@triton.jit
def mix_backward(
    z, shifted, x0, x1, x2, x3, x4, x5, g0, g1, g2, g3, g4, g5, dz_out, d_shifted_out, sums, TOKENS, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside, c, known = channel_tile(TOKENS, C, ROWS, BLOCK)
    d = read(shifted, at, inside) - read(z, at, inside)
    dz = tl.full(at.shape, 0.0, tl.float32)
    sums += tl.program_id(0).to(tl.int64) * 6 * C
    dz, d_shifted = unmix_one(d, x0, g0, dz, dz, sums, at, inside, c, known)
    dz, d_shifted = unmix_one(d, x1, g1, dz, d_shifted, sums + C, at, inside, c, known)
    dz, d_shifted = unmix_one(d, x2, g2, dz, d_shifted, sums + 2 * C, at, inside, c, known)
    dz, d_shifted = unmix_one(d, x3, g3, dz, d_shifted, sums + 3 * C, at, inside, c, known)
    dz, d_shifted = unmix_one(d, x4, g4, dz, d_shifted, sums + 4 * C, at, inside, c, known)
    dz, d_shifted = unmix_one(d, x5, g5, dz, d_shifted, sums + 5 * C, at, inside, c, known)
    write(dz_out, at, dz, inside)
    write(d_shifted_out, at, d_shifted, inside)


@triton.jit
def head_tile(TOKENS, H, ROWS: tl.constexpr, N: tl.constexpr):
    """Offsets of tokens [ROWS, N], which are there [ROWS, 1], channels [N], and the number of the block of tokens.

    Heads of the same tokens are neighbours, so that what they read lies together.
    """
    block, head = tl.program_id(0) // H, tl.program_id(0) % H
    t = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = head * N + tl.arange(0, N)
    return t[:, None] * (H * N) + c[None, :], (t < TOKENS)[:, None], c, block.to(tl.int64)


@triton.jit
def unit(u):
    """u / n [ROWS, N], 1 / n and whether EPS is n [ROWS, 1]."""
    norm = tl.sqrt(tl.sum(u * u, 1))[:, None]
    inverse = 1.0 / tl.maximum(norm, EPS)
    return u * inverse, inverse, norm < EPS


@triton.jit
def keys(k, iclr, k_k, k_a, kk_out, a_out, b_out, k_out, TOKENS, H, ROWS: tl.constexpr, N: tl.constexpr):
    at, inside, c, _ = head_tile(TOKENS, H, ROWS, N)
    k, iclr = read(k, at, inside), read(iclr, at, inside)
    k_k, k_a = tl.load(k_k + c).to(tl.float32)[None, :], tl.load(k_a + c).to(tl.float32)[None, :]
    kk, _, _ = unit(k * k_k)
    write(kk_out, at, kk, inside)
    write(a_out, at, -kk, inside)
    write(b_out, at, kk * iclr, inside)
    write(k_out, at, k * ((1 - k_a) + iclr * k_a), inside)


@triton.jit
def keys_backward(
    k, iclr, k_k, k_a, d_kk, da, db, d_mixed, dk_out, d_iclr_out, sums, TOKENS, H,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    at, inside, c, block = head_tile(TOKENS, H, ROWS, N)
    k, iclr = read(k, at, inside), read(iclr, at, inside)
    k_k, k_a = tl.load(k_k + c).to(tl.float32)[None, :], tl.load(k_a + c).to(tl.float32)[None, :]
    db, d_mixed = read_gradient(db, at, inside), read_gradient(d_mixed, at, inside)
    kk, inverse, small = unit(k * k_k)
    g = read_gradient(d_kk, at, inside) - read_gradient(da, at, inside) + db * iclr
    along = tl.where(small, 0.0, tl.sum(kk * g, 1)[:, None])
    du = (g - kk * along) * inverse
    write(dk_out, at, du * k_k + d_mixed * ((1 - k_a) + iclr * k_a), inside)
    write(d_iclr_out, at, db * kk + d_mixed * k * k_a, inside)
    sums += block * 2 * H * N
    tl.store(sums + c, tl.sum(du * k, 0))
    tl.store(sums + H * N + c, tl.sum(d_mixed * k * (iclr - 1), 0))


@triton.jit
def normed(y, eps, N: tl.constexpr):
    """h [ROWS, N] and 1 / sigma [ROWS, 1]."""
    centred = y - (tl.sum(y, 1) / N)[:, None]
    inverse = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps))[:, None]
    return centred * inverse, inverse


@triton.jit
def reading(
    y, r, k, v, gate, r_k, weight, bias, out, eps, TOKENS, H, ROWS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    at, inside, c, _ = head_tile(TOKENS, H, ROWS, N)
    h, _ = normed(read(y, at, inside), eps, N)
    r_k = tl.load(r_k + c).to(tl.float32)[None, :]
    s = tl.sum(read(r, at, inside) * read(k, at, inside) * r_k, 1)[:, None]
    weight, bias = tl.load(weight + c).to(tl.float32)[None, :], tl.load(bias + c).to(tl.float32)[None, :]
    o = bias + h * weight + s * read(v, at, inside)
    write(out, at, o * read(gate, at, inside), inside)


@triton.jit
def reading_backward(
    y, r, k, v, gate, r_k, weight, bias, d_out, dy_out, dr_out, dk_out, dv_out, d_gate_out, sums, eps, TOKENS, H,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    at, inside, c, block = head_tile(TOKENS, H, ROWS, N)
    sums += block * 3 * H * N
    h, inverse = normed(read(y, at, inside), eps, N)
    d_out, weight = read(d_out, at, inside), tl.load(weight + c).to(tl.float32)[None, :]
    p = d_out * read(gate, at, inside)
    tl.store(sums + c, tl.sum(p * h, 0))
    tl.store(sums + H * N + c, tl.sum(p, 0))
    q = p * weight
    dy = (q - (tl.sum(q, 1) / N)[:, None] - h * (tl.sum(q * h, 1) / N)[:, None]) * inverse
    write(dy_out, at, dy, inside)

    v, bias = read(v, at, inside), tl.load(bias + c).to(tl.float32)[None, :]
    r, k, r_k = read(r, at, inside), read(k, at, inside), tl.load(r_k + c).to(tl.float32)[None, :]
    s, ds = tl.sum(r * k * r_k, 1)[:, None], tl.sum(p * v, 1)[:, None]
    write(d_gate_out, at, d_out * (bias + h * weight + s * v), inside)
    write(dv_out, at, p * s, inside)
    write(dr_out, at, ds * k * r_k, inside)
    write(dk_out, at, ds * r * r_k, inside)
    tl.store(sums + 2 * H * N + c, tl.sum(ds * r * k, 0))
