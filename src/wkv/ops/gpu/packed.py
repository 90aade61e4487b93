"""Products with weights in 8, 6 and 4 bits on GPUs in Triton; the kernels are in `kernels.packed`.

For a few tokens at a time, as in decoding: what takes time then is reading the weights, and they are read as codes.
Matrix products round weights and inputs as `wkv.ops.gpu.operands` says; one token alone is computed in float32. A
weight in 8 bits is never rounded: its scale is applied to the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv.ops import dispatch, gpu

MOST = 64  # tokens; for more, weights are better brought to a floating-point type once
# Vectors of 64 bytes that a program reads at a time, for one token; for more: as many as registers hold, by operands.
VECTORS = 64
VECTORS_OF_PRODUCTS = {"bf16": 32, "tf32": 16, "tf32x3": 16}
INPUTS = {8: 64, 4: 32}  # the same in the sparse order: rows of 64 bytes
PROGRAMS = 512  # fewer outputs than this many programs have are divided over the inputs, too
WARPS = 4


def fits(x: Tensor, in_features: int) -> bool:
    """Whether `product` shall run on x [..., K]: where the kernels can, and there are few tokens.

    In the interpreter, on a CPU, only where the backend "triton" is asked for.
    """
    forced = dispatch.forced_backend()
    if forced not in (None, "triton") or (x.device.type == "cpu" and forced is None):
        return False
    if gpu.unusable(x.device) is not None or gpu.unfit((x,)) is not None:
        return False
    return 0 < x.numel() <= MOST * in_features


@torch.library.custom_op("wkv::packed_product", mutates_args=())
def product(x: Tensor, data: Tensor, scale: Tensor | None, bits: int, sparse: bool, outputs: int) -> Tensor:
    """x W^T.

    Args:
        x: [M, K].
        data, scale: of a `wkv.quantization.packed.Packed` W [N, K].
        bits: 8, 6 or 4.
        sparse: the order of the codes.
        outputs: N.

    Returns:
        [M, N] in the type of x.
    """
    from wkv.ops.gpu.kernels import packed as kernels

    count, inputs = x.shape
    tokens = 1 if count == 1 else max(16, 1 << (count - 1).bit_length())
    unit = (64 if bits == 8 else 128) if sparse else 16
    operands = gpu.operands(x.dtype)
    vectors = VECTORS if tokens == 1 else VECTORS_OF_PRODUCTS[operands]
    step = INPUTS[bits] if sparse else vectors // (16 if bits == 8 else 8)  # inputs, or blocks of 64
    total = inputs if sparse else -(-inputs // 64)
    programs = -(-outputs // unit)
    parts = max(1, min(PROGRAMS // programs, total // step))
    part = -(-total // (parts * step)) * step
    parts = -(-total // part)
    y = x.new_empty(parts, count, outputs, dtype=torch.float32 if parts > 1 else x.dtype)
    halves = None if bits == 8 else data.view(torch.float16)
    size = programs * unit if sparse else total
    width = {"INPUTS": step} if sparse else {"VECTORS": vectors}
    gpu.launch(
        kernels.sparse if sparse else kernels.tiled, (programs, parts, -(-count // tokens)),
        x.contiguous(), data, halves, scale, y, count, outputs, inputs, size, part,
        BITS=bits, TOKENS=tokens, OPERANDS=operands, num_warps=WARPS, **width,
    )  # fmt: skip
    return y.sum(0).to(x.dtype) if parts > 1 else y[0]


@product.register_fake
def _product_fake(x: Tensor, data: Tensor, scale: Tensor | None, bits: int, sparse: bool, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
