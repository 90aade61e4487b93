"""WKV-6 and WKV-5 on GPUs, in Triton (kernels/linear.py and kernels/linear_backward.py), for any log-decay <= 0.

Training and prefill run over chunks of the sequence: one kernel passes the state from chunk to chunk and keeps it at
all borders, another computes the outputs of all chunks at once. Short sequences that need no gradients run token by
token in one kernel. The backward pass sends the state's gradient through the chunks in the same way, then computes the
gradients of all chunks at once, everything but the kept states again from the inputs.

Inputs of any of float32, bfloat16 and float16 are read as they are; sums, decays and the state are float32. Products
of matrices take bfloat16 where v is bfloat16, and so do the states kept at the borders of chunks; else they take tf32
once (float16) or three times (float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.ops import gpu

SHORT = 16  # tokens that run one by one where no gradient is needed


class Blocks(NamedTuple):
    """How the kernels cut a sequence and a head of some size and type, and nothing else: so does the order of sums."""

    length: int  # tokens of a chunk
    state_keys: int  # of one program that passes states
    state_warps: int
    mix_keys: int  # that one program mixes at a time
    mix_warps: int
    keys: int  # of one program that differentiates
    values: int  # that it reads at a time
    warps: int  # that differentiate


# By size of heads, for products of bfloat16 or tf32, and of tf32 three times: as large as registers allow
# (benchmarks/gpu/compile.py lists what spills), and the shared memory of an A100.
BLOCKS = {
    16: Blocks(64, 16, 4, 16, 4, 16, 16, 4),
    32: Blocks(64, 32, 4, 32, 4, 32, 32, 8),
    64: Blocks(64, 32, 4, 64, 4, 32, 32, 8),
    128: Blocks(64, 32, 4, 64, 8, 32, 64, 8),
    256: Blocks(32, 32, 8, 64, 8, 32, 64, 8),
}
FLOAT32_BLOCKS = {
    16: Blocks(64, 16, 4, 16, 4, 16, 16, 4),
    32: Blocks(64, 32, 8, 32, 4, 16, 16, 4),
    64: Blocks(64, 32, 8, 32, 8, 16, 32, 4),
    128: Blocks(64, 16, 8, 32, 8, 16, 32, 4),
    256: Blocks(32, 16, 8, 32, 8, 64, 32, 8),
}


def run(
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
    arguments = (r, log_w, k, v, u, state, mask, reset)
    if r.shape[1] <= SHORT and not _needs_grad(r, log_w, k, v, u, state):
        y, final = recurrent_op(*arguments)
    else:
        y, final, _ = forward_op(*arguments)
    return y, final


def unfit(arguments: Sequence[Tensor | None]) -> str | None:
    """Why the kernels cannot take these arguments, r first; None where they can."""
    assert arguments[0] is not None
    return gpu.unfit(arguments, arguments[0].shape[-1])


@torch.library.custom_op("wkv::linear_triton_recurrent", mutates_args=())
def recurrent_op(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, N] and the final state [B, H, N, N], token by token, without gradients."""
    from wkv.ops.gpu.kernels.linear import recur

    y, final = _recurrent_fake(r, log_w, k, v, u, state, mask, reset)
    batch, length, heads, size = r.shape
    values = min(size, max(1024 // size, 4))
    gpu.launch(
        recur,
        (batch * heads * (size // values),),
        *_compact(r, log_w, k, v, u, state),
        y,
        final,
        *gpu.flags(mask, reset),
        length,
        heads,
        N=size,
        V=values,
        CONSTANT=log_w.ndim == 2,
        num_warps=1,
    )
    return y, final


@recurrent_op.register_fake
def _recurrent_fake(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _new_state(r)


@torch.library.custom_op("wkv::linear_triton", mutates_args=())
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
    """y [B, T, H, N], the final state [B, H, N, N], and the states at the starts of all chunks [B, H, n, N, N]."""
    y, final, starts = _forward_fake(r, log_w, k, v, u, state, mask, reset)
    r, log_w, k, v, u, state = _compact(r, log_w, k, v, u, state)
    operands = gpu.operands(v.dtype)
    _pass_states(v, k, log_w, state, starts, final, mask, reset, operands, backward=False)
    _mix(r, k, log_w, u, v, starts, y, mask, reset, operands, backward=False)
    return y, final, starts


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
    return v.new_empty(v.shape), _new_state(r), _new_borders(v)


@torch.library.custom_op("wkv::linear_triton_backward", mutates_args=())
def backward_op(
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
    """Gradients of r, log_w, k, v, u in their types, and of the initial state in float32."""
    outputs = _backward_fake(dy, d_final, starts, r, log_w, k, v, u, mask, reset)
    dr, dlog_w, dk, dv, du, d_state = outputs
    dy = torch.zeros_like(v) if dy is None else dy
    r, log_w, k, v, u, dy, d_final, starts = _compact(r, log_w, k, v, u, dy, d_final, starts)
    ends, operands = _new_borders(v), gpu.operands(v.dtype)
    _pass_states(dy, r, log_w, d_final, ends, d_state, mask, reset, operands, backward=True)
    _mix(r, k, log_w, u, dy, ends, dv, mask, reset, operands, backward=True)
    _differentiate(r, log_w, k, v, u, dy, starts, ends, (dr, dlog_w, dk, du), mask, reset)
    return outputs


@backward_op.register_fake
def _backward_fake(
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
    return dr, dlog_w, dk, dv, du, _new_state(r)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rows, state, mask, reset = inputs
    ctx.save_for_backward(output[2], *rows, mask, reset)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *grads, d_state = backward_op(dy, d_final, *ctx.saved_tensors)
    return (*grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def _pass_states(
    x: Tensor,
    z: Tensor,
    log_w: Tensor,
    initial: Tensor | None,
    borders: Tensor,
    final: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    operands: str,
    *,
    backward: bool,
) -> None:
    from wkv.ops.gpu.kernels.linear import pass_states

    batch, length, heads, size = x.shape
    cut = _blocks(size, operands)
    gpu.launch(
        pass_states,
        (batch * heads * (size // cut.state_keys),),
        *(x, z, log_w, initial, borders, final),
        *gpu.flags(mask, reset),
        length,
        heads,
        L=cut.length,
        N=size,
        K=cut.state_keys,
        CONSTANT=log_w.ndim == 2,
        BACKWARD=backward,
        OPERANDS=operands,
        num_warps=cut.state_warps,
    )


def _mix(
    r: Tensor,
    k: Tensor,
    log_w: Tensor,
    u: Tensor,
    x: Tensor,
    borders: Tensor,
    out: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    operands: str,
    *,
    backward: bool,
) -> None:
    from wkv.ops.gpu.kernels.linear import mix

    batch, length, heads, size = x.shape
    cut = _blocks(size, operands)
    gpu.launch(
        mix,
        (batch * heads * borders.shape[2],),
        *(r, k, log_w, u, x, borders, out),
        *gpu.flags(mask, reset),
        length,
        heads,
        L=cut.length,
        N=size,
        K=cut.mix_keys,
        LEVELS=_levels(cut, length),
        CONSTANT=log_w.ndim == 2,
        BACKWARD=backward,
        OPERANDS=operands,
        num_warps=cut.mix_warps,
    )


def _differentiate(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    dy: Tensor,
    starts: Tensor,
    ends: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Write the gradients of r, log_w, k and u."""
    from wkv.ops.gpu.kernels.linear_backward import differentiate

    dr, dlog_w, dk, du = grads
    batch, length, heads, size = r.shape
    operands, constant = gpu.operands(v.dtype), log_w.ndim == 2
    cut = _blocks(size, operands)
    chunks = starts.shape[2]
    # Sums over tokens: the kernel's over a chunk, torch's over all chunks and sequences.
    du_parts, dlog_w_parts = (u.new_empty(batch * chunks, *u.shape, dtype=torch.float32) for _ in range(2))
    gpu.launch(
        differentiate,
        (batch * heads * chunks * (size // cut.keys),),
        *(r, log_w, k, v, u, dy, starts, ends),
        *(dr, dlog_w_parts if constant else dlog_w, dk, du_parts),
        *gpu.flags(mask, reset),
        length,
        heads,
        L=cut.length,
        N=size,
        K=cut.keys,
        V=cut.values,
        LEVELS=_levels(cut, length),
        CONSTANT=constant,
        OPERANDS=operands,
        SUMS="tf32" if operands == "bf16" else operands,
        num_warps=cut.warps,
        num_stages=1 if operands == "tf32x3" else 3,
    )
    du.copy_(du_parts.sum(0))
    if constant:
        dlog_w.copy_(dlog_w_parts.sum(0))


def _blocks(size: int, operands: str) -> Blocks:
    return (FLOAT32_BLOCKS if operands == "tf32x3" else BLOCKS)[int(size)]


def _levels(cut: Blocks, length: int) -> int:
    """How many bits number the tokens of a chunk that there are."""
    return (min(cut.length, length) - 1).bit_length()


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _new_state(r: Tensor) -> Tensor:
    batch, _, heads, size = r.shape
    return r.new_empty(batch, heads, size, size, dtype=torch.float32)


def _new_borders(v: Tensor) -> Tensor:
    """[B, H, chunks, N, N] in the type of matrix operands."""
    batch, length, heads, size = v.shape
    operands = gpu.operands(v.dtype)
    cut, dtype = _blocks(size, operands).length, torch.bfloat16 if operands == "bf16" else torch.float32
    return v.new_empty(batch, heads, (length + cut - 1) // cut, size, size, dtype=dtype)


def _compact(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]
