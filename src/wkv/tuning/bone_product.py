"""Products with layers that have an adapter of the Bone family: y, and gradients of the input and of the adapter.

Autograd would keep a changed copy of every weight for the backward pass. These forms keep the input (MiSS: a sum over
it) and the adapter alone, and go back to the frozen layer for its weight. What does not need the weight goes around it:
blocks that belong to inputs act on the input before the layer reads it, blocks that all outputs share act on sums.

Two kinds of types: where a layer multiplies in 32 bits or more, the update is added to input or weight. In 16 bits
that would round small updates away. There the update's own product is made first, then the layer's product is added to
it inside the accumulator, which rounds once.

Shape letters: N tokens, I inputs, O outputs, r rank (side of a block), P = O / r, Q = I / r blocks, R rows of a slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wkv.layers.norms import wide
from wkv.quantization.modules import QuantizedLinear

# Values of a weight that exist in changed form at once: 4 MiB of float32 on the CPU; elsewhere few, large launches.
SLAB, SLAB_ELSEWHERE = {"cpu": 1 << 20}, 1 << 24

WIDE = (torch.float32, torch.float64)


# ---------------------------------------------------------------- the frozen layer


def product_type(base: Any, x: Tensor) -> torch.dtype:
    """The type in which `base` multiplies `x`: that of autocast where it is on; float32 for integer weights."""
    if isinstance(base, QuantizedLinear):
        return torch.float32
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def stored_weight(base: Any) -> Tensor:
    """W [O, I]: the layer's own, or what its codes stand for."""
    weight: Tensor = base.weight.detach() if isinstance(base, nn.Linear) else base.dequantize()
    return weight


def product(base: Any, x_NI: Tensor, plus_NO: Tensor | None = None) -> Tensor:
    """x W^T + bias + plus, rounded once in 16 bits; `x` and `plus` in the type of the product."""
    if isinstance(base, QuantizedLinear):
        y_NO = base(x_NI)  # by its own kernels
        return y_NO if plus_NO is None else y_NO.add_(plus_NO)
    weight_OI, bias_O = stored_weight(base).to(x_NI.dtype), _bias(base, x_NI.dtype)
    if plus_NO is None or x_NI.dtype in WIDE:
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        return y_NO if plus_NO is None else y_NO.add_(plus_NO)
    return torch.addmm(plus_NO if bias_O is None else plus_NO + bias_O, x_NI, weight_OI.T)


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    bias = getattr(base, "bias", None)
    return None if bias is None else bias.detach().to(dtype)


# ---------------------------------------------------------------- small parts


def fold(x_NI: Tensor, rank: int) -> Tensor:
    """Sum over the chunks of `rank` values [N, r], the last one filled up with zeros; added up in float32."""
    if x_NI.shape[1] == rank:
        return x_NI
    whole = x_NI.shape[1] // rank * rank
    sum_Nr = x_NI[:, :whole].unflatten(1, (-1, rank)).sum(1, dtype=_wide_type(x_NI))
    if whole < x_NI.shape[1]:
        sum_Nr[:, : x_NI.shape[1] - whole] += x_NI[:, whole:]
    return sum_Nr.to(x_NI.dtype)


