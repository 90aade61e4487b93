"""WKV-7 in matrix products, in plain torch: chunks of a sequence side by side, with a hand-derived backward pass.

The sequence is cut into segments: groups of chunks (`wkv7_segment` has the algebra) whose intermediates fit in the
cache. Only the states at segment starts are kept for the backward pass, the rest is computed again.
The chunks are shortened until the products of their decays fit into floating range, so any log_w <= 0 is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.ops import common
from wkv.ops.wkv7_segment import Arena, differentiate, expand, padded, read, to_chunks

# Below exp(FLOOR) a decay is zero beside rounding. Half a chunk's log-decays may sum to -LIMIT.
FLOOR = {torch.float32: -35.0, torch.float64: -60.0}
LIMIT = {torch.float32: 35.0, torch.float64: 300.0}
# Tokens per chunk and tokens x channels per segment. CPU: measured (benchmarks/wkv7_chunked_vs_reference.py);
# elsewhere few, large launches.
CHUNK, SEGMENT = {"cpu": 16}, {"cpu": 1 << 16}
CHUNK_ELSEWHERE, SEGMENT_ELSEWHERE = 64, 1 << 23

Inputs = tuple[Tensor, ...]  # r, log_w, k, v, a, b


def chunked(
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
    """The chunked form of `wkv7`; see there for the arguments. A masked token's y is 0."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, log_w, k, v, a, b, state))
    y, final, _ = forward_op(r, log_w, k, v, a, b, state, mask, reset, keep)
    return y, final


