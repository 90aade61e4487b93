"""WKV-6, matrix state with data-dependent decay, of RWKV-6 "Finch" (arXiv 2404.05892, section 4).

Per head, with S the state [N_value, N_key] that maps keys to values:

    y_t = S_{t-1} r_t + v_t sum_i(r_t[i] u[i] k_t[i])
    S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T

The current token is read with the bonus u and enters the state without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.ops import common, dispatch, gpu, linear_chunked, native_matrix
from wkv.ops.gpu import linear


def wkv6(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run WKV-6 over a whole sequence.

    Args:
        r, k, v: receptance, key and value, [B, T, H, N], any floating type.
        log_w: log-decay <= 0 of every token, [B, T, H, N]; -inf forgets everything.
        u: bonus of the current token, [H, N].
        state: initial state [B, H, N_value, N_key]; None means zeros.
        mask: bool [B, T]; a False token does not exist (its y is unspecified).
        reset: bool [B, T]; the state is zeroed before a True token.

    Returns:
        y [B, T, H, N] in the type of v, and the final state [B, H, N_value, N_key] in float32
        (float64 if any argument is float64). Arithmetic runs in the state's type; GPU
        kernels round the operands of matrix products to the precision of v (docs/numerics.md).

    Raises:
        WkvError: if shapes, types or devices do not fit together, or T is 0.
    """
    common.check_same_shape("wkv6", r=r, log_w=log_w, k=k, v=v)
    check_matrix_arguments("wkv6", r, u, state, mask, reset)
    run = dispatch.select("wkv6", r, log_w, k, v, u, state)
    return run(r, log_w, k, v, u, state, mask, common.effective_reset(mask, reset))


def check_matrix_arguments(
    operator: str, r: Tensor, u: Tensor, state: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> None:
    """What WKV-5 and WKV-6 ask of everything but the token tensors, given r [B, T, H, N].

    Raises:
        WkvError: naming the argument that does not fit.
    """
    if r.ndim != 4 or r.shape[1] == 0:
        raise WkvError(f"{operator}: r must be [B, T, H, N] with at least one token, found {tuple(r.shape)}")
    batch, _, heads, size = r.shape
    common.check_shape(operator, "u", u, (heads, size))
    common.check_floating(operator, "u", u, r.device)
    if state is not None:
        common.check_shape(operator, "state", state, (batch, heads, size, size))
        common.check_floating(operator, "state", state, r.device)
    common.check_flags(operator, "mask", mask, r)
    common.check_flags(operator, "reset", reset, r)


def reference(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The equation, token by token, differentiated by autograd."""
    dtype = common.compute_dtype(r, log_w, k, v, u, state)
    y_dtype = v.dtype
    r, log_w, k, v, u = (x.to(dtype) for x in (r, log_w, k, v, u))
    if mask is not None:  # no key, no value, no decay: the state passes a token that does not exist
        r, log_w, k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (r, log_w, k, v))
    batch, length, heads, size = r.shape
    S_BHVK = r.new_zeros(batch, heads, size, size) if state is None else state.to(dtype)
    decay, bonus = log_w.exp(), (r * u * k).sum(-1, keepdim=True) * v
    outputs = []
    for t in range(length):
        if reset is not None:
            S_BHVK = S_BHVK.masked_fill(reset[:, t, None, None, None], 0)
        # A product and a sum, not `@`: faster for single vectors on CPU, and autocast leaves it in full precision.
        outputs.append((S_BHVK * r[:, t, :, None, :]).sum(-1) + bonus[:, t])
        S_BHVK = S_BHVK * decay[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(outputs, 1).to(y_dtype), S_BHVK


dispatch.register("wkv6", dispatch.Backend("reference", reference))
dispatch.register("wkv6", dispatch.Backend("chunked", linear_chunked.chunked))
dispatch.register("wkv6", dispatch.Backend("native", native_matrix.linear, native.unusable))
dispatch.register("wkv6", dispatch.Backend("triton", linear.run, gpu.unusable, linear.unfit))
