"""WKV-7 on GPUs in Triton (kernels/wkv7.py and wkv7_backward.py): chunks, or token by token where there are few.

Inputs of any floating type but float64 are read as they are. Matrix products take operands of the type that
`gpu.operands` names for the type of v; sums, decays and the state are float32. The forward pass keeps the states at the
starts of chunks for the backward pass, in the operands' type; all else is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wkv.ops import gpu

# Up to so many tokens the recurrence itself is faster than a chunk, whose work does not depend on how full it is.
FEW = 24
# Tokens of a chunk: a matrix of L x N numbers should fit into the registers of one program several times.
CHUNK = {16: 32, 32: 32, 64: 32, 128: 32, 256: 16}


class Sizes(NamedTuple):
    """B, T, H, N of a call, its chunks, and its launch options."""

    batch: int
    time: int
    heads: int
    size: int

    @property
    def length(self) -> int:
        """L, tokens of a chunk."""
        return CHUNK[self.size]

    @property
    def chunks(self) -> int:
        """NT, chunks of a sequence."""
        return -(-self.time // self.length)

    @property
    def total(self) -> int:
        """Chunks of all heads and sequences."""
        return self.batch * self.chunks * self.heads

    @property
    def values(self) -> int:
        """M, value channels that one program of a sequential kernel has: enough programs matter more than reuse."""
        return 16 if self.size == 16 else 32

    @property
    def warps(self) -> int:
        """For programs that hold several [L, N]: what does not spill registers (benchmarks/gpu/compile.py)."""
        return 4 if self.size <= 64 else 8

    def stages(self, kind: torch.dtype) -> int:
        """How many chunks a sequential kernel loads ahead, as far as shared memory goes."""
        return 3 if kind == torch.bfloat16 and self.size <= 64 else 1


def run(
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
    """The Triton form of `wkv.ops.wkv7`; see there for the arguments. A masked token's y is 0."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, log_w, k, v, a, b, state))
    y, final, _ = forward_op(r, log_w, k, v, a, b, state, mask, reset, keep)
    return y, final


def unfit(arguments: Sequence[Tensor | None]) -> str | None:
    """Why the kernels cannot take these arguments; None where they can."""
    assert arguments[0] is not None
    return gpu.unfit(arguments, arguments[0].shape[-1])


@torch.library.custom_op("wkv::wkv7_triton", mutates_args=())
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
    """y [B, T, H, N], the final state [B, H, N, N], and the states at the starts of all chunks [B NT H, N, N].

    Without `keep` the last is empty.
    """
    y, final, starts = _forward_fake(r, log_w, k, v, a, b, state, mask, reset, keep)
    sizes = Sizes(*r.shape)
    rows = [x.contiguous() for x in (r, log_w, k, v, a, b)]
    flags = gpu.flags(mask, reset)
    state = None if state is None else state.contiguous()
    if sizes.time <= FEW and not keep:
        _recurrent(sizes, rows, flags, state, y, final)
        return y, final, starts
    inner = prepare(sizes, rows, flags, v.dtype, backward=False)
    if not keep:
        starts = _chunk_states(sizes, inner.operand_type, r.device)
    U = torch.empty_like(inner.UV)
    _states(sizes, rows, flags, state, inner, starts, U, final)
    _outputs(sizes, rows, flags, inner, starts, U, y)
    return y, final, starts if keep else starts.new_empty(0, sizes.size, sizes.size)


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
    sizes = Sizes(*r.shape)
    final = r.new_empty(sizes.batch, sizes.heads, sizes.size, sizes.size, dtype=torch.float32)
    count = sizes.total if keep else 0
    dtype = operand_type(v.dtype)
    return v.new_empty(v.shape), final, final.new_empty(count, sizes.size, sizes.size, dtype=dtype)


