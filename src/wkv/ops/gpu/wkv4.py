"""WKV-4 on GPUs in Triton, differentiated by hand; the algebra is in `kernels.wkv4`.

The forward pass keeps the state before every chunk of `CHUNK` tokens for the backward pass, which computes the others
again. How sums are ordered depends on T alone. Arithmetic and states are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wkv.ops import gpu

# One thread per channel and chunk: one sequence of 4096 tokens and 768 channels keeps 132 multiprocessors busy, and
# the chain over its chunks is no longer than a chunk.
CHUNK = 64
GROUP = 8  # tokens loaded at once: enough reads in flight, and all that the backward pass keeps fits in registers
AHEAD = 4  # chunks that a chain loads at once
BLOCK = 64  # channels of a program, one per thread
WARPS = 2

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
    """The Triton form of `wkv.ops.wkv4`; see there for the arguments. A masked token's y is 0."""
    num, den, top = state or (None, None, None)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (log_w, u, k, v, num, den, top))
    y, num, den, top, _ = forward_op(log_w, u, k, v, num, den, top, mask, reset, learns)
    return y, (num, den, top.detach())


@torch.library.custom_op("wkv::wkv4_triton", mutates_args=())
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, C], the final num, den and max [B, C], and the states before all chunks [B, n, 5, C].

    The last holds max, num, den and the derivatives of num and den by log_w; it is empty without `keep`.
    """
    from wkv.ops.gpu.kernels import wkv4 as kernels

    outputs = _forward_fake(log_w, u, k, v, num, den, top, mask, reset, keep)
    y, end_num, end_den, end_top, states = outputs
    log_w, u, k, v = (x.contiguous() for x in (log_w, u, k, v))
    start = tuple(None if x is None else x.contiguous() for x in (num, den, top))
    mask, reset = gpu.flags(mask, reset)
    batch, length, channels = k.shape
    count, planes = chunks(length), 6 if keep else 4
    borders: Tensor | None = states if keep else None
    if count > 1 and not keep:
        borders = states.new_empty(batch, count, 3, channels)
    if borders is not None:
        sums = states.new_empty(batch, count - 1, planes, channels)
        if count > 1:
            arguments = (log_w, k, v, mask, reset, sums)
            launch_tokens(kernels.chunk_sums, arguments, batch, length, channels, count - 1, PLANES=planes)
        launch_chain(kernels.chain, (log_w, sums, *start, borders), borders, PLANES=planes, LEAST=0.0, REVERSE=False)
    arguments = (log_w, u, k, v, mask, reset, *start, borders, y, end_num, end_den, end_top)
    group = min(GROUP, 1 << (length - 1).bit_length())  # a single token is the usual case
    launch_tokens(kernels.outputs, arguments, batch, length, channels, count, PLANES=planes - 1, GROUP=group)
    return outputs


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = k.shape
    end_num, end_den, end_top = (k.new_empty(batch, channels, dtype=torch.float32) for _ in range(3))
    states = end_num.new_empty(batch, chunks(length) if keep else 0, 5, channels)
    return v.new_empty(v.shape), end_num, end_den, end_top, states


@torch.library.custom_op("wkv::wkv4_triton_backward", mutates_args=())
def backward_op(
    dy: Tensor | None,
    d_num: Tensor | None,
    d_den: Tensor | None,
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
    """Gradients of log_w, u, k, v in their own types, and of the initial num, den and max [B, 3, C] (B = 0 without).

    `end_top` is the final max and `states` the last result of `forward_op`.
    """
    from wkv.ops.gpu.kernels import wkv4_backward as kernels

    log_w, u, k, v = (x.contiguous() for x in (log_w, u, k, v))
    given = (dy, d_num, d_den, num, den, top)
    dy, d_num, d_den, num, den, top = (None if x is None else x.contiguous() for x in given)
    mask, reset = gpu.flags(mask, reset)
    batch, length, channels = k.shape
    count, new = chunks(length), states.new_empty
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    d_start = new(0 if num is None else batch, 3, channels)
    marks, back = new(batch, count * (CHUNK // GROUP), 3, channels), new(batch, count, 4, channels)
    partial = new(batch, count, 2, channels)

    tokens, sizes = (log_w, u, k, v, mask, reset), (batch, length, channels, count)
    launch_tokens(kernels.backward_sums, (*tokens, states, dy, d_num, d_den, marks, back, partial), *sizes)
    arguments = (log_w, num, den, top, end_top, d_num, d_den, back, d_start)
    launch_chain(kernels.backward_chain, arguments, back)
    launch_tokens(kernels.backward_tokens, (*tokens, marks, dy, back, dk, dv), *sizes)
    d_log_w, du = (x.sum((0, 1)) for x in partial.unbind(2))
    return d_log_w.to(log_w.dtype), du.to(u.dtype), dk, dv, d_start


@backward_op.register_fake
def _backward_fake(
    dy: Tensor | None,
    d_num: Tensor | None,
    d_den: Tensor | None,
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
    return d_log_w, du, dk, dv, states.new_empty(0 if num is None else k.shape[0], 3, k.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_num: Tensor | None, d_den: Tensor | None, *_: None) -> tuple[Any, ...]:
    *given, end_top, states = ctx.saved_tensors
    *grads, d_start = backward_op(dy, d_num, d_den, *given, end_top, states)
    start = given[4:7]
    if start[0] is None:
        return *grads, *(None,) * 6
    return *grads, *(g.to(x.dtype) for g, x in zip(d_start.unbind(1), start, strict=True)), None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def chunks(length: int) -> int:
    """How many chunks `length` tokens make."""
    return (length + CHUNK - 1) // CHUNK


def launch_tokens(
    kernel: Any,
    arguments: tuple[Tensor | None, ...],
    batch: int,
    length: int,
    channels: int,
    count: int,
    **options: Any,
) -> None:
    """Run a kernel over the tokens of `count` chunks, one thread per row, chunk and channel."""
    items = batch * count * channels
    options = {"CHUNK": CHUNK, "GROUP": GROUP, "BLOCK": BLOCK, "num_warps": WARPS} | options
    gpu.launch(kernel, grid(items), *arguments, length, channels, count, min(CHUNK, length), items, **options)


def launch_chain(kernel: Any, arguments: tuple[Tensor | None, ...], borders: Tensor, **options: Any) -> None:
    """Run a kernel over the chunks of `borders` [B, n, planes, C], one thread per row and channel."""
    batch, count, _, channels = borders.shape
    options |= {"GROUP": AHEAD, "BLOCK": BLOCK, "num_warps": WARPS}
    items = batch * channels
    gpu.launch(kernel, grid(items), *arguments, count - 1, channels, items, **options)


def grid(items: int) -> tuple[int]:
    """The programs that give every item a thread."""
    return ((items + BLOCK - 1) // BLOCK,)
