"""The matrix algebra of chunked WKV-7: forward and hand-derived backward of a group of chunks of L tokens.

With G_i the log-decay summed from a reference point in mid-chunk to token i (inclusive) and E_i = exp(G_i), scale

    r~_i = r_i E_i    a~_i = a_i E_{i-1}    k~_i = k_i / E_i    b~_i = b_i / E_i    S~ = S diag(1 / E_0)

where S is the state at the chunk's start: the scaling holds all decays. Let U have the rows u_i = S_{i-1} a_i (what is
removed), and Aqk = tril(r~ k~^T), Aqb = tril(r~ b~^T), Aak and Aab the strict lower parts of a~ k~^T and a~ b~^T:

    U  = W (Aak V + a~ S~^T),  W = (I - Aab)^-1          Y = Aqk V + Aqb U + r~ S~^T
    S' = S~ + V^T k~ + U^T b~                            S_end = S' diag(E_L)

In code Q = [r~; a~], K = [k~; b~], X = [V; U] and the scores A = Q K^T hold all four; S' = S~ + X^T K. All but the
chain S~ -> U -> S' is batched over chunks. Backward: with D the gradient of S' and dX = [dY; dZ], where dZ is the
gradient of the right-hand side that W solves,

    dZ = W^T (Aqb^T dY + b~ D^T)       dS~ = D + dX^T Q          dV = [Aqk; Aak]^T dX + k~ D^T
    dA = tril(dX X^T)                  dQ = dA K + dX S~         dK = dA^T Q + X D
    d log E_i = r~_i dr~_i + a~_{i+1} da~_{i+1} - k~_i dk~_i - b~_i db~_i, at i = L also the columns' sums of S' * D
    dlog_w_t = sum of d log E_i over i >= t

E and 1 / E must stay in floating range: the caller chooses L. A reset cuts entries of A, and the paths between tokens
and the chunk's start and end state.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Arena:
    """One block of memory that all segments of a call share: fresh pages cost more than the arithmetic on them.

    Args:
        tokens: longest segment.
        length: tokens per chunk.
        groups: sequences x heads of a segment.
        size: head size.
        like: gives type and device.
        backward: whether there must be room for `differentiate`.
    """

    def __init__(self, tokens: int, length: int, groups: int, size: int, like: Tensor, backward: bool) -> None:
        chunks, row = groups * -(-tokens // length), length * size
        floats = chunks * (9 * row + size + 4 * length**2 + size**2) + groups * (size**2 + row)
        if backward:
            floats += chunks * (7 * row + 4 * length**2 + size**2) + groups * row
        self.flat, self.used = like.new_empty(floats), 0

    def reset(self) -> None:
        """Forget everything handed out."""
        self.used = 0

    def take(self, *shape: int) -> Tensor:
        """Uninitialised memory."""
        start, self.used = self.used, self.used + torch.Size(shape).numel()
        return self.flat[start : self.used].view(shape)


class _Constants(NamedTuple):
    """Matrices that belong to a chunk of L tokens."""

    exponents: Tensor  # [L+1, L]: from log-decays to G_0 ... G_L, zero in mid-chunk
    pairs: Tensor  # [2L, 2L]: 1 where a row of Q may see a row of K
    blocks: list[Tensor]  # [L, L]: lower-left blocks of size 1, 2, 4, ...
    suffix: Tensor  # [L, L]: from d log E to dlog_w


@lru_cache(maxsize=64)
def _constants(length: int, dtype: torch.dtype, device: torch.device) -> _Constants:
    i = torch.arange(length, device=device)
    row, column = i[:, None], i[None, :]
    upto = torch.arange(length + 1, device=device)[:, None]
    exponents = (column < upto).to(dtype) - (column < length // 2).to(dtype)
    pairs = torch.cat([(row >= column).repeat(1, 2), (row > column).repeat(1, 2)]).to(dtype)
    blocks, size = [], 1
    while size < length:
        below = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        blocks.append(below.to(dtype))
        size *= 2
    return _Constants(exponents, pairs, blocks, (row <= column).to(dtype))


class _Resets(NamedTuple):
    """What resets cut inside chunks, as factors 0 and 1."""

    pairs: Tensor  # [n, B, 1, 2L, 2L]: no reset between the two tokens
    enter: Tensor  # [n, B, 1, 1, L, 1]: the chunk's start state reaches the token
    leave: Tensor  # [n, B, 1, 1, L, 1]: the token reaches the chunk's end state
    carry: Tensor  # [n, B, 1, 1, 1]: the start state reaches the end state


def _resets(reset_BT: Tensor, length: int, dtype: torch.dtype) -> _Resets:
    ids = reset_BT.unflatten(1, (-1, length)).transpose(0, 1).cumsum(-1)
    pairs = (ids[..., :, None] == ids[..., None, :]).repeat(1, 1, 2, 2).to(dtype)
    enter, leave = (ids == 0).to(dtype), (ids == ids[..., -1:]).to(dtype)
    token = (slice(None), slice(None), None, None, slice(None), None)
    return _Resets(pairs[:, :, None], enter[token], leave[token], enter[:, :, None, -1:, None])


class _Segment(NamedTuple):
    """A segment's intermediates; M = chunks x rows x heads matrices, Z = rows x heads."""

    E: Tensor  # [n, B, H, L+1, N]
    Q: Tensor  # [M, 2L, N]: r~; a~
    K: Tensor  # [M, 2L, N]: k~; b~
    Q_state: Tensor  # Q without the rows that a reset hides from the start state
    K_state: Tensor  # K without the rows that a reset hides from the end state
    X: Tensor  # [M, 2L, N]: V; U
    A: Tensor  # [M, 2L, 2L]: scores
    W: Tensor  # [M, L, L]: (I - Aab)^-1
    S: Tensor  # [n, Z, N, N]: S~ of every chunk
    end: Tensor  # [Z, N, N]: S' of the last chunk
    scale: Tensor  # [n+1, Z, 1, N]: from the start state to S~_0, from S'_c to S~_{c+1}, from the last S' to the end
    pairs: Tensor  # [2L, 2L] or [n, B, 1, 2L, 2L]
    resets: _Resets | None
    spare: tuple[Tensor, Tensor]  # [M, L, N] twice, free to use


