"""Linear attention and its Taylor form in parallel over chunks of a sequence: plain torch, hand-derived backward.

Values carry a last column of ones, so that the denominator is one more value: V [L, N + 1], S [N + 1, E] = (kv, z).
With W the weights q_i . k_j (of features), or 1 + s + s^2 / 2 with s = q_i . k_j (Taylor), zero for j > i,

    Y = W V + phi(Q) S^T                    S is the state at the start of the chunk
    S_next = S + V^T phi(K)
    y = Y[:, :N] / (Y[:, N] + eps)

Within a chunk no feature of the Taylor form is needed; between chunks there are E of them for each token, so a group of
chunks is worked on at a time and nothing but the states at all chunk borders is kept for the backward pass.

Resets cut a chunk into parts: W is zero between two parts, S is met by the first part only, and the last one alone
writes into S_next. Layout: [c, B, H, L, ...] for a group of c chunks of L tokens; features lie [c, B, H, E, L].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from wkv.ops import common

CHUNK = 128  # tokens per chunk; 64 measures alike and needs twice the memory for states
# Tokens, batch rows and heads multiplied, whose features are held at a time: what fits the cache, or fills a GPU.
CPU_GROUP, GPU_GROUP = 2**12, 2**17

FeatureState = tuple[Tensor, Tensor]


class Group(NamedTuple):
    """Some chunks in compute type. What does not exist or lies behind the end is zero, and neither read nor written."""

    q: Tensor  # [c, B, H, L, F], scaled
    k: Tensor
    v: Tensor  # [c, B, H, L, N + 1], with the column of ones
    hidden: Tensor  # bool [L, L], or [c, B, 1, L, L] with resets: which keys a query does not meet
    late: (
        Tensor | None
    )  # with resets: bool [c, B, 1, L, 1], tokens that do not meet the state at the start of the chunk
    early: Tensor | None  # bool [c, B, 1, L, 1], tokens that do not reach the state at its end
    cut: Tensor | None  # bool [c, B, 1, 1, 1], whether the state at the start does not reach the one at the end


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """See `linear_attention` for the arguments."""
    kv, z = state or (None, None)
    y, kv, z, _ = forward_op(q, k, v, kv, z, None, eps, mask, reset)
    return y.to(v.dtype), (kv, z)


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """See `taylor_attention` for the arguments."""
    kv, z = state or (None, None)
    y, kv, z, _ = forward_op(q, k, v, kv, z, scale, eps, mask, reset)
    return y.to(v.dtype), (kv, z)


@torch.library.custom_op("wkv::taylor_chunked", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H, N], the final kv and z, and the states at all chunk borders [n + 1, B, H, N + 1, E].

    `scale` None means that q and k are features already. A masked token's y is 0.
    """
    y, final_kv, final_z, S = _forward_fake(q, k, v, kv, z, scale, eps, mask, reset)
    _join_state(kv, z, S[0])
    for tokens, chunks in _groups(q):
        x = _group(q, k, v, scale, mask, reset, tokens, S.dtype)
        starts, ends = S[chunks], S[chunks.start + 1 : chunks.stop + 1]
        ends.copy_(_hide(x.v, x.early).mT @ _features(x.k, scale).mT)
        for i in range(len(starts)):
            ends[i] += _hide(starts[i], None if x.cut is None else x.cut[i])
        Y = _weights(x, scale)[1] @ x.v + _hide(_features(x.q, scale).mT @ starts.mT, x.late)
        _from_chunks(Y[..., :-1] / _denominator(x, Y[..., -1:], eps), y[:, tokens])
    if mask is not None:
        y.masked_fill_(~mask[:, :, None, None], 0)
    return y, final_kv.copy_(S[-1, ..., :-1, :]), final_z.copy_(S[-1, ..., -1, :]), S


@forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = common.compute_dtype(q, k, v, kv, z)
    batch, length, heads, size = v.shape
    features = _feature_count(q.shape[3], scale)
    final = v.new_empty(batch, heads, size, features, dtype=dtype)
    borders = (length + CHUNK - 1) // CHUNK + 1
    S = final.new_empty(borders, batch, heads, size + 1, features)
    return v.new_empty(v.shape), final, final.new_empty(batch, heads, features), S


