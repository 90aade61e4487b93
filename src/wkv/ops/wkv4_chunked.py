"""WKV-4 in parallel over chunks of a sequence: plain torch, hand-derived backward, all exponents at most 0.

Forward and backward are the same scan. A state is a pair of sums x with a normaliser m, meaning x exp(m), and a token t
turns it into

    x exp(m)  <-  x exp(m) exp(gap_t) + x_t exp(m_t)

Forward in time: x = (num, den), x_t = (v_t, 1), m_t = k_t. Backward in time, with z_t = den_{t-1} + exp(u + k_t) and
p_t = dy_t / z_t, the gradients of num and den behind token t are sums of the same form, x_t exp(m_t) = (p_t, -p_t y_t);
then, with N and D the gradients of num and den behind token t,

    dv_t = exp(k_t) N + exp(u + k_t) p_t             dk_t = exp(k_t) (N v_t + D) + exp(u + k_t) p_t (v_t - y_t)
    dlog_w = sum_t exp(log_w) (num_{t-1} N + den_{t-1} D)

The scan has two levels of T / L and L steps: every chunk of L tokens is summed up at once, the sums are chained over
the chunks, and all chunks then run in step. A token that does not exist has gap 0 and x 0; a reset is a gap of EMPTY.

A normaliser is any number near the running maximum, and its rounding is no error as long as every exponent first takes
the difference of normalisers and keys, which is exact where it is small, and then adds the decay. The other order loses
up to 2e-6 per step in float32 for keys of 60, always in the same direction.
Layout: [L, n, B, C], token j of all n chunks side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.ops import common

CHUNK = 16  # tokens per chunk; 8, 16 and 32 measure alike for T of a few hundred to a few thousand
EMPTY = -1e30  # the logarithm of nothing: exp(EMPTY - x) is 0 for every x that occurs, and no infinity turns into NaN


class Tokens(NamedTuple):
    """The inputs as [L, n, B, C] in the compute type."""

    log_w: Tensor  # [C]
    u: Tensor  # [C]
    k: Tensor  # EMPTY where no token exists
    v: Tensor  # 0 where no token exists
    exists: Tensor | None  # [L, n, B or 1, 1], None if all do
    reset: Tensor | None  # [L, n, B, 1]: the state is zeroed before this token
    next_reset: Tensor | None  # [L, n, B, 1]: the state is zeroed before the next token


class Scan(NamedTuple):
    """Result of `_scan`: states before every token (m [L, n, B, C], x [L, 2, n, B, C]) and behind the last one."""

    m: Tensor
    x: Tensor
    final_m: Tensor
    final_x: Tensor


def chunked(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See `wkv4` for the arguments."""
    num, den, top = state or (None, None, None)
    y, num, den, top, _, _ = forward_op(log_w, u, k, v, num, den, top, mask, reset)
    return y.to(v.dtype), (num, den, top.detach())


