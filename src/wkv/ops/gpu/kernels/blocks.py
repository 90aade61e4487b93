"""What the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to `dtype`, rounded to the nearest value. Every store of what may be bfloat16 goes through this.

    Triton's interpreter cuts the digits of bfloat16 off, so that it is given nothing to cut.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        x = rounded(x)
    return x.to(dtype)


@triton.jit
def rounded(x):
    """float32 values, rounded to those of bfloat16 (ties to even)."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, OPERANDS: tl.constexpr):
    """What `dot` makes of an operand that it rounds to bfloat16, in float32."""
    if OPERANDS == "bf16":
        x = cast(x, tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def dot(a, b, OPERANDS: tl.constexpr):
    """a [M, K] @ b [K, N] in float32; at least 16 of each.

    OPERANDS "bf16": both are rounded to bfloat16; "tf32": to 11 bits; "tf32x3": three such products, about 22 bits.
    """
    if OPERANDS != "bf16":
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=OPERANDS)
    elif INTERPRETED:  # it would take the bits of bfloat16 for integers
        product = tl.dot(rounded(a.to(tl.float32)), rounded(b.to(tl.float32)))
    else:
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return product
