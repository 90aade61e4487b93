"""Bi-WKV on the CPU in C++ (native/kernels/bi_wkv.cpp), differentiated by hand; time and memory linear in T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wkv import native
from wkv.ops import common
from wkv.ops.native_wkv4 import dense, pointers, segments, sizes, storable


def run(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `bi_wkv` for the arguments."""
    y, _ = forward_op(log_w, u, storable(k), storable(v), mask)
    return y.to(v.dtype)


@torch.library.custom_op("wkv::bi_wkv_native", mutates_args=())
def forward_op(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, C], and (max, num, den) over all tokens to the right of every segment's end, [B, n, 3, C]."""
    dtype = common.compute_dtype(log_w, u, k, v)
    log_w, u, k, v, mask = dense(log_w, dtype), dense(u, dtype), dense(k), dense(v), dense(mask)
    batch, length, channels = k.shape
    y, states = torch.empty_like(v), k.new_empty(batch, segments(length), 3, channels, dtype=dtype)
    native.function("bi_wkv_forward", "iiiiiii" + "p" * 7)(
        *sizes(k, v, dtype), *pointers(log_w, u, k, v, mask, states, y)
    )
    return y, states


@forward_op.register_fake
def _forward_fake(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, channels = k.shape
    states = k.new_empty(batch, segments(length), 3, channels, dtype=common.compute_dtype(log_w, u, k, v))
    return v.new_empty(v.shape), states


@torch.library.custom_op("wkv::bi_wkv_native_backward", mutates_args=())
def backward_op(
    dy: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v in their own types; `states` is the last result of `forward_op`."""
    dtype, types = states.dtype, (log_w.dtype, u.dtype)
    log_w, u, dy = dense(log_w, dtype), dense(u, dtype), dense(dy, v.dtype)
    k, v, mask, states = dense(k), dense(v), dense(mask), dense(states)
    batch, length, channels = k.shape
    scratch, rows = states.new_empty(batch, segments(length), 6, channels), states.new_empty(2, batch, channels)
    grads = [torch.empty_like(x) for x in (log_w, u, k, v)]
    native.function("bi_wkv_backward", "iiiiiii" + "p" * 14)(
        *sizes(k, v, dtype), *pointers(dy, log_w, u, k, v, mask, states, scratch, *rows, *grads)
    )
    return grads[0].to(types[0]), grads[1].to(types[1]), grads[2], grads[3]


@backward_op.register_fake
def _backward_fake(
    dy: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_log_w, du, dk, dv = (x.new_empty(x.shape) for x in (log_w, u, k, v))
    return d_log_w, du, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(dy, *ctx.saved_tensors), None


forward_op.register_autograd(_backward, setup_context=_setup_context)
for _op in (forward_op, backward_op):
    _op.register_autocast("cpu", torch.float32)
