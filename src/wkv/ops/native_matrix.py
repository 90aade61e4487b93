"""WKV-5, WKV-6 and WKV-7 on the CPU in C++ (native/kernels/wkv7*.cpp and linear*.cpp), token by token.

Inputs of any floating type are read as they are; arithmetic and states are float32, or float64 if any argument is.
The forward pass keeps the state before every `SEGMENT`-th token for the backward pass, which computes the states
between them again. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.ops import common

SEGMENT = 32  # as in native/src/matrix.h
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The native form of `wkv.ops.wkv7`; see there for the arguments. A masked token's y is 0."""
    y, final, _ = wkv7_op(r, log_w, k, v, a, b, state, mask, reset, _needs_grad(r, log_w, k, v, a, b, state))
    return y, final


def linear(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """WKV-6 (log_w [B, T, H, N]) and WKV-5 (log_w [H, N]); see `wkv6` and `wkv5`. A masked token's y is 0."""
    y, final, _ = linear_op(r, log_w, k, v, u, state, mask, reset, _needs_grad(r, log_w, k, v, u, state))
    return y, final


@torch.library.custom_op("wkv::wkv7_native", mutates_args=(), device_types="cpu")
def wkv7_op(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, N], the final state [B, H, N, N], and the states at the starts of all segments [n B H, N, N].

    Without `keep` the last is empty.
    """
    outputs = _wkv7_fake(r, log_w, k, v, a, b, state, mask, reset, keep)
    _forward("wkv_wkv7_forward", (r, log_w, k, v, a, b, None), state, mask, reset, outputs)
    return outputs


@wkv7_op.register_fake
def _wkv7_fake(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(v, common.compute_dtype(r, log_w, k, v, a, b, state), keep)


@torch.library.custom_op("wkv::wkv7_native_backward", mutates_args=(), device_types="cpu")
def wkv7_backward_op(
    dy: Tensor | None,
    d_final: Tensor | None,
    starts: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b in their types, and of the initial state in the type of `starts`."""
    outputs = _wkv7_backward_fake(dy, d_final, starts, r, log_w, k, v, a, b, mask, reset)
    rows = (r, log_w, k, v, a, b, dy)
    _backward("wkv_wkv7_backward", rows, d_final, mask, reset, starts, (*outputs[:6], None), outputs[6])
    return outputs


@wkv7_backward_op.register_fake
def _wkv7_backward_fake(
    dy: Tensor | None,
    d_final: Tensor | None,
    starts: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dlog_w, dk, dv, da, db = (x.new_empty(x.shape) for x in (r, log_w, k, v, a, b))
    return dr, dlog_w, dk, dv, da, db, _new_state(r, starts.dtype)


@torch.library.custom_op("wkv::linear_native", mutates_args=(), device_types="cpu")
def linear_op(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three results of `wkv7_op`, for WKV-6 (log_w [B, T, H, N]) and WKV-5 (log_w [H, N])."""
    outputs = _linear_fake(r, log_w, k, v, u, state, mask, reset, keep)
    constant_decay = int(log_w.ndim == 2)
    _forward("wkv_linear_forward", (r, log_w, k, v, u, None, None), state, mask, reset, outputs, constant_decay)
    return outputs


@linear_op.register_fake
def _linear_fake(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(v, common.compute_dtype(r, log_w, k, v, u, state), keep)


@torch.library.custom_op("wkv::linear_native_backward", mutates_args=(), device_types="cpu")
def linear_backward_op(
    dy: Tensor | None,
    d_final: Tensor | None,
    starts: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, u in their types, and of the initial state in the type of `starts`."""
    dr, dlog_w, dk, dv, du, d_state = _linear_backward_fake(dy, d_final, starts, r, log_w, k, v, u, mask, reset)
    constant = log_w.ndim == 2
    # The kernel sums over time in the compute type; rows of a batch are added here, in order.
    by_row = r.new_empty(2, r.shape[0], *u.shape, dtype=starts.dtype)
    grads = (dr, by_row[0] if constant else dlog_w, dk, dv, by_row[1], None, None)
    rows = (r, log_w, k, v, u, None, dy)
    _backward("wkv_linear_backward", rows, d_final, mask, reset, starts, grads, d_state, int(constant))
    if constant:
        dlog_w.copy_(by_row[0].sum(0))
    return dr, dlog_w, dk, dv, du.copy_(by_row[1].sum(0)), d_state


@linear_backward_op.register_fake
def _linear_backward_fake(
    dy: Tensor | None,
    d_final: Tensor | None,
    starts: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dlog_w, dk, dv, du = (x.new_empty(x.shape) for x in (r, log_w, k, v, u))
    return dr, dlog_w, dk, dv, du, _new_state(r, starts.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rows, state, mask, reset, _ = inputs
    ctx.save_for_backward(output[2], *rows, mask, reset)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _differentiate(backward_op: Any, ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    *grads, d_state = backward_op(dy, d_final, *ctx.saved_tensors)
    return (*grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None)


def _wkv7_backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _differentiate(wkv7_backward_op, ctx, dy, d_final)


def _linear_backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _differentiate(linear_backward_op, ctx, dy, d_final)


wkv7_op.register_autograd(_wkv7_backward, setup_context=_setup_context)
linear_op.register_autograd(_linear_backward, setup_context=_setup_context)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _new_state(r: Tensor, dtype: torch.dtype) -> Tensor:
    batch, _, heads, size = r.shape
    return r.new_empty(batch, heads, size, size, dtype=dtype)


def _new_outputs(v: Tensor, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, final and starts of a forward pass, by shape arithmetic that also works on symbolic sizes."""
    batch, time, heads, size = v.shape
    count = (time + SEGMENT - 1) // SEGMENT * batch * heads if keep else 0
    final = _new_state(v, dtype)
    return v.new_empty(v.shape), final, final.new_empty(count, size, size)


def _forward(
    function: str,
    rows: Sequence[Tensor | None],
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    *extra: int,
) -> None:
    """Call a C function `forward`; `rows` as in enum Name of native/src/matrix.h."""
    y, final, starts = outputs
    kept = starts if starts.numel() else None
    others = _compact(None if state is None else state.to(final.dtype), mask, reset, y, final, kept)
    _call(function, _compact(*rows), others[:3], [_address(x) for x in others[3:]], final.dtype, extra)


def _backward(
    function: str,
    rows: Sequence[Tensor | None],
    d_final: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    starts: Tensor,
    grads: Sequence[Tensor | None],
    d_state: Tensor,
    *extra: int,
) -> None:
    """Call a C function `backward`; `rows` and `grads` as in enum Name of native/src/matrix.h."""
    given = _compact(None if d_final is None else d_final.to(starts.dtype), mask, reset)
    written = [_address(starts), _addresses(grads), _address(d_state)]
    _call(function, _compact(*rows), given, written, starts.dtype, extra)


def _call(
    function: str,
    rows: list[Tensor | None],
    given: list[Tensor | None],
    written: list[Any],
    dtype: torch.dtype,
    extra: tuple[int, ...],
) -> None:
    types = (ctypes.c_int64 * len(rows))(*map(_type_code, rows))
    pointers = [_addresses(rows), types, *map(_address, given), *written]
    first = next(x for x in rows if x is not None)
    numbers = [*extra, *first.shape, int(dtype == torch.float64), native.num_threads()]
    native.function(function, "p" * len(pointers) + "i" * len(numbers))(*pointers, *numbers)


def _compact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(_address, tensors))


def _type_code(x: Tensor | None) -> int:
    if x is not None and x.dtype not in _TYPES:
        raise WkvError(f"the native kernels know float32, bfloat16, float16 and float64, found {x.dtype}")
    return 0 if x is None else _TYPES[x.dtype]
