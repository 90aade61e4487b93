"""WKV-5, matrix state with a constant decay per key channel, of RWKV-5 "Eagle" (arXiv 2404.05892, section 4).

Per head, with S the state [N_value, N_key] that maps keys to values:

    y_t = S_{t-1} r_t + v_t sum_i(r_t[i] u[i] k_t[i])
    S_t = S_{t-1} diag(exp(log_w)) + v_t k_t^T

This is WKV-6 with a decay that no token changes, and it shares WKV-6's code.
"""

from __future__ import annotations

from torch import Tensor

from wkv import native
from wkv.ops import common, dispatch, gpu, linear_chunked, native_matrix
from wkv.ops.gpu import linear
from wkv.ops.wkv6 import check_matrix_arguments
from wkv.ops.wkv6 import reference as wkv6_reference


def wkv5(
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
    """Run WKV-5 over a whole sequence.

    Args:
        r, k, v: receptance, key and value, [B, T, H, N], any floating type.
        log_w: log-decay <= 0, [H, N]; -inf forgets everything. Versions 5.0 and 5.1 repeat one value per head.
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
    common.check_same_shape("wkv5", r=r, k=k, v=v)
    check_matrix_arguments("wkv5", r, u, state, mask, reset)
    common.check_shape("wkv5", "log_w", log_w, tuple(u.shape))
    common.check_floating("wkv5", "log_w", log_w, r.device)
    run = dispatch.select("wkv5", r, log_w, k, v, u, state)
    return run(r, log_w, k, v, u, state, mask, common.effective_reset(mask, reset))


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
    log_w = log_w.to(common.compute_dtype(r, log_w, k, v, u, state))  # before the gradients of all tokens are summed
    return wkv6_reference(r, log_w.expand_as(r), k, v, u, state, mask, reset)


dispatch.register("wkv5", dispatch.Backend("reference", reference))
dispatch.register("wkv5", dispatch.Backend("chunked", linear_chunked.chunked))
dispatch.register("wkv5", dispatch.Backend("native", native_matrix.linear, native.unusable))
dispatch.register("wkv5", dispatch.Backend("triton", linear.run, gpu.unusable, linear.unfit))