@torch.library.custom_op("wkv::wkv4_chunked", mutates_args=())
def forward_op(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, C], the final num, den and max [B, C], and the states before all tokens (m, x) as in `Scan`."""
    t = _split(log_w, u, k, v, mask, reset, common.compute_dtype(log_w, u, k, v, num, den, top))
    batch, length, channels = k.shape
    start_m, start_x = t.k.new_full((batch, channels), EMPTY), t.k.new_zeros(2, batch, channels)
    if num is not None and den is not None and top is not None:
        start_m.copy_(top)
        start_x[0], start_x[1] = num, den
    new_x = t.v.new_ones(CHUNK, 2, *t.v.shape[1:])
    new_x[:, 0] = t.v
    if t.exists is not None:
        new_x[:, 1] = t.exists
    if t.reset is not None:
        start_m.add_(t.reset[0, 0] * EMPTY)
    scan = _scan(start_m, start_x, _cut(_gap(t), t.next_reset), _cut(t.k, t.next_reset), new_x)
    y = _read(t, scan.m, scan.x)[-1]
    if t.exists is not None:
        y.masked_fill_(~t.exists, 0)
    final_num, final_den, final_m = scan.final_x[0].clone(), scan.final_x[1].clone(), scan.final_m.clone()
    return _join(y, length, v.dtype), final_num, final_den, final_m, scan.m, scan.x


@forward_op.register_fake
def _forward_fake(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = k.shape
    final = k.new_empty(batch, channels, dtype=common.compute_dtype(log_w, u, k, v, num, den, top))
    m = final.new_empty(CHUNK, (length + CHUNK - 1) // CHUNK, batch, channels)
    x = m.new_empty(CHUNK, 2, *m.shape[1:])
    return k.new_empty(k.shape, dtype=v.dtype), final, torch.empty_like(final), torch.empty_like(final), m, x


@torch.library.custom_op("wkv::wkv4_chunked_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    d_num: Tensor,
    d_den: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    top: Tensor,
    m: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v in their own types, and of the initial num * exp(max) and den * exp(max) as (m, x).

    `top` [B, C] is the final max, `m` and `x` are what `forward_op` returned last. The gradient of an initial num
    is x[0] exp(m + max), that of an initial den x[1] exp(m + max); m is [B, C], x [2, B, C].
    """
    t = _split(log_w, u, k, v, mask, reset, m.dtype)
    q, bonus, z, y = _read(t, m, x)
    p = _to_steps(dy, m.dtype).div_(z)
    if t.exists is not None:
        q.masked_fill_(~t.exists, -EMPTY)
        p.masked_fill_(~t.exists, 0)
    new_x = torch.empty_like(x)
    new_x[:, 0] = p
    torch.mul(p, y.neg_(), out=new_x[:, 1])
    gap = _gap(t)
    back = _scan(-top, torch.stack((d_num, d_den)), _cut(gap, t.reset), _cut(q.neg_(), t.reset), new_x, reverse=True)

    d_num, d_den = back.x.unbind(1)
    weight, direct = (t.k + back.m).exp_(), bonus.mul_(p)
    du = y.add_(t.v).mul_(direct)  # y holds -y
    dk = torch.addcmul(d_den, d_num, t.v).mul_(weight).add_(du)
    dv = torch.addcmul(direct, weight, d_num)
    crossing = torch.add(m, back.m, out=weight).add_(gap).exp_().mul_((x[:, 0] * d_num).addcmul_(x[:, 1], d_den))
    if t.exists is not None:
        dk, dv, crossing = (g.masked_fill_(~t.exists, 0) for g in (dk, dv, crossing))
    length = k.shape[1]
    return (
        crossing.sum((0, 1, 2)).to(log_w.dtype),
        du.sum((0, 1, 2)).to(u.dtype),
        _join(dk, length, k.dtype),
        _join(dv, length, v.dtype),
        back.final_m.clone(),
        back.final_x.clone(),
    )


@backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    d_num: Tensor,
    d_den: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    top: Tensor,
    m: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_log_w, du, dk, dv, final_m = (g.new_empty(g.shape) for g in (log_w, u, k, v, top))
    return d_log_w, du, dk, dv, final_m, top.new_empty(2, *top.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    log_w, u, k, v, num, den, top, mask, reset = inputs
    ctx.save_for_backward(log_w, u, k, v, mask, reset, num, den, top, *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_num: Tensor | None, d_den: Tensor | None, *_: None) -> tuple[Any, ...]:
    log_w, u, k, v, mask, reset, num, den, top, final_top, m, x = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    d_num, d_den = (torch.zeros_like(final_top) if g is None else g for g in (d_num, d_den))
    d_log_w, du, dk, dv, start_m, start_x = backward_op(dy, d_num, d_den, log_w, u, k, v, mask, reset, final_top, m, x)
    if num is None:
        return d_log_w, du, dk, dv, None, None, None, None, None
    start_num, start_den = (start_x * (start_m + top).exp()).unbind()
    d_top = start_num * num + start_den * den
    return d_log_w, du, dk, dv, start_num.to(num.dtype), start_den.to(den.dtype), d_top.to(top.dtype), None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
for _op in (forward_op, backward_op):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)


def _split(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    dtype: torch.dtype,
) -> Tokens:
    length = k.shape[1]
    if mask is None and length % CHUNK:
        mask = k.new_ones(1, length, dtype=torch.bool)  # only the padding does not exist
    following = None if reset is None else torch.nn.functional.pad(reset[:, 1:], (0, 1))
    exists, reset, next_reset = (
        None if f is None else _to_steps(f[:, :, None], torch.bool) for f in (mask, reset, following)
    )
    k, v = _to_steps(k, dtype), _to_steps(v, dtype)
    if exists is not None:
        k.masked_fill_(~exists, EMPTY)
        v.masked_fill_(~exists, 0)
    return Tokens(log_w.to(dtype).clamp(min=EMPTY), u.to(dtype), k, v, exists, reset, next_reset)


