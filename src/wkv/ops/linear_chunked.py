"""WKV-5 and WKV-6 in parallel over chunks of a sequence: plain torch, hand-derived backward, any log-decay <= 0.

With G_i the cumulative log-decay of tokens up to and including i of a chunk, and X_i the same without i,

    A_ij = sum_c r_ic k_jc exp(X_ic - G_jc)  for j < i,      A_ii = sum_c r_ic u_c k_ic,      A_ij = 0 for j > i
    Y = A V + (R exp(X)) S^T                                 S is the state at the start of the chunk
    S_next = S diag(exp(G_L)) + V^T (K exp(G_L - G))

exp(X_i - G_j) is at most 1, but its factors exp(X_i) exp(-G_j) overflow. So A is cut by halving: blocks of 2s tokens
pair the queries of their second half with the keys of their first half, and both are scaled to the boundary between
the halves, where neither exponent can be positive. From one size to the next, R picks up the decay of the half before
it and K that of the half behind it; after the last size they are the R exp(X) and K exp(G_L - G) of the state. Every
exponent is a short sum of log-decays, never a difference, and the gradient of a log-decay is gathered on the way back
from the products that cross it: no large sums are ever subtracted.

A reset cuts the path into its token: that token's decay becomes 0 and so does its query, except for the bonus.
Layout: [n, B, H, L, N] for n chunks of L tokens; a decay that no token changes is [1, 1, H, 1, N].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.ops import common

CHUNK = 32  # tokens per chunk, a power of two; 16, 32 and 64 measure alike, larger ones need less memory for states


class Chunks(NamedTuple):
    """The inputs in chunk layout and compute type; tokens that do not exist are neutral (r = k = v = log_w = 0)."""

    r: Tensor
    k: Tensor
    v: Tensor
    u: Tensor  # [H, 1, N]
    log_w: Tensor  # [n, B, H, L, N] or [1, 1, H, 1, N]; -inf where a reset cuts the path
    exists: Tensor | None  # [n, B, 1, L, 1]
    reset: Tensor | None  # [n, B, 1, L, 1]


class Level(NamedTuple):
    """One step of the halving: blocks of 2s tokens, c of them in a chunk; queries and keys [n, B, H, c, s, N]."""

    size: int
    queries: Tensor
    keys: Tensor
    decay_first: Tensor  # of a whole first half, [n, B, H, c, 1, N] or [1, 1, H, 1, 1, N]
    decay_second: Tensor
    constant: bool  # no token changes the decay


def chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """WKV-6 (log_w [B, T, H, N]) and WKV-5 (log_w [H, N]); see `wkv6` and `wkv5` for the arguments."""
    y, final, _ = forward_op(r, log_w, k, v, u, state, mask, reset)
    return y.to(v.dtype), final


@torch.library.custom_op("wkv::linear_chunked", mutates_args=())
def forward_op(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, N], the final state [B, H, N, N], and the states at all chunk borders [n + 1, B, H, N, N]."""
    dtype = common.compute_dtype(r, log_w, k, v, u, state)
    x = _split(r, log_w, k, v, u, mask, reset, dtype)
    q, k_end = _without_resets(x), x.k.clone()
    scores = _diagonal_scores(x)
    for level in _halve(q, k_end, x.log_w):
        _add_scores(scores, level)
    chunks, batch, heads, _, size = q.shape
    S = q.new_empty(chunks + 1, batch, heads, size, size)
    S[0] = 0 if state is None else state
    torch.bmm(x.v.flatten(0, 2).mT, k_end.flatten(0, 2), out=S[1:].flatten(0, 2))
    for i, decay in enumerate(_chunk_decay(x.log_w).expand(chunks, -1, -1, -1, -1)):
        S[i + 1].addcmul_(S[i], decay)
    y = torch.bmm(scores, x.v.flatten(0, 2)).baddbmm_(q.flatten(0, 2), S[:-1].flatten(0, 2).mT)
    return _join(y.view_as(q), r.shape[1], v.dtype), S[-1].clone(), S