@torch.library.custom_op("wkv::wkv7_triton_backward", mutates_args=())
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
    """Gradients of r, log_w, k, v, a, b in their types, and of the initial state in float32."""
    *grads, d_state = _backward_fake(dy, d_final, starts, r, log_w, k, v, a, b, mask, reset)
    sizes = Sizes(*r.shape)
    rows = [x.contiguous() for x in (r, log_w, k, v, a, b)]
    flags = gpu.flags(mask, reset)
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    inner = prepare(sizes, rows, flags, v.dtype, backward=True)
    d_ends, dU = torch.empty_like(starts), torch.empty_like(inner.UV)
    _states_backward(sizes, rows, flags, dy, d_final, inner, d_ends, dU, d_state)
    _gradients(sizes, rows, flags, dy, inner, starts, d_ends, dU, grads)
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
    batch, _, heads, size = r.shape
    return dr, dlog_w, dk, dv, da, db, r.new_empty(batch, heads, size, size, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rows, state, mask, reset, _ = inputs
    ctx.save_for_backward(output[2], *rows, mask, reset)
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *grads, d_state = backward_op(dy, d_final, *ctx.saved_tensors)
    return (*grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup_context)

Rows = list[Tensor]  # r, log_w, k, v, a, b
Flags = tuple[Tensor | None, ...]


class Inner(NamedTuple):
    """What `prepare` finds for every chunk; see kernels/wkv7.py. Aak and W are None without a backward pass."""

    operands: str
    operand_type: torch.dtype
    strong: Tensor  # [chunks], 1 where decays are too strong for products of two factors
    Aqk: Tensor  # [chunks, L, L]
    Aqb: Tensor
    Aak: Tensor | None
    W: Tensor | None
    UA: Tensor  # [chunks, L, N]
    UV: Tensor


def operand_type(dtype: torch.dtype) -> torch.dtype:
    """In which operands are stored between kernels."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def prepare(sizes: Sizes, rows: Rows, flags: Flags, dtype: torch.dtype, backward: bool) -> Inner:
    """Everything within chunks that does not depend on the state; `dtype` is that of v."""
    from wkv.ops.gpu.kernels import wkv7 as kernels

    kind, device, length = operand_type(dtype), rows[0].device, sizes.length
    count = sizes.total
    squares = [torch.empty(count, length, length, dtype=kind, device=device) for _ in range(4 if backward else 2)]
    oblongs = [torch.empty(count, length, sizes.size, dtype=kind, device=device) for _ in range(2)]
    strong = torch.empty(count, dtype=torch.int8, device=device)
    Aak, W = squares[2:] if backward else (None, None)
    inner = Inner(gpu.operands(dtype), kind, strong, squares[0], squares[1], Aak, W, *oblongs)
    for exact in (False, True):
        gpu.launch(
            kernels.prepare, (count,), *rows, *flags, strong, inner.Aqk, inner.Aqb, Aak, W, inner.UA, inner.UV,
            sizes.time, sizes.heads, sizes.chunks,
            L=length, N=sizes.size, OPERANDS=inner.operands, EXACT=exact, num_warps=sizes.warps,
        )  # fmt: skip
    return inner


def _chunk_states(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(sizes.total, sizes.size, sizes.size, dtype=dtype, device=device)


def _states(
    sizes: Sizes, rows: Rows, flags: Flags, state: Tensor | None, inner: Inner, starts: Tensor, U: Tensor, final: Tensor
) -> None:
    from wkv.ops.gpu.kernels import wkv7 as kernels

    _, log_w, k, v, _, b = rows
    gpu.launch(
        kernels.states, (sizes.batch * sizes.heads, sizes.size // sizes.values),
        log_w, k, v, b, *flags, state, inner.UA, inner.UV, starts, U, final, sizes.time, sizes.heads, sizes.chunks,
        L=sizes.length, N=sizes.size, M=sizes.values, OPERANDS=inner.operands, num_warps=4,
        num_stages=sizes.stages(inner.operand_type),
    )  # fmt: skip


def _outputs(sizes: Sizes, rows: Rows, flags: Flags, inner: Inner, starts: Tensor, U: Tensor, y: Tensor) -> None:
    from wkv.ops.gpu.kernels import wkv7 as kernels

    r, log_w, _, v, _, _ = rows
    width = min(sizes.size, 64)
    gpu.launch(
        kernels.outputs, (sizes.total, sizes.size // width),
        r, log_w, v, *flags, inner.Aqk, inner.Aqb, U, starts, y, sizes.time, sizes.heads, sizes.chunks,
        L=sizes.length, N=sizes.size, M=width, OPERANDS=inner.operands, num_warps=4,
    )  # fmt: skip


def _recurrent(sizes: Sizes, rows: Rows, flags: Flags, state: Tensor | None, y: Tensor, final: Tensor) -> None:
    from wkv.ops.gpu.kernels import wkv7 as kernels

    gpu.launch(
        kernels.recurrent, (sizes.batch * sizes.heads, sizes.size // 16), *rows, *flags, state, y, final,
        sizes.time, sizes.heads, N=sizes.size, M=16, num_warps=1 if sizes.size <= 64 else 4,
    )  # fmt: skip


def _states_backward(
    sizes: Sizes, rows: Rows, flags: Flags, dy: Tensor, d_final: Tensor | None, inner: Inner, d_ends: Tensor,
    dU: Tensor, d_state: Tensor,
) -> None:  # fmt: skip
    from wkv.ops.gpu.kernels import wkv7_backward as kernels

    r, log_w, _, _, _, b = rows
    d_final = None if d_final is None else d_final.contiguous()
    gpu.launch(
        kernels.states_backward, (sizes.batch * sizes.heads, sizes.size // sizes.values),
        r, log_w, b, dy, *flags, d_final, inner.Aqb, inner.UA, d_ends, dU, d_state,
        sizes.time, sizes.heads, sizes.chunks,
        L=sizes.length, N=sizes.size, M=sizes.values, OPERANDS=inner.operands, num_warps=4,
        num_stages=sizes.stages(inner.operand_type),
    )  # fmt: skip


def _gradients(
    sizes: Sizes, rows: Rows, flags: Flags, dy: Tensor, inner: Inner, starts: Tensor, d_ends: Tensor, dU: Tensor,
    grads: Sequence[Tensor],
) -> None:  # fmt: skip
    from wkv.ops.gpu.kernels import wkv7_backward as kernels

    for exact in (False, True):
        gpu.launch(
            kernels.gradients, (sizes.total,), *rows, dy, *flags, inner.strong, inner.Aqk, inner.Aak, inner.W,
            inner.UA, inner.UV, dU, starts, d_ends, *grads, sizes.time, sizes.heads, sizes.chunks,
            L=sizes.length, N=sizes.size, M=min(sizes.size, 64), OPERANDS=inner.operands, EXACT=exact, num_warps=8,
        )  # fmt: skip