@torch.library.custom_op("wkv::wkv7_chunked", mutates_args=())
def forward_op(
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
    raw = (r, log_w, k, v, a, b)
    y, final, starts = _forward_fake(*raw, state, mask, reset, keep)
    with torch.autocast(r.device.type, enabled=False):
        inputs, length = _prepare(raw, mask, final.dtype)
        plan = _plan(r.shape, r.device)
        arena = _arena(plan, length, final, backward=False)
        starts_by_segment = starts.view(-1, *final.shape)
        for rows in plan.row_groups():
            S = _state(state, rows, final)
            for i, tokens in enumerate(plan.segments()):
                if keep:
                    starts_by_segment[i, rows].view_as(S).copy_(S)
                segment = expand(arena, _cut(inputs, rows, tokens, length), _cut_reset(reset, rows, tokens, length), S)
                read(segment, y[rows, tokens])
                torch.mul(segment.end, segment.scale[-1], out=S)
            final[rows].view_as(S).copy_(S)
    return y, final, starts


@forward_op.register_fake
def _forward_fake(
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
    batch, _, heads, size = r.shape
    final = r.new_empty(batch, heads, size, size, dtype=common.compute_dtype(r, log_w, k, v, a, b, state))
    # One leading dimension, never 1 in practice: export with symbolic sizes asks whether a dimension is 1.
    count = torch.sym_max(1, _plan(r.shape, r.device).segment_count) * batch * heads if keep else 0
    return v.new_empty(v.shape), final, final.new_empty(count, size, size)


@torch.library.custom_op("wkv::wkv7_chunked_backward", mutates_args=())
def backward_op(
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
    raw = (r, log_w, k, v, a, b)
    *grads, d_state = _backward_fake(dy, d_final, starts, *raw, mask, reset)
    with torch.autocast(r.device.type, enabled=False):
        inputs, length = _prepare(raw, mask, starts.dtype)
        plan = _plan(r.shape, r.device)
        arena = _arena(plan, length, d_state, backward=True)
        starts_by_segment = starts.view(-1, *d_state.shape)
        for rows in plan.row_groups():
            D = _state(d_final, rows, d_state)
            for i, tokens in reversed(list(enumerate(plan.segments()))):
                S = starts_by_segment[i, rows].flatten(0, 1)
                segment = expand(arena, _cut(inputs, rows, tokens, length), _cut_reset(reset, rows, tokens, length), S)
                dy_part = None if dy is None else dy[rows, tokens]
                differentiate(arena, segment, dy_part, D, [grad[rows, tokens] for grad in grads])
            d_state[rows].view_as(D).copy_(D)
        if mask is not None:
            for grad in grads:
                grad.masked_fill_(~mask[:, :, None, None], 0)
        if inputs[1] is not log_w:
            grads[1].masked_fill_(log_w < FLOOR[starts.dtype], 0)
    return (*grads, d_state)


@backward_op.register_fake
def _backward_fake(
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
    return dr, dlog_w, dk, dv, da, db, starts.new_empty(r.shape[0], *r.shape[2:], r.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *raw, state, mask, reset, _ = inputs
    ctx.save_for_backward(*raw, mask, reset, output[2])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *raw, mask, reset, starts = ctx.saved_tensors
    *grads, d_state = backward_op(dy, d_final, starts, *raw, mask, reset)
    return (*grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Plan(NamedTuple):
    """How [B, T] is cut into segments of `rows` sequences x `span` tokens, a whole number of chunks."""

    batch: int
    time: int
    rows: int
    span: int

    @property
    def segment_count(self) -> int:
        return _ceil_div(self.time, self.span)

    def row_groups(self) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, self.batch)) for i in range(0, self.batch, self.rows))

    def segments(self) -> Iterator[slice]:
        return (slice(i, min(i + self.span, self.time)) for i in range(0, self.time, self.span))


def _plan(shape: torch.Size, device: torch.device) -> _Plan:
    """Depends on the shape alone, by plain arithmetic: the fake kernel computes it with symbolic sizes."""
    batch, time, heads, size = shape
    length = CHUNK.get(device.type, CHUNK_ELSEWHERE)
    chunks = max(1, SEGMENT.get(device.type, SEGMENT_ELSEWHERE) // (heads * size * length))
    groups = _ceil_div(batch, max(1, chunks // 4))
    rows = _ceil_div(batch, groups)
    segments = _ceil_div(time, length * (chunks // rows))
    return _Plan(batch, time, rows, length * _ceil_div(_ceil_div(time, segments), length))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _prepare(raw: Inputs, mask: Tensor | None, dtype: torch.dtype) -> tuple[Inputs, int]:
    """Inputs with neutral masked tokens and log_w >= FLOOR, and the chunk length that these log_w allow."""
    if mask is not None:
        hidden = ~mask[:, :, None, None]
        raw = tuple(x.masked_fill(hidden, 0) for x in raw)
    r, log_w, *rest = raw
    low, high = (x.item() for x in torch.aminmax(log_w))
    if low < FLOOR[dtype]:
        log_w, low = log_w.clamp(min=FLOOR[dtype]), FLOOR[dtype]
    length, steepest = min(CHUNK.get(r.device.type, CHUNK_ELSEWHERE), r.shape[1]), max(-low, high)
    while length > 2 and length * steepest > 2 * LIMIT[dtype]:
        length = max(2, length // 2)
    return (r, log_w, *rest), length


def _arena(plan: _Plan, length: int, state: Tensor, backward: bool) -> Arena:
    """Memory for one segment at a time; `state` is any [B, H, N, N]."""
    tokens, groups = min(plan.span, plan.time), plan.rows * state.shape[1]
    return Arena(tokens, length, groups, state.shape[-1], state, backward)


def _state(initial: Tensor | None, rows: slice, like: Tensor) -> Tensor:
    """A private copy [rows x H, N, N] of some rows of an initial state; zeros for None."""
    part = like[rows].flatten(0, 1)
    return torch.zeros_like(part) if initial is None else initial[rows].flatten(0, 1).to(part.dtype, copy=True)


def _cut(inputs: Inputs, rows: slice, tokens: slice, length: int) -> list[Tensor]:
    """A segment of the inputs as views [n, B, H, L, N]."""
    return [to_chunks(padded(x[rows, tokens], length), length) for x in inputs]


def _cut_reset(reset: Tensor | None, rows: slice, tokens: slice, length: int) -> Tensor | None:
    """A segment of the resets, [B, T] with T a whole number of chunks; None if there is no reset in it."""
    part = None if reset is None else reset[rows, tokens]
    return None if part is None or not part.any() else padded(part, length)