@forward_op.register_fake
def _forward_fake(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = common.compute_dtype(r, log_w, k, v, u, state)
    batch, length, heads, size = r.shape
    final = r.new_empty(batch, heads, size, size, dtype=dtype)
    chunks = (length + CHUNK - 1) // CHUNK
    return r.new_empty(r.shape, dtype=v.dtype), final, final.new_empty(chunks + 1, batch, heads, size, size)


@torch.library.custom_op("wkv::linear_chunked_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    d_final: Tensor,
    S: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, u in their own types and of the initial state, from those of y and the final state.

    `S` is what `forward_op` returned third.
    """
    x = _split(r, log_w, k, v, u, mask, reset, S.dtype)
    dy_chunks = _to_chunks(dy, S.dtype)
    if x.exists is not None:
        dy_chunks.masked_fill_(~x.exists, 0)
    q, k_end = _without_resets(x), x.k.clone()
    scores, levels = _diagonal_scores(x), []
    for level in _halve(q, k_end, x.log_w):
        _add_scores(scores, level)
        levels.append(level._replace(queries=level.queries.clone(), keys=level.keys.clone()))

    dS = _state_gradients(dy_chunks, q, d_final, x.log_w)
    S_start, dS_end = S[:-1].flatten(0, 2), dS[1:].flatten(0, 2)
    dy_flat, v_flat = dy_chunks.flatten(0, 2), x.v.flatten(0, 2)
    dv = torch.bmm(scores.mT, dy_flat).baddbmm_(k_end.flatten(0, 2), dS_end.mT).view_as(q)
    d_scores = torch.bmm(dy_flat, v_flat.mT)
    dr = torch.bmm(dy_flat, S_start).view_as(q)
    dk = torch.bmm(v_flat, dS_end).view_as(q)
    d_chunk = (S_start * dS_end).sum(-2).view(*q.shape[:3], 1, -1)
    d_log_w = _gather(d_chunk * _chunk_decay(x.log_w), _is_constant(x.log_w))
    for level in reversed(levels):
        d_log_w = _descend(level, dr, dk, d_log_w, d_scores)
    du = _add_bonus_gradients(x, d_scores, dr, dk)

    length = r.shape[1]
    dr, dk, dv = (_join(g, length, like.dtype) for g, like in ((dr, r), (dk, k), (dv, v)))
    return dr, _join_decay(d_log_w, x, log_w, length), dk, dv, du.to(u.dtype), dS[0].clone()


@backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    d_final: Tensor,
    S: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dlog_w, dk, dv, du = (x.new_empty(x.shape) for x in (r, log_w, k, v, u))
    return dr, dlog_w, dk, dv, du, S.new_empty(S.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, mask, reset = inputs
    ctx.save_for_backward(*tensors, mask, reset, output[2])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    r, log_w, k, v, u, mask, reset, S = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    d_final = torch.zeros_like(S[0]) if d_final is None else d_final
    *grads, d_state = backward_op(dy, d_final, S, r, log_w, k, v, u, mask, reset)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
for _op in (forward_op, backward_op):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)


def _split(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    dtype: torch.dtype,
) -> Chunks:
    exists, reset = (None if f is None else _to_chunks(f[:, :, None, None], torch.bool) for f in (mask, reset))
    if log_w.ndim == 2 and exists is None and reset is None and r.shape[1] % CHUNK == 0:
        log_w = log_w.to(dtype)[None, None, :, None]
    else:
        log_w = _to_chunks(log_w.expand_as(r), dtype)
    r, k, v = (_to_chunks(x, dtype) for x in (r, k, v))
    if exists is not None:
        for x in (r, k, v, log_w):
            x.masked_fill_(~exists, 0)
    if reset is not None:
        log_w.masked_fill_(reset, float("-inf"))
    return Chunks(r, k, v, u.to(dtype)[:, None], log_w, exists, reset)


def _to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, N] to [n, B, H, L, N] in `dtype`; tokens beyond T are zero."""
    batch, length, heads, size = x.shape
    whole, rest = divmod(length, CHUNK)
    out = x.new_empty(whole + (rest > 0), batch, heads, CHUNK, size, dtype=dtype)
    out[:whole] = x[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)).permute(1, 0, 3, 2, 4)
    if rest:
        out[-1, ..., :rest, :] = x[:, whole * CHUNK :].transpose(1, 2)
        out[-1, ..., rest:, :] = 0
    return out


def _join(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[n, B, H, L, N] to [B, T, H, N] in `dtype`."""
    chunks, batch, heads, _, size = x.shape
    out = x.new_empty(batch, chunks, CHUNK, heads, size, dtype=dtype)
    out.copy_(x.permute(1, 0, 3, 2, 4))
    return out.flatten(1, 2)[:, :length].contiguous()


def _without_resets(x: Chunks) -> Tensor:
    """A copy of the receptances as they meet earlier tokens: none where the state has just been zeroed."""
    return x.r.clone() if x.reset is None else x.r.masked_fill(x.reset, 0)


def _is_constant(log_w: Tensor) -> bool:
    return log_w.shape[3] == 1


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second halves of all blocks, along the time axis of a log-decay; a constant is both."""
    return (x, x) if _is_constant(x) else (x[..., 0::2, :], x[..., 1::2, :])


def _gather(x: Tensor, constant: bool) -> Tensor:
    """Sum a gradient [n, B, H, c, N] over all tokens if they share one log-decay."""
    return x.sum((0, 1, 3), keepdim=True) if constant else x


def _chunk_decay(log_w: Tensor) -> Tensor:
    """exp(G_L), [n, B, H, 1, N] or [1, 1, H, 1, N]."""
    return (log_w * CHUNK if _is_constant(log_w) else log_w.sum(3, keepdim=True)).exp()


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[n, B, H, L, N] to views [n, B, H, c, s, N]: first and second halves of its blocks of 2s tokens."""
    first, second = x.unflatten(3, (-1, 2, size)).unbind(4)
    return first, second


def _halve(q: Tensor, k: Tensor, log_w: Tensor) -> Iterator[Level]:
    """Every level, smallest blocks first; q and k are scaled in place when the next one is asked for."""
    size, constant = 1, _is_constant(log_w)
    while size < CHUNK:
        first, second = _pairs(log_w)
        queries, keys = _halves(q, size)[1], _halves(k, size)[0]
        level = Level(size, queries, keys, first.exp().unsqueeze(4), second.exp().unsqueeze(4), constant)
        yield level
        queries.mul_(level.decay_first)
        keys.mul_(level.decay_second)
        log_w, size = first + second, 2 * size


def _blocks(scores: Tensor, size: int) -> Tensor:
    """View of [P, L, L]: where second halves meet first halves in blocks of 2s tokens, [P, c, s, s]."""
    grid = scores.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))  # [P, c, 2, s, c, 2, s]
    return grid[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _diagonal_scores(x: Chunks) -> Tensor:
    """Zeros [P, L, L] with the bonus r_i . (u k_i) on the diagonal."""
    scores = x.r.new_zeros(x.r.shape[:3].numel(), CHUNK, CHUNK)
    scores.diagonal(dim1=1, dim2=2).copy_((x.r * x.u).mul_(x.k).sum(-1).flatten(0, 2))
    return scores


def _add_scores(scores: Tensor, level: Level) -> None:
    block = torch.bmm(level.queries.flatten(0, 3), level.keys.flatten(0, 3).mT)
    target = _blocks(scores, level.size)
    target.copy_(block.view(target.shape))


def _state_gradients(dy: Tensor, q: Tensor, d_final: Tensor, log_w: Tensor) -> Tensor:
    """Gradients of the states at all chunk borders, [n + 1, B, H, N, N]."""
    chunks, batch, heads, _, size = q.shape
    dS = q.new_empty(chunks + 1, batch, heads, size, size)
    dS[chunks] = d_final
    torch.bmm(dy.flatten(0, 2).mT, q.flatten(0, 2), out=dS[:chunks].flatten(0, 2))
    decay = _chunk_decay(log_w).expand(chunks, -1, -1, -1, -1)
    for i in reversed(range(chunks)):
        dS[i].addcmul_(dS[i + 1], decay[i])
    return dS


def _descend(level: Level, dq: Tensor, dk: Tensor, d_log_w: Tensor, d_scores: Tensor) -> Tensor:
    """Undo one level: gradients of its scaled inputs to those of the level below (dq, dk in place, d_log_w returned).

    d_log_w [n, B, H, c, N] belongs to the blocks of 2s tokens on entry, to those of s tokens on return.
    """
    dq, dk = _halves(dq, level.size)[1], _halves(dk, level.size)[0]
    d_first = d_log_w + _gather((dq * level.queries).sum(-2) * level.decay_first.squeeze(4), level.constant)
    d_second = d_log_w + _gather((dk * level.keys).sum(-2) * level.decay_second.squeeze(4), level.constant)
    block = _blocks(d_scores, level.size).flatten(0, 1)
    dq.mul_(level.decay_first).add_(torch.bmm(block, level.keys.flatten(0, 3)).view_as(dq))
    dk.mul_(level.decay_second).add_(torch.bmm(block.mT, level.queries.flatten(0, 3)).view_as(dk))
    return d_first + d_second if level.constant else torch.stack((d_first, d_second), 4).flatten(3, 4)


def _add_bonus_gradients(x: Chunks, d_scores: Tensor, dr: Tensor, dk: Tensor) -> Tensor:
    """Finish dr and dk in place: drop what a reset or a missing token cuts off, add the diagonal. Returns du [H, N]."""
    if x.reset is not None:
        dr.masked_fill_(x.reset, 0)
    d_diagonal = d_scores.diagonal(dim1=1, dim2=2).reshape(*x.r.shape[:4], 1)
    d_bonus = x.u * d_diagonal
    dr.addcmul_(d_bonus, x.k)
    dk.addcmul_(d_bonus, x.r)
    if x.exists is not None:
        dr.masked_fill_(~x.exists, 0)
        dk.masked_fill_(~x.exists, 0)
    return (x.r * x.k).mul_(d_diagonal).sum((0, 1, 3))


def _join_decay(d_log_w: Tensor, x: Chunks, log_w: Tensor, length: int) -> Tensor:
    """The gradient of log_w in its own shape and type."""
    if _is_constant(x.log_w):
        return d_log_w.view(log_w.shape).to(log_w.dtype)
    if x.exists is not None:
        d_log_w.masked_fill_(~x.exists, 0)
    if log_w.ndim == 4:
        return _join(d_log_w, length, log_w.dtype)
    return _join(d_log_w, length, d_log_w.dtype).sum((0, 1)).to(log_w.dtype)