def _to_steps(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, C] to [L, n, B, C] in `dtype`; tokens beyond T are zero."""
    batch, length, channels = x.shape
    whole, rest = divmod(length, CHUNK)
    out = x.new_empty(CHUNK, whole + (rest > 0), batch, channels, dtype=dtype)
    out[:, :whole] = x[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)).permute(2, 1, 0, 3)
    if rest:
        out[:rest, -1] = x[:, whole * CHUNK :].transpose(0, 1)
        out[rest:, -1] = 0
    return out


def _join(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[L, n, B, C] to [B, T, C] in `dtype`."""
    _, chunks, batch, channels = x.shape
    out = x.new_empty(batch, chunks, CHUNK, channels, dtype=dtype)
    out.copy_(x.permute(2, 1, 0, 3))
    return out.flatten(1, 2)[:, :length].contiguous()


def _gap(t: Tokens) -> Tensor:
    """Log-decay of every token, [L, 1 or n, 1 or B, C]."""
    gap = t.log_w.expand(CHUNK, 1, 1, -1)
    return gap if t.exists is None else torch.where(t.exists, gap, 0)


def _cut(x: Tensor, flags: Tensor | None) -> Tensor:
    """`x` as a logarithm, with nothing left where `flags` is True."""
    return x if flags is None else x + flags * EMPTY


def _read(t: Tokens, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the tokens read from the states before them: (q, exp(u + k - q), z exp(-q), y), each [L, n, B, C]."""
    q = torch.maximum(m, t.k + t.u)
    old, bonus = (m - q).exp_(), (t.k - q).add_(t.u).exp_()
    z = torch.addcmul(bonus, old, x[:, 1])
    if t.exists is not None:
        z.masked_fill_(~t.exists, 1)
    return q, bonus, z, old.mul_(x[:, 0]).addcmul_(bonus, t.v).div_(z)


def _scan(start_m: Tensor, start_x: Tensor, gap: Tensor, m: Tensor, x: Tensor, reverse: bool = False) -> Scan:
    """Run the recurrence over all tokens, forward or backward in time.

    start_m [B, C], start_x [2, B, C]; gap [L, 1 or n, 1 or B, C]; m [L, n, B, C] and x [L, 2, n, B, C] of the tokens.
    """
    ordered = gap if reverse else gap.flip(0)
    behind = torch.zeros_like(ordered, memory_format=torch.contiguous_format)
    behind[1:] = ordered[:-1].cumsum(0)
    behind = behind if reverse else behind.flip(0)
    terms = m + behind
    sum_m = terms.amax(0)
    torch.sub(m, sum_m, out=terms).add_(behind).exp_()
    sum_x = x.new_zeros(m.shape[1], 2, *m.shape[2:])
    for new, weight in zip(x.transpose(1, 2), terms.unsqueeze(2), strict=True):
        sum_x.addcmul_(new, weight)
    border_m, border_x = _chain(start_m, start_x, gap.sum(0).expand_as(sum_m), sum_m, sum_x, reverse)
    before, last = (slice(1, None), 0) if reverse else (slice(None, -1), -1)
    all_m, all_x = _chain(border_m[before], border_x[before].transpose(0, 1), gap.expand_as(m), m, x, reverse)
    return Scan(all_m[before], all_x[before], border_m[last], border_x[last])


def _chain(start_m: Tensor, start_x: Tensor, gap: Tensor, m: Tensor, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: states at all borders of the steps, m [steps + 1, ...] and x [steps + 1, 2, ...]."""
    steps = m.shape[0]
    states_m, states_x = m.new_empty(steps + 1, *m.shape[1:]), x.new_empty(steps + 1, *x.shape[1:])
    old, new = (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    first, order = (steps, range(steps - 1, -1, -1)) if reverse else (0, range(steps))
    old_m, new_m, old_x, new_x = states_m[old], states_m[new], states_x[old], states_x[new]
    states_m[first], states_x[first] = start_m, start_x
    for i in order:
        torch.maximum(old_m[i] + gap[i], m[i], out=new_m[i])
    weights = m - new_m
    torch.mul(x, weights.exp_().unsqueeze(1), out=new_x)
    kept = torch.sub(old_m, new_m, out=weights).add_(gap).exp_()
    for i in order:
        new_x[i].addcmul_(old_x[i], kept[i])
    return states_m, states_x
