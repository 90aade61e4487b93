"""What the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, OPERANDS: tl.constexpr):
    """a [M, K] @ b [K, N] in float32; at least 16 of each.

    OPERANDS "bf16": both are rounded to bfloat16; "tf32": to 11 bits; "tf32x3": three such products, about 22 bits.
    """
    if OPERANDS == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        if INTERPRETED:  # which would take the bits of bfloat16 for integers
            return tl.dot(a.to(tl.float32), b.to(tl.float32))
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=OPERANDS)
