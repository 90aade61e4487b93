"""Bi-WKV (form "paper") on GPUs in Triton, differentiated by hand; the algebra is in `kernels.bi_wkv`.

Like WKV-4 it runs in chunks of `CHUNK` tokens: the forward pass keeps the sums at their borders, the backward pass
computes the others again. How sums are ordered depends on T alone. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wkv.ops import gpu
from wkv.ops.gpu import wkv4


def run(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The Triton form of `wkv.ops.bi_wkv`; see there for the arguments. A masked token's y is 0."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (log_w, u, k, v))
    y, _, _ = forward_op(log_w, u, k, v, mask, keep)
    return y


@torch.library.custom_op("wkv::bi_wkv_triton", mutates_args=())
def forward_op(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C], and max, num, den over all tokens before and over all behind every chunk, each [B, n, 3, C].

    Without `keep` the latter two are empty.
    """
    from wkv.ops.gpu.kernels import bi_wkv as kernels

    outputs = _forward_fake(log_w, u, k, v, mask, keep)
    y, lefts, rights = outputs
    log_w, u, k, v = (x.contiguous() for x in (log_w, u, k, v))
    (mask,) = gpu.flags(mask)
    batch, length, channels = k.shape
    count = wkv4.chunks(length)
    sizes = (batch, length, channels, count)
    sums = [lefts.new_empty(batch, count - 1, 4, channels) for _ in range(2)]
    if count > 1:
        wkv4.launch_tokens(kernels.chunk_sums, (log_w, k, v, mask, *sums), *sizes)
    if not keep:
        lefts, rights = (lefts.new_empty(batch, count, 3, channels) for _ in range(2))
    _chain(log_w, sums[0], lefts, reverse=False)
    _chain(log_w, sums[1], rights, reverse=True)
    marks = lefts.new_empty(batch, count, wkv4.CHUNK // wkv4.GROUP, 3, channels)
    wkv4.launch_tokens(kernels.outputs, (log_w, u, k, v, mask, lefts, rights, marks, y), *sizes)
    return outputs


@forward_op.register_fake
def _forward_fake(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = k.shape
    shape = batch, wkv4.chunks(length) if keep else 0, 3, channels
    lefts, rights = (k.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), lefts, rights


@torch.library.custom_op("wkv::bi_wkv_triton_backward", mutates_args=())
def backward_op(
    dy: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lefts: Tensor, rights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v in their own types; `lefts` and `rights` are the last results of `forward_op`."""
    from wkv.ops.gpu.kernels import bi_wkv as kernels

    dy, log_w, u, k, v = (x.contiguous() for x in (dy, log_w, u, k, v))
    (mask,) = gpu.flags(mask)
    batch, length, channels = k.shape
    count, new = wkv4.chunks(length), lefts.new_empty
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    marks = new(batch, count, wkv4.CHUNK // wkv4.GROUP, kernels.MARKS.value, channels)
    sums = [new(batch, count - 1, 4, channels) for _ in range(2)]
    borders = [new(batch, count, 3, channels) for _ in range(2)]
    partial = new(batch, count, 2, channels)

    tokens, sizes = (log_w, u, k, v, mask), (batch, length, channels, count)
    wkv4.launch_tokens(kernels.backward_sums, (*tokens, lefts, rights, dy, marks, *sums, partial), *sizes)
    _chain(log_w, sums[0], borders[0], reverse=True, slack=kernels.SLACK.value)
    _chain(log_w, sums[1], borders[1], reverse=False, slack=kernels.SLACK.value)
    wkv4.launch_tokens(kernels.backward_tokens, (*tokens, marks, dy, *borders, dk, dv, partial), *sizes)
    du, d_log_w = (x.sum((0, 1)) for x in partial.unbind(2))
    return d_log_w.to(log_w.dtype), du.to(u.dtype), dk, dv


@backward_op.register_fake
def _backward_fake(
    dy: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lefts: Tensor, rights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_log_w, du, dk, dv = (x.new_empty(x.shape) for x in (log_w, u, k, v))
    return d_log_w, du, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    return *backward_op(dy, *ctx.saved_tensors), None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def _chain(log_w: Tensor, sums: Tensor, borders: Tensor, reverse: bool, slack: float = 0.0) -> None:
    """Fill `borders` [B, n, 3, C] from the `sums` [B, n - 1, 4, C] of chunks, going right, or left if `reverse`."""
    from wkv.ops.gpu.kernels import wkv4 as kernels

    arguments = (log_w, sums, None, None, None, borders)
    wkv4.launch_chain(kernels.chain, arguments, borders, PLANES=4, LEAST=slack, REVERSE=reverse)