@torch.library.custom_op("wkv::taylor_chunked_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their own types and of the initial kv and z, from those of y and of the final ones.

    `S` is what `forward_op` returned fourth.
    """
    dq, dk, dv, d_kv_0, d_z_0 = _backward_fake(dy, d_kv, d_z, S, q, k, v, scale, eps, mask, reset)
    dS = _join_state(d_kv, d_z, torch.empty_like(S[0]))
    for tokens, chunks in reversed(list(_groups(q))):
        x = _group(q, k, v, scale, mask, reset, tokens, S.dtype)
        dy_group = _to_chunks(_existing(dy[:, tokens], mask, tokens), S.dtype)
        dS, *grads = _group_gradients(x, dy_group, S[chunks], dS, scale, eps)
        for grad, whole in zip(grads, (dq, dk, dv), strict=True):
            _from_chunks(grad, whole[:, tokens])
    if mask is not None:
        for whole in (dq, dk, dv):
            whole.masked_fill_(~mask[:, :, None, None], 0)
    return dq, dk, dv, d_kv_0.copy_(dS[..., :-1, :]), d_z_0.copy_(dS[..., -1, :])


@backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, batch, heads, rows, features = S.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, S.new_empty(batch, heads, rows - 1, features), S.new_empty(batch, heads, features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kv, z, ctx.scale, ctx.eps, mask, reset = inputs
    ctx.save_for_backward(output[3], q, k, v, mask, reset)
    ctx.state_types = [None if x is None else x.dtype for x in (kv, z)]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, d_kv: Tensor | None, d_z: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    S, q, k, v, mask, reset = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, *d_state = backward_op(dy, d_kv, d_z, S, q, k, v, ctx.scale, ctx.eps, mask, reset)
    d_state = [None if dtype is None else x.to(dtype) for x, dtype in zip(d_state, ctx.state_types, strict=True)]
    return dq, dk, dv, *d_state, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
for _op in (forward_op, backward_op):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)


def _group_gradients(
    x: Group, dy: Tensor, starts: Tensor, dS: Tensor, scale: float | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the state before the group and of its q, k and v, from those of y and of the state behind it.

    With d = dy / den the gradient of Y is [d, -d . y], and d . y is gathered from the products with d that the
    gradients of the weights and of phi(q) need in any case: y itself is not computed again.
    """
    slope, W = _weights(x, scale)
    phi_q = _features(x.q, scale)
    old = _hide(phi_q.mT @ starts[..., -1:, :].mT, x.late)
    den = _denominator(x, W @ x.v[..., -1:] + old, eps)
    d = dy / den
    dW = d @ x.v[..., :-1].mT
    d_phi_q = _hide(starts[..., :-1, :].mT @ d.mT, x.late, time=-1)
    d_den = -((W * dW).sum(-1) + (phi_q * d_phi_q).sum(-2))[..., None] / den
    dY = torch.cat((d, d_den), -1)
    d_phi_q += _hide(starts[..., -1:, :].mT @ d_den.mT, x.late, time=-1)
    dS_all = _state_gradients(_hide(dY, x.late).mT @ phi_q.mT, dS, x.cut)
    ends = dS_all[1:]
    dv = W.mT @ d + _hide(_features(x.k, scale).mT @ ends[..., :-1, :].mT, x.early)
    d_phi_k = _hide(ends.mT @ x.v.mT, x.early, time=-1)
    ds = dW.addcmul_(d_den, x.v[..., -1:].mT)
    ds = ds.mul_(slope) if slope is not None else ds
    ds = ds.masked_fill_(x.hidden, 0)
    dq = _add_feature_gradients(ds @ x.k, d_phi_q, x.q, scale)
    dk = _add_feature_gradients(ds.mT @ x.q, d_phi_k, x.k, scale)
    return dS_all[0], dq, dk, dv


def _state_gradients(d_starts: Tensor, dS: Tensor, cut: Tensor | None) -> Tensor:
    """Gradients of the states at the borders of c chunks, [c + 1, ...], from what their own tokens add and the last."""
    out = torch.cat((d_starts, dS[None]))
    for i in reversed(range(len(d_starts))):
        out[i] += _hide(out[i + 1], None if cut is None else cut[i])
    return out


def _weights(x: Group, scale: float | None) -> tuple[Tensor | None, Tensor]:
    """dW/ds (None where it is 1) and the weights W, [c, B, H, L, L]; W is zero where a query does not meet a key."""
    s = x.q @ x.k.mT
    if scale is None:
        return None, s.masked_fill_(x.hidden, 0)
    slope = s + 1
    return slope, s.copy_(slope).mul_(slope).add_(1).mul_(0.5).masked_fill_(x.hidden, 0)


def _denominator(x: Group, weights: Tensor, eps: float) -> Tensor:
    """The sums of weights [c, B, H, L, 1] and eps; not 0 where there is no token, whatever eps."""
    return weights + eps + (1 - x.v[..., -1:])


def _features(x: Tensor, scale: float | None) -> Tensor:
    """phi of scaled x [c, B, H, L, F], [c, B, H, E, L]; x itself if it is features already."""
    if scale is None:
        return x.mT
    x = x.mT.contiguous()
    size = x.shape[-2]
    phi = x.new_empty(*x.shape[:-2], _feature_count(size, scale), x.shape[-1])
    phi[..., :1, :] = 1
    phi[..., 1 : size + 1, :] = x
    for i, rows in _pair_rows(size):
        torch.mul(x[..., i : i + 1, :], x[..., i:, :], out=phi[..., rows, :])
        phi[..., rows.start, :] *= math.sqrt(0.5)
    return phi


def _add_feature_gradients(dx: Tensor, d_phi: Tensor, x: Tensor, scale: float | None) -> Tensor:
    """The gradient of x before scaling: dx [c, B, H, L, F] from the weights, and what d_phi [c, B, H, E, L] adds."""
    if scale is None:
        return dx.add_(d_phi.mT)
    x, size = x.mT.contiguous(), x.shape[-1]
    out = d_phi[..., 1 : size + 1, :]
    for i, rows in _pair_rows(size):
        d_pairs = d_phi[..., rows, :]
        d_pairs[..., 0, :] *= math.sqrt(0.5)  # and x_i x_i counts twice, once for each factor
        out[..., i:, :].addcmul_(d_pairs, x[..., i : i + 1, :])
        out[..., i, :] += (d_pairs * x[..., i:, :]).sum(-2)
    return dx.add_(out.mT).mul_(math.sqrt(scale))


def _feature_count(size: int, scale: float | None) -> int:
    return size if scale is None else 1 + size + size * (size + 1) // 2


def _pair_rows(size: int) -> Iterator[tuple[int, slice]]:
    """Every i with the features x_i x_j for j = i, i + 1, ..., size - 1."""
    start = 1 + size
    for i in range(size):
        yield i, slice(start, start + size - i)
        start += size - i


def _groups(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """The tokens and the chunks of every group."""
    batch, length, heads, _ = q.shape
    group = CPU_GROUP if q.device.type == "cpu" else GPU_GROUP
    step = max(group // (batch * heads * CHUNK), 1) * CHUNK
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(start // CHUNK, (stop + CHUNK - 1) // CHUNK)


def _group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    mask: Tensor | None,
    reset: Tensor | None,
    tokens: slice,
    dtype: torch.dtype,
) -> Group:
    v = pad(v[:, tokens].to(dtype), (0, 1), value=1.0)
    q, k, v = (_to_chunks(_existing(x, mask, tokens), dtype) for x in (q[:, tokens], k[:, tokens], v))
    if scale is not None:
        q, k = q.mul_(math.sqrt(scale)), k.mul_(math.sqrt(scale))
    future = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu_(1)
    if reset is None:
        return Group(q, k, v, future, None, None, None)
    parts = _to_chunks(reset[:, tokens, None, None], torch.int32).cumsum(-2)  # [c, B, 1, L, 1]
    last = parts[..., -1:, :]
    return Group(q, k, v, (parts != parts.mT) | future, parts != 0, parts != last, last != 0)


def _existing(x: Tensor, mask: Tensor | None, tokens: slice) -> Tensor:
    """x [B, t, H, N] with zeros for tokens that do not exist."""
    return x if mask is None else x.masked_fill(~mask[:, tokens, None, None], 0)


def _hide(x: Tensor, hidden: Tensor | None, time: int = -2) -> Tensor:
    """x with zeros where `hidden` [c, B, 1, L, 1] says so; `time` is the dimension of L in x."""
    if hidden is None:
        return x
    return x.masked_fill(hidden if time == -2 else hidden.mT, 0)


def _to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, t, H, N] to a new tensor [c, B, H, L, N] in `dtype`; zeros fill the last chunk, unless it is alone."""
    size = min(CHUNK, x.shape[1])
    x = pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).clone(memory_format=torch.contiguous_format)


def _from_chunks(x: Tensor, out: Tensor) -> None:
    """Write [c, B, H, L, N] to out [B, t, H, N]."""
    out.copy_(x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : out.shape[1]])


def _join_state(kv: Tensor | None, z: Tensor | None, out: Tensor) -> Tensor:
    """kv and z, or zeros for one that is absent, as rows of one tensor [B, H, N + 1, E]."""
    out[..., :-1, :] = 0 if kv is None else kv
    out[..., -1, :] = 0 if z is None else z
    return out
