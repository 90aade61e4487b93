"""The elementwise stages around WKV-7, fused: Triton, differentiated by hand; the algebra is in `kernels.stages`.

Each stands beside its torch form in `wkv.models.rwkv7` and gives results of the same types. Arithmetic is float32,
also where the torch form rounds in between. Nothing but the inputs is kept for the backward pass. Off by default.

Shape letters: B batch, T time, H heads, N head size, A = H * N attention channels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wkv.ops import gpu

# A program has ROWS tokens of BLOCK channels: long enough rows to read, few sums over tokens to write.
ROWS = 32
BLOCK = 128
# Numbers in each tensor of a program that has one head.
TILE = 2048
WARPS = 8

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_choices: list[bool] = []


@contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Inside the `with` block RWKV-7 runs its elementwise stages in Triton, or (False) in torch as everywhere else.

    Where Triton cannot run they stay in torch. A backward pass that computes activations again belongs inside, too.
    """
    _choices.append(on)
    try:
        yield
    finally:
        _choices.pop()


def active(x: Tensor, size: int) -> bool:
    """Whether a model with heads of `size` channels shall call the stages of this file on tensors such as x."""
    if not _choices or not _choices[-1]:
        return False
    return gpu.unusable(x.device) is None and gpu.unfit((x,), size) is None


def mix(z_BTC: Tensor, shifted_BTC: Tensor, coefficients: Sequence[Tensor]) -> Six:
    """z + (shifted - z) x for six coefficient vectors x.

    Args:
        z_BTC: input.
        shifted_BTC: the input before each token's.
        coefficients: six, each of C entries.

    Returns:
        six tensors [B, T, C].
    """
    x_r, x_w, x_k, x_v, x_a, x_g = coefficients
    mixed: Six = mix_op(z_BTC, shifted_BTC, x_r, x_w, x_k, x_v, x_a, x_g)
    return mixed