def tile(t_Nr: Tensor, width: int) -> Tensor:
    """The columns again and again [N, width]."""
    copies = -(-width // t_Nr.shape[1])
    return t_Nr if copies == 1 else t_Nr.repeat(1, copies)[:, :width]


def add_tiled(y_NO: Tensor, t_Nr: Tensor) -> Tensor:
    """`y_NO` with the columns of t added again and again, in place."""
    whole = y_NO.shape[1] // t_Nr.shape[1] * t_Nr.shape[1]
    y_NO[:, :whole].unflatten(1, (-1, t_Nr.shape[1])).add_(t_Nr[:, None])
    if whole < y_NO.shape[1]:
        y_NO[:, whole:] += t_Nr[:, : y_NO.shape[1] - whole]
    return y_NO


def times_blocks(x_NI: Tensor, blocks_Qrr: Tensor) -> Tensor:
    """Block b of the result is blocks[b] x_b [N, I]."""
    x_QNr = x_NI.unflatten(1, (len(blocks_Qrr), -1)).transpose(0, 1)
    return torch.bmm(x_QNr, blocks_Qrr.transpose(1, 2)).transpose(0, 1).flatten(1)


def outer(a_QNr: Tensor, b_QNr: Tensor) -> Tensor:
    """Sum over tokens of a b^T, per block [Q, r, r]; added up and returned in float32 (float64 if they are)."""
    a_QrN = a_QNr.transpose(1, 2)
    if a_QNr.dtype in WIDE or not a_QNr.is_cuda or not hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(wide(a_QrN), wide(b_QNr))
    return torch.bmm(a_QrN, b_QNr, out_dtype=torch.float32)  # without copies in float32


def _blocks(x_NI: Tensor, rank: int) -> Tensor:
    return x_NI.unflatten(1, (-1, rank)).transpose(0, 1)


def _wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in WIDE else torch.float32


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _shaped(y_NO: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return y_NO.to(dtype).reshape(*like.shape[:-1], y_NO.shape[-1])


def _result_type(base: Any, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return x.dtype if isinstance(base, QuantizedLinear) else dtype


# ---------------------------------------------------------------- blocks that belong to inputs: bone-row, bone-ab


class InputGuided(torch.autograd.Function):
    """W'[a, b] = W[a, b] (1 + A[b]) + B[b], by y_a = sum_b W[a, b] (x_b + A[b] x_b) + sum_b B[b] x_b.

    Args: x [..., I], A [Q, r, r], B [Q, r, r] or None (it is A), the frozen layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_Qrr: Tensor, b_Qrr: Tensor | None, base: Any) -> Tensor:
        dtype, rank = product_type(base, x), a_Qrr.shape[-1]
        ctx.save_for_backward(x, a_Qrr, b_Qrr)
        ctx.base, ctx.dtype = base, dtype
        x_NI = _flat(x, dtype)
        u_NI = times_blocks(x_NI, a_Qrr.to(dtype))
        t_Nr = fold(u_NI, rank) if b_Qrr is None else x_NI @ _stacked(b_Qrr.to(dtype))
        if dtype in WIDE:
            y_NO = add_tiled(product(base, x_NI + u_NI), t_Nr)
        else:
            update_NO = torch.addmm(tile(t_Nr, base.out_features), u_NI, stored_weight(base).to(dtype).T)
            y_NO = product(base, x_NI, update_NO)
        return _shaped(y_NO, x, _result_type(base, x, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a_Qrr, b_Qrr = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rank, needs = a_Qrr.shape[-1], ctx.needs_input_grad
            g_NO, x_NI = _flat(grads[0], ctx.dtype), _flat(x, ctx.dtype)
            # One product with the weight serves x and A x: both get the gradient that reaches the layer's input.
            h_NI = g_NO @ stored_weight(ctx.base).to(ctx.dtype)
            t_Nr = fold(g_NO, rank)
            du_NI = h_NI if b_Qrr is not None else add_tiled(h_NI.clone(), t_Nr)
            dx, da, db = None, None, None
            if needs[1]:
                da = outer(_blocks(du_NI, rank), _blocks(x_NI, rank)).to(a_Qrr.dtype)
            if needs[2]:
                db = outer(t_Nr[None], x_NI[None])[0].unflatten(1, (-1, rank)).transpose(0, 1).to(b_Qrr.dtype)
            if needs[0]:
                dx_NI = h_NI + times_blocks(du_NI, a_Qrr.to(ctx.dtype).transpose(1, 2))
                if b_Qrr is not None:
                    dx_NI += t_Nr @ _stacked(b_Qrr.to(ctx.dtype)).T
                dx = _shaped(dx_NI, x, x.dtype)
            return dx, da, db, None


def _stacked(blocks_Qrr: Tensor) -> Tensor:
    """The blocks as one matrix [I, r] that sums over them: x @ it = sum_b blocks[b] x_b."""
    return blocks_Qrr.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- blocks that belong to outputs: bone-col


class OutputGuided(torch.autograd.Function):
    """W'[a, b] = W[a, b] (1 + B[a]) + B[a]: every input meets other blocks for each output, so the weight is changed.

    In 32 bits forward holds W' while it multiplies. In 16 bits, and backward, only a slab of W' or of its gradient
    exists at a time. A quantised weight is brought to float32 each time, as its own backward pass does it.

    Args: x [..., I], B [P, r, r], the frozen layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_Prr: Tensor, base: Any) -> Tensor:
        dtype = product_type(base, x)
        ctx.save_for_backward(x, b_Prr)
        ctx.base, ctx.dtype = base, dtype
        x_NI, weight_OI = _flat(x, dtype), stored_weight(base)
        if isinstance(base, nn.Linear) and (dtype in WIDE or weight_OI.dtype in WIDE):
            changed_OI = torch.empty_like(weight_OI, dtype=dtype)
            for rows, blocks in _slabs(weight_OI, b_Prr):
                changed_OI[rows] = _update(weight_OI[rows], b_Prr[blocks]).add_(weight_OI[rows])
            y_NO = F.linear(x_NI, changed_OI, _bias(base, dtype))
        else:
            update_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
            for rows, blocks in _slabs(weight_OI, b_Prr):
                update_NO[:, rows] = x_NI @ _update(weight_OI[rows], b_Prr[blocks]).to(dtype).T
            del weight_OI
            y_NO = product(base, x_NI, update_NO)
        return _shaped(y_NO, x, _result_type(base, x, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, b_Prr = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            g_NO, x_NI = _flat(grads[0], ctx.dtype), _flat(x, ctx.dtype)
            weight_OI = stored_weight(ctx.base)
            dx_NI = torch.zeros_like(x_NI, dtype=_wide_type(x_NI)) if ctx.needs_input_grad[0] else None
            db_Prr = torch.empty_like(b_Prr) if ctx.needs_input_grad[1] else None
            for rows, blocks in _slabs(weight_OI, b_Prr):
                g_NR, weight_RI = g_NO[:, rows], wide(weight_OI[rows])
                if dx_NI is not None:
                    changed_RI = _update(weight_RI, b_Prr[blocks]).add_(weight_RI).to(ctx.dtype)
                    dx_NI += g_NR @ changed_RI
                if db_Prr is not None:
                    db_Prr[blocks] = _gradient(weight_RI, outer(g_NR[None], x_NI[None])[0], b_Prr.shape[-1])
            dx = None if dx_NI is None else _shaped(dx_NI, x, x.dtype)
            return dx, db_Prr, None


def _slabs(weight_OI: Tensor, b_Prr: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of rows of the weight, and the slices of blocks that belong to them."""
    rank, values = b_Prr.shape[-1], SLAB.get(weight_OI.device.type, SLAB_ELSEWHERE)
    step = max(1, values // (rank * weight_OI.shape[1]))
    for start in range(0, len(b_Prr), step):
        end = min(start + step, len(b_Prr))
        yield slice(start * rank, end * rank), slice(start, end)


def _update(weight_RI: Tensor, b_Prr: Tensor) -> Tensor:
    """W[a, b] B[a] + B[a] for all blocks of the rows at hand [R, I], a new tensor in float32 (float64 if W is)."""
    rank = b_Prr.shape[-1]
    with torch.autocast(weight_RI.device.type, enabled=False):
        weight_RI = wide(weight_RI)
        b_Prr = b_Prr.to(weight_RI.dtype)
        # Rows of r inputs, whatever output and input block they are of, meet the same B[a].
        update = torch.bmm(weight_RI.reshape(len(b_Prr), -1, rank), b_Prr)
        update.view(len(b_Prr), rank, -1, rank).add_(b_Prr[:, :, None])
        return update.view(weight_RI.shape)


def _gradient(weight_RI: Tensor, g_RI: Tensor, rank: int) -> Tensor:
    """sum_b (W[a, b] + 1)^T G[a, b] for the gradient G of the changed weight [P, r, r]."""
    blocks = len(g_RI) // rank
    product_Prr = torch.bmm(
        weight_RI.reshape(blocks, -1, rank).transpose(1, 2), g_RI.to(weight_RI.dtype).reshape(blocks, -1, rank)
    )
    return product_Prr + g_RI.view(blocks, rank, -1, rank).sum(2)


# ---------------------------------------------------------------- without the weight: miss, miss-mini


class Shared(torch.autograd.Function):
    """y = x W^T + s D with s [N, r] the sum over chunks of x; D's columns repeat if they are fewer than the outputs.

    Args: x [..., I], D [r, m] with m a divisor of O, the frozen layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, d_rm: Tensor, base: Any) -> Tensor:
        dtype = product_type(base, x)
        x_NI = _flat(x, dtype)
        s_Nr = fold(x_NI, len(d_rm))
        ctx.save_for_backward(s_Nr, d_rm)
        ctx.base, ctx.dtype, ctx.x_shape, ctx.x_dtype = base, dtype, x.shape, x.dtype
        update_Nm = s_Nr @ d_rm.to(dtype)
        if dtype in WIDE:
            y_NO = add_tiled(product(base, x_NI), update_Nm)
        else:
            y_NO = product(base, x_NI, tile(update_Nm, base.out_features))
        return _shaped(y_NO, x, _result_type(base, x, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s_Nr, d_rm = ctx.saved_tensors
        with torch.autocast(s_Nr.device.type, enabled=False):
            g_NO = _flat(grads[0], ctx.dtype)
            g_Nm = fold(g_NO, d_rm.shape[1])
            dx, dd = None, None
            if ctx.needs_input_grad[1]:
                dd = outer(s_Nr[None], g_Nm[None])[0].to(d_rm.dtype)
            if ctx.needs_input_grad[0]:
                dx_NI = g_NO @ stored_weight(ctx.base).to(ctx.dtype)
                add_tiled(dx_NI, g_Nm @ d_rm.to(ctx.dtype).T)
                dx = dx_NI.to(ctx.x_dtype).view(ctx.x_shape)
            return dx, dd, None
