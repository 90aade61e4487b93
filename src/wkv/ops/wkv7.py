"""WKV-7, the generalised delta rule of RWKV-7 "Goose" (arXiv 2503.14456, section 3).

Per head, with S the state [N_value, N_key] that maps keys to values:

    S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T
    y_t = S_t r_t

In the model a = -kk and b = kk * iclr: remove the value stored under kk, then write v under k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.ops import common, dispatch, gpu, native_matrix
from wkv.ops.gpu import wkv7 as gpu_wkv7
from wkv.ops.wkv7_chunked import chunked


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run WKV-7 over a whole sequence.

    Args:
        r, k, v, a, b: receptance, key, value, removal and replacement direction, [B, T, H, N], any floating type.
        log_w: log-decay <= 0, [B, T, H, N].
        state: initial state [B, H, N_value, N_key]; None means zeros.
        mask: bool [B, T]; a False token does not exist (its y is unspecified, its inputs get zero gradients).
        reset: bool [B, T]; the state is zeroed before a True token.

    Returns:
        y [B, T, H, N] in the type of v, and the final state [B, H, N_value, N_key] in float32
        (float64 if any argument is float64). Arithmetic runs in the state's type; GPU
        kernels round the operands of matrix products to the precision of v (docs/numerics.md).

    Raises:
        WkvError: if shapes, types or devices do not fit together.
    """
    common.check_same_shape("wkv7", r=r, log_w=log_w, k=k, v=v, a=a, b=b)
    if r.ndim != 4 or r.numel() == 0:
        raise WkvError(f"wkv7: r must be [B, T, H, N] with at least one token, found {tuple(r.shape)}")
    batch, _, heads, size = r.shape
    if state is not None:
        common.check_shape("wkv7", "state", state, (batch, heads, size, size))
        common.check_floating("wkv7", "state", state, r.device)
    common.check_flags("wkv7", "mask", mask, r)
    common.check_flags("wkv7", "reset", reset, r)
    run = dispatch.select("wkv7", r, log_w, k, v, a, b, state)
    return run(r, log_w, k, v, a, b, state, mask, common.effective_reset(mask, reset))


def reference(
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
    """The equation, token by token, differentiated by autograd. A masked token's y is 0."""
    dtype, y_dtype = common.compute_dtype(r, log_w, k, v, a, b, state), v.dtype
    r, log_w, k, v, a, b = (x.to(dtype) for x in (r, log_w, k, v, a, b))
    if mask is not None:
        # Zeros are neutral: the state keeps its value (decay 1) and nothing is removed, written or read.
        r, log_w, k, v, a, b = (x.masked_fill(~mask[:, :, None, None], 0) for x in (r, log_w, k, v, a, b))
    batch, length, heads, size = r.shape
    S_BHVK = r.new_zeros(batch, heads, size, size) if state is None else state.to(dtype)
    decay = log_w.exp()
    outputs = []
    with torch.autocast(r.device.type, enabled=False):
        for t in range(length):
            if reset is not None:
                S_BHVK = S_BHVK.masked_fill(reset[:, t, None, None, None], 0)
            removed = S_BHVK @ a[:, t, :, :, None]
            new = removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
            S_BHVK = S_BHVK * decay[:, t, :, None, :] + new
            outputs.append((S_BHVK @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1).to(y_dtype), S_BHVK


dispatch.register("wkv7", dispatch.Backend("chunked", chunked))
dispatch.register("wkv7", dispatch.Backend("reference", reference))
dispatch.register("wkv7", dispatch.Backend("triton", gpu_wkv7.run, gpu.unusable, gpu_wkv7.unfit))
dispatch.register("wkv7", dispatch.Backend("native", native_matrix.wkv7, native.unusable))