def keys(k_BTA: Tensor, iclr_BTA: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The removal key and what is made of keys and in-context rates.

    Args:
        k_BTA: keys.
        iclr_BTA: in-context learning rates.
        k_k, k_a: A entries each.
        size: N.

    Returns:
        kk = k k_k at unit length per head, -kk and kk iclr, in float32, and the key k (1 + (iclr - 1) k_a);
        all [B, T, H, N].
    """
    kk, a, b, k = keys_op(k_BTA, iclr_BTA, k_k, k_a, size)
    return kk, a, b, k


def reading(
    y_BTHN: Tensor,
    r_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    gate_BTA: Tensor,
    r_k_HN: Tensor,
    weight_A: Tensor,
    bias_A: Tensor,
    eps: float,
) -> Tensor:
    """Norm per head of what was read (y), bonus of the current token, gate.

    Args:
        y_BTHN, r_BTHN, k_BTHN, v_BTHN, gate_BTA, r_k_HN: as in `wkv.models.rwkv7`.
        weight_A, bias_A, eps: of the `HeadNorm`.

    Returns:
        [B, T, A] in the type of the gate.
    """
    out_BTA: Tensor = reading_op(y_BTHN, r_BTHN, k_BTHN, v_BTHN, gate_BTA, r_k_HN, weight_A, bias_A, eps)
    return out_BTA


@torch.library.custom_op("wkv::rwkv7_mix", mutates_args=())
def mix_op(
    z: Tensor, shifted: Tensor, x_r: Tensor, x_w: Tensor, x_k: Tensor, x_v: Tensor, x_a: Tensor, x_g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mix`."""
    from wkv.ops.gpu.kernels import stages as kernels

    inputs = [x.contiguous() for x in (z, shifted, x_r, x_w, x_k, x_v, x_a, x_g)]
    outputs = _mix_fake(z, shifted, x_r, x_w, x_k, x_v, x_a, x_g)
    _launch_channels(kernels.mix, z.shape, *inputs, *outputs)
    return outputs


@mix_op.register_fake
def _mix_fake(z: Tensor, shifted: Tensor, *coefficients: Tensor) -> Six:
    x_r, x_w, x_k, x_v, x_a, x_g = (
        z.new_empty(z.shape, dtype=torch.promote_types(z.dtype, x.dtype)) for x in coefficients
    )
    return x_r, x_w, x_k, x_v, x_a, x_g


@torch.library.custom_op("wkv::rwkv7_mix_backward", mutates_args=())
def mix_backward_op(
    gradients: Sequence[Tensor | None], z: Tensor, shifted: Tensor, coefficients: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of z, shifted and the six vectors."""
    from wkv.ops.gpu.kernels import stages as kernels

    dz, d_shifted, *vectors = _mix_backward_fake(gradients, z, shifted, coefficients)
    inputs = [x.contiguous() for x in (z, shifted, *coefficients)]
    given = [None if x is None else x.contiguous() for x in gradients]
    sums = z.new_empty(_blocks(z.shape, ROWS), 6, z.shape[-1], dtype=torch.float32)
    _launch_channels(kernels.mix_backward, z.shape, *inputs, *given, dz, d_shifted, sums)
    for vector, total in zip(vectors, sums.sum(0), strict=True):
        vector.copy_(total.view(vector.shape))
    return [dz, d_shifted, *vectors]


@mix_backward_op.register_fake
def _mix_backward_fake(
    gradients: Sequence[Tensor | None], z: Tensor, shifted: Tensor, coefficients: Sequence[Tensor]
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (z, shifted, *coefficients)]


def _mix_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    z, shifted, *coefficients = ctx.saved_tensors
    return tuple(mix_backward_op(gradients, z, shifted, coefficients))


@torch.library.custom_op("wkv::rwkv7_keys", mutates_args=())
def keys_op(k: Tensor, iclr: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `keys`."""
    from wkv.ops.gpu.kernels import stages as kernels

    inputs = [x.contiguous() for x in (k, iclr, k_k, k_a)]
    outputs = _keys_fake(k, iclr, k_k, k_a, size)
    _launch_heads(kernels.keys, outputs[0].shape, *inputs, *outputs)
    return outputs


@keys_op.register_fake
def _keys_fake(k: Tensor, iclr: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, time, width = k.shape
    shape = batch, time, width // size, size
    kk, a, b = (k.new_empty(shape, dtype=torch.float32) for _ in range(3))
    kind = torch.promote_types(torch.promote_types(k.dtype, iclr.dtype), k_a.dtype)
    return kk, a, b, k.new_empty(shape, dtype=kind)


@torch.library.custom_op("wkv::rwkv7_keys_backward", mutates_args=())
def keys_backward_op(
    d_kk: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dk: Tensor | None,
    k: Tensor,
    iclr: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, iclr, k_k, k_a."""
    from wkv.ops.gpu.kernels import stages as kernels

    d_key, d_iclr, dk_k, dk_a = _keys_backward_fake(d_kk, da, db, dk, k, iclr, k_k, k_a, size)
    inputs = [x.contiguous() for x in (k, iclr, k_k, k_a)]
    given = [None if x is None else x.contiguous() for x in (d_kk, da, db, dk)]
    batch, time, width = k.shape
    shape = torch.Size((batch, time, width // size, size))
    sums = k.new_empty(_blocks(shape, TILE // size), 2, width, dtype=torch.float32)
    _launch_heads(kernels.keys_backward, shape, *inputs, *given, d_key, d_iclr, sums)
    for vector, total in zip((dk_k, dk_a), sums.sum(0), strict=True):
        vector.copy_(total.view(vector.shape))
    return d_key, d_iclr, dk_k, dk_a


@keys_backward_op.register_fake
def _keys_backward_fake(
    d_kk: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dk: Tensor | None,
    k: Tensor,
    iclr: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_key, d_iclr, dk_k, dk_a = (x.new_empty(x.shape) for x in (k, iclr, k_k, k_a))
    return d_key, d_iclr, dk_k, dk_a


def _keys_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    d_kk, da, db, dk = gradients
    return *keys_backward_op(d_kk, da, db, dk, *ctx.saved_tensors, ctx.number), None


@torch.library.custom_op("wkv::rwkv7_reading", mutates_args=())
def reading_op(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """See `reading`."""
    from wkv.ops.gpu.kernels import stages as kernels

    inputs = [x.contiguous() for x in (y, r, k, v, gate, r_k, weight, bias)]
    out = gate.new_empty(gate.shape)
    _launch_heads(kernels.reading, y.shape, *inputs, out, eps)
    return out


@reading_op.register_fake
def _reading_fake(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("wkv::rwkv7_reading_backward", mutates_args=())
def reading_backward_op(d_out: Tensor, inputs: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Gradients of the eight tensors that `reading_op` takes."""
    from wkv.ops.gpu.kernels import stages as kernels

    *tokens, dr_k, d_weight, d_bias = _reading_backward_fake(d_out, inputs, eps)
    shape, size = inputs[0].shape, inputs[0].shape[-1]
    sums = d_out.new_empty(_blocks(shape, TILE // size), 3, d_out.shape[-1], dtype=torch.float32)
    given = [x.contiguous() for x in (*inputs, d_out)]
    _launch_heads(kernels.reading_backward, shape, *given, *tokens, sums, eps)
    for vector, total in zip((d_weight, d_bias, dr_k), sums.sum(0), strict=True):
        vector.copy_(total.view(vector.shape))
    return [*tokens, dr_k, d_weight, d_bias]


@reading_backward_op.register_fake
def _reading_backward_fake(d_out: Tensor, inputs: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _reading_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *reading_backward_op(d_out, ctx.saved_tensors, ctx.number), None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.number = None if isinstance(inputs[-1], Tensor) else inputs[-1]  # where there is one, it is the last
    ctx.set_materialize_grads(False)


mix_op.register_autograd(_mix_backward, setup_context=_setup_context)
keys_op.register_autograd(_keys_backward, setup_context=_setup_context)
reading_op.register_autograd(_reading_backward, setup_context=_setup_context)


def _blocks(shape: torch.Size, rows: int) -> int:
    """How many times `rows` tokens, rounded up, there are in [B, T, ...]."""
    return -(-shape[0] * shape[1] // rows)


def _launch_channels(kernel: Any, shape: torch.Size, *arguments: Any) -> None:
    """Over blocks of tokens and of channels [B, T, C]."""
    batch, time, channels = shape
    grid = _blocks(shape, ROWS), -(-channels // BLOCK)
    options = {"ROWS": ROWS, "BLOCK": BLOCK, "num_warps": WARPS}
    gpu.launch(kernel, grid, *arguments, batch * time, channels, **options)


def _launch_heads(kernel: Any, shape: torch.Size, *arguments: Any) -> None:
    """Over blocks of tokens and heads [B, T, H, N]."""
    batch, time, heads, size = shape
    rows = TILE // size
    grid = (_blocks(shape, rows) * heads,)
    gpu.launch(kernel, grid, *arguments, batch * time, heads, ROWS=rows, N=size, num_warps=WARPS)
