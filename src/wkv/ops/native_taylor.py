"""Linear attention and its Taylor form on the CPU in C++ (native/kernels/taylor*.cpp), differentiated by hand.

Chunks of `CHUNK` tokens as in `taylor_chunked`, one head at a time; a single token is one pass over its state. Inputs
of any floating type are read as they are; arithmetic and states are float32, or float64 if any argument is. The forward
pass keeps the state before every chunk for the backward pass. Results do not depend on the number of threads.
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
from wkv.ops.native_wkv4 import ELEMENTS, dense, pointers, storable

CHUNK = 64  # as in native/src/taylor.h
SIGNATURE = "p" * 10 + "i" * 7 + "dd"  # of both functions of native/src/taylor_api.cpp

FeatureState = tuple[Tensor, Tensor]


def unusable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`; None where they can. Older builds of the library do not have them."""
    reason = native.unusable(device)
    if reason is None:
        try:
            native.function("wkv_taylor_forward", SIGNATURE)
        except WkvError as error:
            reason = str(error)
    return reason


unusable.__dict__["_dynamo_marked_constant"] = True  # as in wkv.native: torch.compile does not trace the loading


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """The native form of `wkv.ops.linear_attention`; see there for the arguments. A masked token's y is 0."""
    return taylor(q, k, v, state, 0.0, eps, mask, reset)


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
    """The native form of `wkv.ops.taylor_attention`; see there for the arguments. A masked token's y is 0."""
    kv, z = state or (None, None)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, kv, z))
    y, kv, z, _ = forward_op(storable(q), storable(k), storable(v), kv, z, scale, eps, mask, reset, keep)
    return y.to(v.dtype), (kv, z)


@torch.library.custom_op("wkv::taylor_native", mutates_args=(), device_types="cpu")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H, N], the final kv and z, and the states before all chunks, [n B H, E (padded N + 1)].

    `scale` 0 means that q and k are features already. Without `keep` the last is empty.
    """
    y, final_kv, final_z, starts = outputs = _forward_fake(q, k, v, kv, z, scale, eps, mask, reset, keep)
    given = dense(kv, starts.dtype), dense(z, starts.dtype), dense(mask), dense(reset)
    written = pointers(y, final_kv, final_z, starts if keep else None)
    _call("wkv_taylor_forward", (q, k, v, None), given, written, starts.dtype, scale, eps)
    return outputs


@forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = common.compute_dtype(q, k, v, kv, z)
    final_kv, final_z = _new_state(q, v, scale, dtype)
    batch, time, heads, size = v.shape
    count = (time + CHUNK - 1) // CHUNK * batch * heads if keep else 0
    starts = final_kv.new_empty(count, final_z.shape[2] * ((size + 15) // 16 * 16 + 1))
    return v.new_empty(v.shape), final_kv, final_z, starts


@torch.library.custom_op("wkv::taylor_native_backward", mutates_args=(), device_types="cpu")
def backward_op(
    dy: Tensor | None,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    starts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their types, and of the initial kv and z in the type of `starts`."""
    *grads, d_kv_0, d_z_0 = outputs = _backward_fake(dy, d_kv, d_z, starts, q, k, v, scale, eps, mask, reset)
    given = dense(d_kv, starts.dtype), dense(d_z, starts.dtype), dense(mask), dense(reset)
    written = [(ctypes.c_void_p * 3)(*pointers(*grads)), *pointers(d_kv_0, d_z_0, starts)]
    _call("wkv_taylor_backward", (q, k, v, dy), given, written, starts.dtype, scale, eps)
    return outputs


@backward_op.register_fake
def _backward_fake(
    dy: Tensor | None,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    starts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, *_new_state(q, v, scale, starts.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kv, z, ctx.scale, ctx.eps, mask, reset, _ = inputs
    ctx.save_for_backward(output[3], q, k, v, mask, reset)
    ctx.state_types = [None if x is None else x.dtype for x in (kv, z)]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, d_kv: Tensor | None, d_z: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    starts, q, k, v, mask, reset = ctx.saved_tensors
    dq, dk, dv, *d_state = backward_op(dy, d_kv, d_z, starts, q, k, v, ctx.scale, ctx.eps, mask, reset)
    d_state = [None if dtype is None else x.to(dtype) for x, dtype in zip(d_state, ctx.state_types, strict=True)]
    return dq, dk, dv, *d_state, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def _new_state(q: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> FeatureState:
    """kv [B, H, N, E] and z [B, H, E], by shape arithmetic that also works on symbolic sizes."""
    batch, _, heads, size = v.shape
    width = q.shape[3]
    features = width if scale == 0 else 1 + width + width * (width + 1) // 2
    return v.new_empty(batch, heads, size, features, dtype=dtype), v.new_empty(batch, heads, features, dtype=dtype)


def _call(
    function: str,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    given: tuple[Tensor | None, ...],
    written: Sequence[Any],
    dtype: torch.dtype,
    scale: float,
    eps: float,
) -> None:
    """Call a C function of native/src/taylor_api.cpp; `rows` as in enum TaylorName of taylor.h."""
    q, k, v, dy = rows
    compact = [dense(q), dense(k), dense(v), None if dy is None else dense(dy, v.dtype)]
    table = (ctypes.c_void_p * 4)(*pointers(*compact))
    types = (ctypes.c_int64 * 4)(*(0 if x is None else ELEMENTS[x.dtype] for x in compact))
    arguments = [table, types, *pointers(*given), *written]
    numbers = [*q.shape, v.shape[3], int(dtype == torch.float64), native.num_threads()]
    native.function(function, SIGNATURE)(*arguments, *numbers, scale, eps)