def padded(x: Tensor, length: int) -> Tensor:
    """x [B, T, ...] with neutral tokens up to a whole number of chunks."""
    missing = -x.shape[1] % length
    return pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


def to_chunks(x_BTHN: Tensor, length: int) -> Tensor:
    """View [n, B, H, L, N]."""
    return x_BTHN.unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)


def expand(arena: Arena, inputs: list[Tensor], reset: Tensor | None, S: Tensor) -> _Segment:
    """Run the recurrence over one segment from the state S [Z, N, N]."""
    n, B, H, L, N = inputs[0].shape
    M = n * B * H
    arena.reset()
    spare = arena.take(M, L, N), arena.take(M, L, N)
    E, Q, K, X = _scale(arena, inputs, spare[0])
    scale = torch.cat([E[:1, ..., :1, :].reciprocal(), E[:-1, ..., L:, :] / E[1:, ..., :1, :], E[-1:, ..., L:, :]])
    constants = _constants(L, S.dtype, S.device)
    Q_state, K_state, pairs, resets = Q, K, constants.pairs, None
    if reset is not None:
        resets = _resets(reset, L, S.dtype)
        Q_state, K_state, pairs = Q * resets.enter, K * resets.leave, pairs * resets.pairs
    Q, K, X, Q_state, K_state = (x.view(M, 2 * L, N) for x in (Q, K, X, Q_state, K_state))
    A = torch.bmm(Q, K.mT, out=arena.take(M, 2 * L, 2 * L))
    A.view(n, B, H, 2 * L, 2 * L).mul_(pairs)
    W = _inverse(A[:, L:, L:], constants.blocks)
    states, end = arena.take(n, B * H, N, N), arena.take(B * H, N, N)
    scale = scale.view(n + 1, B * H, 1, N)
    segment = _Segment(E, Q, K, Q_state, K_state, X, A, W, states, end, scale, pairs, resets, spare)
    _scan(arena, segment, S)
    return segment


