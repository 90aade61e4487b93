"""WKV-4 on the CPU in C++ (native/kernels/wkv4.cpp), differentiated by hand.

The forward pass keeps (max, num, den) at the border of every 16 tokens; the backward pass computes the states in
between again. Batch rows and blocks of channels are shared out to the threads; no sum depends on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wkv import native
from wkv.ops import common

SEGMENT = 16  # tokens between two kept states, as in native/src/channel_scan.h
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

State4 = tuple[Tensor, Tensor, Tensor]


def run(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: State4 | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, State4]:
    """See `wkv4` for the arguments."""
    num, den, top = state or (None, None, None)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (log_w, u, k, v, num, den, top))
    y, num, den, top, _ = forward_op(log_w, u, storable(k), storable(v), num, den, top, mask, reset, learns)
    return y.to(v.dtype), (num, den, top.detach())


@torch.library.custom_op("wkv::wkv4_native", mutates_args=())
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
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, C], the final num, den and max [B, C], and (max, num, den) at the borders [B, n, 3, C].

    Without `keep_states` the last is empty, n = 0, and there is nothing to differentiate with.
    """
    dtype = common.compute_dtype(log_w, u, k, v, num, den, top)
    log_w, u, num, den, top = (dense(x, dtype) for x in (log_w, u, num, den, top))
    k, v, mask, reset = (dense(x) for x in (k, v, mask, reset))
    batch, length, channels = k.shape
    y = torch.empty_like(v)
    end_num, end_den, end_top = (k.new_empty(batch, channels, dtype=dtype) for _ in range(3))
    states = k.new_empty(batch, segments(length) if keep_states else 0, 3, channels, dtype=dtype)
    native.function("wkv4_forward", "iiiiiii" + "p" * 14)(
        *sizes(k, v, dtype),
        *pointers(log_w, u, k, v, mask, reset, num, den, top, states if keep_states else None),
        *pointers(y, end_num, end_den, end_top),
    )
    return y, end_num, end_den, end_top, states


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
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = k.shape
    final = k.new_empty(batch, channels, dtype=common.compute_dtype(log_w, u, k, v, num, den, top))
    states = final.new_empty(batch, segments(length) if keep_states else 0, 3, channels)
    return v.new_empty(v.shape), final, torch.empty_like(final), torch.empty_like(final), states


@torch.library.custom_op("wkv::wkv4_native_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    d_num: Tensor,
    d_den: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    end_top: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v in their own types, and of the initial num, den and max [3, B, C] (0 without).

    `end_top` is the final max and `states` the last result of `forward_op`.
    """
    dtype = states.dtype
    types = log_w.dtype, u.dtype
    dy, states = dense(dy, v.dtype), dense(states)
    log_w, u, num, den, top, end_top, d_num, d_den = (
        dense(x, dtype) for x in (log_w, u, num, den, top, end_top, d_num, d_den)
    )
    k, v, mask, reset = (dense(x) for x in (k, v, mask, reset))
    row = (k.shape[0], k.shape[2])
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    d_log_w, du, rows = torch.empty_like(log_w), torch.empty_like(u), states.new_empty(2, *row)
    d_start = states.new_empty(3, *row) if num is not None else states.new_zeros(3, *row)
    inputs = (dy, d_num, d_den, log_w, u, k, v, mask, reset, num, den, top, end_top, states)
    native.function("wkv4_backward", "iiiiiii" + "p" * 23)(
        *sizes(k, v, dtype), *pointers(*inputs, *rows, d_log_w, du, dk, dv, *d_start)
    )
    return d_log_w.to(types[0]), du.to(types[1]), dk, dv, d_start


@backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    d_num: Tensor,
    d_den: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    end_top: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_log_w, du, dk, dv = (x.new_empty(x.shape) for x in (log_w, u, k, v))
    return d_log_w, du, dk, dv, states.new_empty(3, *end_top.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_num: Tensor | None, d_den: Tensor | None, *_: None) -> tuple[Any, ...]:
    log_w, u, k, v, num, den, top, mask, reset, end_top, states = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    d_num, d_den = (torch.zeros_like(end_top) if g is None else g for g in (d_num, d_den))
    start = (num, den, top)
    *grads, d_start = backward_op(dy, d_num, d_den, log_w, u, k, v, *start, mask, reset, end_top, states)
    d_state = (None if x is None else g.to(x.dtype) for g, x in zip(d_start.unbind(), start, strict=True))
    return *grads, *d_state, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
for _op in (forward_op, backward_op):
    _op.register_autocast("cpu", torch.float32)


def segments(length: int) -> int:
    """How many segments `length` tokens make."""
    return (length + SEGMENT - 1) // SEGMENT


def storable(x: Tensor) -> Tensor:
    """`x` in a type the kernels read: float32 for anything smaller than the usual half precisions."""
    return x if x.dtype in ELEMENTS else x.float()


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """`x` contiguous, in `dtype` if given; None stays None."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def sizes(k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """The seven numbers every channelwise kernel starts with."""
    return *k.shape, int(dtype == torch.float64), ELEMENTS[k.dtype], ELEMENTS[v.dtype], native.num_threads()


def pointers(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Addresses of contiguous tensors."""
    return tuple(None if x is None else x.data_ptr() for x in tensors)
