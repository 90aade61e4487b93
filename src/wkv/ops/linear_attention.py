"""Causal linear attention with a denominator and no decay (arXiv 2402.18668, BASED).

Queries and keys come already mapped to features. Per head, with kv [N, E] and z [E] the state:

    kv_t = kv_{t-1} + v_t k_t^T
    z_t  = z_{t-1} + k_t
    y_t  = kv_t q_t / (z_t . q_t + eps)

that is the average of all values so far, weighted by q_t . k_j. `taylor_attention` brings its own feature map.

Shape letters: B batch, T time, H heads, E features, N value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.ops import common, dispatch, native_taylor, taylor_chunked

FeatureState = tuple[Tensor, Tensor]  # kv [B, H, N, E] and z [B, H, E]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None = None,
    *,
    eps: float = 1e-12,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, FeatureState]:
    """Run causal linear attention over a whole sequence.

    Args:
        q, k: features of queries and keys, [B, T, H, E], any floating type. Their products should be positive: the
            denominator is a sum of them.
        v: values, [B, T, H, N].
        state: (kv [B, H, N, E], z [B, H, E]); None means zeros.
        eps: added to the denominator, >= 0.
        mask: bool [B, T]; a False token does not exist (its y is unspecified, its inputs get zero gradients).
        reset: bool [B, T]; the state is emptied before a True token.

    Returns:
        y [B, T, H, N] in the type of v, and the final (kv, z) in float32 (float64 if any argument is float64).
        Arithmetic runs in the state's type.

    Raises:
        WkvError: if shapes, types or devices do not fit together, or T is 0.
    """
    check_arguments("linear_attention", q, k, v, eps, mask, reset)
    check_state("linear_attention", state, v, q.shape[3])
    run = dispatch.select("linear_attention", q, k, v, *(state or ()))
    found: tuple[Tensor, FeatureState] = run(q, k, v, state, eps, mask, common.effective_reset(mask, reset))
    return found


def check_arguments(
    operator: str, q: Tensor, k: Tensor, v: Tensor, eps: float, mask: Tensor | None, reset: Tensor | None
) -> None:
    """q and k must be [B, T, H, E] of one shape, v [B, T, H, N].

    Raises:
        WkvError: naming the argument that does not fit.
    """
    common.check_same_shape(operator, q=q, k=k)
    if q.ndim != 4 or q.numel() == 0:
        raise WkvError(f"{operator}: q must be [B, T, H, features] with at least one token, found {tuple(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        expected = (*q.shape[:3], "N")
        raise WkvError(f"{operator}: v has shape {tuple(v.shape)}, expected {expected} beside q {tuple(q.shape)}")
    common.check_floating(operator, "v", v, q.device)
    if not eps >= 0:
        raise WkvError(f"{operator}: eps must be 0 or more, found {eps}")
    common.check_flags(operator, "mask", mask, q)
    common.check_flags(operator, "reset", reset, q)


def check_state(operator: str, state: FeatureState | None, v: Tensor, features: int) -> None:
    """A state must be the two tensors kv [B, H, N, E] and z [B, H, E] for `features` = E and the values `v`.

    Raises:
        WkvError: naming the tensor that does not fit.
    """
    if state is None:
        return
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise WkvError(f"{operator}: state must be the two tensors (kv, z), found {type(state).__name__}")
    batch, _, heads, size = v.shape
    for name, tensor, middle in (("kv", state[0], (size,)), ("z", state[1], ())):
        common.check_shape(operator, f"state {name}", tensor, (batch, heads, *middle, features))
        common.check_floating(operator, f"state {name}", tensor, v.device)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """The equation, token by token, differentiated by autograd. A masked token's y is 0."""
    dtype, y_dtype = common.compute_dtype(q, k, v, *(state or ())), v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if mask is not None:  # zeros write nothing and read nothing
        q, k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k, v))
    kv_BHNE, z_BHE = (x.to(dtype) for x in state or empty_state(v, k.shape[3]))
    numerators, denominators = [], []
    for t in range(q.shape[1]):
        if reset is not None:
            now = reset[:, t, None, None]
            kv_BHNE, z_BHE = kv_BHNE.masked_fill(now[..., None], 0), z_BHE.masked_fill(now, 0)
        kv_BHNE = kv_BHNE + v[:, t, :, :, None] * k[:, t, :, None, :]
        z_BHE = z_BHE + k[:, t]
        # A product and a sum, not `@`: autocast leaves it in full precision.
        numerators.append((kv_BHNE * q[:, t, :, None, :]).sum(-1))
        denominators.append((z_BHE * q[:, t]).sum(-1, keepdim=True))
    den = torch.stack(denominators, 1) + eps
    if mask is not None:
        den = den.masked_fill(~mask[:, :, None, None], 1)
    return (torch.stack(numerators, 1) / den).to(y_dtype), (kv_BHNE, z_BHE)


def empty_state(v: Tensor, features: int) -> FeatureState:
    """Zeros for values `v` [B, T, H, N]: kv [B, H, N, E] and z [B, H, E] with E = `features`."""
    batch, _, heads, size = v.shape
    return v.new_zeros(batch, heads, size, features), v.new_zeros(batch, heads, features)


dispatch.register("linear_attention", dispatch.Backend("reference", reference))
dispatch.register("linear_attention", dispatch.Backend("chunked", taylor_chunked.linear))
dispatch.register("linear_attention", dispatch.Backend("native", native_taylor.linear, native_taylor.unusable))