def _scale(arena: Arena, inputs: list[Tensor], spare: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E [n, B, H, L+1, N] and Q, K, X [n, B, H, 2, L, N], U not yet in X."""
    r, log_w, k, v, a, b = inputs
    n, B, H, L, N = r.shape
    E, Q, K, X = arena.take(n, B, H, L + 1, N), *(arena.take(n, B, H, 2, L, N) for _ in range(3))
    spare.view(r.shape).copy_(log_w)
    exponents = _constants(L, E.dtype, E.device).exponents.expand(len(spare), -1, -1)
    torch.bmm(exponents, spare, out=E.view(-1, L + 1, N)).exp_()
    before, after = E[..., :-1, :], E[..., 1:, :]
    torch.mul(r, after, out=Q[:, :, :, 0])
    torch.mul(a, before, out=Q[:, :, :, 1])
    torch.div(k, after, out=K[:, :, :, 0])
    torch.div(b, after, out=K[:, :, :, 1])
    X[:, :, :, 0].copy_(v)
    return E, Q, K, X


def _inverse(lower: Tensor, blocks: list[Tensor]) -> Tensor:
    """(I - lower)^-1 of strictly lower triangular matrices, by merging the inverses of ever larger diagonal blocks.

    As accurate as forward substitution; the product of all I + lower^(2^i) is not, for repeated directions.
    """
    if not blocks:
        return torch.ones_like(lower)
    inverse = lower * blocks[0]
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1)
    for block in blocks[1:]:
        inverse = torch.baddbmm(inverse, torch.bmm(inverse, lower * block), inverse)
    return inverse


def _scan(arena: Arena, segment: _Segment, S: Tensor) -> None:
    """The chain over chunks: fills U, S~ and the last S'."""
    n, L = len(segment.S), segment.W.shape[-1]
    W, X, (from_values, from_state) = segment.W, segment.X, segment.spare
    torch.bmm(torch.bmm(W, segment.A[:, L:, :L]), X[:, :L], out=from_values)
    torch.bmm(W, segment.Q_state[:, L:], out=from_state)
    from_values_n, from_state_n, U_n = (_per_chunk(x, n) for x in (from_values, from_state, X[:, L:]))
    XT_n, K_n = _per_chunk(X.mT, n), _per_chunk(segment.K_state, n)
    S_n, ST_n, scale_n = segment.S.unbind(), segment.S.mT.unbind(), segment.scale.unbind()
    U = arena.take(*from_values_n[0].shape)
    for c in range(n):
        torch.mul(segment.end if c else S, scale_n[c], out=S_n[c])
        # bmm is much slower into a strided output: hence the copy of U.
        U_n[c].copy_(torch.baddbmm(from_values_n[c], from_state_n[c], ST_n[c], out=U))
        torch.baddbmm(_carried(S_n[c], segment.resets, c), XT_n[c], K_n[c], out=segment.end)


def _per_chunk(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """[n Z, ...] as n views [Z, ...]."""
    return x.unflatten(0, (n, -1)).unbind()


def _carried(S: Tensor, resets: _Resets | None, c: int) -> Tensor:
    """S [Z, N, N] with zeros in the rows that a reset in chunk c cuts."""
    if resets is None:
        return S
    carry = resets.carry[c]
    return (S.unflatten(0, (len(carry), -1)) * carry).view_as(S)


def read(segment: _Segment, y: Tensor) -> None:
    """Y of a segment into y [B, T, H, N], which may end inside a chunk."""
    n, B, H, L, N = segment.E[..., 1:, :].shape
    Y = torch.bmm(segment.A[:, :L], segment.X, out=segment.spare[0])
    Y.baddbmm_(segment.Q_state[:, :L], segment.S.flatten(0, 1).mT)
    _store(Y.view(n, B, H, L, N), y)


def _store(chunks: Tensor, out: Tensor) -> None:
    """[n, B, H, L, N] into [B, T, H, N], without the padding."""
    L = chunks.shape[3]
    if out.shape[1] % L:
        out.copy_(chunks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : out.shape[1]])
    else:
        to_chunks(out, L).copy_(chunks)


def differentiate(arena: Arena, segment: _Segment, dy: Tensor | None, D: Tensor, grads: list[Tensor]) -> None:
    """Gradients of a segment's inputs into `grads` [B, T, H, N].

    dy [B, T, H, N] or None; D [Z, N, N] is the gradient of the segment's end state and becomes that of its start state.
    """
    n, B, H, L, N = segment.E[..., 1:, :].shape
    M, K, X, S = n * B * H, segment.K, segment.X, segment.S
    dX, dK, dQ = (arena.take(n, B, H, 2, L, N) for _ in range(3))
    dV, dS = arena.take(M, L, N), arena.take(*S.shape)
    dY = dX[:, :, :, 0]
    if dy is None:
        dY.zero_()
    else:
        dY.copy_(to_chunks(padded(dy, L), L))
    dX, dK, dQ = dX.view_as(X), dK.view_as(X), dQ.view_as(X)
    _scan_back(arena, segment, dX, D, dS)
    S_M, dS_M = S.flatten(0, 1), dS.flatten(0, 1)
    torch.bmm(segment.A[:, :, :L].mT, dX, out=dV).baddbmm_(segment.K_state[:, :L], dS_M.mT)
    torch.bmm(dX, S_M, out=dQ)
    torch.bmm(X, dS_M, out=dK)
    if segment.resets is not None:
        dQ.view(n, B, H, 2, L, N).mul_(segment.resets.enter)
        dK.view(n, B, H, 2, L, N).mul_(segment.resets.leave)
    dA = torch.bmm(dX, X.mT, out=arena.take(M, 2 * L, 2 * L))
    dA.view(n, B, H, 2 * L, 2 * L).mul_(segment.pairs)
    dQ.baddbmm_(dA, K)
    dK.baddbmm_(dA.mT, segment.Q)
    # The columns' sums of S' * D. S'_c is S~_{c+1} / scale; where the scale underflows the sum is zero beside rounding.
    scale = segment.scale[1:-1, :, 0].clamp(min=torch.finfo(S.dtype).tiny)
    crossing = torch.cat([S[1:].mul_(dS[:-1]).sum(-2) / scale, segment.end.mul_(dS[-1]).sum(-2)[None]])
    _store_gradients(segment, dQ, dK, dV, crossing.view(n, B, H, N), grads)


def _scan_back(arena: Arena, segment: _Segment, dX: Tensor, D: Tensor, dS: Tensor) -> None:
    """The chain over chunks, backwards: fills dZ in dX and the gradients dS of every S'; D goes from end to start."""
    n, L = len(segment.S), segment.W.shape[-1]
    W, (from_values, from_state) = segment.W, segment.spare
    torch.bmm(torch.bmm(segment.A[:, :L, L:], W).mT, dX[:, :L], out=from_values)
    torch.bmm(W.mT, segment.K_state[:, L:], out=from_state)
    from_values_n, from_state_n, dZ_n = (_per_chunk(x, n) for x in (from_values, from_state, dX[:, L:]))
    dXT_n, Q_n = _per_chunk(dX.mT, n), _per_chunk(segment.Q_state, n)
    dS_n, dST_n, scale_n = dS.unbind(), dS.mT.unbind(), segment.scale.unbind()
    dZ = arena.take(*from_values_n[0].shape)
    for c in reversed(range(n)):
        torch.mul(D, scale_n[c + 1], out=dS_n[c])
        dZ_n[c].copy_(torch.baddbmm(from_values_n[c], from_state_n[c], dST_n[c], out=dZ))
        torch.baddbmm(_carried(dS_n[c], segment.resets, c), dXT_n[c], Q_n[c], out=D)
    D.mul_(scale_n[0])


def _store_gradients(
    segment: _Segment, dQ: Tensor, dK: Tensor, dV: Tensor, crossing: Tensor, grads: list[Tensor]
) -> None:
    """From gradients of scaled inputs to those of the inputs, in place; `crossing` [n, B, H, N] is added at log E_L."""
    n, B, H, L, N = segment.E[..., 1:, :].shape
    time = grads[0].shape[1]
    whole = [g.new_empty(B, n * L, H, N) for g in grads] if time % L else grads
    dr, dlog_w, dk, dv, da, db = (to_chunks(g, L) for g in whole)
    dQ, dK, Q, K = (x.view(n, B, H, 2, L, N) for x in (dQ, dK, segment.Q, segment.K))
    before, after = segment.E[..., :-1, :], segment.E[..., 1:, :]
    torch.mul(dQ[:, :, :, 0], after, out=dr)
    torch.mul(dQ[:, :, :, 1], before, out=da)
    torch.div(dK[:, :, :, 0], after, out=dk)
    torch.div(dK[:, :, :, 1], after, out=db)
    dv.copy_(dV.view(dv.shape))
    dQ.mul_(Q)
    dK.mul_(K)
    d_log_E = dQ[:, :, :, 0].sub_(dK[:, :, :, 0]).sub_(dK[:, :, :, 1])
    d_log_E[..., :-1, :] += dQ[:, :, :, 1, 1:]
    d_log_E[..., -1, :] += crossing
    suffix = _constants(L, dQ.dtype, dQ.device).suffix.expand(len(dV), -1, -1)
    dlog_w.copy_(torch.bmm(suffix, d_log_E.flatten(0, 2), out=segment.spare[0]).view(dlog_w.shape))
    if time % L:
        for grad, longer in zip(grads, whole, strict=True):
            grad.copy_(longer[:, :time])
